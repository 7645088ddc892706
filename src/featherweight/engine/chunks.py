"""Streams in a connection: what ``remote.py`` sends in chunks, and one of which some was read already."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any, BinaryIO


class Chunks(io.RawIOBase):
    """The bytes of all chunks, one after the other.

    Args:
        source: Gives 4 bytes of length (little-endian), then the bytes, and so on; a length of 0 ends them.
        ended: Called behind that end; not when the source just stops.
    """

    def __init__(self, source: BinaryIO, ended: Callable[[], None]) -> None:
        self._source = source
        self._ended = ended
        self._left = 0
        self._over = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left and not self._over:
            head = self._source.read(4)
            self._left = struct.unpack("<I", head)[0] if len(head) == 4 else 0
            self._over = not self._left
            if self._over and len(head) == 4:
                self._ended()
        if self._over:
            return 0
        part = self._source.read1(min(self._left, len(buffer)))  # type: ignore[attr-defined]
        buffer[: len(part)] = part
        self._left -= len(part)
        self._over = not part
        return len(part)


class Resumed(io.RawIOBase):
    """A stream of which some was read already."""

    def __init__(self, first: bytes, rest: BinaryIO) -> None:
        self._first = first
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._first:
            return self._rest.readinto(buffer)  # type: ignore[attr-defined, no-any-return]
        part, self._first = self._first[: len(buffer)], self._first[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._rest.close()
        super().close()
