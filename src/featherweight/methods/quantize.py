"""Quantize: integers for weights and activations, ranges from calibration examples.

Static post-training quantization (Jacob et al. 2018, arXiv:1712.05877). Which
values become integers follows the target's kernels: every operator that the
runtime runs in integers reads integers, and so does what only moves or clamps
values behind it. Operators whose kernels want one grid for inputs and output (a
concatenation, on some runtimes) get the range of all of them together. A range is
min-max, a percentile, or the least squared error (tools/ranges.py). Layers that lose
most can stay float (``fallback``, ``where``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from featherweight.errors import DataError, RecipeError, TargetError
from featherweight.formats import Granularity, IntQuant, PerChannel, PerGroup, PerTensor, TensorFormat
from featherweight.graph import Graph, Node, trace
from featherweight.method import Context, Kind, Method, Need
from featherweight.model import Model
from featherweight.recipe import Choice, Hole
from featherweight.tools.ranges import Histogram, RangeRule, activation_range, weight_range
from featherweight.tools.simulate import Replay, layer_errors

_WEIGHTED: Mapping[str, int] = {  # operator -> axis of the output channels in its weight
    "conv1d": 0,
    "conv2d": 0,
    "conv3d": 0,
    "conv_transpose1d": 1,
    "conv_transpose2d": 1,
    "linear": 0,
}
_ARITHMETIC = frozenset(
    {"add", "mul", "cat", "matmul", "bmm", "adaptive_avg_pool2d", "avg_pool2d", "sigmoid", "leaky_relu"}
)
_CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp"})
_MOVES = frozenset(
    {"max_pool2d", "reshape", "view", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "dropout"}
)
_ERROR_EXAMPLES = 32


class Quantize(Method, frozen=True, extra="forbid"):
    """8-bit integers, static; or integer weights alone. Defaults are the strongest setting without a search.

    Attributes:
        weights: Type of the weights.
        activations: Type of the activations; ``none`` stores only weights as integers.
        granularity: What shares a weight's scale.
        group: Weights that share a scale, for ``per_group``.
        symmetric_weights: Zero in the middle of the weights' grid.
        symmetric_activations: Zero in the middle of the activations' grid.
        range: How activation ranges are chosen: minmax, percentile, mse.
        weight_range: How weight ranges are chosen.
        percentile: Share of values inside the range, in percent, for ``percentile``.
        samples: Calibration examples to read.
        fallback: So many layers, those that lose most in the simulation, stay float.
    """

    kind: ClassVar[Kind] = "format"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    weights: Literal["int8", "int4"] = "int8"
    activations: Literal["int8", "none"] = "int8"
    granularity: Literal["per_channel", "per_tensor", "per_group"] = "per_channel"
    group: Annotated[int, Field(ge=2)] = 32
    symmetric_weights: bool = True
    symmetric_activations: bool = False
    range: RangeRule = "mse"
    weight_range: RangeRule = "mse"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    samples: Annotated[int, Field(ge=1)] = 256
    fallback: Annotated[int, Field(ge=0)] = 0

    @classmethod
    def holes(cls, model: Model, context: Context) -> dict[str, Hole]:
        layers = sum(node.op in _WEIGHTED for entry in model.entries for node in trace(model, entry))
        return {
            "range": Choice(("mse", "percentile", "minmax")),
            "fallback": Choice(tuple(n for n in (0, 1, 2, 4) if n < max(layers, 1))),
            "activations": Choice(("int8", "none")),
        }

    def apply(self, model: Model, context: Context) -> Model:
        done = self._formats(model, context, frozenset())
        if self.fallback:
            spared = self._worst(model.evolve(formats=done), context)
            done = self._formats(model, context, spared)
        if not done:
            raise RecipeError(
                f"quantize found no layer to quantize for {context.target.runtime}",
                fix="check where: it excludes every layer that the runtime has integer kernels for",
            )
        return model.evolve(formats={**model.formats, **done})

    def _formats(
        self, model: Model, context: Context, spared: frozenset[str]
    ) -> dict[str, tuple[TensorFormat, ...]]:
        formats: dict[str, tuple[TensorFormat, ...]] = {}
        graphs = {entry: trace(model, entry) for entry in model.entries}
        nodes = [node for graph in graphs.values() for node in graph]
        out = {node.layer for node in nodes if not self.where.selects(node.layer, node.layer_type)} | spared
        held = {name for node in nodes if node.layer in out for name in node.parameters.values()}
        for entry, graph in graphs.items():
            plan = self._plan(context, graph, out, held | set(model.formats))
            for name, axis in plan.weights.items():
                formats[name] = (self._weight(model, name, axis, context),)
            if plan.values:
                formats |= self._activations(model, entry, plan, context)
        return formats

    # ---- what becomes integers

    def _plan(self, context: Context, graph: Graph, out: Set[str], held: Set[str]) -> _Plan:
        """``out``: layers that stay float; ``held``: parameters that stay as they are for every reader."""
        weight = self._draft("weight")
        activation = self._draft("activation") if self.activations == "int8" else None
        chosen: list[Node] = []
        weights: dict[str, int] = {}
        for node in graph:
            if node.layer in out:
                continue
            axis = _WEIGHTED.get(node.op)
            parameter = node.parameters.get("weight")
            if axis is not None and parameter is not None and parameter not in held:
                pays = activation is None or context.supports.integers_pay(node, graph)
                fits = context.supports(node.op, weight, activation if pays else None)
                fits = fits and _divides(weight, graph, parameter)
                weights |= {parameter: axis} if fits else {}
                fits = fits and pays
            else:
                plain = activation is not None and node.op in _ARITHMETIC and _floats(graph, node)
                plain = plain and not _is_masking(graph, node)
                fits = plain and context.supports(node.op, None, activation)
            chosen += [node] if fits else []
        if activation is None:
            return _Plan(weights, {})
        fixed = context.supports.fixed_ranges
        chosen = [node for node in chosen if not _torn(graph, node, chosen, context)]
        values = _integer_values(graph, chosen, context, activation)
        own = {node.outputs[0]: fixed[node.op] for node in chosen if node.op in fixed}
        return _Plan(weights, values, _one_grid(chosen, values, context), own)

    def _draft(self, role: Literal["weight", "activation"]) -> IntQuant:
        """The format asked for, with a range yet to be found."""
        if role == "activation":
            return IntQuant(torch.tensor(-1.0), torch.tensor(1.0), 8, self.symmetric_activations)
        granularity: Granularity = PerTensor()
        if self.granularity == "per_channel":
            granularity = PerChannel(0)
        elif self.granularity == "per_group":
            granularity = PerGroup(1, self.group)
        one = torch.ones((1,) * {PerTensor: 0, PerChannel: 1, PerGroup: 2}[type(granularity)])
        return IntQuant(-one, one, int(self.weights.removeprefix("int")), self.symmetric_weights, granularity)

    # ---- ranges

    def _weight(self, model: Model, name: str, axis: int, context: Context) -> TensorFormat:
        draft = self._draft("weight")
        if isinstance(draft.granularity, PerChannel):
            draft = replace(draft, granularity=PerChannel(axis))
        grid = _realised(draft, "weight", context, name)
        weight = model.module.get_parameter(name)
        low, high = weight_range(weight, grid, self.weight_range, self.percentile)
        return replace(grid, low=low, high=high)

    def _activations(
        self, model: Model, entry: str, plan: _Plan, context: Context
    ) -> dict[str, tuple[TensorFormat, ...]]:
        """One format per source of values; what is only moved shares it."""
        grids = {source: plan.grids.get(source, source) for source in plan.values.values()}
        histograms = {name: Histogram() for name in grids.values()}
        replay = Replay(model, entry)

        def observe(name: str, value: Tensor) -> Tensor:
            if name in grids:
                histograms[grids[name]].update(value, name)
            return value

        batches = 0
        with torch.inference_mode():
            for batch in _calibration(context, self.samples):
                replay(batch, observe)
                batches += 1
        if not batches:
            raise DataError(
                "quantize found no calibration examples",
                fix="give x_calibration or x_train, or activations: none",
            )
        formats: dict[str, tuple[TensorFormat, ...]] = {}
        for name, seen in histograms.items():
            formats[name] = (self._activation(seen, name, plan.fixed.get(name), context),)
        return {value: formats[grids[source]] for value, source in plan.values.items()}

    def _activation(
        self, seen: Histogram, name: str, fixed: tuple[float, float] | None, context: Context
    ) -> TensorFormat:
        low, high = (torch.tensor(end) for end in fixed or (seen.low, seen.high))
        draft = replace(self._draft("activation"), low=low, high=high)
        grid = _realised(draft, "activation", context, name)
        if fixed:
            return grid
        low_end, high_end = activation_range(seen, grid, self.range, self.percentile)
        return replace(grid, low=torch.tensor(low_end), high=torch.tensor(high_end))

    # ---- fallback

    def _worst(self, model: Model, context: Context) -> frozenset[str]:
        """The layers whose output suffers most from their own formats, simulated one at a time."""
        errors: dict[str, float] = {}
        for entry in model.entries:
            layers = {node.name: node.layer for node in trace(model, entry) if node.op in _WEIGHTED}
            batches = _calibration(context, min(self.samples, _ERROR_EXAMPLES))
            for name, decibels in layer_errors(model, batches, entry).items():
                if name in layers:
                    errors[layers[name]] = min(decibels, errors.get(layers[name], np.inf))
        return frozenset(sorted(errors, key=lambda layer: errors[layer])[: self.fallback])


PLUGIN = Quantize


@dataclass(frozen=True)
class _Plan:
    """What becomes integers.

    Attributes:
        weights: Parameters, with the axis of their channels.
        values: Value -> the value whose range it takes, its source.
        grids: Source -> the one that names the grid it shares with others.
        fixed: Source -> the only range that its operator gives.
    """

    weights: Mapping[str, int]
    values: Mapping[str, str]
    grids: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def _divides(weight: IntQuant, graph: Graph, parameter: str) -> bool:
    """Whether groups fit a parameter: they are told for matrices only."""
    return not isinstance(weight.granularity, PerGroup) or len(graph.parameter_shapes[parameter]) == 2


def _torn(graph: Graph, node: Node, chosen: list[Node], context: Context) -> bool:
    """Whether an operator of one grid reads a value whose range its own operator has fixed."""
    if node.op not in context.supports.one_grid:
        return False
    picked = {one.name for one in chosen}
    makers = [graph.producer.get(name) for name in node.inputs]
    return any(
        maker is not None and maker.name in picked and maker.op in context.supports.fixed_ranges
        for maker in makers
    )


def _one_grid(chosen: list[Node], values: Mapping[str, str], context: Context) -> dict[str, str]:
    """Source -> the first of those with which it shares a grid."""
    shared: dict[str, str] = {}

    def first(name: str) -> str:
        while name in shared:
            name = shared[name]
        return name

    for node in chosen:
        if node.op not in context.supports.one_grid:
            continue
        ends = [first(values[name]) for name in (*node.inputs, *node.outputs) if name in values]
        for name in ends[1:]:
            if first(name) != first(ends[0]):
                shared[first(name)] = first(ends[0])
    return {name: first(name) for name in shared}


def _floats(graph: Graph, node: Node) -> bool:
    """Whether an operator works on float tensors only (no constants, no integers)."""
    reads = [graph.values[name] for name in (*node.inputs, *node.outputs)]
    if not node.inputs or (node.op in ("add", "mul") and len(node.inputs) < 2):
        return False  # a constant or a parameter on the other side
    return all(value.dtype == torch.float32 for value in reads) and not node.parameters


def _is_masking(graph: Graph, node: Node) -> bool:
    """Whether a sum goes to softmax alone: a mask of -10,000 or less would leave no steps for the scores."""
    readers = [reader for name in node.outputs for reader in graph.consumers[name]]
    return node.op == "add" and bool(readers) and all("softmax" in reader.op for reader in readers)


def _integer_values(
    graph: Graph, chosen: list[Node], context: Context, activation: TensorFormat
) -> dict[str, str]:
    """Values that become integers -> the value whose range they take.

    Inputs of every chosen operator, and its output behind the clamps that it
    absorbs. A value that was only moved (reshaped, pooled by maximum) takes the
    range of where it came from, so that the move costs nothing.
    """
    picked = {node.name for node in chosen}
    wanted: dict[str, None] = {}
    joined = {_joined_input(graph, node, chosen, context) for node in chosen}
    for node in chosen:
        for name in node.inputs:
            if name not in joined:
                wanted[name] = None
        end = _behind_clamps(graph, node, context, activation)
        readers = graph.consumers[end]
        integers = [reader for reader in readers if _reaches(graph, reader, picked)]
        if end not in joined and (integers or node.op not in context.supports.float_outputs):
            wanted[end] = None
    values: dict[str, str] = {}
    for name in wanted:
        source, chain = name, [name]
        while True:
            move = graph.producer.get(source)
            if move is None or not _moves(move) or len(move.inputs) != 1:
                break
            if not context.supports(move.op, None, activation) and move.op != "dropout":
                break
            source = move.inputs[0]
            chain.append(source)
        end_node = graph.producer.get(source)
        integral = source in wanted or (end_node is not None and end_node.name in picked)
        for link in chain if integral or len(chain) > 1 else [name]:
            values[link] = source
    return values


def _moves(node: Node) -> bool:
    """Whether an operator's values are those that it reads, or zeros, which every grid holds."""
    if node.op == "pad":
        return node.attributes.get("mode") == "constant" and not node.attributes.get("value")
    return node.op in _MOVES


