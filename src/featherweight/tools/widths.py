"""What a network costs for a choice of channels, found from the lengths of its tensors' axes alone.

Multiply-accumulates of a call, and elements of a parameter, are products of lengths; removing channels of a
group shortens the axes that they are on. So the cost of a candidate takes a few multiplications, and no cut::

    cost = sum over terms of  whole * product over axes of (left / length)

Seconds are not a product: they are asked of a table that was measured (``method.Costs.scaled``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from featherweight.graph import Graph, Node, trace
from featherweight.method import Costs
from featherweight.model import Model
from featherweight.tools.costs import node_macs, stored_bytes
from featherweight.tools.groups import ChannelGroup, Channels, Indices

Unit = Literal["channels", "macs", "parameters", "bytes", "latency"]
Axis = tuple[str, str, int]  # entry ('' for a tensor of the module), name, axis
Lengths = Mapping[Axis, float]  # axis -> the share that is left
_Price = Callable[[Lengths], float]


@dataclass(frozen=True)
class Term:
    """A part of a cost.

    Attributes:
        axes: What it depends on.
        price: Its value for the shares of these axes that are left; all others count as whole.
    """

    axes: tuple[Axis, ...]
    price: _Price


def _product(whole: float, axes: Sequence[Axis]) -> Term:
    own = tuple(dict.fromkeys(axes))
    return Term(own, lambda left: whole * math.prod(left.get(axis, 1.0) for axis in own))


def axes_of_group(group: ChannelGroup) -> dict[Axis, Indices]:
    """Every axis that a group's channels are on, with their indices; one of them is the group itself."""
    found: dict[Axis, Indices] = {_itself(group): tuple((channel,) for channel in range(group.size))}
    found |= {("", member.tensor, member.axis): member.indices for member in group.members}
    for entry, places in group.places.items():
        found |= {(entry, place.value, place.axis): place.indices for place in places}
    return found


def _itself(group: ChannelGroup) -> Axis:
    return ("#", group.name, 0)


class Candidate:
    """A choice of channels to remove, and what is left of the cost.

    Args:
        model: Uncut.
        channels: Its groups.
        terms: Of the cost.
    """

    def __init__(self, model: Model, channels: Channels, terms: Iterable[Term]) -> None:
        sizes = _sizes(model) | {_itself(group): group.size for group in channels.groups.values()}
        self._on = {
            name: {axis: at for axis, at in axes_of_group(group).items() if axis in sizes}
            for name, group in channels.groups.items()
        }
        cut = {axis for own in self._on.values() for axis in own}
        self._sizes = {axis: sizes[axis] for axis in cut}
        self._gone = {axis: np.zeros(sizes[axis], dtype=np.int32) for axis in cut}
        self._left: dict[Axis, float] = dict.fromkeys(cut, 1.0)
        self._terms = list(terms)
        self._values = np.array([term.price({}) for term in self._terms], dtype=np.float64)
        self.whole = float(self._values.sum())
        by_axis: dict[Axis, list[int]] = {}
        for number, term in enumerate(self._terms):
            for axis in term.axes:
                by_axis.setdefault(axis, []).append(number)
        self._touched = {
            name: sorted({number for axis in own for number in by_axis.get(axis, ())})
            for name, own in self._on.items()
        }
        self.dropped: dict[str, set[int]] = {name: set() for name in channels.groups}

    @property
    def cost(self) -> float:
        """Of what is left."""
        return float(self._values.sum())

    def touched(self, group: str) -> frozenset[int]:
        """The terms that removing channels of a group changes."""
        return frozenset(self._touched[group])

    def saving(self, group: str, more: Collection[int]) -> float:
        """What removing more channels of a group would save."""
        left = dict(self._left)
        for axis, at in self._on[group].items():
            fresh = {index for channel in more for index in at[channel]}
            gone = self._gone[axis]
            count = sum(1 for index in fresh if not gone[index])
            left[axis] = self._left[axis] - count / self._sizes[axis]
        touched = self._touched[group]
        return float(self._values[touched].sum()) - sum(self._terms[one].price(left) for one in touched)

    def drop(self, group: str, more: Collection[int]) -> None:
        """Remove more channels of a group."""
        self._change(group, set(more) - self.dropped[group], 1)
        self.dropped[group] |= set(more)

    def restore(self, group: str, channels: Collection[int]) -> None:
        """Put channels of a group back."""
        self._change(group, set(channels) & self.dropped[group], -1)
        self.dropped[group] -= set(channels)

    def _change(self, group: str, channels: set[int], by: int) -> None:
        for axis, at in self._on[group].items():
            gone = self._gone[axis]
            for channel in channels:
                gone[list(at[channel])] += by
            self._left[axis] = 1.0 - np.count_nonzero(gone) / self._sizes[axis]
        for number in self._touched[group]:
            self._values[number] = self._terms[number].price(self._left)


def _sizes(model: Model) -> dict[Axis, int]:
    tensors = _tensors(model).items()
    sizes = {("", name, axis): size for name, t in tensors for axis, size in enumerate(t.shape)}
    for entry in model.entries:
        for name, value in trace(model, entry).values.items():
            sizes |= {(entry, name, axis): size for axis, size in enumerate(value.shape)}
    return sizes


