"""Which parameters and values of a network become integers on a target, given what is asked of each layer.

Every operator that the runtime runs in integers reads integers, and so does what only moves or clamps
values behind it. Operators whose kernels want one grid for inputs and output (a concatenation, on some
runtimes) share a range. Where an operator has kernels for ranges that are found at run time alone
(recurrent layers, on some runtimes), its input gets such a format, for this reader only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from featherweight.formats import (
    Binary,
    Dynamic,
    Granularity,
    IntQuant,
    PerChannel,
    PerGroup,
    PerTensor,
    TensorFormat,
    Ternary,
)
from featherweight.graph import Graph, Node
from featherweight.method import Supports

WEIGHTED: Mapping[str, int] = {  # operator that may compute in integers -> axis of its weight's channels
    "conv1d": 0,
    "conv2d": 0,
    "conv3d": 0,
    "conv_transpose1d": 1,
    "conv_transpose2d": 1,
    "conv_transpose3d": 1,
    "linear": 0,
}
RECURRENT = frozenset({"lstm", "gru"})
_TABLES = frozenset({"embedding"})
_ARITHMETIC = frozenset(
    {"add", "mul", "cat", "matmul", "bmm", "adaptive_avg_pool2d", "avg_pool2d", "sigmoid", "leaky_relu"}
)
_CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp"})
_MOVES = frozenset(
    {"max_pool2d", "reshape", "view", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "dropout"}
)
_DYNAMIC = (Dynamic(8, per="token"), Dynamic(8, per="tensor"))  # the finer one first

Integers = Literal["int8", "int7", "int6", "int5", "int4", "int3", "int2"]
Weights = Literal[Integers, "ternary", "binary", "none"]
Activations = Literal[Integers, "dynamic", "none"]
Shared = Literal["per_channel", "per_tensor", "per_group"]
Asked = Callable[[Node], TensorFormat | None]


@dataclass(frozen=True)
class Plan:
    """What becomes integers.

    Attributes:
        weights: Parameter -> its format, with ranges yet to be found.
        values: Value -> the value whose range it takes, its source.
        grids: Source -> the one that names the grid it shares with others.
        fixed: Source -> the only range that its operator gives.
        dynamic: Value -> what some of its readers make of it at run time.
        asking: Value -> the calls in integers that read it, whose widths count; where none does, the one
            that makes it.
        refused: Layers that were asked for and stay float, since the runtime has nothing like it; and
            their operators.
    """

    weights: Mapping[str, TensorFormat]
    values: Mapping[str, str] = field(default_factory=dict)
    grids: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    dynamic: Mapping[str, tuple[Dynamic, ...]] = field(default_factory=dict)
    asking: Mapping[str, tuple[Node, ...]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def weight_draft(
    kind: str, symmetric: bool, shared: Shared, group: int, headroom: int = 0
) -> TensorFormat | None:
    """The format that a recipe names, e.g. 'int4', 'ternary' or 'none', with a range yet to be found."""
    if kind == "none":
        return None
    granularity: Granularity = PerTensor()
    if shared == "per_channel":
        granularity = PerChannel(0)
    elif shared == "per_group":
        granularity = PerGroup(1, group)
    one = torch.ones((1,) * {PerTensor: 0, PerChannel: 1, PerGroup: 2}[type(granularity)])
    if kind == "ternary":
        return Ternary(one, one / 2, granularity)
    if kind == "binary":
        return Binary(one, granularity)
    width = int(kind.removeprefix("int"))
    return IntQuant(-one, one, width, symmetric, granularity, headroom=headroom)


def activation_draft(kind: str, symmetric: bool) -> TensorFormat | None:
    """The same for activations, e.g. 'int8', 'dynamic' or 'none'."""
    if kind == "none":
        return None
    if kind == "dynamic":
        return replace(_DYNAMIC[0], symmetric=symmetric)
    return IntQuant(torch.tensor(-1.0), torch.tensor(1.0), int(kind.removeprefix("int")), symmetric)


def weights_of(node: Node, graph: Graph) -> dict[str, int]:
    """Parameters that an operator multiplies by or looks up -> the axis of their channels."""
    if node.op in WEIGHTED or node.op in _TABLES:
        name = node.parameters.get("weight")
        return {} if name is None else {name: WEIGHTED.get(node.op, 0)}
    if node.op in RECURRENT:
        names = [name for key, name in node.parameters.items() if key.startswith("params")]
        return {name: 0 for name in names if len(graph.parameter_shapes[name]) == 2}
    return {}


def plan_integers(
    graph: Graph,
    supports: Supports,
    weight: Asked,
    activation: Asked,
    out: Set[str],
    held: Set[str],
) -> Plan:
    """What of one entry becomes integers.

    Args:
        graph: The entry.
        supports: What the target's runtime can do.
        weight: Layer's node -> the format asked for its weights; None: they stay float.
        activation: Any node -> the format asked for what it reads: IntQuant everywhere (of any width),
            Dynamic everywhere, or None everywhere.
        out: Layers that stay float.
        held: Parameters that stay as they are for every reader.
    """
    chosen: list[Node] = []
    weights: dict[str, TensorFormat] = {}
    dynamic: dict[str, dict[Dynamic, set[str]]] = {}
    refused: dict[str, str] = {}
    for node in graph:
        if node.layer in out:
            continue
        named = weights_of(node, graph)
        mine = {name: axis for name, axis in named.items() if name not in held}
        asked = weight(node) if mine else None
        if asked is None:
            bare = node.op in WEIGHTED and len(mine) == len(named) > 0  # integers meet float weights
            plain = bare or _is_arithmetic(graph, node)
            read = activation(node)
            if isinstance(read, IntQuant) and plain and supports(node.op, None, read):
                chosen.append(node)
            continue
        fits, read = _executed(graph, node, supports, asked, activation(node))
        if not fits:
            refused[node.layer or node.name] = node.op
            continue
        weights |= {name: _along(asked, axis) for name, axis in mine.items()}
        if isinstance(read, Dynamic):
            dynamic.setdefault(node.inputs[0], {}).setdefault(read, set()).add(node.op)
        elif read is not None:
            chosen.append(node)
    at_run_time = {
        value: tuple(replace(fmt, readers=frozenset(ops)) for fmt, ops in formats.items())
        for value, formats in dynamic.items()
    }
    fixed = supports.fixed_ranges
    chosen = [node for node in chosen if not _torn(graph, node, chosen, supports)]
    values, asking = _integer_values(graph, chosen, supports, activation)
    own = {node.outputs[0]: fixed[node.op] for node in chosen if node.op in fixed}
    grids = _one_grid(chosen, values, supports)
    at_run_time = {value: fmt for value, fmt in at_run_time.items() if value not in values}
    return Plan(weights, values, grids, own, at_run_time, asking, refused)


def _executed(
    graph: Graph, node: Node, supports: Supports, weight: TensorFormat, activation: TensorFormat | None
) -> tuple[bool, TensorFormat | None]:
    """Whether the runtime takes a layer's weights in a format, and what the layer then reads."""
    if node.op in _TABLES or activation is None:
        return supports(node.op, weight, None), None
    if isinstance(activation, IntQuant) and node.op not in RECURRENT:
        pays = supports.integers_pay(node, graph)
        return supports(node.op, weight, activation if pays else None), activation if pays else None
    for dynamic in _DYNAMIC:
        symmetric = isinstance(activation, IntQuant | Dynamic) and activation.symmetric
        read = replace(dynamic, symmetric=symmetric)
        if node.inputs and supports(node.op, weight, read):
            return True, read
    beside = activation if isinstance(activation, IntQuant) else None  # what the rest of the network reads
    return supports(node.op, weight, beside), None


