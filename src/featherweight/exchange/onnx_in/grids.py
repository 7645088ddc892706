"""Grids of a quantized graph: from its scales and zero points to formats beside the imported module."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from featherweight.exchange.onnx_in.module import Imported, Step
from featherweight.exchange.onnx_in.operators.quantized import integer_range
from featherweight.formats import Granularity, IntQuant, PerChannel, PerTensor, TensorFormat
from featherweight.graph import trace
from featherweight.model import Model


@dataclass(frozen=True)
class Grid:
    """Where a tensor's integers lie: real value = scale * (integer - zero)."""

    scale: np.ndarray
    zero: np.ndarray
    dtype: np.dtype
    axis: int

    def same(self, other: Grid) -> bool:
        numbers = np.array_equal(self.scale, other.scale) and np.array_equal(self.zero, other.zero)
        return numbers and self.dtype == other.dtype

    def values(self, array: np.ndarray) -> np.ndarray:
        """The real values of integers."""
        shape = [1] * array.ndim
        if self.scale.size > 1:
            shape[self.axis % array.ndim] = -1
        centred = array.astype(np.float32) - self.zero.astype(np.float32).reshape(shape)
        return np.asarray(centred * self.scale.reshape(shape), np.float32)

    def format(self, axis: int | None = None) -> IntQuant:
        """The format whose grid has this scale and zero point.

        Args:
            axis: Of the channels in torch's layout, where it is another than ONNX's.
        """
        low, high = integer_range(self.dtype)
        width, signed = (high - low + 1).bit_length() - 1, low < 0
        granularity: Granularity = PerTensor()
        channels = self.scale.size > 1
        scale: np.ndarray = self.scale.astype(np.float64).reshape(-1 if channels else ())
        zero: np.ndarray = self.zero.astype(np.int64).reshape(-1 if channels else ())
        if channels:
            granularity = PerChannel(self.axis if axis is None else axis)
        symmetric = signed and not zero.any()
        first = low + 1 if symmetric else low
        return IntQuant(
            torch.from_numpy(np.asarray((first - zero) * scale, np.float32)),
            torch.from_numpy(np.asarray((high - zero) * scale, np.float32)),
            width,
            symmetric,
            granularity,
            signed,
        )


@dataclass(frozen=True)
class Floated:
    """A float graph and what was quantized in it.

    Attributes:
        proto: The graph; its outputs keep their names and types.
        values: Name of a value -> the grid that it was on.
        weights: Dequantized weights, and the grid of each.
    """

    proto: onnx.ModelProto
    values: Mapping[str, Grid]
    weights: tuple[tuple[np.ndarray, Grid], ...]


def with_formats(model: Model, found: Floated) -> Model:
    """The imported float model, with a format for every weight and value that was quantized."""
    formats: dict[str, tuple[TensorFormat, ...]] = {}
    for name, parameter in model.module.named_parameters():
        for array, grid in found.weights:
            if (fitting := _fitting(parameter, array, grid)) is not None:
                formats[name] = (fitting,)
                break
    inputs = {name: f"input:{name}" for name in model.entries["forward"].input_names}
    for value, traced in (inputs | _traced_names(model, set(found.values))).items():
        if value in found.values and found.values[value].dtype != np.int32:
            formats[traced] = (found.values[value].format(),)
    return model.evolve(formats={**model.formats, **formats}, key=model.key)


def _fitting(parameter: nn.Parameter, array: np.ndarray, grid: Grid) -> IntQuant | None:
    """The weight's format, if the parameter is this weight or its transpose."""
    if parameter.numel() != array.size:
        return None
    axis = grid.axis % max(array.ndim, 1)
    if tuple(parameter.shape) == array.shape and np.array_equal(parameter.detach().numpy(), array):
        return grid.format(axis)
    turned = array.T
    if tuple(parameter.shape) == turned.shape and np.array_equal(parameter.detach().numpy(), turned):
        return grid.format(array.ndim - 1 - axis)
    return None


def _traced_names(model: Model, wanted: set[str]) -> dict[str, str]:
    """Value in the ONNX graph -> its traced name: traced once more with marks behind those values."""
    import featherweight.exchange.export  # noqa: F401  (registers the mark)

    assert isinstance(model.module, Imported)
    kind = type(model.module)
    order: list[str] = []

    def run(self: Imported, step: Step, values: dict[str, Any]) -> None:
        kind.run(self, step, values)
        for name in step.outputs:
            if name in wanted and isinstance(values[name], Tensor) and values[name].is_floating_point():
                values[name] = torch.ops.featherweight.mark(values[name], name)
                order.append(name)

    marked = copy.copy(model.module)
    marked.__class__ = type("Marked", (kind,), {"run": run, "__module__": __name__})
    graph = trace(replace(model, module=marked, traced={}))
    texts = {node.name: node.args[1] for node in graph.program.graph.nodes if len(node.args) > 1}
    return {str(texts[node.fx_name]): node.inputs[0] for node in graph if node.op == "mark" and node.inputs}
