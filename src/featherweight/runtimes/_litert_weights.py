"""Finds a model's parameters among the constants of a ``.tflite`` graph, and stores them in their formats.

Part of ``litert.py``. The converter lays weights out anew and may fold factors per channel into them, so
a constant is recognised by the values of each of its channels, in any order, up to a factor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import TargetError
from featherweight.runtimes._litert_graph import ABSENT, FlatGraph, Grid

if TYPE_CHECKING:
    from featherweight.formats import TensorFormat

_CHANNELS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0, "TRANSPOSE_CONV": 0}
_BIAS = {"CONV_2D": 2, "DEPTHWISE_CONV_2D": 2, "FULLY_CONNECTED": 2, "TRANSPOSE_CONV": 3}
_DATA = {"TRANSPOSE_CONV": 2}
_BIAS_LIMIT = 2**30  # int32, with room for what is added to it
_SMALLEST = (
    2.0**-30
)  # of the ratio between the scales of what is multiplied and the output's; XNNPACK's is 2**-32


class Weights:
    """The parameters of a graph.

    Args:
        graph: A float graph.
        parameters: Values and format by name.
        dynamic: Matrices of 8-bit integers alone go to kernels that round activations as they come.
    """

    def __init__(
        self,
        graph: FlatGraph,
        parameters: Mapping[str, tuple[np.ndarray, TensorFormat | None]],
        *,
        dynamic: bool = False,
    ) -> None:
        self.graph = graph
        self.parameters = parameters
        self.dynamic = dynamic
        self.names: dict[int, str] = {}  # constant -> parameter
        self._exact: set[int] = set()
        self.twins: dict[str, str] = {}  # parameter -> another one of the same values that is stored for it
        self._stored: dict[int, str] = {}  # constant that was written -> parameter
        self._missing = {name for name, (_, fmt) in parameters.items() if fmt is not None}
        self._find()

    # ---- finding

    def _find(self) -> None:
        weights = {
            int(operator.inputs[1]): _CHANNELS[kind]
            for operator in self.graph.operators
            if (kind := self.graph.kind(operator)) in _CHANNELS
            and self.graph.is_constant(int(operator.inputs[1]))
        }
        matrices = {name: values for name, (values, _) in self.parameters.items() if values.ndim > 1}
        taken: set[str] = set()
        for exact in (True, False):
            for tensor, axis in weights.items():
                if tensor in self.names:
                    continue
                values = self.graph.constant(tensor)
                names = [name for name, own in matrices.items() if _alike(values, axis, own, exact)]
                if names:
                    self.names[tensor] = next((name for name in names if name not in taken), names[0])
                    taken.add(self.names[tensor])
                    self._exact |= {tensor} if exact else set()
        self._find_plain()
        self._find_twins()

    def _find_twins(self) -> None:
        """Parameters of the same values are one constant, and have one of their names."""
        held = {self.parameters[name][0].tobytes(): name for name in self.names.values()}
        for name, (values, _) in self.parameters.items():
            twin = held.get(values.tobytes(), name)
            if twin != name and name not in self.names.values():
                self.twins[name] = twin

    def _find_plain(self) -> None:
        """Parameters that are stored as they are: biases, tables of embeddings."""
        known = {values.tobytes(): name for name, (values, _) in self.parameters.items()}
        for operator in self.graph.operators:
            for tensor in (int(index) for index in operator.inputs):
                if tensor in self.names or not self.graph.is_constant(tensor):
                    continue
                if self.graph.dtype(tensor) != "float32":
                    continue
                name = known.get(self.graph.constant(tensor).tobytes())
                if name is not None:
                    self.names[tensor] = name
                    self._exact.add(tensor)

    def _format(self, operator: Any) -> tuple[str, TensorFormat | None]:
        name = self.names.get(int(operator.inputs[1]), "") if len(operator.inputs) > 1 else ""
        return name, self.parameters[name][1] if name else None

    def integers_for(self, operator: Any) -> bool:
        """Whether an operator's weight is one that its integer kernel takes."""
        from featherweight.formats import IntQuant, PerGroup

        _, fmt = self._format(operator)
        exact = int(operator.inputs[1]) in self._exact
        whole = isinstance(fmt, IntQuant) and fmt.width == 8 and not isinstance(fmt.granularity, PerGroup)
        return whole and exact

    # ---- storing

    def store_floats(self, operators: list[Any]) -> None:
        """Constants of float operators whose parameter has a format.

        They are stored short and restored when the file is loaded; but 4 bits, and with ``dynamic`` also 8,
        are read as they are by matrix kernels, which round each row of activations as it comes.
        """
        from featherweight.formats import FloatCast, IntQuant

        done: dict[int, int] = {}
        whole: dict[int, int] = {}
        for operator in operators:
            for tensor in dict.fromkeys(int(index) for index in operator.inputs):
                name = self.names.get(tensor)
                fmt = self.parameters[name][1] if name is not None else None
                if name is None or fmt is None or (isinstance(fmt, IntQuant) and tensor not in self._exact):
                    continue
                matrix = self.graph.kind(operator) == "FULLY_CONNECTED" and isinstance(fmt, IntQuant)
                if matrix and (self.dynamic or fmt.width < 8):
                    if tensor not in whole:
                        whole[tensor] = self._whole(name, self.graph.constant(tensor), fmt)
                    self.graph.read_instead(tensor, whole[tensor], [operator])
                    continue
                if isinstance(fmt, IntQuant) and fmt.width < 8:
                    continue
                if tensor not in done:
                    values = self.graph.constant(tensor)
                    if isinstance(fmt, FloatCast):
                        stored = self.graph.add_constant(name, _half(values))
                    else:
                        axis = _CHANNELS.get(self.graph.kind(operator), 0)
                        integers, grid = _integers(values, fmt, axis)
                        stored = self.graph.add_constant(name, integers, grid)
                    self._stored[stored] = name
                    restored = self.graph.add(f"{name}/float", values.shape, "float32")
                    self.graph.operator("DEQUANTIZE", [stored], [restored], 2)
                    done[tensor] = restored
                    self._missing.discard(name)
                self.graph.read_instead(tensor, done[tensor], [operator])

    def _whole(self, name: str, values: np.ndarray, fmt: Any) -> int:
        """A matrix as integers, 4-bit ones packed in pairs."""
        from featherweight.formats import PerGroup

        grouped = isinstance(fmt.granularity, PerGroup) and fmt.granularity.size < values.shape[1]
        if grouped and values.shape[1] % fmt.granularity.size:
            raise TargetError(
                f"litert cannot store '{name}' in groups of {fmt.granularity.size}: its rows have"
                f" {values.shape[1]} elements",
                fix=f"exclude '{name.removesuffix('.weight')}' under where, or granularity: per_channel",
            )
        integers, grid = _grouped(values, fmt) if grouped else _integers(values, fmt, 0)
        dtype = "int8" if fmt.width == 8 else "int4"
        packed = integers if fmt.width == 8 else _packed(integers)
        stored = self.graph.add_constant(
            name, packed, None if grouped else grid, dtype=dtype, shape=values.shape
        )
        if grouped:
            scales = self.graph.add_constant(f"{name}.scales", _half(grid.scale))
            self.graph.share_in_groups(stored, scales, fmt.granularity.size)
        self._stored[stored] = name
        self._missing.discard(name)
        return stored

    def store_integers(self, operators: list[Any], grids: Mapping[int, Grid]) -> None:
        """Weights and biases of integer operators.

        A bias is int32 at the product of the input's and the weight's scales. Where that product is too
        small for it, or for the kernel, the weight's scale grows until it fits.
        """
        smallest: dict[int, np.ndarray] = {}
        for operator in operators:
            weight = int(operator.inputs[1])
            least = self._least_scale(operator, grids)
            smallest[weight] = np.maximum(smallest.get(weight, least), least)
        stored: dict[int, tuple[int, Grid]] = {}
        for operator in operators:
            kind, weight = self.graph.kind(operator), int(operator.inputs[1])
            name, fmt = self._format(operator)
            if weight not in stored:
                integers, grid = _integers(self.graph.constant(weight), fmt, _CHANNELS[kind])
                integers, grid = _widen(integers, grid, smallest[weight])
                stored[weight] = self.graph.add_constant(name, integers, grid), grid
                self._stored[stored[weight][0]] = name
                self._missing.discard(name)
            tensor, grid = stored[weight]
            bias = self._bias(operator, name, grids, grid)
            inputs = [int(index) for index in operator.inputs]
            inputs[1] = tensor
            operator.inputs = [*inputs[: _BIAS[kind]], bias]

    def _bias_values(self, operator: Any) -> np.ndarray:
        kind = self.graph.kind(operator)
        place, weight = _BIAS[kind], int(operator.inputs[1])
        bias = int(operator.inputs[place]) if len(operator.inputs) > place else ABSENT
        if bias == ABSENT:
            return np.zeros(self.graph.shape(weight)[_CHANNELS[kind]], np.float64)
        return self.graph.constant(bias).astype(np.float64).reshape(-1)

    def _least_scale(self, operator: Any, grids: Mapping[int, Grid]) -> np.ndarray:
        kind = self.graph.kind(operator)
        source = float(grids[int(operator.inputs[_DATA.get(kind, 0)])].scale[0])
        made = float(grids[int(operator.outputs[0])].scale[0])
        needed: np.ndarray = np.maximum(
            np.abs(self._bias_values(operator)) / (source * _BIAS_LIMIT), _SMALLEST * made / source
        )
        return needed

    def _bias(self, operator: Any, name: str, grids: Mapping[int, Grid], weight: Grid) -> int:
        kind = self.graph.kind(operator)
        values = self._bias_values(operator)
        source = grids[int(operator.inputs[_DATA.get(kind, 0)])].scale[0]
        scale = (source * weight.scale).astype(np.float32)
        integers = np.rint(values / scale.astype(np.float64)).astype(np.int32)
        place = _BIAS[kind]
        old = int(operator.inputs[place]) if len(operator.inputs) > place else ABSENT
        bias = self.graph.add_constant("bias", integers, Grid(scale, np.zeros(len(scale), np.int64)))
        own = f"{name.removesuffix('weight')}bias"
        self._stored[bias] = own if own in self.parameters else self.names.get(old, own)
        return bias

    def name_all(self) -> None:
        """Call constants as the parameters that they hold; one that is stored again has a number behind."""
        held = self.names | self._stored
        written: Counter[str] = Counter()
        named: set[int] = set()
        for operator in self.graph.operators:
            for tensor in (int(index) for index in operator.inputs):
                if tensor in named or not self.graph.is_constant(tensor):
                    continue
                named.add(tensor)
                name = held.get(tensor, "constant")
                self.graph.rename(tensor, f"{name}.{written[name]}" if written[name] else name)
                written[name] += 1

    def check(self) -> None:
        """Every parameter that has a format is stored in it.

        Raises:
            TargetError: The converter changed one, so that it is on its grid no more.
        """
        from featherweight.formats import encode

        for name, twin in self.twins.items():
            fmt, other = (self.parameters[one][1] for one in (name, twin))
            if (
                twin not in self._missing
                and fmt is not None
                and other is not None
                and encode(fmt) == encode(other)
            ):
                self._missing.discard(name)
        if self._missing:
            name = min(self._missing)
            raise TargetError(
                f"litert cannot store '{name}' in its format: its converter changed the values",
                fix="run fold first (a batch norm or a scale goes into the weights), or exclude the layer",
            )


