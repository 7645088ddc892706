"""Peak activation memory: the largest sum of traced values that are alive at the same time.

A value lives from the operator that makes it to the last one that reads it; inputs live from the start,
outputs to the end. A view shares its source's memory and keeps it alive. No operator works in place, which
is what an interpreter without a planner needs; runtimes that reuse buffers in place need less. Static.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from featherweight.graph import Graph, trace
from featherweight.model import Model
from featherweight.tools.costs import stored_bytes

VIEWS = frozenset(
    {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "expand"}
    | {"t", "select", "slice", "chunk", "split", "split_with_sizes", "unbind", "detach", "alias", "narrow"}
    | {"dropout", "feature_dropout", "identity", "contiguous", "movedim", "expand_as", "view_as"}
)


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a call with one example.

    Attributes:
        bytes: Of all values that are alive then.
        at: The call that runs then.
        values: Those values, the largest first.
    """

    bytes: int
    at: str
    values: tuple[str, ...]


def peak_memory(model: Model, entry: str = "forward") -> Peak:
    """The fullest moment of one entry; parameters are not counted."""
    graph = trace(model, entry)
    source = _sources(graph)
    last = _last_use(graph, source)
    sizes = {name: _bytes(model, graph, name) for name in set(source.values())}
    alive = {source[name]: None for name in graph.inputs}
    best = Peak(sum(sizes[name] for name in alive), "input", _largest(alive, sizes))
    for index, node in enumerate(graph.nodes):
        alive.update({source[name]: None for name in node.outputs})
        total = sum(sizes[name] for name in alive)
        if total > best.bytes:
            best = Peak(total, node.name, _largest(alive, sizes))
        for name in [name for name in alive if last.get(name, index) <= index]:
            del alive[name]
    return best


def _sources(graph: Graph) -> dict[str, str]:
    """Value -> the value whose memory it shares, itself for most."""
    source = {name: name for name in graph.inputs}
    for node in graph.nodes:
        shares = node.op in VIEWS and len(node.inputs) == 1 and node.inputs[0] in source
        for name in node.outputs:
            source[name] = source[node.inputs[0]] if shares else name
    return source


def _last_use(graph: Graph, source: dict[str, str]) -> dict[str, int]:
    """Value -> index of the last node that reads it or a view of it; outputs are never given up."""
    last: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        for name in node.inputs:
            last[source[name]] = index
    for name in graph.outputs:
        last[source[name]] = len(graph.nodes)
    return last


def _bytes(model: Model, graph: Graph, name: str) -> int:
    value = graph.values[name]
    elements = -(-math.prod(value.shape) // max(graph.batch, 1))
    formats = model.formats.get(name, ())
    return stored_bytes(elements, formats) if formats else elements * value.dtype.itemsize


def _largest(alive: dict[str, None], sizes: dict[str, int]) -> tuple[str, ...]:
    return tuple(sorted(alive, key=lambda name: -sizes[name]))
