"""Blocks, kernels and activations: what goes is measured, what stays is what was there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featherweight.data import Data
from featherweight.engine.run import Run
from featherweight.engine.store import Store
from featherweight.errors import RecipeError
from featherweight.method import Context
from featherweight.methods.shrink import Shrink
from featherweight.model import Model
from featherweight.plugins import find_runtime
from featherweight.recipe import Recipe
from featherweight.tools.batch_norms import reestimate
from featherweight.tools.batches import calibration_batches
from featherweight.tools.costs import totals
from featherweight.tools.output_error import difference, outputs
from featherweight.tools.prices import Prices as LayerPrices
from featherweight.tools.removal import removed
from featherweight.tools.residuals import residual_blocks
from featherweight.tools.savings import with_buffers
from golden import context, data, inputs, model, model_of, target
from heard import Heard


@dataclass(frozen=True)
class Prices:
    """Every layer takes as long as it is told."""

    layers: Mapping[str, float]
    rest: float = 0.0
    asked: list[tuple[str, float, float]] = field(default_factory=list)

    def seconds(self, layer: str, integers: bool) -> float | None:
        return self.layers.get(layer)

    def conversion(self, layer: str) -> float | None:
        return None

    def total(self, integers: bool) -> float | None:
        return self.rest + sum(self.layers.values())

    def scaled(self, layer: str, inputs: float, outputs: float, integers: bool) -> float | None:
        self.asked.append((layer, inputs, outputs))
        found = self.layers.get(layer)
        return None if found is None else found * inputs * outputs


class Blocks(nn.Module):
    """Residual blocks of which the second does most, the third next to nothing."""

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(8, gain, kernel) for gain in (0.3, 2.0, 0.01))
        self.act = nn.Hardswish()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.act(x).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, width: int, gain: float, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(width)
        nn.init.constant_(self.norm.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


def blocks(kernel: int = 3) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = model_of(Blocks(kernel), torch.randn(2, 3, 12, 12))
    seen = reestimate(net, [(torch.from_numpy(pictures()),)])
    return with_buffers(net, seen).evolve(key=net.key)


def pictures(count: int = 48) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 12, 12)).astype(np.float32)


def around(net: Model, **changes: Any) -> Context:
    return replace(context(net, Data.of(x_train=pictures())), **changes)


def shrunk(net: Model, around: Context, **parameters: Any) -> Model:
    return Shrink.model_validate(parameters).apply(net, around)


def kept(net: Model, name: str) -> float:
    return totals(net)[name]


class TestBlocks:
    def test_the_least_important_goes_first(self) -> None:
        net, said = blocks(), Heard()
        done = shrunk(net, around(net, progress=said), blocks=1)
        assert isinstance(done.module.get_submodule("blocks.2"), nn.Identity)
        assert "blocks.2 (error" in said.notes[-1]
        two = shrunk(net, around(net), blocks=2)
        assert isinstance(two.module.get_submodule("blocks.0"), nn.Identity)
        assert not isinstance(two.module.get_submodule("blocks.1"), nn.Identity)

    def test_importance_is_the_error_of_really_removing_it(self) -> None:
        """Each block alone: removed, statistics re-estimated, outputs against the network's."""
        net, said = blocks(), Heard()
        ctx = around(net, progress=said)
        batches = calibration_batches(ctx, 128, "test")
        wanted = outputs(net, batches)
        errors = {}
        for block in residual_blocks(net):
            changed = removed(net, block)
            changed = with_buffers(changed, reestimate(changed, batches))
            errors[block.name] = difference(wanted, outputs(changed, batches))
        least = min(errors, key=lambda name: errors[name])
        done = shrunk(net, ctx)
        assert isinstance(done.module.get_submodule(least), nn.Identity)
        assert difference(wanted, outputs(done, batches)) == pytest.approx(errors[least])
        assert f"{least} (error {errors[least]:.2g})" in said.notes[-1]

    def test_statistics_are_those_of_what_is_left(self) -> None:
        net = blocks()
        done = shrunk(net, around(net), blocks=2)
        ctx = around(net)
        wanted = reestimate(done, calibration_batches(ctx, 128, "test"))
        for name, value in wanted.items():
            assert torch.allclose(done.module.get_buffer(name), value)
        last = "blocks.1.norm.running_mean"
        assert not torch.equal(net.module.get_buffer(last), done.module.get_buffer(last))

    def test_fractions_to_keep_are_kept(self) -> None:
        net = blocks()
        for name, key in (("macs", "macs"), ("parameters", "params")):
            done = shrunk(net, around(net), **{name: 0.7})
            assert kept(done, key) <= 0.7 * kept(net, key)
            assert kept(done, key) > 0.2 * kept(net, key)

    def test_latency_goes_by_the_measured_prices(self) -> None:
        net = blocks()
        layers = {"stem": 1.0, "blocks.0.conv": 6.0, "blocks.1.conv": 1.0, "blocks.2.conv": 1.0, "head": 0.5}
        ctx = around(net, costs=Prices(layers, rest=0.5))
        done = shrunk(net, ctx, latency=0.5, kernels={})
        assert isinstance(done.module.get_submodule("blocks.0"), nn.Identity)

    def test_prices_are_those_of_the_width_that_is_left(self) -> None:
        net = blocks()
        wide = model_of(Blocks(3), torch.randn(2, 3, 12, 12))
        wide.module.blocks[0].conv = nn.Conv2d(8, 32, 3, padding=1)  # type: ignore[union-attr, index]
        wide.module.blocks[0].norm = nn.Conv2d(32, 8, 1)  # type: ignore[union-attr, index]
        costs = Prices({"blocks.0.conv": 4.0, "stem": 1.0}, rest=0.5)
        prices = LayerPrices.of(net, around(net, costs=costs, models={"original": wide}))
        assert prices is not None
        assert prices.seconds("blocks.0.conv") == pytest.approx(1.0)
        assert ("blocks.0.conv", 1.0, 0.25) in costs.asked
        assert prices.total == pytest.approx(0.5 + 1.0 + 1.0)

    def test_what_where_leaves_out_stays(self) -> None:
        net = blocks()
        done = shrunk(net, around(net), blocks=1, where={"exclude": ["blocks.2.norm"]})
        assert isinstance(done.module.get_submodule("blocks.0"), nn.Identity)
        assert not isinstance(done.module.get_submodule("blocks.2"), nn.Identity)

    def test_classes_by_their_divergence(self) -> None:
        net, said = blocks(), Heard()
        shrunk(net, around(net, progress=said), blocks=1, importance="kl")
        assert "blocks.2 (kl" in said.notes[-1]

    def test_a_network_without_blocks_stays_as_it_is(self) -> None:
        said = Heard()
        net = model("shared")
        done = shrunk(net, replace(context(net, data("shared")), progress=said))
        assert done.edits == ()
        assert "no residual block" in said.notes[-1]

    def test_too_much_is_told(self) -> None:
        net = blocks()
        with pytest.raises(RecipeError, match="5 blocks shall go, but 3 can") as caught:
            shrunk(net, around(net), blocks=5)
        assert str(caught.value.fix).startswith("blocks: 3")
        with pytest.raises(RecipeError, match=r"macs: 0\.05 is out of reach"):
            shrunk(net, around(net), macs=0.05, kernels={})
        with pytest.raises(RecipeError, match="tells no times of layers"):
            shrunk(net, around(net), latency=0.5)

    @pytest.mark.parametrize("name", ["residual", "depthwise", "attention", "squeeze_excite"])
    def test_it_runs_on_onnx_runtime(self, name: str, tmp_path: Path) -> None:
        run = Run(model(name), data(name), target(), Store(tmp_path))
        done = run.apply(Recipe.parse("version: 1\nsteps:\n  - shrink: {blocks: 1}\n"))
        assert kept(done, "macs") < kept(model(name), "macs")
        engine = find_runtime("onnxruntime")
        session = engine.open(run.lower(done), run.target)
        x = inputs(name, 3)
        with torch.no_grad():
            wanted = done.module(torch.from_numpy(x)).numpy()
        assert np.allclose(session(x)[0], wanted, atol=1e-4)