def _rows(values: np.ndarray, axis: int) -> np.ndarray:
    """Each channel's values as a row."""
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


def _alike(stored: np.ndarray, axis: int, own: np.ndarray, exact: bool) -> bool:
    """Whether a constant holds a parameter's values channel by channel, exactly or up to a factor of each."""
    if stored.size != own.size:
        return False
    rows = _rows(stored, axis)
    for own_axis in (0, 1):
        theirs = _rows(own, own_axis)
        if theirs.shape != rows.shape:
            continue
        if exact:
            if np.array_equal(np.sort(rows[:1]), np.sort(theirs[:1])) and np.array_equal(
                np.sort(rows), np.sort(theirs)
            ):
                return True
        elif all(np.allclose(_normal(rows[:n]), _normal(theirs[:n]), atol=1e-4) for n in (1, None)):
            return True
    return False


def _normal(rows: np.ndarray) -> np.ndarray:
    """Rows of length one, sorted, their largest element positive."""
    length = np.linalg.norm(rows, axis=1, keepdims=True) + 1e-30
    largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
    return np.sort(rows / length * np.where(largest < 0, -1, 1))


def _half(values: np.ndarray) -> np.ndarray:
    limit = np.finfo(np.float16).max
    return values.clip(-limit, limit).astype(np.float16)


