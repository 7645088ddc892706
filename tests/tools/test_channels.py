"""Channel groups: what goes together in every shape of network, and that nothing else has to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import golden
import language_nets
from channel_oracle import check, random_drop
from featherweight.graph import trace
from featherweight.model import Entry, Model
from featherweight.tools.channels import channel_groups
from featherweight.tools.groups import ChannelGroup, Channels
from nets import CHANNEL_NETS, NETS

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


def net(name: str) -> Model:
    if name == "encoder":
        return language_nets.encoder()
    if name in NETS:
        return golden.model(name)
    module, example = CHANNEL_NETS[name]()
    return golden.model_of(module, example)


ALL = (*NETS, *CHANNEL_NETS, "encoder")


EXPECTED: dict[str, dict[str, str]] = {
    "residual": {
        "stem.0": "8 channel",
        "layer1.conv1": "8 channel",
        "layer2.conv1": "16 channel",
        "layer2.conv2": "16 channel",
    },
    "depthwise": {
        "stem.0": "8 channel",
        "block1.expand.0": "24 channel",
        "block2.expand.0": "24 channel",
        "block2.project.0": "16 channel",
        "block3.expand.0": "48 channel",
        "last.0": "32 channel",
    },
    "concat": {
        "stem": "8 channel",
        "convs.0": "6 channel",
        "convs.1": "6 channel",
        "convs.2": "6 channel",
        "transition.2": "12 channel",
    },
    "shuffle": {"stem.0": "4 channel", "unit1.branch.0": "8 channel", "unit2.branch.0": "8 channel"},
    "shared": {"stem.0": "12 channel"},
    "attention": {
        "embed": "32 channel",
        "qkv:head": "4 head",
        "qkv:head_dim": "8 head_dim",
        "fc1": "64 channel",
    },
    "linear3d": {"fc1": "24 channel"},
    "lstm": {"lstm": "16 hidden"},
    "squeeze_excite": {"stem.0": "12 channel", "reduce": "4 channel"},
    "transposed": {
        "down.0": "12 channel",
        "up:group": "2 group",
        "up": "4 channel",
        "grouped": "6 channel",
    },
    "split": {
        "stem": "8 channel",
        "inner": "8 channel",
        "merge": "4 channel",
        "merge:2": "10 channel",
        "small": "6 channel",
    },
    "separate_attention": {
        "embed": "16 channel",
        "q:head": "4 head",
        "q:head_dim": "8 head_dim",
        "v:head_dim": "8 head_dim",
        "gate": "24 channel",
    },
    "grouped_query": {
        "embed": "16 channel",
        "q:head": "2 head",
        "q:head_dim": "8 head_dim",
        "v:head_dim": "8 head_dim",
        "gate": "24 channel",
    },
    "grouped": {
        "stem:group": "4 group",
        "stem": "4 channel",
        "grouped": "6 channel",
        "merge": "8 channel",
    },
    "flattened": {"conv1": "6 channel", "conv2": "8 channel", "fc": "20 channel"},
    "multihead": {
        "embed": "16 channel",
        "layer.self_attn:head": "4 head",
        "layer.self_attn:head_dim": "4 head_dim",
        "layer.linear1": "24 channel",
        "attention:head": "2 head",
        "attention:head_dim": "8 head_dim",
    },
    "gru": {"gru": "8 hidden", "fc": "14 channel"},
    "projected": {"lstm": "16 hidden", "lstm:2": "6 hidden"},
    "padded": {"stem": "8 channel", "conv1": "12 channel"},
    "super_resolution": {"space": "6 channel", "squeeze": "8 channel", "shuffled": "6 channel"},
    "encoder": {
        "table:head": "2 head",
        "table:head_dim": "24 head_dim",
        "q:head_dim": "24 head_dim",
        "fc1": "96 channel",
    },
}


def indices(group: ChannelGroup, tensor: str, axis: int, channel: int) -> tuple[int, ...]:
    """What goes of one axis with one channel; () where the group is not on it."""
    found = [member for member in group.members if (member.tensor, member.axis) == (tensor, axis)]
    return found[0].indices[channel] if found else ()


# ---- which groups there are


@pytest.mark.parametrize("name", ALL)
def test_the_groups_of_every_net(name: str) -> None:
    channels = channel_groups(net(name))
    assert {key: f"{group.size} {group.kind}" for key, group in channels.groups.items()} == EXPECTED[name]
    assert list(channels.groups) == list(EXPECTED[name])
    assert list(channels.fixed) == [{"transposed": "head", "super_resolution": "last"}.get(name, "head")]


@pytest.mark.parametrize("name", ALL)
def test_members_name_indices_that_exist_and_channels_do_not_share_them(name: str) -> None:
    model = net(name)
    tensors = dict(model.module.named_parameters()) | dict(model.module.named_buffers())
    for group in channel_groups(model).groups.values():
        assert group.of("writes")
        for member in group.members:
            assert len(member.indices) == group.size
            every = [index for one in member.indices for index in one]
            assert len(every) == len(set(every))
            assert all(0 <= index < tensors[member.tensor].shape[member.axis] for index in every)
            assert model.module.get_submodule(member.layer) is not None


def test_no_group_holds_what_the_network_takes_or_gives() -> None:
    for name in ALL:
        model = net(name)
        outside = {"input:x", *trace(model).outputs}
        for group in channel_groups(model).groups.values():
            assert not outside & {place.value for place in group.places["forward"]}


# ---- which indices


def test_a_head_has_its_rows_of_queries_keys_and_values() -> None:
    groups = channel_groups(net("attention")).groups
    rows = indices(groups["qkv:head"], "qkv.weight", 0, 1)
    assert rows == (*range(8, 16), *range(40, 48), *range(72, 80))
    assert indices(groups["qkv:head"], "project.weight", 1, 1) == tuple(range(8, 16))
    assert indices(groups["qkv:head_dim"], "qkv.weight", 0, 2) == tuple(range(2, 96, 8))


def test_a_kv_head_goes_with_all_queries_that_read_it() -> None:
    group = channel_groups(net("grouped_query")).groups["q:head"]
    assert indices(group, "k.weight", 0, 1) == tuple(range(8, 16))
    assert indices(group, "q.weight", 0, 1) == tuple(range(16, 32))


def test_a_hidden_unit_has_a_row_of_every_gate_of_every_layer_and_direction() -> None:
    group = channel_groups(net("gru")).groups["gru"]
    assert indices(group, "gru.weight_ih_l1_reverse", 0, 3) == (3, 11, 19)
    assert indices(group, "gru.weight_hh_l0", 1, 3) == (3,)
    assert indices(group, "gru.weight_ih_l1", 1, 3) == (3, 11)


def test_a_flattened_channel_owns_all_of_its_positions() -> None:
    group = channel_groups(net("flattened")).groups["conv2"]
    assert indices(group, "fc.weight", 1, 2) == tuple(range(18, 27))


def test_channels_that_are_padded_with_zeros_stay() -> None:
    group = channel_groups(net("padded")).groups["stem"]
    assert [indices(group, "conv2.weight", 0, channel) for channel in (0, 7)] == [(4,), (11,)]


def test_a_channel_that_becomes_pixels_has_a_map_for_each() -> None:
    group = channel_groups(net("super_resolution")).groups["shuffled"]
    assert indices(group, "shuffled.weight", 0, 1) == (4, 5, 6, 7)


def test_a_group_is_whole_and_a_position_is_of_all_groups() -> None:
    groups = channel_groups(net("grouped")).groups
    assert indices(groups["stem:group"], "stem.weight", 0, 1) == (4, 5, 6, 7)
    assert indices(groups["stem:group"], "grouped.weight", 0, 1) == tuple(range(6, 12))
    assert indices(groups["stem"], "stem.weight", 0, 1) == (1, 5, 9, 13)
    assert indices(groups["stem"], "grouped.weight", 1, 1) == (1,)
    assert indices(groups["merge"], "twice.weight", 0, 1) == (2, 3)


# ---- that they are right


@pytest.mark.parametrize("name", ALL)
def test_random_channels_of_all_groups_go_and_every_value_has_the_shape_that_was_told(name: str) -> None:
    model = net(name)
    channels = channel_groups(model)
    assert channels.groups
    for seed in range(3):
        assert check(model, channels, random_drop(channels, seed)) > 0


@pytest.mark.parametrize("name", ALL)
def test_the_network_without_channels_computes_what_it_did_with_them_at_zero(name: str) -> None:
    model = net(name)
    channels = channel_groups(model)
    for group in channels.groups:
        drop = random_drop(channels, 1)[group] or [0]
        assert check(model, channels, {group: drop}) > 0


Side = tuple[str, str]  # layer, whether it loses what it reads or what it makes


def ours(channels: Channels, group: str, channel: int) -> dict[Side, set[int]]:
    sides: dict[Side, set[int]] = {}
    for member in channels.groups[group].members:
        side = (member.layer, "in" if member.role == "reads" else "out")
        sides.setdefault(side, set()).update(member.indices[channel])
    return sides


@pytest.mark.parametrize("name", ["residual", "depthwise", "concat", "squeeze_excite", "flattened"])
def test_the_same_layers_lose_the_same_channels_as_in_torch_pruning(name: str) -> None:
    pruning = pytest.importorskip("torch_pruning")
    model, module = net(name), net(name).copy_module()
    channels = channel_groups(model)
    graph = pruning.DependencyGraph().build_dependency(module, model.entries["forward"].example_inputs[0])
    names = {layer: path for path, layer in module.named_modules()}
    compared = 0
    for path in channels.groups:
        root = module.get_submodule(path)
        prune = (
            pruning.prune_conv_out_channels if root.weight.dim() > 2 else pruning.prune_linear_out_channels
        )
        theirs: dict[Side, set[int]] = {}
        for dependency, lost in graph.get_pruning_group(root, prune, idxs=[1]):
            layer = names.get(dependency.target.module)
            if layer is not None and not isinstance(dependency.target.module, (nn.ReLU, nn.Identity)):
                side = (layer, "in" if "in_channels" in dependency.handler.__name__ else "out")
                theirs.setdefault(side, set()).update(lost)
        assert ours(channels, path, 1) == theirs
        compared += 1
    assert compared == len(EXPECTED[name])


# ---- what stays


class Twice(nn.Module):
    """Two ways in that share a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(5, 6)
        self.shared = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.relu(self.one(x)))

    def other(self, x: Tensor) -> Tensor:
        return self.shared(torch.relu(self.two(x)))


