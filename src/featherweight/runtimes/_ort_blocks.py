"""Weights of 4 bits in blocks as ONNX Runtime multiplies by them: its operator ``MatMulNBits``.

Part of ``onnxruntime.py``. A blocked ``DequantizeLinear`` in front of a ``MatMul`` is the portable
form, but ONNX Runtime first joins a product and the sum behind it to a ``Gemm``, which has no such kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from featherweight.errors import TargetError

if TYPE_CHECKING:
    import onnx_ir as ir

    from featherweight.exchange.export import OnnxExport
    from featherweight.formats import IntQuant

_MICROSOFT = "com.microsoft"
OPERATOR = "MatMulNBits"
_MIDDLE = 8  # the zero point where none is stored
_INT8_INPUTS = 4  # accuracy level: inputs are rounded to 8 bits per block, as the fast kernels do


def store_blocks(export: OnnxExport, formats: Mapping[str, IntQuant], runtime: str) -> None:
    """Replace products with these weights, in place.

    Args:
        export: What is edited.
        formats: Matrix (outputs, inputs) -> its grid, grouped along the inputs.
        runtime: For messages.

    Raises:
        TargetError: A weight is read by something other than a product.
    """
    for name, fmt in formats.items():
        value = export.values[name]
        export.model.graph.initializers.pop(str(value.name), None)
        for use in list(value.uses()):
            readers = [use.node]
            if use.node.op_type == "Transpose":
                readers = [inner.node for inner in use.node.outputs[0].uses()]
            for node in readers:
                if node.op_type not in ("Gemm", "MatMul"):
                    raise TargetError(
                        f"{runtime} cannot read '{name}' in 4 bits in a {node.op_type}",
                        fix="exclude its layer under where",
                    )
                _replace(export, node, name, value, fmt)
            if use.node.op_type == "Transpose" and not use.node.outputs[0].uses():
                export.model.graph.remove(use.node, safe=True)
    if formats:
        export.model.opset_imports[_MICROSOFT] = 1
        export.model.graph.sort()


def _replace(export: OnnxExport, node: ir.Node, name: str, value: ir.Value, fmt: IntQuant) -> None:
    import onnx_ir as ir
    import torch

    from featherweight.formats import PerGroup

    assert isinstance(fmt.granularity, PerGroup)
    assert value.const_value is not None
    graph, size = export.model.graph, fmt.granularity.size
    matrix = torch.from_numpy(value.const_value.numpy().copy())
    outputs, inputs = matrix.shape
    groups = fmt.granularity.groups(inputs)
    scale, zero_point = (part.numpy() for part in fmt.grid())
    integers = fmt.quantize(matrix).numpy() + (_MIDDLE if fmt.signed else 0)
    padded = np.full((outputs, groups * size), _MIDDLE, np.uint8)
    padded[:, :inputs] = integers
    nibbles = padded.reshape(outputs, groups, size // 2, 2)
    parts = [
        _constant(graph, name, nibbles[..., 0] | nibbles[..., 1] << 4),
        _constant(graph, f"{name}.scale", scale.reshape(-1).astype(np.float32)),
    ]
    zeros = None if fmt.signed else _constant(graph, f"{name}.zero_point", _packed(zero_point))
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    attributes = {"K": inputs, "N": outputs, "bits": 4, "block_size": size, "accuracy_level": _INT8_INPUTS}
    made = ir.node(OPERATOR, [node.inputs[0], *parts, zeros, None, bias], attributes, domain=_MICROSOFT)
    old, new = node.outputs[0], made.outputs[0]
    new.type, new.shape = old.type, old.shape
    export.inside.update({key: new for key, held in export.inside.items() if held is old})
    ir.convenience.replace_nodes_and_values(graph, node, [node], [made], [old], [new])


def _packed(zero_point: np.ndarray) -> np.ndarray:
    """Two zero points in a byte, rows padded to whole bytes."""
    points = zero_point.astype(np.uint8)
    points = np.pad(points, ((0, 0), (0, points.shape[1] % 2)))
    return points[:, ::2] | points[:, 1::2] << 4


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    import onnx_ir as ir

    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value
