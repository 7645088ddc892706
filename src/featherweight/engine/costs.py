"""What each layer costs on the target, in float and in integers: measured once, kept in the store.

The original and its plain int8 form are profiled kernel by kernel in the measuring process; a kernel's time
goes to the layers that it stands for (exchange/attribution.py). A third network, in which every other layer
is float, tells what the borders between both cost for each element that is converted there. What layers cost
when they keep some of their channels is measured beside (``widths.py``). Nothing is measured before somebody
asks.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from featherweight.data import Data
from featherweight.engine.jobs import Runner
from featherweight.engine.store import Store, digest
from featherweight.engine.widths import Widths, measure, shapes
from featherweight.exchange.attribution import Attribution, attribute, write_named
from featherweight.graph import Graph, trace
from featherweight.method import Silent
from featherweight.model import Entry, Model
from featherweight.recipe import Recipe, Step
from featherweight.runtime import Artifact, Runtime, Target
from featherweight.tools.costs import node_macs

if TYPE_CHECKING:
    from featherweight.engine.run import Run

_MIXED = "mixed"
_TO_PLAIN, _FROM_PLAIN = "ReorderOutput", "ReorderInput"  # ONNX Runtime's changes of layout
_PLAIN: Mapping[str, Any] = {
    "range": "minmax",
    "weight_range": "minmax",
    "samples": 8,
}  # integers whose values do not matter


def example_call(entry: Entry) -> tuple[np.ndarray, ...]:
    """Arrays of one call with one example; recurrent states may have the batch on another axis."""
    batch = {axes[0] for axes in entry.dynamic_axes.values() if 0 in axes}
    made = []
    for name, value in zip(entry.input_names, entry.example_inputs, strict=True):
        for axis, symbol in entry.dynamic_axes.get(name, {}).items():
            value = value.narrow(axis, 0, 1) if symbol in batch else value
        made.append(value.numpy())
    return tuple(made)


@dataclass(frozen=True)
class Profiled:
    """Where the time of a call of one entry goes.

    Attributes:
        latency_s: Median of calls that were not profiled.
        calls: Profiled calls.
        kernels: Optimized node -> seconds of a call.
        optimized: The graph that ran.
        graph: The traced one.
        found: Which calls of it the kernels stand for.
    """

    latency_s: float
    calls: int
    kernels: Mapping[str, float]
    optimized: onnx.ModelProto
    graph: Graph
    found: Attribution

    @property
    def kernel_s(self) -> float:
        """Seconds of all kernels."""
        return sum(self.kernels.get(node.name, 0.0) for node in self.optimized.graph.node)


def profiled(artifact: Artifact, model: Model, entry: str, target: Target, place: Path) -> Profiled:
    """Profile one entry of an artifact in the measuring process.

    Args:
        artifact: ONNX files of the model.
        model: What it was made of.
        entry: Which way of calling it.
        target: Whose runtime runs it.
        place: An empty folder.

    Raises:
        TargetError: The runtime tells nothing of its kernels.
        RunnerError: The runtime crashed.
    """
    named = write_named(artifact.folder / artifact.entries[entry], place)
    copy = Artifact(artifact.runtime, place, (named.name,), {"forward": named.name})
    with Runner("profile", {"artifact": copy}, target, inputs=example_call(model.entries[entry])) as runner:
        while runner.receive() is not None:
            pass
        seen = runner.result()
        optimized = onnx.load(runner.folder / "optimized.onnx", load_external_data=False)
    graph = trace(model, entry)
    macs = {node.name: node_macs(graph, node) for node in graph}
    found = attribute(onnx.load(named, load_external_data=False), optimized, graph, macs)
    return Profiled(seen["latency_s"], seen["calls"], seen["kernels"], optimized, graph, found)


class MeasuredCosts:
    """Prices of a run's layers on its target; measured when the first one is asked for."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._widths: dict[bool, dict[str, Widths]] = {}

    def seconds(self, layer: str, integers: bool) -> float | None:
        """Seconds of one call of a layer in float or in integers; None where it was not measured."""
        found = self._table
        return None if found is None else found[_form(integers)]["layers"].get(layer)

    def conversion(self, layer: str) -> float | None:
        """Seconds to turn what a float layer among integer ones reads and makes from one into the other."""
        found = self._table
        return None if found is None else found["conversions"].get(layer)

    def total(self, integers: bool) -> float | None:
        """Seconds of one call of the whole network in float, or in integers wherever those pay."""
        found = self._table
        return None if found is None else found[_form(integers)]["total"]

    def scaled(self, layer: str, inputs: float, outputs: float, integers: bool) -> float | None:
        """Seconds of one call of a layer that keeps these fractions (0 to 1) of its channels; None: unknown.

        Measured at a few widths (see ``widths.py``) when the first one is asked for, kept in the store; a
        layer of a kind that is not costs as its multiply-accumulates.
        """
        whole = self.seconds(layer, integers)
        if whole is None:
            return None
        if integers not in self._widths:
            self._widths[integers] = self._measured_widths(integers)
        seen = self._widths[integers].get(layer)
        if seen is None:
            return whole * inputs * outputs
        return whole * seen.ratio(inputs, outputs, self._run.runtime.width_multiple(self._run.target))

    @property
    def known(self) -> bool:
        """Whether the runtime tells what its kernels take, so that layers have prices."""
        return type(self._run.runtime).profile is not Runtime.profile and self._run.target.device == "local"

    @cached_property
    def _table(self) -> dict[str, Any] | None:
        return self._kept("costs", self._measure) if self.known else None

    def _measured_widths(self, integers: bool) -> dict[str, Widths]:
        found = self._kept(f"widths {_form(integers)}", lambda: self._measure_widths(integers))
        return {layer: Widths.from_json(found["shapes"][place]) for layer, place in found["layers"].items()}

    def _kept(self, what: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """From the store, else measured now."""
        run = self._run
        key = digest(what, run.start.key, run.target.to_json(), run.runtime.version(), run.sources, run.seed)
        kept: dict[str, Any] | None = run.store.get_json("costs", key)
        if kept is None:
            kept = find()
            run.store.put_json("costs", key, kept)
        return kept

    def _measure_widths(self, integers: bool) -> dict[str, Any]:
        """Each layer's place in the list of what was measured: layers of one shape share it."""
        run = self._run
        wanted = shapes(run.start)
        spent = {layer: self.seconds(layer, integers) or 0.0 for layer in wanted}

        def profiler(network: Model) -> dict[str, float]:
            what = f"profiling layers at several widths on {run.target.runtime}"
            (found,) = [self._profile_alone(one, integers) for one in run.progress.track([network], what, 1)]
            return found

        multiple = run.runtime.width_multiple(run.target)
        found = measure(wanted, spent, multiple, run.seed, profiler)
        different = list(dict.fromkeys(found.values()))
        places = {layer: different.index(one) for layer, one in found.items()}
        return {"layers": places, "shapes": [one.to_json() for one in different]}

    def _profile_alone(self, network: Model, integers: bool) -> dict[str, float]:
        """Layer -> seconds in a network that is not the original, with what it costs to feed it."""
        own = self._run
        examples = Data.of(x_train=network.entries["forward"].example_inputs[0].numpy())
        with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
            place = Path(folder)
            (place / "profile").mkdir()
            run = type(own)(network, examples, own.target, Store(place / "store"), seed=own.seed)
            model = run.apply(Recipe((Step("quantize", _PLAIN),) if integers else ()))
            seen = profiled(run.lower(model), model, "forward", own.target, place / "profile")
        return layer_seconds(seen, moved=True)

    def _measure(self) -> dict[str, Any]:
        fold = Step("fold")
        folded = self._made(fold)
        integers = self._made(fold, Step("quantize", _PLAIN))
        moved = _elements(integers)
        spared = list(moved)[::2]
        rules = {**_PLAIN, "layers": dict.fromkeys(spared, "float")}
        forms = {_form(False): folded, _form(True): integers}
        if 0 < len(spared) < len(moved):
            forms[_MIXED] = self._made(fold, Step("quantize", rules))
        table: dict[str, Any] = {form: {"layers": {}, "total": 0.0} for form in (*forms, _MIXED)}
        jobs = [(form, model, entry) for form, model in forms.items() for entry in model.entries]
        what = f"profiling layers on {self._run.target.runtime}"
        for form, model, entry in self._run.progress.track(jobs, what, len(jobs)):
            with tempfile.TemporaryDirectory(prefix="featherweight-") as place:
                seen = profiled(self._run.lower(model), model, entry, self._run.target, Path(place))
            layers = table[form]["layers"]
            for layer, seconds in layer_seconds(seen).items():
                layers[layer] = layers.get(layer, 0.0) + seconds
            table[form]["total"] += seen.kernel_s
        each = 0.0
        if _MIXED in forms:
            each = _excess(table, spared) / sum(moved[layer] for layer in spared)
        conversions = {layer: each * elements for layer, elements in moved.items()}
        return {**{form: table[form] for form in (_form(False), _form(True))}, "conversions": conversions}

    def _made(self, *steps: Step) -> Model:
        """What steps make; what they say of the few examples concerns nobody."""
        run = self._run
        shown, run.progress = run.progress, Silent()
        try:
            return run.apply(Recipe(steps))
        finally:
            run.progress = shown


def _elements(model: Model) -> dict[str, int]:
    """Layer with integer weights, in the order of calls -> elements that one example reads and makes."""
    found: dict[str, int] = {}
    for entry in model.entries:
        graph = trace(model, entry)
        for node in graph:
            if node.layer and set(node.parameters.values()) & model.formats.keys():
                values = [graph.values[name].shape for name in (*node.inputs, *node.outputs)]
                elements = sum(math.prod(shape) for shape in values) // max(graph.batch, 1)
                found[node.layer] = found.get(node.layer, 0) + elements
    return found


def _excess(table: Mapping[str, Any], spared: Sequence[str]) -> float:
    """Seconds that the mixed network takes beyond its layers and what else an integer network does."""
    floats, integers = table[_form(False)]["layers"], table[_form(True)]["layers"]
    change = sum(floats.get(layer, 0.0) - integers.get(layer, 0.0) for layer in spared)
    return max(0.0, float(table[_MIXED]["total"] - table[_form(True)]["total"] - change))


def layer_seconds(seen: Profiled, moved: bool = False) -> dict[str, float]:
    """Layer -> seconds of its kernels in one call; of one without weights, if it has kernels of its own.

    Args:
        seen: A profile.
        moved: With what changes the layout of its input back to the plain one, or of its output from it:
            its kernel is the reason why.
    """
    layers = {node.name: node.layer for node in seen.graph if node.parameters or "/" not in node.name}
    moves = _moves(seen) if moved else {}
    found: dict[str, float] = {}
    for kernel, shares in seen.found.shares.items():
        for call, share in shares.items():
            if call in layers:
                spent = share * (seen.kernels.get(kernel, 0.0) + moves.get(kernel, 0.0))
                found[layers[call]] = found.get(layers[call], 0.0) + spent
    return found


def _moves(seen: Profiled) -> dict[str, float]:
    """Kernel -> seconds of changes of layout right before and behind it that it is the reason of."""
    nodes = list(seen.optimized.graph.node)
    maker = {output: node for node in nodes for output in node.output}
    found: dict[str, float] = {}
    for node in nodes:
        for value in node.input:
            before = maker.get(value)
            if before is None:
                continue
            if before.op_type == _TO_PLAIN:
                found[node.name] = found.get(node.name, 0.0) + seen.kernels.get(before.name, 0.0)
            if node.op_type == _FROM_PLAIN:
                found[before.name] = found.get(before.name, 0.0) + seen.kernels.get(node.name, 0.0)
    return found


def _form(integers: bool) -> str:
    return "int8" if integers else "float"