def _along(fmt: TensorFormat, axis: int) -> TensorFormat:
    """The format with what shares a scale laid along a weight whose channels are on this axis."""
    if not isinstance(fmt, IntQuant | Ternary | Binary):
        return fmt
    if isinstance(fmt.granularity, PerChannel):
        return replace(fmt, granularity=PerChannel(axis))
    if isinstance(fmt.granularity, PerGroup):
        return replace(fmt, granularity=PerGroup(1 - axis, fmt.granularity.size))
    return fmt


def _torn(graph: Graph, node: Node, chosen: list[Node], supports: Supports) -> bool:
    """Whether an operator of one grid reads a value whose range its own operator has fixed."""
    if node.op not in supports.one_grid:
        return False
    picked = {one.name for one in chosen}
    makers = [graph.producer.get(name) for name in node.inputs]
    return any(
        maker is not None and maker.name in picked and maker.op in supports.fixed_ranges for maker in makers
    )


def _one_grid(chosen: list[Node], values: Mapping[str, str], supports: Supports) -> dict[str, str]:
    """Source -> the first of those with which it shares a grid."""
    shared: dict[str, str] = {}

    def first(name: str) -> str:
        while name in shared:
            name = shared[name]
        return name

    for node in chosen:
        if node.op not in supports.one_grid:
            continue
        ends = [first(values[name]) for name in (*node.inputs, *node.outputs) if name in values]
        for name in ends[1:]:
            if first(name) != first(ends[0]):
                shared[first(name)] = first(ends[0])
    return {name: first(name) for name in shared}


