"""Writes formats into a float ``.tflite`` graph: integers, scales, and the operators between types.

Part of ``litert.py``, which says what its kernels ask for. A tensor that has a grid is int8 wherever an
integer kernel makes or reads it; operators that only move values hand their grid on; what stays float
reads through DEQUANTIZE and is read through QUANTIZE.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.runtimes._litert_graph import FlatGraph, Grid
from featherweight.runtimes._litert_weights import Weights

if TYPE_CHECKING:
    from featherweight.formats import TensorFormat

WEIGHTED = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"})
_FREE = frozenset({"ADD", "MUL", "SUB", "MEAN", "LEAKY_RELU"})
_CLAMPS = {"RELU": np.inf, "RELU6": 6.001}  # with the largest value that passes
_RESHAPES = frozenset({"RESHAPE", "TRANSPOSE", "SQUEEZE", "EXPAND_DIMS"})
_MOVES = _RESHAPES | {"SLICE", "STRIDED_SLICE", "SPLIT", "PAD", "PADV2", "MAX_POOL_2D", *_CLAMPS}
_FIXED = {
    "LOGISTIC": Grid.of(1 / 256, -128),
    "TANH": Grid.of(1 / 128, 0),
}
_INTEGER = WEIGHTED | _FREE | _MOVES | {*_FIXED, "CONCATENATION"}
_DATA = {"TRANSPOSE_CONV": 2, "SPLIT": 1}  # position of the activation where it is not the first input
_ALL_DATA = frozenset({"ADD", "MUL", "SUB", "BATCH_MATMUL", "CONCATENATION"})


@dataclass(frozen=True)
class Parameter:
    """A parameter's values and its format."""

    values: np.ndarray
    format: TensorFormat | None


def store_formats(
    graph: FlatGraph,
    parameters: Mapping[str, Parameter],
    formats: Mapping[int, TensorFormat],
    *,
    dynamic: bool = False,
) -> dict[str, str]:
    """Turn formats into stored types, in place.

    Args:
        graph: A float graph.
        parameters: By name; one with a format must be found among the graph's constants.
        formats: Of activations, by tensor.
        dynamic: See :class:`Weights`.

    Returns:
        Parameters that are stored under another's name, since they hold the same.

    Raises:
        TargetError: A parameter with a format is no constant of the graph any more.
    """
    grids = {tensor: _grid(fmt) for tensor, fmt in formats.items()}
    weights = Weights(
        graph, {name: (one.values, one.format) for name, one in parameters.items()}, dynamic=dynamic
    )
    writer = _Writer(graph, weights, grids)
    writer.spread()
    integer = [operator for operator in graph.operators if writer.is_integer(operator)]
    chosen = {id(operator) for operator in integer}
    weights.store_floats([operator for operator in graph.operators if id(operator) not in chosen])
    for operator in integer:
        writer.constrain(operator)
    weights.store_integers([one for one in integer if graph.kind(one) in WEIGHTED], writer.grids)
    writer.convert(integer)
    weights.check()
    weights.name_all()
    return weights.twins


def data_inputs(graph: FlatGraph, operator: Any) -> list[int]:
    """What an operator computes with: no shapes, axes, weights or biases."""
    kind = graph.kind(operator)
    inputs = [int(index) for index in operator.inputs]
    if kind in _ALL_DATA:
        return inputs
    return [inputs[_DATA.get(kind, 0)]]


def _grid(fmt: Any) -> Grid:
    scale, zero_point = fmt.grid()
    return Grid.of(float(scale), int(zero_point))


