"""Core ML: an ``.mlpackage`` with an ML Program for each entry, written with coremltools.

coremltools converts on Linux, and nothing here can run what it wrote: everything below is what its sources
and its documentation ask for, not what was measured.

- Its own quantizer puts ``quantize`` and ``dequantize`` (iOS 17) around convolutions, linear layers, sums and
  pooling only, with integers whose zero point is 0: signed symmetric ones, unsigned behind ReLU. So do we.
- Weights are integers behind ``constexpr_affine_dequantize`` (8 bits), or ``constexpr_blockwise_shift_scale``
  (4 bits, iOS 18): the same integers and scales that the formats say.
- Palettes of a tensor are tables and codes of 1, 2, 4, 6 or 8 bits behind ``constexpr_lut_to_dense``; those
  of recurrent layers, of groups of channels or with a scale of each channel are floats.
- Half precision is the type in which a layer computes: its constants are stored so, its input is cast. Where
  all layers have it, all of the program does.
- Batch 1, since the Neural Engine takes fixed shapes only.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import TargetError, nearest
from featherweight.runtime import Artifact, Role, Runtime, Session, Signature, Stored, Target
from featherweight.runtimes._child import convert

if TYPE_CHECKING:
    from featherweight.formats import FloatCast, IntQuant, TensorFormat
    from featherweight.model import Model

_CONVERTER = "featherweight.runtimes._coreml_convert"
_WEIGHTED = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "linear"})
_INTEGER_LAYERS = frozenset({"conv1d", "conv2d", "linear"})
_ACTIVATIONS_ONLY = frozenset({"add", "avg_pool2d"})
_PASSED_THROUGH = frozenset({"max_pool2d"})
_CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp"})
_SYSTEMS = ("iOS17", "iOS18")
_SYSTEM = "minimum_deployment_target"


class CoreML(Runtime):
    """Apple's Core ML: CPU, GPU and Neural Engine."""

    extra = "coreml"
    packages = ("coremltools",)
    module = "coremltools"
    float_outputs = _INTEGER_LAYERS
    unmeasured = "written, not measured: needs an Apple device"

    # ---- formats

    def supports(
        self, op: str, weight: TensorFormat | None, activation: TensorFormat | None, target: Target
    ) -> bool:
        from featherweight.formats import Dynamic, FloatCast, IntQuant, Palette, PerGroup

        if weight is None and activation is None:
            return True
        if isinstance(activation, Dynamic):
            return False
        if activation is not None and activation.width != 8:
            return False
        if weight is None:
            return op in _ACTIVATIONS_ONLY | _PASSED_THROUGH | _CLAMPS
        if isinstance(weight, FloatCast):
            return activation is None and weight.dtype == "float16" and op in _WEIGHTED
        if isinstance(weight, Palette):
            return activation is None and op in _WEIGHTED and not weight.group
        if not isinstance(weight, IntQuant) or weight.width not in (4, 8):
            return False
        if isinstance(weight.granularity, PerGroup) and (op != "linear" or weight.width != 4):
            return False
        if activation is not None:
            return op in _INTEGER_LAYERS and weight.width == 8
        return op in _WEIGHTED

    def realise(self, fmt: TensorFormat, target: Target, role: Role) -> TensorFormat:
        from featherweight.formats import FloatCast, IntQuant, Palette

        half = isinstance(fmt, FloatCast) and fmt.dtype == "float16"
        if role == "weight" and (half or isinstance(fmt, Palette)):
            return fmt
        if isinstance(fmt, IntQuant):
            return self._activation(fmt) if role == "activation" else self._weight(fmt)
        raise TargetError(
            f"{self.name} cannot store {fmt.width} bits of this kind for a {role}",
            fix="use int8; for weights alone also float16 and int4",
        )

    def _activation(self, fmt: IntQuant) -> IntQuant:
        """Unsigned from zero where nothing is negative, else signed around zero."""
        from featherweight.formats import PerTensor

        if fmt.width != 8 or not isinstance(fmt.granularity, PerTensor):
            raise TargetError(
                f"{self.name} stores activations as 8 bits per tensor only",
                fix="use activations: int8, per tensor",
            )
        positive = bool((fmt.low >= 0).all())
        return replace(fmt, signed=not positive, symmetric=not positive)

    def _weight(self, fmt: IntQuant) -> IntQuant:
        from featherweight.formats import PerGroup

        if fmt.width not in (4, 8) or (isinstance(fmt.granularity, PerGroup) and fmt.width != 4):
            raise TargetError(
                f"{self.name} stores weights as 8 bits per tensor or channel, or as 4 bits, also per group",
                fix="use weights: int8, or int4",
            )
        return replace(fmt, signed=True)

    # ---- files

    def lower(self, model: Model, target: Target, out: Path) -> Artifact:
        import torch

        from featherweight.exchange.pt2e import quantized_program
        from featherweight.tools.palettes import in_floats

        shared = _tables(model)
        model = in_floats(model)
        half = self._half(model)
        plain = model.evolve(
            formats={name: chain for name, chain in model.formats.items() if name not in half}
        )
        files: list[str] = []
        entries: dict[str, str] = {}
        parameters: dict[str, dict[str, str]] = {}
        with tempfile.TemporaryDirectory(prefix="featherweight-coreml-") as folder:
            for entry, how in model.entries.items():
                self._check_groups(plain)
                made = quantized_program(plain, entry, lambda fmt, role: self.realise(fmt, target, role))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch warns of its own internals
                    program = made.program.run_decompositions({})
                    torch.export.save(program, Path(folder) / f"{entry}.pt2")
                in_half = [name for name, parameter in made.tensors.items() if parameter in half]
                package = "model.mlpackage" if entry == "forward" else f"model.{entry}.mlpackage"
                entries[entry] = f"{package}/Manifest.json"
                arguments = {
                    "program": str(Path(folder) / f"{entry}.pt2"),
                    "out": str(out.resolve() / package),
                    "target": self._system(model, target),
                    "shared": [name for name, parameter in made.tensors.items() if parameter in shared],
                    "half": None if _all_layers(model, entry, half) else in_half,
                    "inputs": list(how.input_names),
                    "outputs": list(how.output_names),
                }
                written = convert(self.name, f"{_CONVERTER}:convert", arguments)
                files += [f"{package}/{file}" for file in written]
                parameters[entry] = _places(program, made.tensors)
        artifact = Artifact(self.name, out, tuple(files), entries, {"parameters": parameters})
        self._check(model, artifact, target)
        return self._with_tables(artifact, shared)

    def _half(self, model: Model) -> dict[str, FloatCast]:
        from featherweight.formats import FloatCast

        chosen = {name: chain[-1] for name, chain in model.formats.items()}
        return {name: fmt for name, fmt in chosen.items() if isinstance(fmt, FloatCast)}

    def _system(self, model: Model, target: Target) -> str:
        """The oldest systems that know all operators, or what the user asks for."""
        for name in target.options:
            if name != _SYSTEM:
                raise TargetError(f"{self.name} has no option '{name}'", fix=nearest(name, [_SYSTEM]))
        needed = "iOS18" if any(chain[-1].width == 4 for chain in model.formats.values()) else "iOS17"
        asked = str(target.options.get(_SYSTEM, needed))
        if asked not in _SYSTEMS or asked < needed:
            raise TargetError(
                f"{self.name} cannot write this model for '{asked}'",
                fix=f"{_SYSTEM}: {needed}"
                + (", since iOS 17 has no 4-bit weights" if asked < needed else ""),
            )
        return asked

    def _check_groups(self, model: Model) -> None:
        from featherweight.formats import PerGroup

        for name, chain in model.formats.items():
            shared = getattr(chain[-1], "granularity", None)
            if isinstance(shared, PerGroup):
                size = model.parameters[name].shape[shared.axis]
                if size % shared.size:
                    raise TargetError(
                        f"{self.name} cannot store '{name}' in groups of {shared.size}: it has {size} inputs",
                        fix="a group that divides the inputs, or exclude it under where",
                    )

    def _check(self, model: Model, artifact: Artifact, target: Target) -> None:
        """A weight that silently stayed float is the worst that can happen."""
        from featherweight.formats import FloatCast

        held = self.stored(artifact)
        for name, chain in model.formats.items():
            if name not in model.parameters:
                continue
            fmt: Any = self.realise(chain[-1], target, "weight")
            wanted = fmt.dtype if isinstance(fmt, FloatCast) else f"int{fmt.width}"
            if name not in held or held[name].dtype != wanted:
                seen = held[name].dtype if name in held else "something else"
                raise TargetError(
                    f"{self.name} stored '{name}' as {seen}, not as {wanted}",
                    fix="exclude it under where; fold batch norms first, if one stands behind it",
                )

    def _with_tables(self, artifact: Artifact, shared: Collection[str]) -> Artifact:
        """Told which weights are tables; the others (of recurrent layers, e.g.) are the same floats."""
        if not shared:
            return artifact
        held = self.stored(artifact)
        tables = [name for name in sorted(shared) if name in held and held[name].dtype.startswith("uint")]
        return replace(artifact, details={**artifact.details, "tables": tables})

    def open(self, artifact: Artifact, target: Target) -> Session:
        raise TargetError(
            f"{self.name}'s artifacts are {self.unmeasured}",
            fix="copy the .mlpackage to a Mac and run load.py there, or load.swift in an app",
        )

    def stored(self, artifact: Artifact) -> Mapping[str, Stored]:
        found: dict[str, Stored] = {}
        for entry, manifest in artifact.entries.items():
            where = str((artifact.folder / manifest).resolve().parent)
            seen = convert(self.name, f"{_CONVERTER}:stored", {"package": where})
            for name, parameter in artifact.details["parameters"][entry].items():
                held = seen.get(name) or seen.get(f"{name}_to_fp16")
                if held is not None and parameter not in found:
                    found[parameter] = Stored(parameter, held["dtype"], held["bytes"])
        return found

    def loaders(self, artifact: Artifact, target: Target, signature: Signature) -> Mapping[str, str]:
        from featherweight.runtimes._coreml_loaders import load_py, load_swift

        package = Path(artifact.entries[signature.entry]).parts[0]
        return {"load.py": load_py(package, signature), "load.swift": load_swift(package, signature)}


