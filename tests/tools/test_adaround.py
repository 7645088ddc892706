"""AdaRound: against all roundings of a tiny layer, below nearest on every layer, always on the grid."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from featherweight.data import Data
from featherweight.formats import (
    Binary,
    Granularity,
    IntQuant,
    PerChannel,
    PerGroup,
    PerTensor,
    TensorFormat,
    Ternary,
)
from featherweight.graph import trace
from featherweight.methods.fold import Fold
from featherweight.model import Model
from featherweight.tools import adaround as module_under_test
from featherweight.tools.adaround import adaround
from featherweight.tools.ranges import weight_range
from featherweight.tools.simulate import layer_errors
from featherweight.tools.softround import SoftRounding, annealed, penalty
from golden import context, folded, model_of
from rounded import calibration, in_few_bits, smooth, weights_of, with_values

EXAMPLES = Path(__file__).parents[2] / "examples" / "fashion_mnist"


def int_format(weight: Tensor, width: int, granularity: Granularity, symmetric: bool) -> IntQuant:
    dimensions = {PerTensor: 0, PerChannel: 1, PerGroup: 2}[type(granularity)]
    one = torch.ones((1,) * dimensions)
    draft = IntQuant(-one, one, width, symmetric, granularity, signed=True)
    low, high = weight_range(weight, draft, "minmax", 100.0)
    return replace(draft, low=low, high=high)


def tiny(activation: bool, seed: int = 0) -> tuple[Model, Model, Tensor]:
    """A layer of four inputs and three outputs in three bits, its float twin, and correlated inputs."""
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 3), nn.ReLU()] if activation else [nn.Linear(4, 3)]
    x = torch.randn(64, 4) @ torch.randn(4, 4) + 0.5
    model = model_of(nn.Sequential(*layers), x[:2])
    weight = model.parameters["0.weight"].detach()
    formats = {"0.weight": (int_format(weight, 3, PerChannel(0), True),)}
    return model.evolve(formats=formats), model, x


def error_of(weight: Tensor, model: Model, x: Tensor) -> float:
    layer = model.module[0]  # type: ignore[index]
    with torch.no_grad():
        made, wanted = nn.functional.linear(x, weight, layer.bias), layer(x)
    if len(model.module) > 1:  # type: ignore[arg-type]
        made, wanted = made.relu(), wanted.relu()
    return float((made - wanted).square().sum())


def best_of_all(model: Model, reference: Model, x: Tensor) -> float:
    """The least error that any rounding of each row has."""
    weight = reference.parameters["0.weight"].detach()
    (fmt,) = model.formats["0.weight"]
    assert isinstance(fmt, IntQuant)
    scale, zero = fmt.grid_of(weight)
    floor = torch.floor(weight / scale) + zero
    best = 0.0
    for row in range(len(weight)):
        errors = []
        for ups in itertools.product((0.0, 1.0), repeat=weight.shape[1]):
            tried = weight.clone()
            integers = (floor[row] + torch.tensor(ups)).clamp(fmt.quant_min, fmt.quant_max)
            tried[row] = (integers - zero[row]) * scale[row]
            errors.append(error_of(tried, reference, x))
        best += min(errors)
    return best


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("activation", [False, True])
def test_comes_near_the_best_of_all_roundings(activation: bool, seed: int) -> None:
    model, reference, x = tiny(activation, seed)
    found = adaround(model, reference, [(x,)], weights=["0.weight"], iterations=500)["0.weight"]
    best = best_of_all(model, reference, x)
    nearest = error_of(model.formats["0.weight"][0].project(reference.parameters["0.weight"]), reference, x)
    assert best <= error_of(found, reference, x) + 1e-6
    assert error_of(found, reference, x) <= 1.1 * best + 1e-6
    assert error_of(found, reference, x) <= nearest


def weights_alone(net: str) -> Model:
    """Weights of four bits, activations as float."""
    model = in_few_bits(net)
    return model.evolve(formats={name: model.formats[name] for name in weights_of(model)})


def gains(model: Model, found: Mapping[str, Tensor], net: str) -> dict[str, float]:
    """Decibels by which each layer's output alone is better than by nearest rounding, on other examples."""
    x = [(smooth(net, 64, 5),)]
    nearest, learned = layer_errors(model, x), layer_errors(with_values(model, found), x)
    nodes = [node for node in trace(model) if set(node.parameters.values()) & set(found)]
    return {node.name: learned[node.name] - nearest[node.name] for node in nodes}