@dataclass
class _Writer:
    """Edits one graph."""

    graph: FlatGraph
    weights: Weights
    grids: dict[int, Grid]
    _requantizers: list[Any] = field(default_factory=list)

    def spread(self) -> None:
        """Give tensors that are moved from, or to, one with a grid the same grid."""
        consumers = self.graph.consumers()
        self.graph.order()
        for operator in reversed(self.graph.operators):
            source, made = data_inputs(self.graph, operator)[0], int(operator.outputs[0])
            alone = len(consumers[source]) == 1 and source not in self.graph.outputs
            if self.graph.kind(operator) in _RESHAPES and made in self.grids and alone:
                self.grids.setdefault(source, self.grids[made])
        for operator in self.graph.operators:
            source = data_inputs(self.graph, operator)[0]
            if self.graph.kind(operator) in _MOVES - set(_CLAMPS) and source in self.grids:
                for made in operator.outputs:
                    self.grids.setdefault(int(made), self.grids[source])

        self._spread_gates(consumers)

    def _spread_gates(self, consumers: Mapping[int, list[Any]]) -> None:
        """A sigmoid inside of SiLU has its fixed grid where the product that reads it is one of integers."""
        for operator in self.graph.operators:
            made = int(operator.outputs[0])
            if self.graph.kind(operator) != "LOGISTIC" or made in self.grids or made in self.graph.outputs:
                continue
            if int(operator.inputs[0]) in self.grids and all(
                self.graph.kind(reader) == "MUL"
                and all(int(t) == made or int(t) in self.grids for t in (*reader.inputs, *reader.outputs))
                for reader in consumers[made]
            ):
                self.grids[made] = _FIXED["LOGISTIC"]

    def is_integer(self, operator: Any) -> bool:
        """Whether an integer kernel can do it: all that it reads and makes has a grid."""
        kind = self.graph.kind(operator)
        if kind not in _INTEGER:
            return False
        if any(tensor not in self.grids for tensor in data_inputs(self.graph, operator)):
            return False
        if any(int(made) not in self.grids for made in operator.outputs):
            return False
        if kind in _CLAMPS:
            return self._rounds_within(operator) or self._clamps_alike(operator)
        return kind not in WEIGHTED or self.weights.integers_for(operator)

    def _clamps_alike(self, operator: Any) -> bool:
        return self.grids[int(operator.inputs[0])].same(self.grids[int(operator.outputs[0])])

    def _rounds_within(self, operator: Any) -> bool:
        """Whether rounding to the output's grid clamps as the operator does."""
        grid = self.grids[int(operator.outputs[0])]
        low, high = ((end - grid.zero_point[0]) * float(grid.scale[0]) for end in (-128, 127))
        return bool(low >= 0 and high <= _CLAMPS[self.graph.kind(operator)])

    def constrain(self, operator: Any) -> None:
        """Requantize around an operator whose kernel wants one grid, or a certain one."""
        kind = self.graph.kind(operator)
        if kind in _CLAMPS and self._rounds_within(operator):
            self.graph.remove(operator)
            self._requantize(int(operator.inputs[0]), int(operator.outputs[0]))
            return
        if kind == "CONCATENATION":
            wanted = self.grids[int(operator.outputs[0])]
            for source in dict.fromkeys(data_inputs(self.graph, operator)):
                if not self.grids[source].same(wanted):
                    self.graph.read_instead(source, self._requantized(source, wanted), [operator])
            return
        if kind in _FIXED:
            made = _FIXED[kind]
        elif kind in _MOVES:
            made = self.grids[data_inputs(self.graph, operator)[0]]
        else:
            return
        for place, tensor in enumerate(int(index) for index in operator.outputs):
            if self.grids[tensor].same(made):
                continue
            inner = self.graph.add(f"{self.graph.name(tensor)}/own", self.graph.shape(tensor), "float32")
            self.grids[inner] = made
            operator.outputs = [inner if i == place else int(out) for i, out in enumerate(operator.outputs)]
            self._requantize(inner, tensor)

    def _requantized(self, source: int, grid: Grid) -> int:
        name = f"{self.graph.name(source)}/{grid.scale[0]:g}"
        tensor = self.graph.add(name, self.graph.shape(source), "float32")
        self.grids[tensor] = grid
        self._requantize(source, tensor)
        return tensor

    def _requantize(self, source: int, made: int) -> None:
        self._requantizers.append(self.graph.operator("QUANTIZE", [source], [made], 2))

    def convert(self, integer: list[Any]) -> None:
        """Make int8 of every tensor with a grid, and put operators where types meet."""
        graph = self.graph
        whole = {id(one) for one in (*integer, *self._requantizers)}
        producers, consumers = graph.producers(), graph.consumers()
        for tensor, grid in self.grids.items():
            floats = [one for one in consumers[tensor] if id(one) not in whole]
            producer = producers.get(tensor)
            shape, name = graph.shape(tensor), graph.name(tensor)
            if producer is None or id(producer) not in whole:
                quantized = graph.add(name, shape, "int8", grid)
                graph.operator("QUANTIZE", [tensor], [quantized])
                graph.read_instead(tensor, quantized, [one for one in consumers[tensor] if id(one) in whole])
                graph.rename(tensor, f"{name}/float")
            else:
                graph.retype(tensor, "int8", grid)
                quantized = tensor
            if floats or tensor in graph.outputs:
                restored = graph.add(f"{name}/float", shape, "float32")
                graph.operator("DEQUANTIZE", [quantized], [restored], 2)
                graph.read_instead(tensor, restored, floats)
                graph.return_instead(tensor, restored)
        self._pads(integer)

    def _pads(self, integer: Iterable[Any]) -> None:
        """What a PADV2 pads with, in the integers of its input: below everything becomes the smallest one."""
        graph = self.graph
        for operator in integer:
            if graph.kind(operator) != "PADV2":
                continue
            grid = graph.grid(int(operator.inputs[0]))
            assert grid is not None
            value = np.asarray(graph.constant(int(operator.inputs[2])), np.float64)
            steps = np.clip(np.rint(value / grid.scale[0]) + grid.zero_point[0], -128, 127).astype(np.int8)
            padding = graph.add_constant("padding", steps, grid)
            operator.inputs = [int(operator.inputs[0]), int(operator.inputs[1]), padding]
