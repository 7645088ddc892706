"""Finds arrays in bytes of an unknown format by their statistics alone.

Blocks that are coded more cheaply together than apart become one span, the best pairs first; of the tree of
spans that this makes, those are kept that are cheaper coded than left to LZMA (the rule of minimum
description length). So no format has to be known.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass

import numpy as np
import zstandard

from featherweight.bundles.tables import Array, entropy, stored

_BLOCKS = 12000  # of a file at most, so that the counts of all blocks stay below 50 MB
_SMALLEST = 256
_MUCH = 4 << 20  # bytes from which on LZMA takes too long to ask
_LAG = 4370  # bytes that liblzma reads ahead of what it has written
_KINDS = 64  # values of the largest palette that is looked for
_SPAN = 96.0  # bits of a piece in the head


@dataclass(frozen=True)
class Span:
    """Bytes that are an array, as far as one can tell.

    Attributes:
        start: The first byte.
        stop: The byte behind the last.
        width: Bits of an element.
        shape: Of the array, where it is known.
        named: Whether the format told it.
    """

    start: int
    stop: int
    width: int
    shape: tuple[int, ...] = ()
    named: bool = False


class Rest:
    """What LZMA makes of every part of a file, in bits, in the context of all that stands before it.

    Attributes:
        total: Bytes that it makes of all.
    """

    def __init__(self, data: bytes) -> None:
        step = max(_SMALLEST, len(data) >> 14)
        places, sums = _lzma(data, step) if len(data) <= _MUCH else _zstd(data, step)
        self.total = sums[-1]
        self._places, self._sums = np.array(places), np.array(sums, dtype=np.float64)

    def bits(self, start: Array | int, stop: Array | int) -> Array:
        """What LZMA writes for these bytes."""
        low, high = (np.interp(place, self._places, self._sums) for place in (start, stop))
        return np.asarray(8 * (high - low))


def _lzma(data: bytes, step: int) -> tuple[list[int], list[int]]:
    """Places in the data, and how many bytes LZMA has written for all before each."""
    filters = [{"id": lzma.FILTER_LZMA1, "preset": 6, "dict_size": max(4096, len(data))}]
    encoder = lzma.LZMACompressor(format=lzma.FORMAT_RAW, filters=filters)
    written, places, sums = 0, [0], [0]
    view = memoryview(data)
    for at in range(0, len(data), step):
        written += len(encoder.compress(view[at : at + step]))
        if at + step > _LAG:
            places.append(at + step - _LAG)
            sums.append(written)
    total = written + len(encoder.flush())
    if len(data) > places[-1]:
        places.append(len(data))
        sums.append(total)
    return places, sums


def _zstd(data: bytes, step: int) -> tuple[list[int], list[int]]:
    """The same by a quick packer: large files are mostly arrays, of which both make the same."""
    encoder = zstandard.ZstdCompressor(level=3).compressobj()
    written, places, sums = 0, [0], [0]
    view = memoryview(data)
    for at in range(0, len(data), 16 * step):
        written += len(encoder.compress(view[at : at + 16 * step]))
        written += len(encoder.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        places.append(min(at + 16 * step, len(data)))
        sums.append(written)
    return places, sums


def found(data: Array, start: int, stop: int, rest: Rest) -> list[Span]:
    """Arrays between two places of a file, in order.

    Args:
        data: The whole file.
        start: The first byte that may belong to one.
        stop: The byte behind the last.
        rest: What the file takes where it is not coded.
    """
    begin = -(-start // 4) * 4
    size = _SMALLEST
    while (stop - begin) // size > _BLOCKS:
        size *= 2
    many = (stop - begin) // size
    if many < 2:
        return []
    blocks = data[begin : begin + many * size].reshape(many, size // 4, 4)
    counts = np.empty((many, 4, 256), dtype=np.float32)
    for phase in range(4):
        keys = blocks[:, :, phase].astype(np.int64) + 256 * np.arange(many)[:, None]
        counts[:, phase] = np.bincount(keys.ravel(), minlength=256 * many).reshape(many, 256)
    edges = begin + size * np.arange(many + 1)
    chosen = _tree(counts, edges, rest)
    return [_placed(data, one, start, stop, size) for one in chosen]


def _costs(counts: Array) -> tuple[Array, Array]:
    """For each block the bits of the cheapest coding, and the width of its elements."""
    total = counts.sum(axis=(1, 2))
    planes = [
        counts.sum(axis=1)[:, None],
        counts[:, :2] + counts[:, 2:],
        counts,
    ]
    costs = [
        np.minimum(entropy(one) + stored(one), (8 * total / one.shape[1])[:, None]).sum(axis=1)
        for one in planes
    ]
    whole = counts.sum(axis=1).reshape(-1, 16, 16)
    halves = whole.sum(axis=1) + whole.sum(axis=2)
    costs.append(entropy(halves) + stored(halves))
    costs += [_palette(one, width) for one, width in zip(planes[1:], (16, 32), strict=True)]
    all_ = np.stack(costs, axis=1)
    index = all_.argmin(axis=1)
    return all_.min(axis=1) + _SPAN, np.array([8, 16, 32, 4, 16, 32])[index]


def _palette(planes: Array, width: int) -> Array:
    """The least that codes of a palette can take: the byte that tells most, and as many values as it has."""
    kinds = (planes > 0).sum(axis=2).max(axis=1)
    codes = (entropy(planes) + stored(planes)).max(axis=1)
    return np.asarray(np.where(kinds <= _KINDS, codes + kinds * width, np.inf))


@dataclass(eq=False)
class _Node:
    bits: float
    spans: tuple[Span, ...]


def _tree(counts: Array, edges: Array, rest: Rest) -> list[Span]:
    """Merges neighbours as long as that saves bits, then takes what is cheaper than the rest."""
    starts, stops = edges[:-1], edges[1:]
    costs, widths = _costs(counts)
    apart = rest.bits(starts, stops)
    nodes = [_Node(float(bits), ()) for bits in apart]
    for i, node in enumerate(nodes):
        _keep(node, costs[i], int(widths[i]), int(starts[i]), int(stops[i]), apart[i])
    gains = _gains(counts, costs, np.arange(len(counts) - 1))
    while len(nodes) > 1 and gains.max() > 0:
        take = _pairs(gains)
        counts[take] += counts[take + 1]
        stops = stops.copy()
        stops[take] = stops[take + 1]
        kept = np.ones(len(nodes), dtype=bool)
        kept[take + 1] = False
        costs[take], widths[take] = _costs(counts[take])
        for i in take.tolist():
            both = _Node(nodes[i].bits + nodes[i + 1].bits, nodes[i].spans + nodes[i + 1].spans)
            left_out = float(rest.bits(int(starts[i]), int(stops[i])))
            _keep(both, costs[i], int(widths[i]), int(starts[i]), int(stops[i]), left_out)
            nodes[i] = both
        nodes = [node for node, keep in zip(nodes, kept, strict=True) if keep]
        changed = np.zeros(len(kept), dtype=bool)
        changed[take] = True
        counts, costs, widths, starts, stops, changed, gains = (
            one[kept] for one in (counts, costs, widths, starts, stops, changed, np.append(gains, 0.0))
        )
        gains = gains[:-1]
        again = np.flatnonzero(changed[:-1] | changed[1:])
        gains[again] = _gains(counts, costs, again)
    return [span for node in nodes for span in node.spans]


def _gains(counts: Array, costs: Array, which: Array) -> Array:
    """Bits that are saved where a block and the next one become one."""
    return np.asarray(costs[which] + costs[which + 1] - _costs(counts[which] + counts[which + 1])[0])


def _pairs(gains: Array) -> Array:
    """Which blocks are merged with the next one: the better half of those that gain, none twice."""
    good = np.flatnonzero(gains > 0)
    order = good[np.argsort(-gains[good], kind="stable")][: len(good) // 2 + 1]
    free = np.ones(len(gains) + 1, dtype=bool)
    taken = []
    for i in order.tolist():
        if free[i] and free[i + 1]:
            free[i] = free[i + 1] = False
            taken.append(i)
    return np.array(sorted(taken))


def _keep(node: _Node, coded: float, width: int, start: int, stop: int, rest: float) -> None:
    """A node is what its parts are, or one span, or none."""
    if rest < node.bits:
        node.bits, node.spans = rest, ()
    if coded < node.bits:
        node.bits, node.spans = coded, (Span(start, stop, width),)


def _placed(data: Array, span: Span, low: int, high: int, block: int) -> Span:
    """The span with its ends moved to where its statistics end, at most by a block."""
    size = 1 if span.width < 8 else span.width // 8
    inside = data[span.start : span.stop]
    share = np.stack([_share(inside[i::size]) for i in range(size)])
    ends = []
    for edge, sign in ((span.start, -1), (span.stop, 1)):
        first, last = max(low, edge - block), min(high, edge + block)
        if edge in (low, high) or last - first < 2:
            ends.append(edge)
            continue
        window = data[first:last]
        outer = (
            data[max(low, edge - 2 * block) : edge] if sign < 0 else data[edge : min(high, edge + 2 * block)]
        )
        mine = np.log2(share[(np.arange(first, last) - span.start) % size, window])
        other = np.log2(_share(outer)[window])
        scores = np.concatenate([[0.0], np.cumsum(mine - other)]) * sign
        ends.append(first + int(scores.argmax()))
    start, stop = ends
    start = span.start + (start - span.start) // size * size
    if start < low:
        start += size
    return Span(start, stop, span.width) if stop - start >= size else span


def _share(values: Array) -> Array:
    counts = np.bincount(values, minlength=256) + 0.05
    return np.asarray(counts / counts.sum())
