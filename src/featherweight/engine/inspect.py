"""Where the cost is: layers with their size, work, memory, measured time and sensitivity, as data.

What is static comes from the traced graph. Times come from ONNX Runtime's profile of the float model, taken
in the measuring process. Sensitivity is simulated. docs/inspect.md describes what is handed back.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featherweight.data import Data
from featherweight.drops import drop_of_rows
from featherweight.engine.costs import profiled
from featherweight.errors import DataError, MissingRuntime, TargetError
from featherweight.exchange.attribution import Attribution
from featherweight.formats import IntQuant, PerChannel
from featherweight.graph import Graph, Node, trace
from featherweight.method import Progress
from featherweight.model import Model
from featherweight.plugins import find_runtime, runtime_names
from featherweight.runtime import Runtime, Target
from featherweight.tools.costs import layer_costs, node_macs, totals
from featherweight.tools.liveness import VIEWS, peak_memory
from featherweight.tools.sensitivity import alone, layer_weights
from featherweight.tools.simulate import as_run, simulate, sqnr_db

OTHER = "other"  # the row of kernels that stand for no layer
_PROFILER = "onnxruntime"
_BITS = (8, 4)
_Row = dict[str, Any]


def inspect_model(
    model: Model,
    data: Data | None,
    *,
    examples: int,
    threads: int,
    static: bool,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Rows by layer and totals of every entry.

    Args:
        model: Any; its formats count for bytes and are lowered.
        data: For the sensitivity of the entry 'forward'; None leaves it out.
        examples: Scored examples that the sensitivity takes at most, a seeded choice.
        threads: Cores of the profiled session.
        static: Measure nothing.
        seed: Of that choice.
        progress: Shows bars.

    Returns:
        JSON, described in docs/inspect.md.

    Raises:
        LoadError: torch.export cannot follow an entry.
        DataError: Examples do not fit, or there are none.
        RunnerError: ONNX Runtime crashed.
    """
    rows = {entry: _static_rows(model, entry) for entry in model.entries}
    entries: dict[str, dict[str, Any]] = {entry: _static_totals(model, entry) for entry in model.entries}
    notes: list[str] = []
    if static:
        notes.append("latency is not measured: --static")
    else:
        try:
            _add_latency(model, rows, entries, threads, progress)
        except (MissingRuntime, TargetError) as error:
            fix = f"; {error.fix}" if error.fix else ""
            notes.append(f"latency is not measured: {error.what}{fix}")
    sensitivity = None
    if data is not None:
        if "forward" not in model.entries:
            raise DataError(
                f"the model is called in several ways ({', '.join(model.entries)}), and data has one",
                fix="leave --data out: sensitivity needs a model with one entry",
            )
        sensitivity = _add_sensitivity(model, data, rows["forward"], examples, seed, progress)
    return {
        **totals(model),
        "entries": entries,
        "layers": [{"entry": entry, **row} for entry, found in rows.items() for row in found.values()],
        "sensitivity": sensitivity,
        "refused": refused(model),
        "notes": notes,
    }


def _static_rows(model: Model, entry: str) -> dict[str, _Row]:
    return {cost.name: asdict(cost) for cost in layer_costs(model, entry)}


def _static_totals(model: Model, entry: str) -> dict[str, Any]:
    graph, peak = trace(model, entry), peak_memory(model, entry)
    macs = sum(node_macs(graph, node) for node in graph)
    return {"macs": macs, "peak_activation_bytes": peak.bytes, "peak_at": peak.at}


# ---- measured


def _add_latency(
    model: Model,
    rows: Mapping[str, dict[str, _Row]],
    entries: Mapping[str, dict[str, Any]],
    threads: int,
    progress: Progress,
) -> None:
    """Add to each row what its kernels took, and to each entry what a call takes."""
    runtime = find_runtime(_PROFILER)
    runtime.require()
    target = Target(runtime=_PROFILER, threads=threads).resolved()
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        artifact = runtime.lower(model, target, Path(folder))
        for entry in progress.track(model.entries, "Profiling on ONNX Runtime", len(model.entries)):
            place = Path(folder) / f"profiled-{len(list(Path(folder).iterdir()))}"
            place.mkdir()
            seen = profiled(artifact, model, entry, target, place)
            total = seen.kernel_s
            entries[entry].update(latency_s=seen.latency_s, kernel_s=total, calls=seen.calls, threads=threads)
            _add_times(rows[entry], seen.graph, seen.found, seen.kernels, total)
            opaque = [row.get("latency_share") for row in rows[entry].values() if row["type"] == "Opaque"]
            if opaque:  # what no method can change
                entries[entry]["opaque_share"] = sum(share or 0.0 for share in opaque)


