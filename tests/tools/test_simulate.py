"""Simulation: the module as it is without formats, and what the formats say with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.formats import IntQuant, PerChannel, TensorFormat
from featherweight.graph import trace
from featherweight.model import Entry, Model
from featherweight.tools.simulate import (
    Replay,
    as_run,
    layer_errors,
    project,
    projected_parameters,
    simulate,
    sqnr_db,
)
from golden import decibels, inputs, model, model_of, quantized
from nets import NETS


def grid(low: float, high: float, width: int = 8) -> IntQuant:
    return IntQuant(torch.tensor(low), torch.tensor(high), width)


class Two(nn.Module):
    """Small enough to compute by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 5)
        self.b = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)) + 1)


@pytest.fixture
def two() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return model_of(Two(), torch.randn(2, 4))


class TestReplay:
    @pytest.mark.parametrize("name", NETS)
    def test_without_formats_is_the_module(self, name: str) -> None:
        x = torch.from_numpy(inputs(name, 5))
        with torch.no_grad():
            (seen,) = Replay(model(name))((x,))
            assert torch.allclose(seen, model(name).module(x), rtol=1e-5, atol=1e-6)

    def test_shows_every_value_in_order(self) -> None:
        graph = trace(model("shuffle"))
        seen: dict[str, Tensor] = {}

        def observe(name: str, value: Tensor) -> Tensor:
            assert name not in seen
            seen[name] = value
            return value

        with torch.no_grad():
            outputs = Replay(model("shuffle"))((torch.from_numpy(inputs("shuffle", 3)),), observe)
        assert list(seen) == list(graph.values)
        assert torch.equal(outputs[0], seen[graph.outputs[0]])
        assert all(value.shape[0] == 3 for value in seen.values())

    def test_what_an_observer_returns_is_what_consumers_see(self, two: Model) -> None:
        def observe(name: str, value: Tensor) -> Tensor:
            return torch.full_like(value, 2.0) if name == "/relu#0:0" else value

        (y,) = Replay(two)((torch.randn(2, 4),), observe)
        assert torch.allclose(y, two.module.b(torch.full((2, 5), 3.0)))

    def test_takes_other_values_for_parameters(self, two: Model) -> None:
        x = torch.randn(2, 4)
        (y,) = Replay(two, parameters={"b.weight": torch.zeros(3, 5)})((x,))
        assert torch.allclose(y, two.module.b.bias.expand(2, 3))

    def test_follows_the_module_when_it_is_trained(self, two: Model) -> None:
        replay = Replay(two)
        (y,) = replay((torch.randn(2, 4),))
        y.sum().backward()
        assert two.module.b.weight.grad is not None
        assert two.module.b.weight.grad.abs().sum() > 0

    def test_another_entry(self) -> None:
        class Net(Two):
            def encode(self, x: Tensor) -> Tensor:
                return F.relu(self.a(x))

        x = torch.randn(2, 4)
        module = Net().eval()
        entries = {name: Entry((x,), ("x",), ("y",), {}, name) for name in ("forward", "encode")}
        (y,) = Replay(Model(module, entries), "encode")((x,))
        assert torch.allclose(y, module.encode(x))

    def test_a_constant_made_in_forward(self) -> None:
        class Net(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * torch.tensor([1.0, 2.0, 3.0, 4.0])

        x = torch.randn(2, 4)
        (y,) = Replay(model_of(Net(), x))((x,))
        assert torch.equal(y, x * torch.tensor([1.0, 2.0, 3.0, 4.0]))


class TestSimulate:
    def test_is_what_one_computes_by_hand(self, two: Model) -> None:
        weight = IntQuant(
            two.module.a.weight.detach().amin(1),
            two.module.a.weight.detach().amax(1),
            4,
            True,
            PerChannel(0),
            signed=True,
        )
        formats: dict[str, tuple[TensorFormat, ...]] = {
            "a.weight": (weight,),
            "b.bias": (grid(-1, 1, 3),),
            "input:x": (grid(-1, 1, 4),),
            "/add#0:0": (grid(0, 3, 5),),
            "b#0:0": (grid(-2, 2, 6), grid(-1, 1, 6)),
        }
        x = torch.randn(7, 4)
        with torch.no_grad():
            (seen,) = simulate(two.evolve(formats=formats))(x)
            module = two.module
            y = F.linear(grid(-1, 1, 4).project(x), weight.project(module.a.weight), module.a.bias)
            y = grid(0, 3, 5).project(F.relu(y) + 1)
            y = F.linear(y, module.b.weight, grid(-1, 1, 3).project(module.b.bias))
            y = grid(-1, 1, 6).project(grid(-2, 2, 6).project(y))
        assert torch.allclose(seen, y, atol=1e-6)
        assert decibels(module(x).detach(), seen) < 40

    def test_a_tied_parameter_is_projected_for_all_its_readers(self) -> None:
        shared = model("shared")
        rough = {"first.weight": (grid(-0.3, 0.3, 2),)}
        seen: dict[str, Tensor] = {}
        replay = Replay(shared, parameters=projected_parameters(shared.evolve(formats=rough)))
        x = torch.from_numpy(inputs("shared", 3))
        with torch.no_grad():
            replay((x,), seen.setdefault)
            weight = grid(-0.3, 0.3, 2).project(shared.module.first.weight)
            for layer, source in (("first", "/mean#0:0"), ("second", "/relu#2:0")):
                wanted = F.linear(seen[source], weight, shared.module.get_submodule(layer).bias)
                assert torch.allclose(seen[f"{layer}#0:0"], wanted, atol=1e-6)

    def test_leaves_the_module_alone(self) -> None:
        before = {name: tensor.clone() for name, tensor in quantized("residual").module.state_dict().items()}
        simulate(quantized("residual"))(torch.from_numpy(inputs("residual", 2)))
        after = quantized("residual").module.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_gradients_pass_through_formats(self, two: Model) -> None:
        formatted = two.evolve(formats={"input:x": (grid(-4, 4),), "/relu#0:0": (grid(0, 4),)})
        x = torch.randn(2, 4, requires_grad=True)
        (y,) = simulate(formatted)(x)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.abs().sum() > 0

    def test_on_arrays(self, two: Model) -> None:
        x = np.asfortranarray(np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32))
        (y,) = as_run(simulate(two))(x)
        assert isinstance(y, np.ndarray)
        assert np.allclose(y, two.module(torch.tensor(x)).detach().numpy(), atol=1e-6)


