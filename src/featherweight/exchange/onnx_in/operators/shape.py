"""Operators that move elements and change shapes, and those that compute shapes."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError, check_size

_SECOND = frozenset({1})


def _shape(node: Node) -> Call:
    start, end = node.integer("start", 0), node.integer("end", 1 << 30)

    def run(x: Any) -> host.Host:
        return host.sizes(list(x.shape)[slice(start, end)])

    return Call(run, host=True)


def _size(_: Node) -> Call:
    return Call(lambda x: host.as_host(math.prod(x.shape)), host=True)


def _constant(node: Node) -> Call:
    for name, value in (
        ("value", node.tensor("value")),
        ("value_float", node.number("value_float", 0.0)),
        ("value_int", node.integer("value_int", 0)),
        ("value_floats", node.numbers("value_floats")),
        ("value_ints", node.integers("value_ints")),
    ):
        if name in node.attributes:
            floats = "float" in name
            array = np.asarray(value, None if name == "value" else np.float32 if floats else np.int64)
            return Call(partial(_held, array=array), inputs=())
    raise UnsupportedError("it holds no dense numbers")


def _held(array: np.ndarray) -> np.ndarray:
    return array


def _constant_of_shape(node: Node) -> Call:
    value = node.tensor("value")
    number = np.zeros(1, np.float32) if value is None else value.reshape(-1)
    if number.size != 1:
        raise UnsupportedError("its value is not one number")
    fill, dtype = host.tensor_of(number)[0].item(), host.torch_dtype(number.dtype)

    def run(shape: Any) -> Tensor:
        sizes = host.to_list(shape)
        check_size(sizes)
        return torch.full(sizes, fill, dtype=dtype)

    return Call(run, sizes=frozenset({0}))


def _range(node: Node) -> Call:
    dtype = node.tensor_dtype(0)

    def run(start: host.Host, limit: host.Host, step: host.Host) -> Tensor:
        first, last, by = (host.to_list(item)[0] for item in (start, limit, step))
        if isinstance(last, (int, float)) and by:
            check_size([max(math.ceil((last - first) / by), 0)])
        if dtype == torch.bfloat16:
            return torch.arange(float(first), float(last), float(by)).to(dtype)
        return torch.arange(first, last, by, dtype=dtype)

    return Call(run, inputs=(0, 1, 2), sizes=frozenset({0, 1, 2}))


def _reshape(node: Node) -> Call:
    return Call(
        partial(_reshape_to, allow_zero=bool(node.integer("allowzero", 0))), (0, 1), sizes=_SECOND, host=True
    )


def _reshape_to(x: Any, shape: host.Host, allow_zero: bool) -> Any:
    sizes = host.to_list(shape)
    if not allow_zero:
        sizes = [x.shape[i] if type(size) is int and size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(node: Node) -> Call:
    axis = node.integer("axis", 1)
    rank = node.rank()
    axis += rank if axis < 0 else 0
    if not 0 <= axis <= rank:
        raise UnsupportedError(f"axis {axis} is outside a rank of {rank}")
    return Call(partial(_flatten_at, axis=axis))


def _flatten_at(x: Tensor, axis: int) -> Tensor:
    if axis == 0:
        return x.reshape(1, -1)
    if axis == x.dim():
        return x.reshape(-1, 1)
    return torch.flatten(x, 1) if axis == 1 else x.flatten(0, axis - 1).flatten(1)


def axes_of(node: Node, index: int = 1) -> tuple[int, ...] | None:
    """Axes from the attribute (older opsets) or from a constant input; None when there are none."""
    if "axes" in node.attributes:
        return node.integers("axes")
    if not node.has(index):
        return None
    return tuple(int(axis) for axis in node.fixed(index, "axes").reshape(-1))


def _axes_at_run_time(node: Node, index: int = 1) -> bool:
    return "axes" not in node.attributes and node.has(index) and node.constant(index) is None


def _squeeze(node: Node) -> Call:
    if _axes_at_run_time(node):
        return Call(_squeezed, inputs=(0, 1), sizes=_SECOND)
    axes = axes_of(node)
    if axes is None:
        axes = tuple(axis for axis, size in enumerate(node.shape()) if size == 1)
    where = host.sizes([axis % max(node.rank(), 1) for axis in axes])
    return Call(lambda x: _squeezed(x, where), host=True)


def _squeezed(x: Any, axes: host.Host) -> Any:
    where = tuple(sorted(axis % x.ndim for axis in host.to_list(axes)))
    return np.squeeze(x, where) if isinstance(x, np.ndarray) else torch.squeeze(x, where)


def _unsqueeze(node: Node) -> Call:
    if _axes_at_run_time(node):
        return Call(_unsqueezed, inputs=(0, 1), sizes=_SECOND)
    axes = axes_of(node)
    if axes is None:
        raise UnsupportedError("it has no axes")
    where = host.sizes(list(axes))
    return Call(lambda x: _unsqueezed(x, where), host=True)


def _unsqueezed(x: Any, axes: host.Host) -> Any:
    given = host.to_list(axes)
    for axis in sorted(axis % (x.ndim + len(given)) for axis in given):
        x = np.expand_dims(x, axis) if isinstance(x, np.ndarray) else torch.unsqueeze(x, axis)
    return x


def _transpose(node: Node) -> Call:
    order = node.integers("perm") or tuple(reversed(range(node.rank())))
    if sorted(order) != list(range(node.rank())):
        raise UnsupportedError(f"its perm {order} does not fit a rank of {node.rank()}")
    return Call(partial(torch.permute, dims=order))


def _concat(node: Node) -> Call:
    axis = node.axis(1)

    def run(*items: Any) -> Any:
        if all(isinstance(item, np.ndarray) for item in items):
            return np.concatenate(items, axis)
        return torch.cat(items, axis) if len(items) > 1 else items[0]

    return Call(run, inputs=tuple(range(len(node.inputs))), host=True)


def _split(node: Node) -> Call:
    axis = node.axis(0)
    size, parts = node.shape()[axis], len(node.outputs)
    if node.has(1) and node.constant(1) is None:
        return Call(partial(_split_by, axis=axis), inputs=(0, 1), sizes=_SECOND)
    given = node.integers("split")
    if given is None and node.has(1):
        given = tuple(int(item) for item in node.fixed(1, "split").reshape(-1))
    if given is None:
        part = math.ceil(size / parts)  # num_outputs: the last one may be smaller
        given = (*[part] * (parts - 1), size - part * (parts - 1))
    if sum(given) != size or min(given) < 0 or len(given) != parts:
        raise UnsupportedError(f"its parts {given} do not make {size}")
    lengths = host.sizes(list(given))
    return Call(lambda x: _split_by(x, lengths, axis), host=True)


def _split_by(x: Any, parts: host.Host, axis: int) -> tuple[Any, ...]:
    lengths = host.to_list(parts)
    if isinstance(x, np.ndarray):
        return tuple(np.split(x, np.cumsum(lengths)[:-1], axis))
    return tuple(torch.split(x, lengths, axis))


def _expand(_: Node) -> Call:
    return Call(_expand_to, inputs=(0, 1), sizes=_SECOND)


def _expand_to(x: Tensor, shape: host.Host) -> Tensor:
    sizes = host.to_list(shape)
    wide = max(x.dim(), len(sizes))
    own, asked = [1] * (wide - x.dim()) + list(x.shape), [1] * (wide - len(sizes)) + sizes
    result = [
        mine if type(other) is int and other == 1 else other for mine, other in zip(own, asked, strict=True)
    ]
    check_size(result)
    return x.expand(result)


def _tile(_: Node) -> Call:
    return Call(_tile_by, inputs=(0, 1), sizes=_SECOND)


def _tile_by(x: Tensor, repeats: host.Host) -> Tensor:
    times = host.to_list(repeats)
    check_size([size * time for size, time in zip(x.shape, times, strict=True)])
    return x.repeat(times)


_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _pad(node: Node) -> Call:
    mode = _MODES.get(node.text("mode", "constant"))
    if mode is None:
        raise UnsupportedError(f"its mode is '{node.text('mode', '')}'")
    if node.opset < 11:
        amounts = node.integers("pads") or ()
        pads, number = host.sizes(list(amounts)), node.number("value", 0.0)
        return Call(lambda x: _pad_by(x, pads, number, None, mode=mode))
    run = partial(_pad_by, mode=mode)
    if not node.all_fixed(2):  # the value is computed while it runs
        return Call(run, inputs=(0, 1, 2, 3), sizes=frozenset({1, 3}))
    value = node.fixed(2, "value").reshape(-1)[0].item() if node.has(2) else 0.0
    return Call(lambda x, pads, axes: run(x, pads, value, axes), inputs=(0, 1, 3), sizes=frozenset({1, 3}))


def _pad_by(
    x: Tensor, pads: host.Host, value: float | Tensor, axes: host.Host | None, *, mode: str
) -> Tensor:
    amounts = host.to_list(pads)
    where = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in host.to_list(axes)]
    begins, ends = amounts[: len(where)], amounts[len(where) :]
    pairs = dict(zip(where, zip(begins, ends, strict=True), strict=True))
    first = min((axis for axis, pair in pairs.items() if _grows(pair)), default=x.dim())
    flat = [amount for axis in reversed(range(first, x.dim())) for amount in pairs.get(axis, (0, 0))]
    if not flat:
        return x
    grown = [size + sum(pairs.get(axis, (0, 0))) for axis, size in enumerate(x.shape)]
    check_size(grown)
    if mode == "constant":
        if isinstance(value, Tensor):
            inside = F.pad(torch.ones_like(x, dtype=torch.bool), flat)
            return torch.where(inside, F.pad(x, flat), value.to(x.dtype))
        if x.dtype == torch.bool:
            return F.pad(x.to(torch.uint8), flat, value=value).to(torch.bool)
        return F.pad(x, flat, value=value)
    if (
        x.is_floating_point()
        and x.dim() - first <= 3
        and all(type(item) is int and item >= 0 for item in flat)
    ):
        # torch wants exactly two axes in front of those that it pads
        turned = F.pad(x.reshape(1, -1, *x.shape[first:]), flat, mode=mode)
        return turned.reshape(*x.shape[:first], *grown[first:])
    for axis in range(first, x.dim()):
        x = _pad_axis(x, axis, pairs.get(axis, (0, 0)), mode)
    return x


def _grows(pair: tuple[Any, Any]) -> bool:
    return any(type(amount) is not int or amount for amount in pair)


def _pad_axis(x: Tensor, axis: int, pair: tuple[Any, Any], mode: str) -> Tensor:
    """One axis by the places that its elements come from; a negative pad cuts off."""
    size = x.shape[axis]
    places = torch.arange(-pair[0], size + pair[1])
    if mode == "replicate":
        places = places.clamp(0, size - 1)
    elif mode == "circular":
        places = torch.remainder(places, size)
    else:
        period = max(2 * (size - 1), 1)
        places = torch.remainder(places, period)
        places = torch.where(places >= size, period - places, places)
    return torch.index_select(x, axis, places)


def _depth_to_space(node: Node) -> Call:
    block = node.integer("blocksize", 1)
    columns = node.text("mode", "DCR") == "DCR"
    if node.rank() != 4 or block < 1:
        raise UnsupportedError("it works on (N, C, H, W) and a block of at least 1")
    return Call(partial(_to_space, block=block, depth_first=columns))


def _to_space(x: Tensor, block: int, depth_first: bool) -> Tensor:
    if not depth_first:
        return F.pixel_shuffle(x, block)
    channels = torch.arange(x.shape[1]).reshape(block**2, -1).t().reshape(-1)
    return F.pixel_shuffle(torch.index_select(x, 1, channels), block)


def _space_to_depth(node: Node) -> Call:
    block = node.integer("blocksize", 1)
    if node.text("mode", "DCR") != "DCR":
        return Call(partial(F.pixel_unshuffle, downscale_factor=block))
    return Call(partial(_to_depth, block=block))


def _to_depth(x: Tensor, block: int) -> Tensor:
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * block**2, h // block, w // block)


ENTRIES: dict[str, Entry] = {
    "Shape": _shape,
    "Size": _size,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "Identity": lambda _: Call(lambda x: x, host=True),
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
}