@pytest.mark.parametrize("net", ["residual", "depthwise", "linear3d", "shared", "attention"])
def test_layers_lose_less_than_by_nearest_rounding(net: str) -> None:
    model = weights_alone(net)
    names = weights_of(model)
    found = adaround(model, folded(net), calibration(net), weights=names, iterations=50)
    assert set(found) == set(names)
    for name in names:
        assert torch.equal(model.formats[name][0].project(found[name]), found[name])
        assert found[name].dtype == torch.float32
    assert np.mean(list(gains(model, found, net).values())) > 1.0


def test_windows_of_a_map_are_what_the_whole_map_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "_WINDOW", 5)
    net = "depthwise"  # strides of 1 and 2, zeros around the map
    model = weights_alone(net)
    found = adaround(model, folded(net), calibration(net), weights=weights_of(model), iterations=50)
    assert np.mean(list(gains(model, found, net).values())) > 1.0


def test_a_window_of_the_float_layer_has_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "_WINDOW", 3)
    seen: list[float] = []
    window_error = module_under_test._Layer._window_error

    def spied(self: object, picks: object, weights: object) -> Tensor:
        seen.append(float(window_error(self, picks, {})))  # type: ignore[arg-type]
        return window_error(self, picks, weights)  # type: ignore[arg-type]

    monkeypatch.setattr(module_under_test._Layer, "_window_error", spied)
    parameters = folded("depthwise").parameters
    wide = {
        name: (int_format(parameters[name].detach(), 16, PerChannel(0), True),)
        for name in weights_of(in_few_bits("depthwise"))
    }
    model = folded("depthwise").evolve(formats=wide)
    adaround(model, folded("depthwise"), calibration("depthwise", 8), weights=list(wide), iterations=2)
    assert len(seen) > len(wide) // 2
    assert max(seen) < 1e-8


def test_inputs_that_only_this_operator_reads_rounded_are_read_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "_WINDOW", 3)
    coarse = IntQuant(torch.tensor(-1e-3), torch.tensor(1e-3), 2, readers=frozenset({"conv2d", "linear"}))
    model = weights_alone("residual")
    formats = {name: (coarse,) for name in trace(model).values if name.startswith("input:")}
    blind = model.evolve(formats={**model.formats, **formats})
    first = ["stem.0.weight"]
    x = calibration("residual", 8)
    seeing = adaround(model, folded("residual"), x, weights=first, iterations=20)
    fooled = adaround(blind, folded("residual"), x, weights=first, iterations=20)
    assert not torch.equal(seeing[first[0]], fooled[first[0]])