class TestLayerErrors:
    def test_a_layer_alone_is_what_one_computes_by_hand(self, two: Model) -> None:
        rough = grid(-0.5, 0.5, 3)
        formatted = two.evolve(formats={"b.weight": (rough,), "/add#0:0": (grid(0, 3, 4),)})
        x = torch.randn(64, 4)
        found = layer_errors(formatted, [(x[:32],), (x[32:],)])
        with torch.no_grad():
            hidden = F.relu(two.module.a(x)) + 1
            exact = two.module.b(hidden)
            alone = F.linear(
                grid(0, 3, 4).project(hidden), rough.project(two.module.b.weight), two.module.b.bias
            )
        assert found == {"b#0": pytest.approx(decibels(exact, alone), abs=1e-3)}

    def test_coarser_formats_cost_more(self, two: Model) -> None:
        def error(width: int) -> float:
            formatted = two.evolve(formats={"a.weight": (grid(-0.5, 0.5, width),)})
            return layer_errors(formatted, [(torch.ones(8, 4),)])["a#0"]

        assert error(2) < error(4) < error(8)

    def test_int8_golden_layers_are_all_there_and_good(self) -> None:
        found = layer_errors(quantized("residual"), [(torch.from_numpy(inputs("residual")),)])
        weighted = {"stem.0#0", "layer1.conv1#0", "layer1.conv2#0", "layer2.shortcut.0#0", "head#0"}
        assert weighted <= set(found)
        assert min(found[name] for name in weighted) > 25

    def test_nothing_without_formats(self, two: Model) -> None:
        assert layer_errors(two, [(torch.ones(2, 4),)]) == {}


def test_formats_apply_left_to_right() -> None:
    x = torch.tensor([0.3, 5.0])
    coarse, clamped = grid(-8, 8, 4), grid(0, 1, 8)
    assert torch.equal(project(x, (coarse, clamped)), clamped.project(coarse.project(x)))
    assert torch.equal(project(x, ()), x)


def test_only_parameters_with_formats_are_projected() -> None:
    found = projected_parameters(replace(quantized("linear3d")))
    assert set(found) == {"fc1.weight", "fc2.weight", "head.weight"}
    assert not any(tensor.requires_grad for tensor in found.values())


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(1.0, 0.01, 20.0), (1.0, 1.0, 0.0), (1.0, 0.0, 120.0), (0.0, 0.0, 120.0), (0.0, 1.0, 0.0)],
)
def test_decibels(signal: float, noise: float, expected: float) -> None:
    assert sqnr_db(signal, noise) == pytest.approx(expected)
