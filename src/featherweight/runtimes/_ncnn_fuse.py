"""Rewrites what pnnx leaves slow, without changing a number."""

from __future__ import annotations

from collections.abc import Mapping

from featherweight.runtimes._ncnn_file import Layer, array, listed

_MEAN = "3"


def fuse(layers: list[Layer], shapes: Mapping[str, tuple[int, ...]]) -> list[Layer]:
    """Means over a map become global pooling, sizes become numbers, HardSwish joins its convolution."""
    for layer in layers:
        if layer.type == "Reduction" and _over_map(layer, shapes):
            layer.type, layer.params = "Pooling", {0: "1", 4: "1"}
        elif layer.type == "Reshape":
            _settle(layer, shapes)
    gone = [layer for layer in layers if layer.type == "HardSwish" and _absorb(layer, layers)]
    return [layer for layer in layers if layer not in gone]


def _settle(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write sizes down that pnnx left to be computed in each call, which takes longer than large products."""
    if 6 in layer.params:
        sizes = shapes[layer.outputs[0]]
        order = {1: (0,), 2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 1, 0)}[len(sizes)]
        keys = (0, 1, 11, 2) if len(sizes) == 4 else (0, 1, 2)
        layer.params = {key: str(sizes[axis]) for key, axis in zip(keys, order, strict=False)}
        layer.inputs = layer.inputs[:1]


def _over_map(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    axes = layer.params.get(listed(3), "").split(",")[1:]
    flat = layer.params.get(0) == _MEAN and not layer.integer(1) and not layer.integer(4)
    plain = float(layer.params.get(2, 1)) == 1
    return flat and plain and sorted(axes) == ["1", "2"] and len(shapes[layer.inputs[0]]) == 3


def _absorb(layer: Layer, layers: list[Layer]) -> bool:
    """Whether the only maker of what it reads took it in."""
    blob = layer.inputs[0]
    maker = next(other for other in layers if blob in other.outputs)
    readers = [other for other in layers if blob in other.inputs]
    if not maker.type.startswith("Convolution") or len(readers) != 1 or maker.integer(9):
        return False
    if maker.type not in ("Convolution", "ConvolutionDepthWise"):
        return False
    numbers = [float(layer.params.get(0, 0.2)), float(layer.params.get(1, 0.5))]
    maker.params |= {9: "6", listed(10): array(numbers)}
    maker.outputs = layer.outputs
    return True