def _joined_input(graph: Graph, node: Node, chosen: list[Node], context: Context) -> str | None:
    """The input of a sum that is added inside the integer layer which makes it, for this sum alone."""
    if node.op not in context.supports.joined:
        return None
    layers = {one.name for one in chosen if one.op in _WEIGHTED}
    for name in node.inputs:
        maker = graph.producer.get(name)
        alone = len(graph.consumers[name]) == 1 and name not in graph.outputs
        if alone and maker is not None and maker.name in layers:
            return name
    return None


def _reaches(graph: Graph, reader: Node, picked: set[str]) -> bool:
    """Whether an operator, or one behind moves of its values, runs in integers."""
    if reader.name in picked:
        return True
    if not _moves(reader):
        return False
    return any(_reaches(graph, after, picked) for out in reader.outputs for after in graph.consumers[out])


def _behind_clamps(graph: Graph, node: Node, context: Context, activation: TensorFormat) -> str:
    """The operator's output, or that of the clamps which alone read it and which integer kernels absorb."""
    value = node.outputs[0]
    while value not in graph.outputs:
        readers = graph.consumers[value]
        if len(readers) != 1 or readers[0].op not in _CLAMPS:
            break
        if not context.supports(readers[0].op, None, activation):
            break
        value = readers[0].outputs[0]
    return value


def _realised(
    draft: IntQuant, role: Literal["weight", "activation"], context: Context, name: str
) -> IntQuant:
    try:
        grid = context.supports.realise(draft, role)
    except TargetError as error:
        raise TargetError(error.what, where=f"'{name}', asked for by quantize", fix=error.fix) from error
    if not isinstance(grid, IntQuant):
        raise TargetError(f"{context.target.runtime} stores no integers for '{name}'")
    return grid


def _calibration(context: Context, samples: int) -> Iterable[tuple[Tensor, ...]]:
    """Batches of flat inputs, at most so many examples, with a progress bar."""
    batches = context.data.calibration(samples)
    total = -(-samples // context.data.batch_size)
    for arrays in context.progress.track(islice(batches, total), "calibrating", total):
        yield tuple(torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays)
