"""Blocks: nearer to the float network than nearest rounding, on the grid, ranges learned where they may."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from featherweight.formats import FloatCast, IntQuant, PerChannel, Ternary
from featherweight.graph import trace
from featherweight.model import Entry, Model
from featherweight.tools.blocks import Settings, reconstruct
from golden import folded, inputs, model, model_of
from rounded import calibration, in_few_bits, output_error, weights_of, with_values

T = TypeVar("T")


def learned(net: str, iterations: int = 60, seed: int = 0, activations: int = 8) -> Model:
    start = in_few_bits(net, activations=activations)
    found = reconstruct(
        start, folded(net), calibration(net), weights=weights_of(start), iterations=iterations, seed=seed
    )
    return with_values(start, found.parameters, found.formats)


@pytest.mark.parametrize(
    ("net", "share"), [("residual", 1.0), ("depthwise", 1.0), ("attention", 0.7), ("squeeze_excite", 0.7)]
)
def test_the_output_is_nearer_to_the_float_one_than_by_nearest_rounding(net: str, share: float) -> None:
    start, done = in_few_bits(net), learned(net)
    for name in weights_of(start):
        assert torch.equal(done.formats[name][0].project(done.parameters[name]), done.parameters[name])
    assert output_error(done, net) < share * output_error(start, net)


@pytest.mark.parametrize("net", ["concat", "shuffle", "shared", "linear3d"])
def test_every_graph_shape_runs_and_gives_weights_on_the_grid(net: str) -> None:
    start, done = in_few_bits(net), learned(net, 3)
    changed = 0
    for name in weights_of(start):
        weight = done.parameters[name]
        assert torch.equal(done.formats[name][0].project(weight), weight)
        changed += int(not torch.equal(weight, start.parameters[name]))
    assert changed == len(weights_of(start))
    assert output_error(done, net) < 100 * output_error(start, net)


def test_a_recurrent_network_learns_its_roundings() -> None:
    reference = model("lstm")
    names = [name for name, tensor in reference.parameters.items() if tensor.dim() == 2]
    formats = {name: (ternary(reference.parameters[name].detach()),) for name in names}
    start = reference.evolve(formats=formats)
    x = torch.from_numpy(inputs("lstm", 32))
    found = reconstruct(start, reference, [(x,)], weights=names, iterations=30)
    assert set(names) <= set(found.parameters)
    done = with_values(start, found.parameters, found.formats)

    def error(of: Model) -> float:
        weights = {name: of.formats[name][0].project(of.parameters[name].detach()) for name in names}
        with torch.no_grad():
            made = torch.func.functional_call(of.module, weights, (x,))
            return float((made - reference.module(x)).square().mean())

    assert error(done) < error(start)


def ternary(weight: Tensor) -> Ternary:
    threshold = 0.7 * weight.abs().mean(1)
    large = weight.abs() > threshold[:, None]
    scale = (weight.abs() * large).sum(1) / large.sum(1).clamp(min=1)
    return Ternary(scale, threshold, PerChannel(0))


def test_ranges_are_learned_and_stay_shared() -> None:
    start, done = in_few_bits("residual", activations=4), learned("residual", activations=4)
    graph = trace(start)
    shared: dict[int, list[str]] = {}
    for name in graph.values:
        for fmt in start.formats.get(name, ()):
            shared.setdefault(id(fmt), []).append(name)
    assert any(len(names) > 1 for names in shared.values())
    moved = 0
    for names in shared.values():
        (after,) = done.formats[names[0]]
        assert all(done.formats[name][0] is after for name in names)
        before = start.formats[names[0]][0]
        assert isinstance(before, IntQuant)
        assert isinstance(after, IntQuant)
        assert torch.equal(after.grid()[1], before.grid()[1])
        assert after.width == before.width
        moved += int(not torch.equal(after.low, before.low) or not torch.equal(after.high, before.high))
    assert moved > len(shared) // 2
    assert output_error(done, "residual") < output_error(start, "residual")


def test_fixed_ranges_and_parameters_of_no_interest_stay() -> None:
    start = in_few_bits("residual")
    values = [name for name in start.formats if name not in start.parameters]
    found = reconstruct(
        start,
        folded("residual"),
        calibration("residual"),
        weights=["layer1.conv1.weight"],
        iterations=3,
        fixed=values,
    )
    assert set(found.parameters) == {"layer1.conv1.weight", "layer1.conv1.bias"}
    assert found.formats == {}


def test_a_weight_in_another_type_is_passed_by() -> None:
    start = in_few_bits("residual")
    formats = {**start.formats, "layer1.conv1.weight": (FloatCast("bfloat16"),)}
    start = start.evolve(formats=formats)
    found = reconstruct(
        start, folded("residual"), calibration("residual"), weights=weights_of(start), iterations=2
    )
    assert "layer1.conv1.weight" not in found.parameters
    assert "layer1.conv2.weight" in found.parameters


def test_no_steps_leave_the_nearest_and_no_weights_nothing() -> None:
    start = in_few_bits("depthwise")
    x = calibration("depthwise", 8)
    found = reconstruct(start, folded("depthwise"), x, weights=weights_of(start), iterations=0)
    for name in weights_of(start):
        assert torch.equal(found.parameters[name], start.formats[name][0].project(start.parameters[name]))
    nothing = reconstruct(start, folded("depthwise"), x, weights=[], iterations=5)
    assert not nothing.parameters
    assert not nothing.formats


def test_the_seed_decides_and_the_input_is_untouched() -> None:
    start = in_few_bits("residual")
    for parameter in (*start.parameters.values(), *folded("residual").parameters.values()):
        parameter.grad = None  # another test may have left one
    before = {name: tensor.detach().clone() for name, tensor in start.parameters.items()}
    formats = dict(start.formats)
    one, again, other = (learned("residual", 3, seed) for seed in (0, 0, 1))
    assert all(torch.equal(one.parameters[name], again.parameters[name]) for name in before)
    assert any(not torch.equal(one.parameters[name], other.parameters[name]) for name in before)
    assert all(torch.equal(start.parameters[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in start.parameters.values())
    assert all(parameter.grad is None for parameter in folded("residual").parameters.values())
    assert dict(start.formats) == formats


def test_a_network_of_a_fixed_batch_is_fitted_by_whole_batches() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(4, 5, 6)
    entry = Entry((x[0],), ("x",), ("y",))
    reference = replace(model_of(module, x[0]), entries={"forward": entry})
    formats = {f"{layer}.weight": (ternary(module[layer].weight.detach()),) for layer in (0, 2)}
    start = reference.evolve(formats=formats)
    found = reconstruct(
        start,
        reference,
        [(batch,) for batch in x],
        weights=list(formats),
        iterations=80,
        settings=Settings(rows=3),
    )
    done = with_values(start, found.parameters)

    def error(of: Model) -> float:
        weights = {name: of.formats[name][0].project(of.parameters[name].detach()) for name in formats}
        with torch.no_grad():
            made = torch.func.functional_call(of.module, weights, (x[1],))
            return float((made - module(x[1])).square().mean())

    assert error(done) < error(start)


class Classes(nn.Module):
    """Returns integers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu()).argmax(1)


