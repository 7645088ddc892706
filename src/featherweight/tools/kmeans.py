"""K-means of numbers: clusters are intervals, so sorted values and their prefix sums are all it takes.

Lloyd's iterations (1982) put every value to its nearest centroid and every centroid to the mean of its
values, until nothing moves. Where they begin decides where they end:

- ``linear``: evenly spaced from the least value to the largest (best in Han et al. 2016, arXiv:1510.00149,
  since large weights matter);
- ``density``: evenly spaced quantiles (the same);
- ``kmeans++``: values drawn by their squared distance to those drawn before (Arthur & Vassilvitskii 2007);
- ``optimal``: the least squared error there is, by dynamic programming over where intervals end, divided and
  conquered since the best ends grow with the values (Wang & Song 2011; Grønlund et al. 2017,
  arXiv:1701.07204)::

      D[m, j] = min_i D[m - 1, i] + sum of squares of x[i:j] about their mean

A value may be pinned at zero: it takes part as a centroid that does not move.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

Init = Literal["linear", "density", "kmeans++", "optimal"]
_BINS = 4096  # that the dynamic program sees of more distinct values; iterations see all of them
_CHANGE = 1e-9  # relative, of the error, below which iterations end

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Points:
    """Sorted distinct values, how often each occurs, and prefix sums."""

    values: Array
    counts: Array
    count: Array
    total: Array
    square: Array

    @classmethod
    def of(cls, values: Array, counts: Array | None = None) -> Points:
        """Values in any order, each counted once or as often as is said."""
        if counts is None:
            values, counts = np.unique(values, return_counts=True)
        x, n = values.astype(np.float64), counts.astype(np.float64)

        def prefix(items: Array) -> Array:
            return np.concatenate([[0.0], np.cumsum(items)])

        return cls(x, n, prefix(n), prefix(n * x), prefix(n * x * x))

    def binned(self, bins: int) -> Points:
        """At most so many points instead, the means of bins: half of them by number, half by width."""
        if len(self.values) <= bins:
            return self
        shares = np.arange(1, bins // 2) / (bins // 2)
        by_number = np.searchsorted(self.count, self.count[-1] * shares)
        by_width = np.searchsorted(self.values, self.values[0] + shares * (self.values[-1] - self.values[0]))
        ends = np.unique(np.concatenate([[0], by_number, by_width, [len(self.values)]]))
        number = np.diff(self.count[ends])
        return Points.of(np.diff(self.total[ends]) / number, number)

    def error(self, levels: Array) -> float:
        """Sum of squared distances to the nearest of sorted levels."""
        ends = np.concatenate([[0], np.searchsorted(self.values, _borders(levels)), [len(self.values)]])
        n, s, q = (np.diff(prefix[ends]) for prefix in (self.count, self.total, self.square))
        return float((q - 2 * levels * s + n * levels**2).sum())


def kmeans(
    values: Array, count: int, *, init: Init, zero: bool = False, iterations: int = 50, seed: int = 0
) -> Array:
    """Centroids of numbers, sorted.

    Args:
        values: Of any shape, one at least.
        count: Centroids, zero not counted; fewer come back where there are fewer distinct values.
        init: Where iterations begin.
        zero: Zero is a centroid besides, which does not move.
        iterations: Of Lloyd, at most.
        seed: Of what is drawn.
    """
    points = Points.of(np.asarray(values, np.float64).ravel())
    if zero:
        kept = points.values != 0
        points = Points.of(points.values[kept], points.counts[kept])
    if len(points.values) <= count:
        return points.values
    return lloyd(points, start(points, count, init=init, zero=zero, seed=seed), zero, iterations)


def start(points: Points, count: int, *, init: Init, zero: bool, seed: int = 0) -> Array:
    """Where iterations begin: so many centroids, sorted."""
    if init == "linear":
        spread = np.linspace(points.values[0], points.values[-1], count + zero)
        return np.delete(spread, np.abs(spread).argmin()) if zero else spread
    if init == "density":
        wanted = points.count[-1] * (np.arange(count) + 0.5) / count
        at: Array = points.values[np.searchsorted(points.count[1:], wanted)]
        return at
    if init == "kmeans++":
        return _drawn(points, count, zero, np.random.default_rng(seed))
    return optimal(points.binned(max(_BINS, 4 * count)), count, zero)


def lloyd(points: Points, centroids: Array, zero: bool, iterations: int) -> Array:
    """Centroids after so many iterations, or once the error falls no more; sorted."""
    centroids = np.sort(centroids.astype(np.float64))
    error = np.inf
    for _ in range(iterations):
        levels = _with_zero(centroids, zero)
        ends = np.concatenate([[0], np.searchsorted(points.values, _borders(levels)), [len(points.values)]])
        n, s, q = (np.diff(prefix[ends]) for prefix in (points.count, points.total, points.square))
        now = float((q - 2 * levels * s + n * levels**2).sum())
        if now >= error * (1 - _CHANGE):
            break
        error = now
        moved = np.where(n > 0, s / np.maximum(n, 1), levels)
        fixed = np.searchsorted(levels, 0.0) if zero else -1
        empty = [place for place in np.flatnonzero(n == 0) if place != fixed]
        if empty:
            moved[empty] = _farthest(points, levels, ends, len(empty))
        centroids = np.sort(np.delete(moved, fixed) if zero else moved)
    return centroids


def optimal(points: Points, count: int, zero: bool) -> Array:
    """The centroids of least error; points as they are."""
    x = points
    shift = 0.0 if zero else float(x.total[-1] / x.count[-1])  # about the mean, little cancels
    x = Points.of(x.values - shift, x.counts)
    plain: list[Array] = [np.concatenate([[0.0], np.full(len(x.values), np.inf)])]
    ends: list[Array] = []
    for _ in range(count):
        best, cut = _layer(x, plain[-1])
        plain.append(best)
        ends.append(cut)
    if not zero:
        return _means(x, _walked(ends, count, len(x.values))) + shift
    return _with_pinned(x, plain, ends, count)


def _with_pinned(x: Points, plain: list[Array], ends: list[Array], count: int) -> Array:
    """The same where one interval's centroid is zero: ``held[m]`` has m others, on either side of it."""

    def through(before: Array) -> tuple[Array, Array]:
        """The interval of zero behind each start: its error is a difference of prefix sums."""
        open_ = before - x.square
        best = np.minimum.accumulate(open_)
        where = np.maximum.accumulate(np.where(open_ <= best, np.arange(len(open_)), 0))
        return best + x.square, where

    held, cut = through(plain[0])
    zeros = [cut]
    took: list[Array] = [np.ones(len(held), bool)]  # whether zero's interval is the last one
    after: list[Array] = []
    for m in range(1, count + 1):
        behind, cuts = _layer(x, held)
        last, cut = through(plain[m])
        took.append(last < behind)
        zeros.append(cut)
        after.append(cuts)
        held = np.where(last < behind, last, behind)
    found: list[float] = []
    m, j = count, len(x.values)
    while not took[m][j]:
        i = int(after[m - 1][j])
        found.append(_mean(x, i, j))
        m, j = m - 1, i
    return np.sort(np.array(found + list(_means(x, _walked(ends[:m], m, int(zeros[m][j]))))))


