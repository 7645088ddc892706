"""Residual blocks are found in graphs of every kind, and removed so that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import language_nets
from featherweight.errors import RecipeError
from featherweight.exchange.load import load_model
from featherweight.model import Bypass, Edit, Model, Remove, Replace, Unroll, decode_edit, encode_edit
from featherweight.plugins import find_runtime
from featherweight.tools import removal
from featherweight.tools.costs import totals
from featherweight.tools.cut_literals import MisfitError
from featherweight.tools.removal import removed
from featherweight.tools.residuals import residual_blocks
from golden import inputs, model, model_of, target


class Tuples(nn.Module):
    """A layer of two residual parts with a mask and a tuple, as transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, mask: Tensor, *, hidden: Tensor) -> tuple[Tensor, None]:
        hidden = hidden + self.mix(self.norm(hidden)) * mask
        return hidden + self.down(torch.relu(self.up(hidden))), None


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Tuples() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        mask = (x > 0).float()
        y = self.table(x)
        for layer in self.layers:
            y = layer(mask, hidden=y)[0]
        return self.head(y)


@cache
def stack() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_of(Stack(), torch.randn(2, 5, 8))


@cache
def imported(folder: Path) -> Model:
    place = folder / "onnx"
    place.mkdir()
    find_runtime("onnxruntime").lower(model("residual"), target(), place)
    return load_model(str(place / "model.onnx"))


NETS = {
    **{name: lambda name=name: model(name) for name in ("residual", "depthwise", "attention", "linear3d")},
    "squeeze_excite": lambda: model("squeeze_excite"),
    "encoder": language_nets.encoder,
    "stack": stack,
}


def same_modes(one: Model, two: Model) -> bool:
    return {layer.training for layer in one.module.modules()} == {
        layer.training for layer in two.module.modules()
    }


def described(net: Model) -> list[tuple[str, str]]:
    return [(block.source, block.result) for block in residual_blocks(net)]


