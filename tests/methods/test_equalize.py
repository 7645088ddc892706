"""Equalized networks compute the same and lose less to integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featherweight.data import Data
from featherweight.errors import DataError
from featherweight.formats import IntQuant
from featherweight.methods.equalize import Equalize
from featherweight.model import Model
from featherweight.tools.equalization import smooth
from featherweight.tools.ranges import weight_range
from featherweight.tools.reach import Reach
from featherweight.tools.scaling import Carrier, scaling_groups
from featherweight.tools.simulate import Replay, simulate
from golden import context, data, decibels, folded, inputs, model_of
from nets import NETS


def examples(*shape: int, count: int = 128, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def outputs(net: Model, x: np.ndarray) -> Tensor:
    with torch.no_grad():
        y: Tensor = net.module(torch.from_numpy(x))
    return y


def equalized(net: Model, calibration: np.ndarray, **parameters: Any) -> Model:
    ctx = context(net, Data.of(calibration[:8], calibration=calibration))
    return Equalize(**parameters).apply(net, ctx)


def rounded_weights(net: Model, x: np.ndarray) -> float:
    """Decibels of the outputs with int8 weights, one scale per tensor."""
    formats = {}
    for name, weight in net.parameters.items():
        if weight.dim() > 1:
            draft = IntQuant(-torch.ones(()), torch.ones(()), 8, True, signed=True)
            low, high = weight_range(weight, draft, "minmax", 100.0)
            formats[name] = (IntQuant(low, high, 8, True, signed=True),)
    (y,) = simulate(net.evolve(formats=formats))(torch.from_numpy(x))
    return decibels(outputs(net, x), y.detach())


def rounded_activations(net: Model, values: Mapping[str, Any], x: np.ndarray) -> float:
    """Decibels of the outputs with these values in uint8 over their range on the examples."""
    seen: dict[str, tuple[float, float]] = {}

    def observe(name: str, value: Tensor) -> Tensor:
        low, high = (float(end) for end in torch.aminmax(value))
        seen[name] = (low, high)
        return value

    with torch.no_grad():
        Replay(net)((torch.from_numpy(x),), observe)
    formats = {n: (IntQuant(torch.tensor(seen[n][0]), torch.tensor(seen[n][1])),) for n in values}
    (y,) = simulate(net.evolve(formats=formats))(torch.from_numpy(x))
    return decibels(outputs(net, x), y.detach())


def planted(activation: Callable[[], nn.Module], seed: int = 0) -> Model:
    """A depthwise block whose channels differ by factors up to a hundred, which the next layer undoes."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1),
        activation(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        activation(),
        nn.Conv2d(16, 8, 1),
        activation(),
        nn.Conv2d(8, 4, 3),
    ).eval()
    gains = [torch.logspace(-1, 1, size)[torch.randperm(size)] for size in (16, 16, 8)]
    with torch.no_grad():
        for place, gain in zip((0, 2, 4), gains, strict=True):
            net[place].weight *= gain.reshape(-1, 1, 1, 1)
            net[place].bias *= gain
        net[2].weight /= gains[0].reshape(-1, 1, 1, 1)
        net[4].weight /= gains[1].reshape(1, -1, 1, 1)
        net[6].weight /= gains[2].reshape(1, -1, 1, 1)
    return model_of(net, torch.randn(2, 3, 8, 8))


