"""Ways to write an array of bytes as a piece of a bundle, and the cheapest of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from featherweight.bundles.contexts import Contexts, Map, of_positions, of_rows, periods
from featherweight.bundles.tables import Array, entropy, stored

# A coded byte costs a reader time; a plane is coded only where this share of it goes away.
_WORTH = 0.996
# Contexts of values are slower to read than one table for all.
_ROWS_WORTH = 0.99
_PIECE = 40.0  # bits of a piece in the head beside its planes
_PLANE = 16.0  # of a plane without contexts
_MANY = 100_000  # elements up to which all ways to see an array as a matrix are tried
_COUNT = 1 << 24  # classes that a map may list
_BYTES = 128  # the same of bytes
_PALETTE = 4096  # values of the largest palette that is tried


@dataclass(frozen=True, eq=False)
class Stream:
    """Symbols that are coded one behind the other by one table.

    Attributes:
        symbols: What is coded.
        many: How many symbols there are.
        ring: Whether the first follows the last.
    """

    symbols: Array
    many: int
    ring: bool
    counts: Array = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", np.bincount(self.symbols, minlength=self.many))

    @property
    def modulus(self) -> int:
        """Number of symbols of a ring, else 0."""
        return self.many if self.ring else 0


@dataclass(frozen=True, eq=False)
class Plane:
    """How one plane is stored.

    Attributes:
        bits: About what it takes, tables and head included.
        raw: Its bytes, where it is not coded.
        maps: Classes of its elements.
        contexts: What is coded of each pair of classes.
        zero: The value that is coded apart from the others, where it is.
        others: The values that are not ``zero``.
    """

    bits: float
    raw: bytes | None = None
    maps: tuple[Map | None, Map | None] = (None, None)
    contexts: tuple[Stream, ...] = ()
    zero: int | None = None
    others: Stream | None = None

    def streams(self) -> Iterator[Stream]:
        """In the order of the codes."""
        for one in self.maps:
            if one is not None:
                yield Stream(one.classes, one.many, False)
        yield from self.contexts
        if self.others is not None:
            yield self.others


@dataclass(frozen=True, eq=False)
class Piece:
    """An array inside a file: ``n`` elements of ``width`` bits from byte ``start`` on."""

    start: int
    n: int
    width: int
    rotated: bool
    palette: bytes | None
    base: tuple[str, int] | None
    planes: tuple[Plane, ...]
    bits: float

    @property
    def stop(self) -> int:
        """The byte behind it."""
        return self.start + self.n * self.width // 8


def planes_of(data: Array, width: int, rotated: bool) -> list[Array]:
    """The planes of elements, the least significant byte first.

    Args:
        data: Bytes of whole elements.
        width: Bits of an element: 1, 2, 4, 8, 16 or 32.
        rotated: Whether each is rotated left by one bit.
    """
    if width < 8:
        each = 8 // width
        parts = np.empty((len(data), each), dtype=np.uint8)
        for i in range(each):
            parts[:, i] = (data >> (i * width)) & ((1 << width) - 1)
        return [parts.ravel()]
    size = width // 8
    if rotated:
        words = data.view(f"<u{size}")
        data = ((words << 1) | (words >> (width - 1))).astype(f"<u{size}").view(np.uint8)
    return [np.ascontiguousarray(data[i::size]) for i in range(size)]


def best(
    data: Array, start: int, width: int, shape: Sequence[int] = (), *, others: bool = True
) -> Piece | None:
    """The cheapest piece for these bytes.

    Args:
        data: The bytes; what is behind the last whole element does not belong to the piece.
        start: Where they begin in the file.
        width: Bits of an element, as far as it is known.
        shape: Of the array, where it is known.
        others: Whether other widths are tried, too.

    Returns:
        The piece, or None where there is no whole element.
    """
    tried: list[Piece] = []
    for own in dict.fromkeys((width, *((8, 16, 32, 4) if others else ()))):
        part = data[: len(data) // max(1, own // 8) * max(1, own // 8)]
        if not len(part):
            continue
        for rotated in (False, True) if own >= 16 else (False,):
            planes = planes_of(part, own, rotated)
            stored_ = tuple(_plane(values, 1 << min(own, 8), own >= 8, ()) for values in planes)
            tried.append(_piece(start, own, rotated, None, None, stored_, len(planes[0])))
        tried.extend(_palettes(part, start, own, _lengths(shape) if own == width else ()))
    if not tried:
        return None
    tried.sort(key=_density)
    near = [one for one in tried[:2] if _density(one) <= 1.1 * _density(tried[0])]
    return min((_refined(one, shape if one.width == width else ()) for one in near), key=_density)


def _density(piece: Piece) -> float:
    """Bits of each byte that a piece stands for."""
    return piece.bits / (piece.stop - piece.start)


def plain(data: Array, start: int, width: int) -> Piece:
    """The piece with one table for each plane, whatever that costs alone; streams may share a table later."""
    part = data[: len(data) // max(1, width // 8) * max(1, width // 8)]
    planes = planes_of(part, width, width >= 16)
    streams = [Stream(values, 1 << min(width, 8), True) for values in planes]
    stored_ = tuple(Plane(float(entropy(one.counts)), contexts=(one,)) for one in streams)
    return _piece(start, width, width >= 16, None, None, stored_, len(planes[0]))


def priced(piece: Piece, bits: Sequence[float]) -> Piece:
    """A plain piece whose planes take so many bits, those that do not pay as bytes."""
    planes = []
    for plane, cost in zip(piece.planes, bits, strict=True):
        if piece.width >= 8 and cost + _PLANE > 8 * piece.n * _WORTH:
            planes.append(Plane(8.0 * piece.n + _PLANE, raw=plane.contexts[0].symbols.tobytes()))
        else:
            planes.append(replace(plane, bits=cost + _PLANE))
    return _piece(piece.start, piece.width, piece.rotated, None, None, tuple(planes), piece.n)


def against(
    data: Array, old: Array, start: int, width: int, shape: Sequence[int], base: tuple[str, int]
) -> Piece | None:
    """The cheapest piece for these bytes as differences from those of a base."""
    tried = []
    for own in dict.fromkeys((width, 8, 16, 32, 4)):
        size = max(1, own // 8)
        whole = min(len(data), len(old)) // size * size
        for rotated in (False, True) if own >= 16 else (False,):
            pairs = zip(
                planes_of(data[:whole], own, rotated), planes_of(old[:whole], own, rotated), strict=True
            )
            many = 1 << min(own, 8)
            values = [(new - before) & np.uint8(many - 1) for new, before in pairs]
            if not values or not len(values[0]):
                continue
            lengths = _lengths(shape) if own == width else ()
            stored_ = tuple(_plane(one, many, own >= 8, lengths) for one in values)
            tried.append(_piece(start, own, rotated, None, base, stored_, len(values[0])))
    return min(tried, key=_density, default=None)


def _piece(
    start: int,
    width: int,
    rotated: bool,
    palette: bytes | None,
    base: tuple[str, int] | None,
    planes: tuple[Plane, ...],
    n: int,
) -> Piece:
    bits = _PIECE + sum(plane.bits for plane in planes) + 8 * len(palette or b"")
    if base is not None:
        bits += 32
    return Piece(start, n, width, rotated, palette, base, planes, bits)


def _lengths(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements of a row for each way to see an array as a matrix."""
    found = []
    for axis in range(1, len(shape)):
        length = int(np.prod(shape[axis:]))
        rows = int(np.prod(shape[:axis]))
        if length > 1 and rows > 1:
            found.append(length)
    return tuple(dict.fromkeys(found))


