"""Where the arrays of LiteRT and ExecuTorch files lie, read from flatbuffers by field number."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from featherweight.bundles.spans import Span

_LITERT = {0: 32, 1: 16, 2: 32, 4: 32, 7: 16, 17: 4, 18: 16, 19: 2}


def litert_arrays(data: bytes) -> Iterator[Span]:
    """The buffers of a model, with the shape of the first tensor that each belongs to."""
    model = _Table.root(data)
    told: dict[int, tuple[int, tuple[int, ...]]] = {}
    for graph in model.tables(2):
        for tensor in graph.tables(0):
            start, count = tensor.vector(0)
            shape = struct.unpack_from(f"<{count}i", data, start) if count else ()
            told.setdefault(tensor.number(2, "<I"), (_LITERT.get(tensor.number(1, "<b"), 8), shape))
    for index, buffer in enumerate(model.tables(4)):
        start, size = buffer.vector(0)
        if not size:
            start, size = buffer.number(1, "<Q"), buffer.number(2, "<Q")
        width, shape = told.get(index, (8, ()))
        if size > 1:
            yield Span(start, start + size, width, shape)


def executorch_arrays(data: bytes) -> Iterator[Span]:
    """The segments of a program: weights that a back end named, and constants."""
    begin = struct.unpack_from("<Q", data, 24)[0] if data[8:12] == b"eh00" else 0
    for segment in _Table.root(data).tables(4):
        start, size = segment.number(0, "<Q"), segment.number(1, "<Q")
        yield Span(begin + start, begin + start + size, 8)


class _Table:
    """A table of a flatbuffer."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at
        self._fields = at - struct.unpack_from("<i", data, at)[0]
        self._size = struct.unpack_from("<H", data, self._fields)[0]

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, struct.unpack_from("<I", data)[0])

    def _field(self, number: int) -> int:
        """Where a field lies, 0 where it is not there."""
        slot = 4 + 2 * number
        if slot >= self._size:
            return 0
        offset = struct.unpack_from("<H", self._data, self._fields + slot)[0]
        return self._at + offset if offset else 0

    def number(self, number: int, form: str) -> int:
        """A plain field, 0 where it is not there."""
        at = self._field(number)
        return int(struct.unpack_from(form, self._data, at)[0]) if at else 0

    def vector(self, number: int) -> tuple[int, int]:
        """Where a vector begins, and how many elements it has."""
        at = self._field(number)
        if not at:
            return 0, 0
        start = at + struct.unpack_from("<I", self._data, at)[0]
        return start + 4, struct.unpack_from("<I", self._data, start)[0]

    def tables(self, number: int) -> Iterator[_Table]:
        """The tables of a vector."""
        start, count = self.vector(number)
        for i in range(count):
            at = start + 4 * i
            yield _Table(self._data, at + struct.unpack_from("<I", self._data, at)[0])
