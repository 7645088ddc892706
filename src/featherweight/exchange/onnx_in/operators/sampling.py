"""Operators that sample or fold images at places which are given or computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError, check_size
from featherweight.exchange.onnx_in.operators.padding import window_of

_MODES = {
    "bilinear": "bilinear",
    "linear": "bilinear",
    "nearest": "nearest",
    "bicubic": "bicubic",
    "cubic": "bicubic",
}


def _grid_sample(node: Node) -> Call:
    mode = _MODES.get(node.text("mode", "bilinear"))
    padding = node.text("padding_mode", "zeros")
    if mode is None or padding not in ("zeros", "border", "reflection"):
        raise UnsupportedError(f"its mode is '{node.text('mode', '')}' with '{padding}'")
    if node.rank() not in (4, 5) or (node.rank() == 5 and mode == "bicubic"):
        raise UnsupportedError(f"it is {mode} on {node.rank()} axes")
    corners = bool(node.integer("align_corners", 0))
    return Call(partial(F.grid_sample, mode=mode, padding_mode=padding, align_corners=corners), inputs=(0, 1))


def _affine_grid(node: Node) -> Call:
    corners = bool(node.integer("align_corners", 0))

    def run(theta: Tensor, size: host.Host) -> Tensor:
        sizes = host.to_list(size)
        check_size(sizes)
        return F.affine_grid(theta, sizes, align_corners=corners)

    return Call(run, inputs=(0, 1), sizes=frozenset({1}))


def _corners(
    images: Tensor, y: Tensor, x: Tensor, *, clamp: bool
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Four neighbours of fractional places and their weights: images (N, C, H, W), places (N, P)."""
    height, width = images.shape[2:]
    flat = images.flatten(2)
    if clamp:
        outside = (y < -1) | (y > height) | (x < -1) | (x > width)
        y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    else:
        outside = (y <= -1) | (y >= height) | (x <= -1) | (x >= width)
    top, left = torch.floor(y), torch.floor(x)
    # per side: the place held inside, whether it was inside, and its share; each is computed once, since the
    # exporter gives two clamps of one value the same name
    rows = [
        (side.clamp(0, height - 1), (side >= 0) & (side < height), share)
        for side, share in ((top, top + 1 - y), (top + 1, y - top))
    ]
    columns = [
        (side.clamp(0, width - 1), (side >= 0) & (side < width), share)
        for side, share in ((left, left + 1 - x), (left + 1, x - left))
    ]
    values, weights = [], []
    for row, in_rows, down in rows:
        for column, in_columns, along in columns:
            place = (row * width + column).to(torch.int64)
            values.append(torch.gather(flat, 2, place[:, None].expand(-1, flat.shape[1], -1)))
            weights.append(torch.where(in_rows & in_columns & ~outside, down * along, 0.0)[:, None])
    a, b, c, d = values
    e, f, g, h = weights
    return (a, b, c, d), (e, f, g, h)


def _roi_align(node: Node) -> Call:
    rows, columns = node.integer("output_height", 1), node.integer("output_width", 1)
    ratio, scale = node.integer("sampling_ratio", 0), node.number("spatial_scale", 1.0)
    older = node.opset < 16
    rule = "output_half_pixel" if older else node.text("coordinate_transformation_mode", "half_pixel")
    largest = node.text("mode", "avg") == "max"
    if ratio < 1:
        raise UnsupportedError("its regions decide how often it samples")
    check_size([node.shape(1)[0], node.shape()[1], rows, columns, max(ratio, 1) ** 2])

    def run(x: Tensor, regions: Tensor, batch: Tensor) -> Tensor:
        corners = regions * scale - (0.5 if rule == "half_pixel" else 0.0)
        size = corners[:, 2:] - corners[:, :2]
        if rule != "half_pixel":
            size = size.clamp(min=1.0)
        images = torch.index_select(x, 0, batch.to(torch.int64))
        count = images.shape[0]
        down = (torch.arange(rows * ratio) + 0.5) / (rows * ratio)
        along = (torch.arange(columns * ratio) + 0.5) / (columns * ratio)
        y = (corners[:, 1:2] + size[:, 1:2] * down)[:, :, None].expand(-1, -1, columns * ratio)
        x_ = (corners[:, :1] + size[:, :1] * along)[:, None, :].expand(-1, rows * ratio, -1)
        values, weights = _corners(images, y.reshape(count, -1), x_.reshape(count, -1), clamp=True)
        shape = (count, images.shape[1], rows, ratio, columns, ratio)
        terms = [(value * weight).reshape(shape) for value, weight in zip(values, weights, strict=True)]
        if largest:  # of the weighted neighbours, as ONNX Runtime does
            return torch.stack(terms).amax((0, 4, 6))
        return (terms[0] + terms[1] + terms[2] + terms[3]).mean((3, 5))

    return Call(run, inputs=(0, 1, 2))


