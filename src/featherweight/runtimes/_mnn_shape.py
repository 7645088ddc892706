"""Rewrites what MNN's converter gets wrong in an exported graph, before it sees it.

Part of ``mnn.py``. An ONNX GELU becomes an approximation of it, whatever it asks for; so it is written out
with erf. A convolution along one axis at the end of a model comes back with an axis too many; so it is made
one along two.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

_ALONG = {"kernel_shape": 1, "strides": 1, "dilations": 1}  # what the new axis adds in front


def shape(graph: ir.Graph) -> None:
    """Edit the graph in place; values keep their names."""
    for node in list(graph):
        approximate = node.attributes.get("approximate")
        if node.op_type == "Gelu" and (approximate is None or approximate.as_string() == "none"):
            _gelu(graph, node)
        elif node.op_type == "Conv" and _rank(node) == 3:
            _flat_convolution(graph, node)


def _rank(node: ir.Node) -> int:
    weight = node.inputs[1]
    return 0 if weight is None or weight.const_value is None else len(weight.const_value.shape)


def _gelu(graph: ir.Graph, node: ir.Node) -> None:
    """x/2 * (1 + erf(x / sqrt(2)))."""
    import onnx_ir as ir

    x, name = node.inputs[0], str(node.outputs[0].name)
    root, one, half = (
        _constant(graph, f"{name}/{part}", np.asarray(value, np.float32))
        for part, value in (("root", math.sqrt(2)), ("one", 1.0), ("half", 0.5))
    )
    divided = ir.node("Div", [x, root])
    erf = ir.node("Erf", [divided.outputs[0]])
    added = ir.node("Add", [erf.outputs[0], one])
    product = ir.node("Mul", [x, added.outputs[0]])
    last = ir.node("Mul", [product.outputs[0], half])
    _replace(graph, node, [divided, erf, added, product, last])


def _flat_convolution(graph: ir.Graph, node: ir.Node) -> None:
    """The same along two axes, the first of which has size one."""
    import onnx_ir as ir

    name, weight = str(node.outputs[0].name), node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    axis = _constant(graph, f"{name}/axis", np.asarray([2], np.int64))
    if len(weight.const_value.shape) == 3:
        weight.const_value = ir.tensor(weight.const_value.numpy()[:, :, None], name=weight.name)
    before = ir.node("Unsqueeze", [node.inputs[0], axis])
    attributes = dict(node.attributes)
    for key, front in _ALONG.items():
        if key in attributes:
            attributes[key] = ir.AttrInt64s(key, [front, *attributes[key].as_ints()])
    if "pads" in attributes:
        begin, end = attributes["pads"].as_ints()
        attributes["pads"] = ir.AttrInt64s("pads", [0, begin, 0, end])
    convolution = ir.Node("", "Conv", [before.outputs[0], *node.inputs[1:]], list(attributes.values()))
    after = ir.node("Squeeze", [convolution.outputs[0], axis])
    _replace(graph, node, [before, convolution, after])


def _replace(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node]) -> None:
    """Put nodes in a node's place; the last one's output takes over name and readers."""
    import onnx_ir as ir

    old, new = node.outputs[0], nodes[-1].outputs[0]
    name = old.name
    for number, inner in enumerate(nodes[:-1]):
        inner.outputs[0].name = f"{name}/{number}"
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [new])
    new.name = name


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    import onnx_ir as ir

    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value
