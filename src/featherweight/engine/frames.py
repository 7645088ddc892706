"""Arrays and a few words over a pipe: how the engine and its runner talk.

A frame is the length of a JSON header (4 bytes, little-endian), the header, and the raw bytes of the
arrays that it describes under ``arrays``. No pickle: neither side can be made to run the other's bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

_PLAIN = "biufcSU"  # kinds of dtype that are their bytes
_SHORT = "the other side ended inside a frame"


def send(stream: BinaryIO, header: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    """Write one frame.

    Raises:
        TypeError: An array holds Python objects.
    """
    plain = [np.ascontiguousarray(array).reshape(np.shape(array)) for array in arrays]
    for array in plain:
        if array.dtype.kind not in _PLAIN:
            raise TypeError(f"an array of {array.dtype} cannot be sent to a runner")
    described = [{"dtype": array.dtype.str, "shape": list(array.shape)} for array in plain]
    head = json.dumps({**header, "arrays": described}).encode()
    stream.write(struct.pack("<I", len(head)) + head)
    for array in plain:
        if array.size:
            stream.write(array.reshape(-1).view(np.uint8).data)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], tuple[np.ndarray, ...]] | None:
    """The next frame; None at the end of the stream.

    Raises:
        EOFError: The stream ends inside a frame.
    """
    first = stream.read(4)
    if not first:
        return None
    if len(first) < 4:
        raise EOFError(_SHORT)
    (length,) = struct.unpack("<I", first)
    header = json.loads(bytes(_exactly(stream, length)))
    arrays = []
    for described in header.pop("arrays"):
        dtype, shape = np.dtype(described["dtype"]), tuple(described["shape"])
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        arrays.append(np.frombuffer(_exactly(stream, size), dtype=dtype).reshape(shape))
    return header, tuple(arrays)


def _exactly(stream: BinaryIO, size: int) -> bytearray:
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size:
        count = stream.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(_SHORT)
        filled += count
    return data
