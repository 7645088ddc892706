"""Cutting channels: the module follows, computes what zeroed channels would, and is rebuilt from data."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import golden
import language_nets
from featherweight.engine.run import _read_model, write_model
from featherweight.errors import RecipeError
from featherweight.exchange.key import root_key
from featherweight.formats import IntQuant
from featherweight.graph import trace
from featherweight.model import Cut, Model, SetAttr, Unroll, decode_edit, encode_edit
from featherweight.plugins import find_runtime
from featherweight.tools.channels import channel_groups
from featherweight.tools.cutting import cut, cuttable
from featherweight.tools.groups import ChannelGroup, Channels, Member, Place
from featherweight.unrolled import Unrolled
from nets import NETS

_OVER_CHANNELS = ("layer_norm", "rms_norm", "group_norm")  # they mix channels: zeros are not absence


def _model(name: str) -> Model:
    if name == "encoder":
        return language_nets.encoder()
    if name in ("LSTM", "GRU", "LSTM both", "GRU both"):
        return language_nets.recurrent(name.split()[0], "both" in name)
    return golden.model(name)


ALL = [*NETS, "encoder", "LSTM", "GRU", "LSTM both", "GRU both"]


def _random(groups: Mapping[str, ChannelGroup], seed: int) -> dict[str, list[int]]:
    """Random channels of random groups; at least one group loses some."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in groups if torch.rand((), generator=generator) < 0.6] or list(groups)[:1]
    drop = {}
    for name in names:
        count = int(torch.randint(1, groups[name].size, (), generator=generator))
        drop[name] = torch.randperm(groups[name].size, generator=generator)[:count].tolist()
    return drop


def _outputs(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        made = module(*inputs)
    return list(made) if isinstance(made, tuple) else [made]


def _rebuilt(model: Model, done: Model) -> nn.Module:
    edits = tuple(decode_edit(json.loads(json.dumps(encode_edit(edit)))) for edit in done.edits)
    return model.rebuild(edits, done.module.state_dict())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_random_channels_go(name: str, seed: int) -> None:
    model = _model(name)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    channels = cuttable(model, channel_groups(model))
    drop = _random(channels.groups, seed)
    done = cut(model, channels, drop)
    x = model.entries["forward"].example_inputs
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())
    assert sum(p.numel() for p in done.module.parameters()) < sum(
        p.numel() for p in model.module.parameters()
    )
    ours, theirs = _outputs(done.module, *x), _outputs(model.module, *x)
    assert [one.shape for one in ours] == [one.shape for one in theirs]
    assert all(map(torch.equal, _outputs(_rebuilt(model, done), *x), ours))
    more = tuple(torch.cat([one, one, one[:1]]) for one in x)  # the batch is still free
    assert torch.allclose(_outputs(done.module, *more)[0][:2], ours[0], atol=1e-4)
    calls = {node.name: node.op for node in trace(model) if node.parameters and "#" in node.name}
    now = {node.name: node.op for node in trace(done)}
    assert {key: now.get(key) for key in calls} == calls


