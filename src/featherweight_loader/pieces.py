"""What the head tells of a piece: an array of a file, its planes, and how each of them is coded."""

from __future__ import annotations

from dataclasses import dataclass

from featherweight_loader.errors import DamagedBundle
from featherweight_loader.paths import check_path
from featherweight_loader.reader import Reader

_ROTATED, _PALETTE, _DELTA = 8, 16, 32
_MAP_A, _MAP_B = 1, 2
_COUNT, _CLASSES, _COLOURS = 1 << 24, 16, 65536
_STORED, _CODED, _SPLIT = range(3)


@dataclass(frozen=True)
class Map:
    """Which context an element is of: class ``(i // inner) mod count``, coded by a table."""

    inner: int
    count: int
    classes: int
    table: int


@dataclass(frozen=True)
class Coding:
    """How one plane is coded; ``maps`` are A and B, ``split`` is the common value and the others' table."""

    maps: tuple[Map | None, Map | None]
    tables: tuple[int, ...]
    split: tuple[int, int] | None = None


@dataclass(frozen=True)
class Piece:
    """An array of ``n`` elements of ``bits`` bits.

    Attributes:
        planes: A coding for each plane, None for one whose bytes are stored.
        palette: The values of the codes, in bytes; None where the planes hold the elements themselves.
        base: Path and offset of the bytes in the base that are to be added.
    """

    n: int
    bits: int
    rotated: bool
    planes: tuple[Coding | None, ...]
    palette: bytes | None = None
    base: tuple[str, int] | None = None

    @property
    def bytes(self) -> int:
        """Of the array in its file."""
        return self.n * self.bits // 8

    @property
    def raw_bytes(self) -> int:
        """Of the planes that are stored."""
        return self.n * sum(plane is None for plane in self.planes)

    @property
    def coded(self) -> bool:
        """Whether any plane is in the codes."""
        return any(plane is not None for plane in self.planes)


def read_piece(read: Reader, tables: int) -> Piece:
    """The next piece of a head that has so many tables.

    Raises:
        DamagedBundle: It is against the format.
    """
    where = f"byte {read.at} of the head"
    n, form = read.varint(), read.number(1)
    power, flags = form & 7, form & ~7
    bits = 1 << power
    if power > 5 or flags > _ROTATED | _PALETTE | _DELTA or n * bits % 8:
        raise DamagedBundle(f"a piece of {n} elements has the form {form}", where=where)
    if (flags & _ROTATED and bits < 16) or (flags & _PALETTE and (bits < 8 or flags != _PALETTE)):
        raise DamagedBundle(f"a piece of {n} elements has the form {form}", where=where)
    base = palette = None
    if flags & _DELTA:
        base = (read.text(), read.varint())
        check_path(base[0])
    limit = min(1 << bits, 256)
    if flags & _PALETTE:
        limit = read.count("values of a palette", _COLOURS, 1)
        palette = read.take(limit * bits // 8)
    planes = tuple(
        _coding(read, n, limit, tables, plain=bits >= 8 and palette is None)
        for _ in range(1 if palette is not None else max(bits // 8, 1))
    )
    return Piece(n, bits, bool(flags & _ROTATED), planes, palette, base)


def _coding(read: Reader, n: int, limit: int, tables: int, *, plain: bool) -> Coding | None:
    where = f"byte {read.at} of the head"
    mode = read.number(1)
    if mode > _SPLIT or (mode == _STORED and not plain):
        raise DamagedBundle(f"a plane has mode {mode}", where=where)
    if mode == _STORED:
        return None
    flags = read.number(1)
    if flags > _MAP_A | _MAP_B:
        raise DamagedBundle(f"a plane has the flags {flags}", where=where)
    maps = (
        _map(read, n, tables) if flags & _MAP_A else None,
        _map(read, n, tables) if flags & _MAP_B else None,
    )
    contexts = 1
    for one in maps:
        contexts *= one.classes if one else 1
    models = tuple(_index(read, tables) for _ in range(contexts))
    if mode == _CODED:
        return Coding(maps, models)
    common = read.varint()
    if common >= limit:
        raise DamagedBundle(f"the common value {common} of a plane is too large", where=where)
    return Coding(maps, models, (common, _index(read, tables)))


def _map(read: Reader, n: int, tables: int) -> Map:
    where = f"byte {read.at} of the head"
    inner, count = read.varint(), read.count("classes of a map", _COUNT, 1)
    found = Map(inner, count, read.count("classes", _CLASSES, 2), _index(read, tables))
    if inner < 1 or (count - 1) * inner >= max(n, 1):
        raise DamagedBundle(f"a map of {count} times {inner} elements is larger than {n}", where=where)
    return found


def _index(read: Reader, tables: int) -> int:
    found = read.varint()
    if found >= tables:
        raise DamagedBundle(f"there is no table {found}", where=f"byte {read.at} of the head")
    return found