PLUGIN = CoreML


def _tables(model: Model) -> frozenset[str]:
    """Weights that are stored as one table and codes; those of several tables or scales are floats."""
    from featherweight.formats import Palette

    found = set()
    for name, chain in model.formats.items():
        fmt = chain[-1]
        if isinstance(fmt, Palette) and not fmt.group and (fmt.scale is None or not fmt.scale.dim()):
            found.add(name)
    return frozenset(found)


def _all_layers(model: Model, entry: str, half: Mapping[str, FloatCast]) -> bool:
    """Whether every layer with a weight has it in half precision."""
    from featherweight.graph import trace

    weights = {
        node.parameters["weight"]
        for node in trace(model, entry)
        if node.op in _WEIGHTED and "weight" in node.parameters
    }
    return bool(weights) and weights <= set(half)


def _places(program: Any, tensors: Mapping[str, str]) -> dict[str, str]:
    """Constant in the ML Program -> parameter, the surest names first.

    Buffers go by their placeholders and integers by who dequantizes them; a weight into which a batch norm
    was folded by the layer, which then has the batch norm's name.
    """
    buffers = program.graph_signature.inputs_to_buffers
    places: dict[str, str] = {}
    layers: dict[str, str] = {}
    for node in program.graph.nodes:
        parameter = tensors.get(buffers.get(node.name, ""))
        if parameter is None:
            continue
        places[node.name] = parameter
        for reader in node.users:
            if "dequantize" in str(reader.target) and reader.args[0] is node:
                places[reader.name] = parameter
            elif len(reader.args) > 1 and reader.args[1] is node:
                behind = [user.name for user in reader.users if "batch_norm" in str(user.target)]
                layers |= dict.fromkeys((f"{name}.weight" for name in behind), parameter)
    return {**places, **layers}
