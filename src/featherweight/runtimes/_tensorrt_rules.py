"""Holds an ONNX file against the rules of TensorRT's explicit quantization.

Part of ``tensorrt.py``, which names where the rules are from. Some of them TensorRT's parser enforces
(``ENFORCED``): without them there is no engine. The others decide what is fused: without them it is slow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_ABSORBED = frozenset({"Relu", "Clip", "BatchNormalization"})
_MOVES = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice"}
)
_UNREAD = frozenset(  # what its parser's list of operators (TensorRT 10.15) says no to
    {"AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Col2Im"}
    | {
        "CenterCropPad",
        "Compress",
        "ConcatFromSequence",
        "ConvInteger",
        "DFT",
        "Det",
        "DynamicQuantizeLinear",
    }
    | {"MatMulInteger", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "Multinomial", "Optional", "SequenceAt"}
    | {"QLinearConv", "QLinearMatMul", "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceMap"}
)
_FIRST_OPSET, _LAST_OPSET, _BLOCKS_OPSET = 13, 24, 21  # scales per axis, TensorRT 10.15, scales per block


def check_rules(path: Path) -> list[str]:
    """Which rules a file breaks and where, each as ``rule: what``."""
    file = _File(path)
    return [f"{rule}: {what}" for rule, check in RULES.items() for what in check(file)]


class _File:
    """A graph with lookups by name."""

    def __init__(self, path: Path) -> None:
        import onnx
        from onnx import numpy_helper

        self.path = path
        model = onnx.load(path)
        self.opsets = {item.domain: item.version for item in model.opset_import}
        self.nodes = list(model.graph.node)
        self.outputs = {value.name for value in model.graph.output}
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)

    def of(self, *kinds: str) -> Iterator[Any]:
        return (node for node in self.nodes if node.op_type in kinds)

    def pairs(self) -> Iterator[Any]:
        """Q and DQ nodes."""
        return self.of("QuantizeLinear", "DequantizeLinear")

    def weight(self, node: Any) -> Any:
        """The DQ node that restores a layer's stored weight, or None."""
        restored = self.maker.get(node.input[1])
        if restored is None or restored.op_type != "DequantizeLinear":
            return None
        return restored if restored.input[0] in self.constants else None

    def rounded(self, name: str) -> Any:
        """The DQ node behind a rounded value, which was at most moved since, or None."""
        node = self.maker.get(name)
        while node is not None and node.op_type in _MOVES:
            node = self.maker.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return None
        return node if node.input[0] not in self.constants else None

    def layer(self, name: str) -> bool:
        """Whether an integer layer makes a value."""
        node = self.maker.get(name)
        return node is not None and node.op_type in _LAYERS and self.weight(node) is not None


def attribute(node: Any, name: str, default: int) -> int:
    return next((int(item.i) for item in node.attribute if item.name == name), default)


