"""TensorRT on NVIDIA GPUs: one ONNX file per entry with explicit Q/DQ pairs. Written, not measured.

What NVIDIA's documentation of explicit quantization and its ONNX parser (github.com/onnx/onnx-tensorrt) ask
for: **signed** 8-bit integers with a zero point of 0 for weights and activations; one scale per output
channel of a weight and per tensor of an activation; pairs in front of the inputs of weighted layers and
average pools, none between a layer and its batch norm, clamp or sum; of a sum, the residual input alone is
rounded, so that convolution, sum and ReLU become one kernel; float biases; 4 bits in blocks along the
inputs of a product of matrices. Concatenations get no pair of their own, since TensorRT moves pairs across
them. ``check_rules`` holds a file against that, and ``lower`` asks it each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from featherweight.errors import TargetError
from featherweight.runtime import Artifact, Role, Runtime, Session, Signature, Stored, Target

if TYPE_CHECKING:
    from featherweight.formats import TensorFormat
    from featherweight.model import Model

_INTEGER = frozenset({"conv2d", "conv3d", "conv_transpose2d", "linear"})
_STORED = _INTEGER | {"conv1d", "conv_transpose1d"}
_ACTIVATIONS_ONLY = frozenset({"add", "matmul", "bmm", "adaptive_avg_pool2d", "avg_pool2d"})
_PASSED_THROUGH = frozenset(
    {"max_pool2d", "reshape", "view", "flatten", "transpose", "permute", "squeeze", "unsqueeze"}
)
_CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp"})


class TensorRt(Runtime):
    """NVIDIA's TensorRT; writes what its parser reads, and needs nothing of NVIDIA for that."""

    extra = "tensorrt"
    packages = ("onnx",)
    module = "onnx"
    float_outputs = _INTEGER | _ACTIVATIONS_ONLY
    joined: ClassVar[frozenset[str]] = frozenset({"add"})
    unmeasured = "written, not measured: needs an NVIDIA GPU"

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
        if activation is not None and activation.width != 8:
            return False
        if weight is None:
            return op in _ACTIVATIONS_ONLY | _PASSED_THROUGH | _CLAMPS
        if activation is None:  # 8-bit weights alone are no kernel of TensorRT's
            grouped = isinstance(getattr(weight, "granularity", None), PerGroup)
            return op == "linear" and grouped and weight.width == 4
        return op in _INTEGER and weight.width == 8

    def realise(self, fmt: TensorFormat, target: Target, role: Role) -> TensorFormat:
        from featherweight.formats import FloatCast, IntQuant, PerGroup, PerTensor

        if isinstance(fmt, FloatCast) and fmt.dtype == "float16" and role == "weight":
            return fmt
        grouped = isinstance(fmt, IntQuant) and isinstance(fmt.granularity, PerGroup)
        width = 4 if grouped and role == "weight" else 8
        if not isinstance(fmt, IntQuant) or fmt.width != width:
            raise TargetError(
                f"tensorrt cannot store {fmt.width} bits of this kind for a {role}",
                fix="use int8; for weights alone float16, or int4 with granularity: per_group",
            )
        if role == "activation":
            if not isinstance(fmt.granularity, PerTensor):
                raise TargetError(
                    "tensorrt has no kernels for activations per channel",
                    fix="use granularity: per_tensor for activations",
                )
            return replace(fmt, signed=True, symmetric=True)
        if not fmt.symmetric:
            raise TargetError(
                "tensorrt reads no zero point of a weight but 0", fix="use symmetric_weights: true"
            )
        return replace(fmt, signed=True)

    def lower(self, model: Model, target: Target, out: Path) -> Artifact:
        from featherweight.runtimes._tensorrt_rules import ENFORCED, check_rules
        from featherweight.runtimes._tensorrt_sparse import check_sparse
        from featherweight.tools.palettes import in_floats

        model = in_floats(model)
        files: dict[str, str] = {}
        written: list[str] = []
        values: dict[str, Mapping[str, str]] = {}
        slower: list[str] = []
        for entry in model.entries:
            files[entry] = "model.onnx" if entry == "forward" else f"model.{entry}.onnx"
            names, values[entry] = self._write(model, entry, target, out / files[entry])
            written += names
            broken = check_rules(out / files[entry])
            refused = [what for what in broken if what.partition(":")[0] in ENFORCED]
            if refused:
                raise TargetError(
                    f"tensorrt would not read '{files[entry]}': {refused[0]}",
                    where=None if len(refused) == 1 else f"and {len(refused) - 1} more such places",
                    fix="exclude its layer under where",
                )
            slower += broken
        sparse = check_sparse(model, [out / file for file in files.values()])
        details = {"values": values, "two_to_four": sparse, "slower": slower, "unmeasured": self.unmeasured}
        artifact = Artifact(self.name, out, tuple(written), files, details)
        self._check_stored(artifact, model)
        return artifact

    def _write(
        self, model: Model, entry: str, target: Target, path: Path
    ) -> tuple[list[str], Mapping[str, str]]:
        """Write one entry; returns its files, and traced value -> name in the file."""
        from featherweight.exchange.export import to_onnx, write
        from featherweight.formats import FloatCast
        from featherweight.graph import trace
        from featherweight.runtimes._qdq import Dialect, store_formats
        from featherweight.runtimes._tensorrt_half import compute_in_half

        graph = trace(model, entry)
        read = (name for node in graph for name in node.parameters.values())
        present = {*graph.values, *read}  # an entry may leave layers of others alone
        formats = {name: fmts for name, fmts in model.formats.items() if name in present}
        export = to_onnx(model, entry, keep=formats)
        dialect = Dialect(self.name, integer_biases=False, guard_floats=False, whole_blocks=True)
        store_formats(export, formats, lambda fmt, role: self.realise(fmt, target, role), dialect)
        if any(isinstance(chain[-1], FloatCast) for chain in formats.values()):
            compute_in_half(export.model)
        return write(export.model, path), export.names()

    def _check_stored(self, artifact: Artifact, model: Model) -> None:
        from featherweight.formats import IntQuant

        stored = self.stored(artifact)
        for name, chain in model.formats.items():
            if name not in model.parameters:
                continue
            wanted = f"int{chain[-1].width}" if isinstance(chain[-1], IntQuant) else "float16"
            found = stored[name].dtype if name in stored else "nothing of that name"
            if found != wanted:
                raise TargetError(
                    f"tensorrt's file holds {found} for '{name}', not {wanted}",
                    fix="exclude its layer under where",
                )

    def open(self, artifact: Artifact, target: Target) -> Session:
        from featherweight.runtimes._tensorrt_loaders import command

        file = artifact.entries.get("forward", next(iter(artifact.entries.values())))
        raise TargetError(
            f"tensorrt's artifact cannot be run here; it is {self.unmeasured}",
            fix=f"on the device: {command(file, artifact.details, ())}",
        )

    def stored(self, artifact: Artifact) -> Mapping[str, Stored]:
        import onnx_ir as ir

        found: dict[str, Stored] = {}
        for name in artifact.entries.values():
            for value in ir.load(artifact.folder / name).graph.initializers.values():
                tensor = value.const_value
                if tensor is not None and value.name is not None:
                    found[value.name] = Stored(value.name, tensor.dtype.numpy().name, tensor.nbytes)
        return found

    def loaders(self, artifact: Artifact, target: Target, signature: Signature) -> Mapping[str, str]:
        from featherweight.runtimes._tensorrt_loaders import loaders

        return loaders(artifact, signature)


PLUGIN = TensorRt
