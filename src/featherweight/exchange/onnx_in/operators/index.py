"""Operators that pick elements."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import (
    Call,
    Entry,
    Node,
    UnsupportedError,
    Weight,
    blank,
    check_size,
)
from featherweight.exchange.onnx_in.operators.casts import numpy_type

_SECOND = frozenset({1})


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
    axis, largest = node.axis(-1), bool(node.integer("largest", 1))
    dtype = node.tensor_dtype()
    run = partial(_top, axis=axis, largest=largest, dtype=dtype)
    if node.opset < 10:
        count = host.sizes([node.integer("k", 0)])
        return Call(lambda x: run(x, count))
    return Call(run, inputs=(0, 1), sizes=_SECOND)


def _top(x: Tensor, k: host.Host, axis: int, largest: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of equal values the first comes first, as in ONNX Runtime; torch.topk alone does not promise it."""
    count = host.to_list(k)[0]
    if dtype in (torch.uint16, torch.uint32, torch.uint64):
        found = _top(x.to(torch.int64), k, axis, largest, torch.int64)  # beyond 2**63: wrong order
        return found[0].to(dtype), found[1]
    if torch.compiler.is_exporting():
        return tuple(torch.topk(x, count, axis, largest, sorted=True))
    values, places = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


def _trilu(node: Node) -> Call:
    upper = bool(node.integer("upper", 1))
    if node.has(1) and node.constant(1) is None:
        return Call(partial(_trilu_at, upper=upper), inputs=(0, 1), sizes=_SECOND)
    offset = int(node.fixed(1, "k").item()) if node.has(1) else 0
    return Call(partial(torch.triu if upper else torch.tril, diagonal=offset))


def _trilu_at(x: Tensor, k: host.Host, upper: bool) -> Tensor:
    return (torch.triu if upper else torch.tril)(x, host.to_list(k)[0])


def _cumulative(function: Callable[..., Tensor], neutral: int) -> Entry:
    def entry(node: Node) -> Call:
        exclusive, backwards = bool(node.integer("exclusive", 0)), bool(node.integer("reverse", 0))
        dtype = node.tensor_dtype()

        def run(x: Tensor, axis: host.Host) -> Tensor:
            where = int(host.to_list(axis)[0]) % max(x.dim(), 1)
            x = torch.flip(x, (where,)) if backwards else x
            if exclusive:
                first = torch.full_like(x.narrow(where, 0, 1), neutral)
                x = torch.cat((first, x.narrow(where, 0, x.shape[where] - 1)), where)
            total = function(x, dim=where, dtype=dtype)
            return torch.flip(total, (where,)) if backwards else total

        return Call(run, inputs=(0, 1), sizes=_SECOND)

    return entry


def _one_hot(node: Node) -> Call:
    axis = node.integer("axis", -1) % (node.rank() + 1)

    def run(ids: Tensor, count: host.Host, values: Tensor) -> Tensor:
        depth = int(host.to_list(count)[0])
        check_size([*ids.shape, depth])
        wide = _wrapped(ids.to(torch.int64), depth).unsqueeze(-1)
        hit = (wide == torch.arange(depth)).movedim(-1, axis)
        return torch.where(hit, values[1], values[0])

    return Call(run, inputs=(0, 1, 2), sizes=_SECOND)


def _gather_nd(node: Node) -> Call:
    return Call(partial(_gather_nd_of, batch=node.integer("batch_dims", 0)), inputs=(0, 1))


def _gather_nd_of(x: Tensor, ids: Tensor, batch: int) -> Tensor:
    depth = ids.shape[-1]
    rows = [
        torch.arange(x.shape[axis]).reshape([-1 if other == axis else 1 for other in range(ids.dim() - 1)])
        for axis in range(batch)
    ]
    return x[(*rows, *(_wrapped(ids[..., axis], x.shape[batch + axis]) for axis in range(depth)))]


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter_elements(node: Node) -> Call:
    axis, how = node.axis(0), node.text("reduction", "none")
    if how not in ("none", *_REDUCE):
        raise UnsupportedError(f"its reduction is '{how}'")
    return Call(partial(_scattered, axis=axis, how=how), inputs=(0, 1, 2))