class TestExact:
    @pytest.mark.parametrize("name", NETS)
    @pytest.mark.parametrize(
        "parameters",
        [{}, {"by": "weights"}, {"by": "activations"}, {"by": "weights", "absorb_bias": True}],
        ids=str,
    )
    def test_outputs_of_golden_nets_do_not_change(self, name: str, parameters: dict[str, Any]) -> None:
        start = folded(name)
        done = Equalize(**parameters).apply(start, context(start, data(name)))
        x = inputs(name, 32, 1)  # those of calibration, so that no clamp is reached that was not before
        y, z = outputs(start, x), outputs(done, x)
        assert float((y - z).norm() / y.norm()) < 1e-5

    def test_a_channel_that_reaches_a_clamp_stays(self) -> None:
        start = planted(nn.ReLU6)
        x = examples(3, 8, 8)
        done = equalized(start, x, by="weights", margin=1.0)
        with torch.no_grad():
            before = start.module[0](torch.from_numpy(x)).amax((0, 2, 3))
            after = done.module[0](torch.from_numpy(x)).amax((0, 2, 3))
        assert (before > 6).any() and (before < 6).any()
        assert torch.equal(after[before > 6], before[before > 6])
        assert (after[before < 6] <= 6 * (1 + 1e-5)).all()
        assert not torch.equal(after, before)
        y, z = outputs(start, x), outputs(done, x)
        assert float((y - z).norm() / y.norm()) < 1e-5

    def test_clamped_channels_are_left_alone_unless_asked(self) -> None:
        start = planted(nn.ReLU6)
        x = examples(3, 8, 8)
        done = equalized(start, x)
        assert all(torch.equal(one, done.parameters[name]) for name, one in start.parameters.items())
        moved = equalized(start, x, clamped="move", by="activations")
        assert not torch.equal(moved.parameters["0.weight"], start.parameters["0.weight"])

    def test_what_has_formats_stays(self) -> None:
        start = planted(nn.ReLU)
        stored = IntQuant(-torch.ones(()), torch.ones(()), 8, True, signed=True)
        formats = dict.fromkeys(start.parameters, (stored,))
        done = equalized(start.evolve(formats=formats), examples(3, 8, 8), by="weights")
        assert all(torch.equal(one, done.parameters[name]) for name, one in start.parameters.items())