def _layer(x: Points, before: Array) -> tuple[Array, Array]:
    """One more interval: least errors for each end, and where that interval begins; O(n log n)."""
    size = len(before)
    best, cut = np.full(size, np.inf), np.zeros(size, np.int64)
    low, high = np.zeros(1, np.int64), np.full(1, size - 1, np.int64)  # ends that are not done yet
    least, most = np.zeros(1, np.int64), np.full(1, size - 1, np.int64)  # where their intervals may begin
    while len(low):
        middle = (low + high) // 2
        begin, stop = least, np.minimum(middle, most) + 1
        lengths = stop - begin
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        owner = np.repeat(np.arange(len(middle)), lengths)
        i = np.arange(lengths.sum()) - starts[owner] + begin[owner]
        j = middle[owner]
        n, s = x.count[j] - x.count[i], x.total[j] - x.total[i]
        errors = before[i] + np.maximum(x.square[j] - x.square[i] - s * s / np.maximum(n, 1e-300), 0.0)
        found = np.minimum.reduceat(errors, starts)
        first = np.flatnonzero(errors <= found[owner])
        places, at = np.unique(owner[first], return_index=True)
        assert len(places) == len(middle)
        best[middle], cut[middle] = found, i[first[at]]
        chosen = cut[middle]
        left, right = low < middle, middle < high
        low, high, least, most = (
            np.concatenate([low[left], middle[right] + 1]),
            np.concatenate([middle[left] - 1, high[right]]),
            np.concatenate([least[left], chosen[right]]),
            np.concatenate([chosen[left], most[right]]),
        )
    return best, cut


def _walked(ends: list[Array], count: int, size: int) -> list[int]:
    """Where intervals begin and end, from the first to the last."""
    found = [size]
    for m in range(count, 0, -1):
        found.append(int(ends[m - 1][found[-1]]))
    return found[::-1]


def _means(x: Points, ends: list[int]) -> Array:
    return np.array([_mean(x, i, j) for i, j in pairwise(ends) if j > i])


def _mean(x: Points, i: int, j: int) -> float:
    return float((x.total[j] - x.total[i]) / (x.count[j] - x.count[i])) if j > i else 0.0


def _drawn(points: Points, count: int, zero: bool, rng: np.random.Generator) -> Array:
    """Values drawn one after the other, by the squared distance to the nearest of those before."""
    x = points.values
    distance = x**2 if zero else np.ones(len(x))
    found: list[float] = []
    for place in range(count):
        reached = np.cumsum(points.counts * distance)
        index = int(np.searchsorted(reached, rng.random() * reached[-1], side="right"))
        found.append(float(x[min(index, len(x) - 1)]))
        away = (x - found[-1]) ** 2
        distance = away if place == 0 and not zero else np.minimum(distance, away)
    return np.sort(np.array(found))


def _with_zero(centroids: Array, zero: bool) -> Array:
    return np.insert(centroids, np.searchsorted(centroids, 0.0), 0.0) if zero else centroids


def _borders(levels: Array) -> Array:
    return (levels[1:] + levels[:-1]) / 2


def _farthest(points: Points, levels: Array, ends: Array, count: int) -> Array:
    """The values farthest from their levels, for clusters that have none."""
    nearest = np.repeat(levels, np.diff(ends))
    away: Array = np.abs(points.values - nearest)
    farthest: Array = points.values[np.argsort(-away, kind="stable")[:count]]
    return farthest
