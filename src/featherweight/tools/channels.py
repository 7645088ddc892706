"""Channel groups of a model, found from its exported graph: which indices of which tensors go together.

Every index of every axis of every tensor gets a label, a set of atoms (``channel_labels``); operators pass
labels on and unite them (``channel_layers``, ``channel_moves``, ``channel_products``, ``channel_elements``).
What is left at the end are the atoms that nothing fixed: those in the same axes are the channels of a group.
Compare the dependency graph of Fang et al. 2023 (DepGraph, arXiv:2301.12900), which ties whole axes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from featherweight.graph import Graph, trace
from featherweight.model import Model
from featherweight.tools import (
    channel_elements,
    channel_layers,
    channel_moves,
    channel_picks,
    channel_products,
)
from featherweight.tools.channel_labels import Axis, Labels
from featherweight.tools.channel_walk import Rule, Tensors, Walk
from featherweight.tools.groups import ChannelGroup, Channels, GroupKind, Member, Place

_RULES: Mapping[str, Rule] = {
    **channel_elements.RULES,
    **channel_moves.RULES,
    **channel_picks.RULES,
    **channel_products.RULES,
    **channel_layers.RULES,
}
_KINDS: tuple[GroupKind, ...] = ("group", "head_dim", "head", "hidden")  # the later one wins
Where = dict[int, list[int]]  # atom -> indices


def channel_groups(model: Model) -> Channels:
    """Everything of a model that can be cut, over all of its entries.

    Args:
        model: Any; formats are ignored.

    Returns:
        Groups in the order of the calls that write them, and reasons for layers that are in none.

    Raises:
        LoadError: torch.export cannot follow the module.
    """
    tensors = Tensors(frozenset(dict(model.module.named_parameters()) | dict(model.module.named_buffers())))
    labels = Labels()
    values: dict[tuple[str, str, int], Axis] = {}
    for entry in model.entries:
        graph = trace(model, entry)
        walk = Walk(graph, labels, tensors, _RULES)
        walk.run()
        values.update(_labelled(graph, walk, entry))
    return _Grouping(labels, tensors, values).channels()


def _labelled(graph: Graph, walk: Walk, entry: str) -> Iterator[tuple[tuple[str, str, int], Axis]]:
    for name, value in graph.values.items():
        made = walk.made.get(value.fx_name)
        if isinstance(made, list):
            yield from (((entry, name, place), axis) for place, axis in enumerate(made) if axis.any())


@dataclass
class _Family:
    """Atoms that are in the same axes."""

    atoms: list[int] = field(default_factory=list)
    tensors: frozenset[tuple[str, int]] = frozenset()
    values: frozenset[tuple[str, str, int]] = frozenset()


class _Grouping:
    """Atoms that are left, as groups."""

    def __init__(self, labels: Labels, tensors: Tensors, values: Mapping[tuple[str, str, int], Axis]) -> None:
        self._labels, self._tensors = labels, tensors
        self._seen: dict[bytes, Where] = {}
        self._at = {
            (name, axis): self._where(own)
            for name, axes in tensors.axes.items()
            for axis, own in enumerate(axes)
            if own is not None
        }
        self._values = {key: where for key, axis in values.items() if (where := self._where(axis))}
        self._kinds: dict[int, GroupKind] = {}
        for kind in _KINDS:
            for axis in (axis for one, axis in tensors.kinds if one == kind):
                atoms = self._where(axis)
                if kind == "hidden" or any(labels.is_factor(atom) for atom in atoms):
                    self._kinds.update(dict.fromkeys(atoms, kind))

    def _where(self, axis: Axis) -> Where:
        """Atom -> where in an axis it is."""
        today = self._labels.today(axis)
        key = today.tobytes()
        if key not in self._seen:
            found: defaultdict[int, list[int]] = defaultdict(list)
            places = np.argsort(today, kind="stable")
            unique, starts = np.unique(today[places], return_index=True)
            for label, block in zip(unique.tolist(), np.split(places, starts[1:]), strict=True):
                for atom in self._labels.atoms(label):
                    found[atom].extend(block.tolist())
            self._seen[key] = {atom: sorted(indices) for atom, indices in found.items()}
        return self._seen[key]

    def channels(self) -> Channels:
        """Groups by name, and reasons."""
        families = self._families()
        groups: dict[str, ChannelGroup] = {}
        for family in sorted(families, key=lambda family: min(self._start(key) for key in family.tensors)):
            group = self._group(family, groups)
            groups[group.name] = group
        return Channels(groups, self._fixed(families))

    def _families(self) -> list[_Family]:
        tensors: defaultdict[int, list[tuple[str, int]]] = defaultdict(list)
        values: defaultdict[int, list[tuple[str, str, int]]] = defaultdict(list)
        for key, where in self._at.items():
            for atom in where:
                tensors[atom].append(key)
        for place, where in self._values.items():
            for atom in where:
                values[atom].append(place)
        found: dict[object, _Family] = {}
        for atom, keys in tensors.items():
            if not any(self._tensors.uses[key].role == "writes" for key in keys if key in self._tensors.uses):
                continue
            family = _Family([], frozenset(keys), frozenset(values[atom]))
            kind = self._kinds.get(atom)
            signature = (self._labels.family(atom), kind, family.tensors, family.values)
            found.setdefault(signature, family).atoms.append(atom)
        return [family for family in found.values() if len(family.atoms) > 1]

    def _start(self, key: tuple[str, int]) -> tuple[int, int]:
        """When a tensor was first written along an axis."""
        use = self._tensors.uses[key]
        return (0 if use.role == "writes" else 1, use.order)

    def _group(self, family: _Family, groups: Mapping[str, ChannelGroup]) -> ChannelGroup:
        uses = self._tensors.uses
        keys = sorted(family.tensors, key=lambda key: uses[key].order)
        first = min(keys, key=self._start)
        atoms = sorted(family.atoms, key=lambda atom: self._at[first][atom])
        kind = self._kinds.get(atoms[0], "channel")
        members = tuple(
            Member(
                tensor=name,
                axis=axis,
                indices=tuple(tuple(self._at[name, axis][atom]) for atom in atoms),
                role=uses[name, axis].role,
                layer=name.rpartition(".")[0],
                node=uses[name, axis].node,
            )
            for name, axis in keys
        )
        places: defaultdict[str, list[Place]] = defaultdict(list)
        for entry, value, axis in self._values:
            if (entry, value, axis) in family.values:
                where = self._values[entry, value, axis]
                places[entry].append(Place(value, axis, tuple(tuple(where[atom]) for atom in atoms)))
        name = self._name(first[0], kind, groups)
        whole = {entry: tuple(found) for entry, found in places.items()}
        return ChannelGroup(name, kind, len(atoms), members, whole)

    def _name(self, tensor: str, kind: GroupKind, groups: Mapping[str, ChannelGroup]) -> str:
        layer = tensor.rpartition(".")[0] or tensor
        name = layer if kind in ("channel", "hidden") else f"{layer}:{kind}"
        if name not in groups:
            return name
        return next(other for n in range(2, len(groups) + 3) if (other := f"{name}:{n}") not in groups)

    def _fixed(self, families: list[_Family]) -> dict[str, str]:
        """Layers that write channels of which none is in a group, in the order of their calls."""
        grouped = {atom for family in families for atom in family.atoms}
        found: dict[str, str] = {}
        free: set[str] = set()
        for layer, axis in self._tensors.written:
            if not grouped.isdisjoint(self._where(axis)):
                free.add(layer)
            told = [reason for one in np.unique(axis) if (reason := self._labels.reason(int(one)))]
            alone = ["it has one channel"] if len(axis) == 1 else []
            found.setdefault(layer, (alone + told + ["all of its channels go together"])[0])
        return {layer: reason for layer, reason in found.items() if layer not in free}
