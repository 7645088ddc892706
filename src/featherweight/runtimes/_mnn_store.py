"""Writes formats into what MNN's converter made: integers or halves for weights, grids for tensors.

Part of ``mnn.py``. The converter has no say over scales: its own rounding takes the largest weight of a
channel. So it leaves the float weights in a file beside its own, and here they are put in, each in its
format.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from featherweight.errors import TargetError
from featherweight.runtimes import _mnn_file as mnn
from featherweight.runtimes._mnn_cut import Graph, Placed, copied, numbers, separate, zero
from featherweight.runtimes._mnn_file import File, Op
from featherweight.runtimes._mnn_flat import Data, Draft, Many, Old, Scalar, Table, Text, write

if TYPE_CHECKING:
    from featherweight.formats import IntQuant, TensorFormat

_INT8 = 6  # DataType
_NET_SCALARS = {5: "b", 6: "b", 8: "i", 9: "b"}
_OP_SCALARS = {1: "B", 5: "i", 6: "b"}
# What an operator may hold -> its scalars, the field that says where the rest is, the fields of the rest
_ASIDE: Mapping[int, tuple[Mapping[int, str], int, tuple[int, ...]]] = {
    mnn.HOLDS_BLOB: ({1: "b", 2: "i"}, 9, (7,)),
    mnn.HOLDS_CONVOLUTION: ({}, mnn.ASIDE, (mnn.WEIGHT, mnn.BIAS)),
    mnn.HOLDS_SCALE: ({0: "i"}, 3, (1, 2)),
    mnn.HOLDS_NORM: ({1: "f", 4: "i", 6: "?"}, 5, (2, 3)),
}
_CLOSE = 1e-4

Ends = tuple["IntQuant | None", "IntQuant | None"]  # what a convolution reads, and what it makes


@dataclass(frozen=True)
class Weight:
    """A parameter and its format, for an operator of the file."""

    name: str
    value: np.ndarray
    fmt: TensorFormat


def store(
    file: bytes, aside: bytes, weights: Mapping[str, Weight], quantized: Mapping[int, IntQuant]
) -> bytes:
    """The file with all weights inside, those with formats in them.

    Args:
        file: Made by the converter, its weights aside.
        aside: Those weights.
        weights: Operator -> what it shall hold.
        quantized: Tensor -> its format.

    Raises:
        TargetError: A weight or tensor is not there any more, or not what it was.
    """
    net = File(file)
    if net.net.places(mnn.SUBGRAPHS):
        raise TargetError("mnn stores no formats in a model with branches or loops", fix="leave it in float")
    graph = separate(net, quantized, weights)
    ops: list[Draft | Text | Old] = [] if graph.zero is None else [zero(graph.zero)]
    ops += [_placed(one, net, graph, aside, weights, quantized) for one in graph.placed]
    root = Draft.of(net.net, _NET_SCALARS)
    root.fields[mnn.OPS] = Many(ops)
    if graph.tensors:
        names = [Old(at) for at in net.net.places(mnn.TENSORS)]
        root.fields[mnn.TENSORS] = Many([*names, *(Text(name) for name in graph.tensors)])
    if quantized:
        root.fields[mnn.DESCRIBES] = Many([_describe(*one) for one in sorted(quantized.items(), key=_first)])
    return write(root, file)


def _first(pair: tuple[int, IntQuant]) -> int:
    return pair[0]


def _placed(
    one: Placed,
    net: File,
    graph: Graph,
    aside: bytes,
    weights: Mapping[str, Weight],
    quantized: Mapping[int, IntQuant],
) -> Draft | Old:
    """An operator as it will stand in the file."""
    op = one.op
    if op is None:
        return copied([*net.tensors, *graph.tensors][one.outputs[0]], one.inputs, one.outputs)
    if _clamps(op, quantized):
        return _clamped(op, quantized[op.outputs[0]])
    ends = (quantized.get(one.inputs[0]), quantized.get(one.outputs[0])) if one.inputs else (None, None)
    written = _rewritten(op, aside, weights.get(op.name), ends)
    if (one.inputs, one.outputs) != (op.inputs, op.outputs):
        written = Draft.of(op.table, _OP_SCALARS) if isinstance(written, Old) else written
        written.fields |= {mnn.OP_INPUTS: numbers(one.inputs), mnn.OP_OUTPUTS: numbers(one.outputs)}
    return written


def settle(file: bytes) -> bytes:
    """The file with a name that follows from its contents: MNN gives each a random one."""
    at = Table.root(file).target(mnn.UUID)
    if at is None:
        return file
    length = struct.unpack_from("<I", file, at)[0]
    blank = file[: at + 4] + bytes(length) + file[at + 4 + length :]
    return blank[: at + 4] + _digest(blank)[:length].encode().ljust(length, b"0") + blank[at + 4 + length :]


def _digest(raw: bytes) -> str:
    import hashlib

    return str(uuid.UUID(bytes=hashlib.sha256(raw).digest()[:16]))


def _describe(index: int, fmt: IntQuant) -> Draft:
    scale, zero_point = fmt.grid()
    numbers = (float(scale), float(zero_point), float(fmt.quant_min), float(fmt.quant_max))
    grid = Draft({number: Scalar("f", value) for number, value in enumerate(numbers)})
    grid.fields[4] = Scalar("i", _INT8)
    return Draft({1: Scalar("i", index), 4: grid})


def _clamps(op: Op, quantized: Mapping[int, IntQuant]) -> bool:
    """Whether an integer sum or product is followed by a ReLU inside, which MNN's kernel gets wrong."""
    main = op.main
    if op.holds != mnn.HOLDS_BINARY or main is None or not main.scalar(mnn.ACTIVATION, "i"):
        return False
    return all(number in quantized for number in (*op.inputs, *op.outputs))


