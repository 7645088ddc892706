"""Real ranges to quantize to, from a stream of values, by one of six rules.

A histogram holds what was seen in constant memory: 4,096 equal bins over
[-bound, bound], where bound is a power of two that doubles (and pairs of bins
merge) when a larger value arrives. The ranges of least error minimise, with p of 2
(mse) or 1 (l1)::

    sum_b count_b * |center_b - project(center_b)|^p

over shrunk ranges (Sung et al. 2015, arXiv:1511.06488), by coordinate descent over
both ends; kl minimises the divergence of what is stored from what was seen
(Migacz 2017, "8-bit Inference with TensorRT"). Weights are fitted likewise, row by row.

What is stored with the least squared error is always shorter than the weights, and what a layer loses
of its gain adds up from layer to layer, whereas noise averages out. The rule ``gain`` counts it more, up
to 6 bits::

    |e|^2 + 30 (e . w)^2 / |w|^2        e = project(w) - w
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.errors import DataError
from featherweight.formats import (
    Binary,
    Granularity,
    IntQuant,
    PerChannel,
    PerGroup,
    PerTensor,
    TensorFormat,
    Ternary,
)

RangeRule = Literal["minmax", "moving_average", "percentile", "kl", "l1", "mse"]
WeightRule = Literal["minmax", "percentile", "l1", "mse", "gain"]

_BINS = 4096
_LARGE = 2.0**126  # beyond it the width of a bin is infinite in float32
_EXACT = 2**24  # histc counts in float32, which is exact up to here
_LEAST = {2: 0.03, 3: 0.05, 4: 0.1}  # bits -> smallest fraction of the seen range that the search tries
_FINE = 0.01  # steps of these fractions
_WIDEST = 1.2  # largest fraction, where gain counts
_GAIN = 30.0  # weight of the squared loss of gain, up to as many bits as
_GAIN_BITS = 6
_ROUNDS = 3
_EXTREMES = 32  # values at each end of a row by which hopeless ranges are told
_ROUNDING = 1 + 1e-4  # of the sums of squares
_TINY = 1e-300
_APART = 1e-6  # of half a ternary scale and an element, so that float32 tells them apart


class Histogram:
    """Counts of a stream of values; memory does not grow with it.

    Args:
        momentum: Of the moving average of the batches' ends; the first 1 / (1 - momentum) count alike.
    """

    def __init__(self, momentum: float = 0.9) -> None:
        self.low = math.inf
        self.high = -math.inf
        self.average = torch.zeros(2, dtype=torch.float64)  # low and high
        self.batches = 0.0
        self.momentum = momentum
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
        self.batches += 1
        newest = torch.tensor((low, high), dtype=torch.float64)
        self.average += (newest - self.average) * max(1 - self.momentum, 1 / self.batches)
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
    if rule == "moving_average":
        low, high = histogram.average.tolist()
        return max(low, histogram.low), min(high, histogram.high)
    if rule == "percentile":
        return histogram.quantiles(percentile / 100)
    if rule == "kl":
        return _least_divergence(histogram, fmt)
    return _least_error(histogram, fmt, 1 if rule == "l1" else 2)


def _shrinks(width: int, widest: float = 1.0) -> Tensor:
    least = _LEAST.get(width, 0.2)
    return torch.linspace(least, widest, round((widest - least) / _FINE) + 1)


def _least_error(histogram: Histogram, fmt: IntQuant, power: int) -> tuple[float, float]:
    held = histogram.counts > 0
    values, counts = histogram.centers[held].float(), histogram.counts[held].float()
    shrinks = _shrinks(fmt.used)

    def best(lows: Tensor, highs: Tensor) -> int:
        scale, zero_point = _grids(fmt, lows, highs)
        steps = torch.round(values / scale[:, None]) + zero_point[:, None]
        steps = steps.clamp(fmt.quant_min, fmt.quant_max)
        error = (steps - zero_point[:, None]) * scale[:, None] - values
        error = error.abs() if power == 1 else error.square()
        return int((error * counts).sum(1).argmin())

    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if fmt.symmetric:
        limits = shrinks * max(-low, high)
        chosen = float(limits[best(-limits, limits)])
        return max(low, -chosen), min(high, chosen)
    first_low, first_high = low, high
    for _ in range(_ROUNDS):
        highs = shrinks * first_high
        high = float(highs[best(torch.full_like(highs, low), highs)])
        if first_low < 0:
            lows = shrinks * first_low
            low = float(lows[best(lows, torch.full_like(lows, high))])
        else:
            break
    return low, high


def _least_divergence(histogram: Histogram, fmt: IntQuant) -> tuple[float, float]:
    """The fraction of both ends for which what is stored tells most about what was seen.

    P are the counts with those outside added to the outermost bins; Q the counts inside, shared
    evenly among the bins of each stored value that hold any. Least of sum P log(P / Q). Zeros are
    exact on every grid: their bin counts as its neighbours do.
    """
    counts, middle = histogram.counts.clone(), _BINS // 2
    counts[middle] = counts[[middle - 1, middle + 1]].max()
    held = counts > 0
    values, counts = histogram.centers[held], counts[held]
    if not len(values):
        return histogram.low, histogram.high
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if fmt.symmetric:
        low, high = (-max(-low, high) if low < 0 else 0.0), max(-low, high)
    best, chosen = math.inf, 1.0
    for fraction in _shrinks(fmt.used).flip(0).tolist():  # the whole range first: ties keep it
        inside = (values >= low * fraction) & (values <= high * fraction)
        if not inside.any():
            break
        first, last = (int(end) for end in torch.nonzero(inside)[[0, -1], 0])
        seen = counts[first : last + 1].clone()
        merged = seen.clone()
        seen[0] += counts[:first].sum()
        seen[-1] += counts[last + 1 :].sum()
        ends = (torch.tensor([end * fraction]) for end in (low, high))
        scale, zero_point = (float(one) for one in _grids(fmt, *ends))
        steps = torch.round(values[first : last + 1] / scale) + zero_point
        steps = steps.clamp(fmt.quant_min, fmt.quant_max).long() - fmt.quant_min
        levels = fmt.quant_max - fmt.quant_min + 1
        total = torch.zeros(levels, dtype=torch.float64).index_add_(0, steps, merged)
        bins = torch.bincount(steps, minlength=levels)
        stored = (total / bins.clamp(min=1))[steps]
        p, q = seen / seen.sum(), stored / stored.sum()
        divergence = float((p * torch.log(p / q)).sum())
        if divergence < best - 1e-12:
            best, chosen = divergence, fraction
    return max(low * chosen, min(histogram.low, 0.0)), min(high * chosen, max(histogram.high, 0.0))


def _grids(fmt: IntQuant, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points of many ranges at once."""
    many = IntQuant(
        lows, highs, fmt.width, fmt.symmetric, PerChannel(0), signed=fmt.signed, headroom=fmt.headroom
    )
    return many.grid()


