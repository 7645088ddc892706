"""Reductions; axes come as an attribute or, in newer opsets, as an input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import Call, Entry, Node
from featherweight.exchange.onnx_in.operators.shape import axes_of

_Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _reduction(
    function: _Reduction, on_host: Callable[[Any], Any] | None = None, empty: float | None = None
) -> Entry:
    """``empty``: the result over no elements, where torch refuses."""

    def entry(node: Node) -> Call:
        keep, idle = bool(node.integer("keepdims", 1)), bool(node.integer("noop_with_empty_axes", 0))
        rank = node.rank()

        def run(x: Any, given: Sequence[int] | None) -> Any:
            if not given and idle:
                return alone(x)
            if isinstance(x, np.ndarray) and on_host is not None:  # host numbers are rows
                total = host.as_host(on_host(x.reshape(-1).tolist()))
                return total.reshape((1,) * x.ndim) if keep else total
            where = tuple(sorted(axis % max(rank, 1) for axis in given)) if given else tuple(range(rank))
            if empty is not None and 0 in x.shape:
                return _of_nothing(x, where, keep, empty)
            return function(x, where, keep) if where else alone(x)

        def alone(x: Any) -> Any:
            """Over no axes: each element is a sum (a norm, a logarithm) of itself."""
            return x if isinstance(x, np.ndarray) else function(x[None], (0,), False)

        if "axes" not in node.attributes and node.has(1) and node.constant(1) is None:
            return Call(lambda x, axes: run(x, host.to_list(axes)), inputs=(0, 1), sizes=frozenset({1}))
        axes = axes_of(node)
        return Call(lambda x: run(x, axes), host=on_host is not None)

    return entry


def _of_nothing(x: Tensor, axes: tuple[int, ...], keep: bool, value: float) -> Tensor:
    sizes = [1 if axis in axes else size for axis, size in enumerate(x.shape) if keep or axis not in axes]
    if x.dtype == torch.bool:
        return torch.full(sizes, value > 0, dtype=x.dtype)
    limits = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
    number = value if x.is_floating_point() else limits.max if value > 0 else limits.min
    return torch.full(sizes, number, dtype=x.dtype)


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in reversed(axes):
        x = torch.prod(x, axis, keepdim=keep)
    return x


def _norm1(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sum(torch.abs(x), axes, keepdim=keep)


def _squares(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sum(x * x, axes, keepdim=keep)


def _norm2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sqrt(_squares(x, axes, keep))


def _log_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.log(torch.sum(x, axes, keepdim=keep))


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype)


def _position(function: Callable[..., Tensor]) -> Entry:
    def entry(node: Node) -> Call:
        axis, keep = node.axis(0), bool(node.integer("keepdims", 1))
        if node.integer("select_last_index", 0):
            return Call(partial(_last_position, function=function, axis=axis, keep=keep))
        return Call(partial(function, dim=axis, keepdim=keep))

    return entry


def _last_position(x: Tensor, function: Callable[..., Tensor], axis: int, keep: bool) -> Tensor:
    return x.shape[axis] - 1 - function(torch.flip(x, (axis,)), dim=axis, keepdim=keep)


ENTRIES: dict[str, Entry] = {
    "ReduceMean": _reduction(lambda x, axes, keep: torch.mean(x, axes, keepdim=keep)),
    "ReduceSum": _reduction(_sum, sum),
    "ReduceMax": _reduction(lambda x, axes, keep: torch.amax(x, axes, keepdim=keep), max, -math.inf),
    "ReduceMin": _reduction(lambda x, axes, keep: torch.amin(x, axes, keepdim=keep), min, math.inf),
    "ReduceProd": _reduction(_product, math.prod),
    "ReduceL1": _reduction(_norm1),
    "ReduceL2": _reduction(_norm2),
    "ReduceSumSquare": _reduction(_squares),
    "ReduceLogSum": _reduction(_log_sum),
    "ReduceLogSumExp": _reduction(lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep)),
    "ArgMax": _position(torch.argmax),
    "ArgMin": _position(torch.argmin),
}
