"""Convolutions with a constant weight are layers; others are functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.exchange.onnx_in.node import (
    Call,
    Entry,
    Node,
    UnsupportedError,
    Weight,
    blank,
    by_rank,
    check_size,
)
from featherweight.exchange.onnx_in.operators.padding import Window, window_of

_CONV: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED: dict[int, type[nn.Module]] = {
    3: nn.ConvTranspose1d,
    4: nn.ConvTranspose2d,
    5: nn.ConvTranspose3d,
}
_TRANSPOSED_FUNCTION = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
_FUNCTION = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def _conv(node: Node) -> Call:
    shape, groups = node.shape(1), node.integer("group", 1)
    kind = by_rank(_CONV, len(shape))
    window = window_of(node, shape[2:])
    padding = window.padding() if window.symmetric else (0,) * len(window.kernel)
    before = None if window.symmetric else window.before()
    if not node.all_fixed(1, 2):
        function = partial(
            _FUNCTION[len(shape)],
            stride=window.strides,
            padding=padding,
            dilation=window.dilations,
            groups=groups,
        )
        return Call(function, inputs=(0, 1, 2), before=before)
    layer = blank(
        kind,
        shape[1] * groups,
        shape[0],
        window.kernel,
        window.strides,
        padding,
        window.dilations,
        groups,
        bias=node.has(2),
    )
    return Call(layer, weights=_weights(node), before=before)


def convolved(node: Node, x: int, weight: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The convolution that a node describes, of these inputs of it, as a function of tensors."""
    shape, groups = node.shape(weight), node.integer("group", 1)
    by_rank(_CONV, len(shape))
    window = window_of(node, shape[2:], x)
    before = window.before()

    def run(values: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        wide = values if before is None else before(values)
        strides, dilations = window.strides, window.dilations
        return _FUNCTION[len(shape)](wide, kernel, bias, strides, 0, dilations, groups)

    return run


def _conv_transpose(node: Node) -> Call:
    shape, groups = node.shape(1), node.integer("group", 1)
    kind = by_rank(_TRANSPOSED, len(shape))
    window = window_of(node, shape[2:])
    rank = len(window.kernel)
    extra = node.integers("output_padding") or (0,) * rank
    pads, extra = _transposed_pads(node, window, extra)
    symmetric = all(begin == end >= 0 for begin, end in pads)
    full = [
        (n - 1) * s + (k - 1) * d + 1
        for n, s, k, d in zip(node.shape()[2:], window.strides, window.kernel, window.dilations, strict=False)
    ]
    check_size([node.shape()[0], shape[1] * groups, *full])
    padding = tuple(begin for begin, _ in pads) if symmetric else (0,) * rank
    after = None if symmetric else partial(_crop, pads=pads)
    if not node.all_fixed(1, 2):
        function = partial(
            _TRANSPOSED_FUNCTION[len(shape)],
            stride=window.strides,
            padding=padding,
            output_padding=extra,
            groups=groups,
            dilation=window.dilations,
        )
        return Call(function, inputs=(0, 1, 2), after=after)
    layer = blank(
        kind,
        shape[0],
        shape[1] * groups,
        window.kernel,
        window.strides,
        padding,
        extra,
        groups,
        node.has(2),
        window.dilations,
    )
    return Call(layer, weights=_weights(node), after=after)


def _transposed_pads(
    node: Node, window: Window, extra: tuple[int, ...]
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """How much is cut off and added at the end: as given, or what auto_pad or output_shape ask for."""
    auto, wanted = node.text("auto_pad", "NOTSET"), node.integers("output_shape")
    if wanted is None and not auto.startswith("SAME"):
        return window.pads, extra
    sizes, rank = node.shape(0)[2:], len(window.kernel)
    found, added = [], []
    for axis, (k, s, d, e) in enumerate(
        zip(window.kernel, window.strides, window.dilations, extra, strict=True)
    ):
        full = (sizes[axis] - 1) * s + e + (k - 1) * d + 1
        target = sizes[axis] * s if wanted is None else wanted[axis - rank]
        total = max(full - target, 0)
        added.append(e + max(target - full, 0))
        half = total // 2
        found.append((half, total - half) if auto == "SAME_UPPER" else (total - half, half))
    if any(e >= max(s, d) for e, s, d in zip(added, window.strides, window.dilations, strict=True)):
        raise UnsupportedError("its output_shape is larger than what it computes")
    return tuple(found), tuple(added)


def _crop(x: Tensor, pads: tuple[tuple[int, int], ...]) -> Tensor:
    return F.pad(x, [-amount for pair in reversed(pads) for amount in pair])


def _weights(node: Node) -> tuple[Weight, ...]:
    weight = Weight("weight", 1)
    if not node.has(2):
        return (weight,)
    node.fixed(2, "bias")
    return weight, Weight("bias", 2)


ENTRIES: dict[str, Entry] = {"Conv": _conv, "ConvTranspose": _conv_transpose}
