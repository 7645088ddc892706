"""Values of a network that was cut: every layer gives again what it gave in the original, by least squares.

Layer by layer in the order of calls, with x̂ what the layer reads in the network as it is by then, y what it
made in the original of the channels that are left, W0 its weights as they were cut, and a ridge r::

    min over W, b of  E |y - W x̂ - b|²  +  r |W - W0|²

(He et al. 2017, arXiv:1707.06168, section 3.1; Luo et al. 2017, ThiNet, arXiv:1707.06342, section 3.2.3).
Where the layer's output is added to another value that is there already, the target is the sum: a residual
branch makes up for what its shortcut has lost (He et al., section 3.3). b is the layer's bias, or it moves
the mean of the batch norm behind. Normal equations are summed up batch by batch, so memory does not grow
with the examples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.graph import Graph, Node, trace
from featherweight.method import Progress, Scratch, Silent, in_memory
from featherweight.model import Cut, Model
from featherweight.tools.columns import (
    add_square,
    axes_of,
    columns_at,
    complete,
    from_rows,
    groups_of,
    is_product,
    positions_of,
    to_rows,
)
from featherweight.tools.walk import Stop, walk

_SILENT = Silent()
_PASSES = frozenset({"dropout", "contiguous", "clone", "alias", "identity"})
_PIECE = 1 << 22  # elements of columns held at once
_WORK = 5e10  # multiplications for the matrix of a layer, as far as
_ENOUGH = 8  # columns for each weight of a row are there


@dataclass(frozen=True)
class Settings:
    """How layers are solved.

    Attributes:
        ridge: As a share of the mean square of what a weight reads.
        sums: Whether a layer makes up for what the other operand of a sum has lost.
    """

    ridge: float = 1e-3
    sums: bool = True


_DEFAULTS = Settings()


def reconstruct(
    model: Model,
    original: Model,
    batches: Sequence[tuple[Tensor, ...]],
    *,
    selects: Callable[[Node], bool],
    settings: Settings = _DEFAULTS,
    seed: int = 0,
    entry: str = "forward",
    progress: Progress = _SILENT,
    scratch: Scratch = in_memory,
) -> dict[str, Tensor]:
    """Weights, biases and means of batch norms with which a cut network does what the original did.

    Args:
        model: The cut network; its edits tell which channels are left.
        original: What it was cut from.
        batches: Flat inputs; no labels.
        selects: Whether the tensors of a call's layer may change.
        settings: How layers are solved.
        seed: Of the positions that are looked at, where there are very many.
        entry: Which way of calling the module.
        progress: Where it says how far it is.
        scratch: Where values live.

    Returns:
        New values of parameters and buffers by name.
    """
    graph = trace(model, entry)
    kept = Kept(model, original)
    readers = Counter(name for node in graph for name in node.parameters.values())
    found: dict[str, Tensor] = {}
    stops = walk(model, original, batches, scratch, entry)
    for stop in progress.track(stops, "reconstructing layers", len(graph.nodes)):
        node = stop.node
        if not selects(node) or any(readers[name] > 1 for name in node.parameters.values()):
            continue
        if not is_product(node):
            continue
        made = _solved(stop, graph, kept, selects, settings, seed)
        for name, value in made.items():
            stop.stored.set_parameter(name, value)
        found |= made
    return found


class Kept:
    """Which indices of the original's axes are left in a cut network.

    Args:
        model: The cut network.
        original: What it was cut from.
    """

    def __init__(self, model: Model, original: Model) -> None:
        state = {**dict(original.module.named_parameters()), **dict(original.module.named_buffers())}
        self._left: dict[tuple[str, int], Tensor] = {}
        for edit in model.edits[len(original.edits) :]:
            if isinstance(edit, Cut) and edit.tensor in state:
                key = (edit.tensor, edit.axis)
                left = self._left.get(key, torch.arange(state[edit.tensor].shape[edit.axis]))
                stay = torch.ones(len(left), dtype=torch.bool)
                stay[list(edit.dropped)] = False
                self._left[key] = left[stay]

    def __call__(self, tensor: str, axis: int) -> Tensor | None:
        """Indices of the original's axis that are left; None: all."""
        return self._left.get((tensor, axis))


