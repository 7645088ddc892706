"""HQQ: scales and zero points of weights by a robust error, without any data.

Half-quadratic quantization (Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/) minimises the l_p
error, p < 1, of each channel's or group's weights, which lets few outliers be wrong::

    min  sum |w - scale * (q - zero)| ** p

by turns, with the outliers e split off (a proximal step, errors in units of the scale)::

    q = round(w / scale) + zero        x = w / scale - (q - zero)
    e = sign(x) * max(0, |x| - |x| ** (p - 1) / beta)
    scale, zero = least squares of w - scale * e on q

while beta grows, from several shrunk ranges. A grid without a zero point of its own moves its scale alone.
Where the error did not fall, the range stays.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from featherweight.formats import IntQuant
from featherweight.granularity import PerChannel, PerGroup

_POWER = 0.7
_BETA = 10.0
_GROWTH = 1.05
_STARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the range
_TINY = 1e-12


def robust_range(weight: Tensor, fmt: IntQuant, iterations: int = 20) -> IntQuant:
    """The format with the range whose nearest integers make the least l_p error found.

    Args:
        weight: Any shape that the format fits.
        fmt: Where the search starts.
        iterations: Turns from each start.
    """
    rows, held = _units(weight.detach().double(), fmt)
    start, middle = (item.double().reshape(-1, 1) for item in _in_rows(fmt))
    first = _error(rows, held, start, middle, fmt)
    best, chosen = first.clone(), (start.clone(), middle.clone())
    for fraction in _STARTS:
        scale, zero, beta = start * fraction, middle, _BETA
        for turn in range(iterations + 1):
            if turn:
                scale, zero = _turn(rows, held, scale, zero, beta, fmt)
                beta *= _GROWTH
            error = _error(rows, held, scale, zero, fmt)
            better = error < best
            best = torch.where(better, error, best)
            mask = better[:, None]
            chosen = torch.where(mask, scale, chosen[0]), torch.where(mask, torch.round(zero), chosen[1])
    moved = best < first
    low = (chosen[0] * (fmt.quant_min - chosen[1]))[:, 0].float()
    high = (chosen[0] * (fmt.quant_max - chosen[1]))[:, 0].float()
    before = [_flat(end, fmt) for end in (fmt.low, fmt.high)]
    ends = (torch.where(moved, new, old) for new, old in zip((low, high), before, strict=True))
    low, high = (_unflat(end, fmt) for end in ends)
    return replace(fmt, low=low, high=high)


def _turn(
    rows: Tensor, held: Tensor, scale: Tensor, zero: Tensor, beta: float, fmt: IntQuant
) -> tuple[Tensor, Tensor]:
    """Integers and outliers for a grid, then the grid for them."""
    steps = _integers(rows, scale, zero, fmt)
    gap = rows / scale - (steps - zero)
    outliers = gap.sign() * (gap.abs() - gap.abs().clamp(min=_TINY) ** (_POWER - 1) / beta).clamp(min=0)
    return _fitted(rows - scale * outliers, steps, held, scale, zero, fmt)


def _units(weight: Tensor, fmt: IntQuant) -> tuple[Tensor, Tensor]:
    """One row for what shares a scale, padded, and which elements are real."""
    shared = fmt.granularity
    if isinstance(shared, PerChannel):
        rows = weight.movedim(shared.axis, 0).flatten(1)
    elif isinstance(shared, PerGroup):
        matrix = shared.rows(weight)
        pad = shared.groups(matrix.shape[1]) * shared.size - matrix.shape[1]
        held = nn.functional.pad(torch.ones_like(matrix), (0, pad)).reshape(-1, shared.size)
        return nn.functional.pad(matrix, (0, pad)).reshape(-1, shared.size), held
    else:
        rows = weight.reshape(1, -1)
    return rows, torch.ones_like(rows)


def _flat(values: Tensor, fmt: IntQuant) -> Tensor:
    """Values per scale, in the order of the rows."""
    if isinstance(fmt.granularity, PerGroup):
        values = values.movedim(fmt.granularity.axis, 1)
    return values.reshape(-1)


def _unflat(values: Tensor, fmt: IntQuant) -> Tensor:
    if isinstance(fmt.granularity, PerGroup):
        shape = fmt.low.movedim(fmt.granularity.axis, 1).shape
        return values.reshape(shape).movedim(1, fmt.granularity.axis)
    return values.reshape(fmt.low.shape)


def _in_rows(fmt: IntQuant) -> tuple[Tensor, Tensor]:
    scale, zero = fmt.grid()
    return _flat(scale, fmt), _flat(zero, fmt)


def _integers(rows: Tensor, scale: Tensor, zero: Tensor, fmt: IntQuant) -> Tensor:
    return torch.round(rows / scale + zero).clamp(fmt.quant_min, fmt.quant_max)


def _error(rows: Tensor, held: Tensor, scale: Tensor, zero: Tensor, fmt: IntQuant) -> Tensor:
    """l_p error of each row on the grid with a whole zero point."""
    zero = torch.round(zero)
    gap = rows - scale * (_integers(rows, scale, zero, fmt) - zero)
    return (held * gap.abs() ** _POWER).sum(1)


def _fitted(
    wanted: Tensor, steps: Tensor, held: Tensor, scale: Tensor, zero: Tensor, fmt: IntQuant
) -> tuple[Tensor, Tensor]:
    """Least squares of scale (and zero point) for given integers; a row that has none keeps its own."""
    count = held.sum(1, keepdim=True)
    if fmt.symmetric:
        centred = (steps - zero) * held
        fitted = (wanted * centred).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True).clamp(
            min=_TINY
        )
        return torch.where(fitted > _TINY, fitted, scale), zero
    mean, middle = ((item * held).sum(1, keepdim=True) / count for item in (wanted, steps))
    away = (steps - middle) * held
    fitted = ((wanted - mean) * away).sum(1, keepdim=True) / away.square().sum(1, keepdim=True).clamp(
        min=_TINY
    )
    fitted = torch.where(fitted > _TINY, fitted, scale)
    return fitted, (middle - mean / fitted).clamp(fmt.quant_min, fmt.quant_max)