def test_a_network_that_returns_classes_is_fitted_to_what_they_are_told_from() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    reference = model_of(Classes(), x[:2])
    names = ["fc1.weight", "fc2.weight"]
    formats = {name: (ternary(reference.parameters[name].detach()),) for name in names}
    start = reference.evolve(formats=formats)
    found = reconstruct(start, reference, [(x,)], weights=names, iterations=80)
    done = with_values(start, found.parameters)

    def agreement(of: Model) -> float:
        weights = {name: of.formats[name][0].project(of.parameters[name].detach()) for name in names}
        with torch.no_grad():
            return float(
                (torch.func.functional_call(of.module, weights, (x,)) == reference.module(x)).float().mean()
            )

    assert agreement(done) > agreement(start)


class Bar:
    """Remembers how far it came."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.steps = 0

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        assert total is not None
        self.totals.append(total)
        for item in items:
            yield item
            self.steps += 1

    def note(self, message: str) -> None:
        raise AssertionError(message)


def test_one_bar_goes_to_its_end_and_values_go_to_the_scratch() -> None:
    start, bar, moved = in_few_bits("residual"), Bar(), []

    def scratch(tensor: Tensor) -> Tensor:
        moved.append(tensor.numel())
        return tensor.clone()

    reconstruct(
        start,
        folded("residual"),
        calibration("residual", 16),
        weights=weights_of(start),
        iterations=2,
        progress=bar,
        scratch=scratch,
    )
    assert bar.totals == [bar.steps]
    assert bar.steps > 100
    assert moved
