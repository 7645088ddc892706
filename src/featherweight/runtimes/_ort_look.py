"""What ONNX Runtime computes inside a file, and which kernels it runs for a call.

Part of ``onnxruntime.py``. Both edit a copy of the file, so they need the package onnx beside the runtime.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import TargetError
from featherweight.runtime import Kernel, Profile

if TYPE_CHECKING:
    import onnx

_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_INTEGER = (
    "QLinear",
    "QGemm",
    "QAttention",
    "MatMulInteger",
    "ConvInteger",
    "DynamicQuantize",
    "MatMulNBits",
)
_WORK = frozenset({"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose"})


def _load(path: Path) -> onnx.ModelProto:
    try:
        import onnx
    except ImportError as error:
        raise TargetError(
            "looking into an ONNX file needs the package onnx", fix="pip install onnx"
        ) from error
    return onnx.load(os.fspath(path))


def values(
    path: Path, names: Mapping[str, str], options: Any, inputs: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Traced value -> what is computed there, for one call.

    Args:
        path: The file.
        names: Traced value -> its name in the file.
        options: Of the session.
        inputs: Arrays of the call.
    """
    import onnx
    import onnxruntime as ort

    model = _load(path)
    made = {name for node in model.graph.node for name in node.output}
    outputs = {value.name for value in model.graph.output}
    asked = {traced: name for traced, name in names.items() if name in made | outputs}
    for name in dict.fromkeys(asked.values()):
        if name not in outputs:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    with tempfile.TemporaryDirectory(prefix="featherweight-look-") as folder:
        copy = Path(folder) / "model.onnx"
        onnx.save(model, os.fspath(copy), save_as_external_data=model.ByteSize() > 2**30)
        session = ort.InferenceSession(os.fspath(copy), options, providers=["CPUExecutionProvider"])
        feed = dict(zip([value.name for value in session.get_inputs()], inputs, strict=True))
        wanted = list(dict.fromkeys(asked.values()))
        seen = dict(zip(wanted, session.run(wanted, feed), strict=True))
    return {traced: seen[name] for traced, name in asked.items()}


def kernels(path: Path, profile: Callable[[Path, Path], Profile]) -> list[Kernel]:
    """Nodes of the graph that really ran, with their times.

    Args:
        path: The file.
        profile: Profiles a file and leaves ``optimized.onnx`` in a folder.
    """
    import onnx

    model = _load(path)
    for index, node in enumerate(model.graph.node):
        node.name = node.output[0] or f"{node.op_type}{index}"
    with tempfile.TemporaryDirectory(prefix="featherweight-look-") as folder:
        named = Path(folder) / "named.onnx"
        onnx.save(model, os.fspath(named), save_as_external_data=model.ByteSize() > 2**30)
        seen = profile(named, Path(folder))
        ran = onnx.load(os.fspath(Path(folder) / "optimized.onnx"), load_external_data=False)
    quantized = any(node.op_type in _CONVERSIONS for node in model.graph.node)
    return [_kernel(node, seen.kernels.get(node.name), quantized) for node in ran.graph.node]


def _kernel(node: onnx.NodeProto, seconds: float | None, quantized: bool) -> Kernel:
    dtype, note, fast = "float32", "", True
    if node.op_type.startswith(_INTEGER):
        dtype = "int8"
    elif node.op_type in _CONVERSIONS:
        dtype, fast, note = "", False, "no kernel took this conversion in"
    elif quantized and node.op_type in _WORK:
        fast, note = False, "computes in float beside integers"
    return Kernel(node.name, node.op_type, dtype, fast, seconds, note)