class TestFound:
    def test_sub_modules_with_what_follows_the_addition(self) -> None:
        (block,) = residual_blocks(model("residual"))
        assert (block.name, block.path) == ("layer1", "layer1")
        assert (block.source, block.result) == ("stem.2#0:0", "layer1.relu#1:0")
        assert block.layers == ("layer1.conv1", "layer1.bn1", "layer1.conv2", "layer1.bn2")

    def test_strided_and_projected_blocks_stay(self) -> None:
        assert [block.path for block in residual_blocks(model("depthwise"))] == ["block1", "block3"]

    def test_parts_of_code(self) -> None:
        assert described(model("attention")) == [("/add#0:0", "/add#1:0"), ("/add#1:0", "/add#2:0")]
        assert all(not block.path for block in residual_blocks(model("attention")))

    def test_a_layer_of_several_parts_is_one_block(self) -> None:
        assert [block.path for block in residual_blocks(stack())] == ["layers.0", "layers.1", "layers.2"]

    def test_networks_without_skips_have_none(self) -> None:
        for name in ("concat", "shuffle", "shared", "lstm"):
            assert residual_blocks(model(name)) == []

    def test_a_position_that_is_added_is_no_block(self) -> None:
        assert all("/add#0" not in block.nodes for block in residual_blocks(model("attention")))

    def test_what_is_read_elsewhere_too_stays(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                inner = self.a(x)
                return torch.cat([x + self.b(inner), inner], -1)

        assert residual_blocks(model_of(Net(), torch.randn(2, 8))) == []

    def test_flat_networks_from_files(self, tmp_path: Path) -> None:
        (block,) = residual_blocks(imported(tmp_path))
        assert not block.path
        assert block.macs == residual_blocks(model("residual"))[0].macs


@pytest.mark.parametrize("name", NETS)
class TestRemoved:
    def test_macs_and_parameters_go_as_predicted(self, name: str) -> None:
        net = NETS[name]()
        blocks = residual_blocks(net)
        assert blocks
        before = totals(net)
        for block in blocks:
            after = totals(removed(net, block))
            assert before["macs"] - after["macs"] == block.macs
            assert before["params"] - after["params"] == block.params > 0

    def test_outputs_are_those_of_the_source_instead_of_the_result(self, name: str) -> None:
        net = NETS[name]()
        for block in residual_blocks(net):
            made = removed(net, block)
            x = net.entries["forward"].example_inputs[0]
            with torch.no_grad():
                assert made.module(x).shape == net.module(x).shape
                assert not torch.allclose(made.module(x), net.module(x), atol=1e-4)
            assert same_modes(made, net)

    def test_edits_rebuild_it(self, name: str) -> None:
        net = NETS[name]()
        for block in residual_blocks(net):
            made = removed(net, block)
            edits: tuple[Edit, ...] = tuple(decode_edit(encode_edit(edit)) for edit in made.edits)
            rebuilt = net.rebuild(edits, made.module.state_dict())
            x = net.entries["forward"].example_inputs[0]
            with torch.no_grad():
                assert torch.equal(rebuilt(x), made.module(x))

    def test_all_of_them_go_one_after_the_other(self, name: str) -> None:
        net = NETS[name]()
        for _ in residual_blocks(net):
            net = removed(net, residual_blocks(net)[0])
        assert residual_blocks(net) == []


def test_each_network_by_the_simplest_edit() -> None:
    def kinds(net: Model) -> list[type]:
        return [type(edit) for edit in removed(net, residual_blocks(net)[0]).edits]

    assert kinds(model("residual")) == [Remove]
    assert kinds(stack()) == [Replace]
    assert kinds(model("attention")) == [Unroll, Remove, Remove, Remove]


def test_a_layer_that_passes_an_argument_on() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    assert Bypass(1)(y, x) is x
    assert Bypass("hidden", 3)(y, hidden=x) == (x, None, None)


def test_a_flat_network_runs_without_its_block(tmp_path: Path) -> None:
    net = imported(tmp_path)
    (block,) = residual_blocks(net)
    made = removed(net, block)
    wanted = removed(model("residual"), residual_blocks(model("residual"))[0])
    x = inputs("residual", 3)
    with torch.no_grad():
        assert torch.allclose(made.module(torch.from_numpy(x)), wanted.module(torch.from_numpy(x)), atol=1e-4)
    (tmp_path / "lowered").mkdir()
    engine = find_runtime("onnxruntime")
    session = engine.open(engine.lower(made, target(), tmp_path / "lowered"), target())
    with torch.no_grad():
        expected = made.module(torch.from_numpy(x)).numpy()
    assert np.allclose(session(x)[0], expected, atol=1e-4)


def test_code_that_cannot_follow_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def misfit(*_: object) -> Unroll:
        raise MisfitError("", "", "its graph holds another graph")

    monkeypatch.setattr(removal, "unrolling", misfit)
    with pytest.raises(RecipeError, match="cannot be removed") as caught:
        removed(model("attention"), residual_blocks(model("attention"))[0])
    assert caught.value.fix == "exclude 'norm1' under where"
    (block,) = residual_blocks(model("residual"))
    with pytest.raises(RecipeError, match="computes something else"):
        removed(model("residual"), replace(block, path="layer1.conv2"))


class Called(nn.Module):
    """A transformer of the library, called with ids alone."""

    def __init__(self, inner: nn.Module, **settings: object) -> None:
        super().__init__()
        self.inner, self.settings = inner, settings

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(input_ids=ids, **self.settings)[0]


SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TRANSFORMERS = {
    "Bert": ("inner.encoder.layer", {**SMALL, "intermediate_size": 64}, {}),
    "Llama": ("inner.layers", {**SMALL, "intermediate_size": 64}, {"use_cache": False}),
    "DistilBert": (
        "inner.transformer.layer",
        {"vocab_size": 60, "dim": 32, "n_layers": 2, "hidden_dim": 64, "n_heads": 4},
        {},
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_layers_of_transformers_go_whole(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path, config, settings = TRANSFORMERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))
    net = model_of(Called(inner, **settings), torch.arange(20).reshape(2, 10))
    found = residual_blocks(net)
    assert [block.path for block in found] == [f"{path}.0", f"{path}.1"]
    made = removed(net, found[0])
    assert [type(edit) for edit in made.edits] == [Replace]
    assert totals(net)["macs"] - totals(made)["macs"] == found[0].macs
    engine = find_runtime("onnxruntime")
    session = engine.open(engine.lower(made, target(), tmp_path), target())
    ids = np.arange(30, dtype=np.int64).reshape(3, 10)
    with torch.no_grad():
        wanted = made.module(torch.from_numpy(ids)).numpy()
    assert np.allclose(session(ids)[0], wanted, atol=1e-4)