@pytest.mark.parametrize("name", ALL)
def test_an_artifact_of_what_is_left_agrees(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = _model(name)
    channels = cuttable(model, channel_groups(model))
    done = cut(
        model,
        channels,
        {key: [0, group.size // 2][: group.size - 1] for key, group in channels.groups.items()},
    )
    runtime = find_runtime("onnxruntime")
    target = golden.target()
    artifact = runtime.lower(done, target, tmp_path)
    entry = done.entries["forward"]
    x = tuple(torch.cat([one, one.flip(0)[:1]]) for one in entry.example_inputs)
    seen = runtime.open(artifact, target)(*(one.numpy() for one in x))
    for one, other in zip(_outputs(done.module, *x), seen, strict=True):
        assert golden.decibels(one, other) > 80


@pytest.mark.parametrize("name", sorted(set(ALL) - {"linear3d"}))  # all of its groups are under a norm
def test_cutting_is_zeroing(name: str) -> None:
    """Exact for groups that no norm over channels touches."""
    model = _model(name)
    channels = cuttable(model, channel_groups(model))
    ops = {node.layer: node.op for node in trace(model)}
    plain = {
        key: group
        for key, group in channels.groups.items()
        if not any(ops.get(member.layer) in _OVER_CHANNELS for member in group.members)
    }
    drop = _random(plain, 5)
    assert drop
    module = model.copy_module()
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for key, gone in drop.items():
            for member in plain[key].members:
                indices = sorted({index for channel in gone for index in member.indices[channel]})
                tensors[member.tensor].index_fill_(member.axis, torch.tensor(indices), 0)
    x = model.entries["forward"].example_inputs
    ours, zeroed = _outputs(cut(model, channels, drop).module, *x), _outputs(module, *x)
    for one, other in zip(ours, zeroed, strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-4)


class Heads(nn.Module):
    """Attention whose sizes are settings."""

    def __init__(self, literal: bool = False) -> None:
        super().__init__()
        self.heads, self.head_dim, self.literal = 4, 6, literal
        self.first = nn.Linear(10, 20)
        self.norm = nn.BatchNorm1d(20)
        self.drop = nn.Dropout(0.5)
        self.q, self.k, self.v = (nn.Linear(20, 24) for _ in range(3))
        self.last = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(F.relu(self.norm(self.first(x).transpose(1, 2)).transpose(1, 2)))
        n, t, _ = y.shape
        heads, size = (4, 6) if self.literal else (self.heads, self.head_dim)
        q, k, v = (layer(y).view(n, t, heads, size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(2, 3) / 6**0.5).softmax(-1) @ v
        return self.last(mixed.transpose(1, 2).reshape(n, t, heads * size))


@pytest.fixture(scope="module")
def heads() -> tuple[Model, Channels]:
    return _grouped(Heads())


@pytest.fixture(scope="module")
def literal() -> tuple[Model, Channels]:
    return _grouped(Heads(literal=True))


def _grouped(module: nn.Module) -> tuple[Model, Channels]:
    module.first.bias.requires_grad_(False)
    model = golden.model_of(module, torch.randn(2, 7, 10))
    return model, cuttable(model, channel_groups(model))


def _of_kind(channels: Channels, kind: str) -> str:
    return next(name for name, group in channels.groups.items() if group.kind == kind)


class TestWhatFollows:
    def test_numbers_of_users_code(self, heads: tuple[Model, Channels]) -> None:
        model, channels = heads
        done = cut(model, channels, {_of_kind(channels, "head"): [1]})
        assert isinstance(done.module, Heads)
        assert (done.module.heads, done.module.head_dim) == (3, 6)
        assert done.module.q.weight.shape == (18, 20)
        sizes = [name for name, group in channels.groups.items() if group.kind == "head_dim"]
        again = cut(model, channels, {name: [0, 5] for name in sizes})
        assert (again.module.heads, again.module.head_dim) == (4, 4)
        assert (model.module.heads, model.module.head_dim) == (4, 6)

    def test_code_becomes_data_when_sizes_are_written_into_it(self, literal: tuple[Model, Channels]) -> None:
        model, channels = literal
        done = cut(model, channels, {_of_kind(channels, "head"): [1, 2], "first": [3]})
        assert isinstance(done.module, Unrolled)
        assert [type(edit) for edit in done.edits[:2]] == [Unroll, Cut]
        x = torch.randn(3, 7, 10)
        assert torch.equal(_rebuilt(model, done)(x), done.module(x))
        assert torch.equal(copy.deepcopy(done.module)(x), done.module(x))
        assert torch.equal(pickle.loads(pickle.dumps(done.module))(x), done.module(x))  # for processes
        assert list(done.module.state_dict()) == list(model.module.state_dict())
        assert not done.module.first.bias.requires_grad
        assert done.module.first.weight.requires_grad
        assert {node.name for node in trace(done)} == {node.name for node in trace(model)}

    def test_what_became_data_trains(self, literal: tuple[Model, Channels]) -> None:
        model, channels = literal
        module = cut(model, channels, {_of_kind(channels, "head"): [0]}).module
        assert not module.training
        mean = module.norm.running_mean.clone()
        x = torch.randn(3, 7, 10)
        assert torch.equal(module(x), module(x))
        module.train()
        module(x).square().sum().backward()
        assert not torch.equal(module(x), module(x))  # dropout
        assert not torch.equal(module.norm.running_mean, mean)
        assert module.q.weight.grad is not None

    def test_what_became_data_is_cut_again(self, literal: tuple[Model, Channels]) -> None:
        model, channels = literal
        once = cut(model, channels, {_of_kind(channels, "head"): [0]})
        groups = cuttable(once, channel_groups(once))
        twice = cut(once, groups, {_of_kind(groups, "head"): [1], "first": [0, 1]})
        assert twice.module.q.weight.shape == (12, 18)
        x = torch.randn(3, 7, 10)
        assert torch.equal(_rebuilt(model, twice)(x), twice.module(x))

    def test_settings_of_layers(self) -> None:
        model = golden.model("depthwise")
        channels = channel_groups(model)
        done = cut(model, channels, {"block1.expand.0": [0, 7]})
        conv = done.module.get_submodule("block1.depthwise.0")
        assert (conv.in_channels, conv.out_channels, conv.groups) == (22, 22, 22)
        assert done.module.get_submodule("block1.depthwise.1").num_features == 22
        assert SetAttr("block1.depthwise.0", "groups", 22) in done.edits

    def test_recurrent_layers_train_after_it(self) -> None:
        model = golden.model("lstm")
        channels = channel_groups(model)
        done = cut(model, channels, {"lstm": [0, 3]})
        module = _rebuilt(model, done)
        assert module.lstm.hidden_size == 14
        module.train()
        module(torch.randn(2, 7, 12)).sum().backward()
        assert module.lstm.weight_hh_l1.grad.shape == (56, 14)

    def test_the_store_keeps_it(self, literal: tuple[Model, Channels], tmp_path: Path) -> None:
        model, channels = literal
        done = cut(model, channels, {_of_kind(channels, "head"): [0]})
        write_model(tmp_path, done)
        read = _read_model(tmp_path, model, "key")
        x = torch.randn(3, 7, 10)
        assert torch.equal(read.module(x), done.module(x))
        assert root_key(read.module, read.entries) == root_key(done.module, done.entries)
        assert root_key(read.module, read.entries) != root_key(model.module, model.entries)


class TestRefuses:
    def test_a_group_without_channels(self) -> None:
        model = golden.model("residual")
        channels = channel_groups(model)
        with pytest.raises(RecipeError, match=r"'stem\.0' would lose its last channel"):
            cut(model, channels, {"stem.0": range(8)})

    def test_channels_and_groups_that_are_not_there(self) -> None:
        model = golden.model("residual")
        channels = channel_groups(model)
        with pytest.raises(RecipeError, match="no channel group 'stem'"):
            cut(model, channels, {"stem": [0]})
        with pytest.raises(RecipeError, match="no channel 8, but 0 to 7"):
            cut(model, channels, {"stem.0": [8]})

    def test_formats(self) -> None:
        model = golden.model("residual")
        channels = channel_groups(model)
        formatted = model.evolve(formats={"head.weight": (IntQuant(torch.tensor(-1.0), torch.tensor(1.0)),)})
        with pytest.raises(RecipeError, match="formats"):
            cut(formatted, channels, {"stem.0": [0]})

    def test_an_output_that_would_change(self) -> None:
        model = golden.model("residual")
        single = tuple((index,) for index in range(10))
        group = ChannelGroup(
            "head",
            "channel",
            10,
            (
                Member("head.weight", 0, single, "writes", "head", "head#0"),
                Member("head.bias", 0, single, "writes", "head", "head#0"),
            ),
            {"forward": (Place("head#0:0", 1, single),)},
        )
        channels = Channels({"head": group})
        with pytest.raises(RecipeError, match="output of the network would change"):
            cut(model, channels, {"head": [0]})
        left = cuttable(model, channels)
        assert not left.groups
        assert "output" in left.fixed["head"]

    def test_groups_that_do_not_fit_the_calls(self) -> None:
        model = golden.model("residual")
        groups = channel_groups(model).groups
        wrong = replace(
            groups["layer1.conv1"],
            members=tuple(
                one for one in groups["layer1.conv1"].members if one.tensor != "layer1.conv2.weight"
            ),
        )
        channels = Channels({"layer1.conv1": wrong})
        with pytest.raises(RecipeError, match="channels cannot be removed") as caught:
            cut(model, channels, {"layer1.conv1": [0]})
        assert caught.value.where == "'layer1.conv2#0'"
        assert "layer1.conv2#0" in cuttable(model, channels).fixed["layer1.conv1"]


def test_nothing_to_drop_is_the_same_model() -> None:
    model = golden.model("residual")
    assert cut(model, channel_groups(model), {"stem.0": []}) is model
