"""Writes a bundle: what each file is taken apart into, the tables that its streams share, the head, the body.

The format is on one page, docs/fw-format.md. The same members give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np

from featherweight.bundles import coder, tables
from featherweight.bundles.forms import Piece, Plane, Stream
from featherweight.bundles.layouts import named
from featherweight.bundles.plan import Before, Plan, only, planned
from featherweight.bundles.tables import Table, entropy
from featherweight_loader.codecs import CODES, PREFIXED
from featherweight_loader.head import KINDS, MAGIC, VERSION
from featherweight_loader.paths import check_apart, check_path

if TYPE_CHECKING:
    from featherweight.method import Progress

_SECTION = 44  # bytes of one more section in the head
_CODES = 24  # bytes that a coded file may take beyond what was reckoned
_SURE = 0.97  # coded to this share of what LZMA makes of it, a file is not packed whole to compare
_TOGETHER = 1 << 20  # bytes of the rests of small artifacts that are packed as one


@dataclass(frozen=True)
class Member:
    """A file that goes into a bundle.

    Attributes:
        path: Its place there, with ``/`` between names.
        data: Its bytes, or the file that holds them.
        kind: What it is.
        runtime: Whose artifact it is, which tells its format; empty where that is unknown.
    """

    path: str
    data: bytes | Path
    kind: Literal["artifact", "document", "probe"] = "artifact"
    runtime: str = ""

    def read(self) -> bytes:
        """Its bytes."""
        return self.data if isinstance(self.data, bytes) else self.data.read_bytes()


@dataclass(frozen=True)
class Coded:
    """What became of a file.

    Attributes:
        path: Its place in the bundle.
        bytes: Its size.
        coded: Its share of the sections: rest, raw planes and codes.
        entropy: Bytes that its coded streams take by their empirical entropy.
        streams: Bytes that the range coder wrote for them.
    """

    path: str
    bytes: int
    coded: int
    entropy: float
    streams: int


@dataclass(frozen=True)
class Packed:
    """A bundle that was written.

    Attributes:
        identity: SHA-256 of all up to the end of the head, which stands for all but the signature.
        bytes: Its size.
        head: Bytes of the header and the head.
        documents: Bytes of the sections of documents and probes.
        files: What became of each file.
    """

    identity: str
    bytes: int
    head: int
    documents: int
    files: tuple[Coded, ...]


def write_bundle(
    out: BinaryIO | Path,
    members: Sequence[Member],
    *,
    base: Path | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Write a bundle of these files, in this order.

    Args:
        out: Where to; a path is written whole or not at all.
        members: The files.
        base: A bundle that readers of this one have, so that only what changed is written.
        progress: Where it says how far it is.

    Raises:
        DamagedBundle: A path cannot be in a bundle, or two of them collide.
    """
    for member in members:
        check_path(member.path)
    check_apart(member.path for member in members)
    known = _Base.read(base) if base is not None else _Base()
    bundle = _Bundle(known, {one.path: one.read for one in members if one.kind == "artifact"})
    for member in members if progress is None else progress.track(members, "packing", len(members)):
        bundle.add(member)
    head, body, files, documents = bundle.finished()
    codec, small = coder.packed(head)
    header = struct.pack(
        "<8sHBBIIIQ", MAGIC, VERSION, codec, 0, len(small), len(head), 0, sum(map(len, body))
    )
    front = header + hashlib.sha256(small).digest() + small
    if isinstance(out, Path):
        unfinished = out.with_name(out.name + ".partial")
        with unfinished.open("wb") as stream:
            stream.writelines([front, *body])
        unfinished.replace(out)
    else:
        out.writelines([front, *body])
    size = len(front) + sum(map(len, body))
    return Packed(hashlib.sha256(front).hexdigest(), size, len(front), documents, files)


@dataclass(frozen=True)
class _Base:
    """The bundle that readers have."""

    identity: str = ""
    artifacts: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> _Base:
        import featherweight_loader

        bundle = featherweight_loader.read(path)
        artifacts = [path for path, one in bundle.files.items() if one.kind == "artifact"]
        return cls(bundle.identity, {path: bundle.data(path) for path in artifacts})

    def before(self, path: str) -> Before | None:
        """The file of this place that readers have."""
        if path not in self.artifacts:
            return None
        files = {name: partial(bytes, data) for name, data in self.artifacts.items()}
        return Before(path, self.artifacts[path], named(path, self.artifacts[path], files))


@dataclass(eq=False)
class _File:
    member: Member
    size: int
    digest: bytes
    copy: int | None = None
    plan: Plan | None = None
    rest: bytes = b""
    sections: list[int] = field(default_factory=lambda: [0, 0, 0])
    codes: bytes = b""
    shares: float = 0.0

    @property
    def raw(self) -> bytes:
        """Planes that are not coded."""
        pieces = self.plan.pieces if self.plan else ()
        return b"".join(plane.raw for piece in pieces for plane in piece.planes if plane.raw is not None)

    @property
    def streams(self) -> list[Stream]:
        """What is coded, in order."""
        pieces = self.plan.pieces if self.plan else ()
        return [stream for piece in pieces for plane in piece.planes for stream in plane.streams()]


