"""Where networks side by side can part from one trunk, and what each place saves.

A value is a cut point of a network where everything that the network computes later comes from it alone: with
the calls in order, it is the only value made so far that a later call reads. A network leaves its own way at
a cut point and goes on from one of the trunk's network, of the same shape, or of the same shape but for the
channels, which a 1x1 adapter then maps. What it computed before that goes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from featherweight.errors import RecipeError
from featherweight.graph import Graph, Node, trace
from featherweight.method import Costs
from featherweight.model import Model
from featherweight.side_by_side import WHOLE, tasks_of
from featherweight.tools.costs import node_macs

Measure = Literal["parameters", "macs", "latency"]
MEASURES: tuple[Measure, ...] = ("parameters", "macs", "latency")
_FOLLOWING = frozenset(
    {"batch_norm", "dropout", "relu", "relu6", "hardtanh", "leaky_relu", "hardswish", "silu"}
)
_FOLLOWING |= {"gelu", "sigmoid", "tanh", "hardsigmoid", "mish", "elu"}
_NAMED = 6  # shapes that an error names
_CHANNELS = 1  # axis of the channels of maps; of anything else it is the last one
_MAP_AXES = 4


@dataclass(frozen=True)
class CutPoint:
    """A value that all later computation of one network passes through.

    Attributes:
        task: Whose network.
        value: Its traced name.
        name: The same within the network.
        shape: At the example inputs.
        before: Calls up to it, by name.
        cost: What they take that no other call needs, by measure.
    """

    task: str
    value: str
    name: str
    shape: tuple[int, ...]
    before: frozenset[str] = field(repr=False)
    cost: Mapping[Measure, float] = field(repr=False)


@dataclass(frozen=True)
class Parting:
    """A network that goes on from another one's trunk.

    Attributes:
        point: Where it left its own way.
        source: What it goes on from.
        similarity: Of the two values, 0 to 1 (tools/merging_similarity.py).
        saved: What goes, less an adapter, as fractions of all networks.
    """

    point: CutPoint
    source: CutPoint
    similarity: float
    saved: Mapping[Measure, float]

    @property
    def adapts(self) -> int | None:
        """Axis whose widths differ, so that an adapter maps them; None: the shapes are the same."""
        return differing(self.source.shape, self.point.shape)


class Beside:
    """Networks side by side in a traced model, and their cut points.

    Args:
        model: Of ``side_by_side``, maybe changed since.
        costs: Measured prices of layers; None: latency is not known.

    Raises:
        RecipeError: It holds one network only.
    """

    def __init__(self, model: Model, costs: Costs | None = None) -> None:
        self.tasks = tasks_of(model.module)
        if len(self.tasks) <= 1 or WHOLE not in model.entries:
            raise RecipeError(
                "merge needs several networks side by side, and this model is one",
                fix="featherweight merge NAME=MODEL NAME=MODEL, or side_by_side.side_by_side in Python",
            )
        self.graph: Graph = trace(model, WHOLE)
        self._sizes = {name: float(tensor.numel()) for name, tensor in model.module.named_parameters()}
        self._seconds = _seconds(self.graph, costs)
        self.whole: dict[Measure, float] = {
            "parameters": sum(self._sizes.values()),
            "macs": float(sum(node_macs(self.graph, node) for node in self.graph)),
        }
        total = None if costs is None else costs.total(integers=False)
        if total and self._seconds:
            self.whole["latency"] = total

    @cached_property
    def points(self) -> Mapping[str, tuple[CutPoint, ...]]:
        """By task, the shallowest first."""
        return {task: tuple(self._points(task)) for task in self.tasks}

    def nodes(self, task: str) -> list[Node]:
        """The calls of one network."""
        inside = f"tasks.{task}"
        return [node for node in self.graph if node.layer == inside or node.layer.startswith(f"{inside}.")]

    def outputs(self, task: str) -> tuple[str, ...]:
        """Names of the values that a network returns."""
        own = {name for node in self.nodes(task) for name in node.outputs}
        return tuple(name for name in self.graph.outputs if name in own)

    def share(self, cost: Mapping[Measure, float]) -> dict[Measure, float]:
        """A cost as fractions of all networks."""
        return {measure: cost[measure] / max(whole, 1e-30) for measure, whole in self.whole.items()}

    def _points(self, task: str) -> Iterable[CutPoint]:
        graph, returned = self.graph, self.outputs(task)
        own = [node for node in self.nodes(task) if node.name in self._needed(returned)]
        last = {name: place for place, node in enumerate(own) for name in node.inputs}
        last |= dict.fromkeys(returned, len(own))
        alive: set[str] = {name for name in graph.inputs if name in last}
        before: list[str] = []
        for place, node in enumerate(own):
            before.append(node.name)
            alive |= {name for name in node.outputs if name in last}
            alive = {name for name in alive if last[name] > place}
            if len(alive) != 1 or not alive <= set(node.outputs) or alive & set(returned):
                continue
            (value,) = alive
            readers = [one for one in graph.consumers[value] if one in own]
            whole = len(readers) == 1 and readers[0].op in _FOLLOWING  # they belong to what they follow
            if whole or not graph.values[value].dtype.is_floating_point:
                continue
            prefix = f"tasks.{task}"
            name = value.removeprefix(prefix).lstrip("./")
            yield CutPoint(
                task, value, name, graph.values[value].shape, frozenset(before), self._cost(before)
            )

    def _needed(self, values: Iterable[str]) -> set[str]:
        """The calls that values come from."""
        found: set[str] = set()
        waiting = list(values)
        while waiting:
            node = self.graph.producer.get(waiting.pop())
            if node is not None and node.name not in found:
                found.add(node.name)
                waiting += node.inputs
        return found

    def _cost(self, names: Sequence[str]) -> dict[Measure, float]:
        gone = set(names)
        held = {name for node in self.graph if node.name not in gone for name in node.parameters.values()}
        nodes = [node for node in self.graph if node.name in gone]
        mine = {name for node in nodes for name in node.parameters.values()} - held
        layers = {node.layer for node in nodes} - {node.layer for node in self.graph if node.name not in gone}
        return {
            "parameters": sum(self._sizes.get(name, 0.0) for name in mine),
            "macs": float(sum(node_macs(self.graph, node) for node in nodes)),
            "latency": sum(self._seconds.get(layer, 0.0) for layer in layers),
        }

    def adapter(self, source: CutPoint, point: CutPoint) -> dict[Measure, float]:
        """What a 1x1 adapter between two values costs; nothing where there is none. Its time is not known."""
        axis = differing(source.shape, point.shape)
        if axis is None:
            return dict.fromkeys(MEASURES, 0.0)
        weights = source.shape[axis] * point.shape[axis]
        batch = max(self.graph.batch, 1)
        places = math.prod(point.shape) // (point.shape[axis] * batch)
        return {"parameters": weights + point.shape[axis], "macs": float(weights * places), "latency": 0.0}

    def pairs(self, trunk: str, task: str) -> list[tuple[CutPoint, CutPoint]]:
        """Source and cut point of a network, all that fit; of equal architectures the same layer's only."""
        ours, theirs = self.points[trunk], self.points[task]
        if [(one.name, one.shape) for one in ours] == [(one.name, one.shape) for one in theirs]:
            return list(zip(ours, theirs, strict=True))
        return [(one, other) for one in ours for other in theirs if fits(one.shape, other.shape)]

    def misfit(self, trunk: str, task: str) -> RecipeError:
        """What is said of networks that have no place to part."""
        each = []
        for name in (trunk, task):
            shapes = list(dict.fromkeys(point.shape[1:] for point in self.points[name]))
            said = ", ".join(map(str, shapes[:_NAMED])) or "none"
            each.append(f"'{name}' {said}{' ...' if len(shapes) > _NAMED else ''}")
        return RecipeError(
            f"'{trunk}' and '{task}' share nothing: no value that all later layers pass has the same shape "
            f"in both, but for the channels; there are, without the batch, {' and '.join(each)}",
            fix="merge networks whose layers make maps of equal sizes, or distil both into one network first",
        )


