"""Keeps the grids of integer tensors apart where MNN would let them run into each other.

Part of ``mnn.py``. When a file is opened, MNN gives a tensor's scale to what was only moved, pooled or
clamped of it, forwards and backwards, whatever scale the file gives to that; and its integer kernels for
maxima and for a scale per channel are wrong on x86. So an operator that is not known to keep its input's
grid works on floats here: it reads and writes copies that have no grid. A copy is a sum with zero, past
which MNN hands no scale on. Operators that read the same integers as floats share a copy too: MNN lets them
share one of its own, and crashes when inputs change their shape.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from featherweight.runtimes import _mnn_file as mnn
from featherweight.runtimes._mnn_file import File, Op
from featherweight.runtimes._mnn_flat import Data, Draft, Scalar, Text

if TYPE_CHECKING:
    from featherweight.formats import IntQuant

# Grids stop at these: sums and products, constants, convolutions, inputs, products of matrices, sizes, sums
# over axes, softmax, functions of one value, norms of a layer
_STOPS = frozenset({7, 11, 12, 13, 34, 39, 66, 68, 80, 82, 85, 101, 603})
_INTEGER = frozenset({7, 85, 603})  # of these some have integer kernels: sums, softmax, norms of a layer
_SHAPES = frozenset({66, 80, 82})
_CONSTANT, _CONVOLUTION, _SUM = 11, 12, 7
_FLOAT = 1  # DataType


@dataclass(frozen=True)
class Placed:
    """An operator with the tensors that it reads and writes now; without one: a copy."""

    op: Op | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass
class Graph:
    """Operators in order, and the names of new tensors, whose numbers follow those of the file."""

    placed: list[Placed] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    zero: int | None = None

    def tensor(self, net: File, name: str) -> int:
        self.tensors.append(name)
        return len(net.tensors) + len(self.tensors) - 1


def separate(net: File, quantized: Mapping[int, IntQuant], integral: Container[str]) -> Graph:
    """The file's operators, with copies where grids would run into each other.

    Args:
        net: The file.
        quantized: Tensor -> its format.
        integral: Names of operators whose weights will be integers.
    """
    graph = Graph()
    constants = {number for op in net.ops if op.type == _CONSTANT for number in op.outputs}
    floats: dict[int, int] = {}
    mixing = {id(op) for op in net.ops if _mixes(op, quantized, constants)}
    reading = {id(op) for op in net.ops if id(op) in mixing or not _keeps(op, quantized, integral)}
    readers = Counter(
        number for op in net.ops if id(op) in reading for number in set(op.inputs) if number in quantized
    )
    for op in net.ops:
        shares = id(op) in reading and any(readers[number] > 1 for number in op.inputs)
        if id(op) not in mixing and not shares:
            graph.placed.append(Placed(op, op.inputs, op.outputs))
            continue
        if graph.zero is None:
            graph.zero = graph.tensor(net, "zero")
        for number in op.inputs:
            if number in quantized and number not in floats:
                floats[number] = graph.tensor(net, f"{net.tensors[number]}/float")
                graph.placed.append(Placed(None, (number, graph.zero), (floats[number],)))
        inputs = tuple(floats.get(number, number) for number in op.inputs)
        made = {number: number for number in op.outputs}
        for number in op.outputs:
            if number in quantized and id(op) in mixing:
                made[number] = graph.tensor(net, f"{net.tensors[number]}/float")
        graph.placed.append(Placed(op, inputs, tuple(made.values())))
        for number, copied in made.items():
            if copied != number:
                graph.placed.append(Placed(None, (copied, graph.zero), (number,)))
    return graph


def _mixes(op: Op, quantized: Mapping[int, IntQuant], constants: set[int]) -> bool:
    """Whether MNN would hand a grid through an operator that does not keep it."""
    if op.type in _STOPS and not _grouped(op):
        return False
    read = op.inputs[:1] if op.type in mnn.MOVES else [one for one in op.inputs if one not in constants]
    grids = [quantized.get(number) for number in (*read, *op.outputs)]
    if not any(grids):
        return False
    return op.type not in mnn.MOVES or not _one(grids)


def _keeps(op: Op, quantized: Mapping[int, IntQuant], integral: Container[str]) -> bool:
    """Whether it reads integers as such, or nothing but their shape."""
    if op.type in mnn.MOVES or op.type in _SHAPES:
        return True
    if op.convolves:
        return op.name in integral
    return op.type in _INTEGER and all(number in quantized for number in (*op.inputs, *op.outputs))


def _grouped(op: Op) -> bool:
    """Whether it is a convolution in groups, which MNN's integer kernels get wrong; depthwise has its own."""
    main = op.main
    common = main.table(mnn.COMMON) if op.convolves and main is not None else None
    return op.type == _CONVOLUTION and common is not None and common.scalar(mnn.GROUP, "i", 1) != 1


def _one(grids: Sequence[IntQuant | None]) -> bool:
    steps = [None if fmt is None else fmt.grid() for fmt in grids]
    return len({None if step is None else (float(step[0]), int(step[1])) for step in steps}) == 1


def zero(number: int) -> Draft:
    """The constant that copies add."""
    blob = Draft({1: Scalar("b", 0), 2: Scalar("i", _FLOAT), 7: Data(struct.pack("<f", 0.0), 4)})
    return _operator("zero", _CONSTANT, mnn.HOLDS_BLOB, blob, (), (number,))


def copied(name: str, inputs: Sequence[int], outputs: Sequence[int]) -> Draft:
    """An operator that copies a tensor."""
    plus = Draft({0: Scalar("i", 0), 1: Scalar("i", _FLOAT), 2: Scalar("i", 0)})
    return _operator(name, _SUM, mnn.HOLDS_BINARY, plus, inputs, outputs)


def numbers(values: Sequence[int]) -> Data:
    """A vector of tensors' numbers."""
    return Data(struct.pack(f"<{len(values)}i", *values), 4)


def _operator(
    name: str, kind: int, holds: int, main: Draft, inputs: Sequence[int], outputs: Sequence[int]
) -> Draft:
    operator = Draft({mnn.OP_HOLDS: Scalar("B", holds), mnn.OP_MAIN: main, mnn.OP_NAME: Text(name)})
    operator.fields[mnn.OP_OUTPUTS] = numbers(outputs)
    operator.fields[mnn.OP_TYPE] = Scalar("i", kind)
    if inputs:
        operator.fields[mnn.OP_INPUTS] = numbers(inputs)
    return operator
