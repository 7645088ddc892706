"""Layers that can become products of smaller ones: which they are, what each form costs, and the edit.

Forms, with ranks r and s, of a linear layer or a convolution of C to O channels with kernel k:

- ``product``: C -> r with the kernel, then r -> O without one (a linear layer: two linear layers),
- ``spatial``: C -> r with a vertical kernel, then r -> O with a horizontal one,
- ``tucker``: C -> r without a kernel, r -> s with it, s -> O without one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.graph import Graph, Node, trace
from featherweight.model import Layer, Model
from featherweight.tools.attributes import read_outside
from featherweight.tools.columns import is_product
from featherweight.tools.forms import Form, Way

_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_READ = frozenset(
    {"weight", "bias", "in_features", "out_features", "in_channels", "out_channels", "kernel_size"}
    | {"stride", "padding", "dilation", "groups"}
)


@dataclass(frozen=True)
class Work:
    """What a layer takes for one example.

    Attributes:
        parameters: Of its weights; biases are not counted, since no form changes them.
        macs: Multiply-accumulates of all calls.
        elements: Values that its parts read and make in all calls.
        parts: Calls of kernels.
    """

    parameters: int
    macs: int
    elements: int
    parts: int


@dataclass(frozen=True)
class Candidate:
    """A layer that can be taken apart.

    Attributes:
        path: Of the layer.
        weight: Name of its weight.
        entry: The entry that it is called in first, whose inputs count.
        calls: There, in order.
        shape: Of its weight.
        places: (input positions, output positions) of each call in all entries, for one example; axes.
    """

    path: str
    weight: str
    entry: str
    calls: tuple[Node, ...]
    shape: tuple[int, ...]
    places: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Taps along each axis; () of a linear layer."""
        return self.shape[2:]

    @property
    def ways(self) -> tuple[Way, ...]:
        """The forms that differ for this layer."""
        if math.prod(self.kernel) == 1:
            return ("product",)
        flat = len(self.kernel) != 2 or 1 in self.kernel
        return ("product", "tucker") if flat else ("product", "spatial", "tucker")

    def work(self, form: Form | None = None) -> Work:
        """What the layer takes, whole or in a form."""
        outputs, inputs = self.shape[:2]
        taps = math.prod(self.kernel)
        parts: list[tuple[int, int, int, Callable[[Any, Any], int], Callable[[Any, Any], int]]]
        if form is None:
            parts = [(inputs, outputs, taps, _before, _after)]
        elif form.way == "product":
            (r,) = form.ranks
            parts = [(inputs, r, taps, _before, _after), (r, outputs, 1, _after, _after)]
        elif form.way == "spatial":
            (r,) = form.ranks
            high, wide = self.kernel
            parts = [(inputs, r, high, _before, _between), (r, outputs, wide, _between, _after)]
        else:
            r, s = form.ranks
            parts = [(inputs, r, 1, _before, _before), (r, s, taps, _before, _after)]
            parts.append((s, outputs, 1, _after, _after))
        parameters = sum(i * o * t for i, o, t, _, _ in parts)
        macs = elements = 0
        for before, after, batch in self.places:
            for i, o, t, at_input, at_output in parts:
                made = at_output(before, after) // batch
                macs += made * i * o * t
                elements += at_input(before, after) // batch * i + made * o
        return Work(parameters, macs, elements, len(parts) * len(self.places))


def _before(before: Sequence[int], after: Sequence[int]) -> int:
    return math.prod(before)


def _after(before: Sequence[int], after: Sequence[int]) -> int:
    return math.prod(after)


def _between(before: Sequence[int], after: Sequence[int]) -> int:
    """Positions after the vertical kernel alone."""
    return math.prod(before[:-1]) // before[-2] * after[-2] * before[-1]


