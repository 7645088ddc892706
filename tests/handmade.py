"""Bundles that are written by hand, one feature of the format at a time, beside the toolkit's own writer.

Contexts are told element by element as docs/fw-format.md says it, slowly, and nothing here is shared with
the loader or the writer.
"""

from __future__ import annotations

import hashlib
import lzma
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import constriction
import numpy as np
import zstandard

MAGIC = b"\x89FWB\r\n\x1a\n"
STORED, ZSTD, LZMA, CODES, PREFIXED = range(5)
ARTIFACT, DOCUMENT, PROBE = range(3)


def varint(value: int) -> bytes:
    """Unsigned LEB128."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


def text(value: str | bytes) -> bytes:
    """A ``str`` of the format; bytes stand for a name that is none."""
    data = value.encode() if isinstance(value, str) else value
    return varint(len(data)) + data


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def frequency(byte: int) -> float:
    """What a byte of a table stands for."""
    return float(byte if byte < 32 else (16 + byte % 16) * 2 ** (byte // 16 - 1))


def packed(codec: int, data: bytes, prefix: bytes = b"") -> bytes:
    """A section's bytes."""
    if codec == ZSTD:
        return zstandard.ZstdCompressor(level=19).compress(data)
    if codec == LZMA:
        told = {"id": lzma.FILTER_LZMA1, "dict_size": max(4096, len(data)), "lc": 1, "lp": 2, "pb": 1}
        return bytes([(1 * 5 + 2) * 9 + 1]) + lzma.compress(data, lzma.FORMAT_RAW, filters=[told])
    if codec == PREFIXED:
        before = zstandard.ZstdCompressionDict(prefix, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        return zstandard.ZstdCompressor(level=19, dict_data=before).compress(data)
    return data


@dataclass
class Bundle:
    """A bundle in the making; what is appended is not checked, so that it may be wrong."""

    base: bytes = b""
    tables: list[bytes] = field(default_factory=list)
    frequencies: list[tuple[int, list[int]]] = field(default_factory=list)
    sections: list[tuple[int, bytes, int]] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)
    tail: bytes = b""

    def table(self, lo: int, frequencies: Sequence[int]) -> int:
        """The index of a table."""
        made = varint(lo) + varint(len(frequencies)) + bytes(frequencies)
        if made in self.tables:
            return self.tables.index(made)
        self.tables.append(made)
        self.frequencies.append((lo, list(frequencies)))
        return len(self.tables) - 1

    def section(self, data: bytes, codec: int = STORED, prefix: bytes = b"", raw: int | None = None) -> int:
        """What names the section of these bytes in a file: one more than its index."""
        self.sections.append((codec, packed(codec, data, prefix), len(data) if raw is None else raw))
        return len(self.sections)

    def file(
        self,
        path: str | bytes,
        data: bytes,
        *,
        kind: int = ARTIFACT,
        rest: int = 0,
        raw: int = 0,
        codes: int = 0,
        pieces: Sequence[tuple[int, bytes]] = (),
        size: int | None = None,
    ) -> None:
        """A file; its pieces are told with the gap before each."""
        size = len(data) if size is None else size
        told = text(path) + bytes([kind]) + varint(size) + digest(data) + b"\0"
        told += varint(rest) + varint(raw) + varint(codes) + varint(len(pieces))
        self.files.append(told + b"".join(varint(gap) + piece for gap, piece in pieces))

    def plain(self, path: str, data: bytes, kind: int = ARTIFACT, codec: int = ZSTD) -> None:
        """A file without pieces, in a section of its own."""
        self.file(path, data, kind=kind, rest=self.section(data, codec))

    def copy(self, path: str, data: bytes, index: int, kind: int = ARTIFACT) -> None:
        """A file of the same bytes as another."""
        self.files.append(
            text(path) + bytes([kind]) + varint(len(data)) + digest(data) + b"\1" + varint(index)
        )

    def head(self) -> bytes:
        """The head, decoded."""
        told = b"\1" + self.base if self.base else b"\0"
        told += varint(len(self.tables)) + b"".join(self.tables) + varint(len(self.sections))
        for codec, data, raw in self.sections:
            told += bytes([codec]) + varint(len(data)) + varint(raw) + digest(data)
        return told + varint(len(self.files)) + b"".join(self.files) + self.tail

    def bytes(self, codec: int = STORED, signature: bytes = b"") -> bytes:
        """The file."""
        head = self.head()
        return wrapped(
            packed(codec, head), len(head), b"".join(data for _, data, _ in self.sections), codec, signature
        )


