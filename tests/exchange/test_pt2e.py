"""Formats as torch's quantize and dequantize operators: the program computes what the simulation says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.data import Data
from featherweight.errors import TargetError
from featherweight.exchange.pt2e import QuantizedProgram, quantized_program
from featherweight.formats import FloatCast, IntQuant, PerChannel, PerGroup, TensorFormat
from featherweight.methods.quantize import Quantize
from featherweight.model import Entry, Model
from featherweight.runtime import Role
from featherweight.tools.simulate import simulate
from golden import context, decibels, inputs, model, model_of, quantized
from nets import NETS


def realise(fmt: TensorFormat, _: Role) -> TensorFormat:
    """Signed integers, as most kernels that read such programs have them."""
    return replace(fmt, signed=True, headroom=0) if isinstance(fmt, IntQuant) else fmt


def signed(net: Model) -> Model:
    formats = {name: tuple(realise(fmt, "weight") for fmt in chain) for name, chain in net.formats.items()}
    return net.evolve(formats=formats)


def written(net: Model, **options: Any) -> QuantizedProgram:
    return quantized_program(net, realise=realise, **options)


def answers(made: QuantizedProgram, x: Tensor) -> Tensor:
    with torch.no_grad():
        (y,) = made.program.module()(x)
    return y


def simulated(net: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        (y,) = simulate(signed(net))(x)
    return y


def operators(made: QuantizedProgram) -> Counter[str]:
    calls = (node.target for node in made.program.graph.nodes if node.op == "call_function")
    return Counter(
        getattr(call, "_schema", call).name.split("::")[-1] for call in calls if hasattr(call, "_schema")
    )


def quantize(module: nn.Module, *examples: Tensor, **parameters: Any) -> Model:
    net = model_of(module, *examples)
    data = Data.of(x_train=examples[0].numpy())
    return Quantize.model_validate(parameters).apply(net, context(net, data))


@pytest.mark.parametrize("name", NETS)
class TestGoldenNets:
    def test_it_computes_what_the_simulation_says(self, name: str) -> None:
        x = torch.from_numpy(inputs(name, 1))
        assert (
            decibels(
                simulated(quantized(name, "executorch"), x),
                answers(written(quantized(name, "executorch")), x),
            )
            > 100
        )

    def test_without_formats_it_is_the_module(self, name: str) -> None:
        x = torch.from_numpy(inputs(name, 1))
        with torch.no_grad():
            wanted = model(name).module(x)
        torch.testing.assert_close(answers(written(model(name)), x), wanted, rtol=1e-4, atol=1e-5)

    def test_stored_integers_are_those_of_the_formats(self, name: str) -> None:
        net, made = quantized(name, "executorch"), written(quantized(name, "executorch"))
        held = {parameter: made.program.state_dict[key] for key, parameter in made.tensors.items()}
        for parameter, chain in net.formats.items():
            if parameter in net.parameters:
                grid = realise(chain[-1], "weight")
                assert isinstance(grid, IntQuant)
                assert torch.equal(held[parameter].int(), grid.quantize(net.parameters[parameter].detach()))

    def test_names_are_identifiers(self, name: str) -> None:
        made = written(quantized(name, "executorch"))
        assert all(key.isidentifier() for key in made.program.state_dict)
        assert set(made.tensors) <= set(made.program.state_dict)


class TestValues:
    def test_each_reader_has_a_dequantize_of_its_own(self) -> None:
        made = written(quantized("residual"))
        for node in made.program.graph.nodes:
            if "dequantize_per_tensor" in str(node.target):
                assert len(node.users) == 1

    def test_a_clamp_that_the_grid_does_is_dropped(self) -> None:
        net = quantize(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3), nn.ReLU()),
            torch.randn(8, 3, 8, 8),
        )
        assert not {"relu", "relu6", "hardtanh"} & set(operators(written(net)))

    def test_a_clamp_that_the_grid_does_not_do_stays(self) -> None:
        net = model_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6()), torch.randn(4, 3, 8, 8))
        wide = IntQuant(torch.tensor(-1.0), torch.tensor(8.0))
        made = written(net.evolve(formats={"1#0:0": (wide,)}))
        assert operators(made)["relu6"] + operators(made)["hardtanh"] == 1

    def test_one_grid_for_operators_that_want_it(self) -> None:
        class Net(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.cat([x, x.abs()], 1)

        net = model_of(Net(), torch.randn(2, 3, 4))
        ends = {"input:x": (-3.0, 3.0), "/abs#0:0": (0.0, 2.0), "/cat#0:0": (-3.0, 3.0)}
        formats = {
            name: (IntQuant(torch.tensor(low), torch.tensor(high)),) for name, (low, high) in ends.items()
        }
        net = net.evolve(formats=formats)
        apart, shared = written(net), written(net, one_grid={"cat"})
        assert operators(shared)["quantize_per_tensor"] == operators(apart)["quantize_per_tensor"] + 1
        x = torch.randn(1, 3, 4)
        assert decibels(simulated(net, x), answers(apart, x)) > 100
        assert decibels(simulated(net, x), answers(shared, x)) > 30

    def test_dropout_leaves_nothing(self) -> None:
        net = quantize(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 4)), torch.randn(16, 6))
        assert operators(written(net))["dropout"] == 0

    def test_a_value_that_is_no_integer_is_refused(self) -> None:
        net = model_of(nn.Linear(4, 4), torch.randn(2, 4))
        with pytest.raises(TargetError, match="'input:x' cannot be FloatCast") as told:
            written(net.evolve(formats={"input:x": (FloatCast(),)}))
        assert told.value.fix is not None


class TestWeights:
    def linear(self, fmt: TensorFormat) -> Model:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = model_of(nn.Linear(80, 5), torch.randn(2, 80))
        return net.evolve(formats={"weight": (fmt,)})

    @pytest.mark.parametrize("width", [4, 8])
    @pytest.mark.parametrize("granularity", [PerChannel(0), PerGroup(1, 32), PerGroup(1, 128)])
    def test_alone(self, width: int, granularity: PerChannel | PerGroup) -> None:
        shape = (5,) if isinstance(granularity, PerChannel) else (5, granularity.groups(80))
        fmt = IntQuant(-torch.ones(shape) / 9, torch.ones(shape) / 9, width, True, granularity, signed=True)
        net, x = self.linear(fmt), torch.randn(1, 80)
        rest = isinstance(granularity, PerGroup) and granularity.size == 32
        for dynamic in (True,) if rest else (False, True):
            made = written(net, dynamic=dynamic)
            (key,) = (key for key, parameter in made.tensors.items() if parameter == "weight")
            assert made.program.state_dict[key].dtype == torch.int8
            assert operators(made)["choose_qparams"] == dynamic
            assert decibels(simulated(net, x), answers(made, x)) > (30 if dynamic else 100)

    def test_half_precision(self) -> None:
        net, x = self.linear(FloatCast("float16")), torch.randn(1, 80)
        made = written(net)
        (key,) = (key for key, parameter in made.tensors.items() if parameter == "weight")
        assert made.program.state_dict[key].dtype == torch.float16
        assert decibels(simulated(net, x), answers(made, x)) > 100

    @pytest.mark.parametrize("size", [0.0, 1e-9, 1e-7])
    def test_a_channel_of_next_to_nothing_keeps_its_bias(self, size: float) -> None:
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        with torch.no_grad():
            module[0].weight[1] *= size
            module[0].bias[1] = 2.0
        made = written(quantize(module, torch.randn(8, 3, 8, 8)))
        state = made.program.state_dict
        step = made.grids["input:x"][0]
        assert (state["t_0_bias"].abs() / (state["t_0_weight_scale"] * step) < 2**31).all()

    def test_two_readers_share_one_tensor(self) -> None:
        made = written(quantized("shared"))
        assert Counter(made.tensors.values())["first.weight"] == 1


class TestExport:
    def test_the_batch_is_fixed_or_free(self) -> None:
        net = quantized("residual")
        (x,) = (node for node in written(net, batch=3).program.graph.nodes if node.name == "x")
        assert x.meta["val"].shape[0] == 3
        free = written(net, batch=None)
        for batch in (2, 5):
            x = torch.from_numpy(inputs("residual", batch))
            assert decibels(simulated(net, x), answers(free, x)) > 100

    def test_flat_tensors_whatever_the_call(self) -> None:
        class Pair(nn.Module):
            def forward(self, both: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
                return {"sum": both[0] + both[1], "difference": both[0] - both[1]}

        examples = (torch.randn(2, 3), torch.randn(2, 3))
        tree = torch.utils._pytree.tree_flatten((examples,))[1]
        entry = Entry(examples, ("a", "b"), ("s", "d"), {"a": {0: "n"}, "b": {0: "n"}}, tree=tree)
        made = quantized_program(Model(Pair().eval(), {"forward": entry}, key="pair"))
        one, two = torch.randn(1, 3), torch.randn(1, 3)
        total, difference = made.program.module()(one, two)
        assert torch.equal(total, one + two)
        assert torch.equal(difference, one - two)

    def test_the_model_is_left_alone(self) -> None:
        net = quantized("concat")
        before = {name: value.clone() for name, value in net.module.state_dict().items()}
        x = torch.from_numpy(inputs("concat", 2))
        wanted = simulated(net, x)
        written(net, one_grid={"cat"}, dynamic=True)
        assert all(torch.equal(value, before[name]) for name, value in net.module.state_dict().items())
        assert torch.equal(simulated(net, x), wanted)

    def test_it_can_be_saved(self, tmp_path: Path) -> None:
        made = written(quantized("shared"))
        torch.export.save(made.program, tmp_path / "program.pt2")
        again = torch.export.load(tmp_path / "program.pt2")
        x = torch.from_numpy(inputs("shared", 1))
        with torch.no_grad():
            assert torch.equal(again.module()(x)[0], made.program.module()(x)[0])
