"""Contexts of a plane: its rows and columns in classes, each pair of which has statistics of its own.

A pruned layer has rows and columns of very different density (a neuron that is nearly dead, a pixel at the
border), and rows of integers differ in spread. Classes are found by turns: the best columns for the rows as
they are, then the best rows for these columns (Dhillon et al., "Information-theoretic co-clustering", 2003).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featherweight.bundles.tables import Array, entropy, stored

# How many classes of rows and of columns are tried.
_PAIRS = (
    (2, 1),
    (4, 1),
    (8, 1),
    (1, 2),
    (1, 4),
    (1, 8),
    (2, 2),
    (4, 4),
    (8, 4),
    (4, 8),
    (8, 8),
    (16, 8),
    (8, 16),
    (16, 16),
)
_ROWS = (2, 4, 8, 16)
_TURNS = 6
_TELLS = 0.01  # share of the bits that lines must tell apart beyond what chance alone does
_HEARD = 1 << 19  # elements in which a row's length is looked for
_LINE = 48.0  # bits that a map takes in the head beside its classes
_INDEX = 4.0  # bits that the index of a table takes there


@dataclass(frozen=True, eq=False)
class Map:
    """Classes of elements: element i is of class ``classes[(i // inner) % len(classes)]``."""

    inner: int
    classes: Array

    @property
    def many(self) -> int:
        """How many classes there are."""
        return int(self.classes.max()) + 1

    def of(self, n: int) -> Array:
        """The class of each of ``n`` elements."""
        return self.classes[(np.arange(n) // self.inner) % len(self.classes)]

    @property
    def bits(self) -> float:
        """About what it takes, with its table."""
        counts = np.bincount(self.classes)
        return float(entropy(counts)) + float(stored(counts)) + _LINE


@dataclass(frozen=True, eq=False)
class Contexts:
    """One or two maps, and the bits of all that they tell apart."""

    first: Map | None
    second: Map | None
    bits: float


def contexts_bits(counts: Array) -> float:
    """Bits of the symbols of all contexts, (contexts, symbols), with their tables and the tables' indices."""
    kept = counts[counts.sum(axis=1) > 0]
    return float(entropy(kept).sum() + stored(kept).sum() + _INDEX * len(counts))


def of_positions(mask: Array, length: int) -> Contexts | None:
    """Rows and columns in classes by how dense they are.

    Args:
        mask: Which elements are set.
        length: Elements of a row.

    Returns:
        The cheapest found, or None where no row or column tells anything.
    """
    rows = -(-len(mask) // length)
    if rows < 2 or length < 2:
        return None
    flat = np.zeros(rows * length, dtype=np.float32)
    flat[: len(mask)] = mask
    inside = np.ones(rows * length, dtype=np.float32)
    inside[len(mask) :] = 0
    ones, there = (one.reshape(rows, length) for one in (flat, inside))
    if not (_tells(ones, there, 1) or _tells(ones, there, 0)):
        return None
    best: Contexts | None = None
    for first, second in _PAIRS:
        if first > rows or second > length:
            continue
        found = _turned(ones, there, first, second)
        if found is not None and (best is None or found.bits < best.bits):
            best = found
    return best


def _tells(ones: Array, there: Array, axis: int) -> bool:
    """Whether lines differ by more than chance: chance alone lowers their entropy by 0.72 bits each."""
    set_, all_ = ones.sum(axis=axis, dtype=np.float64), there.sum(axis=axis, dtype=np.float64)
    lines = entropy(np.stack([set_, all_ - set_], axis=1)).sum()
    total = entropy(np.array([set_.sum(), (all_ - set_).sum()]))
    return bool(total - lines > 0.8 * len(set_) + 2 * _LINE)


def _turned(ones: Array, there: Array, first: int, second: int) -> Contexts | None:
    length = ones.shape[1]
    row = _ranked(ones.sum(1) / np.maximum(there.sum(1), 1), first)
    column = _ranked(ones.sum(0) / np.maximum(there.sum(0), 1), second)
    for _ in range(_TURNS):
        if first > 1:
            row = _assigned(ones, there, row, column)
        if second > 1:
            column = _assigned(ones.T, there.T, column, row)
    row, column = (np.unique(part, return_inverse=True)[1] for part in (row, column))
    a, b = _hot(row), _hot(column)
    set_ = (a.T @ ones @ b).astype(np.float64).ravel()
    all_ = (a.T @ there @ b).astype(np.float64).ravel()
    maps = (
        Map(length, row.astype(np.uint8)) if row.max() else None,
        Map(1, column.astype(np.uint8)) if column.max() else None,
    )
    bits = contexts_bits(np.stack([all_ - set_, set_], axis=1)) + sum(one.bits for one in maps if one)
    return Contexts(*maps, bits) if any(maps) else None


def _ranked(density: Array, many: int) -> Array:
    """Lines in classes of equal size, by density."""
    order = np.empty(len(density), dtype=np.int64)
    order[np.argsort(density, kind="stable")] = np.arange(len(density))
    return order * many // len(density)


def _hot(classes: Array) -> Array:
    hot = np.zeros((len(classes), int(classes.max()) + 1), dtype=np.float32)
    hot[np.arange(len(classes)), classes] = 1
    return hot


def _assigned(ones: Array, there: Array, own: Array, other: Array) -> Array:
    """Each line in the class that codes it best."""
    hot = _hot(other)
    set_, all_ = ones @ hot, there @ hot
    mine = _hot(own)
    dense = (mine.T @ set_ + 0.4) / (mine.T @ all_ + 0.8)
    cost = -(set_ @ np.log2(dense).T + (all_ - set_) @ np.log2(1 - dense).T)
    cost -= np.log2((mine.sum(0) + 0.5) / len(own))
    return np.asarray(cost.argmin(axis=1))


def periods(values: Array) -> tuple[int, ...]:
    """Lengths of a row that the distances between like values tell, the most likely first.

    Columns of their own density make a sequence of rows resemble itself a row later (autocorrelation by FFT).
    """
    part = values[:_HEARD]
    if len(part) < 256:
        return ()
    signal = (part != np.bincount(part).argmax()).astype(np.float32)
    if not 0.02 < signal.mean() < 0.98:
        return ()
    signal -= signal.mean()
    size = 1 << (2 * len(part) - 1).bit_length()
    power = np.abs(np.fft.rfft(signal, size)) ** 2
    like = np.fft.irfft(power, size)[: len(part) // 3]
    like /= like[0] + 1e-9
    like[:2] = 0
    chance = 5 / np.sqrt(len(part))
    peaks = np.flatnonzero((like > chance) & (like >= np.roll(like, 1)) & (like >= np.roll(like, -1)))
    if not len(peaks):
        return ()
    high = peaks[like[peaks] > 0.7 * like[peaks].max()]
    return tuple(dict.fromkeys([int(high[0]), *(int(one) for one in peaks[np.argsort(-like[peaks])][:2])]))


def of_rows(values: Array, inner: int, count: int, symbols: int) -> Contexts | None:
    """Lines of values in classes by their statistics.

    Args:
        values: Elements below ``symbols``.
        inner: Elements that lie one behind the other in a line.
        count: Lines; behind the last one the first comes again.
        symbols: How many symbols there are.
    """
    if count < 2 or count * symbols > 1 << 23:
        return None
    line = (np.arange(len(values)) // inner) % count
    counts = (
        np.bincount(line * symbols + values, minlength=count * symbols)
        .reshape(count, symbols)
        .astype(np.float32)
    )
    counts = counts[:, counts.any(axis=0)]
    alone = entropy(counts.sum(axis=0))
    chance = 0.72 * float((counts > 0).sum() - count)
    if float(alone - entropy(counts).sum()) - chance < _TELLS * float(alone):
        return None
    best: Contexts | None = None
    for many in _ROWS:
        if many > count:
            break
        own = _ranked(entropy(counts) / np.maximum(counts.sum(1), 1), many)
        for _ in range(_TURNS):
            hot = _hot(own)
            sums = hot.T @ counts + 0.05
            share = np.log2(sums / sums.sum(1, keepdims=True))
            cost = -(counts @ share.T) - np.log2((hot.sum(0) + 0.5) / count)
            own = cost.argmin(axis=1)
        own = np.unique(own, return_inverse=True)[1]
        if not own.max():
            continue
        line_map = Map(inner, own.astype(np.uint8))
        bits = contexts_bits((_hot(own).T @ counts).astype(np.float64)) + line_map.bits
        if best is None or bits < best.bits:
            best = Contexts(line_map, None, bits)
    return best