def _is_arithmetic(graph: Graph, node: Node) -> bool:
    """Whether an operator without weights works on float tensors only (no constants, no integers)."""
    if node.op not in _ARITHMETIC or not node.inputs or node.parameters:
        return False
    if node.op in ("add", "mul") and len(node.inputs) < 2:
        return False  # a constant on the other side
    reads = [graph.values[name] for name in (*node.inputs, *node.outputs)]
    return all(value.dtype == torch.float32 for value in reads) and not _is_masking(graph, node)


def _is_masking(graph: Graph, node: Node) -> bool:
    """Whether a sum goes to softmax alone: a mask of -10,000 or less would leave no steps for the scores."""
    readers = [reader for name in node.outputs for reader in graph.consumers[name]]
    return node.op == "add" and bool(readers) and all("softmax" in reader.op for reader in readers)


def _integer_values(
    graph: Graph, chosen: list[Node], supports: Supports, activation: Asked
) -> tuple[dict[str, str], dict[str, tuple[Node, ...]]]:
    """Values that become integers -> the value whose range they take; and -> the calls that ask for it.

    Inputs of every chosen operator, and its output behind the clamps that it
    absorbs. A value that was only moved (reshaped, pooled by maximum) takes the
    range of where it came from, so that the move costs nothing.
    """
    picked = {node.name for node in chosen}
    wanted: dict[str, list[Node]] = {}
    makers: dict[str, tuple[Node, ...]] = {}
    joined = {_joined_input(graph, node, chosen, supports) for node in chosen}
    for node in chosen:
        for name in node.inputs:
            if name not in joined:
                wanted.setdefault(name, []).append(node)
        end = _behind_clamps(graph, node, supports, activation(node))
        readers = graph.consumers[end]
        integers = [reader for reader in readers if _reaches(graph, reader, picked)]
        if end not in joined and (integers or node.op not in supports.float_outputs):
            wanted.setdefault(end, [])
            makers[end] = (node,)
    values: dict[str, str] = {}
    for name, readers_of in wanted.items():
        source, chain = name, [name]
        asked = activation((readers_of or makers[name])[0])
        while True:
            move = graph.producer.get(source)
            if move is None or not _moves(move) or len(move.inputs) != 1:
                break
            if not supports(move.op, None, asked) and move.op != "dropout":
                break
            source = move.inputs[0]
            chain.append(source)
        end_node = graph.producer.get(source)
        integral = source in wanted or (end_node is not None and end_node.name in picked)
        for link in chain if integral or len(chain) > 1 else [name]:
            values[link] = source
    return values, {name: tuple(nodes) or makers[name] for name, nodes in wanted.items()}


def _moves(node: Node) -> bool:
    """Whether an operator's values are those that it reads, or zeros, which every grid holds."""
    if node.op == "pad":
        return node.attributes.get("mode") == "constant" and not node.attributes.get("value")
    return node.op in _MOVES


def _joined_input(graph: Graph, node: Node, chosen: list[Node], supports: Supports) -> str | None:
    """The input of a sum that is added inside the integer layer which makes it, for this sum alone."""
    if node.op not in supports.joined:
        return None
    layers = {one.name for one in chosen if one.op in WEIGHTED}
    for name in node.inputs:
        maker = graph.producer.get(name)
        alone = len(graph.consumers[name]) == 1 and name not in graph.outputs
        if alone and maker is not None and maker.name in layers:
            return name
    return None


def _reaches(graph: Graph, reader: Node, picked: set[str]) -> bool:
    """Whether an operator, or one behind moves of its values, runs in integers."""
    if reader.name in picked:
        return True
    if not _moves(reader):
        return False
    return any(_reaches(graph, after, picked) for out in reader.outputs for after in graph.consumers[out])


def _behind_clamps(graph: Graph, node: Node, supports: Supports, activation: TensorFormat | None) -> str:
    """The operator's output, or that of the clamps which alone read it and which integer kernels absorb."""
    value = node.outputs[0]
    while value not in graph.outputs:
        readers = graph.consumers[value]
        if len(readers) != 1 or readers[0].op not in _CLAMPS:
            break
        if not supports(readers[0].op, None, activation):
            break
        value = readers[0].outputs[0]
    return value
