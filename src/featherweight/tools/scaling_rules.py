"""Which operators let a channel's factor through, and how: the rules behind ``scaling_groups``.

Every value has labels: one number per channel, in a shape that broadcasts to the value's. Label 0 stands
for the factor 1; an operator without a rule gives it to everything it touches. Operators that only move
elements are run on the labels themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from featherweight.graph import Graph, Node

_CONVS = frozenset({"conv1d", "conv2d", "conv3d"})
_TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
_SAME = frozenset(
    {"relu", "leaky_relu", "prelu", "abs", "neg", "dropout", "feature_dropout", "alpha_dropout"}
    | {"contiguous", "clone", "detach", "alias", "identity"}
)
_POOLS = frozenset(  # they mix the elements of the last axes, so many of them
    {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)}
    | {"upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d"}
    | {"upsample_linear1d", "upsample_bicubic2d"}
)
_MOVES = frozenset(
    {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "expand"}
    | {"t", "select", "slice", "chunk", "split", "split_with_sizes", "unbind", "narrow", "movedim", "cat"}
    | {"concat", "stack", "expand_as", "view_as", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle"}
    | {"repeat", "flip", "roll"}
)
_CLAMPS = frozenset({"relu6", "hardtanh", "clamp", "clamp_max", "clamp_min"})


class Labels:
    """Numbers that may turn out to be the same (disjoint sets); 0 is the factor 1."""

    def __init__(self) -> None:
        self._parent = [0]

    @property
    def count(self) -> int:
        return len(self._parent)

    def fresh(self, shape: Iterable[int]) -> Tensor:
        """So many new labels."""
        sizes = tuple(shape)
        start = self.count
        total = int(torch.tensor(sizes).prod())
        self._parent.extend(range(start, start + total))
        return torch.arange(start, start + total).reshape(sizes)

    def _root(self, one: int) -> int:
        while self._parent[one] != one:
            self._parent[one] = self._parent[self._parent[one]]
            one = self._parent[one]
        return one

    def tie(self, first: Tensor, second: Tensor) -> None:
        """Make labels at the same place the same."""
        pairs = torch.stack([each.reshape(-1) for each in _broadcast(first, second)], 1)
        for one, other in torch.unique(pairs, dim=0).tolist():
            roots = sorted((self._root(one), self._root(other)))
            self._parent[roots[1]] = roots[0]

    def close(self, labels: Tensor) -> None:
        """These channels keep their values."""
        self.tie(labels, torch.zeros((), dtype=torch.int64))

    def roots(self, labels: Tensor) -> Tensor:
        """The number that stands for all that are tied to each label."""
        ids, places = torch.unique(labels, return_inverse=True)
        return torch.tensor([self._root(one) for one in ids.tolist()])[places]


@dataclass
class Uses:
    """What was labelled.

    Attributes:
        parameters: (name, 1 for channels it makes or -1 for those it reads) -> labels.
        values: (entry, traced name) -> labels.
        limits: (entry, traced name) -> where a clamp from zero cuts the value off.
        calls: Parameter -> (entry, call) of the operators that read it.
        held: Parameters and values that stay as they are.
    """

    parameters: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    values: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    limits: dict[tuple[str, str], float] = field(default_factory=dict)
    calls: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    held: set[str] = field(default_factory=set)


def label_values(
    graph: Graph,
    entry: str,
    labels: Labels,
    uses: Uses,
    known: set[str],
    selects: Callable[[str, str], bool],
) -> None:
    """Label every value and parameter of one entry's graph; what is tied across entries is tied there too."""
    pass_ = _Pass(graph, entry, labels, uses, known)
    for node in graph:
        pass_.visit(node, selects(node.layer, node.layer_type))
    pass_.finish()


