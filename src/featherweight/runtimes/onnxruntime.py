"""ONNX Runtime on CPU: one ONNX file per entry, explicit Q/DQ shaped for its integer kernels.

What its kernels ask for (measured, see docs/adr/0003): **unsigned** 8-bit
activations with a zero point (``QLinearConv`` with signed ones is no faster than
float), signed symmetric weights per channel, biases as int32 at the product of
both scales, and a range that begins at its zero point behind ReLU, so that the
activation disappears into the convolution's clamp. On x86 without VNNI the
``u8s8`` kernels add pairs in 16 bits and saturate, so weights leave one bit unused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import TargetError, nearest
from featherweight.runtime import (
    Artifact,
    Json,
    Kernel,
    Profile,
    Role,
    Runtime,
    Session,
    Signature,
    Stored,
    Target,
)

if TYPE_CHECKING:
    from featherweight.formats import IntQuant, TensorFormat
    from featherweight.model import Model

_WEIGHTED = frozenset({"conv1d", "conv2d", "linear"})
_ACTIVATIONS_ONLY = frozenset(
    {"add", "mul", "cat", "matmul", "bmm", "adaptive_avg_pool2d", "avg_pool2d", "sigmoid", "leaky_relu"}
)
_PASSED_THROUGH = frozenset(
    {"max_pool2d", "reshape", "view", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "pad"}
)
_CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp"})
_STORED = _WEIGHTED | {"conv3d", "conv_transpose1d", "conv_transpose2d", "embedding"}
_SMALLEST_BLOCK = 16
_SATURATING = frozenset({"avx2", "avx512", "generic"})


class OnnxRuntime(Runtime):
    """Microsoft's ONNX Runtime, CPU execution provider."""

    extra = "onnxruntime"
    packages = ("onnxruntime",)
    module = "onnxruntime"
    float_outputs = frozenset({"linear", "matmul", "bmm"})

    def supports(
        self, op: str, weight: TensorFormat | None, activation: TensorFormat | None, target: Target
    ) -> bool:
        from featherweight.formats import Dynamic, FloatCast, PerGroup

        if weight is None and activation is None:
            return True
        if isinstance(activation, Dynamic):
            return False
        if isinstance(weight, FloatCast):
            return activation is None and weight.dtype == "float16" and op in _STORED
        if isinstance(getattr(weight, "granularity", None), PerGroup):
            return activation is None and op == "linear" and getattr(weight, "width", 0) == 4
        if any(fmt is not None and fmt.width != 8 for fmt in (weight, activation)):
            return False
        if weight is not None:
            return op in _WEIGHTED
        return op in _ACTIVATIONS_ONLY | _PASSED_THROUGH | _CLAMPS

    def realise(self, fmt: TensorFormat, target: Target, role: Role) -> TensorFormat:
        from featherweight.formats import FloatCast, IntQuant, PerChannel, PerGroup

        if isinstance(fmt, FloatCast) and fmt.dtype == "float16" and role == "weight":
            return fmt
        if role == "weight" and isinstance(fmt, IntQuant) and isinstance(fmt.granularity, PerGroup):
            return self._blocks(fmt, fmt.granularity.size)
        if not isinstance(fmt, IntQuant) or fmt.width != 8 or isinstance(fmt.granularity, PerGroup):
            raise TargetError(
                f"{self.name} cannot store {fmt.width} bits of this kind for a {role} here",
                fix="use int8; for weights alone also float16, or int4 per group",
            )
        if role == "activation":
            if isinstance(fmt.granularity, PerChannel):
                raise TargetError(
                    f"{self.name} has no kernels for activations per channel",
                    fix="use granularity: per_tensor for activations",
                )
            positive = fmt.symmetric and bool(
                (fmt.low >= 0).all()
            )  # behind ReLU all 256 steps are above zero
            return replace(fmt, signed=False, symmetric=fmt.symmetric and not positive, headroom=0)
        if not fmt.symmetric:
            if isinstance(fmt.granularity, PerChannel):
                raise TargetError(
                    f"{self.name} has no kernels for asymmetric weights per channel",
                    fix="use symmetric weights, or granularity: per_tensor",
                )
            return replace(fmt, signed=False, headroom=0)
        headroom = 1 if target.resolved().isa in _SATURATING else 0
        return replace(fmt, signed=True, headroom=headroom)

    def _blocks(self, fmt: IntQuant, size: int) -> IntQuant:
        """The grid of a matrix that ``MatMulNBits`` multiplies by.

        Raises:
            TargetError: It has no such blocks.
        """
        if fmt.width != 4 or size < _SMALLEST_BLOCK or size & (size - 1):
            raise TargetError(
                f"{self.name} multiplies by 4 bits in groups of 16, 32, 64..., not by {fmt.width} in {size}",
                fix="use weights: int4 and group: 32",
            )
        return replace(fmt, signed=fmt.symmetric, headroom=0)

    def lower(self, model: Model, target: Target, out: Path) -> Artifact:
        from featherweight.exchange.export import to_onnx, write
        from featherweight.graph import trace
        from featherweight.runtimes._ort_blocks import store_blocks
        from featherweight.runtimes._qdq import Dialect, store_formats

        files: dict[str, str] = {}
        values: dict[str, dict[str, str]] = {}
        written: list[str] = []
        for entry in model.entries:
            graph = trace(model, entry)
            read = (name for node in graph for name in node.parameters.values())
            present = {*graph.values, *read}  # an entry may leave layers of others alone
            formats = {name: fmts for name, fmts in model.formats.items() if name in present}
            export = to_onnx(model, entry, keep=formats)
            blocks = {name: formats.pop(name) for name in list(formats) if _grouped(formats[name][-1])}
            grids: dict[str, Any] = {
                name: self.realise(chain[-1], target, "weight") for name, chain in blocks.items()
            }
            store_blocks(export, grids, self.name)
            dialect = Dialect(runtime=self.name)
            store_formats(export, formats, lambda fmt, role: self.realise(fmt, target, role), dialect)
            files[entry] = "model.onnx" if entry == "forward" else f"model.{entry}.onnx"
            written += write(export.model, out / files[entry])
            values[entry] = export.names()
        return Artifact(self.name, out, tuple(written), files, {"values": values})

    def open(self, artifact: Artifact, target: Target) -> Session:
        return _Session(artifact, target)

    def stored(self, artifact: Artifact) -> Mapping[str, Stored]:
        import onnx_ir as ir

        from featherweight.runtimes._ort_blocks import OPERATOR

        found: dict[str, Stored] = {}
        for name in artifact.entries.values():
            model = ir.load(artifact.folder / name)
            packed = {id(node.inputs[1]) for node in model.graph if node.op_type == OPERATOR}
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is not None and value.name is not None:
                    dtype = "uint4" if id(value) in packed else tensor.dtype.numpy().name
                    found[value.name] = Stored(value.name, dtype, tensor.nbytes)
        return found

    def profile(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], folder: Path, *, entry: str
    ) -> Profile:
        from featherweight.runtimes._ort_profile import profile

        plain = self.open(artifact, target)
        path = artifact.folder / artifact.entries[entry]
        return profile(path, lambda: plain(*inputs, entry=entry), inputs, target.threads, folder)

    def tunings(self, target: Target) -> Sequence[Mapping[str, Json]]:
        fewer = [{"intra_op_num_threads": count} for count in range(1, target.threads)]
        return (
            *fewer,
            {"enable_mem_pattern": False},
            {"enable_cpu_mem_arena": False},
            {"graph_optimization_level": "ORT_ENABLE_EXTENDED"},
        )

    def values(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, entry: str = "forward"
    ) -> Mapping[str, np.ndarray]:
        from featherweight.runtimes._ort_look import values

        names = artifact.details.get("values", {}).get(entry, {})
        return values(artifact.folder / artifact.entries[entry], names, _options(target), inputs)

    def kernels(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, entry: str = "forward"
    ) -> Sequence[Kernel]:
        from featherweight.runtimes._ort_look import kernels
        from featherweight.runtimes._ort_profile import profile

        session = self.open(artifact, target)

        def look(path: Path, folder: Path) -> Profile:
            return profile(path, lambda: session(*inputs, entry=entry), inputs, target.threads, folder)

        return kernels(artifact.folder / artifact.entries[entry], look)

    def loaders(self, artifact: Artifact, target: Target, signature: Signature) -> Mapping[str, str]:
        from featherweight.runtimes import _ort_loaders as texts

        file, options = artifact.entries[signature.entry], dict(target.options)
        version = self.version().split()[-1] if self.installed() else ""
        threads = int(options.get("intra_op_num_threads", target.threads))
        return {
            "load.py": texts.python(file, version, threads, options, signature),
            "load.cpp": texts.cpp(file, threads, options, signature),
            "Load.java": texts.java(file, threads, options, signature),
        }


