"""What each tensor of a converted file holds, in the exporter's names.

Part of ``mnn.py``. MNN's own names of tensors mislead: a ReLU goes into the operator before it, a linear
layer becomes a convolution between two moves, and GELU is drawn in front of the second of these, which keeps
the name of what was the linear layer's output. So both graphs are followed from the inputs on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from featherweight.runtimes._mnn_file import MOVES, File

if TYPE_CHECKING:
    import onnx_ir as ir

AS_CONVOLUTION = "__matmul_converted"  # behind the name of what was a matrix product
_MOVES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity"})
_ABSORBED = frozenset({"Relu", "Clip", "Add", "BatchNormalization"})  # into the operator before them


def contents(graph: ir.Graph, file: File) -> Mapping[int, str]:
    """Tensor of the file -> name of the value in the exported graph that it holds."""
    values = {str(value.name): value for value in graph.inputs}
    values |= {str(value.name): value for node in graph for value in node.outputs}
    names = {op.name.removesuffix(AS_CONVOLUTION) for op in file.ops}
    found: dict[int, str] = {}
    for op in file.ops:
        if len(op.outputs) != 1:
            found |= {number: name for number in op.outputs if (name := file.tensors[number]) in values}
            continue
        (output,) = op.outputs
        value = values.get(op.name.removesuffix(AS_CONVOLUTION))
        if op.type not in MOVES or not op.inputs:
            if value is not None:
                found[output] = str(_last_absorbed(value, names).name)
            continue
        before = found.get(op.inputs[0])
        if before is None:
            continue
        found[output] = before
        if value is not None and _moves(value, before):
            last = _last_absorbed(value, names)
            found[output] = str(last.name)
            if last is not value:  # clamped before it was moved
                found |= {number: found[output] for number, name in found.items() if name == before}
    return found


def _moves(value: ir.Value, before: str) -> bool:
    """Whether a value is another one, moved."""
    producer = value.producer()
    source = None if producer is None or producer.op_type not in _MOVES else producer.inputs[0]
    return source is not None and source.name == before


def _last_absorbed(value: ir.Value, names: set[str]) -> ir.Value:
    """What an operator's output became behind those that are no operators of the file any more."""
    while not value.is_graph_output():
        readers = {id(use.node): use.node for use in value.uses()}
        if len(readers) != 1:
            break
        (reader,) = readers.values()
        output = reader.outputs[0]
        others = [other for other in reader.inputs if other is not None and other is not value]
        constant = all(other.const_value is not None for other in others)
        if reader.op_type not in _ABSORBED or output.name in names or not constant:
            break
        value = output
    return value


def holders(graph: ir.Graph, first: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """What an operator may be called that holds a parameter -> the names of its weight and bias.

    Args:
        graph: As exported.
        first: Names of tied parameters -> the name under which one is known.
    """
    for node in graph:
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or weight is None:
            continue
        if weight.const_value is None:
            continue
        parts = {"weight": first.get(str(weight.name), str(weight.name))}
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            parts["bias"] = first.get(str(bias.name), str(bias.name))
        suffix = "" if node.op_type.startswith("Conv") else AS_CONVOLUTION
        output = node.outputs[0]
        yield f"{output.name}{suffix}", parts
        for use in output.uses():
            other = [value for value in use.node.inputs if value is not None and value is not output]
            if node.op_type == "MatMul" and use.node.op_type == "Add" and other:
                yield f"{use.node.outputs[0].name}{suffix}", {**parts, "bias": str(other[0].name)}
