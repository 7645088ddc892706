"""Activation ranges that minimise the squared error of what the reading layers make of the values.

For a value x that layers f_1 .. f_n with weights read, the range is the one of least::

    sum_i |f_i(project(x')) - F_i(x)|^2 / |F_i(x)|^2

where F_i and x are the float network's, f_i has its weights as they will be stored, and x' is what
reaches it behind everything that was rounded earlier; for a reader that adds or multiplies, f_i(x) = x.
Layers are visited in the order of execution. The search shrinks and widens the range that is given,
one end after the other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from featherweight.formats import IntQuant
from featherweight.graph import Graph, Node, trace
from featherweight.method import Progress, Scratch
from featherweight.model import Model
from featherweight.tools.walk import Stop, Stream, walk

_FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5)  # of an end of the range
_FINE = (0.95, 1.05)


@dataclass(frozen=True)
class Readers:
    """Who reads a value whose range is looked for.

    Attributes:
        layers: Names of the calls with weights.
        others: Something else reads it too, for which the value itself counts.
    """

    layers: tuple[str, ...]
    others: bool


def readers_of_ranges(
    graph: Graph, values: Mapping[str, str], grids: Mapping[str, str], weighted: Collection[str]
) -> dict[str, Readers]:
    """Values whose range can be judged by what the layers make that read them.

    Args:
        graph: The entry.
        values: Value -> the value whose range it takes.
        grids: Values that share a range with others; they are left out, as are inputs.
        weighted: Operators with weights.
    """
    found: dict[str, Readers] = {}
    shared = set(grids) | set(grids.values())
    for source in dict.fromkeys(values.values()):
        maker = graph.producer.get(source)
        if maker is None or source in shared or maker.outputs[0] != source:
            continue
        group = [value for value, own in values.items() if own == source]
        calls = {node.name: node for value in group for node in graph.consumers[value]}
        layers = tuple(name for name, node in calls.items() if node.op in weighted)
        moves = {graph.producer[value].name for value in group}
        others = any(name not in moves and node.op not in weighted for name, node in calls.items())
        if layers:
            found[source] = Readers(layers, others)
    return found


def output_ranges(
    model: Model,
    reference: Model,
    batches: Sequence[tuple[Tensor, ...]],
    readers: Mapping[str, Readers],
    limits: Mapping[str, tuple[float, float]],
    scratch: Scratch,
    progress: Progress,
    entry: str = "forward",
) -> dict[str, tuple[float, float]]:
    """Low and high of each value.

    Args:
        model: With the formats to begin with; values that share one are changed together.
        reference: The same network as float.
        batches: Flat inputs.
        readers: Values to look at.
        limits: Value -> the ends of what was seen of it.
        scratch: Where values live.
        progress: Told of each call.
        entry: Which way of calling it.
    """
    found: dict[str, tuple[float, float]] = {}
    sharing: dict[int, list[str]] = {}
    for name, chain in model.formats.items():
        sharing.setdefault(id(chain[-1]), []).append(name)
    stops = walk(model, reference, batches, scratch, entry)
    total = len(trace(model, entry).nodes)
    with torch.no_grad():
        for stop in progress.track(stops, "ranges by output error", total):
            name = stop.node.outputs[0] if stop.node.outputs else ""
            if name not in readers:
                continue
            fmt = model.formats[name][-1]
            assert isinstance(fmt, IntQuant)
            low, high = found[name] = _Search(stop, name, readers[name]).best(fmt, limits[name])
            grid = replace(fmt, low=torch.tensor(low), high=torch.tensor(high))
            for one in sharing[id(fmt)]:
                stop.stored.set_format(one, (grid,))
    return found


class _Search:
    """Of the range of one value, at the call that makes it."""

    def __init__(self, stop: Stop, name: str, readers: Readers) -> None:
        self._stored, self._name = stop.stored, name
        self._paths = [_path(stop.stored.graph, name, layer) for layer in readers.layers]
        true_paths = [_path(stop.exact.graph, name, layer) for layer in readers.layers]
        if readers.others:
            self._paths.append([])
            true_paths.append([])
        self._values = list(stop.stored.outputs(stop.node))
        true = list(stop.exact.outputs(stop.twin))
        self._wanted = [
            [_follow(stop.exact, path, name, value, batch) for batch, value in enumerate(true)]
            for path in true_paths
        ]
        self._energies = [
            sum(float(made.double().square().sum()) for made in outputs) or 1.0 for outputs in self._wanted
        ]

    def error(self, fmt: IntQuant) -> float:
        """What the readers' outputs lose over a range."""
        total = 0.0
        for batch, value in enumerate(self._values):
            rounded = fmt.project(value)
            for path, wanted, energy in zip(self._paths, self._wanted, self._energies, strict=True):
                made = _follow(self._stored, path, self._name, rounded, batch)
                total += float((made - wanted[batch]).square().sum()) / energy
        return total

    def best(self, fmt: IntQuant, limits: tuple[float, float]) -> tuple[float, float]:
        """Low and high, no wider than the limits."""
        ends, least = (float(fmt.low), float(fmt.high)), self.error(fmt)
        widest = min(limits[0], 0.0), max(limits[1], 0.0)
        sides = ((True, True),) if fmt.symmetric else ((False, True), (True, False), (False, True))
        for factors in (_FACTORS, _FINE):
            for low_moves, high_moves in sides if ends[0] < 0 else sides[:1]:
                first = ends
                for factor in factors:
                    low = max(first[0] * factor, widest[0]) if low_moves else first[0]
                    high = min(first[1] * factor, widest[1]) if high_moves else first[1]
                    if (low, high) == first:
                        continue
                    error = self.error(replace(fmt, low=torch.tensor(low), high=torch.tensor(high)))
                    if error < least:
                        least, ends = error, (low, high)
        return ends


def _path(graph: Graph, value: str, layer: str) -> list[Node]:
    """The calls from a value to that of a layer, through those that move it."""
    path = [next(node for node in graph.nodes if node.name == layer)]
    while value not in path[0].inputs:
        path.insert(0, graph.producer[path[0].inputs[0]])
    return path


def _follow(stream: Stream, path: Sequence[Node], name: str, value: Tensor, batch: int) -> Tensor:
    """What the calls make of a value."""
    for node in path:
        made = stream.compute(node, batch, values={name: value})
        name, value = node.outputs[0], made if isinstance(made, Tensor) else made[0]
    return value