def _add_times(
    rows: dict[str, _Row], graph: Graph, found: Attribution, kernels: Mapping[str, float], total: float
) -> None:
    keys = {node.name: _row_of(node, rows) for node in graph}
    times: dict[str, float] = {}
    for kernel, share in found.shares.items():
        for call, part in (share or {OTHER: 1.0}).items():
            key = keys.get(call, OTHER)
            times[key] = times.get(key, 0.0) + part * kernels.get(kernel, 0.0)
    for node in graph:
        key = keys[node.name]
        if key in times and key not in rows:
            rows[key] = _function_row(key, node)
        if key in rows and "/" in node.name and rows[key].get("aggregated"):
            rows[key]["activation_bytes"] += _made(graph, node)
    if times.get(OTHER):
        rows[OTHER] = _empty(OTHER, "", ())
    fused: dict[str, dict[str, None]] = {}
    for call, receivers in found.fused.items():
        fused.setdefault(keys[call], {}).update(
            {keys[name]: None for name in receivers if keys[name] != keys[call]}
        )
    first = {key: index for index, key in reversed(list(enumerate(keys.values())))}
    ordered = sorted(rows.items(), key=lambda item: first.get(item[0], len(keys)))
    rows.clear()
    rows.update(ordered)
    for key, row in rows.items():
        row.pop("aggregated", None)
        row["latency_s"] = times.get(key, 0.0)
        row["latency_share"] = row["latency_s"] / total if total else 0.0
        row["fused_into"] = list(fused.get(key, ())) if key not in times else []


def _row_of(node: Node, rows: Mapping[str, _Row]) -> str:
    """The row of a call: its layer's, its own, or one for all such functions of its owner."""
    if "/" not in node.name:
        return node.layer
    return node.name if node.name in rows else f"{node.layer}/{node.op}"


def _empty(name: str, kind: str, shape: tuple[int, ...]) -> _Row:
    zeros = dict.fromkeys(("macs", "params", "bytes", "activation_bytes"), 0)
    return {"name": name, "type": kind, "shape": shape, **zeros}


def _function_row(key: str, node: Node) -> _Row:
    return {**_empty(key, node.op, ()), "aggregated": True}


