"""Takes a file apart into the rest and pieces that are coded: arrays that its format names, and others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from featherweight.bundles import spans
from featherweight.bundles.forms import Piece, against, best, plain, priced
from featherweight.bundles.spans import Rest, Span
from featherweight.bundles.tables import Array, shared, stored

_LEAST = 96  # bytes: smaller arrays stay in the rest
_NEAR = 4096  # bytes between found arrays that may be one
_GAP = 1024  # bytes between arrays of which the format says nothing, where more may be found
_SAVED = 160.0  # bits that a piece has to save: the rest loses what stood before it


@dataclass(frozen=True, eq=False)
class Plan:
    """A file and its pieces, in order; what lies between them is the rest.

    Attributes:
        data: The file.
        pieces: What is coded or stored apart.
        whole: About the bytes that LZMA makes of all of it.
    """

    data: Array
    pieces: tuple[Piece, ...]
    whole: int = 0

    def rest(self) -> bytes:
        """All bytes that belong to no piece."""
        parts, at = [], 0
        for piece in self.pieces:
            parts.append(self.data[at : piece.start])
            at = piece.stop
        return b"".join(part.tobytes() for part in [*parts, self.data[at:]])


@dataclass(frozen=True, eq=False)
class Before:
    """A file of the bundle that readers have.

    Attributes:
        path: Its place there.
        data: Its bytes.
        named: Arrays that its format names.
    """

    path: str
    data: bytes
    named: Sequence[Span] = ()

    def places(self, spans: Sequence[Span]) -> list[list[int]]:
        """Where in it each of these may begin: at its own place, and where one of the same shape does."""
        known: dict[tuple[int, int, tuple[int, ...]], list[int]] = {}
        for one in sorted(self.named, key=lambda one: one.start, reverse=True):
            known.setdefault((one.stop - one.start, one.width, one.shape), []).append(one.start)
        found = []
        for span in spans:
            alike = known.get((span.stop - span.start, span.width, span.shape)) if span.named else None
            places = dict.fromkeys([span.start, *([alike.pop()] if alike else [])])
            found.append([at for at in places if at + span.stop - span.start <= len(self.data)])
        return found


def planned(data: bytes, named: Sequence[Span], before: Before | None = None) -> Plan:
    """The pieces of a file that take fewer bits than LZMA leaves of them.

    Args:
        data: The file.
        named: Arrays that its format names; they may be wrong.
        before: The same file of the bundle that this one updates.
    """
    view = np.frombuffer(data, np.uint8)
    if len(view) < _LEAST:
        return Plan(view, ())
    rest = Rest(data)
    chosen = [span for span in _apart(_spans(view, named, rest)) if span.stop - span.start >= _LEAST]
    joint = _joint([plain(view[span.start : span.stop], span.start, span.width) for span in chosen])
    pieces = []
    places = before.places(chosen) if before is not None else [[] for _ in chosen]
    for span, together, own in zip(chosen, joint, places, strict=True):
        tried = [_cheapest(view, span), together, *_updates(view, span, before, own)]
        piece = min(tried, key=lambda one: one.bits + 8 * (span.stop - one.stop))
        if piece.bits + _SAVED < float(rest.bits(piece.start, piece.stop)):
            pieces.append(piece)
    told = {span.start for span in chosen if span.named}
    return Plan(view, tuple(_united(view, pieces, told, rest)), rest.total)


def _updates(view: Array, span: Span, before: Before | None, places: Sequence[int]) -> Iterator[Piece]:
    """The span as what changed since."""
    if before is None:
        return
    for at in places:
        old = np.frombuffer(before.data, np.uint8)[at : at + span.stop - span.start]
        base = (before.path, at)
        update = against(view[span.start : span.stop], old, span.start, span.width, span.shape, base)
        if update is not None:
            yield update


def _united(view: Array, pieces: Sequence[Piece], told: Set[int], rest: Rest) -> Iterator[Piece]:
    """Neighbours that were found, and what lies between them, as one where that is cheaper."""
    at = 0
    while at < len(pieces):
        last = at
        while last + 1 < len(pieces) and not {pieces[last].start, pieces[last + 1].start} & told:
            gap = pieces[last + 1].start - pieces[last].stop
            if gap > _NEAR + (pieces[last].stop - pieces[at].start) // 4:
                break
            last += 1
        run = pieces[at : last + 1]
        if len(run) > 1:
            span = Span(run[0].start, run[-1].stop, max(run, key=lambda one: one.stop - one.start).width)
            apart = sum(one.bits for one in run)
            apart += sum(float(rest.bits(a.stop, b.start)) for a, b in pairwise(run))
            one = _cheapest(view, span)
            if one.bits + 8 * (one.start - span.start + span.stop - one.stop) < apart:
                run = [one]
        yield from run
        at = last + 1


def _apart(found: Sequence[Span]) -> Iterator[Span]:
    """The spans without what overlaps."""
    at = 0
    for span in found:
        yield span if span.start >= at else _behind(span, at)
        at = max(at, span.stop)


def _joint(pieces: Sequence[Piece]) -> list[Piece]:
    """Plain pieces at their price when they share tables: many small arrays pay for one together."""
    bits: dict[tuple[int, int], float] = {}
    for many in sorted({piece.planes[0].contexts[0].many for piece in pieces}):
        keys = [
            (i, k)
            for i, piece in enumerate(pieces)
            for k, plane in enumerate(piece.planes)
            if plane.contexts[0].many == many
        ]
        counts = np.stack([pieces[i].planes[k].contexts[0].counts for i, k in keys])
        which = shared(counts)
        for group in range(int(which.max()) + 1):
            own = np.flatnonzero(which == group)
            sums = counts[own].sum(axis=0)
            share = -np.log2(np.maximum(sums, 1e-9) / sums.sum())
            each = (counts[own] * share).sum(axis=1)
            table = float(stored(sums)) * counts[own].sum(axis=1) / sums.sum()
            for row, cost in zip(own.tolist(), (each + table).tolist(), strict=True):
                bits[keys[row]] = cost
    return [priced(piece, [bits[i, k] for k in range(len(piece.planes))]) for i, piece in enumerate(pieces)]


def _behind(span: Span, at: int) -> Span:
    """The part of a span from ``at`` on, in whole elements."""
    size = max(1, span.width // 8)
    start = span.start + -(-(at - span.start) // size) * size
    return Span(min(start, span.stop), span.stop, span.width)


def _spans(view: Array, named: Sequence[Span], rest: Rest) -> list[Span]:
    """Named arrays, and those found between them."""
    found, at = [], 0
    for span in sorted(named, key=lambda span: (span.start, span.start - span.stop)):
        if span.start < at or span.stop > len(view) or span.stop <= span.start:
            continue
        if span.start - at >= _GAP:
            found += spans.found(view, at, span.start, rest)
        found.append(replace(span, named=True))
        at = span.stop
    if len(view) - at >= _GAP:
        found += spans.found(view, at, len(view), rest)
    return found


def _cheapest(view: Array, span: Span) -> Piece:
    """The cheapest piece in a span; where it was found, elements may begin at any of its first bytes."""
    size = 1 if span.named else max(1, span.width // 8)
    tried = []
    for shift in range(size):
        part = view[span.start + shift : span.stop]
        piece = best(part, span.start + shift, span.width, span.shape, others=True)
        if piece is not None:
            tried.append(piece)
    return min(tried, key=lambda piece: piece.bits + 8 * (span.stop - piece.stop))


def only(plan: Plan, share: float) -> Plan:
    """The same file with those pieces coded that shrink to so much of their size, or less."""
    kept = tuple(piece for piece in plan.pieces if piece.bits <= 8 * share * (piece.stop - piece.start))
    return replace(plan, pieces=kept)
