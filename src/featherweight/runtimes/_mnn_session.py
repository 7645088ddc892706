"""Opens ``.mnn`` files with MNN's interpreter, and asks it what it runs.

Part of ``mnn.py``; imports numpy and MNN alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import TargetError, nearest
from featherweight.runtime import Artifact, Kernel, Target

if TYPE_CHECKING:
    import MNN

_LEVELS = ("low", "normal", "high")
_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "precision": (*_LEVELS, "low_bf16"),
    "memory": _LEVELS,
    "power": _LEVELS,
    "winograd": (0, 1, 2, 3),
}
WINOGRAD = 1  # tiles that keep float32's precision: MNN's own choice is 1.6e-4 off on ResNet-18, this 1.3e-6
_WINOGRAD_HINT = 3  # Interpreter::HintMode: how large the tiles of Winograd's convolution may be
_RESIZE_STATUS = 3  # Interpreter::SessionInfoCode; 0: ready
_WARM_UP, _CALLS = 3, 20
_CASTS = ("FloatToInt8", "Int8ToFloat")


class Session:
    """Opened files; options are MNN's precision, memory and power, and the level of Winograd's tiles."""

    def __init__(self, artifact: Artifact, target: Target) -> None:
        for name, value in target.options.items():
            if name not in _OPTIONS:
                raise TargetError(f"mnn has no session option '{name}'", fix=nearest(name, _OPTIONS))
            if value not in _OPTIONS[name] or isinstance(value, bool):
                known = ", ".join(map(str, _OPTIONS[name]))
                raise TargetError(f"mnn's option '{name}' cannot be {value!r}", fix=f"take one of {known}")
        with quiet():
            import MNN
        self._mnn = MNN
        self._entries = {
            entry: self._open(os.fspath(artifact.folder / file), target)
            for entry, file in artifact.entries.items()
        }
        self._signatures = artifact.details["signatures"]

    def _open(self, path: str, target: Target) -> tuple[MNN.Interpreter, MNN.Session, dict[str, Any]]:
        options = dict(target.options)
        level = options.pop("winograd", WINOGRAD)
        with quiet():
            interpreter = self._mnn.Interpreter(path)
            interpreter.setSessionHint(_WINOGRAD_HINT, level)
            config = {"backend": "CPU", "numThread": target.threads, "precision": "high", **options}
            session = interpreter.createSession(config)
        _check(interpreter, session)
        return interpreter, session, dict(interpreter.getSessionInputAll(session))

    def __call__(self, *inputs: np.ndarray, entry: str = "forward") -> tuple[np.ndarray, ...]:
        interpreter, session, _ = self._entries[entry]
        self.fill(inputs, entry)
        interpreter.runSession(session)
        return tuple(
            self.host(interpreter.getSessionOutput(session, name)).astype(dtype, copy=False)
            for name, dtype in self._signatures[entry]["outputs"]
        )

    def fill(self, inputs: Sequence[np.ndarray], entry: str) -> None:
        """Hand the inputs over, after making room for their shapes."""
        interpreter, session, tensors = self._entries[entry]
        given = dict(zip(self._signatures[entry]["inputs"], inputs, strict=True))
        given = {name: array for name, array in given.items() if name in tensors}
        changed = [name for name, array in given.items() if tuple(tensors[name].getShape()) != array.shape]
        for name in changed:
            interpreter.resizeTensor(tensors[name], given[name].shape)
        if changed:
            interpreter.resizeSession(session)
            _check(interpreter, session)
        for name, array in given.items():
            tensors[name].copyFrom(self._tensor(array.shape, tensors[name].getDataType(), array))

    def host(self, tensor: MNN.Tensor) -> np.ndarray:
        """A copy of what a tensor holds, channels first."""
        shape, kind = tensor.getShape(), tensor.getDataType()
        copy = self._tensor(shape, kind, None)
        tensor.copyToHostTensor(copy)
        return np.array(copy.getNumpyData()).reshape(shape)

    def _tensor(self, shape: Sequence[int], kind: Any, array: np.ndarray | None) -> MNN.Tensor:
        mnn = self._mnn
        kinds = ((mnn.Halide_Type_Float, np.float32), (mnn.Halide_Type_Uint8, np.uint8))
        dtype: type[np.generic] = next((dtype for known, dtype in kinds if kind == known), np.int32)
        data = np.zeros(shape, dtype) if array is None else np.ascontiguousarray(array, dtype)
        return mnn.Tensor(tuple(shape), kind, data, mnn.Tensor_DimensionType_Caffe)

    def watch(
        self,
        inputs: Sequence[np.ndarray],
        entry: str,
        before: Callable[[Any, MNN.OpInfo], bool],
        after: Callable[[Any, MNN.OpInfo], bool],
    ) -> None:
        """One call, with what MNN tells before and behind every operator: its tensors, itself.

        Each returns whether to go on: before an operator to run it, behind it to run others.
        """
        interpreter, session, _ = self._entries[entry]
        self.fill(inputs, entry)
        interpreter.runSessionWithCallBackInfo(session, before, after)


def _check(interpreter: MNN.Interpreter, session: MNN.Session) -> None:
    """MNN says only on standard output that it could not prepare a session, and crashes when it is run."""
    if interpreter.getSessionInfo(session, _RESIZE_STATUS) != 0:
        raise TargetError(
            "mnn cannot prepare the model for inputs of this shape",
            fix="give the shape of the examples, or take another runtime",
        )


def values(
    session: Session, inputs: Sequence[np.ndarray], entry: str, names: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """What operators compute: traced name -> real values; ``names``: operator -> traced name."""
    found: dict[str, np.ndarray] = {}

    def after(tensors: Sequence[MNN.Tensor], told: MNN.OpInfo) -> bool:
        name = names.get(told.getName())
        if name is not None and tensors:
            found[name] = session.host(tensors[0])
        return True

    session.watch(inputs, entry, lambda *_: True, after)
    return found


def kernels(
    session: Session, inputs: Sequence[np.ndarray], entry: str, integral: frozenset[str], *, static: bool
) -> list[Kernel]:
    """The operators of a call with their times, medians of some calls.

    Args:
        integral: Operators that hold integers.
        static: Activations have grids, so that these should run in integers.
    """
    times: dict[tuple[str, str], list[float]] = {}
    begun = 0.0

    def before(*_: object) -> bool:
        nonlocal begun
        begun = time.perf_counter()
        return True

    def after(_: object, told: MNN.OpInfo) -> bool:
        times.setdefault((told.getName(), told.getType()), []).append(time.perf_counter() - begun)
        return True

    for _ in range(_WARM_UP + _CALLS):
        session.watch(inputs, entry, before, after)
    found: list[Kernel] = []
    for (name, told), seen in times.items():
        op, _, rest = told.partition(" ")
        dtype = "int8" if "INT8" in rest and op not in _CASTS else "float32"
        note = ""
        if op in _CASTS:
            note = "turns floats into integers" if op == "FloatToInt8" else "turns integers into floats"
        elif name in integral and dtype != "int8":
            note = "holds integers, which are turned into floats when the file is opened"
        slow = bool(note) and (static or op in _CASTS)
        found.append(Kernel(name, op, dtype, not slow, float(np.median(seen[_WARM_UP:])), note))
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """MNN prints to standard output what it sees of the machine; its errors still come as exceptions."""
    import ctypes

    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
