"""A quantized graph as the float graph that it approximates, with the formats of what was quantized.

Pairs of QuantizeLinear and DequantizeLinear go, and so do operators that compute with integers: weights
become float, ordinary operators take their place, and every grid is remembered under the name of the value
that was on it. Clamps that a quantizer had left to the saturation of its integers come back. When the float
graph has been imported, ``with_formats`` hangs the grids beside the module, where a runtime finds them.

Jacob et al. 2018, arXiv:1712.05877; the operators are those of ONNX and of ONNX Runtime's quantizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from featherweight.exchange.onnx_in.grids import Floated, Grid
from featherweight.exchange.onnx_in.node import UnsupportedError
from featherweight.exchange.onnx_in.operators.quantized import integer_range
from featherweight.exchange.onnx_in.read import Source

_UINT8 = np.dtype(np.uint8)
_MICROSOFT = "com.microsoft"
_MOVES = frozenset(
    {
        "MaxPool",
        "Reshape",
        "Flatten",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Gather",
        "Identity",
        "Split",
        "DepthToSpace",
        "SpaceToDepth",
        "Expand",
        "Tile",
    }
)
_POSITIVE = frozenset(
    {
        "Relu",
        "Clip",
        "Sigmoid",
        "HardSigmoid",
        "Softmax",
        "Exp",
        "Abs",
        "MaxPool",
        "ReduceMax",
        "ArgMax",
        "Sqrt",
    }
)
_SATURATES = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "Sub", "Sum", "BatchNormalization"}
)


def floated(source: Source) -> Floated | None:
    """The float graph of a quantized one; None when nothing in it is quantized."""
    kinds = {(node.domain, node.op_type) for node in source.nodes}
    if not any(_is_quantized(*kind) for kind in kinds):
        return None
    return _Rewriter(source).run()


def _is_quantized(domain: str, op: str) -> bool:
    if op in ("QuantizeLinear", "DequantizeLinear", "MatMulInteger", "ConvInteger"):
        return True
    return op.startswith("QLinear") or (domain == _MICROSOFT and op in _CONTRIBUTED)


_CONTRIBUTED = frozenset({"QGemm", "QAttention", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"})


@dataclass(frozen=True)
class _Standing:
    """What stands for a quantized tensor: the float value under this name, on this grid."""

    name: str
    grid: Grid


class _Rewriter:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.constants = dict(source.constants)
        self.nodes: list[NodeProto] = []
        self.standing: dict[str, _Standing] = {}
        self.renamed: dict[str, str] = {}
        self.grids: dict[str, Grid] = {}
        # (float name, stored name) -> a dequantized weight and its grid
        self.floats: dict[tuple[str, str], tuple[np.ndarray, Grid]] = {}
        self.makers: dict[str, str] = {}  # value -> operator
        self.taken = {*self.constants, *(value for node in source.nodes for value in node.output)}
        self.integers = set(source.outputs)  # names whose integers somebody asks for
        self.readers = Counter(value for node in source.nodes for value in node.input)
        self.readers.update(source.outputs)
        self.dynamic = {
            output: (node, index)
            for node in source.nodes
            if node.op_type == "DynamicQuantizeLinear"
            for index, output in enumerate(node.output)
        }

    def run(self) -> Floated:
        skipped: set[int] = set()
        for index, node in enumerate(self.source.nodes):
            if index in skipped:
                continue
            if node.op_type in ("MatMulInteger", "ConvInteger"):
                merged = self._dynamic_product(node)
                if merged is not None:
                    skipped |= merged
                    continue
            self._rewrite(node)
        for name in self.source.outputs:
            self._output(name)
        proto = self._proto()
        weights = tuple(self.floats.values())
        return Floated(proto, self.grids, weights)

    # --- one node -------------------------------------------------------------------------------------

    def _rewrite(self, node: NodeProto) -> None:
        op, contributed = node.op_type, node.domain == _MICROSOFT
        if op == "QuantizeLinear" and (grid := self._grid(node, 1, 2)) is not None:
            self._quantize(node.input[0], node.output[0], grid)
        elif op == "DequantizeLinear" and (grid := self._grid(node, 1, 2)) is not None:
            self._dequantize(node, grid)
        elif op == "QLinearConv":
            self._convolution(node)
        elif op == "QLinearMatMul":
            self._product(node)
        elif contributed and op in _EXPANDED:
            _EXPANDED[op](self, node)
        elif op in _MOVES and not node.domain and node.input and node.input[0] in self.standing:
            self._move(node)
        else:
            self._keep(node)

    def _keep(self, node: NodeProto) -> None:
        """As it is, with floats where there are floats and integers where it asks for them."""
        copied = NodeProto()
        copied.CopyFrom(node)
        for index, name in enumerate(node.input):
            if name in self.standing:
                self._materialize(name)
            copied.input[index] = self.renamed.get(name, name)
        self._emit(copied)

    def _emit(self, node: NodeProto) -> None:
        self.nodes.append(node)
        for name in node.output:
            self.makers[name] = node.op_type

    def _make(
        self,
        op: str,
        inputs: Sequence[str],
        output: str,
        like: NodeProto,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        node = helper.make_node(op, inputs, [output], like.name, domain=domain, **attributes)
        node.metadata_props.extend(like.metadata_props)
        self._emit(node)
        return output

    def _free(self, name: str) -> str:
        found, number = name, 2
        while found in self.taken:
            found, number = f"{name}_{number}", number + 1
        self.taken.add(found)
        return found

    def _grid(self, node: NodeProto, scale: int, zero: int, fallback: np.dtype = _UINT8) -> Grid | None:
        """The grid that two constant inputs describe; None where it is blocked, dynamic or of floats."""
        given = dict(enumerate(node.input))
        scales = self.constants.get(given.get(scale, ""))
        zeros = self.constants.get(given.get(zero, ""))
        if scales is None or (zeros is None and given.get(zero, "")):
            return None
        zeros = np.zeros(scales.shape, self._type(node, fallback)) if zeros is None else zeros
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        blocked = attributes.get("block_size", 0) or scales.ndim > 1
        try:
            integer_range(zeros.dtype)
        except UnsupportedError:
            if zeros.dtype != np.int32:
                return None
        if blocked or scales.dtype != np.float32:
            return None
        return Grid(scales, zeros, zeros.dtype, int(attributes.get("axis", 1)))

    def _type(self, node: NodeProto, fallback: np.dtype) -> np.dtype:
        """Type of the integers that have no zero point."""
        stored = self.constants.get(node.input[0])
        if node.op_type == "DequantizeLinear" and stored is not None:
            return stored.dtype
        if node.op_type == "DequantizeLinear" and node.input[0] in self.standing:
            return self.standing[node.input[0]].grid.dtype
        named = next((item.i for item in node.attribute if item.name == "output_dtype"), 0)
        if named:
            return np.dtype(helper.tensor_dtype_to_np_dtype(named))
        return fallback

    def _quantize(self, name: str, output: str, grid: Grid) -> None:
        """``output`` is the integers of a float value, which from now on stands for them."""
        value = self.renamed.get(name, name)
        low, high = integer_range(grid.dtype)
        stops = bool(np.all(grid.zero == low)) and grid.scale.size == 1
        if stops and self.makers.get(value) in _SATURATES and self.readers[name] <= 1:
            value = self._clamped(value, float((high - low) * grid.scale.reshape(-1)[0]))
            self.renamed[name] = value
        if value in self.constants:
            self._materialize_constant(value, output, grid)
            return
        self.grids.setdefault(value, grid)
        self.standing[output] = _Standing(value, grid)

    def _clamped(self, value: str, top: float) -> str:
        """A Relu (or Clip to 6) that the quantizer had left to the saturation at zero."""
        output = self._free(f"{value}_clamped")
        like = NodeProto(name=f"{value}_relu")
        if abs(top - 6) > 0.01:
            return self._make("Relu", [value], output, like)
        limits = [
            self._constant(f"{value}_{side}", np.float32(limit)) for side, limit in (("low", 0), ("high", 6))
        ]
        return self._make("Clip", [value, *limits], output, like)

    def _constant(self, name: str, array: Any) -> str:
        found = self._free(name)
        self.constants[found] = np.asarray(array)
        return found

    def _materialize_constant(self, value: str, output: str, grid: Grid) -> None:
        low, high = integer_range(grid.dtype)
        steps = np.round(self.constants[value] / grid.scale) + grid.zero.astype(np.float64)
        self.constants[output] = np.clip(steps, low, high).astype(grid.dtype)

    def _dequantize(self, node: NodeProto, grid: Grid) -> None:
        name, output = node.input[0], node.output[0]
        if name in self.constants:
            self._alias(output, self._weight(name, grid))
        elif name in self.standing and self.standing[name].grid.same(grid):
            self._alias(output, self.standing[name].name)
        else:
            self._keep(node)
            if grid.dtype != np.int32:
                self.grids.setdefault(output, grid)

    def _alias(self, output: str, value: str) -> None:
        if output in self.source.outputs:
            helper_node = helper.make_node("Identity", [value], [output])
            self._emit(helper_node)
        else:
            self.renamed[output] = value

    def _weight(self, name: str, grid: Grid) -> str:
        """The float initializer of stored integers, under the name that they had before."""
        plain = name.removesuffix("_quantized")
        for (known, stored), (_, other) in self.floats.items():
            if stored == name and other.same(grid):
                return known
        found = self._free(plain) if plain != name else self._free(f"{plain}_float")
        values = grid.values(self.constants[name])
        self.constants[found] = values
        if grid.dtype != np.int32:
            self.floats[found, name] = (values, grid)
        return found

    def _materialize(self, name: str) -> None:
        """Make the integers after all, for an operator that reads them."""
        standing = self.standing.pop(name)
        inputs = [standing.name]
        inputs.append(self._constant(f"{name}_scale", standing.grid.scale))
        inputs.append(self._constant(f"{name}_zero_point", standing.grid.zero))
        axis: dict[str, Any] = {"axis": standing.grid.axis} if standing.grid.scale.size > 1 else {}
        self._emit(helper.make_node("QuantizeLinear", inputs, [name], **axis))

    def _output(self, name: str) -> None:
        if name in self.standing:
            self._materialize(name)

    def _move(self, node: NodeProto) -> None:
        """Something that only moves integers moves the floats that stand for them."""
        first = self.standing[node.input[0]]
        copied = NodeProto()
        copied.CopyFrom(node)
        copied.input[0] = first.name
        for index, name in enumerate(node.input):
            if index:
                copied.input[index] = self.renamed.get(name, name)
        for index, name in enumerate(node.output):
            if name and (index == 0 or node.op_type == "Split"):
                copied.output[index] = self._free(f"{name}_float")
                self.standing[name] = _Standing(copied.output[index], first.grid)
                self.grids[copied.output[index]] = first.grid
        self._emit(copied)

    # --- operators with integers inside -----------------------------------------------------------------

    def _real(self, node: NodeProto, value: int, scale: int, zero: int) -> str:
        """The float value of an input; '' for one that is absent."""
        if value >= len(node.input) or not node.input[value]:
            return ""
        name = node.input[value]
        stored = self.constants[name].dtype if name in self.constants else _UINT8
        grid = self._grid(node, scale, zero, stored)
        if grid is None:
            raise UnsupportedError("its scales are computed while it runs")
        if name in self.constants:
            return self._weight(name, replace(grid, axis=self._axis(node, name, grid)))
        if name in self.standing and self.standing[name].grid.same(grid):
            return self.standing[name].name
        if name in self.standing:
            self._materialize(name)
        output = self._free(f"{name}_float")
        inputs = [name, self._constant(f"{name}_s", grid.scale), self._constant(f"{name}_z", grid.zero)]
        self._emit(helper.make_node("DequantizeLinear", inputs, [output]))
        self.grids[output] = grid
        return output

    def _axis(self, node: NodeProto, name: str, grid: Grid) -> int:
        """Which axis of a weight its scales are of: output channels."""
        array = self.constants[name]
        if node.op_type == "QLinearConv":
            return 0
        if node.op_type == "QGemm":
            turned = next((item.i for item in node.attribute if item.name == "transB"), 0)
            return 0 if turned else 1
        return array.ndim - 1

    def _bias(self, node: NodeProto, index: int, scales: tuple[int, int]) -> list[str]:
        """An int32 bias, whose scale is the product of the two others."""
        if index >= len(node.input) or not node.input[index]:
            return []
        stored = self.constants.get(node.input[index])
        first, second = (self.constants.get(node.input[place]) for place in scales)
        if stored is None or first is None or second is None:
            raise UnsupportedError("its bias is computed while it runs")
        plain = node.input[index].removesuffix("_quantized")
        return [self._constant(plain, (stored * (first * second)).astype(np.float32))]

    def _finish(self, node: NodeProto, result: str, scale: int, zero: int) -> None:
        grid = self._grid(node, scale, zero)
        if grid is None:
            raise UnsupportedError("its scales are computed while it runs")
        self.readers[result] = 0
        self._quantize(result, node.output[0], grid)

    def _plain(self, node: NodeProto) -> dict[str, Any]:
        return {item.name: helper.get_attribute_value(item) for item in node.attribute}

    def _convolution(self, node: NodeProto) -> None:
        inputs = [self._real(node, 0, 1, 2), self._real(node, 3, 4, 5), *self._bias(node, 8, (1, 4))]
        result = self._make("Conv", inputs, self._free(f"{node.output[0]}_float"), node, **self._plain(node))
        self._finish(node, result, 6, 7)

    def _product(self, node: NodeProto) -> None:
        inputs = [self._real(node, 0, 1, 2), self._real(node, 3, 4, 5)]
        result = self._make("MatMul", inputs, self._free(f"{node.output[0]}_float"), node)
        self._finish(node, result, 6, 7)

    def _gemm(self, node: NodeProto) -> None:
        inputs = [self._real(node, 0, 1, 2), self._real(node, 3, 4, 5), *self._bias(node, 6, (1, 4))]
        whole = len(node.input) > 7 and node.input[7]
        output = self._free(f"{node.output[0]}_float") if whole else node.output[0]
        result = self._make("Gemm", inputs, output, node, **self._plain(node))
        if whole:
            self._finish(node, result, 7, 8)

    def _two(self, node: NodeProto) -> None:
        """QLinearAdd and QLinearMul."""
        inputs = [self._real(node, 0, 1, 2), self._real(node, 3, 4, 5)]
        op = node.op_type.removeprefix("QLinear")
        result = self._make(op, inputs, self._free(f"{node.output[0]}_float"), node)
        self._finish(node, result, 6, 7)

    def _one(self, node: NodeProto) -> None:
        """Sigmoid, LeakyRelu, pools and softmax, of one input."""
        attributes = self._plain(node)
        if attributes.pop("channels_last", 0):
            raise UnsupportedError("its channels come last")
        attributes.pop("opset", None)
        op = node.op_type.removeprefix("QLinear")
        result = self._make(
            op, [self._real(node, 0, 1, 2)], self._free(f"{node.output[0]}_float"), node, **attributes
        )
        self._finish(node, result, 3, 4)

    def _concat(self, node: NodeProto) -> None:
        parts = [self._real(node, index, index + 1, index + 2) for index in range(2, len(node.input), 3)]
        output = self._free(f"{node.output[0]}_float")
        result = self._make("Concat", parts, output, node, **self._plain(node))
        self._finish(node, result, 0, 1)

    def _to_float(self, node: NodeProto) -> None:
        """MatMulIntegerToFloat: (A, B, a_scale, b_scale, a_zero, b_zero, bias)."""
        self._biased(node, [self._real(node, 0, 2, 4), self._real(node, 1, 3, 5)], 6)

    def _dynamically(self, node: NodeProto) -> None:
        """DynamicQuantizeMatMul: (A, B, b_scale, b_zero, bias)."""
        first = self.renamed.get(node.input[0], node.input[0])
        self._biased(node, [first, self._real(node, 1, 2, 3)], 4)

    def _biased(self, node: NodeProto, inputs: list[str], bias: int) -> None:
        if bias >= len(node.input) or not node.input[bias]:
            self._make("MatMul", inputs, node.output[0], node)
            return
        product = self._make("MatMul", inputs, self._free(f"{node.output[0]}_product"), node)
        self._make("Add", [product, node.input[bias]], node.output[0], node)

    def _attention(self, node: NodeProto) -> None:
        """QAttention: (input, weight, bias, scales of both, mask, zero points of both, past)."""
        given = [*node.input, *[""] * (9 - len(node.input))]
        inputs = [self._real(node, 0, 3, 6), self._real(node, 1, 4, 7), given[2], given[5], given[8]]
        copied = helper.make_node(
            "Attention", inputs, list(node.output), node.name, domain=_MICROSOFT, **self._plain(node)
        )
        self._emit(copied)

    def _dynamic_product(self, node: NodeProto) -> set[int] | None:
        """DynamicQuantizeLinear, an integer product, Cast and Mul by both scales: a product of floats."""
        given = [*node.input, *[""] * (4 - len(node.input))]
        made = self.dynamic.get(given[0])
        weight, zero = self.constants.get(given[1]), self.constants.get(given[3])
        readers = {
            value: [(index, other) for index, other in enumerate(self.source.nodes) if value in other.input]
            for value in (node.output[0],)
        }
        casts = readers[node.output[0]]
        if made is None or weight is None or (given[3] and zero is None) or len(casts) != 1:
            return None
        where, cast = casts[0]
        scaled = [(i, other) for i, other in enumerate(self.source.nodes) if cast.output[0] in other.input]
        if cast.op_type != "Cast" or len(scaled) != 1 or scaled[0][1].op_type != "Mul":
            return None
        place, multiply = scaled[0]
        other = next((name for name in multiply.input if name != cast.output[0]), "")
        scale = self._weight_scale(other, made[0].output[1])
        if scale is None:
            return None
        channels = scale.reshape(-1)
        zeros = np.zeros(channels.shape, weight.dtype) if zero is None else zero
        if zeros.size not in (1, channels.size):
            return None
        axis = 0 if node.op_type == "ConvInteger" else weight.ndim - 1
        one = channels.size == 1
        grid = Grid(
            channels.reshape(()) if one else channels,
            zeros.reshape(()) if one else np.broadcast_to(zeros.reshape(-1), channels.shape),
            weight.dtype,
            axis,
        )
        value = self.renamed.get(made[0].input[0], made[0].input[0])
        kind = "MatMul" if node.op_type == "MatMulInteger" else "Conv"
        self._make(kind, [value, self._weight(given[1], grid)], multiply.output[0], node, **self._plain(node))
        return {where, place}

    def _weight_scale(self, name: str, dynamic: str) -> np.ndarray | None:
        """The constant factor in a product of the dynamic scale with it."""
        maker = next((node for node in self.source.nodes if name in node.output), None)
        if maker is None or maker.op_type != "Mul" or dynamic not in maker.input:
            return None
        return self.constants.get(next((item for item in maker.input if item != dynamic), ""))

    # --- the graph --------------------------------------------------------------------------------------

    def _proto(self) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.CopyFrom(self.source.proto)
        graph = proto.graph
        for part in (graph.node, graph.initializer, graph.value_info):
            del part[:]
        graph.node.extend(_alive(self.nodes, self.source.outputs))
        read = {name for node in graph.node for name in _reads(node)} | set(self.source.outputs)
        graph.initializer.extend(
            numpy_helper.from_array(np.asarray(array), name)
            for name, array in self.constants.items()
            if name in read
        )
        own = set(self.constants)
        inputs = [value for value in graph.input if value.name not in own]
        del graph.input[:]
        graph.input.extend(inputs)
        return proto


_EXPANDED = {
    "QGemm": _Rewriter._gemm,
    "QLinearAdd": _Rewriter._two,
    "QLinearMul": _Rewriter._two,
    "QLinearSigmoid": _Rewriter._one,
    "QLinearLeakyRelu": _Rewriter._one,
    "QLinearGlobalAveragePool": _Rewriter._one,
    "QLinearAveragePool": _Rewriter._one,
    "QLinearSoftmax": _Rewriter._one,
    "QLinearConcat": _Rewriter._concat,
    "QAttention": _Rewriter._attention,
    "DynamicQuantizeMatMul": _Rewriter._dynamically,
    "MatMulIntegerToFloat": _Rewriter._to_float,
}


def _reads(node: NodeProto) -> list[str]:
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            names += [name for inner in graph.node for name in _reads(inner)]
            names += [output.name for output in graph.output]
    return names


def _alive(nodes: Sequence[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """Nodes that the outputs need."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted.update(_reads(node))
            kept.append(node)
    return kept[::-1]
