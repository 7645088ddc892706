"""A ``.tflite`` flatbuffer as a graph that can be edited: tensors, constants and operators by index.

Part of ``litert.py``. Uses the schema that comes with ``ai_edge_litert``, and numpy; no interpreter.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ABSENT = -1  # an optional input that is not given


@dataclass(frozen=True)
class Grid:
    """How a tensor of integers maps to real values.

    Attributes:
        scale: One, or one per index of ``axis``; float32.
        zero_point: Of the same length.
        axis: Of the channels; 0 where there is one scale.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int = 0

    @classmethod
    def of(cls, scale: float, zero_point: int) -> Grid:
        """Of a whole tensor."""
        return cls(np.array([scale], np.float32), np.array([zero_point], np.int64))

    def same(self, other: Grid) -> bool:
        return bool(
            np.array_equal(self.scale, other.scale) and np.array_equal(self.zero_point, other.zero_point)
        )


class FlatGraph:
    """The first subgraph of a model; operators are objects of the schema, tensors are indices."""

    def __init__(self, content: bytes) -> None:
        from ai_edge_litert.tools import flatbuffer_utils

        self.model: Any = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
        self.graph: Any = self.model.subgraphs[0]

    @classmethod
    def read(cls, path: Path) -> FlatGraph:
        return cls(path.read_bytes())

    # ---- reading

    @property
    def operators(self) -> list[Any]:
        return self.graph.operators  # type: ignore[no-any-return]

    @property
    def inputs(self) -> list[int]:
        return [int(index) for index in self.graph.inputs]

    @property
    def outputs(self) -> list[int]:
        return [int(index) for index in self.graph.outputs]

    def kind(self, operator: Any) -> str:
        """The operator's name in the schema, e.g. ``CONV_2D``."""
        return _names("BuiltinOperator")[self.model.operatorCodes[operator.opcodeIndex].builtinCode]

    def name(self, tensor: int) -> str:
        return str(self.graph.tensors[tensor].name.decode())

    def rename(self, tensor: int, name: str) -> None:
        self.graph.tensors[tensor].name = name.encode()

    def dtype(self, tensor: int) -> str:
        """``float32``, ``int8``, ``int4`` and so on."""
        return _names("TensorType")[self.graph.tensors[tensor].type].lower()

    def shape(self, tensor: int) -> tuple[int, ...]:
        shape = self.graph.tensors[tensor].shape
        return () if shape is None else tuple(int(size) for size in shape)

    def size(self, tensor: int) -> int:
        data = self.model.buffers[self.graph.tensors[tensor].buffer].data
        return 0 if data is None else len(data)

    def is_constant(self, tensor: int) -> bool:
        return tensor >= 0 and self.size(tensor) > 0

    def constant(self, tensor: int) -> np.ndarray:
        """The values of a constant of whole bytes."""
        data = self.model.buffers[self.graph.tensors[tensor].buffer].data
        return np.frombuffer(bytes(data), np.dtype(self.dtype(tensor))).reshape(self.shape(tensor))

    def grid(self, tensor: int) -> Grid | None:
        found = self.graph.tensors[tensor].quantization
        if found is None or found.scale is None or not len(found.scale):
            return None
        scale = np.asarray(found.scale, np.float32)
        zero_point = np.zeros(len(scale), np.int64) if found.zeroPoint is None else found.zeroPoint
        return Grid(scale, np.asarray(zero_point, np.int64), found.quantizedDimension)

    def producers(self) -> dict[int, Any]:
        """Tensor -> the operator that makes it."""
        return {int(out): operator for operator in self.operators for out in operator.outputs}

    def consumers(self) -> Mapping[int, list[Any]]:
        """Tensor -> the operators that read it, each once."""
        found: dict[int, list[Any]] = defaultdict(list)
        for operator in self.operators:
            for tensor in dict.fromkeys(int(index) for index in operator.inputs):
                found[tensor].append(operator)
        return found

    # ---- editing

    def add(self, name: str, shape: Sequence[int], dtype: str, grid: Grid | None = None) -> int:
        """A new tensor, unique in its name."""
        schema = _schema()
        tensor = schema.TensorT()
        tensor.shape = [int(size) for size in shape]
        tensor.hasRank = True
        tensor.type = getattr(schema.TensorType, dtype.upper())
        tensor.name = name.encode()
        tensor.quantization = _quantization(grid)
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def add_constant(
        self, name: str, values: np.ndarray, grid: Grid | None = None, *, dtype: str = "", shape: Any = None
    ) -> int:
        """A new constant; ``dtype`` and ``shape`` where they are not those of the array (packed integers)."""
        tensor = self.add(name, values.shape if shape is None else shape, dtype or values.dtype.name, grid)
        buffer = _schema().BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
        self.model.buffers.append(buffer)
        self.graph.tensors[tensor].buffer = len(self.model.buffers) - 1
        return tensor

    def share_in_groups(self, tensor: int, scales: int, size: int) -> None:
        """Let runs of so many elements in a matrix's rows share a scale; ``scales`` is a float16 constant."""
        schema = _schema()
        made, details = schema.QuantizationParametersT(), schema.BlockwiseQuantizationT()
        details.scales, details.zeroPoints, details.blockSize = scales, ABSENT, size
        made.detailsType, made.details = schema.QuantizationDetails.BlockwiseQuantization, details
        self.graph.tensors[tensor].quantization = made

    def scales_of(self, tensor: int) -> int:
        """The constant that holds the scales of a constant's groups; ``ABSENT``: it has none."""
        found = self.graph.tensors[tensor].quantization
        scales = getattr(None if found is None else found.details, "scales", None)
        return ABSENT if scales is None else int(scales)

    def retype(self, tensor: int, dtype: str, grid: Grid | None) -> None:
        """Give a tensor that is no constant another type."""
        found = self.graph.tensors[tensor]
        found.type = getattr(_schema().TensorType, dtype.upper())
        found.quantization = _quantization(grid)

    def operator(self, kind: str, inputs: Sequence[int], outputs: Sequence[int], version: int = 1) -> Any:
        """A new operator without options; ``finish`` puts it in its place."""
        schema = _schema()
        code = getattr(schema.BuiltinOperator, kind)
        codes = self.model.operatorCodes
        place = next((i for i, one in enumerate(codes) if one.builtinCode == code), None)
        if place is None:
            made = schema.OperatorCodeT()
            made.builtinCode, made.deprecatedBuiltinCode, made.version = code, min(code, 127), version
            codes.append(made)
            place = len(codes) - 1
        operator = schema.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = place, list(inputs), list(outputs)
        self.operators.append(operator)
        return operator

    def read_instead(self, old: int, new: int, readers: Iterable[Any]) -> None:
        """Let these operators read another tensor."""
        for operator in readers:
            operator.inputs = [new if int(index) == old else int(index) for index in operator.inputs]

    def return_instead(self, old: int, new: int) -> None:
        """Let the graph and its signatures return another tensor."""
        self.graph.outputs = [new if index == old else index for index in self.outputs]
        for signature in self.model.signatureDefs or []:
            for entry in signature.outputs:
                if entry.tensorIndex == old:
                    entry.tensorIndex = new

    def remove(self, operator: Any) -> None:
        self.graph.operators = [one for one in self.operators if one is not operator]

    # ---- writing

    def finish(self) -> bytes:
        """Order the operators, drop what nobody reads, and serialize."""
        from ai_edge_litert.tools import flatbuffer_utils

        self._drop_dead()
        self.order()
        self._compact()
        self._tell_apart()
        self.model.metadata = None
        self.model.description = None
        return bytes(flatbuffer_utils.convert_object_to_bytearray(self.model))

    def _drop_dead(self) -> None:
        while True:
            read = {int(index) for operator in self.operators for index in operator.inputs} | {*self.outputs}
            alive = [one for one in self.operators if any(int(out) in read for out in one.outputs)]
            if len(alive) == len(self.operators):
                return
            self.graph.operators = alive

    def order(self) -> None:
        """Put every operator behind those whose results it reads."""
        made = self.producers()
        placed: set[int] = set()
        order: list[Any] = []
        stack = [*reversed(self.operators)]
        while stack:
            operator = stack[-1]
            if id(operator) in placed:
                stack.pop()
                continue
            waits = [
                made[int(i)] for i in operator.inputs if int(i) in made and id(made[int(i)]) not in placed
            ]
            if waits:
                stack.extend(reversed(waits))
                continue
            placed.add(id(operator))
            order.append(stack.pop())
        self.graph.operators = order

    def _tell_apart(self) -> None:
        """Number tensors of the same name, which other tools take for the same tensor."""
        seen: Counter[str] = Counter()
        for tensor in range(len(self.graph.tensors)):
            name = self.name(tensor)
            seen[name] += 1
            if seen[name] > 1:
                self.rename(tensor, f"{name}~{seen[name]}")

    def _compact(self) -> None:
        """Renumber tensors so that none is idle."""
        graph = self.graph
        used = dict.fromkeys(self.inputs)
        for operator in self.operators:
            used |= dict.fromkeys(int(i) for i in (*operator.inputs, *operator.outputs) if i >= 0)
        used |= dict.fromkeys(self.outputs)
        grouped = {tensor: scales for tensor in used if (scales := self.scales_of(tensor)) != ABSENT}
        used |= dict.fromkeys(grouped.values())
        numbers = {old: new for new, old in enumerate(used)} | {ABSENT: ABSENT}
        for tensor, scales in grouped.items():
            graph.tensors[tensor].quantization.details.scales = numbers[scales]
        graph.tensors = [graph.tensors[old] for old in used]
        graph.inputs = [numbers[index] for index in self.inputs]
        graph.outputs = [numbers[index] for index in self.outputs]
        for operator in self.operators:
            operator.inputs = [numbers[int(index)] for index in operator.inputs]
            operator.outputs = [numbers[int(index)] for index in operator.outputs]
        for signature in self.model.signatureDefs or []:
            for entry in (*signature.inputs, *signature.outputs):
                entry.tensorIndex = numbers[entry.tensorIndex]
        self.prune()

    def prune(self) -> None:
        """Drop buffers and kinds of operators that are idle; all subgraphs share them."""
        tensors = [tensor for one in self.model.subgraphs for tensor in one.tensors]
        buffers = {old: new for new, old in enumerate(dict.fromkeys([0, *(t.buffer for t in tensors)]))}
        self.model.buffers = [self.model.buffers[old] for old in buffers]
        for tensor in tensors:
            tensor.buffer = buffers[tensor.buffer]
        operators = [operator for one in self.model.subgraphs for operator in one.operators]
        codes = {old: new for new, old in enumerate(sorted({one.opcodeIndex for one in operators}))}
        self.model.operatorCodes = [self.model.operatorCodes[old] for old in codes]
        for operator in operators:
            operator.opcodeIndex = codes[operator.opcodeIndex]


def _schema() -> Any:
    from ai_edge_litert import schema_py_generated

    return schema_py_generated


@cache
def _names(enumeration: str) -> dict[int, str]:
    values = vars(getattr(_schema(), enumeration))
    return {value: name for name, value in values.items() if isinstance(value, int)}


def _quantization(grid: Grid | None) -> Any:
    if grid is None:
        return None
    made = _schema().QuantizationParametersT()
    made.scale = np.asarray(grid.scale, np.float32)
    made.zeroPoint = np.asarray(grid.zero_point, np.int64)
    made.quantizedDimension = grid.axis
    return made
