"""PyTorch itself: the reference, and the simulation of formats as a file that runs.

The artifact is an exported program in which formatted tensors are projected. Its
quality is what the formats do to the model (simulated); its bytes and latency are
those of float PyTorch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import TargetError
from featherweight.runtime import Artifact, Role, Runtime, Session, Signature, Stored, Target

if TYPE_CHECKING:
    from featherweight.formats import TensorFormat
    from featherweight.model import Model


class Torch(Runtime):
    """Float PyTorch; formats are simulated."""

    extra = "torch"
    packages = ("torch",)
    module = "torch"
    float_outputs = frozenset({"conv1d", "conv2d", "conv3d", "linear", "matmul", "bmm", "add", "mul"})

    def supports(
        self, op: str, weight: TensorFormat | None, activation: TensorFormat | None, target: Target
    ) -> bool:
        return True

    def realise(self, fmt: TensorFormat, target: Target, role: Role) -> TensorFormat:
        from featherweight.formats import IntQuant

        return replace(fmt, signed=role == "weight") if isinstance(fmt, IntQuant) else fmt

    def lower(self, model: Model, target: Target, out: Path) -> Artifact:
        import torch

        from featherweight.exchange.opaque import opaque_layers
        from featherweight.tools.palettes import in_floats

        model = in_floats(model)
        if opaque := opaque_layers(model.module):
            raise TargetError(
                f"torch cannot run '{next(iter(opaque))}', which only ONNX Runtime has a kernel for",
                fix="lower for onnxruntime",
            )
        files: dict[str, str] = {}
        for entry in model.entries:
            files[entry] = "model.pt2" if entry == "forward" else f"model.{entry}.pt2"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.export warns of its own internals
                torch.export.save(_program(model, entry), out / files[entry])
        return Artifact(self.name, out, tuple(files.values()), files)

    def open(self, artifact: Artifact, target: Target) -> Session:
        return _Session(artifact, target)

    def stored(self, artifact: Artifact) -> Mapping[str, Stored]:
        import torch

        tensors = {
            name.removeprefix("module."): tensor
            for file in artifact.files
            for name, tensor in torch.export.load(artifact.folder / file).state_dict.items()
        }
        return {
            name: Stored(
                name, str(tensor.dtype).removeprefix("torch."), tensor.numel() * tensor.element_size()
            )
            for name, tensor in tensors.items()
        }

    def loaders(self, artifact: Artifact, target: Target, signature: Signature) -> Mapping[str, str]:
        file = artifact.entries[signature.entry]
        zeros = ", ".join(
            f"torch.zeros({shape!r}, dtype=torch.{kind})" for _, kind, shape in signature.inputs
        )
        lines = [
            f'"""Runs {file} with PyTorch, in which the formats are simulated."""',
            "from pathlib import Path",
            "",
            "import torch",
            "",
            f"torch.set_num_threads({target.threads})",
            f"model = torch.export.load(Path(__file__).with_name({file!r})).module(check_guards=False)",
            "with torch.inference_mode():",
            f"    outputs = model({zeros})",
            "print(*(tuple(output.shape) for output in outputs))",
        ]
        return {"load.py": "\n".join(lines) + "\n"}


PLUGIN = Torch


def _program(model: Model, entry: str) -> Any:
    """The entry as an exported program in which formats are arithmetic, and parameters keep their names."""
    import torch
    from torch import Tensor, nn

    from featherweight.tools.simulate import projected_parameters, simulate

    how = model.entries[entry]
    stored = model.copy_module()
    parameters = dict(stored.named_parameters())
    with torch.no_grad():
        for name, value in projected_parameters(model).items():
            parameters[name].copy_(value)
    formats = {name: chain for name, chain in model.formats.items() if name not in parameters}
    run = simulate(replace(model, module=stored, formats=formats), entry)

    class Simulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = stored

        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return run(*inputs)

    dims = tuple(
        dict.fromkeys(how.dynamic_axes.get(name, {}), torch.export.Dim.AUTO) or None
        for name in how.input_names
    )
    examples = tuple(
        torch.zeros_like(x) for x in how.example_inputs
    )  # they are saved: none of the user's data
    with torch.no_grad():
        run(*examples)  # formats settle their scales on real tensors, before the tracer's fake ones
        return torch.export.export(Simulated(), examples, dynamic_shapes=(dims,), strict=False)


class _Session:
    def __init__(self, artifact: Artifact, target: Target) -> None:
        import torch

        torch.set_num_threads(target.threads)
        self._modules = {
            entry: torch.export.load(artifact.folder / file).module(check_guards=False)
            for entry, file in artifact.entries.items()
        }

    def __call__(self, *inputs: np.ndarray, entry: str = "forward") -> tuple[np.ndarray, ...]:
        import torch

        with torch.inference_mode():
            outputs = self._modules[entry](
                *(torch.from_numpy(np.require(x, requirements=["C", "W"])) for x in inputs)
            )
        return tuple(output.numpy() for output in outputs)
