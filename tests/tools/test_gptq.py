"""GPTQ against brute force on tiny layers, against nearest rounding on networks, and its promises."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight.formats import Binary, IntQuant, Palette, TensorFormat, Ternary
from featherweight.granularity import PerChannel, PerGroup, PerTensor
from featherweight.graph import Node, trace
from featherweight.model import Model
from featherweight.tools.columns import Statistics, is_product
from featherweight.tools.gptq import (
    Settings,
    best_weights,
    damped,
    errors,
    gptq,
    round_rows,
)
from featherweight.tools.levels import Levels, levels_of
from featherweight.tools.simulate import project
from featherweight.tools.walk import walk
from golden import folded, inputs, model_of

SIZE = 5  # weights of a row, 3 ** 5 roundings


def problem(seed: int, groups: int = 1, rows: int = 4, size: int = SIZE) -> tuple[Tensor, Tensor, Levels]:
    """Random rows, an H of correlated inputs, and levels two bits wide."""
    made = torch.Generator().manual_seed(seed)
    t = torch.randn(groups, rows, size, generator=made, dtype=torch.float64)
    x = torch.randn(groups, 3 * size, size, generator=made, dtype=torch.float64)
    x = x @ torch.randn(groups, size, size, generator=made, dtype=torch.float64)
    h = x.mT @ x / x.shape[1] + 1e-3 * torch.eye(size, dtype=torch.float64)
    step = (t.abs().amax(2, keepdim=True)).expand_as(t)
    return t, h, Levels(step, torch.zeros_like(t), -1, 1)


def optimum(t: Tensor, h: Tensor, levels: Levels) -> Tensor:
    """The least error of each row over all roundings."""
    every = torch.tensor(list(product((-1.0, 0.0, 1.0), repeat=t.shape[2])), dtype=torch.float64)
    best = []
    for row, step in zip(t[0], levels.step[0], strict=True):
        gap = row - every * step
        best.append(((gap @ h[0]) * gap).sum(1).min())
    return torch.stack(best)[None]


@pytest.mark.parametrize("passes", [0, 8])
def test_it_is_near_the_best_of_all_roundings(passes: int) -> None:
    ratios, plain = [], []
    for seed in range(40):
        t, h, levels = problem(seed)
        least = optimum(t, h, levels)
        chosen = round_rows(t, h, levels, passes)
        assert (errors(t, chosen, h) >= least * (1 - 1e-9)).all()
        ratios.append(errors(t, chosen, h) / least)
        plain.append(errors(t, levels.nearest(t), h) / least)
    mean = float(torch.cat(ratios).log().mean().exp())
    assert mean < {0: 1.35, 8: 1.2}[passes]
    assert mean < 0.7 * float(torch.cat(plain).log().mean().exp())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 90), st.integers(0, 3))
def test_never_worse_than_the_nearest_and_always_on_a_level(
    seed: int, groups: int, size: int, passes: int
) -> None:
    t, h, levels = problem(seed, groups, 3, size)
    chosen = round_rows(t, h, levels, passes)
    assert (errors(t, chosen, h) <= errors(t, levels.nearest(t), h) * (1 + 1e-9) + 1e-12).all()
    assert set(torch.round(chosen / levels.step).unique().tolist()) <= {-1.0, 0.0, 1.0}
    torch.testing.assert_close(chosen, levels.nearest(chosen))


def test_independent_inputs_leave_the_nearest() -> None:
    t, _, levels = problem(0, 1, 8, 70)
    h = torch.diag(torch.rand(70, dtype=torch.float64) + 0.1)[None]
    assert torch.equal(round_rows(t, h, levels), levels.nearest(t))


def test_more_passes_never_do_harm() -> None:
    for seed in range(10):
        t, h, levels = problem(seed, 2, 6, 70)
        error = [float(errors(t, round_rows(t, h, levels, passes), h).sum()) for passes in (0, 1, 4)]
        assert error == sorted(error, reverse=True)


def test_the_best_weights_make_the_float_output_of_stored_inputs() -> None:
    made = torch.Generator().manual_seed(0)
    stored = torch.randn(1, 200, 6, generator=made, dtype=torch.float64)
    mix = torch.randn(1, 6, 6, generator=made, dtype=torch.float64)
    exact = stored @ mix.mT  # the float network's inputs are a linear map of the stored one's
    second = stored.mT @ stored / 200
    drift = (exact - stored).mT @ stored / 200
    seen = Statistics(exact.mean(1), stored.mean(1), second, drift, 200)
    rows = torch.randn(1, 3, 6, generator=made, dtype=torch.float64)
    torch.testing.assert_close(best_weights(rows, seen, damped(seen, 1e-12)), rows @ mix)


FORMATS: dict[str, TensorFormat] = {
    "tensor": IntQuant(torch.tensor(-1.0), torch.tensor(1.0), 3),
    "channel": IntQuant(-torch.ones(6), torch.linspace(0.5, 1, 6), 4, False, PerChannel(0), signed=True),
    "symmetric": IntQuant(-torch.ones(6), torch.ones(6), 2, True, PerChannel(0), signed=True),
    "group": IntQuant(-torch.ones(6, 3), torch.ones(6, 3), 4, True, PerGroup(1, 4), signed=True),
    "ternary": Ternary(torch.full((6,), 0.5), torch.full((6,), 0.2)),
    "binary": Binary(torch.full((6,), 0.5)),
    "palette": Palette(torch.tensor([-1.0, -0.2, 0.3, 1.4]), zero=True),
    "palettes": Palette(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), group=2),
    "scaled": Palette(torch.tensor([-1.0, 0.4]), axis=1, scale=torch.linspace(0.1, 2, 10)),
}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_levels_are_what_the_format_stores(name: str) -> None:
    fmt = FORMATS[name]
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    levels = levels_of(fmt, weight)
    assert levels is not None
    nearest = levels.nearest(weight.double()).float()
    assert torch.equal(fmt.project(fmt.project(weight)), fmt.project(weight))
    torch.testing.assert_close(fmt.project(nearest), nearest)
    if isinstance(fmt, IntQuant | Palette):
        torch.testing.assert_close(nearest, fmt.project(weight))


@pytest.mark.parametrize("name", ["channel", "palette", "palettes", "scaled"])
def test_levels_of_a_column_and_of_zeros(name: str) -> None:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).double()
    levels = levels_of(FORMATS[name], weight)
    assert levels is not None
    whole = levels.nearest(weight)
    for column in range(10):
        assert torch.equal(levels.nearest(weight[:, column], column), whole[:, column])
    kept = weight > 0
    assert torch.equal(levels.masked(kept).nearest(weight) * kept, whole * kept)
    assert levels.masked(kept).nearest(weight)[~kept].abs().max() < 1e-20


# ---- networks


def stored_as(net: Model, width: int) -> Model:
    """Weights of products in few bits per channel, activations as they are."""
    formats: dict[str, tuple[TensorFormat, ...]] = {}
    for node in trace(net):
        if is_product(node):
            name = node.parameters["weight"]
            weight = net.module.get_parameter(name).detach()
            axis = 1 if "transpose" in node.op else 0
            limit = weight.abs().movedim(axis, 0).flatten(1).amax(1)
            formats[name] = (IntQuant(-limit, limit, width, True, PerChannel(axis), signed=True),)
    return net.evolve(formats=formats)


def batches(net: str, count: int = 24) -> list[tuple[Tensor, ...]]:
    return [(part,) for part in torch.from_numpy(inputs(net, count)).split(8)]


def output_errors(
    model: Model, reference: Model, net: str, found: dict[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """Layer -> squared error of its output with what was found and with the nearest weights.

    Both read what the network before them, with what was found, makes.
    """
    seen: dict[str, tuple[float, float]] = {}
    for stop in walk(model, reference, batches(net), lambda tensor: tensor):
        name = stop.node.parameters.get("weight")
        if name not in model.formats or not is_product(stop.node):
            continue
        nearest = {name: project(reference.module.get_parameter(name).detach(), model.formats[name])}
        mine = {key: found[key] for key in stop.node.parameters.values() if key in found}
        energy = [0.0, 0.0]
        for batch, exact in enumerate(stop.exact.outputs(stop.twin)):
            for place, parameters in enumerate((mine, nearest)):
                made = stop.stored.compute(stop.node, batch, parameters=parameters)
                energy[place] += float((made - exact).detach().double().square().sum())
        seen[stop.node.name] = (energy[0], energy[1])
        for key, value in mine.items():
            stop.stored.set_parameter(key, value)
    return seen


@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("net", ["residual", "depthwise", "attention", "linear3d", "squeeze_excite"])
def test_every_layers_output_is_nearer_than_with_nearest_rounding(net: str, width: int) -> None:
    model = stored_as(folded(net), width)
    found = gptq(model, folded(net), batches(net), weights=set(model.formats))
    assert set(model.formats) <= set(found)
    for name, (mine, nearest) in output_errors(model, folded(net), net, found).items():
        assert mine < nearest, name


def test_the_mean_error_of_each_layer_goes_into_its_bias() -> None:
    model = stored_as(folded("depthwise"), 3)
    found = gptq(model, folded("depthwise"), batches("depthwise"), weights=set(model.formats))
    for stop in walk(model, folded("depthwise"), batches("depthwise"), lambda tensor: tensor):
        mine = {key: found[key] for key in stop.node.parameters.values() if key in found}
        if not mine:
            continue
        for key, value in mine.items():
            stop.stored.set_parameter(key, value)
        pairs = zip(stop.exact.outputs(stop.twin), stop.stored.outputs(stop.node), strict=True)
        gaps = torch.cat([exact - made for exact, made in pairs])
        mean = gaps.movedim(1, 0).flatten(1).mean(1)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)


def test_biases_stay_without_correction() -> None:
    model = stored_as(folded("residual"), 4)
    found = gptq(
        model,
        folded("residual"),
        batches("residual"),
        weights=set(model.formats),
        settings=Settings(correct_bias=False),
    )
    assert set(found) == set(model.formats)


def test_a_layer_called_twice_is_rounded_once_for_all_that_it_reads() -> None:
    model = stored_as(folded("shared"), 3)
    reference = folded("shared")
    found = gptq(model, reference, batches("shared"), weights=set(model.formats))
    assert set(model.formats) <= set(found)
    for name, value in found.items():
        assert torch.equal(project(value, model.formats.get(name, ())), value)
    seen = output_errors(model, reference, "shared", found)
    assert seen["block#0"][0] + seen["block#1"][0] < seen["block#0"][1] + seen["block#1"][1]
    assert seen["first#0"][0] + seen["second#0"][0] < seen["first#0"][1] + seen["second#0"][1]


class Upsampling(nn.Module):
    """Transposed convolutions, in groups and plain, and convolutions along one and three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.more = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.line = nn.Conv1d(4, 5, 3, padding=1)
        self.cube = nn.Conv3d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.more(torch.relu(self.up(x)))
        line = self.line(y.flatten(2))
        cube = self.cube(y[:, None])
        return line.mean(2) + cube.mean((1, 2, 3, 4))[:, None]


