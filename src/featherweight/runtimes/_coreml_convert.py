"""Exported program -> ML Program, in the converter's child; and what an ``.mlpackage`` holds, read back.

Part of ``coreml.py``. Integers stay those of the program: they go behind ``constexpr_*`` operators, which
Core ML resolves when it loads. What would differ from one conversion to the next (dates, random identifiers)
is taken out.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import uuid
import warnings
from pathlib import Path
from typing import Any

import numpy as np

_DATA = "Data/com.apple.CoreML"
_MODEL, _WEIGHTS = f"{_DATA}/model.mlmodel", f"{_DATA}/weights/weight.bin"
_SPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # of names that are URLs, RFC 4122
_SENTINEL = 0xDEADBEEF
_INT4 = (-8, 7)
_TABLES = (2, 4, 16, 64, 256)  # sizes that iOS 17 knows
_HELD = ("quantized_data", "data", "indices")  # what operators that make constants read
_NUMBERED = re.compile(r"const_\d+")
_POOLING = re.compile(r"aten\.(max|avg)_pool[123]d\.")


def convert(
    program: str,
    out: str,
    *,
    target: str,
    half: list[str] | None,
    shared: list[str],
    inputs: list[str],
    outputs: list[str],
) -> list[str]:
    """Write one entry.

    Args:
        program: A file that ``torch.export.save`` wrote, with torch's quantize and dequantize operators.
        out: The ``.mlpackage``.
        target: Member of ``coremltools.target``: which systems can load it.
        half: Buffers of the program whose layers are stored and computed in half precision; None: all is.
        shared: Buffers of the program that hold few values: they become a table and codes.
        inputs: Names of the inputs, in order.
        outputs: Names of the outputs, in order.

    Returns:
        The files of the package, relative to it.
    """
    import coremltools as ct
    import torch
    import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed

    _teach()
    loaded = torch.export.load(program)
    loaded.graph.eliminate_dead_code()  # loading makes an item of each output, read or not
    for node in loaded.graph.nodes:
        if _POOLING.match(str(node.target)) and len(node.args) == 2:
            node.args = (*node.args, node.args[1])  # it wants the stride in words
    names = {f"b_{name}" for name in half or ()}

    def in_half(op: Any) -> bool:
        reads = [
            one for value in op.inputs.values() for one in (value if isinstance(value, tuple) else [value])
        ]
        return any(getattr(one, "name", None) in names for one in reads)

    precision: Any = ct.precision.FLOAT16 if half is None else ct.precision.FLOAT32
    if half:
        precision = ct.transform.FP16ComputePrecision(op_selector=in_half)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions that it was not tested with
        model = ct.convert(
            loaded,
            outputs=_outputs(loaded, outputs),
            convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, target),
            compute_precision=precision,
            compute_units=ct.ComputeUnit.ALL,
            skip_model_load=True,
        )
        if shared:
            model = _with_tables(model, {f"b_{name}" for name in shared})
    spec = model.get_spec()
    for value, name in zip(list(spec.description.input), inputs, strict=True):
        ct.utils.rename_feature(spec, value.name, name, rename_outputs=False)
    spec.description.metadata.ClearField("userDefined")
    spec.mlProgram.attributes.pop("buildInfo", None)
    shutil.rmtree(out, ignore_errors=True)
    ct.utils.save_spec(spec, out, weights_dir=model.weights_dir)
    return _settle(Path(out))


def _with_tables(model: Any, names: set[str]) -> Any:
    """The model with ``constexpr_lut_to_dense`` for these constants, which have exactly their values."""
    from coremltools.optimize import coreml

    kinds = coreml.OpPalettizerConfig(mode="custom", lut_function=_table, weight_threshold=0)
    operations = model._mil_program.functions["main"].operations
    known = {op.name for op in operations if op.op_type == "const"}
    found = [name for name in sorted(known) if name.removesuffix("_to_fp16") in names]
    settings = coreml.OptimizationConfig(op_name_configs=dict.fromkeys(found, kinds))
    return coreml.palettize_weights(model, settings)


def _table(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values that there are, as many as a code of 1, 2, 4, 6 or 8 bits can tell, and the codes."""
    table, codes = np.unique(values, return_inverse=True)
    size = next(size for size in _TABLES if len(table) <= size)
    return np.pad(table, (0, size - len(table)), mode="edge"), codes.reshape(-1).astype(np.uint8)


def _outputs(program: Any, names: list[str]) -> list[Any]:
    """Floats leave as float32, in whatever they were computed."""
    import coremltools as ct

    made = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    floats = [made[name].is_floating_point() for name in program.graph_signature.user_outputs]
    return [
        ct.TensorType(name=name, dtype=np.float32) if real else ct.TensorType(name=name)
        for name, real in zip(names, floats, strict=True)
    ]