class TestGains:
    @pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_weights_with_one_scale_lose_a_tenth(
        self, activation: Callable[[], nn.Module], seed: int
    ) -> None:
        start = planted(activation, seed)
        x = examples(3, 8, 8)
        done = equalized(start, x, granularity="per_tensor")
        held = examples(3, 8, 8, seed=9)
        assert rounded_weights(done, held) > rounded_weights(start, held) + 20  # decibels: a tenth

    @pytest.mark.parametrize("by", ["auto", "activations"])
    def test_activations_lose_less(self, by: str) -> None:
        start = planted(nn.ReLU)
        x = examples(3, 8, 8)
        done = equalized(start, x, by=by)
        held = examples(3, 8, 8, seed=9)
        values = ("1#0:0", "3#0:0", "5#0:0")
        assert rounded_activations(done, values, held) > rounded_activations(start, values, held) + 6

    def test_attention_with_outlier_channels(self) -> None:
        start = folded("attention")
        module = start.copy_module()
        with torch.no_grad():  # a few channels of the norms a hundred times larger, as in language models
            for norm, reader in ((module.norm1, module.qkv), (module.norm2, module.fc1)):
                norm.weight[:3] *= 100
                norm.bias[:3] *= 100
                reader.weight[:, :3] /= 100
        start = start.evolve(module=module)
        x = inputs("attention", 64, 5)
        done = equalized(start, x)
        y, z = outputs(start, x), outputs(done, x)
        assert float((y - z).norm() / y.norm()) < 1e-5
        values = ("norm1#0:0", "norm2#0:0")
        held = inputs("attention", 64, 6)
        assert rounded_activations(done, values, held) > rounded_activations(start, values, held) + 15

    def test_absorbed_biases_make_ranges_narrow(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        with torch.no_grad():
            net[0].weight *= 0.1
            net[0].bias[:4] = 50.0
        start = model_of(net, torch.randn(2, 6))
        x = examples(6)
        done = equalized(start, x, by="weights", absorb_bias=True)
        kept = equalized(start, x, by="weights")
        y, z = outputs(start, x), outputs(done, x)
        assert float((y - z).norm() / y.norm()) < 1e-5

        def largest(one: Model) -> float:
            with torch.no_grad():
                return float(one.module[:2](torch.from_numpy(x)).max())

        assert largest(done) < 0.2 * largest(kept)


class TestWhere:
    def test_an_excluded_layer_takes_part_in_no_rescaling(self) -> None:
        start = planted(nn.ReLU)
        x = examples(3, 8, 8)
        done = equalized(start, x, by="weights", where={"exclude": ["2"]})
        same = {name for name, one in start.parameters.items() if torch.equal(one, done.parameters[name])}
        assert same >= {"0.weight", "0.bias", "2.weight", "2.bias"}
        assert not same & {"4.bias", "6.weight"}  # the pair behind it
        y, z = outputs(start, x), outputs(done, x)
        assert float((y - z).norm() / y.norm()) < 1e-5


class TestInput:
    def test_no_calibration_examples(self) -> None:
        start = planted(nn.ReLU)
        with pytest.raises(DataError, match="equalize found no calibration examples"):
            Equalize().apply(start, context(start, Data()))

    def test_infinite_values_are_told(self) -> None:
        x = examples(3, 8, 8)
        x[3] = 3e38  # finite, but no longer behind the first layer
        with pytest.raises(DataError, match="NaN or infinite on the calibration examples"):
            equalized(planted(nn.ReLU), x)

    def test_channels_that_never_live_stay_finite(self) -> None:
        start = planted(nn.ReLU)
        module = start.copy_module()
        with torch.no_grad():
            module[0].weight[:2] = 0
            module[0].bias[:2] = -1
            module[2].weight[3] = 0
            module[4].weight[:, 5] = 0
        start = start.evolve(module=module)
        x = examples(3, 8, 8)
        for by in ("auto", "weights", "activations"):
            done = equalized(start, x, by=by)
            assert all(bool(one.isfinite().all()) for one in done.parameters.values())
            y, z = outputs(start, x), outputs(done, x)
            assert float((y - z).norm() / y.norm()) < 1e-5


def test_errors_are_those_of_rounding() -> None:
    """The score's activation part is what a fake-quantized consumer loses, within the noise of sampling."""
    torch.manual_seed(0)
    x = torch.randn(512, 6) * torch.tensor([1.0, 2.0, 0.1, 3.0, 0.5, 1.0])
    reach = Reach(Carrier("forward", "v", torch.arange(6).reshape(1, 6)), 6, None, 512)
    reach.update(x, True, True, torch.Generator().manual_seed(0))
    factors = torch.tensor([1.0, 0.7, 4.0, 0.3, 2.0, 1.0])
    scaled = x * factors
    grid = IntQuant(scaled.min(), scaled.max(), 6)
    wanted = (grid.project(scaled) / factors - x).square().mean(0)
    assert torch.allclose(reach.errors(factors, 6), wanted, rtol=0.3)
    assert torch.allclose(reach.mean, x.double().mean(0), atol=1e-5)
    assert torch.allclose(reach.squares, x.double().square().mean(0), rtol=1e-4)
    assert torch.equal(reach.seen_high, x.amax(0))


def test_smoothquant_by_hand() -> None:
    """Equation 4 of arXiv:2211.10438: X / s with s = max|X|^a / max|W|^(1-a)."""
    activations, weights = torch.tensor([8.0, 2.0, 4.0]), torch.tensor([0.5, 2.0, 1.0])
    factors = smooth(activations, weights, 0.75, 1e6)
    wanted = weights**0.25 / activations**0.75
    assert torch.allclose(factors / factors[2], wanted / wanted[2])
    assert float(smooth(activations, None, 1.0, 1.5).max()) == pytest.approx(1.5)


def test_a_group_without_reason_is_left_alone() -> None:
    """Channels that are alike already: no candidate is a tenth better."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.ones(8, 6))
        net[0].bias.zero_()
        net[2].weight.copy_(torch.ones(3, 8))
    start = model_of(net, torch.randn(2, 6))
    assert len(scaling_groups(start)) == 1
    done = equalized(start, examples(6))
    assert all(torch.equal(one, done.parameters[name]) for name, one in start.parameters.items())
