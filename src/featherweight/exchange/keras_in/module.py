"""What a Keras file becomes: ordinary layers under their Keras names, and a list of steps that calls them.

Values are numbered. A step calls a layer or one of the functions below; its settings are plain data, so the
module can be copied, hashed and exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Step(NamedTuple):
    """One call.

    Attributes:
        layer: Path of the layer; '' for a function.
        function: Name in ``FUNCTIONS``; '' for a layer.
        inputs: Numbers of the values that it takes.
        outputs: Numbers of the values that it makes.
        settings: Of a function.
    """

    layer: str
    function: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    settings: dict[str, Any]


class KerasModel(nn.Module):
    """The imported network. Inputs and outputs look as they did in Keras: channels last."""

    steps: list[Step]
    results: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.steps = []
        self.results = []

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        values: dict[int, Tensor] = dict(enumerate(inputs))
        for step in self.steps:
            given = [values[number] for number in step.inputs]
            if step.layer:
                made = self.get_submodule(step.layer)(*given)
            else:
                made = FUNCTIONS[step.function](*given, **step.settings)
            flat = [made] if isinstance(made, Tensor) else _flat(made)
            values.update(zip(step.outputs, flat, strict=False))
        found = tuple(values[number] for number in self.results)
        return found[0] if len(found) == 1 else found


def _flat(made: Any) -> list[Tensor]:
    """Tensors of nested tuples in order: ``nn.LSTM`` gives (states, (h, c))."""
    return [made] if isinstance(made, Tensor) else [item for part in made for item in _flat(part)]


class Affine(nn.Module):
    """x * scale + offset with fixed numbers: Rescaling and Normalization."""

    scale: Tensor
    offset: Tensor

    def __init__(self, scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset


class Scale(nn.Module):
    """x * weight, channel by channel."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Attention(nn.Module):
    """Multi-head attention with linear layers for query, key, value and output; (N, T, width)."""

    def __init__(
        self, query: nn.Linear, key: nn.Linear, value: nn.Linear, output: nn.Linear, heads: int
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = query, key, value, output
        self.heads = heads
        self.causal = False

    def forward(self, query: Tensor, value: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        if mask is not None:
            mask = mask.to(torch.bool)
            mask = mask[:, None] if mask.dim() == 3 else mask
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        result: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return result


class Einsum(nn.Module):
    """A product with a weight as an equation says, and a bias."""

    def __init__(self, equation: str, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.equation = equation
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum(self.equation, x, self.weight)
        return y if self.bias is None else y + self.bias


# ---- functions of steps


def _pad(x: Tensor, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> Tensor:
    return F.pad(x, list(pads), mode) if mode != "constant" else F.pad(x, list(pads), value=value)


def _same(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], mode: str
) -> Tensor:
    """'same' padding for sizes that are known when it runs; the odd element goes to the end."""
    pads: list[Any] = []
    for size, k, s, d in reversed(list(zip(x.shape[2:], kernel, stride, dilation, strict=True))):
        total = torch.sym_max(
            0,  # type: ignore[no-untyped-call]
            ((size + s - 1) // s - 1) * s + (k - 1) * d + 1 - size,
        )
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, mode)


def _crop(x: Tensor, crops: Sequence[Sequence[int]], first: int) -> Tensor:
    """Cut (left, right) off each axis from ``first`` on; a negative number adds zeros."""
    for axis, (left, right) in enumerate(crops, first):
        x = x.narrow(axis, max(left, 0), x.shape[axis] - max(left, 0) - max(right, 0))
    grown = [max(-n, 0) for pair in reversed(list(crops)) for n in pair]
    return F.pad(x, grown) if any(grown) else x


def _reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.reshape(x.shape[0], *shape)


def _binary(*tensors: Tensor, op: str, other: float | None = None, swapped: bool = False) -> Tensor:
    one: Any = tensors[0]
    two: Any = tensors[1] if len(tensors) > 1 else other
    if swapped:
        one, two = two, one
    return _BINARY[op](one, two)


def _maximum(a: Any, b: Any) -> Tensor:
    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))


def _minimum(a: Any, b: Any) -> Tensor:
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))


