"""Linear layers as the layers of ncnn that have fast integer kernels for them.

``InnerProduct`` in int8 is slower than in float32 on x86, by 2 for a vector and by 10 for a matrix; the
same product as a 1x1 ``Convolution`` over the rows takes half of float32's time. Weights in blocks: ``Gemm``.
"""

from __future__ import annotations

from collections.abc import Mapping

from featherweight.errors import TargetError
from featherweight.runtimes._ncnn_file import Layer, listed

Shapes = Mapping[str, tuple[int, ...]]
_ACTIVATIONS = {1: "ReLU", 2: "ReLU", 3: "Clip", 4: "Sigmoid", 5: "Mish", 6: "HardSwish"}
_WORTH_IT = 1 << 15  # elements of a weight above which a convolution beats InnerProduct on one vector


def as_convolution(layer: Layer, outputs: int, width: int, layers: list[Layer], shapes: Shapes) -> None:
    """Turn a linear layer into a 1x1 convolution between transposes, where that is faster."""
    blob, shape = layer.inputs[0], shapes[layer.inputs[0]]
    vector = layer.type == "InnerProduct" and len(shape) != 2
    if vector and outputs * width < _WORTH_IT:
        return
    if not vector and len(shape) != 2:
        raise TargetError(
            f"ncnn has no integer kernel for a linear layer that reads {shape}", fix="exclude it under where"
        )
    rows = 1 if vector else shape[0]
    before = _to_map(blob, rows, width, layers)
    made, columns = f"{layer.outputs[0]}.map", f"{layer.outputs[0]}.columns"
    end = {0: str(outputs)} if vector else {0: str(rows), 1: str(outputs)}
    if rows == 1:
        ends = {0: str(outputs)} if vector else {0: str(outputs), 1: "1"}
        after = [Layer("Reshape", columns, [made], layer.outputs, ends)]
    else:
        after = [
            Layer("Reshape", columns, [made], [columns], end),
            Layer("Permute", f"{layer.outputs[0]}.rows", [columns], layer.outputs, {0: "1"}),
        ]
    inside = {key: layer.params[key] for key in (9, listed(10)) if key in layer.params}
    layer.params = {0: str(outputs), 1: "1", 5: str(int("bias" in layer.tensors)), 6: str(outputs * width)}
    layer.params |= inside if layer.type == "InnerProduct" else {}
    layer.type, layer.inputs, layer.outputs = "Convolution", [f"{blob}.map"], [made]
    place = layers.index(layer)
    layers[place : place + 1] = [*before, layer, *after]


def _to_map(blob: str, rows: int, width: int, layers: list[Layer]) -> list[Layer]:
    """Layers that make ``blob.map``, a channel for each column; none if another reader has made it."""
    if any(layer.name == f"{blob}.map" for layer in layers):
        return []
    source, first = blob, []
    if rows > 1:
        source = f"{blob}.columns"
        first = [Layer("Permute", source, [blob], [source], {0: "1"})]
    sizes = {0: str(rows), 1: "1", 2: str(width)}
    return [*first, Layer("Reshape", f"{blob}.map", [source], [f"{blob}.map"], sizes)]


def as_block_gemm(
    layer: Layer, outputs: int, width: int, term: int, layers: list[Layer], shapes: Shapes
) -> None:
    """Turn a linear layer into the Gemm that has weights in blocks, with the same shapes around it."""
    place = layers.index(layer)
    shape = shapes[layer.inputs[0]]
    before: list[Layer] = []
    after: list[Layer] = []
    if layer.type == "InnerProduct":
        if len(shape) != 2:  # one row: a vector that is packed would be taken for several
            row = f"{layer.inputs[0]}.row"
            before = [Layer("Reshape", f"{layer.name}.row", layer.inputs, [row], {0: str(width), 1: "1"})]
            layer.inputs = [row]
        after = _behind(layer, outputs, one_row=len(shape) != 2)
    layer.type = "Gemm"
    bias = "bias" in layer.tensors
    numbers = {2: 0, 3: 1, 4: 0, 5: 1, 6: 1, 7: 0, 8: outputs, 9: width, 10: 4 if bias else -1, 18: term}
    layer.params = {key: str(value) for key, value in numbers.items()}
    layers[place : place + 1] = [*before, layer, *after]


def _behind(layer: Layer, outputs: int, *, one_row: bool) -> list[Layer]:
    """The activation that InnerProduct had inside, and the shape that it gave."""
    kind = layer.integer(9)
    given = layer.params.get(listed(10), "0").split(",")[1:]
    chain: list[tuple[str, dict[int, str]]] = []
    if one_row:
        chain.append(("Reshape", {0: str(outputs)}))
    if kind:
        chain.append((_ACTIVATIONS[kind], dict(enumerate(given))))
    made: list[Layer] = []
    last = layer.outputs[0]
    blobs = [f"{last}.{index}" for index in range(len(chain))]
    for index, (type_, params) in enumerate(chain):
        end = last if index == len(chain) - 1 else blobs[index + 1]
        made.append(Layer(type_, f"{layer.name}.{index}", [blobs[index]], [end], params))
    if chain:
        layer.outputs = [blobs[0]]
    return made
