"""Compares an import with ONNX Runtime (graph optimization off) and finds the first node that differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from torch import Tensor

from featherweight.errors import LoadError
from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.module import Imported
from featherweight.exchange.onnx_in.read import Source
from featherweight.exchange.opaque import SECONDS, EndlessError, all_nodes, limited
from featherweight.plugins import find_runtime

TOLERANCE = 1e-4  # of the largest value; float32 sums in another order stay far below
ROUNDED = 2e-2  # where a graph rounds to 8 or 16 bits, a value between two steps falls either way
_FLOOR = 1e-2  # of the largest value: an error of 1e-6 is what kernels for sigmoid and softmax differ by
_ROUNDING = ("QuantizeLinear", "DynamicQuantize", "QLinear", "QAttention", "QGemm", "Integer")
_INSPECTED = 1 << 28  # bytes of a file that is run a second time with all its values as outputs


def require_onnxruntime() -> None:
    """Raise the error that tells how to install it, unless it is there.

    Raises:
        MissingRuntime: It cannot be imported.
    """
    find_runtime("onnxruntime").require()


class Reference:
    """The file in ONNX Runtime, graph optimization off.

    Args:
        source: What was read.
        content: The model's bytes, without its external data.
        path: The file on disk, where its external data are found; None: there are none.
    """

    def __init__(self, source: Source, content: bytes, path: str | None) -> None:
        require_onnxruntime()
        self._source = source
        outside = path is not None and _is_external(source.proto)
        self._model = path if path is not None and outside else content
        self._session: Any = None
        self._last: tuple[tuple[Tensor, ...], list[np.ndarray]] | None = None

    def run(self, inputs: Sequence[Tensor]) -> list[np.ndarray]:
        """The outputs.

        Raises:
            LoadError: ONNX Runtime refuses the file or these inputs, or does not end.
        """
        last = self._last
        if last is None or any(a is not b for a, b in zip(last[0], inputs, strict=True)):
            if self._session is None:
                self._session = _opened(self._model, self._source.name)
            last = self._last = tuple(inputs), _run(self._session, self._source, inputs)
        return last[1]

    def refusal(self, inputs: Sequence[Tensor]) -> LoadError | None:
        """Why it does not take these inputs; None when it does."""
        try:
            self.run(inputs)
        except EndlessError:
            raise
        except LoadError as error:
            return error
        return None


def deviation(module: Imported, source: Source, reference: Reference, inputs: Sequence[Tensor]) -> str | None:
    """What differs when both run on the same inputs; None: nothing."""
    expected = reference.run(inputs)
    with torch.no_grad():
        result = module(*inputs)
    found = [host.array_of(item) for item in (result if isinstance(result, tuple) else (result,))]
    limit = tolerance(source)
    for name, ours, theirs in zip(source.outputs, found, expected, strict=True):
        if difference(ours, theirs, steps=limit > TOLERANCE) > limit:
            return f"output '{name}' is off by {_told(ours, theirs)}"
    return None


def check_import(module: Imported, source: Source, reference: Reference, inputs: Sequence[Tensor]) -> None:
    """Run both on the same inputs.

    Raises:
        LoadError: The results differ: names operator and node.
    """
    told = deviation(module, source, reference, inputs)
    if told is None:
        return
    where = _first_difference(module, source, inputs)
    raise LoadError(
        f"the import of '{source.name}' computes something else than ONNX Runtime: {told}",
        where=where or "no single node: the error grows over several",
        fix="report the operator; meanwhile export with another opset, or give path.py:callable",
    )


def tolerance(source: Source) -> float:
    """How far an output may be off, relative to its largest value."""
    nodes = any(kind in node.op_type for node in all_nodes(source.nodes) for kind in _ROUNDING)
    short = any(array.dtype.name in ("float16", "bfloat16") for array in source.constants.values())
    return ROUNDED if nodes or short or any(i.dtype.itemsize == 2 for i in source.inputs) else TOLERANCE


def difference(ours: np.ndarray, theirs: np.ndarray, *, steps: bool = False) -> float:
    """Largest deviation over the largest value; NaN and infinities must be in the same places.

    Args:
        ours: Of the import.
        theirs: Of ONNX Runtime.
        steps: Integers may differ by one.
    """
    if ours.shape != theirs.shape or ours.dtype.kind != theirs.dtype.kind:
        return float("inf")
    if theirs.size == 0:
        return 0.0
    if theirs.dtype.kind != "f":
        if steps and theirs.dtype.kind in "iu":
            return 0.0 if np.abs(ours.astype(np.int64) - theirs.astype(np.int64)).max() <= 1 else float("inf")
        return 0.0 if np.array_equal(ours, theirs) else float("inf")
    finite = np.isfinite(theirs)
    if not np.array_equal(np.where(finite, 0, ours), np.where(finite, 0, theirs), equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    a, b = ours[finite].astype(np.float64), theirs[finite].astype(np.float64)
    return float(np.abs(a - b).max() / max(float(np.abs(b).max()), _FLOOR))


def _told(ours: np.ndarray, theirs: np.ndarray) -> str:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"its form ({ours.dtype} {ours.shape}, not {theirs.dtype} {theirs.shape})"
    return f"{difference(ours, theirs):.2g} of its largest value"


def _opened(model: str | bytes, name: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of every weight
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own kinds, which have no common base
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LoadError(
            f"ONNX Runtime cannot run '{name}': {first[:300]}",
            fix="check it with onnx.checker.check_model, or export it again",
        ) from error


def _run(session: Any, source: Source, inputs: Sequence[Tensor]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.RunOptions()
    feed = {item.name: host.array_of(value) for item, value in zip(source.inputs, inputs, strict=True)}
    found = limited(
        lambda: session.run(None, feed, options),
        options,
        f"'{source.name}'",
        "give inputs of the shape that it takes (--input), or export it again",
        SECONDS + sum(array.nbytes for array in source.constants.values()) / 2e7,
    )
    return [np.asarray(item) for item in found]


def _first_difference(module: Imported, source: Source, inputs: Sequence[Tensor]) -> str | None:
    """Operator and name of the first node whose value differs while all before it agree."""
    if source.proto.ByteSize() + sum(array.nbytes for array in source.constants.values()) > _INSPECTED:
        return None
    model = onnx.ModelProto()
    model.CopyFrom(source.proto)
    del model.graph.initializer[:]
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in source.constants.items()
    )
    values: dict[str, Any] = {item.name: value for item, value in zip(source.inputs, inputs, strict=True)}
    with torch.no_grad():
        for step in module.steps:
            module.run(step, values)
    known = {name for node in source.nodes for name in node.output if name}
    made = [
        name
        for step in module.steps
        for name in step.outputs
        if name in known and isinstance(values[name], Tensor)
    ]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    try:
        session = _opened(model.SerializeToString(), source.name)
        expected = dict(zip(made, _run(session, source, inputs), strict=True))
    except LoadError:
        return None
    limit = tolerance(source)
    for step in module.steps:
        for name in step.outputs:
            if name not in expected:
                continue
            if difference(host.array_of(values[name]), expected[name], steps=limit > TOLERANCE) > limit:
                told = _told(host.array_of(values[name]), expected[name])
                return f"node '{step.name}' (operator {step.op}): {told}"
    return None


def _is_external(model: onnx.ModelProto) -> bool:
    return any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer)
