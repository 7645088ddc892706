"""factorize: budgets are kept, what would not pay is left, and the result runs where the original did."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.errors import RecipeError
from featherweight.method import Context
from featherweight.methods.factorize import Factorize
from featherweight.model import Model, Replace
from featherweight.plugins import find_runtime
from featherweight.tools.costs import totals
from featherweight.tools.factors import candidates
from featherweight.tools.pace import fitted_pace
from golden import context, data, decibels, inputs, model, model_of, target
from heard import Heard


def around(name: str, heard: Heard | None = None) -> Context:
    return replace(context(model(name), data(name)), progress=heard or Heard())


def factorized(name: str, **settings: Any) -> Model:
    return Factorize(**settings).apply(model(name), around(name))


def kept(name: str, done: Model) -> dict[str, float]:
    whole, left = totals(model(name)), totals(done)
    return {key: left[key] / whole[key] for key in whole}


def output_db(name: str, done: Model) -> float:
    x = torch.from_numpy(inputs(name, 16, 7))
    with torch.no_grad():
        return decibels(model(name).module(x), done.module(x))


class TestAmounts:
    @pytest.mark.parametrize("name", ["residual", "depthwise", "concat", "attention", "squeeze_excite"])
    @pytest.mark.parametrize("fraction", [0.9, 0.8])
    def test_a_budget_is_kept_and_used(self, name: str, fraction: float) -> None:
        for budget, key in (("macs", "macs"), ("parameters", "params")):
            share = kept(name, factorized(name, **{budget: fraction}))[key]
            assert fraction - 0.12 < share <= fraction

    def test_what_cannot_be_reached_is_said_with_what_can(self) -> None:
        with pytest.raises(RecipeError, match=r"cannot keep 5% of the macs: \d+\.\d% is the least") as told:
            factorized("attention", macs=0.05)
        assert told.value.fix is not None

    def test_without_an_amount_it_goes_as_far_as_ranks_that_pay(self) -> None:
        share = kept("shared", factorized("shared", where={"exclude": ["block"]}))["macs"]
        assert 0.75 < share < 1

    def test_more_energy_takes_more(self) -> None:
        shares = [kept("attention", factorized("attention", energy=e))["params"] for e in (0.7, 0.8, 0.9)]
        assert shares == sorted(shares)
        assert shares[0] < shares[-1]

    def test_energy_is_kept_by_every_layer(self) -> None:
        done = factorized("attention", energy=0.9, follow=False, damping=1e-6)
        paths = [edit.path for edit in done.edits if isinstance(edit, Replace)]
        assert len(paths) > 2
        module, seen = model("attention").copy_module(), {}

        def keep(path: str, layer: nn.Module, given: Any, made: torch.Tensor) -> None:
            seen[path] = (given[0], made)

        for path in paths:
            module.get_submodule(path).register_forward_hook(partial(keep, path))
        with torch.no_grad():
            module(torch.from_numpy(inputs("attention", 32, 1)))  # the training examples
            for path, (x, y) in seen.items():
                lost = (done.module.get_submodule(path)(x) - y).square().sum()
                spread = (y - y.flatten(0, -2).mean(0)).square().sum()
                assert float(lost / spread) <= 0.1 + 1e-3

    def test_one_rank_for_every_layer(self) -> None:
        done = factorized("attention", rank=4)
        for edit in done.edits:
            assert isinstance(edit, Replace)
            first, second = edit.layer.layers
            assert first.arguments["out_features"] == second.arguments["in_features"] == 4

    def test_ranks_are_multiples(self) -> None:
        done = factorized("attention", macs=0.7, multiple=4)
        ranks = [edit.layer.layers[0].arguments["out_features"] for edit in done.edits]  # type: ignore[union-attr]
        assert ranks
        assert all(rank % 4 == 0 or rank in (1, 2) for rank in ranks)

    def test_two_amounts_are_one_too_many(self) -> None:
        with pytest.raises(ValueError, match="energy and macs both say how far to go"):
            Factorize(energy=0.9, macs=0.5)

    def test_nothing_pays(self) -> None:
        tiny = model_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)), torch.randn(2, 2))
        x = np.random.default_rng(0).standard_normal((16, 2)).astype(np.float32)
        with pytest.raises(RecipeError, match="found no layer that would be cheaper as a product"):
            Factorize(rank=2).apply(tiny, context(tiny, Data.of(x=x[:8], calibration=x[8:])))


class TestForms:
    @pytest.mark.parametrize("form", ["channel", "spatial", "tucker"])
    def test_only_the_form_that_is_asked_for(self, form: str) -> None:
        done = factorized("residual", macs=0.85, convolutions=form, where={"include": ["layer1", "layer2"]})
        shapes = [
            [tuple(layer.arguments["kernel_size"]) for layer in edit.layer.layers]
            for edit in done.edits
            if isinstance(edit, Replace) and "conv" in edit.path
        ]
        wanted = {
            "channel": [(3, 3), (1, 1)],
            "spatial": [(3, 1), (1, 3)],
            "tucker": [(1, 1), (3, 3), (1, 1)],
        }
        assert shapes
        assert all(shape == wanted[form] for shape in shapes)

    def test_none_leaves_convolutions_of_several_taps_alone(self) -> None:
        done = factorized("residual", convolutions="none")
        assert {edit.path for edit in done.edits if isinstance(edit, Replace)} <= {
            "layer2.shortcut.0",
            "head",
        }

    def test_the_best_form_loses_no_more_than_any_other(self) -> None:
        best = output_db("residual", factorized("residual", macs=0.7))
        others = [
            output_db("residual", factorized("residual", macs=0.7, convolutions=form))
            for form in ("channel", "spatial", "tucker")
        ]
        assert best >= max(others) - 1.0  # the choice is by layers, the decibels are the network's


class TestData:
    @pytest.mark.parametrize("name", ["residual", "depthwise", "concat", "attention", "linear3d"])
    def test_activations_tell_more_than_weights(self, name: str) -> None:
        settings = {"rank": 4}
        weighted = output_db(name, factorized(name, **settings))
        assert weighted > output_db(name, factorized(name, by="weights", **settings)) + 1

    def test_weights_alone_need_no_examples(self) -> None:
        given = model("attention")
        bare = replace(around("attention"), data=Data.of(x=inputs("attention", 4)))
        assert Factorize(by="weights", macs=0.8).apply(given, bare).edits

    def test_the_mean_of_a_layer_stays(self) -> None:
        done = factorized("linear3d", rank=1, follow=False, where={"include": ["fc1"]})
        x = torch.from_numpy(inputs("linear3d", 32, 1))  # the training examples
        with torch.no_grad():
            y, z = (one.module.get_submodule("fc1")(x) for one in (model("linear3d"), done))
        torch.testing.assert_close(z.mean((0, 1)), y.mean((0, 1)), rtol=1e-3, atol=1e-4)


class TestResult:
    @pytest.mark.parametrize("name", ["residual", "shared", "shuffle", "attention", "lstm"])
    def test_it_runs_on_onnx_runtime(self, name: str, tmp_path: Path) -> None:
        done = factorized(name)
        engine, where = find_runtime("onnxruntime"), target()
        session = engine.open(engine.lower(done, where, tmp_path), where)
        x = inputs(name, 3)
        (y,) = session(x)
        with torch.no_grad():
            np.testing.assert_allclose(y, done.module(torch.from_numpy(x)).numpy(), rtol=1e-3, atol=1e-4)

    def test_a_layer_called_twice_is_replaced_once(self) -> None:
        done = factorized("shared", rank=4, where={"include": ["block"]})
        assert [edit.path for edit in done.edits if isinstance(edit, Replace)] == ["block"]
        assert output_db("shared", done) > 20

    def test_frozen_layers_stay_frozen(self) -> None:
        given = model("attention").evolve(module=model("attention").copy_module())
        given.module.get_submodule("fc1").requires_grad_(False)
        done = Factorize(rank=4).apply(given, replace(around("attention"), models={"original": given}))
        grads = {name: p.requires_grad for name, p in done.module.named_parameters() if "fc" in name}
        assert not any(grads[name] for name in grads if name.startswith("fc1."))
        assert all(grads[name] for name in grads if name.startswith("fc2."))

    def test_notes_say_what_stays_whole(self) -> None:
        heard = Heard()
        Factorize().apply(model("depthwise"), around("depthwise", heard))
        assert any("leaves whole" in note for note in heard.notes)
        assert any("block1.depthwise.0" in note and "grouped" in note for note in heard.notes)

    def test_formats_come_later(self) -> None:
        from golden import quantized

        with pytest.raises(RecipeError, match="with formats"):
            Factorize().apply(quantized("residual"), around("residual"))


class Prices:
    """Seconds of layers on a machine that counts multiply-accumulates, and calls."""

    def __init__(self, mac: float = 1e-9, call: float = 1e-6) -> None:
        found, _ = candidates(model("attention"), lambda path, kind: True)
        self.layers = {one.path: one.work().macs * mac + call for one in found}

    def seconds(self, layer: str, integers: bool) -> float | None:
        return self.layers.get(layer)

    def scaled(self, layer: str, inputs: float, outputs: float, integers: bool) -> float | None:
        return None

    def conversion(self, layer: str) -> float | None:
        return None

    def total(self, integers: bool) -> float | None:
        return sum(self.layers.values())


class TestLatency:
    def test_the_line_goes_through_what_was_measured(self) -> None:
        prices = Prices()
        pace = fitted_pace(model("attention"), prices)
        assert pace is not None
        found, _ = candidates(model("attention"), lambda path, kind: True)
        for one in found:
            assert pace.seconds(one, None) == pytest.approx(prices.layers[one.path], rel=1e-6)

    def test_a_budget_of_seconds(self) -> None:
        prices = Prices(call=0.0)
        done = Factorize(latency=0.75).apply(model("attention"), replace(around("attention"), costs=prices))
        whole = sum(prices.layers.values())
        before = totals(model("attention"))["macs"] - totals(done)["macs"]
        assert (whole - before * 1e-9) / whole <= 0.751

    def test_what_is_not_faster_is_left_whole(self) -> None:
        prices = Prices(mac=1e-12, call=1e-6)  # a second call costs more than any product saves
        with pytest.raises(RecipeError, match="found no layer that would be cheaper"):
            Factorize(faster=True, rank=4).apply(
                model("attention"), replace(around("attention"), costs=prices)
            )

    def test_without_prices_there_is_no_budget_of_seconds(self) -> None:
        with pytest.raises(RecipeError, match="needs seconds of layers"):
            Factorize(latency=0.5).apply(model("attention"), around("attention"))