def _seconds(graph: Graph, costs: Costs | None) -> dict[str, float]:
    layers = dict.fromkeys(node.layer for node in graph if node.layer)
    found = {layer: None if costs is None else costs.seconds(layer, integers=False) for layer in layers}
    return {layer: seconds for layer, seconds in found.items() if seconds is not None}


def fits(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes are the same but for one axis of channels."""
    return tuple(one) == tuple(other) or differing(one, other) is not None


def differing(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The axis of the channels where it alone differs."""
    if len(one) != len(other):
        return None
    axes = [axis for axis, sizes in enumerate(zip(one, other, strict=True)) if sizes[0] != sizes[1]]
    channels = _CHANNELS if len(one) == _MAP_AXES else len(one) - 1
    return channels if axes == [channels] and channels > 0 else None


# ---- which


def partings(
    beside: Beside, trunk: str, task: str, similarity: Mapping[tuple[str, str], float]
) -> list[Parting]:
    """All ways in which a network may part from a trunk.

    Raises:
        RecipeError: There is none.
    """
    found = []
    for source, point in beside.pairs(trunk, task):
        extra = beside.adapter(source, point)
        cost: dict[Measure, float] = {one: point.cost[one] - extra[one] for one in MEASURES}
        alike = similarity.get((source.value, point.value), 0.0)
        found.append(Parting(point, source, alike, beside.share(cost)))
    found = [one for one in found if one.saved["parameters"] > 0 or one.saved["macs"] > 0]
    if not found:
        raise beside.misfit(trunk, task)
    return found


def chosen(options: Sequence[Sequence[Parting]], keep: Mapping[Measure, float]) -> list[Parting] | None:
    """One parting a network: what is kept of all is within the limits, and they are as alike as may be.

    Each starts where it is most like the trunk. Then the one moves that loses the least similarity for what
    it saves more, until the limits are kept.

    Args:
        options: Of each network.
        keep: Fractions of all networks to keep at most.

    Returns:
        None where the limits cannot be kept.
    """
    picked = [max(one, key=lambda parting: (parting.similarity, _saved(parting))) for one in options]
    while over := [measure for measure, limit in keep.items() if kept(picked, measure) > limit]:
        moves = []
        for place, others in enumerate(options):
            for other in others:
                more = other.saved[over[0]] - picked[place].saved[over[0]]
                if more <= 0:
                    continue
                moved = [*picked[:place], other, *picked[place + 1 :]]
                short = any(kept(moved, measure) > limit for measure, limit in keep.items())
                lost = max(picked[place].similarity - other.similarity, 0.0)
                moves.append((short, lost / more if short else lost, more, place, other))
        if not moves:
            return None
        *_, place, other = min(moves, key=lambda move: move[:4])
        picked[place] = other
    return picked


def kept(picked: Iterable[Parting], measure: Measure) -> float:
    """Fraction of all networks that is left."""
    return 1.0 - sum(parting.saved[measure] for parting in picked)


def deepest(options: Sequence[Sequence[Parting]], measure: Measure) -> list[Parting]:
    """The partings that save most."""
    return [max(one, key=lambda parting: (parting.saved[measure], parting.similarity)) for one in options]


def _saved(parting: Parting) -> float:
    return sum(parting.saved.values())
