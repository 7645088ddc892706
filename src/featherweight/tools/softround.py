"""Rounding that can be learned: each weight slides between two neighbours of its grid, then picks one.

AdaRound's rectified sigmoid and the regularizer that drives it to 0 or 1 (Nagel et al. 2020,
arXiv:2004.10568)::

    w(v) = step * (clamp(base + h(v), quant_min, quant_max) - zero)
    h(v) = clamp(1.2 * sigmoid(v) - 0.1, 0, 1)
    f(v) = sum(1 - |2 h(v) - 1| ** beta)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.formats import Binary, IntQuant, TensorFormat, Ternary
from featherweight.granularity import per_element
from featherweight.model import Model

_ZETA, _GAMMA = 1.1, -0.1  # the sigmoid is stretched to this interval, then cut to 0..1
_SURE = 0.9  # h of a rounding that another method chose beyond the two neighbours


@dataclass(frozen=True)
class WeightGrid:
    """The values ``step * (q - zero)`` for integers q from ``low`` to ``high``.

    Attributes:
        step: Broadcasts over the weight.
        zero: Broadcasts over the weight; half an integer for binary weights.
        low: Smallest integer.
        high: Largest integer.
    """

    step: Tensor
    zero: Tensor
    low: int
    high: int

    @classmethod
    def of(cls, fmt: TensorFormat, weight: Tensor) -> WeightGrid | None:
        """The grid of a format on a weight; None where its values are no such grid."""
        if isinstance(fmt, IntQuant):
            step, zero = fmt.grid_of(weight)
            return cls(step, zero.float(), fmt.quant_min, fmt.quant_max)
        if isinstance(fmt, Ternary):
            step = per_element(fmt.scale, fmt.granularity, weight)
            return cls(step.clamp(min=1e-8), torch.zeros(()), -1, 1)
        if isinstance(fmt, Binary):
            step = 2 * per_element(fmt.scale, fmt.granularity, weight)
            return cls(step.clamp(min=1e-8), torch.full((), 0.5), 0, 1)
        return None

    def position(self, weight: Tensor) -> Tensor:
        """Where a weight lies among the integers (float, inside the grid)."""
        return (weight / self.step + self.zero).clamp(self.low, self.high)

    def value(self, position: Tensor) -> Tensor:
        """The weight at a position."""
        return (position - self.zero) * self.step


class SoftRounding:
    """The learned rounding of one weight.

    Args:
        weight: Float.
        fmt: How it is stored.
        start: On-grid weight to begin near; None: the float weight itself.

    Attributes:
        v: What is trained, in the weight's shape.
    """

    def __init__(self, weight: Tensor, fmt: TensorFormat, start: Tensor | None = None) -> None:
        grid = WeightGrid.of(fmt, weight)
        if grid is None:
            raise TypeError(f"{type(fmt).__name__} has no neighbours to round to")
        self.fmt, self.grid = fmt, grid
        position = grid.position(weight)
        self.base = position.floor()
        fraction = position - self.base
        if start is not None:
            self.base, fraction = _towards(position, grid.position(start).round())
        inner = ((fraction - _GAMMA) / (_ZETA - _GAMMA)).clamp(1e-4, 1 - 1e-4)
        self.v = torch.log(inner / (1 - inner)).requires_grad_(True)

    def share(self) -> Tensor:
        """h(v), the share of the upper neighbour."""
        return (torch.sigmoid(self.v) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)

    def soft(self, share: Tensor | None = None) -> Tensor:
        """The weight between its neighbours; differentiable."""
        share = self.share() if share is None else share
        return self.grid.value((self.base + share).clamp(self.grid.low, self.grid.high))

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The weight on its grid."""
        position = (self.base + (self.share() >= 0.5)).clamp(self.grid.low, self.grid.high)
        return self.fmt.project(self.grid.value(position)).contiguous()


def roundable(model: Model, names: Collection[str]) -> frozenset[str]:
    """Those parameters that one format with neighbours to round to stores."""
    parameters = model.parameters
    formats = {name: model.formats.get(name, ()) for name in names if name in parameters}
    found = {name: chain[0] for name, chain in formats.items() if len(chain) == 1}
    return frozenset(name for name, fmt in found.items() if WeightGrid.of(fmt, parameters[name]) is not None)


def rate_for(iterations: int) -> float:
    """Learning rate of v, so that so many steps suffice to decide."""
    return min(max(10.0 / max(iterations, 1), 0.01), 0.1)


def penalty(share: Tensor, beta: float) -> Tensor:
    """Mean distance from a decision: 0 where every share is 0 or 1, 1 where all are a half."""
    return (1 - (2 * share - 1).abs().pow(beta)).mean()


def annealed(progress: float, first: float = 20.0, last: float = 2.0, warm: float = 0.2) -> float:
    """AdaRound's beta: constant while warming up, then down linearly to its last value."""
    return first + (last - first) * max(0.0, (progress - warm) / (1 - warm))


def _towards(position: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Base and share between a chosen integer and its neighbour on the float weight's side."""
    below = (chosen < position) | ((chosen == position) & (chosen == chosen.floor()))
    base = torch.where(below, chosen, chosen - 1)
    share = position - base
    inside = (share >= 0) & (share <= 1)
    sure = torch.where(below, 1 - _SURE, _SURE)
    leaning = torch.where(below, share.clamp(max=0.45), share.clamp(min=0.55))
    return base, torch.where(inside, leaning, sure)
