"""Lets layers whose weights are half precision compute in it, by casts that a strongly typed network obeys.

Part of ``tensorrt.py``. What only clamps, moves or adds their results follows, so that casts stand at the
borders alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_FIRST = frozenset(  # operators of which the first input alone is a tensor of numbers
    {"Relu", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "MaxPool", "AveragePool"}
    | {"GlobalAveragePool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity"}
)
_EVERY = frozenset({"Add", "Mul", "Concat", "Clip"})


def compute_in_half(model: ir.Model) -> None:
    """Put float16 where half-precision weights are, in place."""
    graph = model.graph
    half = _Half(graph)
    for node in list(graph):
        if node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].const_value is not None:
            if node.inputs[0].const_value.dtype.numpy() == np.float16:
                half.shorts[id(node.outputs[0])] = node.inputs[0]
        elif node.op_type in _LAYERS:
            weight = node.inputs[1]
            if weight is not None and id(weight) in half.shorts:
                half.node(node, range(len(node.inputs)))
        elif node.op_type in _FIRST | _EVERY:
            places = [0] if node.op_type in _FIRST else range(len(node.inputs))
            made = [node.inputs[place] for place in places]
            if all(value is None or half.is_short(value) for value in made) and any(
                value is not None and id(value) in half.shorts for value in made
            ):
                half.node(node, places)
    for node in reversed(list(graph)):
        outputs = graph.outputs
        if node.op_type == "Cast" and not node.outputs[0].uses() and node.outputs[0] not in outputs:
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in graph.outputs:
            del graph.initializers[name]


class _Half:
    """Float32 values of a graph, and the float16 values that they were cast from or to."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.shorts: dict[int, ir.Value] = {}

    def is_short(self, value: ir.Value) -> bool:
        """Whether it is there in half precision, or a constant that can be."""
        constant = value.const_value
        return id(value) in self.shorts or (constant is not None and constant.dtype.numpy() == np.float32)

    def node(self, node: ir.Node, places: range | list[int]) -> None:
        """Let a node read half precision, and cast what it makes back for those who do not."""
        import onnx_ir as ir

        for place in places:
            value = node.inputs[place]
            if value is not None:
                node.replace_input_with(place, self._short(value, node))
        made = node.outputs[0]
        readers = list(made.uses())
        back = ir.node("Cast", [made], {"to": ir.DataType.FLOAT})
        self.graph.insert_after(node, back)
        single = back.outputs[0]
        for use in readers:
            use.node.replace_input_with(use.idx, single)
        for index, output in enumerate(self.graph.outputs):
            if output is made:
                single.name, single.type, single.shape = made.name, made.type, made.shape
                made.name, made.type, made.shape = f"{made.name}.half", None, None
                self.graph.outputs[index] = single
        self.shorts[id(single)] = made

    def _short(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        import onnx_ir as ir

        if id(value) in self.shorts:
            return self.shorts[id(value)]
        if value.const_value is not None:
            limit = np.finfo(np.float16).max
            array = value.const_value.numpy().clip(-limit, limit).astype(np.float16)
            name = f"{value.name}.half"
            if len(value.uses()) == 1:  # nobody else reads it: it keeps its name
                name = str(value.name)
                del self.graph.initializers[name]
            short = ir.val(name, const_value=ir.tensor(array, name=name))
            self.graph.register_initializer(short)
        else:
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16})
            self.graph.insert_before(reader, cast)
            short = cast.outputs[0]
        self.shorts[id(value)] = short
        return short
