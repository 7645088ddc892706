"""Puts files together from the sections of a bundle: gaps, planes, palettes, differences to the base."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight_loader.codecs import PREFIXED, unpacked
from featherweight_loader.coder import Coder
from featherweight_loader.errors import DamagedBundle
from featherweight_loader.head import Head
from featherweight_loader.pieces import Piece

if TYPE_CHECKING:
    from featherweight_loader.bundle import Bundle

_WORDS: Mapping[int, np.dtype[Any]] = {16: np.dtype("<u2"), 32: np.dtype("<u4")}


class Maker:
    """Makes the files that are wanted, and holds the sections that some of them still need."""

    def __init__(
        self,
        head: Head,
        packed: Callable[[int], bytes],
        base: Callable[[], Bundle],
        wanted: Sequence[int],
    ) -> None:
        self._head, self._packed, self._base = head, packed, base
        self._sections: dict[int, bytes] = {}
        self._base_files: dict[str, bytes] = {}
        self._needed = Counter(index for file in wanted for index in self._sections_of(file))

    def file(self, index: int) -> bytearray:
        """The next of the files that are wanted.

        Raises:
            BundleError: It cannot be put together, or has another digest.
        """
        file = self._head.files[index]
        data = self._put_together(self._original(index))
        for section in self._sections_of(index):
            self._needed[section] -= 1
            if not self._needed[section]:
                self._sections.pop(section, None)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise DamagedBundle("a file has another digest than declared", where=file.path)
        return data

    def _original(self, index: int) -> int:
        """The file itself, or that which it is a copy of."""
        copy = self._head.layouts[index].copy
        return index if copy < 0 else copy

    def _sections_of(self, index: int) -> set[int]:
        layout = self._head.layouts[self._original(index)]
        return {layout.rest[0], layout.raw[0], layout.codes} - {-1}

    def _section(self, index: int) -> bytes:
        if index < 0:
            return b""
        if index not in self._sections:
            section = self._head.sections[index]
            prefix = self._prefix() if section.codec == PREFIXED else b""
            self._sections[index] = unpacked(
                section.codec, self._packed(index), section.raw, prefix=prefix, where=f"section {index}"
            )
        return self._sections[index]

    def _put_together(self, index: int) -> bytearray:
        """A file: bytes of its rest, a piece, bytes of its rest, and so on."""
        head, layout = self._head, self._head.layouts[index]
        file = head.files[index]
        rest, rest_at = memoryview(self._section(layout.rest[0])), layout.rest[1]
        raw, raw_at = self._section(layout.raw[0]), layout.raw[1]
        coder = Coder(self._section(layout.codes), head.tables, file.path)
        data = bytearray(file.bytes)
        at = 0
        for gap, piece in head.pieces(index):
            data[at : at + gap] = rest[rest_at : rest_at + gap]
            at, rest_at = at + gap, rest_at + gap
            out = np.frombuffer(data, np.uint8, piece.bytes, at)
            self._decode(piece, coder, np.frombuffer(raw, np.uint8, piece.raw_bytes, raw_at), out)
            at, raw_at = at + piece.bytes, raw_at + piece.raw_bytes
        coder.end()
        data[at:] = rest[rest_at : rest_at + len(data) - at]
        return data

    def _decode(self, piece: Piece, coder: Coder, raw: np.ndarray, out: np.ndarray) -> None:
        """One piece, into its place in the file."""
        if piece.palette is not None:
            values = np.frombuffer(piece.palette, np.uint8).reshape(-1, piece.bits // 8)
            (coding,) = piece.planes
            assert coding is not None  # a palette's codes are never stored
            codes = coder.plane(coding, piece.n, len(values), wraps=False)
            out[:] = values[codes].reshape(-1)
            return
        limit = min(1 << piece.bits, 256)
        planes = (
            out.reshape(piece.n, piece.bits // 8) if piece.bits >= 8 else np.empty((piece.n, 1), np.uint8)
        )
        used = 0
        for place, coding in enumerate(piece.planes):
            if coding is None:
                planes[:, place] = raw[used : used + piece.n]
                used += piece.n
            else:
                planes[:, place] = coder.plane(coding, piece.n, limit, wraps=True)
        if piece.base is not None:
            planes += self._before(piece)
            planes &= limit - 1
        if piece.bits < 8:
            out[:] = _packed(planes.reshape(-1), piece.bits)
        elif piece.rotated:
            words = out.view(_WORDS[piece.bits])
            words[:] = words >> 1 | words << piece.bits - 1

    def _before(self, piece: Piece) -> np.ndarray:
        """The base's elements at the place of a piece, taken apart as its own."""
        assert piece.base is not None
        path, offset = piece.base
        data = self._base_file(path)
        if offset + piece.bytes > len(data):
            raise DamagedBundle(f"the base's '{path}' is too short for a piece", where=f"byte {offset}")
        found = np.frombuffer(data, np.uint8, piece.bytes, offset)
        if piece.bits < 8:
            return _unpacked(found, piece.bits)[:, None]
        if piece.rotated:
            words = found.view(_WORDS[piece.bits])
            found = (words << 1 | words >> piece.bits - 1).view(np.uint8)
        return found.reshape(piece.n, piece.bits // 8)

    def _base_file(self, path: str) -> bytes:
        if path not in self._base_files:
            base = self._base()
            told = base.files.get(path)
            if told is None or told.kind != "artifact":
                raise DamagedBundle(f"the base holds no artifact file '{path}'")
            self._base_files[path] = base.data(path)
        return self._base_files[path]

    def _prefix(self) -> bytes:
        """The artifact files of the base, one behind the other."""
        return b"".join(self._base().artifact_files())


def _packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Elements below 2^bits, the first in the lowest bits of a byte."""
    each = values.reshape(-1, 8 // bits)
    out = each[:, 0].copy()
    for place in range(1, each.shape[1]):
        out |= each[:, place] << np.uint8(place * bits)
    return out


def _unpacked(data: np.ndarray, bits: int) -> np.ndarray:
    """What :func:`_packed` made bytes of."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (data[:, None] >> shifts & np.uint8((1 << bits) - 1)).reshape(-1)