def _refined(piece: Piece, shape: Sequence[int]) -> Piece:
    """The same piece with contexts and zeros apart, where that is cheaper."""
    if piece.palette is not None and shape:
        return piece
    planes = []
    for old in piece.planes:
        if old.raw is not None or len(old.contexts) != 1:
            planes.append(old)
            continue
        stream = old.contexts[0]
        lengths = _lengths(shape) or periods(stream.symbols)
        raw = piece.width >= 8 and piece.palette is None
        planes.append(_plane(stream.symbols, stream.many, raw, lengths, ring=stream.ring))
    return _piece(piece.start, piece.width, piece.rotated, piece.palette, None, tuple(planes), piece.n)


def _palettes(data: Array, start: int, width: int, lengths: Sequence[int]) -> Iterator[Piece]:
    """The piece as codes of its few distinct values."""
    if width < 8:
        return
    values = data.view(f"<u{width // 8}")
    if width > 8 and len(values) > 1 << 14 and len(np.unique(values[:: len(values) >> 13])) > _PALETTE // 2:
        return
    if width == 8:
        all_ = np.bincount(values, minlength=256)
        kinds = np.flatnonzero(all_).astype(np.uint8)
        if len(kinds) > _BYTES:
            return
        codes, counts = (np.cumsum(all_ > 0) - 1)[values], all_[kinds]
    else:
        kinds, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(kinds) > _PALETTE or 2 * len(kinds) > len(values):
        return
    order = np.argsort(-counts, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    small = np.uint8 if len(kinds) <= 256 else np.uint16
    plane = _plane(rank[codes].astype(small), len(kinds), False, lengths, ring=False)
    yield _piece(start, width, False, kinds[order].tobytes(), None, (plane,), len(values))


def _plane(values: Array, many: int, raw: bool, lengths: Sequence[int], *, ring: bool = True) -> Plane:
    """The cheapest way to store a plane.

    Args:
        values: Its elements, below ``many``.
        many: How many symbols there are.
        raw: Whether it may lie there as bytes.
        lengths: Elements of a row, for each way to see the plane as a matrix.
        ring: Whether values are taken modulo ``many``.
    """
    counts = np.bincount(values, minlength=many)
    plain = float(entropy(counts) + stored(counts)) + _PLANE
    if raw and plain > 8 * len(values) * _WORTH:
        return Plane(8.0 * len(values) + _PLANE, raw=values.astype(np.uint8).tobytes())
    zero = int(counts.argmax())
    lengths = [length for length in lengths if 1 < length <= min(len(values) // 2, _COUNT)]
    chosen: tuple[float, Contexts | None, bool] = (plain, None, False)
    for length in lengths if len(values) <= _MANY else lengths[:1]:
        for rows in (
            of_rows(values, length, -(-len(values) // length), many),
            of_rows(values, 1, length, many),
        ):
            if rows is not None and rows.bits + _PLANE < min(chosen[0], plain * _ROWS_WORTH):
                chosen = (rows.bits + _PLANE, rows, False)
        if counts[zero] >= 0.3 * len(values) and counts[zero] < len(values):
            found = of_positions(values != zero, length)
            rest = np.where(np.arange(many) == zero, 0, counts)
            if found is not None:
                bits = found.bits + float(entropy(rest) + stored(rest)) + _PLANE + 16
                if bits < min(chosen[0], plain * _ROWS_WORTH):
                    chosen = (bits, found, True)
    bits, found, split = chosen
    if found is None:
        return Plane(plain, contexts=(Stream(values, many, ring),))
    return _with_contexts(values, many, ring, found, zero if split else None, bits)


def _with_contexts(
    values: Array, many: int, ring: bool, found: Contexts, zero: int | None, bits: float
) -> Plane:
    where = np.zeros(len(values), dtype=np.int64)
    if found.first is not None:
        where += found.first.of(len(values)).astype(np.int64) * (found.second.many if found.second else 1)
    if found.second is not None:
        where += found.second.of(len(values))
    contexts = (found.first.many if found.first else 1) * (found.second.many if found.second else 1)
    shown = values if zero is None else (values != zero).astype(np.uint8)
    symbols, circular = (many, ring) if zero is None else (2, False)
    streams = tuple(Stream(shown[where == i], symbols, circular) for i in range(contexts))
    others = None if zero is None else Stream(values[values != zero], many, ring)
    return Plane(bits, None, (found.first, found.second), streams, zero, others)
