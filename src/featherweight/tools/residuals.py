"""Residual blocks of a network, as data: stretches that can go, since the skip beside them stays.

An addition ``y = x + f(x)`` whose operands have one shape is a residual one: where ``y`` becomes ``x``, every
shape stays. It is a block by itself, or part of a layer with several of them (attention and feed-forward in a
transformer's); then the block is the whole sub-module::

    x -> [add | norm | activation | dropout]* -> y    with at least one residual addition on the way,

so that what the sub-module reads and what it makes have one shape (He et al. 2016, arXiv:1603.05027; Veit et
al. 2016, arXiv:1605.06431, on how little single blocks matter). Strided and projected blocks are none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from featherweight.graph import Graph, Node, trace
from featherweight.model import Model
from featherweight.tools.costs import node_macs

_KEEPS = frozenset(
    {"relu", "relu6", "hardtanh", "gelu", "silu", "hardswish", "leaky_relu", "elu", "mish", "tanh", "clamp"}
    | {"batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"}
    | {"dropout", "clone", "contiguous", "alias", "identity", "detach", "to", "_to_copy", "type_as"}
)
_MOSTLY = 0.8  # of a sub-module's multiply-accumulates: a block inside that has them is the block itself


@dataclass(frozen=True)
class ResidualBlock:
    """A stretch of the graph that can go: its result becomes its source.

    Attributes:
        name: Path of the sub-module, else the traced name of the addition.
        path: Of the sub-module that it is; '' when it is a part of some code.
        entry: Where it was found.
        source: Traced value ``x``.
        result: Traced value ``y`` of the same shape.
        nodes: Names of the calls that go.
        layers: Paths of the layers with parameters that go.
        macs: Multiply-accumulates of one example that go.
        params: Parameters that go.
    """

    name: str
    path: str
    entry: str
    source: str
    result: str
    nodes: frozenset[str]
    layers: tuple[str, ...]
    macs: int
    params: int


def residual_blocks(model: Model) -> list[ResidualBlock]:
    """The blocks of a model in the order of their results; none overlaps with another one.

    A sub-module that several entries call is a block only where it is one in each of them.
    """
    found: dict[str, list[ResidualBlock]] = {}
    for entry in model.entries:
        found[entry] = _Finder(model, entry).blocks()
    called = {entry: {node.layer for node in trace(model, entry)} for entry in model.entries}
    result: dict[str, ResidualBlock] = {}
    for entry, blocks in found.items():
        for block in blocks:
            others = [other for other in model.entries if other != entry and _calls(called[other], block)]
            if all(_same(found[other], block) for other in others):
                result.setdefault(block.name, block)
    return list(result.values())


def _calls(called: set[str], block: ResidualBlock) -> bool:
    return bool(called & set(block.layers))


def _same(blocks: Iterable[ResidualBlock], block: ResidualBlock) -> bool:
    return bool(block.path) and any(one.path == block.path for one in blocks)


class _Finder:
    def __init__(self, model: Model, entry: str) -> None:
        self._model, self._entry = model, entry
        self._graph: Graph = trace(model, entry)
        self._order = {node.name: place for place, node in enumerate(self._graph.nodes)}
        self._sizes = {name: tensor.numel() for name, tensor in model.module.named_parameters()}
        self._descendants: dict[str, set[str]] = {}
        self._residual = {add.name: x for add, x, _ in self._additions()}

    def blocks(self) -> list[ResidualBlock]:
        chosen: dict[str, ResidualBlock] = {}
        for path in sorted(self._paths(), key=lambda path: -path.count(".")):  # the innermost first
            block = self._of_module(path)
            if block is None:
                continue
            parts = [one for one in chosen.values() if one.nodes <= block.nodes]
            if len(parts) > 1 or any(one.macs >= _MOSTLY * block.macs for one in parts):
                continue
            for one in parts:
                del chosen[one.name]
            chosen[path] = block
        taken = {name for block in chosen.values() for name in block.nodes}
        for add, x, inside in self._additions():
            if not taken & inside:
                part = self._block(add.name, "", x, add.outputs[0], inside | {add.name})
                if part is not None:
                    chosen[add.name] = part
                    taken |= part.nodes
        return sorted(chosen.values(), key=lambda block: self._place(block.result))

    def _place(self, value: str) -> int:
        return self._order[self._graph.producer[value].name]

    # ---- additions

    def _additions(self) -> Iterator[tuple[Node, str, frozenset[str]]]:
        """Residual additions, the value that skips, and the calls between; those nearest to it come first."""
        for node in self._graph:
            if node.op != "add" or len(set(node.inputs)) != 2 or node.attributes.get("alpha", 1) != 1:
                continue
            shapes = {self._graph.values[name].shape for name in (*node.inputs, *node.outputs)}
            if len(shapes) > 1:
                continue
            for x, other in (node.inputs, node.inputs[::-1]):
                inside = self._between(x, other)
                if inside and self._closed(inside, {node.name}):
                    yield node, x, inside
                    break

    def _between(self, x: str, other: str) -> frozenset[str]:
        """The calls on the ways from ``x`` to ``other``; none where there is no way."""
        behind = self._behind(x)
        if other not in behind:
            return frozenset()
        found: set[str] = set()
        waiting = [other]
        while waiting:
            maker = self._graph.producer.get(waiting.pop())
            if maker is not None and maker.name not in found and behind & set(maker.outputs) - {x}:
                found.add(maker.name)
                waiting += [name for name in maker.inputs if name != x]
        return frozenset(found)

    def _behind(self, x: str) -> set[str]:
        """The value and all that is computed from it."""
        if x not in self._descendants:
            start = self._place(x) if x in self._graph.producer else -1
            behind = {x}
            for node in self._graph.nodes[start + 1 :]:
                if behind & set(node.inputs):
                    behind.update(node.outputs)
            self._descendants[x] = behind
        return self._descendants[x]

    def _closed(self, inside: frozenset[str], readers: set[str]) -> bool:
        """Whether nobody but the given readers uses what these calls make."""
        for name in inside:
            for value in self._graph.nodes[self._order[name]].outputs:
                if value in self._graph.outputs:
                    return False
                if any(reader.name not in inside | readers for reader in self._graph.consumers[value]):
                    return False
        return True

    # ---- sub-modules

    def _paths(self) -> set[str]:
        """Sub-modules around residual additions, without the root."""
        found: set[str] = set()
        for name in self._residual:
            parts = self._graph.nodes[self._order[name]].layer.split(".")
            found.update(".".join(parts[: end + 1]) for end in range(len(parts)))
        return found - {""}

    def _of_module(self, path: str) -> ResidualBlock | None:
        """The sub-module as one block, if what it reads and makes are tied by skips."""
        inside = frozenset(
            node.name for node in self._graph if node.layer == path or node.layer.startswith(f"{path}.")
        )
        nodes = [self._graph.nodes[self._order[name]] for name in inside]
        made = {value for node in nodes for value in node.outputs}
        used = [
            value
            for value in made
            if value in self._graph.outputs
            or any(reader.name not in inside for reader in self._graph.consumers[value])
        ]
        if len(used) != 1:
            return None
        (y,) = used
        read = {value for node in nodes for value in node.inputs} - made
        for x in self._skipped(y, inside):
            alike = self._graph.values[x].shape == self._graph.values[y].shape
            if alike and not self._behind(x) & (read - {x}):  # else what makes those would stay
                return self._block(path, path, x, y, inside)
        return None

    def _skipped(self, y: str, inside: frozenset[str]) -> Iterator[str]:
        """Values outside that reach ``y`` over skips; at least one residual addition is on the way."""
        seen, waiting = {(y, False)}, [(y, False)]
        while waiting:
            value, added = waiting.pop()
            maker = self._graph.producer.get(value)
            if maker is None or maker.name not in inside:
                if added:
                    yield value
                continue
            if maker.name in self._residual:
                nearer = [(self._residual[maker.name], True)]
            elif maker.op in _KEEPS and maker.inputs:
                nearer = [(maker.inputs[0], added)]
            else:
                nearer = []
            for one in nearer:
                if one not in seen:
                    seen.add(one)
                    waiting.append(one)

    def _block(self, name: str, path: str, x: str, y: str, inside: frozenset[str]) -> ResidualBlock | None:
        nodes = [node for node in self._graph if node.name in inside]
        elsewhere = {p for node in self._graph if node.name not in inside for p in node.parameters.values()}
        params = {p for node in nodes for p in node.parameters.values()} - elsewhere
        macs = sum(node_macs(self._graph, node) for node in nodes)
        if not macs:
            return None
        layers = tuple(dict.fromkeys(node.layer for node in nodes if node.parameters))
        count = sum(self._sizes.get(p, 0) for p in params)
        return ResidualBlock(name, path, self._entry, x, y, inside, layers, macs, count)
