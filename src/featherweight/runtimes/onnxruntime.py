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
from typing import TYPE_CHECKING

import numpy as np

from featherweight.errors import TargetError, nearest
from featherweight.runtime import Artifact, Profile, Role, Runtime, Session, Stored, Target

if TYPE_CHECKING:
    from featherweight.formats import TensorFormat
    from featherweight.model import Model

_WEIGHTED = frozenset({"conv1d", "conv2d", "linear"})
_ACTIVATIONS_ONLY = frozenset(
    {"add", "mul", "cat", "matmul", "bmm", "adaptive_avg_pool2d", "avg_pool2d", "sigmoid", "leaky_relu"}
)
_PASSED_THROUGH = frozenset(
    {"max_pool2d", "reshape", "view", "flatten", "transpose", "permute", "squeeze", "unsqueeze"}
)
_CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp"})
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
        if weight is None and activation is None:
            return True
        if any(fmt is not None and fmt.bits != 8 for fmt in (weight, activation)):
            return False
        if weight is not None:
            return op in _WEIGHTED
        return op in _ACTIVATIONS_ONLY | _PASSED_THROUGH | _CLAMPS

    def realise(self, fmt: TensorFormat, target: Target, role: Role) -> TensorFormat:
        from featherweight.formats import IntQuant, PerChannel

        if not isinstance(fmt, IntQuant) or fmt.width != 8:
            raise TargetError(
                f"{self.name} cannot store {fmt.bits:g}-bit integers here",
                fix="use int8 for weights and activations",
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

    def lower(self, model: Model, target: Target, out: Path) -> Artifact:
        from featherweight.exchange.export import to_onnx, write
        from featherweight.graph import trace
        from featherweight.runtimes._qdq import Dialect, store_formats

        files: dict[str, str] = {}
        written: list[str] = []
        for entry in model.entries:
            graph = trace(model, entry)
            read = (name for node in graph for name in node.parameters.values())
            present = {*graph.values, *read}  # an entry may leave layers of others alone
            formats = {name: fmts for name, fmts in model.formats.items() if name in present}
            export = to_onnx(model, entry, keep=formats)
            dialect = Dialect(runtime=self.name)
            store_formats(export, formats, lambda fmt, role: self.realise(fmt, target, role), dialect)
            files[entry] = "model.onnx" if entry == "forward" else f"model.{entry}.onnx"
            written += write(export.model, out / files[entry])
        return Artifact(self.name, out, tuple(written), files)

    def open(self, artifact: Artifact, target: Target) -> Session:
        return _Session(artifact, target)

    def stored(self, artifact: Artifact) -> Mapping[str, Stored]:
        import onnx_ir as ir

        found: dict[str, Stored] = {}
        for name in artifact.entries.values():
            model = ir.load(artifact.folder / name)
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is not None and value.name is not None:
                    found[value.name] = Stored(value.name, tensor.dtype.numpy().name, tensor.nbytes)
        return found

    def profile(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], folder: Path, *, entry: str
    ) -> Profile:
        from featherweight.runtimes._ort_profile import profile

        plain = self.open(artifact, target)
        path = artifact.folder / artifact.entries[entry]
        return profile(path, lambda: plain(*inputs, entry=entry), inputs, target.threads, folder)


PLUGIN = OnnxRuntime


class _Session:
    """Opened files; options in ``target.options`` are ONNX Runtime's session options by name."""

    def __init__(self, artifact: Artifact, target: Target) -> None:
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
                setattr(options, name, value)
            except TypeError as error:
                raise TargetError(
                    f"onnxruntime's session option '{name}' cannot be {value!r}",
                    fix=f"give it a value like {getattr(options, name)!r}",
                ) from error
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
