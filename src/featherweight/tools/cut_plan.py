"""What goes when channels go: indices of every axis of every tensor and traced value, as sets.

An index goes when any of its channels goes; axes are independent of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from featherweight.errors import RecipeError
from featherweight.graph import Graph
from featherweight.model import Cut
from featherweight.tools.groups import Channels, Indices

Dropped = Mapping[int, frozenset[int]]  # axis -> indices that go
_NONE: Dropped = {}


@dataclass(frozen=True)
class Plan:
    """What goes.

    Attributes:
        tensors: Parameter or buffer -> axis -> indices.
        values: Entry -> traced value -> axis -> indices.
    """

    tensors: Mapping[str, Dropped]
    values: Mapping[str, Mapping[str, Dropped]]

    def of(self, entry: str, value: str) -> Dropped:
        """What a traced value loses."""
        return self.values.get(entry, {}).get(value, _NONE)

    def shape(self, entry: str, graph: Graph, value: str) -> tuple[int, ...]:
        """The shape of a traced value once all is gone."""
        return left(graph.values[value].shape, self.of(entry, value))

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The tensors' part as edits."""
        return tuple(
            Cut(name, axis, tuple(sorted(gone)))
            for name, axes in self.tensors.items()
            for axis, gone in sorted(axes.items())
            if gone
        )


def left(shape: Sequence[int], dropped: Dropped) -> tuple[int, ...]:
    """A shape without what goes."""
    return tuple(size - len(dropped.get(axis, ())) for axis, size in enumerate(shape))


def make_plan(channels: Channels, drop: Mapping[str, Sequence[int]]) -> Plan:
    """The plan of removing channels of groups.

    Args:
        channels: All groups.
        drop: Group -> its channels that go.

    Raises:
        RecipeError: No such group or channel, or a group would lose its last one.
    """
    tensors: dict[str, dict[int, set[int]]] = {}
    values: dict[str, dict[str, dict[int, set[int]]]] = {}
    for name, gone in drop.items():
        if name not in channels.groups:
            raise RecipeError(
                f"there is no channel group '{name}'", fix="print the groups to see their names"
            )
        group = channels.groups[name]
        wrong = [index for index in gone if not 0 <= index < group.size]
        if wrong:
            raise RecipeError(f"channel group '{name}' has no channel {wrong[0]}, but 0 to {group.size - 1}")
        if len(set(gone)) >= group.size:
            raise RecipeError(
                f"'{name}' would lose its last channel", where=f"'{name}'", fix="remove fewer channels there"
            )
        if not gone:
            continue
        for member in group.members:
            _take(tensors.setdefault(member.tensor, {}), member.axis, member.indices, gone)
        for entry, places in group.places.items():
            at = values.setdefault(entry, {})
            for place in places:
                _take(at.setdefault(place.value, {}), place.axis, place.indices, gone)
    return Plan(
        {name: _frozen(axes) for name, axes in tensors.items()},
        {entry: {name: _frozen(axes) for name, axes in at.items()} for entry, at in values.items()},
    )


def _take(axes: dict[int, set[int]], axis: int, indices: Indices, gone: Sequence[int]) -> None:
    axes.setdefault(axis, set()).update(index for channel in gone for index in indices[channel])


def _frozen(axes: Mapping[int, set[int]]) -> Dropped:
    return {axis: frozenset(gone) for axis, gone in axes.items()}


def check_not_emptied(plan: Plan, module: nn.Module) -> None:
    """Two groups together may take all of an axis.

    Raises:
        RecipeError: A tensor would be empty.
    """
    tensors: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, axes in plan.tensors.items():
        for axis, gone in axes.items():
            if name in tensors and len(gone) >= tensors[name].shape[axis]:
                raise RecipeError(f"'{name}' would be left empty", fix="remove fewer channels")
