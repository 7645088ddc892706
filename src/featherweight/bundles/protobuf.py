"""Where the tensors of an ONNX model lie, read from the wire format of protocol buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from featherweight.bundles.spans import Span

_WIDTHS = {
    1: 32,
    4: 16,
    5: 16,
    6: 32,
    7: 32,
    10: 16,
    11: 32,
    12: 32,
    13: 32,
    16: 16,
    21: 4,
    22: 4,
    25: 2,
    26: 2,
}
# Fields that lead from a message to its tensors: message -> field -> the message in it.
_WAYS = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 10: "tensor", 6: "graph", 11: "graph"},
}


@dataclass
class _Tensor:
    shape: list[int] = field(default_factory=list)
    kind: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    external: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return _WIDTHS.get(self.kind, 8)


def onnx_arrays(data: bytes) -> Iterator[Span]:
    """Arrays that lie in the model itself."""
    for tensor in _tensors(data, 0, len(data), "model"):
        for start, stop in tensor.spans:
            yield Span(start, stop, tensor.width, tuple(tensor.shape))


def external_arrays(data: bytes, name: str) -> Iterator[Span]:
    """Arrays of the model that lie in the file ``name`` beside it."""
    for tensor in _tensors(data, 0, len(data), "model"):
        told = tensor.external
        if told.get(b"location", b"").decode() == name and b"length" in told:
            start = int(told.get(b"offset", b"0"))
            yield Span(start, start + int(told[b"length"]), tensor.width, tuple(tensor.shape))


def _tensors(data: bytes, start: int, stop: int, message: str) -> Iterator[_Tensor]:
    if message == "tensor":
        yield _tensor(data, start, stop)
        return
    ways = _WAYS[message]
    for number, low, high in _fields(data, start, stop):
        if number in ways and high >= 0:
            yield from _tensors(data, low, high, ways[number])


def _tensor(data: bytes, start: int, stop: int) -> _Tensor:
    found = _Tensor()
    for number, low, high in _fields(data, start, stop):
        if number == 1 and high < 0:
            found.shape.append(low)
        elif number == 1:
            while low < high:
                size, low = _varint(data, low)
                found.shape.append(size)
        elif number == 2 and high < 0:
            found.kind = low
        elif number in (4, 9):  # float_data, raw_data
            found.spans.append((low, high))
        elif number == 13:
            pair = {one: data[a:b] for one, a, b in _fields(data, low, high)}
            found.external[pair.get(1, b"")] = pair.get(2, b"")
    return found


def _fields(data: bytes, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of each field; of a plain number its value, and -1 as its end."""
    while at < stop:
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value, -1
        elif wire == 2:
            size, at = _varint(data, at)
            yield number, at, at + size
            at += size
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"no wire type of protocol buffers: {wire}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > 70:
            raise ValueError("a number does not end")
