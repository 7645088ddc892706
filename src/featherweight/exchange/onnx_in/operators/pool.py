"""Pools."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError, by_rank, check_size
from featherweight.exchange.onnx_in.operators.padding import Window, pad_spatial, window_of

_MAX: dict[int, type[nn.Module]] = {3: nn.MaxPool1d, 4: nn.MaxPool2d, 5: nn.MaxPool3d}
_AVERAGE: dict[int, type[nn.Module]] = {3: nn.AvgPool1d, 4: nn.AvgPool2d, 5: nn.AvgPool3d}
_GLOBAL: dict[int, type[nn.Module]] = {
    3: nn.AdaptiveAvgPool1d,
    4: nn.AdaptiveAvgPool2d,
    5: nn.AdaptiveAvgPool3d,
}
_AVERAGE_OF = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}


def _window(node: Node) -> Window:
    kernel = node.integers("kernel_shape")
    if kernel is None or len(kernel) != node.rank() - 2:
        raise UnsupportedError("its kernel_shape does not fit its input")
    return window_of(node, kernel)


def _small(window: Window) -> bool:
    """Pads that torch's pools take: symmetric and at most half of the kernel."""
    return window.symmetric and all(
        0 <= begin <= k // 2 for k, (begin, _) in zip(window.kernel, window.pads, strict=True)
    )


def _max_pool(node: Node) -> Call:
    kind, window = by_rank(_MAX, node.rank()), _window(node)
    small, ceil = _small(window), bool(node.integer("ceil_mode", 0))
    padding = window.padding() if small else 0
    if len(node.outputs) > 1 and node.outputs[1]:
        if not small:
            raise UnsupportedError("it gives indices behind pads that are wider than half its kernel")
        layer = kind(window.kernel, window.strides, padding, window.dilations, True, ceil)
        return Call(partial(_with_places, pool=layer, columns=bool(node.integer("storage_order", 0))))
    layer = kind(window.kernel, window.strides, padding, window.dilations, False, ceil)
    if ceil and not small:
        return Call(partial(_within, pool=layer, window=window, before=window.before(-math.inf)))
    return Call(layer, before=None if small else window.before(-math.inf))


def _with_places(x: Tensor, pool: nn.Module, columns: bool) -> tuple[Tensor, Tensor]:
    """Maxima and where they are in the whole tensor; torch counts within each channel."""
    values, places = pool(x)
    size = math.prod(x.shape[2:])
    if columns:  # the first spatial axis runs fastest
        parts, rest = [], places
        for length in reversed(x.shape[2:]):
            parts.append(rest % length)
            rest = rest // length
        places = torch.zeros_like(places)
        for part, length in zip(parts, reversed(x.shape[2:]), strict=True):
            places = places * length + part
    first = torch.arange(x.shape[0] * x.shape[1]) * size
    return values, places + first.reshape(x.shape[0], x.shape[1], *[1] * (x.dim() - 2))


def _max_unpool(node: Node) -> Call:
    kernel = node.integers("kernel_shape") or ()
    strides = node.integers("strides") or (1,) * len(kernel)
    pads = node.integers("pads") or (0,) * (2 * len(kernel))

    def run(x: Tensor, places: Tensor, shape: host.Host | None) -> Tensor:
        inner = [
            (size - 1) * s + k - begin - end
            for size, s, k, begin, end in zip(
                x.shape[2:], strides, kernel, pads[: len(kernel)], pads[len(kernel) :], strict=True
            )
        ]
        sizes = [*x.shape[:2], *inner] if shape is None else host.to_list(shape)
        check_size(sizes)
        # places count in the tensor without padding, also where output_shape asks for a larger one
        small = torch.zeros(math.prod([*x.shape[:2], *inner])).to(x.dtype)
        full = small.scatter(0, places.reshape(-1), x.reshape(-1)).reshape(*x.shape[:2], *inner)
        grow = [
            size
            for old, new in zip(reversed(inner), reversed(sizes[2:]), strict=True)
            for size in (0, new - old)
        ]
        return F.pad(full, grow)

    return Call(run, inputs=(0, 1, 2), sizes=frozenset({2}))