PLUGIN = OnnxRuntime


def _grouped(fmt: TensorFormat) -> bool:
    from featherweight.formats import PerGroup

    return isinstance(getattr(fmt, "granularity", None), PerGroup)


def _options(target: Target) -> Any:
    """ONNX Runtime's session options; those in ``target.options`` go by its names for them.

    Raises:
        TargetError: There is no such option, or it has no such value.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    known = {name for name, kind in vars(ort.SessionOptions).items() if isinstance(kind, property)}
    for name, value in target.options.items():
        if name not in known:
            raise TargetError(f"onnxruntime has no session option '{name}'", fix=nearest(name, known))
        try:
            setattr(options, name, _value(name, value))
        except TypeError as error:
            raise TargetError(
                f"onnxruntime's session option '{name}' cannot be {value!r}",
                fix=f"give it a value like {getattr(options, name)!r}",
            ) from error
    return options


def _value(name: str, value: Json) -> Any:
    """Levels are told by their names, since options are JSON."""
    import onnxruntime as ort

    levels = ort.GraphOptimizationLevel.__members__
    return levels.get(value, value) if name == "graph_optimization_level" else value


class _Session:
    """Opened files."""

    def __init__(self, artifact: Artifact, target: Target) -> None:
        import onnxruntime as ort

        options = _options(target)
        self._sessions = {
            entry: ort.InferenceSession(
                os.fspath(artifact.folder / file), options, providers=["CPUExecutionProvider"]
            )
            for entry, file in artifact.entries.items()
        }
        self._names = {
            entry: [value.name for value in session.get_inputs()] for entry, session in self._sessions.items()
        }

    def __call__(self, *inputs: np.ndarray, entry: str = "forward") -> tuple[np.ndarray, ...]:
        feed = dict(zip(self._names[entry], inputs, strict=True))
        return tuple(self._sessions[entry].run(None, feed))