def _clamped(op: Op, fmt: IntQuant) -> Draft:
    """The same without its ReLU: integers that begin at zero are clamped there anyway."""
    main = op.main
    assert main is not None
    if int(fmt.grid()[1]) != fmt.quant_min:
        raise TargetError(
            f"mnn has no integer kernel for '{op.name}' and its ReLU in a range with negative numbers",
            fix="use asymmetric activations",
        )
    plain = Draft.of(main, {0: "i", 1: "i", mnn.ACTIVATION: "i"})
    del plain.fields[mnn.ACTIVATION]
    changed = Draft.of(op.table, _OP_SCALARS)
    changed.fields[mnn.OP_MAIN] = plain
    return changed


def _rewritten(op: Op, aside: bytes, weight: Weight | None, ends: Ends) -> Draft | Old:
    """The operator with its weights inside."""
    main = op.main
    known = _ASIDE.get(op.holds)
    if main is None or known is None or main.place(known[1]) is None:
        if weight is not None:
            raise TargetError(f"mnn keeps no weights in '{op.name}'", where=f"'{weight.name}'")
        return Old(op.table.at)
    scalars, where, fields = known
    draft = Draft.of(main, scalars)
    del draft.fields[where]
    offset, *sizes = main.ints(where, "q")
    parts: dict[int, bytes] = {}
    for number, size in zip(fields, sizes, strict=False):
        parts[number] = aside[offset : offset + size]
        offset += size
    if weight is not None:
        outputs = main_outputs(main)
        floats = np.frombuffer(parts.pop(mnn.WEIGHT), np.float32).reshape(outputs, -1)
        draft.fields |= _coded(weight, floats, ends)
    draft.fields |= {number: Data(raw, 4) for number, raw in parts.items() if raw}
    changed = Draft.of(op.table, _OP_SCALARS)
    changed.fields[mnn.OP_MAIN] = draft
    return changed


def main_outputs(main: Table) -> int:
    """How many channels a convolution makes."""
    common = main.table(mnn.COMMON)
    return 0 if common is None else int(common.scalar(mnn.OUTPUT_COUNT, "i"))


