"""What onnxruntime-web computes inside a file, and which kernels it runs, by its own profiler.

Part of ``onnxruntime_web.py``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from featherweight.errors import TargetError
from featherweight.runtime import Json, Kernel
from featherweight.runtimes._web import Host

_WARM_UP, _CALLS = 10, 20  # the first calls run code that V8 has not optimized yet
_SUFFIX = "_kernel_time"
_DTYPES = {"float": "float32", "double": "float64", "uint8": "int8"}
_UNFUSED = {
    "QuantizeLinear": "rounds to integers between two kernels, in a pass of its own",
    "DequantizeLinear": "turns integers into float between two kernels, in a pass of its own",
    "Relu": "a clamp that no kernel before it takes over",
    "Clip": "a clamp that no kernel before it takes over",
}


def values(
    host: Host,
    file: Path,
    names: Mapping[str, str],
    options: Mapping[str, Json],
    inputs: Sequence[np.ndarray],
) -> dict[str, np.ndarray]:
    """Traced value -> what is computed there, from a copy of the file in which they all are outputs."""
    try:
        import onnx
    except ImportError as error:
        raise TargetError(
            "looking into an ONNX file needs the package onnx", fix="pip install onnx"
        ) from error
    model = onnx.load(file)
    outputs = [value.name for value in model.graph.output]
    made = {name for node in model.graph.node for name in node.output}
    asked = {traced: name for traced, name in names.items() if name in made}
    added = [name for name in dict.fromkeys(asked.values()) if name not in outputs]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in added)
    with tempfile.TemporaryDirectory(prefix="featherweight-look-") as folder:
        copy = Path(folder) / "model.onnx"
        onnx.save(model, copy)
        opened, _ = host.ask({"do": "open", "file": str(copy), "options": options})
    seen = dict(zip([*outputs, *added], host.ask({"do": "run", **opened}, inputs)[1], strict=True))
    return {traced: seen[name] for traced, name in asked.items()}


def kernels(
    host: Host, file: Path, options: Mapping[str, Json], inputs: Sequence[np.ndarray]
) -> list[Kernel]:
    """Every step of a call, in order, with the median of its times.

    Quantizing an input of the model and dequantizing an output are no loss: the session's caller has floats.
    """
    asked = {"do": "profile", "file": str(file.resolve()), "options": options, "calls": _WARM_UP + _CALLS}
    steps: dict[str, list[dict[str, Any]]] = {}
    for event in host.ask(asked, inputs)[0]["events"]:
        if event["cat"] == "Node" and event["name"].endswith(_SUFFIX):
            steps.setdefault(event["name"].removesuffix(_SUFFIX), []).append(event)
    order = list(steps)
    return [
        _kernel(name, events, at in (0, len(order) - 1)) for at, (name, events) in enumerate(steps.items())
    ]


def _kernel(name: str, events: list[dict[str, Any]], end: bool) -> Kernel:
    op = events[0]["args"]["op_name"]
    dtype = next((next(iter(one)) for one in events[0]["args"]["input_type_shape"]), "")
    note = "" if end else _UNFUSED.get(op, "")
    seconds = median(event["dur"] for event in events[_WARM_UP:]) * 1e-6
    return Kernel(name, op, _DTYPES.get(dtype, dtype), not note, seconds, note)
