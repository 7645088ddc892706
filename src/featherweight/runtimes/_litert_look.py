"""What an opened ``.tflite`` computes inside, and which kernels do it.

Part of ``litert.py``; runs in the measuring process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from featherweight.runtime import Artifact, Kernel, Target
from featherweight.runtimes._litert_session import Entry, interpreter

_DELEGATE = "DELEGATE"


def values(
    artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], entry: str
) -> dict[str, np.ndarray]:
    """Every traced value that the file holds, real, channels first."""
    told = artifact.details["entries"][entry]
    path = artifact.folder / artifact.entries[entry]
    runner = interpreter(path, target, experimental_preserve_all_tensors=True)
    opened = Entry(runner, told)
    tensors = {detail["name"]: detail for detail in runner.get_tensor_details()}
    held = {
        value: tensors[name]
        for value, name in artifact.details["values"].get(entry, {}).items()
        if name in tensors
    }
    last = set(told["channels_last"])
    rows: dict[str, list[np.ndarray]] = {}

    def keep(_: Any) -> None:
        for name, detail in held.items():
            rows.setdefault(name, []).append(_real(runner.get_tensor(detail["index"]), detail))

    opened(tuple(inputs), watch=keep)
    return {
        name: _shaped(np.concatenate(parts), told["shapes"][name], name in last)
        for name, parts in rows.items()
    }


def _real(stored: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    """Integers dequantized, at least one axis."""
    scale, zero_point = detail["quantization"]
    if scale and stored.dtype.kind == "i":
        stored = (stored.astype(np.float32) - zero_point) * np.float32(scale)
    return np.atleast_1d(stored)


def _shaped(stored: np.ndarray, shape: Sequence[int], last: bool) -> np.ndarray:
    """In the shape and layout of the original; ``shape`` is that for one example."""
    size = int(np.prod(shape))
    rows = stored.size // size if size else 1
    full = (rows * shape[0], *shape[1:]) if shape else stored.shape
    if not last:
        return stored.reshape(full)
    moved = (full[0], *full[2:], full[1])
    return np.moveaxis(stored.reshape(moved), -1, 1)


def kernels(artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], entry: str) -> list[Kernel]:
    """One per operator of the file: handed to XNNPACK, or run by LiteRT's own kernels."""
    runner = interpreter(artifact.folder / artifact.entries[entry], target)
    opened = Entry(runner, artifact.details["entries"][entry])
    opened(tuple(x[:1] if i in opened.batched else x for i, x in enumerate(inputs)))
    operators = runner._get_ops_details()
    names = {detail["index"]: detail for detail in runner.get_tensor_details()}
    handed = {int(out) for one in operators if one["op_name"] == _DELEGATE for out in one["outputs"]}
    found = []
    for one in operators:
        outputs = [int(index) for index in one["outputs"]]
        if one["op_name"] == _DELEGATE or not outputs:
            continue
        fast = all(out in handed or not _allocated(runner, out) for out in outputs)
        note = "" if fast else "XNNPACK did not take it: LiteRT's own kernel runs"
        dtype = _computes_in(one, names)
        found.append(Kernel(names[outputs[0]]["name"], one["op_name"], dtype, fast, None, note))
    return found


def _allocated(runner: Any, tensor: int) -> bool:
    """Whether a tensor has memory of its own: inside a delegate it has none."""
    try:
        runner.get_tensor(tensor)
    except ValueError:
        return False
    return True


def _computes_in(operator: dict[str, Any], names: dict[int, dict[str, Any]]) -> str:
    """The type of what it makes; of integer weights beside floats: both."""
    made = str(np.dtype(names[int(operator["outputs"][0])]["dtype"]).name)
    read = [int(index) for index in operator["inputs"] if int(index) in names]
    if made == "float32" and operator["op_name"] == "FULLY_CONNECTED" and len(read) > 1:
        weight = str(np.dtype(names[read[1]]["dtype"]).name)
        return made if weight == made else f"{made} with {weight} weights"
    return made
