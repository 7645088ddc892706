"""What shares a scale, and the grid of evenly spaced values that a range makes.

A grid is the integers ``smallest`` to ``largest``, of which ``zero_point`` stands for zero::

    scale = (high - low) / (largest - smallest)        zero_point = round(smallest - low / scale)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_BITS = 32  # of a stored scale
_SMALLEST_RANGE = 1e-8  # an empty or constant channel still needs a scale above zero


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale per index of ``axis`` (0 is the output channel of conv and linear weights)."""

    axis: int = 0


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of ``size`` elements along ``axis`` (0 or 1), for each index of the other.

    A tensor of more than two axes is read as a matrix: the axes behind the second belong to ``axis``. A
    convolution's kernel (out, in, height, width) with axis 1 is ``out`` rows of in * height * width
    elements. The last group of a row is shorter where ``size`` does not divide it.
    """

    axis: int = 1
    size: int = 32

    def groups(self, elements: int) -> int:
        """How many groups so many elements of a row make."""
        return -(-elements // self.size)

    def rows(self, x: Tensor) -> Tensor:
        """The tensor as a matrix (rows, elements) along whose rows the groups lie."""
        return x.movedim(1 - self.axis, 0).flatten(1)

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        """One value per group as one per element of ``x``."""
        moved = x.movedim(1 - self.axis, 0)
        rows = values.movedim(1 - self.axis, 0).repeat_interleave(self.size, 1)
        elements = moved[:1].numel() if len(moved) else 0
        return rows.narrow(1, 0, elements).reshape(moved.shape).movedim(0, 1 - self.axis)


Granularity = PerTensor | PerChannel | PerGroup
DIMENSIONS: Mapping[type, int] = {PerTensor: 0, PerChannel: 1, PerGroup: 2}  # of a tensor of scales


def check_shape(values: Tensor, granularity: Granularity, what: str) -> None:
    """Raise ValueError unless scales, or ends of ranges, have an axis for each that does not share them."""
    if values.dim() != DIMENSIONS[type(granularity)]:
        raise ValueError(f"a {what} of shape {tuple(values.shape)} does not fit {granularity}")


def per_element(values: Tensor, granularity: Granularity, x: Tensor) -> Tensor:
    """One value per tensor, channel or group, in a shape that broadcasts over ``x``."""
    values = values.to(x.device)
    if isinstance(granularity, PerChannel):
        shape = [1] * x.dim()
        shape[granularity.axis] = -1
        return values.reshape(shape)
    return granularity.spread(values, x) if isinstance(granularity, PerGroup) else values


def integers(width: int, symmetric: bool, signed: bool) -> tuple[int, int]:
    """Smallest and largest integer of so many bits; symmetric grids leave out the lowest one."""
    lowest = -(1 << (width - 1)) if signed else 0
    return lowest + symmetric, lowest + (1 << width) - 1


def affine_grid(
    low: Tensor, high: Tensor, smallest: int, largest: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) of ranges, each widened to hold zero."""
    low, high = torch.clamp(low.float(), max=0.0), torch.clamp(high.float(), min=0.0)
    steps = largest - smallest
    if symmetric:
        limit = torch.maximum(-low, high).clamp(min=_SMALLEST_RANGE)
        zero = (largest + smallest) // 2
        return limit / (steps / 2), torch.full_like(limit, zero, dtype=torch.int32)
    scale = (high - low).clamp(min=_SMALLEST_RANGE) / steps
    zero_point = torch.round(smallest - low / scale)
    return scale, zero_point.clamp(smallest, largest).to(torch.int32)


def learned_grid(
    low: Tensor, high: Tensor, smallest: int, largest: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The same grid, differentiable in its range; whole zero points (float32) straight-through."""
    scale, zero_point = affine_grid(low, high, smallest, largest, symmetric)
    if symmetric:
        return scale, zero_point.float()
    exact = smallest - torch.clamp(low.float(), max=0.0) / scale
    return scale, zero_point.float() + (exact - exact.detach())
