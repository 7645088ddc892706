"""ONNX Runtime on CPU: one ONNX file per entry, explicit Q/DQ shaped for its integer kernels.

What its kernels ask for (measured, see docs/adr/0003): **unsigned** 8-bit
activations with a zero point (``QLinearConv`` with signed ones is no faster than
float), signed symmetric weights per channel, biases as int32 at the product of
both scales, and a range that begins at its zero point behind ReLU, so that the
activation disappears into the convolution's clamp. Linear layers whose inputs are
rounded at each call, weights in blocks and recurrent layers have operators of their
own (``_ort_dynamic``, ``_ort_blocks``, ``_ort_recurrent``). On x86 without VNNI the
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
    import onnx_ir as ir

    from featherweight.formats import TensorFormat
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
_MATRICES = frozenset({"linear", "embedding"})
_RECURRENT = frozenset({"lstm", "gru"})
_DYNAMIC: Mapping[str, tuple[str, ...]] = {"linear": ("token", "tensor"), "lstm": ("tensor",)}
_SATURATING = frozenset({"avx2", "avx512", "generic"})
_WIDE = frozenset({"avx512", "vnni"})


class OnnxRuntime(Runtime):
    """Microsoft's ONNX Runtime, CPU execution provider."""

    extra = "onnxruntime"
    packages = ("onnxruntime",)
    module = "onnxruntime"
    float_outputs = frozenset({"linear", "matmul", "bmm"})

    def supports(
        self, op: str, weight: TensorFormat | None, activation: TensorFormat | None, target: Target
    ) -> bool:
        from featherweight.formats import Dynamic, FloatCast, IntQuant

        if weight is None and activation is None:
            return True
        if isinstance(weight, FloatCast):
            return activation is None and weight.dtype == "float16" and op in _STORED
        if activation is not None and activation.width != 8:
            return False
        if weight is None:
            static = isinstance(activation, IntQuant)
            return static and op in _ACTIVATIONS_ONLY | _PASSED_THROUGH | _CLAMPS
        if _blocked(weight) or op == "embedding":
            return activation is None and op in _MATRICES and self._stores(weight, target)
        if weight.width != 8 or not isinstance(weight, IntQuant):
            return False
        if isinstance(activation, Dynamic):
            return activation.per in _DYNAMIC.get(op, ()) and self._stores(weight, target)
        if op in _RECURRENT:
            return self._stores(weight, target)
        return op in _WEIGHTED

    def _stores(self, weight: TensorFormat, target: Target) -> bool:
        try:
            self.realise(weight, target, "weight")
        except TargetError:
            return False
        return True

    def width_multiple(self, target: Target) -> int:
        """Float convolutions work on blocks of channels: 16 with AVX-512, 8 with AVX2 (MLAS).

        Eight 3 x 3 convolutions at 28 x 28 with AVX-512, in units of those with 32 channels: 0.37 at 16
        channels, 1.00 at 20, 0.96 at 22, 1.00 at 24; 2.05 at 40, 2.80 at 45, 2.05 at 48, 3.47 at 56; a
        depthwise pair: 0.49 at 16, 1.39 at 11, 2.09 at 22, 4.47 at 45 (``benchmarks/widths.py``).
        """
        return 16 if target.resolved().isa in _WIDE else 8

    def realise(self, fmt: TensorFormat, target: Target, role: Role) -> TensorFormat:
        from featherweight.formats import Dynamic, FloatCast, IntQuant, PerChannel
        from featherweight.runtimes._ort_blocks import blocks

        if isinstance(fmt, FloatCast) and fmt.dtype == "float16" and role == "weight":
            return fmt
        if isinstance(fmt, Dynamic) and fmt.width == 8 and role == "activation":
            return replace(fmt, symmetric=fmt.per == "token", signed=False)
        if role == "weight" and isinstance(fmt, IntQuant) and _blocked(fmt):
            return blocks(fmt, self.name)
        if not isinstance(fmt, IntQuant) or _blocked(fmt) or fmt.width != 8:
            raise TargetError(
                f"{self.name} cannot store {fmt.width} bits of this kind for a {role} here",
                fix="use int8; for weights alone also float16, or int8, int4 and int2 per group or channel",
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
            return replace(fmt, signed=False, symmetric=fmt.symmetric and not positive)
        if not fmt.symmetric:
            if isinstance(fmt.granularity, PerChannel):
                raise TargetError(
                    f"{self.name} has no kernels for asymmetric weights per channel",
                    fix="use symmetric weights, or granularity: per_tensor",
                )
            return replace(fmt, signed=False)
        saturating = target.resolved().isa in _SATURATING
        return replace(fmt, signed=True, headroom=max(fmt.headroom, int(saturating)))

    def lower(self, model: Model, target: Target, out: Path) -> Artifact:
        from featherweight.exchange.compact import compact
        from featherweight.exchange.export import to_onnx, write
        from featherweight.graph import trace
        from featherweight.runtimes._ort_kinds import Kinds
        from featherweight.tools.palettes import in_floats

        model = in_floats(model)
        files: dict[str, str] = {}
        values: dict[str, dict[str, str]] = {}
        written: list[str] = []
        for entry in model.entries:
            graph = trace(model, entry)
            kinds = Kinds.of(graph, model.formats)
            export = to_onnx(model, entry, keep=kinds.names)
            kinds.store(export, lambda fmt, role: self.realise(fmt, target, role), self.name)
            traced = {value.fx_name for value in graph.values.values()}  # costs look for them
            compact(export, {*graph.program.state_dict, *traced})
            files[entry] = "model.onnx" if entry == "forward" else f"model.{entry}.onnx"
            written += write(export.model, out / files[entry])
            values[entry] = export.names()
        return Artifact(self.name, out, tuple(written), files, {"values": values})

    def open(self, artifact: Artifact, target: Target) -> Session:
        return _Session(artifact, target)

    def stored(self, artifact: Artifact) -> Mapping[str, Stored]:
        import onnx_ir as ir

        from featherweight.runtimes._ort_blocks import OPERATOR, TABLE

        found: dict[str, Stored] = {}
        for name in artifact.entries.values():
            model = ir.load(artifact.folder / name)
            packed = _widths(model.graph, {OPERATOR: 1, TABLE: 0})
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is not None and value.name is not None:
                    width = packed.get(id(value))
                    dtype = tensor.dtype.numpy().name if width is None else f"uint{width}"
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


def _blocked(fmt: TensorFormat) -> bool:
    """Whether a weight is stored in blocks."""
    from featherweight.formats import IntQuant, PerGroup

    return isinstance(fmt, IntQuant) and (isinstance(fmt.granularity, PerGroup) or fmt.width < 8)


def _widths(graph: ir.Graph, places: Mapping[str, int]) -> dict[int, int]:
    """Packed tensor -> bits of an element; ``places``: operator -> which of its inputs is packed."""
    found: dict[int, int] = {}
    for node in graph:
        if node.op_type not in places:
            continue
        value = node.inputs[places[node.op_type]]
        maker = None if value is None else value.producer()
        while maker is not None:
            value = maker.inputs[0]
            maker = None if value is None else value.producer()
        found[id(value)] = node.attributes["bits"].as_int()
    return found


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