class _Pass:
    """One walk over a graph."""

    def __init__(self, graph: Graph, entry: str, labels: Labels, uses: Uses, known: set[str]) -> None:
        self.graph, self.entry, self.labels, self.uses = graph, entry, labels, uses
        self._known = known
        self._calls = {node.name: node for node in graph.program.graph_module.graph.nodes}
        self._names = {value.fx_name: name for name, value in graph.values.items()}
        self._of: dict[str, Tensor] = {name: self._closed(name) for name in graph.inputs}

    def _closed(self, value: str) -> Tensor:
        return torch.zeros([1] * len(self.graph.values[value].shape), dtype=torch.int64)

    def visit(self, node: Node, selected: bool) -> None:
        """Label what a call makes."""
        for name in node.parameters.values():
            self.uses.calls[name].append((self.entry, node.name))
        made = self._rule(node) if selected else None
        if made is None:
            for name in node.inputs:
                self.labels.close(self._of[name])
            for name in node.parameters.values():
                self._hold(name)
            made = tuple(self._closed(name) for name in node.outputs)
        for name, one in zip(node.outputs, made, strict=True):
            self._of[name] = self._fit(one, self.graph.values[name].shape)

    def finish(self) -> None:
        """Close what leaves the network or must stay, and hand the labels over."""
        for name in self.graph.outputs:
            self.labels.close(self._of[name])
        for name, one in self._of.items():
            if name in self.uses.held:
                self.labels.close(one)
            self.uses.values[self.entry, name] = one
        for (name, _), one in self.uses.parameters.items():
            if name in self.uses.held:
                self.labels.close(one)

    # ---- labels

    def _hold(self, parameter: str) -> None:
        self.uses.held.add(parameter)

    def _fit(self, labels: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Labels in as many axes as the value, of length 1 where they do not vary."""
        labels = labels.reshape([1] * (len(shape) - labels.dim()) + list(labels.shape))
        for axis in range(labels.dim()):
            head = labels.narrow(axis, 0, 1)
            if labels.shape[axis] > 1 and bool((labels == head).all()):
                labels = head
        return labels

    def _full(self, call: fx.Node) -> Tensor:
        value = self.graph.values[self._names[call.name]]
        return self._of[value.name].expand(value.shape)

    def _along(self, value: str, axes: Iterable[int], constant: bool = False) -> Tensor:
        """Labels of a value; closed unless they vary along these axes alone (``constant``: along others)."""
        labels = self._of[value]
        wanted = {axis % labels.dim() for axis in axes}
        wrong = [a for a in range(labels.dim()) if labels.shape[a] > 1 and (a in wanted) == constant]
        if not wrong:
            return labels
        self.labels.close(labels)
        return self._closed(value)

    def _parameter(self, node: Node, argument: str, sign: int, labels: Tensor) -> None:
        """What a parameter makes or reads has these labels."""
        name = node.parameters.get(argument)
        if name is None:
            return
        if name not in self._known:
            self.labels.close(labels)
            return
        before = self.uses.parameters.get((name, sign))
        if before is None:
            self.uses.parameters[name, sign] = labels
        elif before.shape == labels.shape:
            self.labels.tie(before, labels)
        else:
            self.labels.close(labels)
            self._hold(name)

    # ---- rules

    def _rule(self, node: Node) -> tuple[Tensor, ...] | None:
        """Labels of the outputs; None where nothing is known of the operator."""
        op = node.op
        if op in _CONVS or op in _TRANSPOSED:
            return self._conv(node, op in _TRANSPOSED)
        if op == "linear":
            return self._linear(node)
        if op in ("layer_norm", "batch_norm", "group_norm", "rms_norm"):
            return self._norm(node)
        if op in ("add", "sub"):
            return self._sum(node)
        if op in ("mul", "div"):
            return self._product(node)
        if op in ("matmul", "bmm", "scaled_dot_product_attention"):
            return self._matmul(node)
        if op in _MOVES:
            return self._moved(node)
        if len(node.inputs) != 1:
            return None
        (value,) = node.inputs
        if op in _SAME:
            return (self._of[value],) if len(node.outputs) == 1 else None
        if op in _CLAMPS:
            return self._clamp(node)
        if op in _POOLS:
            axes = range(-int(op[-2]), 0)
            return tuple(self._along(value, axes, constant=True) for _ in node.outputs)
        if op in ("mean", "sum", "amax"):
            return self._reduced(node)
        return self._pad(node) if op in ("pad", "constant_pad_nd", "zero_pad2d") else None

    def _conv(self, node: Node, transposed: bool) -> tuple[Tensor, ...] | None:
        if len(node.inputs) != 1 or "weight" not in node.parameters:
            return None
        shape = self.graph.parameter_shapes[node.parameters["weight"]]
        groups = int(node.attributes.get("groups") or 1)
        kernel = [1] * (len(shape) - 2)
        dims = len(self.graph.values[node.inputs[0]].shape)
        axis = dims - len(shape) + 1
        read = self._along(node.inputs[0], [axis])
        inputs = self.graph.values[node.inputs[0]].shape[axis]
        read = read.reshape(-1).expand(inputs)
        outputs = self.graph.values[node.outputs[0]].shape[axis]
        made = self.labels.fresh([outputs])
        if transposed:  # (inputs, outputs / groups, ...)
            into = read.reshape(-1, 1, *kernel)
            out = made.reshape(groups, 1, -1).expand(-1, shape[0] // groups, -1)
            out = out.reshape(shape[0], -1, *kernel)
        else:  # (outputs, inputs / groups, ...)
            out = made.reshape(-1, 1, *kernel)
            into = read.reshape(groups, 1, -1).expand(-1, shape[0] // groups, -1)
            into = into.reshape(shape[0], -1, *kernel)
        self._parameter(node, "weight", -1, into)
        self._parameter(node, "weight", 1, out)
        self._parameter(node, "bias", 1, made)
        return (made.reshape([-1 if a == axis else 1 for a in range(dims)]),)

    def _linear(self, node: Node) -> tuple[Tensor, ...] | None:
        if len(node.inputs) != 1 or "weight" not in node.parameters:
            return None
        shape = self.graph.parameter_shapes[node.parameters["weight"]]
        read = self._along(node.inputs[0], [-1]).reshape(-1).expand(shape[1])
        made = self.labels.fresh([shape[0]])
        self._parameter(node, "weight", -1, read.reshape(1, -1))
        self._parameter(node, "weight", 1, made.reshape(-1, 1))
        self._parameter(node, "bias", 1, made)
        return (made.reshape([1] * (len(self.graph.values[node.outputs[0]].shape) - 1) + [-1]),)

    def _norm(self, node: Node) -> tuple[Tensor, ...] | None:
        """A norm is scaled by its affine; what it reads keeps its values."""
        shape = self.graph.parameter_shapes.get(node.parameters.get("weight", ""), ())
        if len(node.inputs) != 1 or len(shape) != 1 or len(node.outputs) != 1:
            return None
        self.labels.close(self._of[node.inputs[0]])
        dims = len(self.graph.values[node.outputs[0]].shape)
        axis = dims - 1 if node.op in ("layer_norm", "rms_norm") else 1
        made = self.labels.fresh(shape)
        self._parameter(node, "weight", 1, made)
        self._parameter(node, "bias", 1, made)
        return (made.reshape([-1 if a == axis else 1 for a in range(dims)]),)

    def _sum(self, node: Node) -> tuple[Tensor, ...] | None:
        """Both sides have one factor; a number or parameter that is added leaves none."""
        operands = self._calls[node.fx_name].args[:2]
        if node.parameters or not all(isinstance(arg, fx.Node) for arg in operands):
            return None
        one, other = (self._of[self._names[arg.name]] for arg in operands)
        self.labels.tie(one, other)
        return (_broadcast(one, other)[0],)

    def _product(self, node: Node) -> tuple[Tensor, ...] | None:
        """Constants let factors through; of two values, the one with fewer factors keeps its own."""
        left, right = (*self._calls[node.fx_name].args, None)[:2]
        if not isinstance(left, fx.Node) or node.attributes.get("rounding_mode") is not None:
            return None
        if right is left or len(node.inputs) not in (1, 2):
            return None
        for name in node.parameters.values():
            self._hold(name)
        if len(node.inputs) == 1:
            if node.op == "div" and self._names.get(left.name) != node.inputs[0]:
                return None
            return (self._of[node.inputs[0]],)
        one, other = (self._of[name] for name in node.inputs)
        if node.op == "mul" and int(self._free(other)) > int(self._free(one)):
            one, other = other, one
        self.labels.close(other)
        return (one,)

    def _free(self, labels: Tensor) -> int:
        """How many channels still have a factor."""
        return int((self.labels.roots(labels) != 0).sum())

    def _matmul(self, node: Node) -> tuple[Tensor, ...] | None:
        """Attention hands the channels of its values on; everything else that it reads is closed."""
        arguments = self._calls[node.fx_name].args
        place = 2 if node.op == "scaled_dot_product_attention" else 1
        if not all(isinstance(arg, fx.Node) for arg in arguments[: place + 1]):
            return None
        name = self._names.get(arguments[place].name)
        others = [self._names.get(arg.name) for arg in arguments[:place]]
        if name is None or name in others or len(self._of[name].shape) < 2:
            return None
        for other in node.inputs:
            if other != name:
                self.labels.close(self._of[other])
        for parameter in node.parameters.values():
            self._hold(parameter)
        return (self._along(name, [-2], constant=True),)

    def _moved(self, node: Node) -> tuple[Tensor, ...] | None:
        """The operator itself, on labels."""
        call = self._calls[node.fx_name]
        if node.parameters or not callable(call.target):
            return None

        def read(argument: fx.Node) -> Any:
            if argument.name in self._names:
                return self._full(argument)
            return _number(argument.meta["val"])

        args, kwargs = fx.node.map_arg(call.args, read), fx.node.map_arg(call.kwargs, read)
        made = call.target(*args, **kwargs)
        return (made,) if isinstance(made, Tensor) else tuple(made)

    def _clamp(self, node: Node) -> tuple[Tensor, ...] | None:
        (value,) = node.inputs
        low, high = _limits(node)
        if low != 0 or not isinstance(high, (int, float, type(None))) or node.parameters:
            return None
        if high is not None:
            if high <= 0:
                return None
            key = (self.entry, value)
            self.uses.limits[key] = min(float(high), self.uses.limits.get(key, float(high)))
        return (self._of[value],)

    def _reduced(self, node: Node) -> tuple[Tensor, ...] | None:
        dims = node.attributes.get("dim")
        if dims is None or dims == []:
            return None
        axes = [int(axis) for axis in (dims if isinstance(dims, (list, tuple)) else [dims])]
        labels = self._along(node.inputs[0], axes, constant=True)
        if not node.attributes.get("keepdim"):
            for axis in sorted((axis % labels.dim() for axis in axes), reverse=True):
                labels = labels.select(axis, 0)
        return (labels,)

    def _pad(self, node: Node) -> tuple[Tensor, ...] | None:
        """Zeros may have any factor, so those beside channels have labels of their own."""
        widths: Any = node.attributes.get("pad", node.attributes.get("padding"))
        if node.attributes.get("mode", "constant") != "constant" or node.attributes.get("value"):
            return None
        if not isinstance(widths, (list, tuple)) or not all(isinstance(one, int) for one in widths):
            return None
        labels = self._of[node.inputs[0]]
        for place in range(len(widths) // 2):
            axis = labels.dim() - 1 - place
            before, after = (max(one, 0) for one in widths[2 * place : 2 * place + 2])
            if labels.shape[axis] > 1 and min(widths[2 * place : 2 * place + 2]) < 0:
                return None
            if labels.shape[axis] > 1:
                shape = [labels.shape[a] for a in range(labels.dim())]
                ends = [
                    self.labels.fresh([n if a == axis else s for a, s in enumerate(shape)])
                    for n in (before, after)
                ]
                labels = torch.cat([ends[0], labels, ends[1]], axis)
        return (labels,)


def _number(value: Any) -> int:
    """A size as it was at the example inputs."""
    return int(value) if isinstance(value, int) else int(value.node.hint)


def _limits(node: Node) -> tuple[Any, Any]:
    """Ends of a clamp."""
    has: Mapping[str, Any] = node.attributes
    if node.op == "relu6":
        return 0, 6
    if node.op == "hardtanh":
        return has.get("min_val", -1), has.get("max_val", 1)
    return has.get("min"), has.get("max")


def _broadcast(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both at their common shape."""
    shape = torch.broadcast_shapes(first.shape, second.shape)  # type: ignore[no-untyped-call]
    return first.expand(shape), second.expand(shape)