def shifted(model: Model, names: list[str]) -> dict[str, Tensor]:
    """On-grid weights that are up to two steps off the nearest ones."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name in names:
        (fmt,) = model.formats[name]
        assert isinstance(fmt, IntQuant)
        nearest = fmt.quantize(model.parameters[name].detach())
        shift = torch.randint(-2, 3, nearest.shape, generator=generator)
        found[name] = fmt.dequantize((nearest + shift).clamp(fmt.quant_min, fmt.quant_max))
    return found


def test_no_steps_give_the_nearest_or_where_it_starts() -> None:
    model, float_model, x = in_few_bits("residual"), folded("residual"), calibration("residual", 8)
    names = weights_of(model)
    nearest = {name: model.formats[name][0].project(model.parameters[name].detach()) for name in names}
    plain = adaround(model, float_model, x, weights=names, iterations=0)
    assert all(torch.equal(plain[name], nearest[name]) for name in names)
    learned = adaround(model, float_model, x, weights=names, iterations=100)
    begun = adaround(model, float_model, x, weights=names, iterations=0, start=learned)
    assert all(torch.equal(begun[name], learned[name]) for name in names)
    assert any(not torch.equal(learned[name], nearest[name]) for name in names)


def test_no_row_is_worse_than_the_nearest_however_it_starts_and_however_rough_the_steps_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module_under_test, "rate_for", lambda _: 30.0)  # all is thrown about
    for activation in (False, True):
        model, reference, x = tiny(activation)
        nearest = model.formats["0.weight"][0].project(reference.parameters["0.weight"].detach())
        found = adaround(
            model, reference, [(x,)], weights=["0.weight"], iterations=3, start=shifted(model, ["0.weight"])
        )["0.weight"]
        for row in range(3):
            mixed = nearest.clone()
            mixed[row] = found[row]
            assert error_of(mixed, reference, x) <= error_of(nearest, reference, x) + 1e-5


def test_the_seed_decides_and_the_input_is_untouched() -> None:
    model = in_few_bits("shared")
    before = {name: tensor.detach().clone() for name, tensor in model.parameters.items()}

    def run(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(1000 + seed)
        x = calibration("shared")
        return adaround(model, folded("shared"), x, weights=weights_of(model), iterations=5, seed=seed)

    one, again, other = run(0), run(0), run(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(model.parameters[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters.values())


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(1, 5)])
@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_integers_of_every_grid_are_on_it(
    width: int, granularity: Granularity, symmetric: bool, start: bool
) -> None:
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(width))
    fmt = int_format(weight, width, granularity, symmetric)
    check_rounding(weight, fmt, start)


@pytest.mark.parametrize("start", [False, True])
def test_ternary_and_binary_weights_are_on_their_grid(start: bool) -> None:
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().mean(1)
    check_rounding(weight, Ternary(scale, scale / 3), start)
    check_rounding(weight, Binary(scale), start)


def check_rounding(weight: Tensor, fmt: TensorFormat, start: bool) -> None:
    begun = fmt.project(weight) if start else None
    soft = SoftRounding(weight, fmt, begun)
    steps = soft.hard()
    assert torch.equal(fmt.project(steps), steps)
    if begun is not None:
        assert torch.equal(steps, begun)
    with torch.no_grad():
        soft.v.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 3)
    moved = soft.hard()
    assert torch.equal(fmt.project(moved), moved)
    share = (soft.share() >= 0.5).float()
    torch.testing.assert_close(soft.soft(share), moved)


def test_the_soft_weight_begins_at_the_float_one_and_has_a_gradient() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    soft = SoftRounding(weight, int_format(weight, 4, PerChannel(0), True))
    torch.testing.assert_close(soft.soft(), weight, rtol=1e-3, atol=2e-3)
    torch.autograd.backward(soft.soft().square().sum())
    assert soft.v.grad is not None
    assert soft.v.grad.abs().sum() > 0


def test_the_penalty_is_of_the_undecided_and_beta_falls() -> None:
    assert float(penalty(torch.tensor([0.0, 1.0]), 2.0)) == 0.0
    assert float(penalty(torch.tensor([0.5, 0.5]), 2.0)) == 1.0
    betas = [annealed(step / 10) for step in range(11)]
    assert betas == sorted(betas, reverse=True)
    assert betas[0] == 20.0
    assert betas[-1] == pytest.approx(2.0)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["resnet20", "depthwise"])
def test_every_layer_of_a_trained_network_loses_less_than_by_nearest_rounding(net: str) -> None:
    reference, x = trained(net)
    nodes = [node for node in trace(reference) if node.op in ("conv2d", "linear")]
    names = [node.parameters["weight"] for node in nodes]
    parameters = reference.parameters
    formats = {name: (int_format(parameters[name].detach(), 4, PerChannel(0), True),) for name in names}
    model = reference.evolve(formats=formats)
    found = adaround(model, reference, [(x,)], weights=names, iterations=150)
    nearest = layer_errors(model, [(x,)])
    learned = layer_errors(with_values(model, found), [(x,)])
    for node in nodes:
        assert learned[node.name] > nearest[node.name], node.name


def trained(net: str) -> tuple[Model, Tensor]:
    """An example with its weights, batch norms folded, and training images of it."""
    spec = importlib.util.spec_from_file_location("examples_nets", EXAMPLES / "nets.py")
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    module = getattr(code, net)()
    module.load_state_dict(load_file(EXAMPLES / f"{net}.safetensors"))
    x = np.load(EXAMPLES / "data.npz")["x_train"][::20]
    model = model_of(module, torch.from_numpy(x[:2]))
    return Fold().apply(model, context(model, Data.of(x_train=x))), torch.from_numpy(x)