def weight_format(weight: Tensor, fmt: TensorFormat, rule: WeightRule, percentile: float) -> TensorFormat:
    """The format with the ranges or scales that suit a weight.

    Args:
        weight: Any shape.
        fmt: The grid that will be stored; its ranges are ignored.
        rule: Which range, for integers; ternary and binary scales have the least squared error, or, by
            gain, that with the loss of gain counted more.
        percentile: For the rule of that name, in percent.
    """
    if isinstance(fmt, IntQuant):
        low, high = weight_range(weight, fmt, rule, percentile)
        return replace(fmt, low=low, high=high)
    gain = _GAIN if rule == "gain" else 0.0
    if isinstance(fmt, Ternary):
        rows, _ = _rows(weight, fmt.granularity)
        scale = _shared(_ternary_scales(rows, gain), weight, fmt.granularity)
        return replace(fmt, scale=scale, threshold=scale / 2)
    if isinstance(fmt, Binary):
        rows, sizes = _rows(weight, fmt.granularity)
        scale = _best_scale(rows.abs().sum(1).double(), sizes, rows.double().square().sum(1), gain)
        return replace(fmt, scale=_shared(scale.float(), weight, fmt.granularity))
    return fmt


def _rows(weight: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """One row per scale, short ones filled up with zeros; and how many elements each has (at least 1)."""
    weight = weight.detach().float()
    if isinstance(granularity, PerGroup):
        matrix = granularity.rows(weight)
        groups, size = granularity.groups(matrix.shape[1]), granularity.size
        rows = nn.functional.pad(matrix, (0, groups * size - matrix.shape[1])).reshape(-1, size)
        last = matrix.shape[1] - (groups - 1) * size
        sizes = torch.full((matrix.shape[0], groups), size)
        sizes[:, -1:] = last
        return rows, sizes.reshape(-1)
    if isinstance(granularity, PerChannel):
        rows = weight.movedim(granularity.axis, 0).flatten(1)
    else:
        rows = weight.reshape(1, -1)
    if not rows.shape[1]:
        rows = torch.zeros(rows.shape[0], 1)
    return rows, torch.full((rows.shape[0],), rows.shape[1])


def _shared(values: Tensor, weight: Tensor, granularity: Granularity) -> Tensor:
    """One value per row in the shape of the format's scales."""
    if isinstance(granularity, PerTensor):
        return values[0]
    if isinstance(granularity, PerGroup):
        rows, elements = granularity.rows(weight).shape
        return values.reshape(rows, granularity.groups(elements)).movedim(0, 1 - granularity.axis)
    return values


def _ternary_scales(rows: Tensor, gain: float) -> Tensor:
    """The best scale of each row, of which elements larger than half of it are stored as +-scale.

    For the k largest elements it is between twice the next one and twice the last of them; without gain
    the best of all is the mean of the k largest for some k (arXiv:1605.04711, eq. 6).
    """
    sizes = rows.abs().sort(1, descending=True).values.double()
    counts = torch.arange(1, rows.shape[1] + 1)
    sums, energy = sizes.cumsum(1), sizes.square().sum(1, keepdim=True)
    scales = _best_scale(sums, counts, energy, gain)
    least, most = nn.functional.pad(2 * sizes[:, 1:], (0, 1)) * (1 + _APART), 2 * sizes * (1 - _APART)
    scales = torch.minimum(torch.maximum(scales, least), most)
    errors = _scale_error(scales, sums, counts, energy, gain)
    best = errors.where(least <= most, math.inf).argmin(1, keepdim=True)
    return scales.gather(1, best)[:, 0].float()


def _best_scale(sums: Tensor, counts: Tensor, energy: Tensor, gain: float) -> Tensor:
    """The scale of least error for elements stored as +-scale: their sum of sizes, number and all energy."""
    return sums * (1 + gain) / (counts + gain * sums.square() / energy.clamp(min=_TINY)).clamp(min=_TINY)


def _scale_error(scale: Tensor, sums: Tensor, counts: Tensor, energy: Tensor, gain: float) -> Tensor:
    loss = (scale * sums - energy).square() / energy.clamp(min=_TINY)
    return scale.square() * counts - 2 * scale * sums + energy + gain * loss


def weight_range(weight: Tensor, fmt: IntQuant, rule: WeightRule, percentile: float) -> tuple[Tensor, Tensor]:
    """Low and high of a weight: shape () per tensor, (channels,) per channel, a matrix per group.

    Args:
        weight: Any shape.
        fmt: The grid that will be stored; its range is ignored.
        rule: Which range; those of least error shrink both ends of a row alike.
        percentile: For the rule of that name, in percent.
    """
    rows, _ = _rows(weight, fmt.granularity)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if rule == "percentile":
        tail = (1 - percentile / 100) / 2
        ends = np.quantile(rows.numpy(), [tail, 1 - tail], axis=1)  # torch.quantile refuses large tensors
        low, high = torch.from_numpy(ends).float().unbind()
        low, high = low.clamp(max=0), high.clamp(min=0)
    elif rule != "minmax":
        gain = _GAIN if rule == "gain" and fmt.used <= _GAIN_BITS else 0.0
        low, high = _least_error_rows(rows, fmt, low, high, 1 if rule == "l1" else 2, gain)
    return _shared(low, weight, fmt.granularity), _shared(high, weight, fmt.granularity)


def _least_error_rows(
    rows: Tensor, fmt: IntQuant, low: Tensor, high: Tensor, power: int, gain: float
) -> tuple[Tensor, Tensor]:
    best = torch.full((rows.shape[0],), math.inf)
    chosen = torch.ones(rows.shape[0])
    largest = min(_EXTREMES, rows.shape[1])
    above, below = rows.topk(largest, dim=1).values, rows.topk(largest, dim=1, largest=False).values
    open_ = torch.arange(rows.shape[0])  # rows for which a smaller range may still be better
    energy = rows.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    for fraction in _shrinks(fmt.used, _WIDEST if gain else 1.0).flip(0):  # the widest first: ties keep it
        scale, zero_point = (
            grid[:, None] for grid in _grids(fmt, low[open_] * fraction, high[open_] * fraction)
        )
        smallest, greatest = fmt.quant_min - zero_point, fmt.quant_max - zero_point
        # What the range cuts off the outermost values alone; it only grows from here on.
        cut = (above[open_] - greatest * scale).clamp(min=0).pow(power).sum(1)
        cut += (smallest * scale - below[open_]).clamp(min=0).pow(power).sum(1)
        keep = cut <= best[open_] * _ROUNDING
        if not keep.all():
            open_, scale, smallest, greatest = (item[keep] for item in (open_, scale, smallest, greatest))
            if not len(open_):
                break
        some = rows if len(open_) == len(rows) else rows[open_]
        steps = torch.round(some / scale).clamp_(smallest, greatest)
        off = steps.mul_(scale).sub_(some)
        lost = gain * (off * some).sum(1).square() / energy[open_] if gain else 0.0
        error = off.abs_().pow_(power).sum(1) + lost
        better = error < best[open_]
        best[open_[better]] = error[better]
        chosen[open_[better]] = fraction
    return low * chosen, high * chosen