class TestKernels:
    def test_all_of_a_size(self) -> None:
        net = blocks(5)
        done = shrunk(net, around(net), kernels={5: 3})
        for index in range(3):
            conv = done.module.get_submodule(f"blocks.{index}.conv")
            assert isinstance(conv, nn.Conv2d)
            assert (conv.kernel_size, conv.padding, tuple(conv.weight.shape)) == (
                (3, 3),
                (1, 1),
                (8, 8, 3, 3),
            )
        assert isinstance(done.module.get_submodule("stem"), nn.Conv2d)
        assert done.module.get_submodule("stem").weight.shape[-1] == 3
        x = net.entries["forward"].example_inputs[0]
        with torch.no_grad():
            assert torch.equal(net.rebuild(done.edits, done.module.state_dict())(x), done.module(x))

    def test_with_a_fraction_kernels_and_blocks_compete(self) -> None:
        net, said = blocks(5), Heard()
        done = shrunk(net, around(net, progress=said), macs=0.8)
        assert kept(done, "macs") <= 0.8 * kept(net, "macs")
        assert "from 5x5 to 3x3" in said.notes[-1]
        plain = shrunk(net, around(net), macs=0.8, kernels={})
        assert all(getattr(edit, "name", "") != "kernel_size" for edit in plain.edits)

    def test_sizes_that_do_not_fit(self) -> None:
        net = blocks()
        with pytest.raises(RecipeError, match="no convolution has a kernel of 7"):
            shrunk(net, around(net), kernels={7: 5})
        with pytest.raises(ValueError, match="smaller odd or even size"):
            Shrink.model_validate({"kernels": {"5": 4}})
        with pytest.raises(ValueError, match="two amounts"):
            Shrink(macs=0.5, blocks=2)