@dataclass(eq=False)
class _Bundle:
    base: _Base
    readers: Mapping[str, Callable[[], bytes]]
    files: list[_File] = field(default_factory=list)
    sections: list[tuple[int, bytes, int]] = field(default_factory=list)
    packed: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)

    def add(self, member: Member) -> None:
        """Take one file apart."""
        data = member.read()
        one = _File(member, len(data), hashlib.sha256(data).digest())
        for index, other in enumerate(self.files):
            if other.copy is None and (other.digest, other.size) == (one.digest, one.size):
                one.copy = index
        if one.copy is None:
            arrays = named(member.path, data, self.readers) if member.kind == "artifact" else ()
            before = self.base.before(member.path)
            plan = planned(data, arrays, before) if member.kind == "artifact" else None
            one.plan = plan if plan is None else self._paying(plan)
            one.rest = data if one.plan is None else one.plan.rest()
        self.files.append(one)

    def _paying(self, plan: Plan) -> Plan:
        """As much of a plan as makes the file smaller than packing it whole does."""
        if not plan.pieces or self._size(plan) < _SURE * plan.whole:
            return plan
        shares = (0.7, 0.3, 0.0) if len(plan.data) <= _TOGETHER else (0.0,)
        return min((plan, *(only(plan, share) for share in shares)), key=self._size)

    def _size(self, plan: Plan) -> float:
        """About the bytes that a file so taken apart has."""
        rest = plan.rest()
        coded = sum(piece.bits for piece in plan.pieces) / 8
        raw = any(plane.raw is not None for piece in plan.pieces for plane in piece.planes)
        return (
            coded
            + len(self._packed(rest)[1])
            + _SECTION * (bool(rest) + raw)
            + (_SECTION + _CODES) * bool(plan.pieces)
        )

    def finished(self) -> tuple[bytes, list[bytes], tuple[Coded, ...], int]:
        """The head, the sections, what became of each file, and the bytes of documents."""
        which, made = _tables([one.streams for one in self.files])
        for one, indices in zip(self.files, which, strict=True):
            runs = [(made[i], stream.symbols) for i, stream in zip(indices, one.streams, strict=True)]
            one.codes = coder.coded(runs, [stream.modulus for stream in one.streams])
        self._sections()
        head = _Head()
        head.u8(bool(self.base.identity)).raw(bytes.fromhex(self.base.identity))
        head.varint(len(made))
        for table in made:
            head.varint(table.lo).varint(len(table.codes)).raw(table.codes)
        head.varint(len(self.sections))
        for codec, packed, size in self.sections:
            head.u8(codec).varint(len(packed)).varint(size).raw(hashlib.sha256(packed).digest())
        head.varint(len(self.files))
        for one, indices in zip(self.files, which, strict=True):
            _file(head, one, indices)
        documents = {
            one.sections[0] for one in self.files if one.member.kind != "artifact" and one.sections[0]
        }
        return (
            head.bytes(),
            [packed for _, packed, _ in self.sections],
            tuple(self._coded(one) for one in self.files),
            sum(len(self.sections[index - 1][1]) for index in documents),
        )

    def _sections(self) -> None:
        """Rests, raw planes and codes; small ones of a kind together."""
        own = [one for one in self.files if one.copy is None]
        artifacts = [one for one in own if one.member.kind == "artifact"]
        self._shared([one for one in artifacts if one.rest], 0, [one.rest for one in artifacts if one.rest])
        for kind in ("document", "probe"):
            some = [one for one in own if one.member.kind == kind and one.rest]
            if some:
                self._section(
                    some, 0, [one.rest for one in some], *coder.packed(b"".join(one.rest for one in some))
                )
        raw = [one for one in artifacts if one.raw]
        self._shared(raw, 1, [one.raw for one in raw])
        for one in artifacts:
            if one.streams:  # also where constants alone take no words: the format asks for a section
                self._section([one], 2, [one.codes], CODES, one.codes)

    def _shared(self, files: list[_File], role: int, parts: list[bytes]) -> None:
        """All in one section where that is smaller, else each in its own."""
        if not files:
            return
        alone = [self._packed(part) for part in parts]
        if len(files) > 1 and sum(map(len, parts)) <= _TOGETHER:
            together = self._packed(b"".join(parts))
            if len(together[1]) < sum(len(packed) + _SECTION for _, packed, _ in alone) - _SECTION:
                self._section(files, role, parts, *together[:2])
                return
        for one, part, packed in zip(files, parts, alone, strict=True):
            self._section([one], role, [part], *packed[:2])

    def _packed(self, data: bytes) -> tuple[int, bytes, int]:
        """Codec and bytes; what was packed once is not packed again."""
        digest = hashlib.sha256(data).digest()
        if digest not in self.packed:
            self.packed[digest] = self._smallest(data)
        codec, packed = self.packed[digest]
        return codec, packed, len(data)

    def _smallest(self, data: bytes) -> tuple[int, bytes]:
        best = coder.packed(data)
        if self.base.artifacts:
            update = coder.prefixed(data, b"".join(self.base.artifacts.values()))
            if len(update) < len(best[1]):
                return PREFIXED, update
        return best

    def _section(self, files: list[_File], role: int, parts: list[bytes], codec: int, packed: bytes) -> None:
        size = sum(map(len, parts))
        self.sections.append((codec, packed, size))
        for one, part in zip(files, parts, strict=True):
            one.sections[role] = len(self.sections)
            one.shares += len(packed) * len(part) / max(size, 1)

    def _coded(self, one: _File) -> Coded:
        streams = one.streams
        bits = sum(float(entropy(stream.counts)) for stream in streams)
        return Coded(one.member.path, one.size, round(one.shares), bits / 8, len(one.codes))