def _deform_conv(node: Node) -> Call:
    """Dai et al. 2017, arXiv:1703.06211; with a mask: Zhu et al. 2018, arXiv:1811.11168."""
    shape = node.shape(1)
    if len(shape) != 4:
        raise UnsupportedError("it works on four axes")
    window = window_of(node, shape[2:])
    groups, parts = node.integer("group", 1), node.integer("offset_group", 1)
    (top, bottom), (left, right) = window.pads
    kernel_rows, kernel_columns = window.kernel

    def run(x: Tensor, weight: Tensor, offset: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        count, channels = x.shape[:2]
        rows, columns = offset.shape[2:]
        cells = kernel_rows * kernel_columns
        moved = offset.reshape(count * parts, cells, 2, rows, columns)
        base_y = torch.arange(rows)[:, None] * window.strides[0] - top
        base_x = torch.arange(columns) * window.strides[1] - left
        step_y = torch.arange(kernel_rows).repeat_interleave(kernel_columns) * window.dilations[0]
        step_x = torch.arange(kernel_columns).repeat(kernel_rows) * window.dilations[1]
        y = (moved[:, :, 0] + step_y[:, None, None] + base_y).reshape(count * parts, -1)
        x_ = (moved[:, :, 1] + step_x[:, None, None] + base_x).reshape(count * parts, -1)
        images = x.reshape(count * parts, channels // parts, *x.shape[2:])
        values, weights = _corners(images, y, x_, clamp=False)
        sampled = sum(v * w for v, w in zip(values[1:], weights[1:], strict=True)) + values[0] * weights[0]
        sampled = sampled.reshape(count, parts, channels // parts, cells, rows, columns)
        if mask is not None:
            sampled = sampled * mask.reshape(count, parts, 1, cells, rows, columns)
        flat = sampled.reshape(count, groups, channels // groups * cells, rows * columns)
        kernels = weight.reshape(groups, weight.shape[0] // groups, -1)
        result = torch.matmul(kernels, flat).reshape(count, weight.shape[0], rows, columns)
        return result if bias is None else result + bias.reshape(-1, 1, 1)

    del bottom, right
    return Call(run, inputs=(0, 1, 2, 3, 4))


def _col2im(node: Node) -> Call:
    rank = node.shape(1)[0]
    strides, dilations = (node.integers(name) or (1,) * rank for name in ("strides", "dilations"))
    flat = node.integers("pads") or (0,) * (2 * rank)
    begins, ends = flat[:rank], flat[rank:]

    def run(x: Tensor, image: host.Host, block: host.Host) -> Tensor:
        sizes, kernel = host.to_list(image), host.to_list(block)
        if rank == 2 and begins == ends:
            return F.fold(x, tuple(sizes), tuple(kernel), dilations, begins, strides)
        return _folded(x, sizes, kernel)

    def _folded(x: Tensor, sizes: Sequence[Any], kernel: Sequence[Any]) -> Tensor:
        wide = [size + begin + end for size, begin, end in zip(sizes, begins, ends, strict=True)]
        check_size([x.shape[0], x.shape[1], *wide])
        steps = [
            (size - (k - 1) * d - 1) // s + 1
            for size, k, s, d in zip(wide, kernel, strides, dilations, strict=True)
        ]
        place = torch.zeros([*kernel, *steps], dtype=torch.int64)
        for axis in range(rank):
            inner = torch.arange(kernel[axis]) * dilations[axis]
            outer = torch.arange(steps[axis]) * strides[axis]
            ones = [1] * (2 * rank)
            ones[axis], ones[rank + axis] = kernel[axis], steps[axis]
            place = place * wide[axis] + (inner[:, None] + outer).reshape(ones)
        channels = x.shape[1] // math.prod(kernel)
        rows = x.reshape(x.shape[0], channels, -1)
        total = x.new_zeros(x.shape[0], channels, math.prod(wide)).index_add(2, place.reshape(-1), rows)
        result = total.reshape(x.shape[0], channels, *wide)
        for axis, (begin, size) in enumerate(zip(begins, sizes, strict=True), 2):
            result = result.narrow(axis, begin, size)
        return result

    return Call(run, inputs=(0, 1, 2), sizes=frozenset({1, 2}))


def _center_crop_pad(node: Node) -> Call:
    axes = node.integers("axes")

    def run(x: Tensor, shape: host.Host) -> Tensor:
        wanted = host.to_list(shape)
        where = range(x.dim()) if axes is None else axes
        pads = [(0, 0)] * x.dim()
        for axis, size in zip(where, wanted, strict=True):
            more = size - x.shape[axis]  # below zero: cut off, more of it at the end
            begin = more // 2 if more >= 0 else -(-more // 2)
            pads[axis % x.dim()] = (begin, more - begin)
        return F.pad(x, [amount for pair in reversed(pads) for amount in pair])

    return Call(run, inputs=(0, 1), sizes=frozenset({1}))


ENTRIES: dict[str, Entry] = {
    "GridSample": _grid_sample,
    "AffineGrid": _affine_grid,
    "RoiAlign": _roi_align,
    "DeformConv": _deform_conv,
    "Col2Im": _col2im,
    "CenterCropPad": _center_crop_pad,
}