def _tensors(model: Model) -> dict[str, Tensor]:
    return dict(model.module.named_parameters()) | dict(model.module.named_buffers())


# ---- terms


def terms_of(
    model: Model,
    channels: Channels,
    unit: Unit,
    costs: Costs | None = None,
    others: Collection[Axis] = (),
) -> list[Term]:
    """The parts of a cost that removing channels changes, and one for all the rest.

    Args:
        model: Uncut.
        channels: Its groups.
        unit: What is counted. Seconds are of one call of every entry, in float.
        costs: Measured prices, for ``latency``.
        others: Axes of tensors that may become shorter beside those of the groups, e.g. of kernels.

    Returns:
        Terms; none where nothing is known about the unit (``latency`` without prices).
    """
    if unit == "channels":
        return [_product(group.size, [_itself(group)]) for group in channels.groups.values()]
    if unit == "latency":
        return _latency(model, channels, costs)
    cut = {axis for group in channels.groups.values() for axis in axes_of_group(group)} | set(others)
    if unit == "macs":
        found: list[Term] = []
        for entry in model.entries:
            graph = trace(model, entry)
            for node in graph:
                found += _macs(graph, node, entry, cut)
        return found
    sizes: list[Term] = []
    for name, tensor in model.parameters.items():
        whole = tensor.numel() if unit == "parameters" else stored_bytes(tensor.numel(), ())
        sizes.append(_product(whole, _cut_axes("", name, tensor.dim(), cut)))
    return sizes


def _cut_axes(entry: str, name: str, dimensions: int, cut: Collection[Axis]) -> list[Axis]:
    return [(entry, name, axis) for axis in range(dimensions) if (entry, name, axis) in cut]


def _macs(graph: Graph, node: Node, entry: str, cut: Collection[Axis]) -> list[Term]:
    whole = node_macs(graph, node)
    if not whole:
        return []
    if node.op in ("lstm", "gru"):
        names = [name for name in node.parameters.values() if "weight" in name.rpartition(".")[2]]
        numbers = {name: math.prod(graph.parameter_shapes[name]) for name in names}
        each = whole / sum(numbers.values())
        return [
            _product(each * number, _cut_axes("", name, len(graph.parameter_shapes[name]), cut))
            for name, number in numbers.items()
        ]
    weight = node.parameters.get("weight")
    if weight is not None:
        return [_product(whole, _cut_axes("", weight, len(graph.parameter_shapes[weight]), cut))]
    first = node.inputs[0] if node.inputs else ""
    if node.op == "scaled_dot_product_attention":
        return [_product(whole, _cut_axes(entry, first, len(graph.values[first].shape), cut))]
    axes = _cut_axes(entry, node.outputs[0], len(graph.values[node.outputs[0]].shape), cut)
    if "self" in node.parameters:
        shape = graph.parameter_shapes[node.parameters["self"]]
        axes += [
            axis
            for axis in _cut_axes("", node.parameters["self"], len(shape), cut)
            if axis[2] == len(shape) - 1
        ]
    elif first:
        last = len(graph.values[first].shape) - 1
        axes += [axis for axis in _cut_axes(entry, first, last + 1, cut) if axis[2] == last]
    return [_product(whole, axes)]


def _latency(model: Model, channels: Channels, costs: Costs | None) -> list[Term]:
    """A layer is as fast as one that keeps the same shares of its inputs and outputs."""
    total = None if costs is None else costs.total(False)
    if costs is None or not total:
        return []
    matrices = {name for name, tensor in _tensors(model).items() if tensor.dim() > 1}
    roles: dict[str, dict[str, list[Axis]]] = {}
    for group in channels.groups.values():
        for member in group.members:
            if member.tensor in matrices:
                own = roles.setdefault(member.layer, {"reads": [], "writes": [], "carries": []})
                own[member.role].append(("", member.tensor, member.axis))
    found: list[Term] = []
    for layer, own in roles.items():
        whole = costs.scaled(layer, 1.0, 1.0, False)
        if whole is None:
            continue
        axes = tuple(dict.fromkeys(axis for one in own.values() for axis in one))
        found.append(Term(axes, _scaled(costs, layer, own, whole)))
    if not found:
        return []
    rest = max(0.0, total - sum(term.price({}) for term in found))
    return [*found, _product(rest, ())]


def _scaled(costs: Costs, layer: str, own: Mapping[str, Sequence[Axis]], whole: float) -> _Price:
    def price(left: Lengths) -> float:
        carried = _mean(left, own["carries"])
        inputs = carried if carried is not None else _mean(left, own["reads"])
        outputs = carried if carried is not None else _mean(left, own["writes"])
        seconds = costs.scaled(
            layer, 1.0 if inputs is None else inputs, 1.0 if outputs is None else outputs, False
        )
        return whole if seconds is None else seconds

    return price


def _mean(left: Lengths, axes: Sequence[Axis]) -> float | None:
    return sum(left.get(axis, 1.0) for axis in axes) / len(axes) if axes else None
