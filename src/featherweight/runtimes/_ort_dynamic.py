"""Products of 8-bit integers whose inputs are rounded at each call, as ONNX Runtime multiplies them.

Part of ``onnxruntime.py``. With one range for each token (a row of the last axis; Dettmers et al. 2022,
arXiv:2208.07339, section 2.1)::

    s = max |x| / 127,    y = (round(x / s) W_int) * s * scale + bias

one token with an outlier leaves the others their steps; ``DynamicQuantizeLinear`` has one range for all. An
input that several layers read is rounded once. Products run in ``MatMulIntegerToFloat``; unsigned inputs are
the fast ones (signed ones take eight times as long on x86).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from featherweight.errors import TargetError
from featherweight.runtimes._ort_blocks import constant, swap

if TYPE_CHECKING:
    import onnx_ir as ir

    from featherweight.exchange.export import OnnxExport
    from featherweight.formats import Dynamic, IntQuant

_MICROSOFT = "com.microsoft"
OPERATOR = "MatMulIntegerToFloat"
_MIDDLE = 128
_SMALLEST = 1e-8  # range of a token of zeros, as formats have it


def store_dynamic(
    export: OnnxExport, weights: Mapping[str, IntQuant], inputs: Mapping[str, Dynamic], runtime: str
) -> None:
    """Replace products of these weights with these inputs, in place.

    Args:
        export: What is edited.
        weights: Matrix (outputs, inputs) -> its grid.
        inputs: Traced value -> how products read it.
        runtime: For messages.

    Raises:
        TargetError: A weight is multiplied by an input that has no such format, or read by something else.
    """
    graph = export.model.graph
    rounded: dict[str, _Rounded] = {}
    for name, fmt in weights.items():
        value = export.values[name]
        graph.initializers.pop(str(value.name), None)
        parts = _weight(graph, name, value, fmt)
        for use in list(value.uses()):
            readers = [use.node]
            if use.node.op_type == "Transpose":
                readers = [inner.node for inner in use.node.outputs[0].uses()]
            for node in readers:
                source = node.inputs[0]
                read = next((key for key in inputs if export.values[key] is source), None)
                if node.op_type not in ("Gemm", "MatMul") or source is None or read is None:
                    raise TargetError(
                        f"{runtime} cannot round what '{name}' is multiplied by at each call",
                        where=f"a {node.op_type} reads it",
                        fix="exclude its layer under where",
                    )
                if read not in rounded:
                    rounded[read] = _Rounded.of(graph, source, inputs[read].per == "token")
                rounded[read].multiply(export, node, parts)
            if use.node.op_type == "Transpose" and not use.node.outputs[0].uses():
                graph.remove(use.node, safe=True)
    if weights:
        export.model.opset_imports[_MICROSOFT] = 1
        graph.sort()


def _weight(
    graph: ir.Graph, name: str, value: ir.Value, fmt: IntQuant
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Integers (inputs, outputs), scales, and a zero point unless it is 0."""
    import torch

    assert value.const_value is not None
    matrix = torch.from_numpy(value.const_value.numpy().copy())
    kind = np.int8 if fmt.signed else np.uint8
    scale, zero_point = fmt.grid()
    return (
        constant(graph, name, fmt.quantize(matrix).numpy().astype(kind).T),
        constant(graph, f"{name}.scale", scale.numpy()),
        None if fmt.signed else constant(graph, f"{name}.zero_point", zero_point.numpy().astype(kind)),
    )


@dataclass
class _Rounded:
    """An input as unsigned integers.

    Attributes:
        integers: Of the input's shape.
        scale: One number.
        zero_point: One number.
        rows: Scale of each token beside ``scale``, which is 1; None: there is one range for all.
    """

    integers: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    rows: ir.Value | None

    @classmethod
    def of(cls, graph: ir.Graph, source: ir.Value, by_token: bool) -> _Rounded:
        import onnx_ir as ir

        def call(op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
            node = ir.node(op, list(inputs), attributes)
            graph.append(node)
            return node.outputs[0]

        if not by_token:
            node = ir.node("DynamicQuantizeLinear", [source], num_outputs=3)
            graph.append(node)
            integers, scale, zero_point = node.outputs
            return cls(integers, scale, zero_point, None)
        last = _shared(graph, "last_axis", np.array([-1], np.int64))
        smallest = _shared(graph, "smallest_range", np.array(_SMALLEST, np.float32))
        step = _shared(graph, "step", np.array(1 / (_MIDDLE - 1), np.float32))
        one = _shared(graph, "one", np.array(1, np.float32))
        middle = _shared(graph, "middle", np.array(_MIDDLE, np.uint8))
        largest = call("ReduceMax", call("Abs", source), last, keepdims=1)
        rows = call("Mul", call("Max", largest, smallest), step)
        integers = call("QuantizeLinear", call("Div", source, rows), one, middle)
        return cls(integers, one, middle, rows)

    def multiply(
        self, export: OnnxExport, node: ir.Node, weight: tuple[ir.Value, ir.Value, ir.Value | None]
    ) -> None:
        """Put the product of integers in the place of one of floats, and what it is followed by."""
        import onnx_ir as ir

        graph = export.model.graph
        integers, scale, zero_point = weight
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        inner = bias if self.rows is None else None
        inputs = [self.integers, integers, self.scale, scale, self.zero_point, zero_point, inner]
        product = ir.node(OPERATOR, inputs, domain=_MICROSOFT)
        if self.rows is None:
            swap(export, node, product)
            return
        graph.append(product)
        scaled = ir.node("Mul", [product.outputs[0], self.rows])
        if bias is not None:
            graph.append(scaled)
            scaled = ir.node("Add", [scaled.outputs[0], bias])
        swap(export, node, scaled)


def _shared(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A constant that all layers read."""
    name = f"dynamic.{name}"
    return graph.initializers[name] if name in graph.initializers else constant(graph, name, array)