def _coded(weight: Weight, floats: np.ndarray, ends: Ends) -> dict[int, Draft]:
    """Fields of a convolution that hold its weight."""
    from featherweight.formats import FloatCast

    if weight.value.size != floats.size:
        raise TargetError(
            f"mnn's converter changed the shape of '{weight.name}'", fix="exclude its layer under where"
        )
    if isinstance(weight.fmt, FloatCast):
        halves = np.clip(floats, -65504, 65504).astype(np.float16)
        return {
            mnn.QUANTIZED: Draft({mnn.BUFFER: Data(halves.tobytes()), mnn.CODING: Scalar("i", mnn.HALVES)})
        }
    values, scales, offsets = _grid(weight, floats)
    coded = Draft({mnn.BUFFER: Data(_packed(values, weight.fmt)), mnn.SCALE: Scalar("f", 1.0)})
    coded.fields[mnn.CODING] = Scalar("i", mnn.INTEGERS)
    coded.fields[mnn.BITS] = Scalar("i", weight.fmt.width)
    coded.fields[mnn.WIDE] = Scalar("?", max(values.shape) >= 1 << 16)
    coded.fields[mnn.SCALES] = Data(scales.astype(np.float32).tobytes(), 4)
    if offsets:
        coded.fields[mnn.OFFSETS] = Scalar("i", values.shape[0])
        coded.fields[mnn.LOWEST] = Scalar("i", -(1 << weight.fmt.width - 1))
    if ends[0] is None or ends[1] is None:
        return {mnn.QUANTIZED: coded}
    if offsets:
        raise TargetError(
            f"mnn's integer kernels are inexact with asymmetric weights ('{weight.name}')",
            fix="use symmetric weights, or activations: none",
        )
    (scale_in, zero_in), (scale_out, zero_out) = (end.grid() for end in ends if end is not None)
    coded.fields[mnn.SCALE_IN] = Scalar("f", float(scale_in))
    coded.fields[mnn.SCALE_OUT] = Scalar("f", float(scale_out))
    points = (int(zero_in), int(zero_out), ends[1].quant_min, ends[1].quant_max)
    symmetric = Draft({6 + number: Scalar("b", point) for number, point in enumerate(points)})
    symmetric.fields[5] = Scalar("i", 8)
    return {mnn.QUANTIZED: coded, mnn.SYMMETRIC: symmetric}


def _grid(weight: Weight, floats: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Integers (channels, weights), MNN's scales, and whether each has its smallest value before it.

    What the converter multiplied a channel by (a batch norm behind it) goes into the scales.
    """
    import torch

    from featherweight.formats import PerGroup

    fmt: IntQuant = weight.fmt  # type: ignore[assignment]
    if isinstance(fmt.granularity, PerGroup) and floats.shape[1] % fmt.granularity.size:
        raise TargetError(
            f"mnn has groups of one size: {fmt.granularity.size} does not divide the {floats.shape[1]} inputs"
            f" of '{weight.name}'",
            fix="take a group that divides them, or exclude the layer under where",
        )
    flat = weight.value.reshape(floats.shape)
    factor = (floats * flat).sum(1) / np.maximum((flat * flat).sum(1), 1e-30)
    factor = np.where((flat * flat).sum(1) > 0, factor, 1.0)
    if not np.allclose(
        floats, flat * factor[:, None], rtol=_CLOSE, atol=_CLOSE * np.abs(floats).max(initial=0)
    ):
        raise TargetError(
            f"mnn's converter changed '{weight.name}'", fix="put fold first, or exclude the layer under where"
        )
    factor = np.where(np.abs(factor - 1) < _CLOSE, 1.0, factor)
    scale, zero_point = fmt.grid()
    values = fmt.quantize(torch.from_numpy(weight.value)).numpy().reshape(floats.shape)
    steps = scale.numpy().reshape(-1, 1) if scale.dim() < 2 else scale.numpy()
    points = zero_point.numpy().reshape(-1, 1) if scale.dim() < 2 else zero_point.numpy()
    steps = np.broadcast_to(steps, (len(floats), steps.shape[1])) * np.abs(factor)[:, None]
    points = np.broadcast_to(points, steps.shape)
    if (factor < 0).any():
        if not fmt.symmetric:
            raise TargetError(f"mnn's converter turned '{weight.name}' around", fix="put fold first")
        values = np.where(factor[:, None] < 0, -values, values)
    if fmt.symmetric:
        return values, steps, False
    lowest = (-(1 << fmt.width - 1) - points) * steps
    return values, np.stack([lowest, steps], -1), True


def _packed(values: np.ndarray, fmt: TensorFormat) -> bytes:
    """MNN's coding: the shape, all values that there may be, and for each weight which one it is."""
    bits = fmt.width
    half = 1 << bits - 1
    shape = struct.pack("<2I" if max(values.shape) >= 1 << 16 else "<2H", *values.shape)
    known = np.arange(-half, half, dtype=np.int8).tobytes()
    index: np.ndarray = (values.reshape(-1) + half).astype(np.uint8)
    if bits == 4:
        index = np.append(index, np.zeros(index.size % 2, np.uint8))
        index = index[0::2] << 4 | index[1::2]
    return b"\2" + shape + bytes([2 * half % 256]) + known + index.tobytes()
