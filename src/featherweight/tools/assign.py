"""One option for each item, so that the sum of losses is least and sums of prices keep within limits.

The multiple-choice knapsack (Kellerer, Pferschy and Pisinger 2004, chapter 11), of layers and the formats
that they may have, as HAWQ-V3 chooses bits (Yao et al. 2021, arXiv:2011.10680)::

    minimise    sum_i sum_o loss[i, o] x[i, o]
    subject to  sum_o x[i, o] = 1                       for each item i
                sum_i sum_o price_k[i, o] x[i, o] <= limit_k   for each limit k
                x[i, o] in {0, 1}

It is solved as an integer program by HiGHS (Huangfu and Hall 2018), which proves its optimum. The next best
assignment is found under a no-good cut (Balas and Jeroslow 1972) for each better one s::

    sum_i x[i, s_i] <= items - distance
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

_GAP = 1e-6  # relative, within which an optimum counts as proven
_LARGEST = 1e4  # of the scaled losses, since the solver's absolute gap is 1e-6
_LIMIT = 1e3  # what each limit is scaled to, since the solver's feasibility is 1e-6
_ROUNDING = 1e-12  # relative, of sums
_INFEASIBLE = 2  # status of scipy.optimize.milp


@dataclass(frozen=True)
class Option:
    """What an item may get.

    Attributes:
        loss: Finite; what the sum of is minimised.
        prices: Limit's name -> what it takes of it, zero or more.
    """

    loss: float
    prices: Mapping[str, float]


@dataclass(frozen=True)
class Assignment:
    """One option for each item.

    Attributes:
        chosen: Index of each item's option.
        loss: Sum of their losses.
        prices: Limit's name -> sum of their prices.
    """

    chosen: tuple[int, ...]
    loss: float
    prices: Mapping[str, float]


class OutOfReachError(ValueError):
    """No assignment keeps within the limits.

    Attributes:
        limit: Name of the one that is broken.
        smallest: What it would have to be at least, the others kept where they can be.
    """

    def __init__(self, limit: str, smallest: float, asked: float) -> None:
        super().__init__(f"{limit} of {asked:g} cannot be reached: {smallest:g} is the smallest")
        self.limit = limit
        self.smallest = smallest


def assign(
    items: Sequence[Sequence[Option]], limits: Mapping[str, float], *, count: int = 1, distance: int = 1
) -> list[Assignment]:
    """The best assignments, the best one first.

    Args:
        items: The options of each item, one at least.
        limits: Name -> the most that the sum of the options' prices of that name may be.
        count: How many to find.
        distance: In how many items each one differs at least from every better one.

    Returns:
        So many, or fewer where there are no more.

    Raises:
        OutOfReachError: There is none.
        ValueError: A loss or price is not finite, or an item has no option.
    """
    problem = _Problem(items, limits)
    if any(least > _rounded_up(limits[name]) for name, least in _least(items, limits).items()):
        raise _out_of_reach(items, limits)
    found: list[Assignment] = []
    while len(found) < count:
        best = problem.solve()
        if best is None:
            break
        if _keeps(best, limits):
            found.append(best)
            problem.exclude(best.chosen, distance)
        else:  # it breaks a limit by less than the solver's tolerance
            problem.exclude(best.chosen, 1)
    if not found and items:
        raise _out_of_reach(items, limits)
    return found


def _keeps(found: Assignment, limits: Mapping[str, float]) -> bool:
    return all(found.prices[name] <= _rounded_up(limit) for name, limit in limits.items())


def _rounded_up(limit: float) -> float:
    """With room for the rounding of sums, so that what fits exactly fits."""
    return limit + _ROUNDING * abs(limit)


def _least(items: Sequence[Sequence[Option]], limits: Mapping[str, float]) -> dict[str, float]:
    """The smallest sum of prices for each limit by itself."""
    return {name: math.fsum(min(o.prices[name] for o in options) for options in items) for name in limits}


def _out_of_reach(items: Sequence[Sequence[Option]], limits: Mapping[str, float]) -> OutOfReachError:
    """Which limit is broken, and what it would have to be beside the others."""
    least = _least(items, limits)
    alone = [name for name in limits if least[name] > _rounded_up(limits[name])]
    broken = alone[0] if alone else list(limits)[-1]
    others = {name: limit for name, limit in limits.items() if name != broken and name not in alone}
    priced = [[Option(option.prices[broken], option.prices) for option in options] for options in items]
    (cheapest,) = assign(priced, others)
    return OutOfReachError(broken, cheapest.loss, limits[broken])


class _Problem:
    """The integer program, which grows by a row for each assignment that is excluded."""

    def __init__(self, items: Sequence[Sequence[Option]], limits: Mapping[str, float]) -> None:
        self._items = items
        self._limits = limits
        flat = [option for options in items for option in options]
        self._ends = np.cumsum([len(options) for options in items])
        self._starts = self._ends - [len(options) for options in items]
        losses = np.array([option.loss for option in flat])
        prices = {name: np.array([option.prices[name] for option in flat], float) for name in limits}
        if not all(np.isfinite(values).all() for values in (losses, *prices.values())):
            raise ValueError("a loss or a price is not finite")
        if any(not options for options in items):
            raise ValueError("an item has no option")
        self._losses = _scaled(losses, float(np.abs(losses).max(initial=0.0)), _LARGEST)
        choice = np.repeat(np.arange(len(items)), [len(options) for options in items])
        ones = csr_array((np.ones(len(flat)), (choice, np.arange(len(flat)))), shape=(len(items), len(flat)))
        self._one_each = LinearConstraint(ones, 1, 1)
        self._rows = [csr_array(_scaled(prices[name], limits[name], _LIMIT)[None]) for name in limits]
        self._most = [_LIMIT if limit > 0 else 0.0 for limit in limits.values()]

    def exclude(self, chosen: Sequence[int], distance: int) -> None:
        """Differ from an assignment in so many items."""
        row = np.zeros(len(self._losses))
        row[self._starts + np.asarray(chosen)] = 1
        self._rows.append(csr_array(row[None]))
        self._most.append(len(chosen) - distance)

    def solve(self) -> Assignment | None:
        """The best assignment that is left; None: there is none."""
        if not self._items:
            return None
        constraints = [self._one_each]
        if self._rows:
            constraints.append(LinearConstraint(vstack(self._rows, format="csr"), -np.inf, self._most))
        with _silence():
            result = milp(
                self._losses,
                integrality=np.ones(len(self._losses)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": _GAP},
            )
        if result.status == _INFEASIBLE:
            return None
        if result.x is None:
            raise RuntimeError(f"the integer program was not solved: {result.message}")
        pairs = zip(self._starts, self._ends, strict=True)
        chosen = tuple(int(np.argmax(result.x[start:end])) for start, end in pairs)
        picked = [options[index] for options, index in zip(self._items, chosen, strict=True)]
        totals = {name: math.fsum(option.prices[name] for option in picked) for name in self._limits}
        return Assignment(chosen, math.fsum(option.loss for option in picked), totals)


@contextmanager
def _silence() -> Iterator[None]:
    """HiGHS 1.12 prints a line of its own on standard output, where a program's results belong."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _scaled(values: np.ndarray, unit: float, to: float) -> np.ndarray:
    """Values in units of which ``unit`` has so many."""
    return values * (to / unit) if unit > 0 else values
