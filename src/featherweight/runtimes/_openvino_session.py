"""Runs IR files on OpenVINO's CPU plugin; imports numpy and OpenVINO alone.

Part of ``openvino.py``. A file takes any batch, but what is compiled for one shape runs faster (by some 15 %
on small networks), so a session compiles anew, which takes tenths of a second, for each of the first shapes
that it is given.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featherweight.errors import TargetError, nearest
from featherweight.runtime import Artifact, Kernel, Target

_SHAPES = 4  # that get kernels of their own
_ROUNDED = 128  # all-MiniLM-L6-v2: 0.46 of float's time and cosine 0.9987; 32: 0.52 and 0.9993
_WARM_UP, _CALLS = 3, 20
_DTYPES = {
    "I8": "int8",
    "i8": "int8",
    "u8": "int8",
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i32": "int32",
    "i64": "int64",
}
_STILL = frozenset({"Const", "Input", "Output"})
_WEIGHTED = frozenset({"Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul"})


def silent() -> None:
    """OpenVINO's package reports to its vendor while it is imported; without this module it does not."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def settings(artifact: Artifact, target: Target) -> dict[str, Any]:
    """What a model is compiled with: float32 stays float32, one stream, and the target's options.

    Products whose inputs are rounded at each call have one range for each ``_ROUNDED`` inputs of a token.
    """
    return {
        "INFERENCE_NUM_THREADS": target.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": _ROUNDED if artifact.details.get("dynamic") else 0,
        **target.options,
    }


class Session:
    """Opened files; options in ``target.options`` are properties of OpenVINO's CPU plugin by name."""

    def __init__(self, artifact: Artifact, target: Target) -> None:
        silent()
        import openvino as ov

        self._core, self._tensor = ov.Core(), ov.Tensor
        self._settings = settings(artifact, target)
        _check(self._core, target)
        self._folder = artifact.folder
        self._files = dict(artifact.entries)
        self._models: dict[str, Any] = {}
        self._requests: dict[tuple[object, ...], Any] = {}
        for entry in self._files:
            self._model(entry)

    def __call__(self, *inputs: np.ndarray, entry: str = "forward") -> tuple[np.ndarray, ...]:
        model = self._model(entry)
        if len(inputs) != len(model.inputs):
            raise ValueError(f"'{entry}' takes {len(model.inputs)} inputs, not {len(inputs)}")
        arrays = [np.require(array, requirements=["C", "W"]) for array in inputs]
        request = self.request(entry, arrays)
        for index, array in enumerate(arrays):
            request.set_input_tensor(index, self._tensor(array, shared_memory=True))
        request.infer()
        return tuple(tensor.data.copy() for tensor in request.output_tensors)

    def _model(self, entry: str) -> Any:
        if entry not in self._models:
            path = self._folder / self._files[entry]
            self._models[entry] = self._core.read_model(os.fspath(path))
        return self._models[entry]

    def request(self, entry: str, arrays: Sequence[np.ndarray]) -> Any:
        """A compiled model for these shapes, or for all where there were many."""
        key: tuple[object, ...] = (entry, *(array.shape for array in arrays))
        if key in self._requests:
            return self._requests[key]
        model = self._model(entry)
        if sum(one[0] == entry for one in self._requests) < _SHAPES:
            if any(value.get_partial_shape().is_dynamic for value in model.inputs):
                model = model.clone()
                model.reshape({index: list(array.shape) for index, array in enumerate(arrays)})
        else:
            key = (entry,)
        if key not in self._requests:
            compiled = self._core.compile_model(model, "CPU", self._settings)
            self._requests[key] = compiled.create_infer_request()
        return self._requests[key]


def _check(core: Any, target: Target) -> None:
    """Refuse options that the CPU plugin does not have, or whose values it does not take."""
    known = {
        name for name, access in core.get_property("CPU", "SUPPORTED_PROPERTIES").items() if access == "RW"
    }
    for name, value in target.options.items():
        if name not in known:
            raise TargetError(f"openvino's CPU plugin has no property '{name}'", fix=nearest(name, known))
        try:
            core.set_property("CPU", {name: value})
        except (RuntimeError, TypeError) as error:
            raise TargetError(
                f"openvino's property '{name}' cannot be {value!r}",
                fix=f"give it a value like {core.get_property('CPU', name)!r}",
            ) from error


def inner_values(
    artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], names: Mapping[str, str], *, entry: str
) -> dict[str, np.ndarray]:
    """Traced value -> what its tensor holds in one call; ``names`` maps traced values to tensors."""
    silent()
    import openvino as ov

    core = ov.Core()
    model = core.read_model(os.fspath(artifact.folder / artifact.entries[entry]))
    present = {name for node in model.get_ops() for output in node.outputs() for name in output.names}
    tensors = {value: tensor for value, tensor in names.items() if tensor in present}
    given = {name for output in model.outputs for name in output.names}
    model.add_outputs([tensor for tensor in dict.fromkeys(tensors.values()) if tensor not in given])
    request = core.compile_model(model, "CPU", settings(artifact, target)).create_infer_request()
    request.infer(dict(enumerate(inputs)))
    return {value: request.get_tensor(tensor).data.copy() for value, tensor in tensors.items()}


@dataclass(frozen=True)
class _Step:
    """A node that the plugin executes, with its time in each call."""

    op: str
    primitive: str
    seconds: list[float]


def executed(artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, entry: str) -> list[Kernel]:
    """What the CPU plugin runs for a call, each with the time that its own counters tell.

    They count whole microseconds, and call a node that took less one that did not run; which nodes there are
    tells the runtime model.
    """
    timed = {**target.options, "PERF_COUNT": True}
    session = Session(artifact, Target(target.runtime, target.isa, target.threads, options=timed))
    arrays = [np.require(array, requirements=["C", "W"]) for array in inputs]
    session(*arrays, entry=entry)
    request = session.request(entry, arrays)
    steps: dict[str, _Step] = {}
    for node in request.get_compiled_model().get_runtime_model().get_ordered_ops():
        told = node.get_rt_info()
        op, primitive = (told[key].astype(str) for key in ("layerType", "primitiveType"))
        if op not in _STILL and not primitive.startswith("unknown"):
            steps[node.get_friendly_name()] = _Step(op, primitive, [])
    for call in range(_WARM_UP + _CALLS):
        session(*arrays, entry=entry)
        for info in request.get_profiling_info() if call >= _WARM_UP else ():
            step = steps.get(info.node_name)
            if step is None:
                continue
            step.seconds.append(info.real_time.total_seconds())
            primitive = info.exec_type if step.primitive.startswith("undef") else step.primitive
            steps[info.node_name] = _Step(info.node_type, primitive, step.seconds)
    integers = any(_dtype(step) == "int8" for step in steps.values())
    return [_kernel(name, step, integers) for name, step in steps.items()]


def _kernel(name: str, step: _Step, integers: bool) -> Kernel:
    dtype = _dtype(step)
    note = ""
    if step.primitive.startswith("ref"):
        note = "a reference kernel: the plugin has no fast one for it"
    elif integers and dtype == "float32" and _op(step) in _WEIGHTED and "Compressed" not in step.op:
        note = "float among integers: it has no integer kernel, or its weight or input no format"
    seconds = float(np.mean(step.seconds)) if step.seconds else None
    return Kernel(name, step.op, dtype, not note, seconds, note)


def _dtype(step: _Step) -> str:
    """In what a node computes: the end of the primitive's name."""
    return _DTYPES.get(step.primitive.rpartition("_")[2], "")


def _op(step: _Step) -> str:
    return next((op for op in _WEIGHTED if step.op.startswith(op)), step.op)
