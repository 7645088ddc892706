"""An opened ``.tflite``: any batch size, the original's types, threads and options of the target.

Part of ``litert.py``; imports numpy and ``ai_edge_litert`` only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.errors import TargetError, nearest
from featherweight.runtime import Artifact, Target

RESOLVERS = ("AUTO", "BUILTIN", "BUILTIN_REF", "BUILTIN_WITHOUT_DEFAULT_DELEGATES")
DYNAMIC = (
    "dynamic"  # of lowering: weights alone in integers run on kernels that round activations as they come
)
_FLAGS = {
    "preserve_all_tensors": "experimental_preserve_all_tensors",
    "disable_delegate_clustering": "experimental_disable_delegate_clustering",
    "latest_features": "experimental_default_delegate_latest_features",
    "disable_node_fusion": "experimental_disable_delegate_node_fusion",
}
_KNOWN = {"threads", "resolver", DYNAMIC, *_FLAGS}


def settings(target: Target) -> dict[str, Any]:
    """The interpreter's arguments for the target's threads and options.

    Raises:
        TargetError: An option that there is not, or a value that it cannot have.
    """
    from ai_edge_litert.interpreter import OpResolverType

    arguments: dict[str, Any] = {"num_threads": target.threads}
    for name, value in target.options.items():
        if name == "threads" and isinstance(value, int) and value >= 1:
            arguments["num_threads"] = min(value, target.threads)
        elif name == "resolver" and value in RESOLVERS:
            arguments["experimental_op_resolver_type"] = OpResolverType[value]
        elif name in _FLAGS and isinstance(value, bool):
            arguments[_FLAGS[name]] = value
        elif name == DYNAMIC and isinstance(value, bool):
            continue
        elif name in _KNOWN:
            words = {"threads": "a number of at least 1", "resolver": f"one of {', '.join(RESOLVERS)}"}
            raise TargetError(
                f"litert's option '{name}' cannot be {value!r}",
                fix=f"give it {words.get(name, 'true or false')}",
            )
        else:
            raise TargetError(f"litert has no option '{name}'", fix=nearest(name, _KNOWN))
    return arguments


def interpreter(path: Path, target: Target, **more: Any) -> Any:
    """An interpreter with the target's threads and options."""
    from ai_edge_litert.interpreter import Interpreter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that keeping all tensors takes memory
        return Interpreter(str(path), **(settings(target) | more))


class LiteRTSession:
    """Opened files, by entry."""

    def __init__(self, artifact: Artifact, target: Target) -> None:
        told = artifact.details["entries"]
        self._entries = {
            entry: Entry(interpreter(artifact.folder / file, target), told[entry])
            for entry, file in artifact.entries.items()
        }

    def __call__(self, *inputs: np.ndarray, entry: str = "forward") -> tuple[np.ndarray, ...]:
        return self._entries[entry](inputs)


class Entry:
    """One opened file, and what was told of it when it was made."""

    def __init__(self, runner: Any, told: Mapping[str, Any]) -> None:
        self._runner = runner
        self.batched = told["batched"]
        self._batches = told["batches"]
        self._types = [np.dtype(dtype) for _, dtype in told["outputs"]]
        self._inputs = runner.get_input_details()
        self._outputs = runner.get_output_details()
        self._shapes = [tuple(int(size) for size in detail["shape"]) for detail in self._inputs]
        runner.allocate_tensors()

    def __call__(
        self, inputs: tuple[np.ndarray, ...], watch: Callable[[Any], None] | None = None
    ) -> tuple[np.ndarray, ...]:
        """Flat outputs; ``watch`` is called with the interpreter after each of its runs."""
        rows = self._rows(inputs)
        if rows == 1 or not self.batched or self._batches:
            return self._run(inputs, watch)
        answers = [
            self._run([x[row : row + 1] if i in self.batched else x for i, x in enumerate(inputs)], watch)
            for row in range(rows)
        ]
        return tuple(np.concatenate(parts) for parts in zip(*answers, strict=True))

    def _rows(self, inputs: tuple[np.ndarray, ...]) -> int:
        if len(inputs) != len(self._inputs):
            raise ValueError(f"it takes {len(self._inputs)} inputs, not {len(inputs)}")
        for i, (x, shape) in enumerate(zip(inputs, self._shapes, strict=True)):
            wanted = (x.shape[0], *shape[1:]) if i in self.batched and x.ndim else shape
            if x.shape != wanted:
                raise TargetError(
                    f"litert's file takes an input {i} of shape {wanted}, not {x.shape}",
                    fix="only batches are free: pad the data, or load the model with examples of this size",
                )
        return inputs[self.batched[0]].shape[0] if self.batched else 1

    def _run(
        self, inputs: Sequence[np.ndarray], watch: Callable[[Any], None] | None
    ) -> tuple[np.ndarray, ...]:
        runner, changed = self._runner, False
        for detail, x in zip(self._inputs, inputs, strict=True):
            if self.batched and detail["shape"][0] != x.shape[0]:
                runner.resize_tensor_input(detail["index"], x.shape)
                changed = True
        if changed:
            runner.allocate_tensors()
            self._inputs = runner.get_input_details()
        for detail, x in zip(self._inputs, inputs, strict=True):
            runner.set_tensor(detail["index"], _stored(x, detail))
        runner.invoke()
        if watch is not None:
            watch(runner)
        found = (_real(runner.get_tensor(detail["index"]), detail) for detail in self._outputs)
        return tuple(y.astype(kind, copy=False) for y, kind in zip(found, self._types, strict=True))


def _stored(x: np.ndarray, detail: Mapping[str, Any]) -> np.ndarray:
    """An input as the file takes it: integers where it does, of a real value."""
    scale, zero_point = detail["quantization"]
    kind = np.dtype(detail["dtype"])
    if not scale or kind.kind not in "iu" or x.dtype.kind != "f":
        return np.ascontiguousarray(x, kind)
    ends = np.iinfo(kind)
    steps: np.ndarray = np.clip(np.rint(x / scale) + zero_point, ends.min, ends.max)
    return steps.astype(kind)


def _real(y: np.ndarray, detail: Mapping[str, Any]) -> np.ndarray:
    """An output's real value, where the file gives integers for one."""
    scale, zero_point = detail["quantization"]
    if not scale or y.dtype.kind not in "iu":
        return y
    real: np.ndarray = (y.astype(np.float32) - zero_point) * np.float32(scale)
    return real
