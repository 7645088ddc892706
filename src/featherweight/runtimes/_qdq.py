"""Writes formats into an ONNX graph as integers and Q/DQ pairs, shaped for a runtime's kernels.

Part of the runtimes that read ONNX, each of which says what its kernels ask for: a ``Dialect``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import TargetError
from featherweight.runtime import Role

if TYPE_CHECKING:
    import onnx_ir as ir

    from featherweight.exchange.export import OnnxExport
    from featherweight.formats import FloatCast, IntQuant, PerGroup, TensorFormat

_BIAS_LIMIT = 2**30  # int32, with room for what is added to it
_MICROSOFT = "com.microsoft"
_MOVES = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Flatten", "Identity"}
)
_BLOCKS_OPSET = 21  # scales per block, and integers of 4 bits
_SMALLEST_BLOCK = 8  # elements; below that scales take more than integers


@dataclass(frozen=True)
class Dialect:
    """What a runtime asks for beside the formats.

    Attributes:
        runtime: Its name, for messages.
        integer_biases: Biases of integer layers as int32 at the product of both scales; else they stay float.
        guard_floats: Hide float layers between integer ones from ONNX Runtime, which would round them.
        whole_blocks: Blocks of a matrix must be of one size; shorter ones that share a scale may be.
    """

    runtime: str = "onnxruntime"
    integer_biases: bool = True
    guard_floats: bool = True
    whole_blocks: bool = False


def store_formats(
    export: OnnxExport,
    formats: Mapping[str, tuple[TensorFormat, ...]],
    realise: Callable[[TensorFormat, Role], TensorFormat],
    dialect: Dialect | None = None,
) -> None:
    """Turn formats into integers and Q/DQ pairs, in place.

    Args:
        export: What is edited.
        formats: By parameter or traced value; the last of a chain is stored.
        realise: The grid that will be stored for a format.
        dialect: What else the runtime asks for; by default that of ONNX Runtime.
    """
    writer = _Writer(export, dialect or Dialect())
    for name, chain in formats.items():
        value = export.values[name]
        role: Role = "weight" if value.const_value is not None else "activation"
        fmt: Any = realise(chain[-1], role)
        if role == "weight":
            writer.weight(name, value, fmt)
        else:
            writer.activation(name, value, fmt)
    if writer.dialect.integer_biases:
        writer.biases()
    if writer.dialect.guard_floats:
        writer.floats()
    writer.finish()


def _explicit(conv: ir.Node) -> bool:
    """Whether a convolution's pads are told in numbers."""
    return "auto_pad" not in conv.attributes or conv.attributes["auto_pad"].as_string() == "NOTSET"


def _zeros_around(pad: ir.Node) -> list[int] | None:
    """A convolution's pads for those of a node that puts zeros around images; None where it does else."""
    import onnx_ir as ir

    mode = pad.attributes["mode"].as_string() if "mode" in pad.attributes else "constant"
    given = [
        ir.convenience.get_const_tensor(value) if value is not None else None for value in pad.inputs[1:]
    ]
    amounts, filler, axes = (*given, None, None)[:3] if given else (None, None, None)
    if mode != "constant" or amounts is None or axes is not None or len(pad.inputs) > 3:
        return None
    if len(pad.inputs) > 2 and pad.inputs[2] is not None and (filler is None or filler.numpy().any()):
        return None
    sizes = [int(size) for size in amounts.numpy()]
    rank = len(sizes) // 2
    begins, ends = sizes[:rank], sizes[rank:]
    if any((*begins[:2], *ends[:2])) or min(sizes) < 0:
        return None
    return [*begins[2:], *ends[2:]]


def _kind(fmt: IntQuant) -> ir.DataType:
    """The type that holds a format's integers."""
    import onnx_ir as ir

    if fmt.width <= 4:
        return ir.DataType.INT4 if fmt.signed else ir.DataType.UINT4
    return ir.DataType.INT8 if fmt.signed else ir.DataType.UINT8