def _settle(package: Path) -> list[str]:
    """Give the parts of a package identifiers that follow from their paths; drop what is not loaded."""
    spec = _spec(package)
    _number(spec)
    (package / _MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    manifest = json.loads((package / "Manifest.json").read_text())
    fixed = {old: str(uuid.uuid5(_SPACE, item["path"])) for old, item in manifest["itemInfoEntries"].items()}
    items = {fixed[old]: item for old, item in manifest["itemInfoEntries"].items()}
    manifest["itemInfoEntries"] = dict(sorted(items.items()))
    manifest["rootModelIdentifier"] = fixed[manifest["rootModelIdentifier"]]
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4))
    loaded = {"Manifest.json", _MODEL, _WEIGHTS}
    files = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    for name in files - loaded:
        (package / name).unlink()
    return sorted(files & loaded)


def _number(spec: Any) -> None:
    """Count the constants without a name of their own in the order in which they come."""
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    if any(op.blocks for op in block.operations):
        return  # they may be read from inside loops
    names: dict[str, str] = {}
    for op in block.operations:
        for output in op.outputs:
            if _NUMBERED.fullmatch(output.name):
                output.name = names.setdefault(output.name, f"const_{len(names)}")
                op.attributes["name"].immediateValue.tensor.strings.values[0] = output.name
        for argument in op.inputs.values():
            for one in argument.arguments:
                if one.WhichOneof("binding") == "name":
                    one.name = names.get(one.name, one.name)


# ---- what coremltools does not translate itself


def _teach() -> None:
    """Operators of ours in its table, over its own where it has them."""
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY as TABLE

    own = TABLE.get_func("quantized_decomposed.dequantize_per_channel")

    def dequantize(context: Any, node: Any) -> None:
        """Integers of 4 bits stay so; eight are its own business."""
        values = ops._get_inputs(context, node)
        low, high = (value.val for value in values[-3:-1])
        if values[0].val is None or (low, high) != _INT4:
            own(context, node)
            return
        axis = values[3].val if len(values) == 7 else None
        _constant(context, node, values[0].val, values[1].val, values[2].val, axis)

    def by_groups(context: Any, node: Any) -> None:
        values = ops._get_inputs(context, node)
        _constant(context, node, values[0].val, values[1].val, values[2].val, None)

    def recurrent(translate: Any, count: int) -> Any:
        """Recurrent layers as programs have them: one value with several items."""

        def translated(context: Any, node: Any) -> None:
            node.outputs = [f"{node.name}_{index}" for index in range(count)]
            translate(context, node)
            context.add(tuple(context[name] for name in node.outputs), torch_name=node.name)

        return translated

    for space in ("quantized_decomposed.", "quantized_decomposed::"):  # it asks by either name
        TABLE.set_func_by_name(dequantize, f"{space}dequantize_per_tensor")
        TABLE.set_func_by_name(dequantize, f"{space}dequantize_per_channel")
        TABLE.set_func_by_name(by_groups, f"{space}dequantize_per_channel_group")
    TABLE.set_func_by_name(recurrent(ops.lstm, 3), "lstm.input")
    TABLE.set_func_by_name(recurrent(ops.gru, 2), "gru.input")


def _constant(
    context: Any, node: Any, integers: np.ndarray, scale: Any, zero_point: Any, axis: int | None
) -> None:
    """Integers of 4 bits with a scale for each of their blocks."""
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 - as its authors call it
    from coremltools.converters.mil.mil import types

    kind = types.nptype_from_builtin(types.int4)
    scale, zero_point = np.asarray(scale, np.float32), np.asarray(zero_point)
    shape = [1] * integers.ndim
    if axis is not None:
        shape[axis] = integers.shape[axis]
    elif scale.ndim == integers.ndim:
        shape = list(scale.shape)
    offset = zero_point.reshape(shape).astype(kind) if zero_point.any() else None
    output = mb.constexpr_blockwise_shift_scale(
        data=integers.astype(kind), scale=scale.reshape(shape), offset=offset, name=node.name
    )
    context.add(output, node.name)


# ---- reading back


def stored(package: str) -> dict[str, dict[str, Any]]:
    """Every constant: name -> dtype, bytes, shape; for integers also the operator that reads them.

    What a layer has as its weight or bias is there by the layer's name too: ``conv2d_3.weight``.
    """
    found: dict[str, dict[str, Any]] = {}
    for op in _operations(Path(package)):
        name = op.outputs[0].name.removesuffix("_palettized")
        if op.type == "const":
            found[name] = _described(op.attributes["val"], Path(package))
        elif op.type.startswith("constexpr"):
            arguments = _arguments(op)
            value = next(arguments[key] for key in _HELD if key in arguments)
            found[name] = {**_described(value, Path(package)), "by": op.type}
        for part in ("weight", "bias"):
            read = op.inputs[part].arguments[0].name if part in op.inputs else ""
            if read in found:
                found[f"{name.removesuffix('_cast_fp16')}.{part}"] = found[read]
    return found


