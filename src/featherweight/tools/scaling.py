"""Channels that may be multiplied by a factor without changing what the network computes.

A producer's output channel c times s_c > 0 and everything that reads it divided by s_c is the same
network, since what lies between is positively homogeneous::

    f(s * x) = s * f(x)        relu, leaky relu, pooling, moves, sums of two values, constants times x

(Nagel et al. 2019, arXiv:1906.04721, section 4.1.) Two channels are tied when an operator needs both at
the same factor; tying is transitive. A group is data: print it, score it, give it factors, then apply
those with :func:`scaled`. Nothing here changes a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.graph import trace
from featherweight.model import Model
from featherweight.tools.scaling_rules import Labels, Uses, label_values

Selects = Callable[[str, str], bool]


@dataclass(frozen=True, eq=False)
class Slot:
    """Where a group's factors go in a parameter.

    Attributes:
        parameter: Its name in the module.
        sign: 1 where it produces the channels and is multiplied, -1 where it reads them and is divided.
        index: Channel of the group for each element, in a shape that broadcasts to the parameter's; -1: none.
        calls: (entry, call) of each operator that reads the parameter.
    """

    parameter: str
    sign: int
    index: Tensor
    calls: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Carrier:
    """A traced value that holds the group's channels.

    Attributes:
        entry: The entry whose graph it is of.
        value: Traced name.
        index: Channel of the group for each element, in a shape that broadcasts to the value's; -1: none.
        limit: Where a clamp from zero cuts it off (6 in front of ReLU6); None: nowhere.
    """

    entry: str
    value: str
    index: Tensor
    limit: float | None = None


@dataclass(frozen=True, eq=False)
class ScalingGroup:
    """Channels of the same producers, each with a factor of its own that everyone agrees on.

    Attributes:
        channels: How many factors it takes.
        slots: What is multiplied and divided.
        carriers: The values that change with it.
    """

    channels: int
    slots: tuple[Slot, ...]
    carriers: tuple[Carrier, ...]

    @property
    def producers(self) -> tuple[Slot, ...]:
        """Parameters that are multiplied."""
        return tuple(slot for slot in self.slots if slot.sign > 0)

    @property
    def consumers(self) -> tuple[Slot, ...]:
        """Parameters that are divided."""
        return tuple(slot for slot in self.slots if slot.sign < 0)

    def __str__(self) -> str:
        ends = (" + ".join(slot.parameter for slot in slots) for slots in (self.producers, self.consumers))
        return f"{self.channels} channels: {' -> '.join(ends)}"


def scaling_groups(
    model: Model, selects: Selects | None = None, held: Iterable[str] = ()
) -> list[ScalingGroup]:
    """Groups of channels that may be rescaled, over all entries of a model.

    Args:
        model: Parameters or values with formats stay as they are.
        selects: Whether a layer (path, type name) may take part; None: all may.
        held: Parameters that keep their values.

    Returns:
        Groups in the order of their first producer. Every channel is in at most one; the network's
        inputs and outputs, and whatever an unknown operator touches, are in none.
    """
    labels, uses = Labels(), Uses()
    for name in (*held, *model.formats):
        uses.held.add(name)
    for name, parameter in model.parameters.items():
        if not parameter.is_floating_point():
            uses.held.add(name)
    known = set(model.parameters)
    for entry in model.entries:
        label_values(trace(model, entry), entry, labels, uses, known, selects or _all)
    return _groups(labels, uses)


def _all(path: str, type_name: str) -> bool:
    return True


def scaled(tensors: Mapping[str, Tensor], groups: Iterable[tuple[ScalingGroup, Tensor]]) -> dict[str, Tensor]:
    """The parameters that groups change, multiplied and divided by their factors.

    Args:
        tensors: Every parameter by name.
        groups: With one positive factor per channel each.

    Returns:
        New tensors in the parameters' dtype; computed in float64, differentiable by the factors.
    """
    changed: dict[str, Tensor] = {}
    for group, factors in groups:
        for slot in group.slots:
            one = changed.get(slot.parameter)
            one = tensors[slot.parameter].detach().double() if one is None else one
            changed[slot.parameter] = one * spread(factors.double(), slot.index) ** slot.sign
    return {name: tensor.to(tensors[name].dtype) for name, tensor in changed.items()}


def spread(factors: Tensor, index: Tensor) -> Tensor:
    """One factor per element of an index; 1 where it is -1."""
    return torch.where(index >= 0, factors[index.clamp(min=0)], torch.ones((), dtype=factors.dtype))


def by_channel(elements: Tensor, index: Tensor, channels: int, reduce: str = "sum") -> Tensor:
    """Elements of a tensor reduced for each channel of a group (``sum``, ``amax``); 0 where there is none."""
    places = index.expand(elements.shape).reshape(-1)
    held = places >= 0
    out = torch.zeros(channels)
    return out.scatter_reduce_(0, places[held], elements.reshape(-1)[held].float(), reduce)


def _groups(labels: Labels, uses: Uses) -> list[ScalingGroup]:
    roots = {key: labels.roots(ids) for key, ids in uses.parameters.items()}
    component: dict[int, int] = {}  # class of channels -> group
    merged: dict[int, int] = {}

    def first(group: int) -> int:
        while group in merged:
            group = merged[group]
        return group

    for (_, sign), ids in roots.items():
        if sign < 0:
            continue
        classes = [one for one in torch.unique(ids).tolist() if one]
        groups = sorted({first(component[one]) for one in classes if one in component})
        own = groups[0] if groups else len(component) + len(merged)
        for other in groups[1:]:
            merged[other] = own
        for one in classes:
            component.setdefault(one, own)
    members: dict[int, list[int]] = {}
    for one in component:
        members.setdefault(first(component[one]), []).append(one)
    return [group for ids in members.values() if (group := _group(ids, roots, labels, uses)) is not None]


def _group(
    members: list[int], roots: Mapping[tuple[str, int], Tensor], labels: Labels, uses: Uses
) -> ScalingGroup | None:
    """One group; None where nobody reads it."""
    place = torch.full((labels.count,), -1, dtype=torch.int64)
    place[torch.tensor(members)] = torch.arange(len(members))
    slots = [
        Slot(name, sign, place[ids], tuple(uses.calls[name]))
        for (name, sign), ids in roots.items()
        if bool((place[ids] >= 0).any())
    ]
    carriers = []
    for (entry, value), ids in uses.values.items():
        index = place[labels.roots(ids)]
        if bool((index >= 0).any()):
            carriers.append(Carrier(entry, value, index, uses.limits.get((entry, value))))
    group = ScalingGroup(len(members), tuple(slots), tuple(carriers))
    return group if group.consumers and group.producers else None
