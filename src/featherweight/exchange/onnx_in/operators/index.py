"""Operators that pick elements."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError, Weight, blank


def _gather(node: Node) -> Call:
    axis, table = node.axis(0), node.constant(0)
    ids = node.constant(1)
    if table is not None and table.ndim == 2 and axis == 0 and table.dtype.kind == "f" and ids is None:
        return Call(blank(nn.Embedding, *table.shape), inputs=(1,), weights=(Weight("weight", 0),))
    if ids is not None:
        return Call(partial(_gather_fixed, ids=ids, axis=axis), inputs=(0,), host=True)
    return Call(partial(_gather_of, axis=axis), inputs=(0, 1))


def _wrapped(ids: Tensor, size: int) -> Tensor:
    """ONNX counts negative indices from the end."""
    return torch.where(ids < 0, ids + size, ids)


def _gather_fixed(x: Any, ids: np.ndarray, axis: int) -> Any:
    """Indices known at import: a select or a slice where they are one number or a row."""
    if isinstance(x, np.ndarray):
        return host.as_host(np.take(x, ids, axis))
    if ids.ndim == 0:
        return torch.select(x, axis, int(ids))
    flat = torch.from_numpy(np.where(ids < 0, ids + int(x.shape[axis]), ids).astype(np.int64)).reshape(-1)
    picked = torch.index_select(x, axis, flat)
    return picked.reshape(*x.shape[:axis], *ids.shape, *x.shape[axis + 1 :]) if ids.ndim != 1 else picked


def _gather_of(x: Tensor, ids: Tensor, axis: int) -> Tensor:
    flat = _wrapped(ids, x.shape[axis]).reshape(-1).to(torch.int64)
    return torch.index_select(x, axis, flat).reshape(*x.shape[:axis], *ids.shape, *x.shape[axis + 1 :])


def _gather_elements(node: Node) -> Call:
    axis = node.axis(0)
    return Call(lambda x, ids: torch.gather(x, axis, _wrapped(ids, x.shape[axis])), inputs=(0, 1))


def _slice(node: Node) -> Call:
    if node.opset < 10:
        starts, ends = node.integers("starts") or (), node.integers("ends") or ()
        axes = node.integers("axes") or tuple(range(len(starts)))
        fixed = (host.sizes(list(starts)), host.sizes(list(ends)), host.sizes(list(axes)), None)
        return Call(lambda x: _slice_by(x, *fixed), host=True)
    return Call(_slice_by, inputs=(0, 1, 2, 3, 4), sizes=frozenset({1, 2, 3, 4}), host=True)


def _slice_by(
    x: Any, starts: host.Host, ends: host.Host, axes: host.Host | None, steps: host.Host | None
) -> Any:
    first = host.to_list(starts)
    last = host.to_list(ends)
    where = list(range(len(first))) if axes is None else host.to_list(axes)
    by = [1] * len(first) if steps is None else host.to_list(steps)
    for start, end, axis, step in zip(first, last, where, by, strict=True):
        dim = int(axis) % x.ndim
        if isinstance(x, np.ndarray):
            x = x[(*[slice(None)] * dim, slice(start, _end(end, step), step))]
        elif step < 0:
            x = _backwards(x, dim, start, end, step)
        else:
            x = x[(*[slice(None)] * dim, slice(start, _end(end, step), step))]
    return x


_FAR = 1 << 31  # exporters write "to the end" as the largest integer, or nearly


def _end(end: Any, step: int) -> Any:
    if not isinstance(end, int):
        return end
    if step < 0:
        return None if end <= -_FAR + 1 else end
    return None if end >= _FAR - 1 else end


def _backwards(x: Tensor, dim: int, start: int, end: int, step: int) -> Tensor:
    """Slices with a negative step, which torch has not: flip, then step forward."""
    size = int(x.shape[dim])
    begin, stop, _ = slice(start, _end(end, step), step).indices(size)
    flipped = torch.flip(x, (dim,))
    return flipped[(*[slice(None)] * dim, slice(size - 1 - begin, size - 1 - stop, -step))]


def _top_k(node: Node) -> Call:
    count = node.integer("k", 0) if node.opset < 10 else int(node.fixed(1, "k").item())
    axis, largest = node.axis(-1), bool(node.integer("largest", 1))
    return Call(lambda x: tuple(torch.topk(x, count, axis, largest, sorted=True)))


def _trilu(node: Node) -> Call:
    offset = int(node.fixed(1, "k").item()) if node.has(1) else 0
    return Call(partial(torch.triu if node.integer("upper", 1) else torch.tril, diagonal=offset))


def _cumulative_sum(node: Node) -> Call:
    axis = int(node.fixed(1, "axis").item()) % max(node.rank(), 1)
    if node.integer("exclusive", 0) or node.integer("reverse", 0):
        raise UnsupportedError("it is exclusive or runs backwards")
    return Call(partial(torch.cumsum, dim=axis))


def _one_hot(node: Node) -> Call:
    depth = int(node.fixed(1, "depth").item())
    off, on = node.fixed(2, "values").reshape(-1)
    axis = node.integer("axis", -1) % (node.rank() + 1)
    dtype = torch.from_numpy(np.array(on)).dtype
    if depth < 1 or depth > 1 << 24:
        raise UnsupportedError(f"its depth is {depth}")

    def run(ids: Tensor) -> Tensor:
        hit = _wrapped(ids.to(torch.int64), depth).unsqueeze(-1) == torch.arange(depth)
        return torch.where(hit, on.item(), off.item()).to(dtype).movedim(-1, axis)

    return Call(run)


ENTRIES: dict[str, Entry] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Slice": _slice,
    "TopK": _top_k,
    "Trilu": _trilu,
    "CumSum": _cumulative_sum,
    "OneHot": _one_hot,
}