def test_transposed_convolutions_and_other_axes() -> None:
    torch.manual_seed(0)
    x = torch.randn(24, 4, 4, 4)
    net = model_of(Upsampling(), x[:2])
    formats: dict[str, tuple[TensorFormat, ...]] = {}
    for node in trace(net):
        if is_product(node):
            name = node.parameters["weight"]
            limit = net.module.get_parameter(name).detach().abs().amax()
            formats[name] = (IntQuant(-limit, limit, 4, True, PerTensor(), signed=True),)
    assert len(formats) == 4
    model = net.evolve(formats=formats)
    data = [(part,) for part in x.split(8)]
    found = gptq(model, net, data, weights=set(formats))
    for stop in walk(model, net, data, lambda tensor: tensor):
        mine = {key: found[key] for key in stop.node.parameters.values() if key in found}
        if not mine:
            continue
        assert own(stop.node) in mine
        energy = [0.0, 0.0]
        for batch, exact in enumerate(stop.exact.outputs(stop.twin)):
            for place, parameters in enumerate((mine, {})):  # else the nearest, which the stream holds
                made = stop.stored.compute(stop.node, batch, parameters=parameters)
                energy[place] += float((made - exact).detach().square().sum())
        assert energy[0] < energy[1], stop.node.name
        for key, value in mine.items():
            stop.stored.set_parameter(key, value)


