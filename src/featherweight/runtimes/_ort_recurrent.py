"""LSTMs and GRUs with 8-bit weights, as ONNX Runtime stores and runs them.

Part of ``onnxruntime.py``. ``DynamicQuantizeLSTM`` multiplies integers: inputs and hidden states are rounded
at each call, over the whole batch. There is no such operator for GRUs: their weights are stored as integers
and restored when the file is loaded (a ``DequantizeLinear`` would be computed at each call), which saves
bytes alone. The rows of torch's weights come in the order of torch's gates, those of ONNX in another one::

    LSTM: i f g o -> i o f g          GRU: r z n -> z r n
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from featherweight.errors import TargetError
from featherweight.runtimes._ort_blocks import constant, swap

if TYPE_CHECKING:
    import onnx_ir as ir

    from featherweight.exchange.export import OnnxExport
    from featherweight.formats import IntQuant

_MICROSOFT = "com.microsoft"
OPERATOR = "DynamicQuantizeLSTM"
GATES: Mapping[str, tuple[int, ...]] = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}


def store_recurrent(
    export: OnnxExport,
    weights: Mapping[str, IntQuant],
    dynamic: Collection[str],
    runtime: str,
    *,
    restored_by: Literal["Mul", "DequantizeLinear"] = "Mul",
) -> None:
    """Store the weights of recurrent layers as integers, in place.

    Args:
        export: What is edited.
        weights: ``weight_ih`` or ``weight_hh`` of a layer and direction -> its grid.
        dynamic: Those that integers are multiplied by.
        runtime: For messages.
        restored_by: The operator that makes floats of those that no integers are multiplied by.

    Raises:
        TargetError: A weight is read by something else.
    """
    if not weights:
        return
    names = {id(export.values[name]): name for name in weights}
    graph, missing = export.model.graph, set(weights)
    for node in [node for node in graph if node.op_type in GATES]:
        found = [list(_parameters(value, names)) for value in node.inputs[1:3]]
        both = "direction" in node.attributes and node.attributes["direction"].as_string() == "bidirectional"
        if any(len(one) not in (0, 1 + both) for one in found) or not any(found):
            continue
        missing -= {name for one in found for name in one}
        if all(found) and all(name in dynamic for one in found for name in one):
            _dynamic(export, node, found, weights)
        else:
            _restored(export, node, found, weights, restored_by)
    if missing:
        raise TargetError(
            f"{runtime} found no recurrent layer that reads '{sorted(missing)[0]}' alone",
            fix="exclude its layer under where",
        )
    _sweep(graph)
    graph.sort()


def _parameters(value: ir.Value | None, names: Mapping[int, str]) -> Iterator[str]:
    """The parameters that a stacked weight is made of, one for each direction."""
    seen: set[str] = set()
    stack = [value]
    while stack:
        one = stack.pop()
        if one is None:
            continue
        if id(one) in names:
            if names[id(one)] not in seen:
                seen.add(names[id(one)])
                yield names[id(one)]
            continue
        node = one.producer()
        if node is not None and node.op_type in ("Concat", "Slice", "Unsqueeze", "Squeeze", "Split"):
            stack += reversed(node.inputs)


def _integers(
    export: OnnxExport, name: str, fmt: IntQuant, gates: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers, scales and zero points with the gates in the order of ONNX; the last two per row."""
    import torch

    value = export.values[name].const_value
    assert value is not None
    matrix = value.numpy()
    kind = np.int8 if fmt.signed else np.uint8
    integers = fmt.quantize(torch.from_numpy(matrix.copy())).numpy().astype(kind)
    scale, zero_point = (part.reshape(-1).expand(len(matrix)).numpy() for part in fmt.grid())
    rows = np.arange(len(matrix)).reshape(len(gates), -1)[list(gates)].reshape(-1)
    return integers[rows], scale[rows], zero_point[rows].astype(kind)


def _dynamic(
    export: OnnxExport, node: ir.Node, found: list[list[str]], weights: Mapping[str, IntQuant]
) -> None:
    """Integers (directions, inputs, gates * hidden) and a scale per row of torch's matrix."""
    import onnx_ir as ir

    graph = export.model.graph
    stacked: list[list[ir.Value]] = []
    for names in found:
        parts: list[list[ir.Value]] = [[], [], []]
        for name in names:
            integers, scale, zero_point = _integers(export, name, weights[name], GATES["LSTM"])
            graph.initializers.pop(str(export.values[name].name), None)
            parts[0].append(constant(graph, name, integers.T[None]))
            parts[1].append(constant(graph, f"{name}.scale", scale[None]))
            parts[2].append(constant(graph, f"{name}.zero_point", zero_point[None]))
        stacked.append([_joined(graph, part) for part in parts])
    (w, w_scale, w_zero), (r, r_scale, r_zero) = stacked
    rest = [*node.inputs[3:], *(None,) * (8 - len(node.inputs))]
    inputs = [node.inputs[0], w, r, *rest, w_scale, w_zero, r_scale, r_zero]
    kept = {
        key: attribute for key, attribute in node.attributes.items() if key in ("hidden_size", "direction")
    }
    made = ir.node(OPERATOR, inputs, domain=_MICROSOFT, num_outputs=len(node.outputs))
    made.attributes.update(kept)
    swap(export, node, made)
    export.model.opset_imports[_MICROSOFT] = 1


def _restored(
    export: OnnxExport, node: ir.Node, found: list[list[str]], weights: Mapping[str, IntQuant], operator: str
) -> None:
    """Integers (1, gates * hidden, inputs) for each direction, and the nodes that make floats of them."""
    import onnx_ir as ir

    graph = export.model.graph
    for index, names in enumerate(found, 1):
        if not names:
            continue
        made = []
        for name in names:
            integers, scale, zero_point = _integers(export, name, weights[name], GATES[node.op_type])
            graph.initializers.pop(str(export.values[name].name), None)
            kept = constant(graph, name, integers[None])
            if operator == "DequantizeLinear":
                parts = (
                    constant(graph, f"{name}.scale", scale),
                    constant(graph, f"{name}.zero_point", zero_point),
                )
                made.append(_call(graph, operator, kept, *parts, axis=1))
                continue
            value = _call(graph, "Cast", kept, to=ir.DataType.FLOAT)
            if zero_point.any():
                zeros = constant(graph, f"{name}.zero_point", zero_point.astype(np.float32)[:, None])
                value = _call(graph, "Sub", value, zeros)
            made.append(_call(graph, "Mul", value, constant(graph, f"{name}.scale", scale[:, None])))
        node.replace_input_with(index, _joined(graph, made))


def _call(graph: ir.Graph, op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
    import onnx_ir as ir

    node = ir.node(op, list(inputs), attributes)
    graph.append(node)
    return node.outputs[0]


def _joined(graph: ir.Graph, parts: list[ir.Value]) -> ir.Value:
    """One behind the other along the directions."""
    return parts[0] if len(parts) == 1 else _call(graph, "Concat", *parts, axis=0)


def _sweep(graph: ir.Graph) -> None:
    """Take out what nobody reads."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
