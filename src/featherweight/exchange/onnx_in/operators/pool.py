"""Pools."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError, by_rank
from featherweight.exchange.onnx_in.operators.padding import Window, window_of

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
    if node.integer("storage_order", 0):
        raise UnsupportedError("its indices are in column order")
    small, ceil = _small(window), bool(node.integer("ceil_mode", 0))
    padding = window.padding() if small else 0
    layer = kind(window.kernel, window.strides, padding, window.dilations, False, ceil)
    return Call(layer, before=None if small else window.before(-math.inf))


def _average_pool(node: Node) -> Call:
    kind, window = by_rank(_AVERAGE, node.rank()), _window(node)
    if any(dilation != 1 for dilation in window.dilations):
        raise UnsupportedError("it is dilated")
    ceil, count_pads = bool(node.integer("ceil_mode", 0)), bool(node.integer("count_include_pad", 0))
    if _small(window):
        return Call(kind(window.kernel, window.strides, window.padding(), ceil, count_pads))
    layer = kind(window.kernel, window.strides, 0, ceil)
    if count_pads:
        return Call(layer, before=window.before())
    before = window.before()
    if before is None:
        return Call(layer)
    average = partial(
        _AVERAGE_OF[node.rank()], kernel_size=window.kernel, stride=window.strides, ceil_mode=ceil
    )
    return Call(partial(_average_of_inside, average=average, before=before))


def _average_of_inside(
    x: Tensor, average: Callable[[Tensor], Tensor], before: Callable[[Tensor], Tensor]
) -> Tensor:
    """The mean without the pad: of the values, over that of ones."""
    inside = torch.ones_like(x[:1, :1])
    return average(before(x)) / average(before(inside))


def _global_average(node: Node) -> Call:
    return Call(by_rank(_GLOBAL, node.rank())(1))


def _global_max(node: Node) -> Call:
    return Call(partial(torch.amax, dim=tuple(range(2, node.rank())), keepdim=True))


def _lp_pool(node: Node) -> Call:
    window, order = _window(node), float(node.integer("p", 2))
    if any(dilation != 1 for dilation in window.dilations):
        raise UnsupportedError("it is dilated")
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


ENTRIES: dict[str, Entry] = {
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_max,
    "LpPool": _lp_pool,
}