def _valid(file: _File) -> Iterator[str]:
    import onnx

    try:
        onnx.checker.check_model(file.path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        yield str(error).splitlines()[0]


def _operators(file: _File) -> Iterator[str]:
    for node in file.nodes:
        if node.domain not in ("", "ai.onnx") or node.op_type in _UNREAD:
            yield f"'{node.output[0]}' is made by {node.op_type}, which TensorRT does not read"


def _opset(file: _File) -> Iterator[str]:
    version = file.opsets.get("", file.opsets.get("ai.onnx", 0))
    blocks = any(attribute(node, "block_size", 0) for node in file.pairs())
    short = any(array.dtype.name in ("int4", "uint4") for array in file.constants.values())
    least = _BLOCKS_OPSET if blocks or short else _FIRST_OPSET
    if not least <= version <= _LAST_OPSET:
        yield f"{version} is not from {least} to {_LAST_OPSET}"


def _signed(file: _File) -> Iterator[str]:
    for node in file.pairs():
        held = file.constants.get(node.input[0])
        point = file.constants.get(node.input[2]) if len(node.input) > 2 else None
        kinds = {array.dtype.name for array in (held, point) if array is not None}
        if node.op_type == "DequantizeLinear" and held is not None:
            allowed = {"int8", "int4"}
        else:
            allowed = {"int8"}
            kinds = {point.dtype.name} if point is not None else {"uint8"}  # what ONNX assumes
        if not kinds <= allowed:
            yield f"'{node.output[0]}' is of {', '.join(sorted(kinds - allowed))}, not int8"


def _zero_point(file: _File) -> Iterator[str]:
    for node in file.pairs():
        point = file.constants.get(node.input[2]) if len(node.input) > 2 else np.zeros(1)
        if point is None or np.any(point.astype(np.int32)):
            yield f"'{node.output[0]}' has one that is not 0"


def _scale(file: _File) -> Iterator[str]:
    for node in file.pairs():
        scale = file.constants.get(node.input[1])
        if scale is None:
            yield f"that of '{node.output[0]}' is no constant"
        elif not (np.isfinite(scale).all() and (scale > 0).all()):
            yield f"that of '{node.output[0]}' is not above zero"


def _pairs(file: _File) -> Iterator[str]:
    for node in file.of("QuantizeLinear"):
        scale = file.constants.get(node.input[1], np.zeros(0))
        for reader in file.readers[node.output[0]]:
            if reader.op_type != "DequantizeLinear":
                yield f"{reader.op_type} reads the integers of '{node.input[0]}'"
            elif not np.array_equal(file.constants.get(reader.input[1], np.ones(0)), scale):
                yield f"'{node.input[0]}' is rounded at one scale and restored at another"


def _per_tensor(file: _File) -> Iterator[str]:
    for node in file.of("QuantizeLinear"):
        if file.constants.get(node.input[1], np.zeros(1)).size != 1:
            yield f"'{node.input[0]}' is an activation with several scales"


def _channel_axis(file: _File, node: Any) -> int:
    """The axis of the outputs in a layer's weight."""
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    if node.op_type == "MatMul":
        return int(file.constants[file.weight(node).input[0]].ndim) - 1
    return 1 if node.op_type == "ConvTranspose" else 0


def _per_channel(file: _File) -> Iterator[str]:
    for node in file.of(*_LAYERS):
        restored = file.weight(node)
        if restored is None or attribute(restored, "block_size", 0):
            continue
        held = file.constants[restored.input[0]]
        scale = file.constants.get(restored.input[1], np.zeros(1))
        wanted = _channel_axis(file, node)
        if scale.size > 1 and attribute(restored, "axis", 1) % held.ndim != wanted:
            yield f"'{restored.input[0]}' has scales along another axis than its outputs ({wanted})"


def _blocks(file: _File) -> Iterator[str]:
    for node in file.of(*_LAYERS):
        restored = file.weight(node)
        if restored is None:
            continue
        name, held = restored.input[0], file.constants[restored.input[0]]
        size = attribute(restored, "block_size", 0)
        axis = attribute(restored, "axis", 1) % held.ndim
        if held.dtype.name == "int4" and held.size % 2:
            yield f"'{name}' has an odd number of 4-bit integers"
        if size and node.op_type not in ("Gemm", "MatMul"):
            yield f"'{name}' is of a {node.op_type}; only matrix products read blocks"
        elif size and (axis == _channel_axis(file, node) or held.shape[axis] % size):
            yield f"'{name}' is not cut into whole blocks along its inputs"


def _inputs(file: _File) -> Iterator[str]:
    for node in file.of(*_LAYERS):
        restored = file.weight(node)
        if restored is None or file.constants[restored.input[0]].dtype.name == "int4":
            continue
        if file.rounded(node.input[0]) is None:
            yield f"'{restored.input[0]}' is integers, but '{node.input[0]}' is not rounded"
    for node in file.of("MatMul"):
        if not any(name in file.constants or file.weight(node) for name in node.input):
            rounded = [file.rounded(name) is not None for name in node.input]
            if any(rounded) and not all(rounded):
                yield f"'{node.output[0]}' is a product of integers and floats: it runs in float"


def _bias(file: _File) -> Iterator[str]:
    for node in file.of("Conv", "ConvTranspose", "Gemm"):
        name = node.input[2] if len(node.input) > 2 else ""
        if name and (name not in file.constants or file.constants[name].dtype.kind != "f"):
            yield f"'{name}' is no float constant"


def _clamps(file: _File) -> Iterator[str]:
    for node in file.of("QuantizeLinear"):
        ends = [reader for dq in file.readers[node.output[0]] for reader in file.readers[dq.output[0]]]
        if file.layer(node.input[0]) and ends and all(end.op_type in _ABSORBED for end in ends):
            yield f"'{node.input[0]}' is rounded in front of its own {ends[0].op_type}"


def _sums(file: _File) -> Iterator[str]:
    for node in file.of("Add"):
        if any(name in file.constants for name in node.input):
            continue
        rounded = [file.rounded(name) for name in node.input]
        if all(restored is not None for restored in rounded):
            apart = [
                name
                for name, restored in zip(node.input, rounded, strict=True)
                if _apart(file, name, restored)
            ]
            if apart:
                yield f"a Q/DQ pair at '{apart[0]}' keeps a layer apart from its sum"
        elif any(map(file.layer, node.input)) and not any(rounded) and _ends_rounded(file, node):
            yield f"no input of the sum '{node.output[0]}' is rounded: its layer cannot return integers"


def _apart(file: _File, name: str, restored: Any) -> bool:
    """Whether a value is an integer layer's own result, rounded for one sum alone."""
    if file.maker[name] is not restored or len(file.readers[name]) != 1:
        return False
    source = file.maker[restored.input[0]].input[0]
    return file.layer(source) and len(file.readers[source]) == 1


def _ends_rounded(file: _File, node: Any) -> bool:
    """Whether a result, or what clamps it, is rounded for every reader."""
    readers = file.readers[node.output[0]]
    while len(readers) == 1 and readers[0].op_type in _ABSORBED:
        readers = file.readers[readers[0].output[0]]
    return bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)


RULES: Mapping[str, Callable[[_File], Iterator[str]]] = {
    "valid": _valid,
    "operators": _operators,
    "opset": _opset,
    "signed": _signed,
    "zero point": _zero_point,
    "scale": _scale,
    "pairs": _pairs,
    "per tensor": _per_tensor,
    "per channel": _per_channel,
    "blocks": _blocks,
    "bias": _bias,
    "inputs": _inputs,
    "clamps": _clamps,
    "sums": _sums,
}
ENFORCED = frozenset(RULES) - {"inputs", "clamps", "sums"}
