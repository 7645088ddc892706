"""Which formats each layer of a network may get: what is decided together, what it takes, what it changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from featherweight.formats import TensorFormat
from featherweight.graph import trace
from featherweight.model import Model
from featherweight.tools.foresight import Changes
from featherweight.tools.sensitivity import Candidate, Subject

FLOAT = "float"  # the candidate that changes nothing


@dataclass(frozen=True)
class Group:
    """Layers that get one format, since they share weights.

    Attributes:
        layers: Their paths.
        weights: Parameters that get formats.
        labels: Candidates that all of them can have.
    """

    layers: tuple[str, ...]
    weights: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Choices:
    """What there is to decide on.

    Attributes:
        model: The float network.
        offers: Candidate -> weight -> its format, where it can be had.
        groups: By the path of the first layer.
    """

    model: Model
    offers: Mapping[str, Mapping[str, TensorFormat]]
    groups: Mapping[str, Group]

    @classmethod
    def of(cls, model: Model, offers: Mapping[str, Mapping[str, TensorFormat]]) -> Choices:
        """All layers that have weights in some candidate."""
        return cls(model, offers, _groups(model, offers))

    @property
    def elements(self) -> int:
        """Weights that are decided on."""
        return sum(
            self.model.parameters[name].numel() for one in self.groups.values() for name in one.weights
        )

    def by_weight(self) -> dict[str, dict[str, TensorFormat]]:
        """Weight -> candidate -> its format."""
        found: dict[str, dict[str, TensorFormat]] = {}
        for label, formats in self.offers.items():
            for name, fmt in formats.items():
                found.setdefault(name, {})[label] = fmt
        return found

    def bytes(self, group: Group, label: str) -> int:
        """Of a group's weights as a candidate stores them."""
        sizes = {name: self.model.parameters[name].numel() for name in group.weights}
        if label == FLOAT:
            return 4 * sum(sizes.values())
        return sum(self.offers[label][name].stored_bytes(size) for name, size in sizes.items())

    def subjects(self, entry: str, changes: Changes) -> dict[str, Subject]:
        """Every group with what each candidate does to it."""
        return {name: self._subject(one, entry, changes) for name, one in self.groups.items()}

    def _subject(self, group: Group, entry: str, changes: Changes) -> Subject:
        nodes = tuple(node.name for node in trace(self.model, entry) if node.layer in group.layers)
        candidates = {}
        for label in group.labels:
            own: dict[str, Tensor] = {}
            for name in group.weights if label != FLOAT else ():
                own |= changes[name][label]
            candidates[label] = Candidate(own, rounded=label != FLOAT)
        return Subject(nodes, candidates)


def _groups(model: Model, offers: Mapping[str, Mapping[str, TensorFormat]]) -> dict[str, Group]:
    offered = {name for formats in offers.values() for name in formats}
    owners: dict[str, set[str]] = {}  # layer -> its weights
    for entry in model.entries:
        for node in trace(model, entry):
            own = offered & set(node.parameters.values())
            if own and node.layer:
                owners.setdefault(node.layer, set()).update(own)
    groups: dict[str, Group] = {}
    for layers in _tied(owners):
        weights = set[str]().union(*(owners[layer] for layer in layers))
        labels = tuple(
            label for label, formats in offers.items() if label == FLOAT or weights <= formats.keys()
        )
        groups[layers[0]] = Group(layers, tuple(sorted(weights)), labels)
    return {name: group for name, group in groups.items() if group.labels}


def _tied(owners: Mapping[str, set[str]]) -> Iterable[tuple[str, ...]]:
    """Layers that share weights, directly or through others."""
    left = list(owners)
    while left:
        layers = [left.pop(0)]
        for layer in layers:
            more = [other for other in left if owners[other] & owners[layer]]
            layers += more
            left = [other for other in left if other not in more]
        yield tuple(layers)
