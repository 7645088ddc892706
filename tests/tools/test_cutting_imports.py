"""Cutting what comes from files: ONNX graphs, Keras, transformers with several entries."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import golden
from featherweight.exchange.load import load_model
from featherweight.model import Model, Unroll, decode_edit, encode_edit
from featherweight.plugins import find_runtime
from featherweight.tools.channels import channel_groups
from featherweight.tools.cutting import cut, cuttable


def _outputs(model: Model) -> list[Tensor]:
    found: list[Tensor] = []
    for entry in model.entries.values():
        with torch.no_grad():
            made = getattr(model.module, entry.method)(*entry.arguments(entry.example_inputs))
        found += [one for one in torch.utils._pytree.tree_leaves(made) if isinstance(one, Tensor)]
    return found


def _check(model: Model, folder: Path) -> Model:
    """A third of every group goes; what is left equals zeros, is rebuilt, and runs on ONNX Runtime."""
    channels = cuttable(model, channel_groups(model))
    assert channels.groups
    drop = {name: list(range(max(1, group.size // 3))) for name, group in channels.groups.items()}
    done = cut(model, channels, drop)
    edits = tuple(decode_edit(json.loads(json.dumps(encode_edit(edit)))) for edit in done.edits)
    ours = _outputs(done)
    rebuilt = model.evolve(module=model.rebuild(edits, done.module.state_dict()))
    assert all(map(torch.equal, _outputs(rebuilt), ours))

    zeroed = model.evolve(module=model.copy_module())
    tensors = dict(zeroed.module.named_parameters()) | dict(zeroed.module.named_buffers())
    for name, gone in drop.items():
        for member in channels.groups[name].members:
            indices = sorted({index for channel in gone for index in member.indices[channel]})
            tensors[member.tensor].detach().index_fill_(member.axis, torch.tensor(indices), 0)
    for one, other in zip(ours, _outputs(zeroed), strict=True):
        assert golden.decibels(other, one) > 80

    runtime, target = find_runtime("onnxruntime"), golden.target()
    folder.mkdir()
    artifact = runtime.lower(done, target, folder)
    opened = runtime.open(artifact, target)
    seen = [
        one
        for name, entry in done.entries.items()
        for one in opened(*(value.numpy() for value in entry.example_inputs), entry=name)
    ]
    for one, other in zip(ours, seen, strict=True):
        assert golden.decibels(one, other) > 80
    return done


@pytest.mark.parametrize("name", ["shuffle", "squeeze_excite", "lstm"])
def test_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    find_runtime("onnxruntime").lower(golden.model(name), golden.target(), tmp_path)
    done = _check(load_model(str(tmp_path / "model.onnx")), tmp_path / "again")
    assert any(isinstance(edit, Unroll) for edit in done.edits) == (name != "squeeze_excite")


@pytest.mark.slow
def test_several_entries(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    model = load_model(str(tmp_path / "t5"))
    assert len(model.entries) == 3
    _check(model, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, when it saves
@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is not installed")
def test_keras(tmp_path: Path) -> None:
    from featherweight.exchange.keras_in.read import import_keras_package

    k = import_keras_package()
    given = k.Input((10, 16))
    x = k.layers.Add()([k.layers.MultiHeadAttention(4, 4)(given, given), given])
    x = k.layers.Conv1D(12, 3, padding="same", activation="gelu")(x)
    x = k.layers.GRU(8)(k.layers.Dense(9, activation="relu")(x))
    k.Model(given, k.layers.Dense(2)(x)).save(tmp_path / "net.keras")
    _check(load_model(str(tmp_path / "net.keras")), tmp_path / "out")