def _tables(files: Sequence[Sequence[Stream]]) -> tuple[list[list[int]], list[Table]]:
    """The table of each stream of each file, and all tables, in the order of their first use."""
    streams = [stream for one in files for stream in one]
    chosen: list[Table | None] = [None] * len(streams)
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, stream in enumerate(streams):
        groups.setdefault(_alphabet(stream), []).append(i)
    for (many, ring), indices in groups.items():
        if many > 256:
            for i in indices:
                chosen[i] = tables.make(streams[i].counts, 0)
            continue
        counts = np.zeros((len(indices), many), dtype=np.int64)
        for row, i in enumerate(indices):
            counts[row, : len(streams[i].counts)] = streams[i].counts
        which = tables.shared(counts)
        for group in range(int(which.max()) + 1):
            table = tables.make(counts[which == group].sum(axis=0), many if ring else 0)
            for i in np.array(indices)[which == group]:
                chosen[int(i)] = table
    order: dict[Table, int] = {}
    numbers = iter([order.setdefault(table, len(order)) for table in chosen if table is not None])
    return [[next(numbers) for _ in one] for one in files], list(order)


def _alphabet(stream: Stream) -> tuple[int, bool]:
    """Streams of one alphabet may share tables."""
    if stream.ring:
        return stream.many, True
    return next((size for size in (2, 16, 256) if stream.many <= size), stream.many), False


def _file(head: _Head, one: _File, indices: Sequence[int]) -> None:
    head.text(one.member.path).u8(KINDS.index(one.member.kind)).varint(one.size).raw(one.digest)
    if one.copy is not None:
        head.u8(1).varint(one.copy)
        return
    head.u8(0)
    for section in one.sections:
        head.varint(section)
    pieces = one.plan.pieces if one.plan else ()
    head.varint(len(pieces))
    at, numbers = 0, iter(indices)
    for piece in pieces:
        head.varint(piece.start - at)
        _piece(head, piece, [[next(numbers) for _ in plane.streams()] for plane in piece.planes])
        at = piece.stop


def _piece(head: _Head, piece: Piece, indices: Sequence[Sequence[int]]) -> None:
    form = piece.width.bit_length() - 1 | piece.rotated << 3
    form |= (piece.palette is not None) << 4 | (piece.base is not None) << 5
    head.varint(piece.n).u8(form)
    if piece.base is not None:
        head.text(piece.base[0]).varint(piece.base[1])
    if piece.palette is not None:
        head.varint(len(piece.palette) * 8 // piece.width).raw(piece.palette)
    for plane, own in zip(piece.planes, indices, strict=True):
        _plane(head, plane, list(own))


def _plane(head: _Head, plane: Plane, indices: list[int]) -> None:
    if plane.raw is not None:
        head.u8(0)
        return
    head.u8(1 if plane.zero is None else 2)
    head.u8(sum(1 << i for i, one in enumerate(plane.maps) if one is not None))
    for one in plane.maps:
        if one is not None:
            head.varint(one.inner).varint(len(one.classes)).varint(one.many).varint(indices.pop(0))
    others = indices.pop() if plane.others is not None else 0
    for index in indices:
        head.varint(index)
    if plane.zero is not None:
        head.varint(plane.zero).varint(others)


class _Head:
    """The head, written bit by bit."""

    def __init__(self) -> None:
        self._out = io.BytesIO()

    def u8(self, value: int) -> _Head:
        return self.raw(bytes([value]))

    def varint(self, value: int) -> _Head:
        while value > 127:
            self._out.write(bytes([value & 127 | 128]))
            value >>= 7
        return self.raw(bytes([value]))

    def text(self, value: str) -> _Head:
        data = value.encode()
        return self.varint(len(data)).raw(data)

    def raw(self, data: bytes) -> _Head:
        self._out.write(data)
        return self

    def bytes(self) -> bytes:
        return self._out.getvalue()
