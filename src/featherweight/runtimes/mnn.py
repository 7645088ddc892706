"""Alibaba's MNN on CPU: one ``.mnn`` file per entry, made from ONNX by its converter.

The converter is called as an extension module, in a child: its command installs a logging SDK and reports
every conversion to its vendor. It rounds weights by the largest one of a channel and knows no scales of
others, so it converts floats, and the formats are written into its file here (``_mnn_store.py``).

What its kernels ask for: signed 8-bit activations with a zero point, one scale for a tensor; weights per
output channel; an integer convolution has integer inputs and an integer output, its bias is float. Weights
alone (int8, int4, halves) are turned into floats when the file is opened: smaller, not faster.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import TargetError
from featherweight.runtime import Artifact, Json, Kernel, Role, Runtime, Session, Signature, Stored, Target

if TYPE_CHECKING:
    from featherweight.formats import TensorFormat
    from featherweight.model import Model

_WEIGHTED = frozenset({"conv1d", "conv2d", "linear"})
_ACTIVATIONS_ONLY = frozenset({"add", "mul"})
_PASSED_THROUGH = frozenset(
    {"max_pool2d", "reshape", "view", "flatten", "transpose", "permute", "squeeze", "unsqueeze"}
)
_CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp"})


class Mnn(Runtime):
    """Alibaba's MNN, CPU back end."""

    extra = "mnn"
    packages = ("MNN",)
    module = "MNN"

    def supports(
        self, op: str, weight: TensorFormat | None, activation: TensorFormat | None, target: Target
    ) -> bool:
        from featherweight.formats import Dynamic, FloatCast, IntQuant, PerGroup

        if weight is None and activation is None:
            return True
        if isinstance(activation, Dynamic):
            return False
        if isinstance(weight, FloatCast):
            return weight.dtype == "float16" and activation is None and op in _WEIGHTED
        if activation is not None and activation.width != 8:
            return False
        if isinstance(weight, IntQuant):
            if isinstance(weight.granularity, PerGroup) and op != "linear":
                return False
            static = weight.width == 8 and weight.symmetric
            return op in _WEIGHTED and (static if activation is not None else weight.width in (4, 8))
        return op in _ACTIVATIONS_ONLY | _PASSED_THROUGH | _CLAMPS

    def realise(self, fmt: TensorFormat, target: Target, role: Role) -> TensorFormat:
        from featherweight.formats import FloatCast, IntQuant, PerChannel, PerGroup, PerTensor

        if isinstance(fmt, FloatCast) and fmt.dtype == "float16" and role == "weight":
            return fmt
        if not isinstance(fmt, IntQuant) or fmt.width not in ((4, 8) if role == "weight" else (8,)):
            what = f"{fmt.width}-bit integers" if isinstance(fmt, IntQuant) else getattr(fmt, "dtype", "this")
            fix = "use int8, int4 or float16" if role == "weight" else "use int8"
            raise TargetError(f"mnn cannot store {what} for {role}s", fix=fix)
        shared = fmt.granularity
        if role == "activation" and not isinstance(shared, PerTensor):
            raise TargetError(
                "mnn has one scale for an activation", fix="use granularity: per_tensor for activations"
            )
        if (isinstance(shared, PerChannel) and shared.axis != 0) or (
            isinstance(shared, PerGroup) and shared.axis != 1
        ):
            raise TargetError("mnn has scales for output channels only", fix="use granularity: per_channel")
        positive = role == "activation" and fmt.symmetric and bool((fmt.low >= 0).all())
        return replace(fmt, signed=True, symmetric=fmt.symmetric and not positive)

    def lower(self, model: Model, target: Target, out: Path) -> Artifact:
        from featherweight.runtimes._mnn_lower import lower_entry
        from featherweight.tools.palettes import in_floats

        model = in_floats(model)
        files: dict[str, str] = {}
        details: dict[str, dict[str, Any]] = {}
        for entry in model.entries:
            files[entry] = "model.mnn" if entry == "forward" else f"model.{entry}.mnn"
            with tempfile.TemporaryDirectory() as scratch:
                lowered = lower_entry(
                    model, entry, Path(scratch), lambda fmt, role: self.realise(fmt, target, role)
                )
            (out / files[entry]).write_bytes(lowered.file)
            for key, told in lowered.details.items():
                details.setdefault(key, {})[entry] = told
        artifact = Artifact(self.name, out, tuple(files.values()), files, details)
        self._check(model, artifact)
        return artifact

    def _check(self, model: Model, artifact: Artifact) -> None:
        """Every weight is stored as its format says.

        Raises:
            TargetError: One is not.
        """
        from featherweight.formats import FloatCast

        stored = self.stored(artifact)
        for name, chain in model.formats.items():
            if name not in model.parameters:
                continue
            fmt = chain[-1]
            wanted = fmt.dtype if isinstance(fmt, FloatCast) else f"int{fmt.width}"
            seen = stored[name].dtype if name in stored else "nothing"
            if seen != wanted:
                raise TargetError(
                    f"mnn stored '{name}' as {seen}, not {wanted}", fix="exclude its layer under where"
                )

    def open(self, artifact: Artifact, target: Target) -> Session:
        from featherweight.runtimes import _mnn_session

        return _mnn_session.Session(artifact, target)

    def stored(self, artifact: Artifact) -> Mapping[str, Stored]:
        from featherweight.runtimes._mnn_file import File

        found: dict[str, Stored] = {}
        for entry, name in artifact.entries.items():
            names = artifact.details["parameters"][entry]
            for held in File((artifact.folder / name).read_bytes()).held():
                parameter = names.get(held.op, {}).get(held.part)
                if parameter is None:
                    parameter = held.op if held.part == "constant" else f"{held.op}.{held.part}"
                found[parameter] = Stored(parameter, held.dtype, held.bytes)
        return found

    def tunings(self, target: Target) -> Sequence[Mapping[str, Json]]:
        return ({"winograd": 0}, {"memory": "high"}, {"power": "high"})

    def values(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, entry: str = "forward"
    ) -> Mapping[str, np.ndarray]:
        from featherweight.runtimes import _mnn_session
        from featherweight.runtimes._mnn_file import File

        file = File((artifact.folder / artifact.entries[entry]).read_bytes())
        traced = {tensor: name for name, tensor in artifact.details["values"][entry].items()}
        makers = {op.name: file.tensors[op.outputs[0]] for op in file.ops if len(op.outputs) == 1}
        names = {op: traced[tensor] for op, tensor in makers.items() if tensor in traced}
        found = _mnn_session.values(_mnn_session.Session(artifact, target), inputs, entry, names)
        shapes = artifact.details["shapes"][entry]
        return {name: _shaped(array, shapes[name], inputs) for name, array in found.items()}

    def kernels(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, entry: str = "forward"
    ) -> Sequence[Kernel]:
        from featherweight.runtimes import _mnn_session
        from featherweight.runtimes._mnn_file import File

        file = File((artifact.folder / artifact.entries[entry]).read_bytes())
        integral = frozenset(
            held.op for held in file.held() if held.part == "weight" and held.dtype.startswith("int")
        )
        session = _mnn_session.Session(artifact, target)
        return _mnn_session.kernels(session, inputs, entry, integral, static=bool(file.quantized))

    def loaders(self, artifact: Artifact, target: Target, signature: Signature) -> Mapping[str, str]:
        from featherweight.runtimes._mnn_loaders import loaders

        return loaders(artifact.entries[signature.entry], target, signature)


PLUGIN = Mnn


def _shaped(array: np.ndarray, shape: Sequence[int], inputs: Sequence[np.ndarray]) -> np.ndarray:
    """A value in the original's shape: MNN runs linear layers as convolutions of single points."""
    batch = inputs[0].shape[0] if inputs and inputs[0].ndim else 1
    wanted = (batch, *shape[1:])
    return array.reshape(wanted) if array.size == int(np.prod(wanted)) else array
