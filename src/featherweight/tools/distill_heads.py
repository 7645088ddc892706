"""What attention reads: which layers make the queries, keys and values of each attention, found in the graph.

Attention probabilities live inside fused kernels, so a student follows how its queries, keys and values
relate among themselves instead: softmax(A A^T / sqrt(d)) of A = Q, K, V, of any width (MiniLMv2: Wang et al.
2021, https://arxiv.org/abs/2012.15828).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from featherweight.graph import Graph, Node, trace
from featherweight.model import Model

_MOST = 4  # attentions that are paired
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
_SOFTMAX = frozenset({"softmax", "_softmax"})
_FUSED = 3  # queries, keys and values in one layer's output


@dataclass(frozen=True)
class Read:
    """One of the three that an attention reads.

    Attributes:
        layer: Path of the linear layer that makes it.
        part: Which third of the layer's output it is; None: all of it.
        width: Its channels.
        heads: Into how many they are split.
    """

    layer: str
    part: int | None
    width: int
    heads: int


@dataclass(frozen=True)
class Relation:
    """What the student's attention reads, and what the teacher's does at the same depth."""

    student: Read
    teacher: Read

    @property
    def heads(self) -> int:
        """Into how many both are split, whatever their widths: the teacher's where that is possible."""
        theirs = self.teacher.heads
        return theirs if self.student.width % theirs == 0 else math.gcd(self.student.heads, theirs)


def attention_reads(model: Model, entry: str = "forward") -> tuple[tuple[Read, ...], ...]:
    """Queries, keys and values of each attention, in the order of calls, where single layers make them."""
    graph = trace(model, entry)
    found = []
    for node in graph:
        values = _reads(graph, node)
        reads = _of_layers(graph, values) if values else ()
        if reads:
            found.append(reads)
    return tuple(found)


def relations(
    student: tuple[tuple[Read, ...], ...], teacher: tuple[tuple[Read, ...], ...]
) -> tuple[Relation, ...]:
    """Attentions at equal fractions of the depth; the last ones always."""
    count = min(_MOST, len(student), len(teacher))
    pairs = []
    for index in range(count):
        mine, theirs = (layers[round((index + 1) * len(layers) / count) - 1] for layers in (student, teacher))
        pairs += [Relation(one, other) for one, other in zip(mine, theirs, strict=True)]
    return tuple(pairs)


def _reads(graph: Graph, node: Node) -> tuple[str, str, str] | None:
    """Names of the values of an attention: its own inputs, or those of both products around its softmax."""
    if node.op == "scaled_dot_product_attention":
        return node.inputs[0], node.inputs[1], node.inputs[2]
    if node.op not in _SOFTMAX:
        return None
    scores = next((one for one in _above(graph, node.inputs[0]) if one.op in _PRODUCTS), None)
    mixed, value = _below(graph, node.outputs[0])
    if scores is None or mixed is None or len(scores.inputs) < 2:
        return None
    others = [name for name in mixed.inputs if name != value]
    return (*scores.inputs[-2:], others[0]) if others else None  # type: ignore[return-value]


def _above(graph: Graph, value: str) -> Iterator[Node]:
    """Nodes that a value is made of, the nearest first."""
    waiting, known = [value], {value}
    while waiting:
        node = graph.producer.get(waiting.pop(0))
        if node is None:
            continue
        yield node
        if not _is_linear(node) and node.op not in _PRODUCTS:
            fresh = [name for name in node.inputs if name not in known]
            known.update(fresh)
            waiting += fresh


def _below(graph: Graph, value: str) -> tuple[Node | None, str]:
    """The product that reads a value, maybe moved, and the name under which it does."""
    readers = graph.consumers[value]
    if len(readers) != 1:
        return None, value
    if readers[0].op in _PRODUCTS:
        return readers[0], value
    return _below(graph, readers[0].outputs[0]) if len(readers[0].inputs) == 1 else (None, value)


def _is_linear(node: Node) -> bool:
    return node.op in ("linear", "addmm") and bool(node.parameters)


def _of_layers(graph: Graph, values: tuple[str, str, str]) -> tuple[Read, ...]:
    """The layers that make three values; nothing where one is made of several layers, or by no layer."""
    makers = []
    for value in values:
        linear = [node for node in _above(graph, value) if _is_linear(node)]
        if len(linear) != 1 or linear[0].name != f"{linear[0].layer}#0":
            return ()
        makers.append(linear[0])
    fused = len({node.name for node in makers}) == 1
    size = graph.values[values[0]].shape[-1]  # of a head; keys may come transposed
    reads = []
    for part, node in enumerate(makers):
        whole = graph.values[node.outputs[0]].shape
        width = whole[-1] // _FUSED if fused else whole[-1]
        if len(whole) != 3 or (fused and whole[-1] % _FUSED) or width % size:
            return ()
        reads.append(Read(node.layer, part if fused else None, width, max(width // size, 1)))
    return tuple(reads)