@dataclass
class _Weight:
    """A weight as it was written: integers, scale and zero point, and the axis of its channels."""

    integers: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    axis: int | None

    @property
    def scales(self) -> np.ndarray:
        return _array(self.scale)

    def widen(self, smallest: np.ndarray) -> None:
        """Give each channel at least this scale; the integers follow."""
        import onnx_ir as ir

        old = self.scales
        new = np.maximum(old, smallest if self.axis is not None else smallest.max(initial=0)).astype(
            np.float32
        )
        if np.array_equal(new, old):
            return
        values = _array(self.integers).astype(np.float64) - _array(self.zero_point).flat[0]
        shape = [1] * values.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        turned = np.rint(values * (old.astype(np.float64) / new).reshape(shape if old.ndim else ()))
        turned += _array(self.zero_point).flat[0]
        self.integers.const_value = ir.tensor(
            turned.astype(_array(self.integers).dtype), name=self.integers.name
        )
        self.scale.const_value = ir.tensor(new, name=self.scale.name)


def _array(value: ir.Value) -> np.ndarray:
    if value.const_value is None:
        raise TypeError(f"'{value.name}' is no constant")
    return value.const_value.numpy()


class _Writer:
    """Edits one exported graph."""

    def __init__(self, export: OnnxExport, dialect: Dialect) -> None:
        self.dialect = dialect
        self.inside = export.inside
        self.graph = export.model.graph
        self.opsets = export.model.opset_imports
        self._inputs: dict[int, np.ndarray] = {}  # dequantized activation -> its scale
        self._weights: dict[int, _Weight] = {}  # dequantized weight -> what was written
        self._done: dict[int, str] = {}

    def _initializer(self, name: str, array: np.ndarray, kind: ir.DataType | None = None) -> ir.Value:
        import onnx_ir as ir

        tensor = ir.tensor(np.asarray(array, order="C"), kind, name=name)
        value = ir.val(name, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def activation(self, name: str, value: ir.Value, fmt: IntQuant) -> None:
        """Q and DQ behind the value; every consumer reads what was dequantized."""
        import onnx_ir as ir

        if (
            id(value) in self._done
        ):  # two traced names of one tensor (dropout, identity) share the first format
            return
        scale, zero_point = fmt.grid()
        uses = list(value.uses())
        parts = [
            self._initializer(f"{name}.scale", scale.numpy()),
            self._initializer(f"{name}.zero_point", zero_point.numpy().astype(_kind(fmt).numpy())),
        ]
        quantized = ir.node("QuantizeLinear", [value, *parts])
        restored = ir.node("DequantizeLinear", [quantized.outputs[0], *parts])
        producer = value.producer()
        if producer is None:
            first = next(iter(self.graph))
            self.graph.insert_before(first, [quantized, restored])
        else:
            self.graph.insert_after(producer, [quantized, restored])
        output = restored.outputs[0]
        for use in uses:
            use.node.replace_input_with(use.idx, output)
        for index, graph_output in enumerate(self.graph.outputs):
            if graph_output is value:
                output.type, output.shape = value.type, value.shape
                output.name, value.name = value.name, f"{name}.float"
                self.graph.outputs[index] = output
        self.inside |= {traced: output for traced, held in self.inside.items() if held is value}
        self._done[id(value)] = name
        self._done[id(output)] = name
        self._inputs[id(output)] = scale.numpy()

    def weight(self, name: str, value: ir.Value, fmt: IntQuant | FloatCast) -> None:
        """What is stored, in the parameter's place; a transpose in front of a matmul is folded into it."""
        if value.const_value is None or value.name is None:
            raise TargetError(f"{self.dialect.runtime} found no constant for '{name}'")
        array = value.const_value.numpy()
        del self.graph.initializers[value.name]
        made: dict[tuple[int, ...] | None, ir.Value] = {}
        for use in list(value.uses()):
            node, index = use.node, use.idx
            order: tuple[int, ...] | None = None
            replaced = [(node, index)]
            if node.op_type == "Transpose":
                order = tuple(int(i) for i in node.attributes["perm"].as_ints())
                replaced = [(inner.node, inner.idx) for inner in node.outputs[0].uses()]
            if order not in made:
                suffix = f".{len(made)}" if made else ""
                axes = order or tuple(range(array.ndim))
                restored = self._restored(f"{name}{suffix}", array, fmt, axes)
                self.graph.insert_before(node, restored)
                made[order] = restored.outputs[0]
            for inner, position in replaced:
                inner.replace_input_with(position, made[order])
            if order is not None:
                self.graph.remove(node, safe=True)

    def _restored(
        self, name: str, array: np.ndarray, fmt: IntQuant | FloatCast, axes: tuple[int, ...]
    ) -> ir.Node:
        """A weight's stored form with its axes in this order, and the node that makes floats of it."""
        import onnx_ir as ir
        import torch

        from featherweight.formats import FloatCast, PerChannel, PerGroup

        if isinstance(fmt, FloatCast):
            short = fmt.project(torch.from_numpy(array)).numpy().astype(np.float16).transpose(axes)
            return ir.node("Cast", [self._initializer(name, short)], {"to": ir.DataType.FLOAT})
        kind = _kind(fmt)
        integers = fmt.quantize(torch.from_numpy(array)).numpy().astype(np.int16).transpose(axes)
        scale, zero_point = (tensor.numpy() for tensor in fmt.grid())
        attributes: dict[str, int] = {}
        if isinstance(fmt.granularity, (PerChannel, PerGroup)):
            attributes["axis"] = axes.index(fmt.granularity.axis)
        if isinstance(fmt.granularity, PerGroup):
            size, group = self._block(name, array.shape[fmt.granularity.axis], fmt.granularity)
            attributes["block_size"] = size
            scale, zero_point = (
                grid.take(group, fmt.granularity.axis).transpose(axes) for grid in (scale, zero_point)
            )
        if "block_size" in attributes or kind.bitwidth < 8:
            self.opsets[""] = max(self.opsets[""], _BLOCKS_OPSET)
        parts = [
            self._initializer(name, integers.astype(kind.numpy()), kind),
            self._initializer(f"{name}.scale", scale),
            self._initializer(f"{name}.zero_point", zero_point.astype(kind.numpy()), kind),
        ]
        restored = ir.node("DequantizeLinear", parts, attributes=attributes)
        self._weights[id(restored.outputs[0])] = _Weight(parts[0], parts[1], parts[2], attributes.get("axis"))
        return restored

    def _block(self, name: str, elements: int, granularity: PerGroup) -> tuple[int, list[int]]:
        """Size of the blocks that store these groups, and the group that each block is of."""
        size = granularity.size
        if granularity.groups(elements) == 1:
            size = elements
        elif self.dialect.whole_blocks:
            size = math.gcd(size, elements)
        if size < min(_SMALLEST_BLOCK, granularity.size):
            raise TargetError(
                f"{self.dialect.runtime} cannot cut the {elements} inputs of '{name}' into groups of "
                f"{granularity.size}",
                fix=f"give quantize a group that divides {elements}, or exclude the layer under where",
            )
        return size, [start // granularity.size for start in range(0, elements, size)]

    def biases(self) -> None:
        """Integer kernels add their bias as int32 at the product of the input's and the weight's scales.

        Where that product is too small for the bias (a channel of weights that are all but zero), the
        weight's scale grows until it fits: left to itself ONNX Runtime lets the bias overflow.
        """
        import onnx_ir as ir

        added = [node for node in self.graph if node.op_type in ("Conv", "Gemm") and self._adds(node)]
        for node in added:
            source, weight, bias = (value for value in node.inputs[:3] if value is not None)
            self._weights[id(weight)].widen(np.abs(_array(bias)) / (self._inputs[id(source)] * _BIAS_LIMIT))
        written: Counter[str] = Counter()
        for node in added:
            source, weight, bias = (value for value in node.inputs[:3] if value is not None)
            scale = self._inputs[id(source)].astype(np.float32) * self._weights[id(weight)].scales
            integers = np.rint(_array(bias).astype(np.float64) / scale).astype(np.int32)
            name = f"{bias.name}.{written[str(bias.name)]}" if written[str(bias.name)] else str(bias.name)
            written[str(bias.name)] += 1
            self.graph.initializers.pop(name, None)
            parts = [self._initializer(name, integers), self._initializer(f"{name}.scale", scale)]
            restored = ir.node("DequantizeLinear", parts, attributes={"axis": 0} if scale.ndim else {})
            self.graph.insert_before(node, restored)
            node.replace_input_with(2, restored.outputs[0])

    def floats(self) -> None:
        """Keep layers whose weights are float what they are.

        ONNX Runtime rounds the weights of a Conv, ConvTranspose or Gemm that reads what was dequantized to
        int8 by itself, per tensor (its WeightBiasQuantization). It passes by its own FusedConv, which is as
        fast, and layers whose bias is no constant.
        """
        for node in list(self.graph):
            if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or not self._reads_integers(node):
                continue
            weight = node.inputs[1]
            if weight is None or weight.const_value is None:
                continue
            if node.op_type == "Conv":
                node.domain, node.op_type = _MICROSOFT, "FusedConv"
                self.opsets[_MICROSOFT] = 1
            else:
                self._hide_bias(node, weight)

    def _reads_integers(self, node: ir.Node) -> bool:
        """Whether a layer's input was dequantized, and at most moved since."""
        value = node.inputs[0]
        while value is not None and id(value) not in self._inputs:
            producer = value.producer()
            if producer is None or producer.op_type not in _MOVES:
                return False
            value = producer.inputs[0]
        return value is not None

    def _hide_bias(self, node: ir.Node, weight: ir.Value) -> None:
        """The bias as finely divided integers, which is float32's precision."""
        import onnx_ir as ir

        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and bias.const_value is None:
            return
        if bias is None:
            turned = "transB" in node.attributes and node.attributes["transB"].as_int()
            groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
            shape = _array(weight).shape
            channels = shape[1] * groups if node.op_type == "ConvTranspose" else shape[0 if turned else 1]
            name, values = f"{weight.name}.bias", np.zeros(channels)
        else:
            name, values = str(bias.name), _array(bias).astype(np.float64)
        scale = np.asarray(max(np.abs(values).max(initial=0), 1e-30) / _BIAS_LIMIT, np.float32)
        parts = [
            self._initializer(f"{name}.hidden", np.rint(values / scale).astype(np.int32)),
            self._initializer(f"{name}.hidden.scale", scale),
        ]
        restored = ir.node("DequantizeLinear", parts)
        self.graph.insert_before(node, restored)
        node.resize_inputs(3)
        node.replace_input_with(2, restored.outputs[0])

    def _adds(self, node: ir.Node) -> bool:
        """Whether the operator is one of integers and has a bias of its own, or shared with such ones."""
        if len(node.inputs) < 3:
            return False
        source, weight, bias = node.inputs[:3]
        if id(source) not in self._inputs or id(weight) not in self._weights:
            return False
        if bias is None or bias.const_value is None or _array(bias).ndim != 1:
            return False
        return all(use.idx == 2 and use.node.op_type in ("Conv", "Gemm") for use in bias.uses())

    def paddings(self) -> None:
        """Zeros that a node of their own puts around what convolutions read become those convolutions' own.

        Between the integers of two layers such a node would be computed in float, and the layers around it.
        """
        import onnx_ir as ir

        for pad in [node for node in self.graph if node.op_type == "Pad"]:
            amounts = _zeros_around(pad)
            readers = self._convolutions_behind(pad)
            if amounts is None or not readers:
                continue
            for conv, _ in readers:
                own = conv.attributes["pads"].as_ints() if "pads" in conv.attributes else [0] * len(amounts)
                both = [a + b for a, b in zip(own, amounts, strict=True)]
                conv.attributes["pads"] = ir.AttrInt64s("pads", both)
                conv.replace_input_with(0, pad.inputs[0])
            dead = [pad, *(node for _, between in readers for node in between)]
            self.graph.remove(dict.fromkeys(dead), safe=True)

    def _convolutions_behind(self, pad: ir.Node) -> list[tuple[ir.Node, list[ir.Node]]]:
        """The convolutions that alone read a padded value, on the grid that it had, with Q and DQ between."""
        source = pad.inputs[0].producer() if pad.inputs[0] is not None else None
        if source is None or source.op_type != "DequantizeLinear" or pad.outputs[0].is_graph_output():
            return []
        grid = [_array(part) for part in source.inputs[1:3] if part is not None]
        found = []
        for use in pad.outputs[0].uses():
            quantize = use.node
            if quantize.op_type != "QuantizeLinear":
                return []
            own = [_array(part) for part in quantize.inputs[1:3] if part is not None]
            if len(own) != len(grid) or not all(map(np.array_equal, own, grid)):
                return []
            for restore in [reader.node for reader in quantize.outputs[0].uses()]:
                for reader in restore.outputs[0].uses():
                    if reader.node.op_type != "Conv" or reader.idx != 0 or not _explicit(reader.node):
                        return []
                    found.append((reader.node, [quantize, restore]))
        return found

    def finish(self) -> None:
        """Order the nodes and drop what nobody reads."""
        self.paddings()
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not any(value is output for output in self.graph.outputs):
                del self.graph.initializers[name]
        self.graph.sort()
        for node in self.graph:
            node.name = None  # given by the graph, read by nobody
