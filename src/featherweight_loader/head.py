"""The preamble and head of a bundle, parsed with every size checked before anything is decoded by it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from featherweight_loader.codecs import CODES, LZMA, PREFIXED, STORED, unpacked
from featherweight_loader.errors import DamagedBundle, NewerBundle, TooLarge
from featherweight_loader.paths import check_apart, check_path
from featherweight_loader.pieces import Piece, read_piece
from featherweight_loader.reader import Reader

MAGIC = b"\x89FWB\r\n\x1a\n"
PREAMBLE = 64
KINDS = ("artifact", "document", "probe")
VERSION = 1
_HEAD, _TABLES, _SYMBOLS, _SECTIONS, _FILES, _PIECES = 64 << 20, 65536, 65536, 4096, 4096, 65536


@dataclass(frozen=True)
class Section:
    """Bytes of the body: how they are packed, how many they are and become, and the digest of the packed."""

    codec: int
    packed: int
    raw: int
    sha256: str


@dataclass(frozen=True)
class File:
    """A file in a bundle; ``kind`` is 'artifact', 'document' or 'probe'."""

    path: str
    kind: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Table:
    """Frequencies of the symbols from ``lo``, a byte for each."""

    lo: int
    frequencies: bytes


@dataclass(frozen=True)
class Layout:
    """How a file is put together; sections are told by their index, -1 for none.

    Attributes:
        copy: Index of the file that holds the same bytes, or -1.
        rest: Section of what is no piece, and where in it this file begins.
        raw: Section of planes that are not coded, and where in it this file begins.
        codes: Section of the range coder's words.
        pieces: Where in the head they are, and how many.
    """

    copy: int = -1
    rest: tuple[int, int] = (-1, 0)
    raw: tuple[int, int] = (-1, 0)
    codes: int = -1
    pieces: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Preamble:
    """The first 64 bytes."""

    codec: int
    packed: int
    raw: int
    body: int
    sha256: bytes

    @classmethod
    def of(cls, data: bytes, size: int) -> Preamble:
        """What the first bytes tell of a file of so many bytes.

        Raises:
            DamagedBundle: It is no bundle, or not whole.
            NewerBundle: Of a later version.
        """
        if data[: len(MAGIC)] != MAGIC:
            raise DamagedBundle("this is no bundle: it does not begin like one")
        if len(data) < PREAMBLE:
            raise DamagedBundle(f"the file ends after {len(data)} bytes", fix="fetch it again")
        read = Reader(data, at=len(MAGIC))
        version, codec, zero = read.number(2), read.number(1), read.number(1)
        if version != VERSION:
            raise NewerBundle(f"the bundle has version {version} of the format", fix="update the loader")
        packed, raw, zeros, body = read.number(4), read.number(4), read.number(4), read.number(8)
        if zero or zeros:
            raise DamagedBundle("bytes that must be 0 are not", where="the first 64 bytes")
        if codec > LZMA:
            raise NewerBundle(f"the head is packed with codec {codec}", fix="update the loader")
        if raw > _HEAD or (codec == STORED and raw != packed):
            raise DamagedBundle(f"a head of {raw} bytes is declared", where="the first 64 bytes")
        if PREAMBLE + packed + body > size:
            lost = PREAMBLE + packed + body - size
            raise DamagedBundle(f"the last {lost} bytes of the file are missing", fix="fetch it again")
        return cls(codec, packed, raw, body, read.take(32))

    def head(self, packed: bytes) -> bytes:
        """The head's bytes, decoded.

        Raises:
            DamagedBundle: They have another digest, or another size.
        """
        if hashlib.sha256(packed).digest() != self.sha256:
            raise DamagedBundle("the head has another digest than declared", fix="fetch the file again")
        return unpacked(self.codec, packed, self.raw, where="the head")


@dataclass
class Head:
    """What a bundle tells of itself; built by :func:`parse`, and not changed after."""

    base: str = ""
    tables: list[Table] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    files: list[File] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    _data: bytes = b""

    def pieces(self, file: int) -> Iterator[tuple[int, Piece]]:
        """Each piece of a file behind its gap; read from the head again, so that millions take no memory."""
        at, count = self.layouts[file].pieces
        read = Reader(self._data, at=at)
        for _ in range(count):
            yield read.varint(), read_piece(read, len(self.tables))


def parse(data: bytes, body: int, max_bytes: int) -> Head:
    """The head, once its sizes fit together and into the body.

    Args:
        data: The head decoded.
        body: Bytes of the body.
        max_bytes: Of all files together, and of all sections decoded.

    Raises:
        DamagedBundle: It is against the format.
        TooLarge: It declares more than the caller allows.
    """
    read, head = Reader(data), Head(_data=data)
    needs = read.number(1)
    if needs > 1:
        raise DamagedBundle(f"its first byte is {needs}", where="the head")
    head.base = read.take(32).hex() if needs else ""
    head.tables = [_table(read) for _ in range(read.count("tables", _TABLES))]
    _sections(read, head, body, max_bytes)
    _files(read, head, max_bytes)
    if read.left:
        raise DamagedBundle(f"{read.left} bytes stand behind its end", where="the head")
    check_apart(file.path for file in head.files)
    return head


def _table(read: Reader) -> Table:
    lo, count = read.varint(), read.count("symbols", _SYMBOLS, 1)
    frequencies = read.take(count)
    if not any(frequencies):
        raise DamagedBundle("a table has no frequencies", where="the head")
    return Table(lo, frequencies)


def _sections(read: Reader, head: Head, body: int, max_bytes: int) -> None:
    at = whole = 0
    for index in range(read.count("sections", _SECTIONS)):
        section = Section(read.number(1), read.varint(), read.varint(), read.take(32).hex())
        where = f"section {index}"
        if section.codec > PREFIXED:
            raise NewerBundle(f"a section is packed with codec {section.codec}", where=where)
        if section.codec == PREFIXED and not head.base:
            raise DamagedBundle("a section needs a base, the bundle none", where=where)
        if section.codec in (STORED, CODES) and section.raw != section.packed:
            raise DamagedBundle("a section that is not packed changes its size", where=where)
        if section.codec == CODES and section.raw % 4:
            raise DamagedBundle("codes are no whole number of words", where=where)
        head.sections.append(section)
        head.offsets.append(at)
        at += section.packed
        whole += section.raw
    if at != body:
        raise DamagedBundle(f"the sections take {at} bytes, the body has {body}", where="the head")
    if whole > max_bytes:
        raise _too_large(f"its sections become {whole} bytes", max_bytes)


def _too_large(what: str, allowed: int) -> TooLarge:
    return TooLarge(f"{what}, {allowed} are allowed", fix="trust it and allow more: max_bytes")


def _files(read: Reader, head: Head, max_bytes: int) -> None:
    used = _Used(head)
    whole = 0
    for _ in range(read.count("files", _FILES)):
        path = read.text()
        check_path(path)
        kind, size, digest, how = read.number(1), read.varint(), read.take(32).hex(), read.number(1)
        if kind >= len(KINDS) or how > 1:
            raise DamagedBundle(f"a file of kind {kind}, made in way {how}", where=path)
        whole += size
        if whole > max_bytes:
            raise _too_large(f"its files take {whole} bytes or more", max_bytes)
        file = File(path, KINDS[kind], size, digest)
        layout = _copy(read, head, file) if how else used.layout(read, file)
        head.files.append(file)
        head.layouts.append(layout)
    used.check_whole()


def _copy(read: Reader, head: Head, file: File) -> Layout:
    index = read.varint()
    if index >= len(head.files) or head.layouts[index].copy >= 0:
        raise DamagedBundle("a file is the copy of none", where=file.path)
    other = head.files[index]
    if (other.bytes, other.sha256) != (file.bytes, file.sha256):
        raise DamagedBundle(f"a file is the copy of another: '{other.path}'", where=file.path)
    return Layout(copy=index)


class _Used:
    """How far the files so far have used the sections up, and for what."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._at = [0] * len(head.sections)
        self._role = [""] * len(head.sections)
        self._pieces = 0

    def layout(self, read: Reader, file: File) -> Layout:
        """Read how a file is made, and move on in its sections."""
        rest, raw, codes = (
            self._section(read.varint() - 1, role, file) for role in ("rest", "raw planes", "codes")
        )
        count = read.count("pieces", _PIECES - self._pieces)
        self._pieces += count
        at, left, rests, raws, coded = read.at, file.bytes, 0, 0, False
        for _ in range(count):
            gap = read.varint()
            piece = read_piece(read, len(self._head.tables))
            if piece.base is not None and not self._head.base:
                raise DamagedBundle("a piece needs a base, the bundle none", where=file.path)
            left -= gap + piece.bytes
            rests += gap
            raws += piece.raw_bytes
            coded = coded or piece.coded
            if left < 0:
                raise DamagedBundle("its pieces are larger than the file", where=file.path)
        if coded != (codes >= 0):
            raise DamagedBundle("codes without coded pieces, or the reverse", where=file.path)
        return Layout(
            rest=(rest, self._take(rest, rests + left, file)),
            raw=(raw, self._take(raw, raws, file)),
            codes=codes,
            pieces=(at, count),
        )

    def _section(self, index: int, role: str, file: File) -> int:
        if index < 0:
            return -1
        if index >= len(self._role):
            raise DamagedBundle(f"there is no section {index}", where=file.path)
        alone = role == "codes"
        if self._role[index] not in (("",) if alone else ("", role)):
            raise DamagedBundle(f"section {index} is used twice", where=file.path)
        if alone != (self._head.sections[index].codec == CODES):
            raise DamagedBundle(f"section {index} holds no {role}", where=file.path)
        self._role[index] = role
        return index

    def _take(self, section: int, count: int, file: File) -> int:
        """Where the bytes begin that a file takes from a section."""
        if section < 0:
            if count:
                raise DamagedBundle(f"{count} bytes of a file are in no section", where=file.path)
            return 0
        at = self._at[section]
        if count > self._head.sections[section].raw - at:
            raise DamagedBundle(f"section {section} is too short", where=file.path)
        self._at[section] = at + count
        return at

    def check_whole(self) -> None:
        """Refuse bytes that no file uses."""
        for index, section in enumerate(self._head.sections):
            if not self._role[index] or (section.codec != CODES and self._at[index] != section.raw):
                raise DamagedBundle(f"no file uses section {index} up", where="the head")
