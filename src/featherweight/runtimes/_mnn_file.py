"""What is in a ``.mnn`` file: its operators and tensors, and how each weight is stored.

Part of ``mnn.py``. Numbers of tables, fields and operators are those of MNN's ``schema/default/MNN.fbs``
and ``CaffeOp.fbs``, to which new ones are only ever appended.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from featherweight.runtimes._mnn_flat import Table

DESCRIBES, OPS, TENSORS, SUBGRAPHS, UUID = 1, 3, 7, 10, 11  # Net
OP_INPUTS, OP_HOLDS, OP_MAIN, OP_NAME, OP_OUTPUTS, OP_TYPE = 0, 1, 2, 3, 4, 5  # Op
COMMON, WEIGHT, BIAS, QUANTIZED, SYMMETRIC, ASIDE = 0, 1, 2, 3, 4, 6  # Convolution2D
GROUP, OUTPUT_COUNT = 9, 10  # Convolution2DCommon
BUFFER, SCALES, CODING, SCALE, SCALE_IN, SCALE_OUT, BITS, LOWEST, OFFSETS, WIDE = (
    *(0, 1, 2, 4, 5, 6, 7, 8, 9, 11),
)  # IDSTQuan
INTEGERS, HALVES, BYTES = 1, 3, 4  # its codings
CONVOLUTIONS = frozenset({12, 13})  # and depthwise
MOVES = frozenset({28, 46, 73, 90, 107, 129})  # flatten, permute, reshape, squeeze, unsqueeze, convert
CONSTANT = 11
# What an operator may hold: its number in the union OpParameter
HOLDS_BINARY, HOLDS_BLOB, HOLDS_CONVOLUTION, HOLDS_SCALE, HOLDS_NORM = 6, 7, 9, 58, 88
ACTIVATION = 2  # BinaryOp
_FLOAT = 1  # DataType
_BLOB_TYPE, _BLOB_DIMS, _BLOB_FLOATS = 2, 0, 7


@dataclass(frozen=True)
class Op:
    """One operator: its name, number and tensors, and the table that it was read from."""

    name: str
    type: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    holds: int
    table: Table

    @property
    def convolves(self) -> bool:
        return self.holds == HOLDS_CONVOLUTION

    @property
    def main(self) -> Table | None:
        """What it holds: weights and the like."""
        return self.table.table(OP_MAIN)


@dataclass(frozen=True)
class Held:
    """How a weight, a bias or a constant is stored."""

    op: str
    part: str
    dtype: str
    bytes: int


@dataclass(frozen=True)
class File:
    """A ``.mnn`` file that was read."""

    buffer: bytes

    @cached_property
    def net(self) -> Table:
        return Table.root(self.buffer)

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors, which operators know by number."""
        return self.net.strings(TENSORS)

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        return tuple(
            Op(
                table.string(OP_NAME),
                table.scalar(OP_TYPE, "i"),
                table.ints(OP_INPUTS),
                table.ints(OP_OUTPUTS),
                table.scalar(OP_HOLDS, "B"),
                table,
            )
            for table in self.net.tables(OPS)
        )

    @cached_property
    def quantized(self) -> Mapping[int, tuple[float, int]]:
        """Tensor -> scale and zero point."""
        found: dict[int, tuple[float, int]] = {}
        for table in self.net.tables(DESCRIBES):
            grid = table.table(4)
            if grid is not None:
                found[table.scalar(1, "i")] = (grid.scalar(0, "f"), int(grid.scalar(1, "f")))
        return found

    def held(self) -> Iterator[Held]:
        """Every weight, bias and float constant."""
        for op in self.ops:
            main = op.main
            if main is None:
                continue
            if op.holds == HOLDS_CONVOLUTION:
                yield Held(op.name, "weight", *_weight(main))
                yield from _floats(op.name, "bias", main, BIAS)
            elif op.holds == HOLDS_BLOB and main.scalar(_BLOB_TYPE, "i") in (0, _FLOAT):
                yield from _floats(op.name, "constant", main, _BLOB_FLOATS)
            elif op.holds in (HOLDS_SCALE, HOLDS_NORM):
                first = 1 if op.holds == HOLDS_SCALE else 2
                yield from _floats(op.name, "weight", main, first)
                yield from _floats(op.name, "bias", main, first + 1)


def _floats(op: str, part: str, table: Table, number: int) -> Iterator[Held]:
    raw = table.bytes(number, 4)
    if raw:
        yield Held(op, part, "float32", len(raw))


def _weight(main: Table) -> tuple[str, int]:
    """Type and bytes of a convolution's weight."""
    coded = main.table(QUANTIZED)
    if coded is None:
        return "float32", len(main.bytes(WEIGHT, 4))
    coding = coded.scalar(CODING, "i")
    if coding == HALVES:
        return "float16", len(coded.bytes(BUFFER))
    values = integers(coded)
    bits = coded.scalar(BITS, "i") or 8
    return f"int{bits}", math.ceil(values.size * bits / 8)


def integers(coded: Table) -> np.ndarray:
    """The integers of a weight, (channels, weights of a channel).

    Raises:
        ValueError: They are coded in a way that is not written here.
    """
    raw = np.frombuffer(coded.bytes(BUFFER), np.uint8)
    if coded.scalar(CODING, "i") != INTEGERS:
        raise ValueError(f"weights are coded as {coded.scalar(CODING, 'i')}")
    width = 4 if coded.scalar(WIDE, "?") else 2
    shape = raw[1 : 1 + 2 * width].view(np.uint32 if width == 4 else np.uint16)
    place = 1 + 2 * width
    samples = int(raw[place]) or 256
    known = raw[place + 1 : place + 1 + samples].view(np.int8)
    packed = raw[place + 1 + samples :]
    index = packed if samples > 16 else np.stack([packed >> 4, packed & 15], -1).reshape(-1)
    rows, columns = (int(size) for size in shape)
    return np.sort(known)[index[: rows * columns]].reshape(rows, columns)