def test_entries_that_share_a_layer_share_its_channels() -> None:
    entries = {
        name: Entry((torch.randn(2, size),), ("x",), ("y",), {"x": {0: "batch"}}, name)
        for name, size in (("forward", 4), ("other", 5))
    }
    channels = channel_groups(Model(Twice().eval(), entries))
    assert list(channels.groups) == ["one"]
    group = channels.groups["one"]
    assert group.layers == ("one", "shared", "two")
    assert set(group.places) == {"forward", "other"}


def picked(x: Tensor) -> Tensor:
    return x.gather(1, x.argsort(1))


def strange(x: Tensor) -> Tensor:
    return torch.fft.rfft(x, dim=1).real


def first(x: Tensor) -> Tensor:
    return x[:, 0:1] * x[:, 3].unsqueeze(1)


class Between(nn.Module):
    """A function between two matrices."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.write, self.read = nn.Linear(4, 8), nn.Linear(width, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.function(self.write(x)))


@pytest.mark.parametrize(
    ("function", "width", "words"),
    [
        (picked, 8, "argsort"),
        (strange, 5, "fft_rfft"),
        (first, 1, "select"),
        (lambda x: x + torch.arange(8.0).sort().values, 8, "sort"),
    ],
)
def test_what_an_operator_needs_whole_stays_and_the_reason_names_it(
    function: Callable[[Tensor], Tensor], width: int, words: str
) -> None:
    channels = channel_groups(golden.model_of(Between(function, width), torch.randn(2, 4)))
    assert not channels.groups
    assert words in channels.fixed["write"]
    assert channels.fixed["read"] == "it is an output of the network"


def test_an_input_that_is_added_fixes_what_it_is_added_to() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer, self.head = nn.Linear(4, 9), nn.Linear(9, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.outer(torch.relu(self.inner(x))))

    channels = channel_groups(golden.model_of(Residual(), torch.randn(2, 4)))
    assert list(channels.groups) == ["inner"]
    assert channels.fixed["outer"] == "it meets an input of the network"


def test_weights_that_are_computed_are_cut_where_they_come_from() -> None:
    module = nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3)
    )
    model = golden.model_of(module, torch.randn(2, 4))
    (group,) = channel_groups(model).groups.values()
    roles = {(member.tensor, member.axis): member.role for member in group.members}
    assert roles["0.parametrizations.weight.original1", 0] == "writes"
    assert roles["2.weight", 1] == "reads"
    assert ("0.parametrizations.weight.original0", 0) in roles
    assert indices(group, "0.bias", 0, 5) == (5,)


def test_groups_and_reasons_print() -> None:
    text = str(channel_groups(net("attention")))
    assert "qkv:head: 4 x head" in text
    assert "writes  qkv.weight axis 0, 24 indices each" in text
    assert text.endswith("head: fixed, it is an output of the network")
