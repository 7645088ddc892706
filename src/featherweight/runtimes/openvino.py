"""OpenVINO on CPU: one IR (``model.xml`` with ``model.bin``) per entry, read from our ONNX with Q/DQ pairs.

What its kernels ask for (measured): **unsigned** 8-bit activations, signed symmetric weights per channel,
biases left in float, since they are added behind the integers, and no rounding between a convolution and the
sum, clamp or activation that is fused into it. Matrices of weights alone may have 8 or 4 bits per channel or
group; the plugin keeps them so in memory (``FullyConnectedCompressed``), and rounds the inputs of 8-bit ones
at each call where a file's formats ask for it; this is a property of the whole model. On x86 without VNNI
the ``u8s8`` kernels add pairs in 16 bits and saturate, so weights leave one bit unused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import TargetError
from featherweight.runtime import Artifact, Json, Kernel, Role, Runtime, Session, Signature, Stored, Target

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from featherweight.exchange.export import OnnxExport
    from featherweight.formats import TensorFormat
    from featherweight.model import Model

_INTEGER = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear"})
_STORED = _INTEGER | {"conv_transpose1d", "embedding"}
_ACTIVATIONS_ONLY = frozenset({"add", "mul", "cat", "adaptive_avg_pool2d", "avg_pool2d"})  # matmul: float
_PASSED_THROUGH = frozenset(
    {"max_pool2d", "reshape", "view", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "pad"}
)
_CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp"})
_MATRICES = frozenset({"linear", "embedding"})
_RECURRENT = frozenset({"lstm", "gru"})
_WIDTHS = (4, 8)
_SATURATING = frozenset({"avx2", "avx512", "generic"})


class OpenVino(Runtime):
    """Intel's OpenVINO, CPU plugin."""

    extra = "openvino"
    packages = ("openvino",)
    module = "openvino"
    float_outputs = _INTEGER | (_ACTIVATIONS_ONLY - {"cat"})
    joined = frozenset({"add"})

    def load(self, target: Target) -> None:
        from featherweight.runtimes._openvino_session import silent

        silent()
        super().load(target)

    def supports(
        self, op: str, weight: TensorFormat | None, activation: TensorFormat | None, target: Target
    ) -> bool:
        from featherweight.formats import Dynamic, FloatCast, IntQuant, PerGroup

        if weight is None and activation is None:
            return True
        if isinstance(weight, FloatCast):
            return activation is None and weight.dtype == "float16" and op in _STORED
        if activation is not None and activation.width != 8:
            return False
        if weight is None:
            static = isinstance(activation, IntQuant)
            return static and op in _ACTIVATIONS_ONLY | _PASSED_THROUGH | _CLAMPS
        if not isinstance(weight, IntQuant) or weight.width not in _WIDTHS:
            return False
        if isinstance(activation, Dynamic):
            plain = weight.width == 8 and weight.symmetric and not isinstance(weight.granularity, PerGroup)
            return op == "linear" and activation.per == "token" and plain
        if isinstance(weight.granularity, PerGroup):
            return activation is None and op in _MATRICES
        if op in _RECURRENT:
            return activation is None and weight.width == 8
        if op == "embedding":
            return activation is None
        return op in _INTEGER and (activation is None or weight.width == 8)

    def realise(self, fmt: TensorFormat, target: Target, role: Role) -> TensorFormat:
        from featherweight.formats import Dynamic, FloatCast, IntQuant, PerGroup, PerTensor

        if isinstance(fmt, FloatCast) and fmt.dtype == "float16" and role == "weight":
            return fmt
        if isinstance(fmt, Dynamic) and fmt.width == 8 and role == "activation":
            return replace(fmt, symmetric=True, signed=True, per="token")
        widths = (8,) if role == "activation" else _WIDTHS
        if not isinstance(fmt, IntQuant) or fmt.width not in widths:
            raise TargetError(
                f"openvino cannot store {fmt.width} bits of this kind for a {role} here",
                fix="use int8, or int4 or float16 for weights alone",
            )
        if role == "activation":
            if not isinstance(fmt.granularity, PerTensor):
                raise TargetError(
                    "openvino has no kernels for activations per channel",
                    fix="use granularity: per_tensor for activations",
                )
            middle = fmt.symmetric and bool((fmt.low < 0).any())  # behind ReLU all steps are above zero
            return replace(fmt, signed=middle, symmetric=middle)
        if not fmt.symmetric:
            return replace(fmt, signed=False)
        grouped = isinstance(fmt.granularity, PerGroup) or fmt.width == 4  # executed in float
        saturating = target.resolved().isa in _SATURATING and not grouped
        return replace(fmt, signed=True, headroom=max(fmt.headroom, int(saturating)))

    def lower(self, model: Model, target: Target, out: Path) -> Artifact:
        from featherweight.formats import Dynamic
        from featherweight.tools.palettes import in_floats

        model = in_floats(model)
        files: dict[str, str] = {}
        values: dict[str, dict[str, str]] = {}
        for entry in model.entries:
            files[entry] = "model.xml" if entry == "forward" else f"model.{entry}.xml"
            values[entry] = self._convert(model, entry, target, out / files[entry])
        written = [name for file in files.values() for name in (file, file.removesuffix("xml") + "bin")]
        dynamic = any(isinstance(fmt, Dynamic) for chain in model.formats.values() for fmt in chain)
        details: dict[str, Any] = {"values": values, **({"dynamic": True} if dynamic else {})}
        artifact = Artifact(self.name, out, tuple(written), files, details)
        self._check_stored(artifact, model)
        return artifact

    def _convert(self, model: Model, entry: str, target: Target, path: Path) -> dict[str, str]:
        """Write one entry; returns traced value -> tensor in the file."""
        from featherweight.exchange.export import to_onnx, write
        from featherweight.graph import trace
        from featherweight.runtimes._child import convert
        from featherweight.runtimes._ort_kinds import Kinds
        from featherweight.runtimes._ort_recurrent import store_recurrent
        from featherweight.runtimes._qdq import Dialect, store_formats

        graph = trace(model, entry)
        kinds = Kinds.of(graph, model.formats)
        matrices = {name: (fmt,) for name, fmt in {**kinds.blocks, **kinds.products}.items()}
        formats = {**kinds.rest, **matrices}
        export = to_onnx(model, entry, keep={*formats, *kinds.recurrent})
        grids: dict[str, Any] = {
            name: self.realise(fmt, target, "weight") for name, fmt in kinds.recurrent.items()
        }
        if grids and any(name in graph.values for name in kinds.rest):
            raise TargetError(
                f"openvino cannot store '{next(iter(grids))}' as integers beside static activations",
                where="beside them its plugin keeps such weights apart, and has no recurrent kernel for that",
                fix="use activations: none or dynamic, or exclude the recurrent layers under where",
            )
        store_recurrent(export, grids, (), self.name, restored_by="DequantizeLinear")
        dialect = Dialect(self.name, integer_biases=False, guard_floats=False, whole_blocks=True)
        store_formats(export, formats, lambda fmt, role: self.realise(fmt, target, role), dialect)
        weights, constants = _name_weights(export.model.graph), _biases(export.model.graph)
        tensors = _name_values(export)
        with tempfile.TemporaryDirectory(prefix="featherweight-openvino-") as folder:
            write(export.model, Path(folder) / "model.onnx")
            kept = convert(
                self.name,
                "featherweight.runtimes._openvino_convert:convert",
                {
                    "source": str(Path(folder) / "model.onnx"),
                    "target": str(path.resolve()),
                    "weights": weights,
                    "constants": constants,
                    "keep": sorted(set(tensors.values())),
                },
            )
        return {value: tensor for value, tensor in tensors.items() if tensor in kept}

    def _check_stored(self, artifact: Artifact, model: Model) -> None:
        """A weight that silently stayed float would be the worst of results."""
        from featherweight.formats import FloatCast, IntQuant

        stored = self.stored(artifact)
        for name, chain in model.formats.items():
            if name not in model.parameters:
                continue
            fmt = chain[-1]
            wanted = {f"int{fmt.width}", f"uint{fmt.width}"} if isinstance(fmt, IntQuant) else set()
            wanted |= {"float16"} if isinstance(fmt, FloatCast) else set()
            found = stored[name].dtype if name in stored else "nothing of that name"
            if found not in wanted:
                raise TargetError(
                    f"openvino stored {found} for '{name}', not {sorted(wanted)[0]}",
                    fix="exclude its layer under where",
                )

    def open(self, artifact: Artifact, target: Target) -> Session:
        from featherweight.runtimes._openvino_session import Session as Opened

        return Opened(artifact, target)

    def stored(self, artifact: Artifact) -> Mapping[str, Stored]:
        from featherweight.runtimes._openvino_file import constants

        found: dict[str, Stored] = {}
        for file in artifact.entries.values():
            found |= constants(artifact.folder / file)
        return found

    def tunings(self, target: Target) -> Sequence[Mapping[str, Json]]:
        from featherweight.runtimes._openvino_file import has_efficiency_cores

        sets: list[Mapping[str, Json]] = [
            {"INFERENCE_NUM_THREADS": threads} for threads in (target.threads // 2,) if threads
        ]
        if target.threads > 1:
            sets += [{"TBB_PARTITIONER": "STATIC"}, {"ENABLE_CPU_PINNING": False}]
            sets += [{"SCHEDULING_CORE_TYPE": "PCORE_ONLY"}] if has_efficiency_cores() else []
        return [*sets, {"CPU_DENORMALS_OPTIMIZATION": True}]

    def values(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, entry: str = "forward"
    ) -> Mapping[str, np.ndarray]:
        from featherweight.runtimes._openvino_session import inner_values

        return inner_values(artifact, target, inputs, artifact.details["values"][entry], entry=entry)

    def kernels(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, entry: str = "forward"
    ) -> Sequence[Kernel]:
        from featherweight.runtimes._openvino_session import executed

        return executed(artifact, target, inputs, entry=entry)

    def loaders(self, artifact: Artifact, target: Target, signature: Signature) -> Mapping[str, str]:
        from featherweight.runtimes._openvino_loaders import loaders

        return loaders(artifact, target, signature)


PLUGIN = OpenVino


def _name_weights(graph: ir.Graph) -> dict[str, tuple[str, str]]:
    """Stored weight -> the tensor that restores it, and one that is made with it."""
    found: dict[str, tuple[str, str]] = {}
    for node in graph:
        source = node.inputs[0] if node.inputs else None
        if (
            node.op_type in ("DequantizeLinear", "Cast")
            and source is not None
            and source.const_value is not None
        ):
            restored = node.outputs[0]
            restored.name = f"{source.name}.restored"
            reader = next(iter(restored.uses())).node
            made = reader.outputs[0]
            if made.name is None:
                made.name = f"{source.name}.used"
            found[str(source.name)] = (restored.name, made.name)
    return found


def _biases(graph: ir.Graph) -> dict[str, str]:
    """Tensor that a convolution or matrix product with a bias makes -> the bias' name."""
    layers = (node for node in graph if node.op_type in ("Conv", "ConvTranspose", "Gemm"))
    return {
        str(node.outputs[0].name): str(bias.name)
        for node in layers
        for bias in node.inputs[2:3]
        if bias is not None and bias.const_value is not None
    }


def _name_values(export: OnnxExport) -> dict[str, str]:
    """Traced value -> tensor; of a value that is rounded, the one behind the rounding."""
    for name, value in export.inside.items():
        if value.name is None:
            value.name = f"{name}.rounded"
    return export.names()