def _integers(values: np.ndarray, fmt: Any, axis: int) -> tuple[np.ndarray, Grid]:
    """The stored integers of a weight whose channels lie along an axis, and their grid."""
    scale = fmt.grid()[0].numpy().reshape(-1).astype(np.float32)
    channels = values.shape[axis]
    scale = np.broadcast_to(scale, (channels,)) if scale.size == 1 else scale
    shape = [1] * values.ndim
    shape[axis] = -1
    steps = np.rint(values / scale.reshape(shape))
    integers = np.clip(steps, fmt.quant_min, fmt.quant_max).astype(np.int8)
    return integers, Grid(np.array(scale), np.zeros(channels, np.int64), axis)


def _grouped(values: np.ndarray, fmt: Any) -> tuple[np.ndarray, Grid]:
    """The stored integers of a matrix whose rows share scales in groups, and the scales."""
    scale = fmt.grid()[0].numpy().astype(np.float32)
    steps = np.rint(values / np.repeat(scale, fmt.granularity.size, 1))
    integers = np.clip(steps, fmt.quant_min, fmt.quant_max).astype(np.int8)
    return integers, Grid(scale, np.zeros(scale.shape, np.int64))


def _packed(integers: np.ndarray) -> np.ndarray:
    """Pairs of 4-bit integers in bytes, the first one low."""
    nibbles = integers.reshape(-1).view(np.uint8) & 15
    nibbles = np.append(nibbles, np.zeros(nibbles.size % 2, np.uint8))
    return nibbles[0::2] | (nibbles[1::2] << 4)


def _widen(integers: np.ndarray, grid: Grid, smallest: np.ndarray) -> tuple[np.ndarray, Grid]:
    """Give each channel at least this scale; the integers follow."""
    scale = np.maximum(grid.scale, smallest).astype(np.float32)
    if np.array_equal(scale, grid.scale):
        return integers, grid
    shape = [1] * integers.ndim
    shape[grid.axis] = -1
    ratio = (grid.scale.astype(np.float64) / scale).reshape(shape)
    return np.rint(integers * ratio).astype(np.int8), Grid(scale, grid.zero_point, grid.axis)
