"""Weights of 2, 4 or 8 bits in blocks as ONNX Runtime computes with them.

Part of ``onnxruntime.py``. Its operator ``MatMulNBits`` multiplies by a matrix in blocks of its inputs, and
``GatherBlockQuantized`` looks rows of a table up. A blocked ``DequantizeLinear`` in front of a ``MatMul`` is
the portable form, but ONNX Runtime first joins a product and the sum behind it to a ``Gemm``, which has no
such kernel. Scales are stored as float16 where that is precise, and become float32 when the file is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from featherweight.errors import TargetError

if TYPE_CHECKING:
    import onnx_ir as ir

    from featherweight.exchange.export import OnnxExport
    from featherweight.formats import IntQuant

_MICROSOFT = "com.microsoft"
OPERATOR, TABLE = "MatMulNBits", "GatherBlockQuantized"
WIDTHS = (2, 4, 8)
_SMALLEST_BLOCK = 16
_BLOCKS = (128, 64, 32, 16)  # tried for what has one scale for a whole row
_INT8_INPUTS = 4  # accuracy level: inputs are rounded to 8 bits per block, as the fast kernels do
_HALF = (2.0**-14, 65504.0)  # normal numbers of float16


def blocks(fmt: IntQuant, runtime: str) -> IntQuant:
    """The grid that is stored for a matrix in blocks: scales of groups are float16 where they fit it.

    Raises:
        TargetError: There are no such blocks.
    """
    from featherweight.formats import PerChannel, PerGroup

    shared = fmt.granularity
    size = shared.size if isinstance(shared, PerGroup) else _SMALLEST_BLOCK
    along = (
        shared.axis == 1
        if isinstance(shared, PerGroup)
        else not isinstance(shared, PerChannel) or not shared.axis
    )
    if fmt.width not in WIDTHS or size < _SMALLEST_BLOCK or size & (size - 1) or not along:
        raise TargetError(
            f"{runtime} stores 2, 4 or 8 bits in groups of 16, 32, 64..., not {fmt.width} in {size}",
            fix="use weights: int4 and group: 32",
        )
    fmt = replace(fmt, signed=fmt.symmetric)
    scale, zero_point = fmt.grid()
    if not isinstance(shared, PerGroup) or not _fits_half(scale.numpy()):
        return fmt
    short = scale.half().float()
    low, high = ((end - zero_point) * short for end in (fmt.quant_min, fmt.quant_max))
    return replace(fmt, low=low, high=high)


def _fits_half(scale: np.ndarray) -> bool:
    return bool(scale.min(initial=1.0) >= _HALF[0] and scale.max(initial=1.0) <= _HALF[1])


def store_blocks(export: OnnxExport, formats: Mapping[str, IntQuant], runtime: str) -> None:
    """Replace products with these weights, and look-ups in them, in place.

    Args:
        export: What is edited.
        formats: Matrix (outputs, inputs) -> its grid.
        runtime: For messages.

    Raises:
        TargetError: A weight is read by something else.
    """
    for name, fmt in formats.items():
        value = export.values[name]
        export.model.graph.initializers.pop(str(value.name), None)
        uses = list(value.uses())
        tables = any(use.node.op_type == "Gather" and use.idx == 0 for use in uses)
        stored: _Blocks | None = None
        for use in uses:
            readers = [use.node]
            if use.node.op_type == "Transpose":
                readers = [inner.node for inner in use.node.outputs[0].uses()]
            for node in readers:
                table = node.op_type == "Gather" and node.inputs[0] is value
                if not table and node.op_type not in ("Gemm", "MatMul"):
                    raise TargetError(
                        f"{runtime} cannot read '{name}' in {fmt.width} bits in a {node.op_type}",
                        fix="exclude its layer under where",
                    )
                stored = stored or _Blocks.of(export.model.graph, name, value, fmt, tables)
                swap(export, node, stored.look_up(node) if table else stored.multiply(node))
            if use.node.op_type == "Transpose" and not use.node.outputs[0].uses():
                export.model.graph.remove(use.node, safe=True)
    if formats:
        export.model.opset_imports[_MICROSOFT] = 1
        export.model.graph.sort()


@dataclass
class _Blocks:
    """A matrix as it is stored.

    Attributes:
        graph: That holds it.
        packed: (outputs, groups * bytes of a block), or as products read it: (outputs, groups, bytes).
        scale: (outputs, groups), or as products read it: (outputs * groups,); float32.
        zeros: (outputs, bytes for all groups), or None: the middle.
        rows: Outputs.
        columns: Inputs.
        size: Elements of a block.
        width: Bits of an element.
        table: It is looked up too.
    """

    graph: ir.Graph
    packed: ir.Value
    scale: ir.Value
    zeros: ir.Value | None
    rows: int
    columns: int
    size: int
    width: int
    table: bool
    _reshaped: tuple[ir.Value, ir.Value] | None = None

    @classmethod
    def of(cls, graph: ir.Graph, name: str, value: ir.Value, fmt: IntQuant, table: bool) -> _Blocks:
        import onnx_ir as ir
        import torch

        from featherweight.formats import PerGroup

        assert value.const_value is not None
        matrix = torch.from_numpy(value.const_value.numpy().copy())
        rows, columns = matrix.shape
        shared = fmt.granularity
        size = shared.size if isinstance(shared, PerGroup) else _size(columns, fmt.width)
        groups = -(-columns // size)
        scale, zero_point = fmt.grid()
        if not isinstance(shared, PerGroup):
            scale, zero_point = (part.reshape(-1, 1).expand(rows, groups) for part in (scale, zero_point))
        middle = 1 << (fmt.width - 1)
        padded = np.full((rows, groups * size), middle, np.uint8)
        padded[:, :columns] = fmt.quantize(matrix).numpy() + (middle if fmt.signed else 0)
        short = scale.numpy().astype(np.float16 if _fits_half(scale.numpy()) else np.float32)
        if not np.array_equal(short.astype(np.float32), scale.numpy()):
            short = scale.numpy()
        scales = constant(graph, f"{name}.scale", short if table else short.reshape(-1))
        if short.dtype == np.float16:
            cast = ir.node("Cast", [scales], {"to": ir.DataType.FLOAT})
            graph.append(cast)
            scales = cast.outputs[0]
        zeros = None
        if not fmt.signed:
            points = zero_point.numpy().astype(np.uint8)
            zeros = constant(graph, f"{name}.zero_point", _packed(points, fmt.width))
        whole = _packed(padded, fmt.width)
        if table and columns * fmt.width % 8:
            raise TargetError(
                f"'{name}' has rows of {columns} elements of {fmt.width} bits, which are no whole bytes",
                fix="exclude its layer under where",
            )
        shown = whole[:, : columns * fmt.width // 8] if table else whole.reshape(rows, groups, -1)
        held = constant(graph, name, shown)
        return cls(graph, held, scales, zeros, rows, columns, size, fmt.width, table)

    def multiply(self, node: ir.Node) -> ir.Node:
        import onnx_ir as ir

        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        attributes = {
            "K": self.columns,
            "N": self.rows,
            "bits": self.width,
            "block_size": self.size,
            "accuracy_level": _INT8_INPUTS,
        }
        held, scales = self._operands()
        inputs = [node.inputs[0], held, scales, self.zeros, None, bias]
        return ir.node(OPERATOR, inputs, attributes, domain=_MICROSOFT)

    def _operands(self) -> tuple[ir.Value, ir.Value]:
        """The matrix and its scales in the shapes that products read."""
        import onnx_ir as ir

        if not self.table:
            return self.packed, self.scale
        if self._reshaped is None:
            shapes = ([self.rows, -1, self.size * self.width // 8], [-1])
            made: list[ir.Value] = []
            for value, shape in zip((self._padded(), self.scale), shapes, strict=True):
                sizes = constant(
                    self.graph, f"{self.packed.name}.shape{len(made)}", np.array(shape, np.int64)
                )
                reshape = ir.node("Reshape", [value, sizes])
                self.graph.append(reshape)
                made.append(reshape.outputs[0])
            self._reshaped = made[0], made[1]
        return self._reshaped

    def _padded(self) -> ir.Value:
        """A table with its rows filled up to whole blocks, by the middle."""
        import onnx_ir as ir

        rest = -self.columns % self.size * self.width // 8
        if not rest:
            return self.packed
        middle = _packed(np.full((1, 8), 1 << (self.width - 1), np.uint8), self.width)[0, 0]
        sizes = constant(self.graph, f"{self.packed.name}.rest", np.array([0, 0, 0, rest], np.int64))
        filler = constant(self.graph, f"{self.packed.name}.filler", np.array(middle))
        pad = ir.node("Pad", [self.packed, sizes, filler])
        self.graph.append(pad)
        return pad.outputs[0]

    def look_up(self, node: ir.Node) -> ir.Node:
        import onnx_ir as ir

        attributes = {"bits": self.width, "block_size": self.size, "gather_axis": 0, "quantize_axis": 1}
        inputs = [self.packed, node.inputs[1], self.scale, self.zeros]
        return ir.node(TABLE, inputs, attributes, domain=_MICROSOFT)


def _size(columns: int, width: int) -> int:
    """Of the blocks of rows with one scale each: what takes the fewest bytes, scales as float16."""

    def taken(size: int) -> int:
        groups = -(-columns // size)
        return groups * (size * width // 8 + 2)

    return min(_BLOCKS, key=taken)


def _packed(values: np.ndarray, width: int) -> np.ndarray:
    """Several values of a row in a byte, the lowest bits first; rows are padded to whole bytes."""
    per = 8 // width
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % per)))
    made = np.zeros((len(values), padded.shape[1] // per), np.uint8)
    for place in range(per):
        made |= padded[:, place::per] << (width * place)
    return made


# ---- edits that the other files of this runtime share


def swap(export: OnnxExport, node: ir.Node, made: ir.Node) -> None:
    """Put a node in the place of another, with as many outputs."""
    import onnx_ir as ir

    for old, new in zip(node.outputs, made.outputs, strict=True):
        new.type, new.shape = old.type, old.shape
        for known in (export.inside, export.values):
            known.update({key: new for key, held in known.items() if held is old})
    ir.convenience.replace_nodes_and_values(
        export.model.graph, node, [node], [made], node.outputs, made.outputs
    )


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A tensor of the file."""
    import onnx_ir as ir

    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value
