"""A traced network as a chain of blocks, each of which can be run alone on picked examples.

A block ends where one single value connects what is before with what is behind: at the end of a residual
block, an inverted residual, or either half of a transformer's layer. Small neighbours are merged. This is
the unit that BRECQ reconstructs (Li et al. 2021, arXiv:2102.05426).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from featherweight.graph import Graph

_FOLLOWS = frozenset(  # operators that stay with the layer in front of them
    {"relu", "relu6", "hardtanh", "clamp", "gelu", "silu", "hardswish", "leaky_relu", "sigmoid", "tanh"}
    | {"hardsigmoid", "softmax", "dropout", "flatten", "view", "reshape", "permute", "transpose"}
    | {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean"}
)

Store = Callable[[str, Tensor], Tensor]  # traced value name, value -> as it is stored
ReadAs = Callable[[str, str, Tensor], Tensor]  # traced value name, operator, value -> as this reader sees it


@dataclass(frozen=True)
class Block:
    """Calls that lie between two cuts of a graph.

    Attributes:
        calls: Names in the exported program, in the order of execution.
        inputs: What they read that was made before.
        outputs: What they make that is read later or returned; at least one float value.
        weights: The parameters of interest that they read.
    """

    calls: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]


def partition(graph: Graph, weights: Collection[str], limit: int = 3) -> list[Block]:
    """Blocks in the order of execution.

    Args:
        graph: A traced network.
        weights: Parameters of interest.
        limit: Neighbours inside the same layer are merged while they have at most so many of them together.
    """
    calls = [node for node in graph.program.graph_module.graph.nodes if node.op == "call_function"]
    held = [set(_weights_of(graph, call, weights)) for call in calls]
    bounds = [0, *_cuts(graph, calls, weights), len(calls)]
    owners = {node.fx_name: node.layer for node in graph.nodes}

    def size(start: int, end: int) -> int:
        return len(set[str]().union(*held[start:end]))

    def owner(start: int, end: int) -> str:
        return _common([owners[call.name] for call in calls[start:end] if owners.get(call.name)])

    merged: list[tuple[int, int]] = []
    for start, end in pairwise(bounds):
        first = merged[-1][0] if merged else start
        together = bool(merged) and size(first, end) <= limit and bool(owner(first, end))
        if merged and (together or not size(start, end) or not size(*merged[-1])):
            merged[-1] = (first, end)
        else:
            merged.append((start, end))
    return [_block(graph, calls, start, end, held) for start, end in merged if end > start]


def _common(paths: Sequence[str]) -> str:
    """The path of the innermost layer that owns all of these."""
    shared: list[str] = []
    for names in zip(*(path.split(".")[:-1] for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _cuts(graph: Graph, calls: Sequence[fx.Node], weights: Collection[str]) -> list[int]:
    """Numbers of calls behind which one single value leads on, none of them the last.

    Values that depend on no weight (masks, positions) may be read anywhere.
    """
    operators = {node.fx_name: node.op for node in graph.nodes}
    order = {call: place for place, call in enumerate(calls)}
    depends: set[fx.Node] = set()
    live: set[fx.Node] = set()
    found: list[int] = []
    for place, call in enumerate(calls[:-1]):
        if any(graph.parameters.get(s.name) in weights or s in depends for s in call.all_input_nodes):
            depends.add(call)
            live.add(call)
        live = {
            node for node in live if max((order.get(u, len(calls)) for u in node.users), default=-1) > place
        }
        tensors = [node for node in live if isinstance(node.meta.get("val"), Tensor | tuple | list)]
        if tensors != [call] or not isinstance(call.meta["val"], Tensor):
            continue
        readers = [operators.get(user.name) for user in call.users if user in order]
        if len(readers) != 1 or readers[0] not in _FOLLOWS:
            found.append(place + 1)
    return found


def _weights_of(graph: Graph, node: fx.Node, weights: Collection[str]) -> list[str]:
    names = [graph.parameters.get(source.name) for source in node.all_input_nodes]
    return [name for name in names if name is not None and name in weights]


def _block(graph: Graph, calls: Sequence[fx.Node], start: int, end: int, held: Sequence[set[str]]) -> Block:
    inside = calls[start:end]
    own = {call.name for call in inside}
    reads = dict.fromkeys(source.name for call in inside for source in call.all_input_nodes)
    inputs = tuple(name for name in reads if name not in own and name not in graph.parameters)
    outputs = [call for call in inside if any(user.name not in own for user in call.users)]
    if not any(map(_is_float, outputs)):  # a network that returns classes: what they are told from
        outputs += [call for call in inside if _is_float(call)][-1:]
    weights = dict.fromkeys(name for names in held[start:end] for name in sorted(names))
    names = tuple(call.name for call in outputs)
    return Block(tuple(call.name for call in inside), inputs, names, tuple(weights))


def _is_float(call: fx.Node) -> bool:
    seen = call.meta.get("val")
    return isinstance(seen, Tensor) and seen.is_floating_point()


class BlockRun:
    """Runs the calls of a block on any rows, with gradients.

    Args:
        graph: The traced network.
        calls: Names in the exported program, in the order of execution.
    """

    def __init__(self, graph: Graph, calls: Sequence[str]) -> None:
        by_name = {node.name: node for node in graph.program.graph_module.graph.nodes}
        self._calls = [by_name[name] for name in calls]
        self._parameters = graph.parameters
        self._names = {value.fx_name: name for name, value in graph.values.items()}
        self._operators = {node.fx_name: node.op for node in graph.nodes}

    def __call__(
        self,
        inputs: Mapping[str, Any],
        parameters: Mapping[str, Tensor],
        store: Store | None = None,
        read_as: ReadAs | None = None,
    ) -> dict[str, Any]:
        """All values that were made, and the inputs, by their names in the program.

        Args:
            inputs: By name in the program.
            parameters: By name in the module.
            store: What becomes of each traced value.
            read_as: What an operator sees of a traced value.
        """
        made = dict(inputs)

        for call in self._calls:
            operator = self._operators.get(call.name, "")

            def read(argument: fx.Node, operator: str = operator) -> Any:
                parameter = self._parameters.get(argument.name)
                if parameter is not None:
                    return parameters[parameter]
                value = made[argument.name]
                name = self._names.get(argument.name)
                if read_as is None or name is None or not isinstance(value, Tensor):
                    return value
                return read_as(name, operator, value)

            args, kwargs = fx.node.map_arg(call.args, read), fx.node.map_arg(call.kwargs, read)
            assert callable(call.target)
            value = call.target(*args, **kwargs)
            name = self._names.get(call.name)
            if store is not None and name is not None and isinstance(value, Tensor):
                value = store(name, value)
            made[call.name] = value
        return made


class Picker:
    """Picks rows of cached values, whose batches are separate tensors.

    Args:
        graph: Says which axis of a value is that of the examples.
        sizes: Rows of each batch.
    """

    def __init__(self, graph: Graph, sizes: Sequence[int]) -> None:
        self._nodes = {node.name: node for node in graph.program.graph_module.graph.nodes}
        self._sizes = list(sizes)
        self._rows = [(batch, row) for batch, size in enumerate(sizes) for row in range(size)]

    @classmethod
    def of(cls, graph: Graph, name: str, values: Sequence[Tensor]) -> Picker:
        """One whose batches have as many rows as this value has (by its name in the program)."""
        nodes = {node.name: node for node in graph.program.graph_module.graph.nodes}
        axis = example_axis(nodes[name].meta.get("val")) or 0
        return cls(graph, [value.shape[axis] for value in values])

    def draw(self, count: int, generator: torch.Generator) -> dict[int, list[int]]:
        """Random rows by batch."""
        picks: dict[int, list[int]] = {}
        for index in torch.randperm(len(self._rows), generator=generator)[:count].tolist():
            batch, row = self._rows[index]
            picks.setdefault(batch, []).append(row)
        return picks

    def take(self, name: str, values: Sequence[Any], picks: Mapping[int, Sequence[int]]) -> Any:
        """The picked rows of a value; a size in proportion; what has no examples' axis as it is."""
        first = next(iter(picks))
        seen = self._nodes[name].meta.get("val")
        if not isinstance(values[first], Tensor):
            rows = sum(map(len, picks.values()))
            dynamic = isinstance(seen, torch.SymInt)
            return values[first] * rows // self._sizes[first] if dynamic else values[first]
        axis = example_axis(seen)
        if axis is None:
            return values[first]
        parts = []
        for batch, some in picks.items():
            each = values[batch].shape[axis] // self._sizes[batch]
            parts += [values[batch].narrow(axis, row * each, each) for row in some]
        return torch.cat(parts, axis)

    def mix(
        self,
        name: str,
        values: Sequence[Any],
        others: Sequence[Any],
        picks: Mapping[int, Sequence[int]],
        coins: Sequence[bool],
    ) -> Any:
        """The picked rows of two versions of a value: of ``others`` where a row's coin says so."""
        axis = example_axis(self._nodes[name].meta.get("val"))
        if axis is None:
            return self.take(name, values, picks)
        parts, tossed = [], iter(coins)
        for batch, some in picks.items():
            each = values[batch].shape[axis] // self._sizes[batch]
            for row in some:
                source = others if next(tossed) else values
                parts.append(source[batch].narrow(axis, row * each, each))
        return torch.cat(parts, axis)

    @property
    def count(self) -> int:
        """Rows of all batches."""
        return len(self._rows)


def example_axis(seen: Any) -> int | None:
    """The axis whose size is not fixed, as the exporter saw a value."""
    if not isinstance(seen, Tensor):
        return None
    return next((axis for axis, size in enumerate(seen.shape) if isinstance(size, torch.SymInt)), None)
