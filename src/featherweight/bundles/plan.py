"""Takes a file apart into the rest and pieces that are coded: arrays that its format names, and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from featherweight.bundles import spans
from featherweight.bundles.forms import Piece, against, best
from featherweight.bundles.spans import Rest, Span
from featherweight.bundles.tables import Array

_LEAST = 96  # bytes: smaller arrays stay in the rest
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


def planned(data: bytes, named: Sequence[Span], path: str, base: Mapping[str, bytes]) -> Plan:
    """The pieces of a file that take fewer bits than LZMA leaves of them.

    Args:
        data: The file.
        named: Arrays that its format names; they may be wrong.
        path: Of the file in the bundle.
        base: Artifact files of the bundle that this one updates.
    """
    view = np.frombuffer(data, np.uint8)
    if len(view) < _LEAST:
        return Plan(view, ())
    rest = Rest(data)
    pieces = []
    at = 0
    old = base.get(path)
    for span in _spans(view, named, rest):
        if span.start < at:
            span = _behind(span, at)
        if span.stop - span.start < _LEAST:
            continue
        piece = _cheapest(view, span, path, old)
        if piece is None or piece.bits + _SAVED > float(rest.bits(piece.start, piece.stop)):
            continue
        pieces.append(piece)
        at = piece.stop
    return Plan(view, tuple(pieces), rest.total)


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
        found.append(span)
        at = span.stop
    if len(view) - at >= _GAP:
        found += spans.found(view, at, len(view), rest)
    return found


def _cheapest(view: Array, span: Span, path: str, old: bytes | None) -> Piece | None:
    """The cheapest piece in a span; where it was found, elements may begin at any of its first bytes."""
    known = bool(span.shape)
    size = 1 if known else max(1, span.width // 8)
    tried = []
    for shift in range(size):
        part = view[span.start + shift : span.stop]
        piece = best(part, span.start + shift, span.width, span.shape, others=True)
        if piece is not None:
            tried.append(piece)
    if old is not None and span.stop <= len(old):
        before = np.frombuffer(old, np.uint8)[span.start : span.stop]
        update = against(
            view[span.start : span.stop], before, span.start, span.width, span.shape, (path, span.start)
        )
        if update is not None:
            tried.append(update)
    return min(tried, key=lambda piece: piece.bits + 8 * (span.stop - piece.stop), default=None)


def without(plan: Plan) -> Plan:
    """The same file with nothing coded."""
    return replace(plan, pieces=())