def wrapped(
    head: bytes, raw: int, body: bytes, codec: int = STORED, signature: bytes = b"", version: int = 1
) -> bytes:
    """A head and a body behind the first 64 bytes that fit them."""
    told = struct.pack("<HBBIIIQ", version, codec, 0, len(head), raw, 0, len(body))
    return MAGIC + told + digest(head) + head + body + signature


@dataclass(frozen=True)
class Map:
    """Element i is of the class ``classes[(i // inner) % len(classes)]``."""

    inner: int
    classes: Sequence[int]
    many: int


@dataclass
class Codes:
    """The codes of a file in the making: pieces push their symbols here, in order."""

    bundle: Bundle
    encoder: Any = field(default_factory=constriction.stream.queue.RangeEncoder)

    def push(self, values: Sequence[int], modulus: int | None, lo: int | None = None) -> int:
        """Code some values by a table of their own, whose index is returned."""
        array = np.asarray(values, np.int64)
        if lo is None:
            lo = int(array.min()) if array.size else 0
            lo = lo % modulus if modulus else lo
        symbols = (array - lo) % modulus if modulus else array - lo
        counts = np.bincount(symbols, minlength=1)
        table = self.bundle.table(lo, [min(int(count), 255) for count in counts] if array.size else [1])
        self.push_by(symbols, table)
        return table

    def push_by(self, symbols: np.ndarray, table: int) -> None:
        """Code symbols, told from a table's first one on."""
        _, bytes_of = self.bundle.frequencies[table]
        if len(bytes_of) > 1 and len(symbols):
            model = constriction.stream.model.Categorical(
                np.array([frequency(byte) for byte in bytes_of]), perfect=False
            )
            self.encoder.encode(np.asarray(symbols, np.int32), model)

    def plane(
        self,
        values: Sequence[int],
        *,
        modulus: int | None,
        maps: Sequence[Map | None] = (None, None),
        common: int | None = None,
        lo: int | None = None,
    ) -> bytes:
        """How the head tells a plane that is coded; ``common``: it is split at that value."""
        told = bytes([1 if common is None else 2, sum(1 << i for i, one in enumerate(maps) if one)])
        for one in maps:
            if one:
                told += varint(one.inner) + varint(len(one.classes)) + varint(one.many)
                told += varint(self.push(one.classes, None, 0))
        contexts = [0] * len(values)
        many = 1
        for one in maps:
            if one:
                contexts = [
                    context * one.many + one.classes[i // one.inner % len(one.classes)]
                    for i, context in enumerate(contexts)
                ]
                many *= one.many
        coded = [int(value != common) for value in values] if common is not None else list(values)
        for context in range(many):
            own = [value for value, of in zip(coded, contexts, strict=True) if of == context]
            told += varint(self.push(own, None, 0) if common is not None else self.push(own, modulus, lo))
        if common is not None:
            others = [value for value in values if value != common]
            told += varint(common) + varint(self.push(others, modulus, lo))
        return told

    def section(self) -> int:
        """What names the section of all that was pushed."""
        words = np.asarray(self.encoder.get_compressed(), "<u4")
        return self.bundle.section(words.tobytes(), CODES)


def piece(
    n: int,
    bits: int,
    *planes: bytes,
    rotated: bool = False,
    palette: bytes | None = None,
    base: tuple[str, int] | None = None,
) -> bytes:
    """How the head tells a piece."""
    form = bits.bit_length() - 1 | rotated << 3 | (palette is not None) << 4 | (base is not None) << 5
    told = varint(n) + bytes([form])
    if base is not None:
        told += text(base[0]) + varint(base[1])
    if palette is not None:
        told += varint(len(palette) * 8 // bits) + palette
    return told + b"".join(planes)


RAW = b"\0"  # a plane that is not coded


def simple(files: Mapping[str, bytes]) -> bytes:
    """A bundle of artifact files without pieces."""
    bundle = Bundle()
    for path, data in files.items():
        bundle.plain(path, data)
    return bundle.bytes(ZSTD)


def normal(n: int, seed: int = 0, spread: float = 20.0) -> np.ndarray:
    """Integers as weights have them."""
    values = np.random.default_rng(seed).normal(0, spread, n)
    return np.clip(np.rint(values), -128, 127).astype(np.int8)


def everything(seed: int = 0) -> tuple[bytes, bytes, dict[str, bytes]]:
    """An update and its base that use all of the format, small, and the files of the update."""
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 256, 400, np.uint8).tobytes()
    base = Bundle()
    base.plain("model.bin", old)
    base.plain("about.md", b"old" * 30, DOCUMENT)
    before = base.bytes(ZSTD)
    identity = digest(before[: 64 + struct.unpack_from("<I", before, 12)[0]])

    bundle = Bundle(base=identity)
    weights, nibbles = normal(96, seed), rng.integers(0, 16, 64)
    halves = rng.normal(0, 1, 24).astype(np.float16)
    colours = rng.normal(0, 1, 5).astype(np.float32)
    picks = rng.integers(0, 5, 40)
    update = np.frombuffer(old, np.uint8)[100:164] + (rng.random(64) < 0.1).astype(np.uint8)
    turned = halves.view(np.uint16)
    turned = turned << 1 | turned >> 15
    codes = Codes(bundle)
    rows = Map(12, [0, 1, 1, 0, 1, 0, 0, 1], 2)
    columns, few = Map(3, [0, 2, 1, 1], 3), Map(12, [1, 0, 1], 2)
    pieces = [
        (7, piece(96, 8, codes.plane(weights.view(np.uint8), modulus=256, maps=(rows, columns), lo=200))),
        (0, piece(64, 4, codes.plane(nibbles, modulus=16, common=int(nibbles[0])))),
        (3, piece(24, 16, RAW, codes.plane(turned >> 8, modulus=256, maps=(None, columns)), rotated=True)),
        (1, piece(40, 32, codes.plane(picks, modulus=None), palette=colours.tobytes())),
        (
            2,
            piece(
                64,
                8,
                codes.plane(
                    (update - np.frombuffer(old, np.uint8)[100:164]), modulus=256, common=0, maps=(few, None)
                ),
                base=("model.bin", 100),
            ),
        ),
    ]
    contents = [
        *(weights.tobytes(), (nibbles[::2] | nibbles[1::2] << 4).astype(np.uint8).tobytes()),
        *(halves.tobytes(), colours[picks].tobytes(), update.tobytes()),
    ]
    gaps = [b"header ", b"", b"gap", b"|", b"--"]
    model = b"".join(gap + data for gap, data in zip(gaps, contents, strict=True)) + b"the end"
    rest = b"".join(gaps) + b"the end"
    other = b"a second file shares the rest" + old[50:350]
    files = {"model.bin": model, "more/other.bin": other, "same.bin": model, "about.md": b"new " * 30}
    shared = bundle.section(rest + other, PREFIXED, old)
    raw = bundle.section((turned & 255).astype(np.uint8).tobytes(), LZMA)
    bundle.file("model.bin", model, rest=shared, raw=raw, codes=codes.section(), pieces=pieces)
    bundle.file("more/other.bin", other, rest=shared)
    bundle.copy("same.bin", model, 0)
    bundle.plain("about.md", files["about.md"], DOCUMENT)
    return bundle.bytes(LZMA), before, files
