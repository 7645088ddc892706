"""Reads and rewrites flatbuffers of which only some tables are known, which is what a ``.mnn`` file is.

Part of ``mnn.py``. Offsets in a flatbuffer point forward only. So whatever is new (a changed table, a
longer vector) is put in front of the old bytes, which stay as they are: a new table may hold old and
new things, and nothing old has to know of it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_ALIGNED = 16  # of the old bytes, so that what was aligned in them stays so


@dataclass(frozen=True)
class Table:
    """A table in a buffer: fields by their number in the schema."""

    buffer: bytes
    at: int

    @classmethod
    def root(cls, buffer: bytes) -> Table:
        return cls(buffer, _int(buffer, 0, "I"))

    @property
    def fields(self) -> tuple[int, ...]:
        """Numbers of the fields that are there."""
        vtable = self.at - _int(self.buffer, self.at, "i")
        count = (_int(self.buffer, vtable, "H") - 4) // 2
        return tuple(n for n in range(count) if self.place(n) is not None)

    def place(self, number: int) -> int | None:
        """Where a field lies, None: it has its default."""
        vtable = self.at - _int(self.buffer, self.at, "i")
        if 4 + 2 * number >= _int(self.buffer, vtable, "H"):
            return None
        offset = _int(self.buffer, vtable + 4 + 2 * number, "H")
        return self.at + offset if offset else None

    def scalar(self, number: int, kind: str, default: float = 0) -> Any:
        """A number; ``kind`` as in ``struct``."""
        place = self.place(number)
        return default if place is None else struct.unpack_from(f"<{kind}", self.buffer, place)[0]

    def target(self, number: int) -> int | None:
        """Where the thing lies that a field points at."""
        place = self.place(number)
        return None if place is None else place + _int(self.buffer, place, "I")

    def table(self, number: int) -> Table | None:
        at = self.target(number)
        return None if at is None else Table(self.buffer, at)

    def string(self, number: int) -> str:
        return self.bytes(number).decode()

    def bytes(self, number: int, width: int = 1) -> bytes:
        """The elements of a vector of scalars so many bytes wide; b'' where there is none."""
        at = self.target(number)
        if at is None:
            return b""
        return self.buffer[at + 4 : at + 4 + width * _int(self.buffer, at, "I")]

    def ints(self, number: int, kind: str = "i") -> tuple[int, ...]:
        raw = self.bytes(number, struct.calcsize(kind))
        return struct.unpack(f"<{len(raw) // struct.calcsize(kind)}{kind}", raw)

    def places(self, number: int) -> tuple[int, ...]:
        """Where the elements of a vector of tables or strings lie."""
        at = self.target(number)
        if at is None:
            return ()
        slots = range(at + 4, at + 4 + 4 * _int(self.buffer, at, "I"), 4)
        return tuple(slot + _int(self.buffer, slot, "I") for slot in slots)

    def tables(self, number: int) -> tuple[Table, ...]:
        return tuple(Table(self.buffer, at) for at in self.places(number))

    def strings(self, number: int) -> tuple[str, ...]:
        lengths = ((at, _int(self.buffer, at, "I")) for at in self.places(number))
        return tuple(self.buffer[at + 4 : at + 4 + length].decode() for at, length in lengths)


@dataclass(frozen=True)
class Old:
    """Something that stays where it was."""

    at: int


@dataclass(eq=False)
class Scalar:
    """A number inside a table; ``kind`` as in ``struct``."""

    kind: str
    value: float


@dataclass(eq=False)
class Data:
    """A vector of scalars: its bytes, and how many bytes an element has."""

    raw: bytes
    width: int = 1


@dataclass(eq=False)
class Text:
    """A string."""

    value: str


@dataclass(eq=False)
class Many:
    """A vector of tables or strings."""

    items: list[Draft | Text | Old]


@dataclass(eq=False)
class Draft:
    """A table to be written."""

    fields: dict[int, Scalar | Draft | Old | Data | Text | Many] = field(default_factory=dict)

    @classmethod
    def of(cls, table: Table, scalars: Mapping[int, str]) -> Draft:
        """The same table, to be changed: fields are offsets but for the scalars that are named."""
        draft = cls()
        for number in table.fields:
            if number in scalars:
                draft.fields[number] = Scalar(scalars[number], table.scalar(number, scalars[number]))
            elif (target := table.target(number)) is not None:
                draft.fields[number] = Old(target)
        return draft


def write(root: Draft, old: bytes) -> bytes:
    """A buffer with this root, which may point into the old one."""
    front = bytearray(4)
    fixes: list[tuple[int, Any]] = [(0, root)]  # slot -> what it points at
    done: dict[int, int] = {}
    late: list[tuple[int, int]] = []
    while fixes:
        slot, thing = fixes.pop(0)
        if isinstance(thing, Old):
            late.append((slot, thing.at))
            continue
        if id(thing) not in done:
            done[id(thing)] = _append(front, thing, fixes)
        if done[id(thing)] < slot:
            raise ValueError("a flatbuffer points forward only: share nothing between new tables")
        struct.pack_into("<I", front, slot, done[id(thing)] - slot)
    _pad(front, _ALIGNED)
    for slot, at in late:
        struct.pack_into("<I", front, slot, len(front) + at - slot)
    return bytes(front) + old


def _append(front: bytearray, thing: Draft | Data | Text | Many, fixes: list[tuple[int, Any]]) -> int:
    """Write one thing at the end; returns where it begins."""
    if isinstance(thing, Draft):
        return _append_table(front, thing, fixes)
    if isinstance(thing, Many):
        _pad(front, 4)
        at = len(front)
        front += struct.pack("<I", len(thing.items))
        for item in thing.items:
            fixes.append((len(front), item))
            front += bytes(4)
        return at
    raw, width = (thing.value.encode(), 1) if isinstance(thing, Text) else (thing.raw, thing.width)
    _pad(front, max(width, 4), ahead=4)
    at = len(front)
    front += struct.pack("<I", len(raw) // width) + raw
    if isinstance(thing, Text):
        front += b"\0"
    return at


def _append_table(front: bytearray, draft: Draft, fixes: list[tuple[int, Any]]) -> int:
    """The vtable, then the table: its offset to the vtable, then the fields by falling width."""
    kinds = {
        number: value.kind if isinstance(value, Scalar) else "I" for number, value in draft.fields.items()
    }
    order = sorted(kinds, key=lambda number: (-struct.calcsize(kinds[number]), number))
    offsets, end = {}, 4
    for number in order:
        width = struct.calcsize(kinds[number])
        end += -end % width
        offsets[number] = end
        end += width
    count = max(kinds, default=-1) + 1
    _pad(front, 2)
    vtable = len(front)
    front += struct.pack(f"<HH{count}H", 4 + 2 * count, end, *(offsets.get(n, 0) for n in range(count)))
    _pad(front, 8)
    at = len(front)
    front += struct.pack("<i", at - vtable) + bytes(end - 4)
    for number, value in draft.fields.items():
        if isinstance(value, Scalar):
            struct.pack_into(f"<{value.kind}", front, at + offsets[number], value.value)
        else:
            fixes.append((at + offsets[number], value))
    return at


def _pad(front: bytearray, to: int, ahead: int = 0) -> None:
    front += bytes(-(len(front) + ahead) % to)


def _int(buffer: bytes, at: int, kind: str) -> int:
    return int(struct.unpack_from(f"<{kind}", buffer, at)[0])
