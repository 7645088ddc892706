"""Transformers and recurrent networks on OpenVINO: products rounded at each call, tables, LSTM and GRU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from featherweight.data import Data
from featherweight.errors import TargetError
from featherweight.formats import Dynamic, IntQuant, PerChannel, PerTensor
from featherweight.methods.quantize import Quantize
from featherweight.model import Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact
from featherweight.tools.simulate import simulate
from golden import context, decibels, target
from language_nets import encoder, ids, recurrent, sequences

HERE = target("openvino")
RUNTIME = find_runtime("openvino")
if not RUNTIME.installed():
    pytest.skip("runtime 'openvino' is not installed", allow_module_level=True)


def quantized(net: Model, x: np.ndarray, folder: Path, **settings: object) -> tuple[Model, Artifact]:
    changed = Quantize.model_validate(settings).apply(net, context(net, Data.of(x_train=x), HERE))
    return changed, RUNTIME.lower(changed, HERE, folder)


def parity(changed: Model, artifact: Artifact, x: np.ndarray) -> float:
    with torch.no_grad():
        (wanted,) = simulate(changed)(torch.from_numpy(x))
    return decibels(wanted, RUNTIME.open(artifact, HERE)(x)[0])


def test_products_are_rounded_at_each_call(tmp_path: Path) -> None:
    changed, artifact = quantized(encoder(), ids(4), tmp_path, activations="dynamic")
    assert artifact.details["dynamic"]
    assert parity(changed, artifact, ids(3)) >= 35  # its ranges are those of 128 inputs, not of a token
    text = RUNTIME.loaders(artifact, HERE, _signature())["load.py"]
    assert "'DYNAMIC_QUANTIZATION_GROUP_SIZE': 128" in text


def _signature() -> object:
    from featherweight.runtime import Signature

    return Signature((("x", "int64", (1, 11)),), ("y",))


@pytest.mark.parametrize("width", [4, 8])
def test_tables(width: int, tmp_path: Path) -> None:
    changed, artifact = quantized(
        encoder(),
        ids(4),
        tmp_path,
        weights=f"int{width}",
        activations="none",
        granularity="per_group",
        group=16,
    )
    assert "dynamic" not in artifact.details
    assert parity(changed, artifact, ids(3)) >= 60
    assert RUNTIME.stored(artifact)["table.weight"].dtype == f"int{width}"


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("both", [False, True])
def test_recurrent_weights(kind: str, both: bool, tmp_path: Path) -> None:
    net = recurrent(kind, both)
    changed, artifact = quantized(net, sequences(4), tmp_path, activations="none")
    assert parity(changed, artifact, sequences(3)) >= 60
    stored = RUNTIME.stored(artifact)
    names = [name for name in net.parameters if name.startswith("layers.weight")]
    assert {stored[name].dtype for name in names} == {"int8"}
    assert sum(stored[name].bytes for name in names) == sum(net.parameters[name].numel() for name in names)


def test_recurrent_weights_beside_static_activations_are_refused(tmp_path: Path) -> None:
    net = recurrent("LSTM", False)
    rows = net.parameters["layers.weight_hh_l0"].detach().abs().amax(1)
    weight = IntQuant(-rows, rows, 8, True, PerChannel(0))
    one = torch.tensor(1.0)
    formats = {"layers.weight_hh_l0": (weight,), "input:x": (IntQuant(-one, one, 8, False, PerTensor()),)}
    with pytest.raises(TargetError, match="beside static activations"):
        RUNTIME.lower(net.evolve(formats=formats), HERE, tmp_path)
    assert not RUNTIME.supports("lstm", weight, formats["input:x"][0], HERE)
    assert not RUNTIME.supports("lstm", weight, Dynamic(8), HERE)
    assert RUNTIME.supports("lstm", weight, None, HERE)
