"""The runtime torch: a file that does what the simulation says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import Lowered
from featherweight.formats import IntQuant
from featherweight.model import Entry, Model
from featherweight.plugins import find_runtime
from featherweight.tools.simulate import simulate
from golden import decibels, inputs, model, model_of, quantized, target
from nets import NETS

RUNTIME = find_runtime("torch")
HERE = target("torch")


@pytest.mark.parametrize("name", NETS)
def test_the_artifact_is_the_simulation(name: str, lowered: Lowered) -> None:
    session = RUNTIME.open(lowered("torch", name, "int8"), HERE)
    for batch in (1, 3):
        x = inputs(name, batch)
        (seen,) = session(x)
        with torch.no_grad():
            (wanted,) = simulate(quantized(name, "torch"))(torch.from_numpy(x))
            exact = model(name).module(torch.from_numpy(x))
        np.testing.assert_allclose(seen, wanted.numpy(), rtol=1e-4, atol=1e-5)
        assert decibels(exact, seen) < 100  # the formats are really in the file


@pytest.mark.parametrize("name", ["residual", "shared", "lstm"])
def test_every_parameter_is_stored_by_its_name(name: str, lowered: Lowered) -> None:
    stored = RUNTIME.stored(lowered("torch", name, "float"))
    for parameter, tensor in model(name).parameters.items():
        assert stored[parameter].dtype == "float32"
        assert stored[parameter].bytes == 4 * tensor.numel()


def test_the_file_holds_none_of_the_users_examples(lowered: Lowered) -> None:
    artifact = lowered("torch", "shared", "int8")
    program = torch.export.load(artifact.folder / artifact.files[0])
    assert not any(tensor.any() for tensor in program.example_inputs[0])
    example = model("shared").entries["forward"].example_inputs[0]
    assert example.any()
    assert example.flatten()[:4].numpy().tobytes() not in (artifact.folder / artifact.files[0]).read_bytes()


def test_formats_are_arithmetic_in_the_file(tmp_path: Path) -> None:
    coarse = IntQuant(torch.tensor(-1.0), torch.tensor(1.0), 2)
    net = model_of(nn.Linear(4, 3), torch.randn(2, 4)).evolve(
        formats={"weight": (coarse,), "#0:0": (coarse,), "input:x": (coarse,)}
    )
    artifact = RUNTIME.lower(net, HERE, tmp_path)
    x = torch.randn(5, 4)
    with torch.no_grad():
        (wanted,) = simulate(net)(x)
    (seen,) = RUNTIME.open(artifact, HERE)(x.numpy())
    np.testing.assert_allclose(seen, wanted.numpy(), atol=1e-6)


def test_several_inputs_entries_and_outputs(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x) + y, x

        def encode(self, x: Tensor) -> Tensor:
            return self.layer(x)

    x, y = torch.randn(2, 4), torch.randn(2, 4)
    axes = {"x": {0: "n"}, "y": {0: "n"}}
    entries = {
        "forward": Entry((x, y), ("x", "y"), ("a", "b"), axes),
        "encode": Entry((x,), ("x",), ("a",), {"x": {0: "n"}}, "encode"),
    }
    net = Model(Net().eval(), entries)
    artifact = RUNTIME.lower(net, HERE, tmp_path)
    assert artifact.entries == {"forward": "model.pt2", "encode": "model.encode.pt2"}
    session = RUNTIME.open(artifact, HERE)
    one, two = torch.randn(7, 4), torch.randn(7, 4)
    with torch.no_grad():
        for seen, wanted in zip(session(one.numpy(), two.numpy()), net.module(one, two), strict=True):
            np.testing.assert_allclose(seen, wanted.numpy(), atol=1e-6)
        (seen,) = session(one.numpy(), entry="encode")
        np.testing.assert_allclose(seen, net.module.encode(one).numpy(), atol=1e-6)


def test_everything_is_supported_and_realised() -> None:
    fmt = IntQuant(torch.tensor(-1.0), torch.tensor(1.0), 3)
    assert RUNTIME.supports("conv3d", fmt, fmt, HERE)
    assert RUNTIME.realise(fmt, HERE, "weight").signed  # type: ignore[attr-defined]
    assert not RUNTIME.realise(fmt, HERE, "activation").signed  # type: ignore[attr-defined]