def _scattered(x: Tensor, ids: Tensor, updates: Tensor, axis: int, how: str) -> Tensor:
    places = _wrapped(ids, x.shape[axis]).to(torch.int64)
    if how == "none":
        return torch.scatter(x, axis, places, updates)
    return torch.scatter_reduce(x, axis, places, updates, _REDUCE[how])


def _scatter_nd(node: Node) -> Call:
    how = node.text("reduction", "none")
    if how not in ("none", *_REDUCE):
        raise UnsupportedError(f"its reduction is '{how}'")
    return Call(partial(_scattered_nd, how=how), inputs=(0, 1, 2))


def _scattered_nd(x: Tensor, ids: Tensor, updates: Tensor, how: str) -> Tensor:
    depth = ids.shape[-1]
    places = tuple(_wrapped(ids[..., axis], x.shape[axis]).to(torch.int64) for axis in range(depth))
    if how in ("none", "add"):
        return torch.index_put(x, places, updates, accumulate=how == "add")
    flat = torch.zeros_like(places[0])
    for axis in range(depth):
        flat = flat * x.shape[axis] + places[axis]
    rows = x.reshape(-1, *x.shape[depth:])
    added = updates.reshape(flat.numel(), *x.shape[depth:])
    where = flat.reshape(-1, *[1] * (added.dim() - 1)).expand_as(added)
    return torch.scatter_reduce(rows, 0, where, added, _REDUCE[how]).reshape(x.shape)


def _tensor_scatter(node: Node) -> Call:
    circular, axis = node.text("mode", "linear") == "circular", node.axis(-2)
    return Call(partial(_written, axis=axis, circular=circular), inputs=(0, 1, 2))


def _written(cache: Tensor, update: Tensor, starts: Tensor | None, axis: int, circular: bool) -> Tensor:
    """A cache with new entries along one axis, each example's from its own start."""
    first = torch.zeros(cache.shape[0], dtype=torch.int64) if starts is None else starts.to(torch.int64)
    places = first[:, None] + torch.arange(update.shape[axis])
    places = places % cache.shape[axis] if circular else places
    shape = [1] * update.dim()
    shape[0], shape[axis] = places.shape
    return torch.scatter(cache, axis, places.reshape(shape).expand_as(update), update)


def _non_zero(_: Node) -> Call:
    return Call(lambda x: torch.nonzero(x).t())


def _compress(node: Node) -> Call:
    axis = node.integer("axis", 0) if "axis" in node.attributes else None

    def run(x: Tensor, condition: Tensor) -> Tensor:
        flat, where = (x.reshape(-1), 0) if axis is None else (x, axis)
        return torch.index_select(flat, where, torch.nonzero(condition).reshape(-1))

    return Call(run, inputs=(0, 1))


def _reverse_sequence(node: Node) -> Call:
    time, batch = node.integer("time_axis", 0), node.integer("batch_axis", 1)

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        steps = torch.arange(x.shape[time])
        ends = lengths.to(torch.int64)[:, None]
        places = torch.where(steps < ends, ends - 1 - steps, steps)
        shape = [1] * x.dim()
        shape[batch], shape[time] = places.shape
        table = places if batch < time else places.t()
        return torch.gather(x, time, table.reshape(shape).expand_as(x))

    return Call(run, inputs=(0, 1))


def _eye_like(node: Node) -> Call:
    offset = node.integer("k", 0)
    kind = numpy_type(node.integer("dtype", 0)) if "dtype" in node.attributes else node.dtype()
    dtype = host.torch_dtype(kind)

    def run(x: Tensor) -> Tensor:
        rows, columns = (torch.arange(size) for size in x.shape)
        return (columns - rows[:, None] == offset).to(dtype)

    return Call(run)


ENTRIES: dict[str, Entry] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Slice": _slice,
    "TopK": _top_k,
    "Trilu": _trilu,
    "CumSum": _cumulative(torch.cumsum, 0),
    "CumProd": _cumulative(torch.cumprod, 1),
    "GatherND": _gather_nd,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TensorScatter": _tensor_scatter,
    "NonZero": _non_zero,
    "Compress": _compress,
    "ReverseSequence": _reverse_sequence,
    "EyeLike": _eye_like,
    "OneHot": _one_hot,
}