class TestActivations:
    def test_named_ones_are_replaced(self) -> None:
        net = blocks()
        done = shrunk(net, around(net), activations={"Hardswish": "ReLU"})
        assert isinstance(done.module.get_submodule("act"), nn.ReLU)
        assert len(residual_blocks(done)) == 3

    def test_auto_only_where_it_pays(self) -> None:
        net, said = blocks(), Heard()
        layers = {"stem": 1.0, "act": 0.01}
        stays = shrunk(net, around(net, costs=Prices(layers), progress=said), activations="auto")
        assert isinstance(stays.module.get_submodule("act"), nn.Hardswish)
        assert said.notes[-1].endswith("stay")
        layers["act"] = 0.5
        goes = shrunk(net, around(net, costs=Prices(layers), progress=said), activations="auto")
        assert isinstance(goes.module.get_submodule("act"), nn.ReLU)

    def test_functions_in_code_are_told(self) -> None:
        said, net = Heard(), model("squeeze_excite")
        ctx = replace(context(net, data("squeeze_excite")), progress=said)
        done = shrunk(net, ctx, activations={"Hardsigmoid": "ReLU", "SiLU": "ReLU"})
        assert isinstance(done.module.get_submodule("stem.2"), nn.ReLU)
        assert "functions in the model's code and stay" in said.notes[0]

    def test_mistakes(self) -> None:
        net = blocks()
        with pytest.raises(RecipeError, match="no layer GELU"):
            shrunk(net, around(net), activations={"GELU": "ReLU"})
        with pytest.raises(ValueError, match="cannot become"):
            Shrink(activations={"ReLU": "GELU"})


class TestInput:
    @pytest.mark.parametrize("share", [0.5, 0.75])
    def test_all_behind_works_on_fewer_pixels(self, share: float, tmp_path: Path) -> None:
        net = blocks()
        done = shrunk(net, around(net), input=share)
        pixels = (round(12 * share) / 12) ** 2
        convolved = kept(net, "macs") - 40
        assert kept(done, "macs") == pytest.approx(40 + convolved * pixels)
        x = pictures(3)
        with torch.no_grad():
            wanted = done.module(torch.from_numpy(x)).numpy()
            rebuilt = net.rebuild(done.edits, done.module.state_dict())
            assert torch.equal(rebuilt(torch.from_numpy(x)), torch.from_numpy(wanted))
        assert wanted.shape == (3, 5)
        engine = find_runtime("onnxruntime")
        session = engine.open(engine.lower(done, target(), tmp_path), target())
        assert np.allclose(session(x)[0], wanted, atol=1e-4)

    def test_whole_factors_are_averages(self) -> None:
        net = blocks()
        done = shrunk(net, around(net), input=0.5)
        small = torch.nn.functional.avg_pool2d(torch.from_numpy(pictures(2)), 2)
        plain = net.copy_module()
        plain.load_state_dict(done.module.state_dict())
        with torch.no_grad():
            assert torch.allclose(done.module(torch.from_numpy(pictures(2))), plain(small), atol=1e-5)

    def test_a_size_that_code_fixes_is_refused(self) -> None:
        flat = model_of(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 5)), torch.randn(2, 3, 12, 12)
        )
        with pytest.raises(RecipeError, match="as large as it is") as caught:
            shrunk(flat, around(flat), input=0.5)
        assert "pool over all positions" in str(caught.value.fix)
        with pytest.raises(RecipeError, match="no pictures"):
            shrunk(model("linear3d"), replace(context(model("linear3d"), data("linear3d"))), input=0.5)


def test_holes_name_what_the_network_has() -> None:
    net = blocks()
    holes = Shrink.holes(net, around(net))
    assert set(holes) == {"macs", "activations"}
    assert holes["macs"].ends() == (0.75, 0.5, 0.35, 0.25)
    assert Shrink.holes(model("linear3d"), around(model("linear3d"))).keys() == {"macs", "activations"}
    plain = model_of(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8))
    assert Shrink.holes(plain, around(plain)) == {}


def test_what_holes_offer_can_be_had() -> None:
    net = blocks()
    smallest = min(Shrink.holes(net, around(net))["macs"].ends())
    done = shrunk(net, around(net), macs=smallest)
    assert kept(done, "macs") <= smallest * kept(net, "macs")


class TestDifference:
    def test_error_is_noise_to_signal(self) -> None:
        a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 5.0]])
        assert difference([(a,)], [(b,)]) == pytest.approx(1 / 25)
        assert difference([(a,)], [(torch.full((1, 2), torch.nan),)]) == math.inf

    def test_kl_of_logits_and_of_probabilities(self) -> None:
        a, b = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.5, 0.0]])
        p, q = a.softmax(-1), b.softmax(-1)
        wanted = float((p * (p / q).log()).sum())
        assert difference([(a,)], [(b,)], "kl") == pytest.approx(wanted, rel=1e-5)
        assert difference([(p,)], [(q,)], "kl") == pytest.approx(wanted, rel=1e-5)