def own(node: Node) -> str:
    return node.parameters["weight"]


def test_it_is_the_same_every_time() -> None:
    model = stored_as(folded("depthwise"), 4)
    first, again = (
        gptq(model, folded("depthwise"), batches("depthwise"), weights=set(model.formats)) for _ in range(2)
    )
    assert set(first) == set(again)
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_memory_does_not_grow_with_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest piece of columns is the same for ten times the examples; values live in the scratch."""
    held: list[int] = []

    def count(self: object, exact: Tensor, stored: Tensor) -> None:
        held.append(exact.numel())
        add(self, exact, stored)

    from featherweight.tools.columns import Moments

    add = Moments.add
    monkeypatch.setattr(Moments, "add", count)
    model = stored_as(folded("residual"), 4)
    largest = []
    for examples in (64, 640):
        held.clear()
        x = torch.from_numpy(np.tile(inputs("residual", 64), (examples // 64, 1, 1, 1)))
        gptq(model, folded("residual"), [(part,) for part in x.split(16)], weights=set(model.formats))
        largest.append(max(held))
    assert largest[1] <= largest[0]


def test_the_input_is_left_alone() -> None:
    model = stored_as(folded("residual"), 4)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    gptq(model, replace(model, formats={}), batches("residual"), weights=set(model.formats))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
