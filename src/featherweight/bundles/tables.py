"""Frequency tables of a bundle: how a count is stored, what a table costs, and which streams share one.

A table is stored as one byte a symbol, four bits of which are a mantissa (docs/fw-format.md, "Tables").
Tables lie in the head, so a small stream may be coded more cheaply by a larger one's table than by its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featherweight_loader.coder import FREQUENCIES

Array = NDArray[Any]

PARTS = float(2**24)
# What a table takes beside its frequencies: lo, n and the indices of those that use it, in bits.
_FRAME = 20.0
# One frequency in the packed head, in bits, as merging counts on it; the grid of the frequencies decides.
_ENTRY, _GAP = 5.0, 0.3
# Groups of more streams are merged part by part: merging takes the square of them.
_TOGETHER = 128

LEVELS: Array = FREQUENCIES.astype(np.int64)


@dataclass(frozen=True)
class Table:
    """Stored frequencies of the symbols from ``lo`` on."""

    lo: int
    codes: bytes

    @property
    def frequencies(self) -> Array:
        """As the coder takes them."""
        return LEVELS[np.frombuffer(self.codes, np.uint8)].astype(np.float64)

    @property
    def parts(self) -> Array:
        """How many of 2^24 parts each symbol has."""
        n = len(self.codes)
        if n == 1:
            return np.array([PARTS])
        before = np.concatenate([[0.0], np.cumsum(self.frequencies)])
        left = np.floor(before * ((PARTS - n) / before[-1])) + np.arange(n + 1)
        left[-1] = PARTS
        return np.diff(left)

    def bits(self, counts: Array, modulus: int) -> float:
        """What symbols take that occur so often; infinite where one of them is not in the table."""
        size = len(self.codes)
        if modulus:
            own = np.roll(counts, -self.lo)
            inside, outside = own[:size], own[size:]
        else:
            inside, outside = counts[self.lo : self.lo + size], counts[self.lo + size :]
            if counts[: self.lo].any():
                return float("inf")
        if outside.any():
            return float("inf")
        parts = self.parts[: len(inside)]
        return float(-(inside * np.log2(parts / PARTS)).sum())


def entropy(counts: Array) -> Array:
    """Empirical entropy in bits of symbols that occur so often, summed over the last axis."""
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum(axis=-1)
    terms = counts * np.log2(np.where(counts > 0, counts, 1.0))
    return np.asarray(total * np.log2(np.where(total > 0, total, 1.0)) - terms.sum(axis=-1))


def stored(counts: Array) -> Array:
    """About what the tables of such counts take in the head, in bits."""
    used = (np.asarray(counts) > 0).sum(axis=-1)
    span = np.asarray(counts).shape[-1]
    dense = _ENTRY * used + _GAP * np.minimum(span - used, used)
    return np.asarray(_FRAME + np.where(used > 1, dense, 2.0))


def make(counts: Array, modulus: int) -> Table:
    """The table that takes fewest bits together with the symbols that it stands for.

    Args:
        counts: How often each symbol occurs.
        modulus: Number of symbols where they are of a ring, so that a table may begin anywhere; else 0.
    """
    used = np.flatnonzero(counts)
    if not len(used):
        return Table(0, b"\1")
    lo = int(used[0])
    size = int(used[-1]) - lo + 1
    if modulus and len(used) > 1:
        gaps = np.diff(np.append(used, used[0] + modulus))
        widest = int(np.argmax(gaps))
        lo = int(used[(widest + 1) % len(used)])
        size = modulus - int(gaps[widest]) + 1
    own = (
        np.roll(counts, -lo)[:size].astype(np.float64)
        if modulus
        else counts[lo : lo + size].astype(np.float64)
    )
    best, least = Table(lo, b"\1"), float("inf")
    if size == 1:
        return best
    for step in (1, 2, 4, 8):
        table = Table(lo, _coarse(own, step))
        cost = table.bits(counts, modulus) + _entries(table.codes)
        if cost < least:
            best, least = table, cost
    return best


def _coarse(counts: Array, step: int) -> bytes:
    """Counts rounded to every ``step``-th level of an octave; what occurs keeps a frequency above 0."""
    scaled = counts * min(1.0, float(LEVELS[-1]) / counts.max())
    grid = np.unique(
        np.concatenate([[0, 1, 2], np.arange(16, 256, step), np.arange(4, 16, max(1, step // 2))])
    )
    grid = np.append(grid, 255) if grid[-1] != 255 else grid
    values = LEVELS[grid].astype(np.float64)
    borders = np.sqrt(np.maximum(values[:-1], 0.5) * values[1:])
    index = np.searchsorted(borders, scaled)
    index = np.where((counts > 0) & (index == 0), 1, np.where(counts > 0, index, 0))
    return grid[index].astype(np.uint8).tobytes()


def _entries(codes: bytes) -> float:
    """About what frequencies take in a packed head: each as one of those that the table has."""
    counts = np.bincount(np.frombuffer(codes, np.uint8))
    kinds = int((counts > 0).sum())
    return float(entropy(counts)) + 1.5 * kinds


def shared(counts: Array) -> Array:
    """Which of these streams take one table together.

    Args:
        counts: (streams, symbols), how often each symbol occurs in each stream.

    Returns:
        (streams,): the number of each one's table, from 0 on.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if len(counts) <= _TOGETHER:
        return _merged(counts)
    order = np.argsort(entropy(counts) / np.maximum(counts.sum(axis=1), 1), kind="stable")
    groups = np.zeros(len(counts), dtype=np.int64)
    many = 0
    for part in np.array_split(order, -(-len(counts) // _TOGETHER)):
        own = _merged(counts[part])
        groups[part] = many + own
        many += int(own.max()) + 1
    sums = np.zeros((many, counts.shape[1]))
    np.add.at(sums, groups, counts)
    again = shared(sums) if many < 0.8 * len(counts) else np.arange(many)
    return np.asarray(again[groups])


def _merged(counts: Array) -> Array:
    """Pairs are merged, the best first, as long as that saves bits."""
    many = len(counts)
    sums = counts.copy()
    cost = entropy(sums) + stored(sums)
    groups = np.arange(many)
    gains = np.full((many, many), -np.inf)
    for i in range(many - 1):
        both = sums[i] + sums[i + 1 :]
        gains[i, i + 1 :] = cost[i] + cost[i + 1 :] - entropy(both) - stored(both)
    while many > 1:
        i, j = divmod(int(np.argmax(gains)), many)
        if gains[i, j] <= 0:
            break
        sums[i] += sums[j]
        cost[i] = entropy(sums[i]) + stored(sums[i])
        groups[groups == j] = i
        gains[j, :] = gains[:, j] = -np.inf
        alive = np.unique(groups)
        alive = alive[alive != i]
        both = sums[i] + sums[alive]
        new = cost[i] + cost[alive] - entropy(both) - stored(both)
        gains[np.minimum(i, alive), np.maximum(i, alive)] = new
    return np.asarray(np.unique(groups, return_inverse=True)[1])
