"""Static costs of a model: multiply-accumulates, parameters, stored bytes. Nothing here is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from featherweight.formats import TensorFormat, floats_alone
from featherweight.graph import Graph, Node, trace
from featherweight.model import Model


@dataclass(frozen=True)
class LayerCost:
    """One row: a layer, or the functions that its owner calls.

    Attributes:
        name: Path of the layer; a function has its traced name.
        type: Class of the layer, or the operator.
        shape: Of its (first) output for one example.
        macs: Multiply-accumulates for one example.
        params: Parameters, tied ones counted where they are used first.
        bytes: Of its parameters as they will be stored.
        activation_bytes: Of its outputs for one example, float32 unless formatted.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    macs: int
    params: int
    bytes: int
    activation_bytes: int


def node_macs(graph: Graph, node: Node) -> int:
    """Multiply-accumulates of one call for one example.

    Convolution: output elements x inputs of a filter; linear and matmul: output
    elements x shared size; a recurrent layer: gates x hidden x (inputs + hidden) a step.
    Element-wise work is not counted, as is usual.
    """
    output = graph.values[node.outputs[0]].shape
    size = math.prod(output)
    weight = node.parameters.get("weight")
    if node.op in ("conv1d", "conv2d", "conv3d", "convolution") and weight:
        count = size * math.prod(graph.parameter_shapes[weight][1:])
    elif node.op in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d") and weight:
        read = math.prod(graph.values[node.inputs[0]].shape)
        count = read * math.prod(graph.parameter_shapes[weight][1:])
    elif node.op == "linear" and weight:
        count = size * graph.parameter_shapes[weight][-1]
    elif node.op in ("matmul", "bmm", "mm") and "self" in node.parameters:  # a constant on the left
        count = size * graph.parameter_shapes[node.parameters["self"]][-1]
    elif node.op in ("matmul", "bmm", "mm", "addmm", "baddbmm") and node.inputs:
        count = size * graph.values[node.inputs[0]].shape[-1]
    elif node.op == "scaled_dot_product_attention":
        query, key = (graph.values[name].shape for name in node.inputs[:2])
        count = 2 * math.prod(query) * key[-2]
    elif node.op in ("lstm", "gru"):
        steps = math.prod(graph.values[node.inputs[0]].shape[:-1])
        weights = (name for name in node.parameters.values() if "weight" in name.rpartition(".")[2])
        count = steps * sum(math.prod(graph.parameter_shapes[name]) for name in weights)
    else:
        return 0
    return count // max(graph.batch, 1)


def stored_bytes(elements: int, formats: tuple[TensorFormat, ...]) -> int:
    """Bytes of a parameter as its last format stores it; float32 without one, and where values are shared.

    A palette's codes are bits of a packed download: what a runtime reads holds the values as floats.
    """
    return 4 * elements if floats_alone(formats) else formats[-1].stored_bytes(elements)


def layer_costs(model: Model, entry: str = "forward") -> list[LayerCost]:
    """One row a layer that was called, in order of its first call, then functions with MACs."""
    graph = trace(model, entry)
    tensors = dict(model.module.named_parameters())
    counted: set[str] = set()
    rows: dict[str, LayerCost] = {}
    for node in graph:
        macs = node_macs(graph, node)
        is_layer = "#" in node.name and "/" not in node.name
        name = node.layer if is_layer else node.name
        mine = [name for name in node.parameters.values() if name in tensors and name not in counted]
        counted.update(mine)
        params = sum(tensors[parameter].numel() for parameter in mine)
        size = sum(stored_bytes(tensors[p].numel(), model.formats.get(p, ())) for p in mine)
        if not is_layer and not macs and not params:
            continue
        shape = graph.values[node.outputs[0]].shape
        elements = math.prod(shape) // max(graph.batch, 1)
        activation = stored_bytes(elements, model.formats.get(node.outputs[0], ()))
        before = rows.get(name)
        rows[name] = LayerCost(
            name,
            node.layer_type if is_layer else node.op,
            tuple(shape[1:]) if len(shape) > 1 else tuple(shape),
            macs + (before.macs if before else 0),
            params + (before.params if before else 0),
            size + (before.bytes if before else 0),
            activation + (before.activation_bytes if before else 0),
        )
    return list(rows.values())


def totals(model: Model) -> Mapping[str, int]:
    """MACs, parameters and parameter bytes over all entries (parameters once)."""
    tensors = dict(model.module.named_parameters())
    return {
        "macs": sum(row.macs for entry in model.entries for row in layer_costs(model, entry)),
        "params": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(stored_bytes(t.numel(), model.formats.get(name, ())) for name, t in tensors.items()),
    }