# ---- products


@dataclass(frozen=True)
class _Sum:
    """A sum that a layer's output goes into, through a batch norm at most.

    Attributes:
        other: The other operand, by traced name.
        gain: What the batch norm multiplies each channel by; None: there is none.
    """

    other: str
    gain: Tensor | None


def _solved(
    stop: Stop,
    graph: Graph,
    kept: Kept,
    selects: Callable[[Node], bool],
    settings: Settings,
    seed: int,
) -> dict[str, Tensor]:
    """A layer's weight and bias, or the mean of the batch norm behind it."""
    node, weight_name = stop.node, stop.node.parameters["weight"]
    outputs = 0 if "transpose" not in node.op else 1
    if outputs and groups_of(node) > 1:
        return {}
    left = kept(weight_name, outputs)
    weight = stop.stored.parameter(weight_name).detach()
    bias, norm = node.parameters.get("bias"), _norm_behind(graph, node, selects)
    total = _sum_behind(stop, graph) if settings.sums else None
    if _reads_the_same(stop) and (total is None or _same(stop, total.other)):
        return {}
    equations = _equations(stop, left, total, weight, seed)
    start = to_rows(node, weight.double())
    rows, shift = equations.solve(start, settings.ridge, centred=bias is not None or norm is not None)
    found = {weight_name: from_rows(node, rows, weight.shape).to(weight.dtype)}
    if bias is not None:
        found[bias] = shift.reshape(-1).to(weight.dtype)
    elif norm is not None:
        name = norm.parameters["running_mean"]
        found[name] = stop.stored.parameter(name).detach() - shift.reshape(-1).to(weight.dtype)
    return found


def _reads_the_same(stop: Stop) -> bool:
    """Whether nothing before a layer has changed."""
    return all(_same(stop, value) for value in stop.node.inputs)


def _same(stop: Stop, value: str) -> bool:
    return bool(torch.equal(stop.exact.value(value, 0), stop.stored.value(value, 0)))


def _norm_behind(graph: Graph, node: Node, selects: Callable[[Node], bool]) -> Node | None:
    """The batch norm that alone reads a layer, if its statistics may change."""
    readers = graph.consumers[node.outputs[0]]
    if len(readers) != 1 or node.outputs[0] in graph.outputs or readers[0].op != "batch_norm":
        return None
    return readers[0] if "running_mean" in readers[0].parameters and selects(readers[0]) else None


def _sum_behind(stop: Stop, graph: Graph) -> _Sum | None:
    """The sum that alone reads a layer's output, if its other operand is there in both networks."""
    value, gain = stop.node.outputs[0], None
    while value not in graph.outputs and len(graph.consumers[value]) == 1:
        (reader,) = graph.consumers[value]
        if reader.op == "batch_norm" and gain is None:
            gain = _gain(stop, reader)
        elif reader.op == "add" and len(reader.inputs) == 2 and reader.attributes.get("alpha", 1) == 1:
            other = reader.inputs[1 - reader.inputs.index(value)]
            shapes = {graph.values[name].shape for name in (value, other)}
            return _Sum(other, gain) if len(shapes) == 1 and other != value and _alive(stop, other) else None
        elif reader.op not in _PASSES:
            return None
        value = reader.outputs[0]
    return None


def _gain(stop: Stop, norm: Node) -> Tensor | None:
    variance = stop.stored.parameter(norm.parameters["running_var"]).detach()
    gain = (variance + float(norm.attributes.get("eps", 1e-5))).rsqrt()
    if "weight" in norm.parameters:
        gain = gain * stop.stored.parameter(norm.parameters["weight"]).detach()
    least = 1e-3 * float(gain.abs().max()) + 1e-12
    return torch.where(gain.abs() < least, torch.full_like(gain, math.inf), gain)  # those make up for nothing


def _alive(stop: Stop, value: str) -> bool:
    return stop.stored.has(value) and stop.exact.has(value)


