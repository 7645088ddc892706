"""A layer as a matrix product: its weight as rows, its input as columns, per group of channels.

Linear layers, convolutions and transposed convolutions all make::

    y[g, r, n] = sum_k rows[g, r, k] * columns[g, n, k] + bias[g, r]

with k over what a filter reads (im2col) and n over examples and positions. A transposed convolution is the
convolution of the input with zeros put between its values, by the flipped kernel. What least squares needs
of the columns, their moments, is summed up batch by batch, so memory does not grow with the examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.graph import Node

_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_TRANSPOSED = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
_PIECE = 1 << 22  # elements of columns that are held at once, some 16 MB
_SIDE = 512  # of a block of a symmetric matrix


def is_product(node: Node) -> bool:
    """Whether a call is a product of its one input with its weight."""
    known = node.op == "linear" or node.op in _CONVOLUTIONS or node.op in _TRANSPOSED
    return known and "weight" in node.parameters and len(node.inputs) == 1


def groups_of(node: Node) -> int:
    """Groups of channels that do not see each other."""
    groups = node.attributes.get("groups", 1)
    return int(groups)


def to_rows(node: Node, weight: Tensor) -> Tensor:
    """A weight, or anything of its shape, as (groups, outputs / groups, K)."""
    groups = groups_of(node)
    if node.op in _TRANSPOSED:
        split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        return split.flip(tuple(range(3, split.dim()))).transpose(1, 2).flatten(2)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def from_rows(node: Node, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight of that shape whose rows these are."""
    if node.op not in _TRANSPOSED:
        return rows.reshape(tuple(shape))
    groups = groups_of(node)
    split = rows.reshape(groups, shape[1], shape[0] // groups, *shape[2:])
    return split.transpose(1, 2).flip(tuple(range(3, split.dim()))).reshape(tuple(shape))


def to_columns(node: Node, x: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """An input as (groups, examples x positions, K).

    Args:
        node: A call for which :func:`is_product` holds.
        x: What it reads.
        weight_shape: Of its weight.
    """
    places = _places(node, x, weight_shape)
    axes = axes_of(node)
    flat = places.reshape(-1, *places.shape[1 + axes :])
    return flat.reshape(len(flat), groups_of(node), -1).transpose(0, 1)


def pieces(
    node: Node, weight_shape: Sequence[int], *inputs: Tensor, share: float = 1.0, seed: int = 0
) -> Iterator[tuple[Tensor, ...]]:
    """The same columns of inputs of one shape, piece by piece.

    Args:
        node: A call for which :func:`is_product` holds.
        weight_shape: Of its weight.
        inputs: What it reads, e.g. in the float and in the stored network.
        share: So many of the columns, picked at random.
        seed: Of what is picked.
    """
    places = [_places(node, x, weight_shape) for x in inputs]
    shape = places[0].shape[: 1 + axes_of(node)]
    total, width = math.prod(shape), math.prod(places[0].shape[len(shape) :])
    picks = torch.arange(total)
    if share < 1:
        wanted = max(1, round(share * total))
        picks = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values
    for part in torch.split(picks, max(1, _PIECE // width)):
        at = torch.unravel_index(part, shape)
        yield tuple(one[at].reshape(len(part), groups_of(node), -1).transpose(0, 1) for one in places)


def positions_of(node: Node, x: Tensor, weight_shape: Sequence[int]) -> int:
    """How many columns an input makes."""
    return math.prod(_places(node, x, weight_shape).shape[: 1 + axes_of(node)])


def columns_at(node: Node, x: Tensor, weight_shape: Sequence[int], picks: Tensor) -> Tensor:
    """Some columns of an input, (groups, picks, K), by their numbers over examples and positions."""
    places = _places(node, x, weight_shape)
    at = torch.unravel_index(picks, places.shape[: 1 + axes_of(node)])
    return places[at].reshape(len(picks), groups_of(node), -1).transpose(0, 1)


def axes_of(node: Node) -> int:
    """Axes along which a filter moves."""
    return 0 if node.op == "linear" else _CONVOLUTIONS.get(node.op) or _TRANSPOSED[node.op]


def _places(node: Node, x: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """A view (N, *positions, C, *kernel) of what is read for each output."""
    if node.op == "linear":
        return x.reshape(-1, x.shape[-1])
    return _windows_of(node, x, weight_shape).movedim(1, 1 + axes_of(node))


def _windows_of(node: Node, x: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """A view (N, C, *positions, *kernel) of what a convolution's filters read at each position."""
    axes = axes_of(node)
    x = x[None] if x.dim() == axes + 1 else x
    kernel = list(weight_shape[-axes:])
    dilation = _each(node, "dilation", 1, axes)
    if node.op in _TRANSPOSED:
        wide = _stretched(node, x, kernel, _each(node, "stride", 1, axes), dilation)
        return _windows(wide, kernel, [1] * axes, dilation)
    padding = _padding(node, kernel, dilation)
    padded = nn.functional.pad(x, padding) if any(padding) else x
    return _windows(padded, kernel, _each(node, "stride", 1, axes), dilation)


def _each(node: Node, name: str, default: int, axes: int) -> list[int]:
    value = node.attributes.get(name, default)
    values = [int(item) for item in value] if isinstance(value, (list, tuple)) else [int(value)]
    return values * axes if len(values) == 1 else values


def _padding(node: Node, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Zeros before and after each axis, the last axis first."""
    how = node.attributes.get("padding", 0)
    if how == "valid":
        return [0] * 2 * len(kernel)
    if how == "same":
        wide = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in wide]
    else:
        pairs = [(size, size) for size in _each(node, "padding", 0, len(kernel))]
    return [end for pair in reversed(pairs) for end in pair]


def _stretched(
    node: Node, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The input of the convolution that a transposed one amounts to."""
    axes = len(kernel)
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    places: list[Any] = [slice(None), slice(None), *(slice(None, None, step) for step in stride)]
    wide[tuple(places)] = x
    padding, extra = _each(node, "padding", 0, axes), _each(node, "output_padding", 0, axes)
    ends: list[int] = []
    for axis in reversed(range(axes)):
        around = dilation[axis] * (kernel[axis] - 1) - padding[axis]
        ends += [around, around + extra[axis]]
    return nn.functional.pad(wide, ends)


def _windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """A view (N, C, *positions, *kernel) of what each position's filter reads."""
    x = x.contiguous()
    steps = x.stride()[2:]
    positions = [
        (size - space * (taps - 1) - 1) // step + 1
        for size, taps, step, space in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    jumps = [step * one for step, one in zip(stride, steps, strict=True)]
    gaps = [space * one for space, one in zip(dilation, steps, strict=True)]
    return x.as_strided(
        (*x.shape[:2], *positions, *kernel), (*x.stride()[:2], *jumps, *gaps), x.storage_offset()
    )


def add_square(total: Tensor, x: Tensor) -> None:
    """Add xᵀ x of columns (groups, n, K) to a matrix (groups, K, K), in blocks on its diagonal and above."""
    for start in range(0, x.shape[2], _SIDE):
        block = slice(start, start + _SIDE)
        total[:, block, start:] += x[..., block].mT @ x[..., start:]


def complete(total: Tensor) -> None:
    """Copy the blocks that :func:`add_square` leaves out from those that it made."""
    for start in range(0, total.shape[2], _SIDE):
        block, rest = slice(start, start + _SIDE), slice(start + _SIDE, None)
        total[:, rest, block] = total[:, block, rest].mT


@dataclass(frozen=True)
class Statistics:
    """Means and second moments of a layer's columns.

    Attributes:
        float_mean: Of the columns in the float network, (groups, K).
        mean: Of those in the stored network, (groups, K).
        second: E[x̂ x̂ᵀ] of the stored ones, less their means where centred; (groups, K, K).
        drift: E[(x - x̂) x̂ᵀ] of the difference between both, likewise.
        positions: How many columns were seen.
    """

    float_mean: Tensor
    mean: Tensor
    second: Tensor
    drift: Tensor
    positions: int


class Moments:
    """Sums over a stream of columns of the float and the stored network, in float64.

    Args:
        groups: Groups of channels.
        size: K, what a filter reads.
    """

    def __init__(self, groups: int, size: int) -> None:
        self.positions = 0
        self._origin: tuple[Tensor, Tensor] | None = None  # near the mean, so that little cancels
        self._sums = torch.zeros(2, groups, size, dtype=torch.float64)
        self._second = torch.zeros(groups, size, size, dtype=torch.float64)
        self._drift = torch.zeros(groups, size, size, dtype=torch.float64)

    def add(self, exact: Tensor, stored: Tensor) -> None:
        """Columns (groups, n, K) as float and as stored; one tensor where they agree."""
        if self._origin is None:
            self._origin = (exact - stored).mean(1, keepdim=True), stored.mean(1, keepdim=True)
        here = stored - self._origin[1]
        self._sums[1] += here.sum(1)
        add_square(self._second, here)
        if exact is not stored or self._origin[0].any():
            gap = (exact - stored).sub_(self._origin[0])
            self._sums[0] += gap.sum(1)
            self._drift += gap.mT @ here
        self.positions += here.shape[1]

    def statistics(self, centred: bool) -> Statistics:
        """What was seen, about the means or about zero."""
        if self._origin is None:
            raise ValueError("no columns were added")
        complete(self._second)
        gap, stored = self._sums / self.positions
        second = self._second / self.positions - stored[:, :, None] * stored[:, None]
        drift = self._drift / self.positions - gap[:, :, None] * stored[:, None]
        gap, stored = gap + self._origin[0][:, 0], stored + self._origin[1][:, 0]
        if not centred:
            second = second + stored[:, :, None] * stored[:, None]
            drift = drift + gap[:, :, None] * stored[:, None]
        return Statistics(stored + gap, stored, second, drift, self.positions)


def joined(one: Statistics, two: Statistics, centred: bool) -> Statistics:
    """The statistics of two streams together, about their common means where both are centred."""
    positions = one.positions + two.positions
    shares = one.positions / positions, two.positions / positions
    float_mean = shares[0] * one.float_mean + shares[1] * two.float_mean
    mean = shares[0] * one.mean + shares[1] * two.mean
    second, drift = torch.zeros_like(one.second), torch.zeros_like(one.drift)
    for share, part in zip(shares, (one, two), strict=True):
        second += share * part.second
        drift += share * part.drift
        if centred:
            away = part.mean - mean
            gap = part.float_mean - part.mean - (float_mean - mean)
            second += share * away[:, :, None] * away[:, None]
            drift += share * gap[:, :, None] * away[:, None]
    return Statistics(float_mean, mean, second, drift, positions)
