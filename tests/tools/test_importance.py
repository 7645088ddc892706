"""Importance: scores are what their equations say, by hand, by finite differences, and by solving again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from featherweight.graph import trace
from featherweight.model import Model
from featherweight.tools.channels import channel_groups
from featherweight.tools.elimination import Reader, eliminate, readers_of, solvable
from featherweight.tools.groups import ChannelGroup, Channels, Member
from featherweight.tools.importance import activations, has_norms, magnitudes, norm_scales
from featherweight.tools.taylor import deciding, loss_changes, output_changes
from golden import inputs, model

NETS = ("residual", "depthwise", "concat", "shuffle", "attention", "lstm", "squeeze_excite", "shared")


def only(channels: Channels, *names: str) -> Channels:
    return Channels({name: channels.groups[name] for name in names})


class TestMagnitudes:
    def test_l2_is_the_mean_of_members_that_are_normed_each(self) -> None:
        net = model("residual")
        group = only(channel_groups(net), "layer1.conv1")
        (scores,) = magnitudes(net, group, "l2").values()
        written = net.parameters["layer1.conv1.weight"].detach().double().flatten(1).norm(dim=1)
        read = net.parameters["layer1.conv2.weight"].detach().double().transpose(0, 1).flatten(1).norm(dim=1)
        torch.testing.assert_close(scores, (written / written.mean() + read / read.mean()) / 2)

    def test_several_indices_of_a_channel_are_taken_together(self) -> None:
        net = model("attention")
        group = only(channel_groups(net), "qkv:head")
        (scores,) = magnitudes(net, group, "l1").values()
        rows = net.parameters["qkv.weight"].detach().double().abs().sum(1).reshape(3, 4, 8).sum((0, 2))
        columns = net.parameters["project.weight"].detach().double().abs().sum(0).reshape(4, 8).sum(1)
        torch.testing.assert_close(scores, (rows / rows.mean() + columns / columns.mean()) / 2)

    def test_scales_of_norms(self) -> None:
        net = model("residual")
        group = only(channel_groups(net), "layer1.conv1")
        (scores,) = norm_scales(net, group).values()
        scales = net.parameters["layer1.bn1.weight"].detach().double().abs()
        torch.testing.assert_close(scores, scales / scales.mean())
        assert has_norms(net, group)
        assert not has_norms(model("lstm"), channel_groups(model("lstm")))

    @pytest.mark.parametrize("net", NETS)
    def test_scores_of_every_group_have_the_mean_one(self, net: str) -> None:
        channels = channel_groups(model(net))
        x = torch.from_numpy(inputs(net))
        for scores in (
            magnitudes(model(net), channels, "l1"),
            magnitudes(model(net), channels, "l2"),
            norm_scales(model(net), channels),
            activations(model(net), channels, [(x,)]),
        ):
            for name, group in channels.groups.items():
                assert scores[name].shape == (group.size,)
                assert float(scores[name].mean()) == pytest.approx(1)

    def test_activations_are_mean_squares_of_what_is_read(self) -> None:
        net, x = model("attention"), torch.from_numpy(inputs("attention"))
        (scores,) = activations(net, only(channel_groups(net), "fc1"), [(x[:8],), (x[8:],)]).values()
        seen: list[Tensor] = []
        module = net.copy_module()
        module.act.register_forward_hook(lambda layer, args, made: seen.append(made))
        with torch.no_grad():
            module(x)
        wanted = seen[0].double().square().mean((0, 1))
        torch.testing.assert_close(scores, wanted / wanted.mean(), rtol=1e-5, atol=1e-6)


def scaled(net: Model, name: str, group: str, channels: Channels, channel: int, by: float) -> Model:
    """The model with the weights that decide about a channel multiplied."""
    module = net.copy_module().double()
    with torch.no_grad():
        for member in deciding(channels.groups[group]):
            tensor = module.get_parameter(member.tensor)
            rows = tensor.movedim(member.axis, 0)
            rows[list(member.indices[channel])] *= by
    return net.evolve(module=module)


class TestTaylor:
    @pytest.mark.parametrize(
        ("net", "group"), [("residual", "stem.0"), ("attention", "qkv:head"), ("lstm", "lstm")]
    )
    def test_of_a_loss_against_finite_differences(self, net: str, group: str) -> None:
        channels = only(channel_groups(model(net)), group)
        x, y = torch.from_numpy(inputs(net, 8)), torch.arange(8) % 10

        def loss(outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
            return functional.cross_entropy(outputs[0], targets)

        scores = loss_changes(model(net), channels, [((x,), y)], loss)[group]
        for channel in range(3):
            step = 1e-5
            ends = []
            for sign in (1, -1):
                moved = scaled(model(net), net, group, channels, channel, 1 + sign * step).module
                with torch.no_grad():
                    ends.append(float(loss((moved(x.double()),), y)))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert float(scores[channel]) == pytest.approx(slope**2, rel=2e-3, abs=1e-12)

    def test_of_outputs_against_finite_differences(self) -> None:
        net, name = model("residual"), "layer1.conv1"
        channels, x = only(channel_groups(net), name), torch.from_numpy(inputs("residual", 4))
        found = output_changes(net, channels, [(part,) for part in x.split(1)], draws=256)[name]
        with torch.no_grad():
            signal = float(net.module(x).double().square().sum())
            for channel in range(4):
                ends = [
                    scaled(net, "", name, channels, channel, 1 + sign * 1e-5).module(x.double())
                    for sign in (1, -1)
                ]
                wanted = float(((ends[0] - ends[1]) / 2e-5).square().sum()) / signal
                assert float(found[channel]) == pytest.approx(wanted, rel=0.25, abs=1e-9)


class TestElimination:
    @pytest.mark.parametrize("side", [24, 512])
    def test_losses_are_those_of_solving_anew(self, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("featherweight.tools.columns._SIDE", side)  # of blocks
        net, name = model("attention"), "fc1"
        channels = only(channel_groups(net), name)
        x = torch.from_numpy(inputs("attention", 64))
        members = solvable(channels, trace(net))[name]
        readers = readers_of(net, {"fc2.weight"}, [(x[:40],), (x[40:],)])
        ranking = eliminate(channels.groups[name], [(member, readers[member.tensor]) for member in members])
        assert sorted(ranking.order) == list(range(64))
        assert all(b >= a for a, b in zip(ranking.losses, ranking.losses[1:], strict=False))
        seen: list[Tensor] = []
        module = net.copy_module()
        module.act.register_forward_hook(lambda layer, args, made: seen.append(made))
        with torch.no_grad():
            module(x)
        columns = seen[0].flatten(0, 1).double().numpy()
        weight = net.parameters["fc2.weight"].detach().double().numpy()
        target = columns @ weight.T
        effect = readers["fc2.weight"].effect[0].numpy()
        for gone in (8, 24, 48):
            left = list(ranking.order[gone:])
            design = np.hstack([columns[:, left], np.ones((len(columns), 1))])
            error = target - design @ np.linalg.lstsq(design, target, rcond=None)[0]
            wanted = float((error**2).mean(0) @ effect)
            assert ranking.losses[gone] == pytest.approx(wanted, rel=0.1)

    def test_many_columns_go_as_they_do_one_after_the_other(self) -> None:
        rng = np.random.default_rng(0)
        size, outputs, taps = 40, 6, 9
        x = rng.standard_normal((500, size * taps)) @ rng.standard_normal((size * taps, size * taps))
        second, rows = x.T @ x / 500, rng.standard_normal((outputs, size * taps))
        effect = rng.random(outputs)
        indices = ((0, 1), *((index,) for index in range(2, size)))  # the first channel is on two
        member = Member("weight", 1, indices, "reads", "", "")
        group = ChannelGroup("group", "channel", len(indices), (member,))
        weight, moments, felt = (torch.from_numpy(one)[None] for one in (rows, second, effect))
        node = next(node for node in trace(model("residual")) if node.op == "conv2d")
        reader = Reader(node, weight, moments.clone(), felt, size)
        ranking = eliminate(group, [(member, reader)])
        torch.testing.assert_close(reader.second, moments, rtol=0, atol=0)
        inverse = np.linalg.inv(second + 1e-3 * second.diagonal().mean() * np.eye(len(second)))

        def loss(channels: tuple[int, ...]) -> float:
            at = [i * taps + tap for channel in channels for i in indices[channel] for tap in range(taps)]
            own = rows[:, at]
            return float(effect @ (own @ np.linalg.inv(inverse[np.ix_(at, at)]) * own).sum(1))

        for gone in range(len(indices)):
            before = ranking.order[:gone]
            assert ranking.losses[gone] == pytest.approx(loss(before) if gone else 0, rel=1e-8)
            left = [channel for channel in range(len(indices)) if channel not in before]
            assert ranking.order[gone] == min(left, key=lambda channel: loss((*before, channel)))

    def test_effects_are_squared_gradients_over_the_signal(self) -> None:
        net, x = model("attention"), torch.from_numpy(inputs("attention", 16))
        readers = readers_of(net, {"head.weight"}, [(x,)], draws=3)
        with torch.no_grad():
            signal = float(net.module(x).double().square().sum())
        wanted = torch.full((1, 10), 16 / signal, dtype=torch.float64)  # an output moves itself
        torch.testing.assert_close(readers["head.weight"].effect, wanted, rtol=1e-4, atol=0)

    def test_a_copy_of_a_channel_goes_first_and_costs_nothing(self) -> None:
        net = model("residual")
        module = net.copy_module()
        with torch.no_grad():
            for name in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
                path, _, own = f"layer2.{name}".rpartition(".")
                tensor = getattr(module.get_submodule(path), own)
                tensor[9] = tensor[3]
        twin = net.evolve(module=module)
        channels = only(channel_groups(twin), "layer2.conv1")
        x = torch.from_numpy(inputs("residual", 64))
        members = solvable(channels, trace(twin))["layer2.conv1"]
        readers = readers_of(twin, {member.tensor for member in members}, [(x,)])
        ranking = eliminate(channels.groups["layer2.conv1"], [(one, readers[one.tensor]) for one in members])
        place = min(ranking.order.index(3), ranking.order.index(9))
        assert ranking.losses[place + 1] - ranking.losses[place] < 1e-2 * ranking.losses[-1]
        assert place < 8

    def test_recurrent_layers_and_positions_of_heads_are_left_to_gradients(self) -> None:
        for net in ("lstm", "attention"):
            found = solvable(channel_groups(model(net)), trace(model(net)))
            assert not {"lstm", "qkv:head_dim"} & set(found)
        assert "qkv:head" in solvable(channel_groups(model("attention")), trace(model("attention")))
