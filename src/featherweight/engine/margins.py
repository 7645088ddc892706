"""How far predictions were from measurements so far, and how far the next one may be.

Errors of one kind are taken as normal, with unknown mean and spread. A weak prior stands for a few errors
that were never seen; with n seen ones the next error follows Student's t (Gelman et al., Bayesian Data
Analysis, chapter 3)::

    mean   = sum(e) / (w + n)
    spread = sqrt((v s0^2 + sum (e - e')^2 + w n / (w + n) e'^2) / (v + n) * (1 + 1 / (w + n)))
    e      ~ t_{v + n}(mean, spread)

with e' the mean of what was seen, s0 the prior's spread, v its weight and w that of its mean, which is zero.
Sizes and latencies err by factors, so their errors are logarithms; drops err by differences.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable
from dataclasses import dataclass, field

from scipy.special import stdtrit

_OF_SPREAD, _OF_MEAN = 3.0, 1.0  # errors that the prior counts for
_SURE = 0.975  # how surely a measurement is no better than what a prediction allows


@dataclass
class Margin:
    """Errors of one kind of prediction.

    Attributes:
        spread: Of the errors that are expected before any was seen.
        factor: Whether they are factors.
        errors: Those that were seen; of factors their logarithms.
        missed: How far predictions were off, corrected by what had been learned before; relative for factors.
    """

    spread: float
    factor: bool
    errors: list[float] = field(default_factory=list)
    missed: list[float] = field(default_factory=list)

    def corrected(self, predicted: float) -> float:
        """What will be measured, most probably."""
        return self._moved(predicted, self._mean)

    def best(self, predicted: float) -> float:
        """What will be measured at best: in 39 of 40 cases it is more."""
        count = len(self.errors)
        spread = math.sqrt(self._variance * (1 + 1 / (_OF_MEAN + count)))
        return self._moved(predicted, self._mean - float(stdtrit(_OF_SPREAD + count, _SURE)) * spread)

    def learn(self, predicted: float, measured: float) -> None:
        """A prediction came true, more or less. What has no logarithm tells nothing of a factor."""
        if self.factor and not (predicted > 0 and measured > 0):
            return
        off = abs(self.corrected(predicted) - measured)
        self.missed.append(off / measured if self.factor else off)
        self.errors.append(math.log(measured / predicted) if self.factor else measured - predicted)

    @property
    def _mean(self) -> float:
        return math.fsum(self.errors) / (_OF_MEAN + len(self.errors))

    @property
    def _variance(self) -> float:
        count = len(self.errors)
        seen = math.fsum(self.errors) / count if count else 0.0
        around = math.fsum((error - seen) ** 2 for error in self.errors)
        from_zero = _OF_MEAN * count / (_OF_MEAN + count) * seen**2
        return (_OF_SPREAD * self.spread**2 + around + from_zero) / (_OF_SPREAD + count)

    def _moved(self, value: float, error: float) -> float:
        return value * math.exp(error) if self.factor else value + error


class Margins:
    """Margins by kind, each made when it is first asked for."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Margin] = {}

    def of(self, kind: Hashable, spread: float, *, factor: bool) -> Margin:
        """The margin of a kind.

        Args:
            kind: What predictions must have in common to err alike.
            spread: Of the errors that are expected before any was seen.
            factor: Whether they are factors.
        """
        return self._known.setdefault(kind, Margin(spread, factor))

    def missed(self, *, where: tuple[Hashable, ...]) -> list[float]:
        """How far corrected predictions were off, of all kinds that begin so."""
        return [
            off
            for kind, margin in self._known.items()
            if isinstance(kind, tuple) and kind[: len(where)] == where
            for off in margin.missed
        ]


def median(values: list[float]) -> float | None:
    """None of nothing."""
    return statistics.median(values) if values else None
