"""Real ranges to quantize to, from a stream of values: min-max, percentile, or least squared error.

A histogram holds what was seen in constant memory: 4,096 equal bins over
[-bound, bound], where bound is a power of two that doubles (and pairs of bins
merge) when a larger value arrives. The least-squares range minimises::

    sum_b count_b * (center_b - project(center_b))^2

over shrunk ranges (Sung et al. 2015, arXiv:1511.06488), by coordinate descent
over both ends.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.errors import DataError
from featherweight.formats import IntQuant, PerChannel, PerGroup, PerTensor

RangeRule = Literal["minmax", "percentile", "mse"]

_BINS = 4096
_LARGE = 2.0**126  # beyond it the width of a bin is infinite in float32
_EXACT = 2**24  # histc counts in float32, which is exact up to here
_SHRINK = torch.linspace(0.2, 1.0, 81)  # fractions of the seen range that the search tries
_ROUNDS = 3
_EXTREMES = 32  # values at each end of a row by which hopeless ranges are told
_ROUNDING = 1 + 1e-4  # of the sums of squares


class Histogram:
    """Counts of a stream of values; memory does not grow with it."""

    def __init__(self) -> None:
        self.low = math.inf
        self.high = -math.inf
        self.bound = 0.0
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def update(self, values: Tensor, name: str) -> None:
        """Add a tensor's elements.

        Raises:
            DataError: There are NaN or infinite values among them.
        """
        low, high = (float(end) for end in torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(
                f"'{name}' is NaN or infinite on the calibration examples",
                fix="check the model on these examples, or exclude the layer under where",
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(abs(low), abs(high)))
        if self.bound:
            flat = values.reshape(-1)
            exact = flat.double() if self.bound > _LARGE else flat.float()
            for part in torch.split(exact, _EXACT):
                seen = torch.histc(part, bins=_BINS, min=-self.bound, max=self.bound)
                self.counts += seen.double()
        else:  # nothing but zeros so far: they lie in the middle, whatever the bound will be
            self.counts[_BINS // 2] += values.numel()

    def _widen(self, largest: float) -> None:
        if largest <= self.bound:
            return
        wanted = 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 0.0
        if not self.bound:
            self.bound = wanted
            return
        while self.bound < wanted:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[_BINS // 4 : 3 * _BINS // 4] = merged
            self.bound *= 2

    @property
    def centers(self) -> Tensor:
        width = 2 * self.bound / _BINS
        return -self.bound + width * (torch.arange(_BINS, dtype=torch.float64) + 0.5)

    def quantiles(self, fraction: float) -> tuple[float, float]:
        """Ends between which that share of the values lies, tails of equal weight; inside what was seen."""
        if not self.bound:
            return self.low, self.high
        cumulative = self.counts.cumsum(0) / self.counts.sum()
        width = 2 * self.bound / _BINS
        tail = (1 - fraction) / 2
        lower = int(torch.searchsorted(cumulative, torch.tensor(tail, dtype=torch.float64)))
        upper = int(torch.searchsorted(cumulative, torch.tensor(1 - tail, dtype=torch.float64)))
        low = -self.bound + width * lower
        high = -self.bound + width * (min(upper, _BINS - 1) + 1)
        return max(low, self.low), min(high, self.high)


def activation_range(
    histogram: Histogram, fmt: IntQuant, rule: RangeRule, percentile: float
) -> tuple[float, float]:
    """Low and high for a tensor with these values.

    Args:
        histogram: What was seen of it.
        fmt: The grid that will be stored; its range is ignored.
        rule: Which range.
        percentile: For the rule of that name, in percent.
    """
    if rule == "minmax" or not histogram.bound:
        return histogram.low, histogram.high
    if rule == "percentile":
        return histogram.quantiles(percentile / 100)
    return _least_squares(histogram, fmt)


def _least_squares(histogram: Histogram, fmt: IntQuant) -> tuple[float, float]:
    held = histogram.counts > 0
    values, counts = histogram.centers[held].float(), histogram.counts[held].float()

    def best(lows: Tensor, highs: Tensor) -> int:
        scale, zero_point = _grids(fmt, lows, highs)
        steps = torch.round(values / scale[:, None]) + zero_point[:, None]
        steps = steps.clamp(fmt.quant_min, fmt.quant_max)
        error = (steps - zero_point[:, None]) * scale[:, None] - values
        return int((error.square() * counts).sum(1).argmin())

    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if fmt.symmetric:
        limit = max(-low, high)
        limits = _SHRINK * limit
        chosen = float(limits[best(-limits, limits)])
        return max(low, -chosen), min(high, chosen)
    first_low, first_high = low, high
    for _ in range(_ROUNDS):
        highs = _SHRINK * first_high
        high = float(highs[best(torch.full_like(highs, low), highs)])
        if first_low < 0:
            lows = _SHRINK * first_low
            low = float(lows[best(lows, torch.full_like(lows, high))])
        else:
            break
    return low, high


def _grids(fmt: IntQuant, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points of many ranges at once."""
    many = IntQuant(
        lows, highs, fmt.width, fmt.symmetric, PerChannel(0), signed=fmt.signed, headroom=fmt.headroom
    )
    return many.grid()