def _made(graph: Graph, node: Node) -> int:
    """Bytes of what a function makes for one example; a view makes nothing."""
    if node.op in VIEWS:
        return 0
    values = [graph.values[name] for name in node.outputs]
    return sum(-(-math.prod(v.shape) // max(graph.batch, 1)) * v.dtype.itemsize for v in values)


# ---- simulated


def _add_sensitivity(
    model: Model, data: Data, rows: dict[str, _Row], examples: int, seed: int, progress: Progress
) -> dict[str, Any]:
    """Add to each row with weights the drop when they alone are stored in 8 and in 4 bits."""
    if data.scored is None:
        raise DataError("sensitivity needs scored examples", fix="add x (and y, where there are labels)")
    count = min(examples, len(data.scored))
    order = np.random.default_rng(seed).permutation(len(data.scored))
    picks = np.sort(order[:count])
    original = _Remembered(as_run(simulate(model)))
    metric = data.metric
    before = data.score(original.again, picks, original.again)[metric.name]
    original.known = True
    baseline = metric.reduce(before)
    weights = {name: own for name, own in layer_weights(model).items() if name in rows}
    jobs = [(name, bits) for name in weights for bits in _BITS]
    for name, bits in progress.track(jobs, "Sensitivity (simulated)", len(jobs)):
        changed = _Compared(as_run(alone(model, weights[name], bits)), original)
        original.rewind()
        after = data.score(changed, picks, original.last)[metric.name]
        told = rows[name].setdefault("sensitivity", {})
        told[f"int{bits}"] = {
            "drop": _finite(drop_of_rows(metric, before, after)),
            "sqnr_db": sqnr_db(changed.signal, changed.noise),
        }
    return {
        "simulated": True,
        "metric": metric.name,
        "baseline": _finite(baseline),
        "examples": count,
        "bits": list(_BITS),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


_Arrays = tuple[np.ndarray, ...]


class _Remembered:
    """The original's outputs of each call in order, so that they are computed once."""

    def __init__(self, run: Callable[..., _Arrays]) -> None:
        self._run = run
        self._kept: list[tuple[_Arrays, _Arrays]] = []
        self._place = 0
        self.known = False

    def rewind(self) -> None:
        self._place = 0

    def again(self, *inputs: np.ndarray) -> _Arrays:
        """The outputs for these inputs; remembered if they are those of the next call."""
        if not self.known:
            if not (self._kept and _same(self._kept[-1][0], inputs)):
                self._kept.append((inputs, self._run(*inputs)))
            return self._kept[-1][1]
        if self._place < len(self._kept) and _same(self._kept[self._place][0], inputs):
            self._place += 1
            return self._kept[self._place - 1][1]
        return self._run(*inputs)

    def last(self, *inputs: np.ndarray) -> _Arrays:
        """The outputs of the call that was asked for last, when these are its inputs."""
        if self._place and _same(self._kept[self._place - 1][0], inputs):
            return self._kept[self._place - 1][1]
        return self._run(*inputs)


def _same(one: _Arrays, other: _Arrays) -> bool:
    return all(a is b or np.array_equal(a, b) for a, b in zip(one, other, strict=True))


class _Compared:
    """Runs the changed model and adds up the energy of what changed."""

    def __init__(self, run: Callable[..., _Arrays], original: _Remembered) -> None:
        self._run = run
        self._original = original
        self.signal = self.noise = 0.0

    def __call__(self, *inputs: np.ndarray) -> _Arrays:
        outputs = self._run(*inputs)
        for ours, meant in zip(outputs, self._original.again(*inputs), strict=True):
            if meant.dtype.kind == "f" and ours.shape == meant.shape:
                self.signal += float(np.square(meant, dtype=np.float64).sum())
                self.noise += float(np.square(ours.astype(np.float64) - meant).sum())
        return outputs


# ---- what runtimes refuse


def refused(model: Model) -> dict[str, Any]:
    """Runtime -> what it would not run: in float, in 8 bits, and with weights in 4 bits.

    Each is {operator: layers or owners}; what is refused in 8 bits stays float there.
    """
    return {name: _refusals(model, find_runtime(name)) for name in runtime_names()}


def _refusals(model: Model, runtime: Runtime) -> dict[str, Any]:
    target = Target(runtime=runtime.name).resolved()
    weight = {bits: _draft(bits, PerChannel(0)) for bits in _BITS}
    activation = _draft(8, None)
    told: dict[str, dict[str, dict[str, None]]] = {"float": {}, "int8": {}, "int4_weights": {}}
    for entry in model.entries:
        graph = trace(model, entry)
        for node in graph:
            if node.op in VIEWS or not graph.values[node.outputs[0]].dtype.is_floating_point:
                continue
            weighted = bool(node_macs(graph, node)) and "weight" in node.parameters
            asked = {"float": (None, None), "int8": (weight[8] if weighted else None, activation)}
            if weighted:
                asked["int4_weights"] = (weight[4], None)
            for kind, formats in asked.items():
                if not runtime.supports(node.op, *formats, target):
                    told[kind].setdefault(node.op, {})[node.layer] = None
    plain = {kind: {op: list(layers) for op, layers in ops.items()} for kind, ops in told.items()}
    return {"installed": runtime.installed(), **plain}


def _draft(bits: int, granularity: PerChannel | None) -> IntQuant:
    if granularity is None:
        return IntQuant(torch.tensor(-1.0), torch.tensor(1.0), bits)
    return IntQuant(-torch.ones(1), torch.ones(1), bits, True, granularity, signed=True)