def operators(package: str) -> list[dict[str, Any]]:
    """Every operator that computes something, in order: its kind, name and the dtypes and shapes it makes."""
    return [
        {
            "op": op.type,
            "name": op.outputs[0].name,
            "dtype": _dtype(op.outputs[0].type.tensorType.dataType),
            "shape": _shape(op.outputs[0].type.tensorType),
        }
        for op in _operations(Path(package))
        if op.type != "const"
    ]


def features(package: str) -> dict[str, list[list[Any]]]:
    """Inputs and outputs: name, dtype and shape of each."""
    from coremltools.proto import FeatureTypes_pb2

    description = _spec(Path(package)).description
    names = FeatureTypes_pb2.ArrayFeatureType.ArrayDataType
    return {
        end: [
            [
                one.name,
                names.Name(one.type.multiArrayType.dataType).lower(),
                list(one.type.multiArrayType.shape),
            ]
            for one in values
        ]
        for end, values in (("inputs", description.input), ("outputs", description.output))
    }


def constant(package: str, name: str, part: str, out: str) -> None:
    """Save one constant, or an argument of a ``constexpr_*`` operator, as ``.npy``."""
    for op in _operations(Path(package)):
        if op.outputs[0].name == name:
            np.save(out, _array(_arguments(op)[part], Path(package)))
            return
    raise KeyError(f"no constant is called '{name}'")


def _arguments(op: Any) -> dict[str, Any]:
    """Constant arguments by name; older operators have them as attributes."""
    bound = {name: argument.arguments[0].value for name, argument in op.inputs.items()}
    return {**bound, **dict(op.attributes.items())}


def _spec(package: Path) -> Any:
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString((package / _MODEL).read_bytes())
    return spec


def _operations(package: Path) -> list[Any]:
    (block,) = _spec(package).mlProgram.functions["main"].block_specializations.values()
    return list(block.operations)


def _dtype(number: int) -> str:
    from coremltools.proto import MIL_pb2

    return str(MIL_pb2.DataType.Name(number)).lower()


def _shape(tensor: Any) -> list[int]:
    return [int(dimension.constant.size) for dimension in tensor.dimensions]


def _described(value: Any, package: Path) -> dict[str, Any]:
    kind = value.type.tensorType
    dtype, shape = _dtype(kind.dataType), _shape(kind)
    if value.WhichOneof("value") == "blobFileValue":
        size = _blob(value, package)[1]
    else:
        size = math.ceil(math.prod(shape) * _bits(dtype) / 8)
    return {"dtype": dtype, "bytes": size, "shape": shape}


def _bits(dtype: str) -> int:
    digits = "".join(letter for letter in dtype if letter.isdigit())
    return int(digits) if digits else 8


def _blob(value: Any, package: Path) -> tuple[int, int]:
    """Where a constant lies in the file of weights, and how many bytes it takes there."""
    offset = value.blobFileValue.offset
    with (package / _WEIGHTS).open("rb") as file:
        file.seek(offset)
        sentinel, _, size, begin = struct.unpack("<IIQQ", file.read(24))
    if sentinel != _SENTINEL:
        raise ValueError(f"{package}: no record at {offset} of its weights")
    return begin, size


def _array(value: Any, package: Path) -> np.ndarray:
    kind = value.type.tensorType
    dtype, shape = _dtype(kind.dataType), _shape(kind)
    if value.WhichOneof("value") != "blobFileValue":
        return _immediate(value.immediateValue.tensor, dtype).reshape(shape)
    begin, size = _blob(value, package)
    with (package / _WEIGHTS).open("rb") as file:
        file.seek(begin)
        data = np.frombuffer(file.read(size), np.uint8)
    if dtype in ("int4", "uint4"):
        flat = np.stack([data & 15, data >> 4], 1).reshape(-1)[: math.prod(shape)].astype(np.int8)
        return np.where(flat > 7, flat - 16, flat).reshape(shape) if dtype == "int4" else flat.reshape(shape)
    return data.view(dtype).reshape(shape)


def _immediate(tensor: Any, dtype: str) -> np.ndarray:
    kind = tensor.WhichOneof("value")
    values = getattr(tensor, kind).values
    if kind == "bytes":
        return np.frombuffer(values, dtype)
    return np.asarray(list(values), dtype)