_BINARY: Mapping[str, Callable[[Any, Any], Tensor]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "power": lambda a, b: a**b,
    "maximum": _maximum,
    "minimum": _minimum,
}


def _merge(*tensors: Tensor, op: str) -> Tensor:
    result = tensors[0]
    for other in tensors[1:]:
        result = _BINARY[op](result, other)
    return result


def _average(*tensors: Tensor) -> Tensor:
    return _merge(*tensors, op="add") / len(tensors)


def _concatenate(*tensors: Tensor, axis: int) -> Tensor:
    return torch.cat(tensors, axis)


def _reduce(x: Tensor, op: str, axes: Sequence[int], keepdims: bool) -> Tensor:
    over = list(axes) or list(range(x.dim()))
    if op == "mean":
        return x.mean(over, keepdim=keepdims)
    if op == "sum":
        return x.sum(over, keepdim=keepdims)
    return x.amax(over, keepdim=keepdims) if op == "max" else x.amin(over, keepdim=keepdims)


def _index(x: Tensor, items: Sequence[Any]) -> Tensor:
    """x[items]: numbers, None, and (start, stop, step) for slices."""
    return x[tuple(slice(*item) if isinstance(item, (list, tuple)) else item for item in items)]


def _relu(x: Tensor, slope: float, threshold: float, ceiling: float | None) -> Tensor:
    """Keras' ReLU with all its settings."""
    kept = x if ceiling is None else x.clamp(max=ceiling)
    return torch.where(x >= threshold, kept, slope * (x - threshold))


def _dot(a: Tensor, b: Tensor, axes: Sequence[int], normalize: bool) -> Tensor:
    """Sum of products over one axis of each."""
    one, two = (x.movedim(axis, -1) for x, axis in zip((a, b), axes, strict=True))
    if normalize:
        one, two = F.normalize(one, dim=-1), F.normalize(two, dim=-1)
    if one.dim() == 2 and two.dim() == 2:
        return (one * two).sum(-1, keepdim=True)
    found = (
        one.flatten(1, -2).bmm(two.flatten(1, -2).transpose(1, 2))
        if one.dim() > 2 and two.dim() > 2
        else None
    )
    if found is None:
        raise ValueError("a dot product of different ranks")
    return found.reshape(a.shape[0], *one.shape[1:-1], *two.shape[1:-1])


def _fold_time(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _unfold_time(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(like.shape[0], -1, *x.shape[1:])


def _resize(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    return F.interpolate(x, list(size), mode=mode, align_corners=None if mode == "nearest" else False)


def _repeat(x: Tensor, count: int) -> Tensor:
    return x[:, None].expand(-1, count, *x.shape[1:])


def _squareplus(x: Tensor, b: float = 4.0) -> Tensor:
    return (x + (x * x + b).sqrt()) / 2


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "permute": lambda x, dims: x.permute(dims),
    "pad": _pad,
    "same": _same,
    "crop": _crop,
    "reshape": _reshape,
    "flatten": lambda x: x.flatten(1),
    "flatten_from": lambda x, axis: x.flatten(axis),
    "binary": _binary,
    "merge": _merge,
    "average": _average,
    "concatenate": _concatenate,
    "reduce": _reduce,
    "index": _index,
    "relu": _relu,
    "dot": _dot,
    "fold_time": _fold_time,
    "unfold_time": _unfold_time,
    "resize": _resize,
    "repeat": _repeat,
    "flip": lambda x, axis: x.flip(axis),
    "step": lambda x, axis, at: x.select(axis, at),
    "unsqueeze": lambda x, axis: x.unsqueeze(axis),
    "stack_states": lambda *x: torch.stack(x),
    "float": lambda x: x.float(),
    "long": lambda x: x.long(),
    "cast": lambda x, dtype: x.to(getattr(torch, dtype)),
    "normalize": lambda x, axis: F.normalize(x, dim=axis),
    "matmul": lambda a, b: a @ b,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "square": torch.square,
    "abs": torch.abs,
    "negative": torch.neg,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "clip": lambda x, low, high: x.clamp(low, high),
    "squareplus": _squareplus,
    "log2": lambda x: torch.log(x) / math.log(2),
}