def candidates(model: Model, selects: Callable[[str, str], bool]) -> tuple[list[Candidate], dict[str, str]]:
    """Layers that can be taken apart, and why others of their kind cannot.

    Args:
        model: Without formats.
        selects: Whether a layer, by path and type, may be touched.

    Returns:
        In the order of calls; and layer -> reason.
    """
    graphs = {entry: trace(model, entry) for entry in model.entries}
    nodes = [(entry, graph, node) for entry, graph in graphs.items() for node in graph]
    reads = Counter(name for _, _, node in nodes for name in set(node.parameters.values()))
    calls = Counter(node.layer for _, _, node in nodes)
    layers = dict(model.module.named_modules(remove_duplicate=False))
    known = Counter(id(layer) for layer in layers.values())
    read = read_outside(model, (nn.Linear, *_CONVOLUTIONS), _READ)
    found: dict[str, Candidate] = {}
    refused: dict[str, str] = {}
    for entry, graph, node in nodes:
        layer, path = layers[node.layer], node.layer
        if not _is_kind(layer) or not path or not selects(path, type(layer).__name__):
            continue
        weight = node.parameters.get("weight", "")
        if path in found or path in refused:
            continue
        mine = [other for _, _, other in nodes if other.layer == path]
        reason = _reason(layer, node, mine, known[id(layer)], read.get(path))
        if reason is None and (weight != f"{path}.weight" or reads[weight] != calls[path]):
            reason = "its weight is tied to another layer's"
        if reason is not None:
            refused[path] = reason
            continue
        here = tuple(other for at, _, other in nodes if at == entry and other.layer == path)
        places = tuple(_places(graph, other) for _, graph, other in nodes if other.layer == path)
        shape = tuple(model.module.get_parameter(weight).shape)
        found[path] = Candidate(path, weight, entry, here, shape, places)
    return list(found.values()), refused


def _is_kind(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, *_CONVOLUTIONS))


def _reason(layer: nn.Module, node: Node, calls: Sequence[Node], names: int, read: str | None) -> str | None:
    """Why a layer cannot be taken apart; None: it can."""
    if type(layer) not in (nn.Linear, *_CONVOLUTIONS):
        return f"a {type(layer).__name__} is a kind of its own"
    if getattr(layer, "groups", 1) != 1:
        return "grouped filters read few channels already"
    plain = all(is_product(one) and "/" not in one.name for one in calls)
    if not plain or len(list(layer.buffers())) or len(dict(layer.named_parameters())) > 2:
        return "it does more than one product"
    if names > 1:
        return "it has several names in the module"
    if read is not None:
        return f"the module's code reads its '{read}'"
    return None


def _places(graph: Graph, node: Node) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Positions of what a call reads and makes, batch included, and the batch."""
    before, after = graph.values[node.inputs[0]].shape, graph.values[node.outputs[0]].shape
    if node.op == "linear":
        return before[:-1] or (1,), after[:-1] or (1,), max(graph.batch, 1)
    axes = len(after) - 2 if len(after) > len(node.attributes.get("stride", (1,))) + 1 else len(after) - 1
    batch = (before[0],) if len(after) == axes + 2 else (1,)
    return batch + before[-axes:], batch + after[-axes:], max(graph.batch, 1)


# ---- edits


def parts_of(layer: nn.Module, form: Form) -> Layer:
    """The layers that a form of a layer consists of, as data."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        (r,) = form.ranks
        first = {"in_features": layer.in_features, "out_features": r, "bias": False}
        second = {"in_features": r, "out_features": layer.out_features, "bias": bias}
        return Layer("Sequential", {}, (Layer("Linear", first), Layer("Linear", second)))
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    axes = len(layer.kernel_size)
    every = tuple(range(axes))
    if form.way == "product":
        steps = [(form.ranks[0], every), (layer.out_channels, ())]
    elif form.way == "spatial":
        steps = [(form.ranks[0], (0,)), (layer.out_channels, (1,))]
    else:
        steps = [(form.ranks[0], ()), (form.ranks[1], every), (layer.out_channels, ())]
    channels = layer.in_channels
    made: list[Layer] = []
    for outputs, own in steps:
        made.append(_convolution(layer, channels, outputs, own, bias and len(made) == len(steps) - 1))
        channels = outputs
    return Layer("Sequential", {}, tuple(made))


def _convolution(layer: nn.Module, inputs: int, outputs: int, own: Sequence[int], bias: bool) -> Layer:
    """A convolution along some axes of another one; it passes the other axes by."""
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    arguments: dict[str, Any] = {"in_channels": inputs, "out_channels": outputs}
    every = range(len(layer.kernel_size))
    for name, rest in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        value: Any = getattr(layer, name)
        if isinstance(value, str):
            arguments[name] = value
        else:
            arguments[name] = [int(value[axis]) if axis in own else rest for axis in every]
    arguments |= {"bias": bias, "padding_mode": layer.padding_mode}
    return Layer(type(layer).__name__, arguments)


def fill(layer: nn.Module, form: Form, factors: Sequence[Tensor], bias: Tensor | None) -> None:
    """Put factors into the layers that :func:`parts_of` describes."""
    assert isinstance(layer, nn.Sequential)
    with torch.no_grad():
        for part, factor in zip(layer, factors, strict=True):
            weight = part.get_parameter("weight")
            weight.copy_(factor.reshape(weight.shape))
        if bias is not None:
            layer[-1].get_parameter("bias").copy_(bias)