def _average_pool(node: Node) -> Call:
    kind, window = by_rank(_AVERAGE, node.rank()), _window(node)
    ceil, count_pads = bool(node.integer("ceil_mode", 0)), bool(node.integer("count_include_pad", 0))
    if any(dilation != 1 for dilation in window.dilations):
        mean = partial(_dilated_mean, window=window, ceil=ceil, count_pads=count_pads)
        return Call(partial(_within, pool=mean, window=window, before=None) if ceil else mean)
    if _small(window):
        return Call(kind(window.kernel, window.strides, window.padding(), ceil, count_pads))
    layer = kind(window.kernel, window.strides, 0, ceil)
    before = window.before()
    if count_pads or before is None:
        if ceil and before is not None:
            return Call(partial(_within, pool=layer, window=window, before=before))
        return Call(layer, before=before)
    average = partial(
        _AVERAGE_OF[node.rank()], kernel_size=window.kernel, stride=window.strides, ceil_mode=ceil
    )
    inside = partial(_average_of_inside, average=average, before=before)
    return Call(partial(_within, pool=inside, window=window, before=None) if ceil else inside)


def _within(
    x: Tensor,
    pool: Callable[[Tensor], Tensor],
    window: Window,
    before: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Without the windows of ceil_mode that begin behind the input; torch keeps them unless it pads."""
    result = pool(x if before is None else before(x))
    if window.same:
        return result
    for axis, (s, (begin, _)) in enumerate(zip(window.strides, window.pads, strict=True), 2):
        size = result.shape[axis]
        if (size - 1) * s >= x.shape[axis] + begin:
            result = result.narrow(axis, 0, size - 1)
    return result


def _average_of_inside(
    x: Tensor, average: Callable[[Tensor], Tensor], before: Callable[[Tensor], Tensor]
) -> Tensor:
    """The mean without the pad: of the values, over that of ones."""
    inside = torch.ones_like(x[:1, :1])
    return average(before(x)) / average(before(inside))


_CONV_OF = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def _window_sum(x: Tensor, window: Window, ceil: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Sums over dilated windows (a convolution with ones), and the same function for masks."""
    rank = len(window.kernel)
    before = window.before()
    padded = x if before is None else before(x)
    extra = []
    for size, k, s, d in zip(padded.shape[2:], window.kernel, window.strides, window.dilations, strict=True):
        over = (size - (k - 1) * d - 1) % s
        extra.append((0, s - over if ceil and over else 0))

    def total(values: Tensor) -> Tensor:
        ones = torch.ones(values.shape[1], 1, *window.kernel, dtype=values.dtype)
        return _CONV_OF[rank + 2](
            pad_spatial(values, extra), ones, None, window.strides, 0, window.dilations, values.shape[1]
        )

    return total(padded), total


def _dilated_mean(x: Tensor, window: Window, ceil: bool, count_pads: bool) -> Tensor:
    sums, total = _window_sum(x, window, ceil)
    inside, before = torch.ones_like(x[:1, :1]), window.before()
    if before is not None:
        inside = torch.ones_like(before(inside)) if count_pads else before(inside)
    return sums / total(inside)


def _global_average(node: Node) -> Call:
    return Call(by_rank(_GLOBAL, node.rank())(1))


def _global_max(node: Node) -> Call:
    return Call(partial(torch.amax, dim=tuple(range(2, node.rank())), keepdim=True))


def _lp_pool(node: Node) -> Call:
    window, order = _window(node), float(node.integer("p", 2))
    if any(dilation != 1 for dilation in window.dilations):
        ceil = bool(node.integer("ceil_mode", 0))
        return Call(lambda x: _window_sum(x.abs() ** order, window, ceil)[0] ** (1 / order))
    size = math.prod(window.kernel)
    average = partial(
        _AVERAGE_OF[node.rank()],
        kernel_size=window.kernel,
        stride=window.strides,
        ceil_mode=bool(node.integer("ceil_mode", 0)),
    )
    return Call(partial(_power_mean, average=average, order=order, size=size), before=window.before())


def _power_mean(x: Tensor, average: Callable[[Tensor], Tensor], order: float, size: int) -> Tensor:
    return (average(x.abs() ** order) * size) ** (1 / order)


def _global_lp(node: Node) -> Call:
    order, axes = float(node.integer("p", 2)), tuple(range(2, node.rank()))
    return Call(lambda x: (x.abs() ** order).sum(axes, keepdim=True) ** (1 / order))


ENTRIES: dict[str, Entry] = {
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_max,
    "LpPool": _lp_pool,
    "GlobalLpPool": _global_lp,
    "MaxUnpool": _max_unpool,
}