def weight_range(weight: Tensor, fmt: IntQuant, rule: RangeRule, percentile: float) -> tuple[Tensor, Tensor]:
    """Low and high of a weight: shape () per tensor, (channels,) per channel, a matrix per group.

    Args:
        weight: Any shape.
        fmt: The grid that will be stored; its range is ignored.
        rule: Which range; least squares searches shrunk ranges per channel.
        percentile: For the rule of that name, in percent.
    """
    rows = weight.detach().float().reshape(1, -1)
    if isinstance(fmt.granularity, PerChannel):
        rows = weight.detach().float().movedim(fmt.granularity.axis, 0).flatten(1)
    elif isinstance(fmt.granularity, PerGroup):
        matrix = weight.detach().float().movedim(fmt.granularity.axis, 1)
        groups = fmt.granularity.groups(matrix.shape[1])
        padded = nn.functional.pad(matrix, (0, groups * fmt.granularity.size - matrix.shape[1]))
        rows = padded.reshape(-1, fmt.granularity.size)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if rule == "percentile":
        tail = (1 - percentile / 100) / 2
        ends = np.quantile(rows.numpy(), [tail, 1 - tail], axis=1)  # torch.quantile refuses large tensors
        low, high = torch.from_numpy(ends).float().unbind()
        low, high = low.clamp(max=0), high.clamp(min=0)
    elif rule == "mse":
        low, high = _least_squares_rows(rows, fmt, low, high)
    if isinstance(fmt.granularity, PerTensor):
        return low[0], high[0]
    if isinstance(fmt.granularity, PerGroup):
        low, high = (end.reshape(-1, groups).movedim(1, fmt.granularity.axis) for end in (low, high))
    return low, high


def _least_squares_rows(rows: Tensor, fmt: IntQuant, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    best = torch.full((rows.shape[0],), math.inf)
    chosen = torch.ones(rows.shape[0])
    largest = min(_EXTREMES, rows.shape[1])
    above, below = rows.topk(largest, dim=1).values, rows.topk(largest, dim=1, largest=False).values
    open_ = torch.arange(rows.shape[0])  # rows for which a smaller range may still be better
    for fraction in _SHRINK.flip(0):  # the whole range first: ties keep it
        scale, zero_point = (
            grid[:, None] for grid in _grids(fmt, low[open_] * fraction, high[open_] * fraction)
        )
        smallest, greatest = fmt.quant_min - zero_point, fmt.quant_max - zero_point
        # What the range cuts off the outermost values alone; it only grows from here on.
        cut = (above[open_] - greatest * scale).clamp(min=0).square().sum(1)
        cut += (smallest * scale - below[open_]).clamp(min=0).square().sum(1)
        keep = cut <= best[open_] * _ROUNDING
        if not keep.all():
            open_, scale, smallest, greatest = (item[keep] for item in (open_, scale, smallest, greatest))
            if not len(open_):
                break
        some = rows if len(open_) == len(rows) else rows[open_]
        steps = torch.round(some / scale).clamp_(smallest, greatest)
        error = steps.mul_(scale).sub_(some).square_().sum(1)
        better = error < best[open_]
        best[open_[better]] = error[better]
        chosen[open_[better]] = fraction
    return low * chosen, high * chosen