def _equations(stop: Stop, left: Tensor | None, total: _Sum | None, weight: Tensor, seed: int) -> Equations:
    node, shape = stop.node, tuple(weight.shape)
    groups, outputs, size = to_rows(node, weight).shape
    equations = Equations(groups, outputs, size)
    axis = -1 - axes_of(node)
    counts = [
        positions_of(node, stop.stored.value(node.inputs[0], b), shape) for b in range(stop.stored.count)
    ]
    share = min(1.0, max(_ENOUGH * size, _WORK / (size * size * groups)) / max(sum(counts), 1))
    targets = stop.exact.outputs(stop.twin)
    for batch, (count, y) in enumerate(zip(counts, targets, strict=True)):
        x = stop.stored.value(node.inputs[0], batch)
        y = y if left is None else y.index_select(axis, left)
        if total is not None:
            y = y + _lost(stop, total, batch, left, axis)
        flat = y.movedim(axis, -1).reshape(-1, groups, outputs).transpose(0, 1)
        picks = torch.arange(count)
        if share < 1:
            generator = torch.Generator().manual_seed(seed + batch)
            picks = torch.randperm(count, generator=generator)[: max(1, round(share * count))].sort().values
        for part in torch.split(picks, max(1, _PIECE // (size * groups))):
            equations.add(columns_at(node, x, shape, part), flat[:, part])
    return equations


def _lost(stop: Stop, total: _Sum, batch: int, left: Tensor | None, axis: int) -> Tensor:
    """What the other operand of a sum has lost, in the units of the layer's own output."""
    exact, now = stop.exact.value(total.other, batch), stop.stored.value(total.other, batch)
    gap = (exact if left is None else exact.index_select(axis, left)) - now
    if total.gain is None:
        return gap
    return gap / total.gain.reshape(-1, *[1] * (-1 - axis))


class Equations:
    """The normal equations of targets over columns, in float64, about a point near the means.

    Args:
        groups: Groups of channels.
        outputs: Of each group.
        size: K, what a filter reads.
    """

    def __init__(self, groups: int, outputs: int, size: int) -> None:
        self.count = 0
        self._origin: tuple[Tensor, Tensor] | None = None
        self._x = torch.zeros(groups, size, dtype=torch.float64)
        self._y = torch.zeros(groups, outputs, dtype=torch.float64)
        self._xx = torch.zeros(groups, size, size, dtype=torch.float64)
        self._yx = torch.zeros(groups, outputs, size, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Columns (groups, n, K) and targets (groups, n, outputs)."""
        if self._origin is None:
            self._origin = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, y = x - self._origin[0], y - self._origin[1]
        self._x += x.sum(1)
        self._y += y.sum(1)
        add_square(self._xx, x)
        self._yx += y.mT @ x
        self.count += x.shape[1]

    def solve(self, start: Tensor, ridge: float, centred: bool) -> tuple[Tensor, Tensor]:
        """Weights (groups, outputs, K) near ``start``, a shift (groups, outputs), zeros if not centred."""
        if self._origin is None:
            return start, torch.zeros_like(start[..., 0])
        complete(self._xx)
        mean_x, mean_y = self._x / self.count, self._y / self.count
        xx = self._xx / self.count - mean_x[:, :, None] * mean_x[:, None]
        yx = self._yx / self.count - mean_y[:, :, None] * mean_x[:, None]
        mean_x, mean_y = mean_x + self._origin[0][:, 0], mean_y + self._origin[1][:, 0]
        if not centred:
            xx = xx + mean_x[:, :, None] * mean_x[:, None]
            yx = yx + mean_y[:, :, None] * mean_x[:, None]
        damping = ridge * xx.diagonal(dim1=1, dim2=2).mean(1) + 1e-12
        damped = xx + damping[:, None, None] * torch.eye(xx.shape[1], dtype=torch.float64)
        change: Tensor = torch.linalg.solve(damped, (yx - start @ xx).mT).mT
        rows = start + change
        shift = mean_y - (rows @ mean_x[..., None])[..., 0] if centred else torch.zeros_like(mean_y)
        return rows, shift
