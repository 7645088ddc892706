"""Prune: every amount is reached, by every importance and scope; what it says where it cannot."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import language_nets
from featherweight.data import Data
from featherweight.errors import DataError, RecipeError
from featherweight.graph import trace
from featherweight.method import Context
from featherweight.methods.prune import Prune
from featherweight.model import Model
from featherweight.recipe import Where
from featherweight.runtime import Json
from featherweight.tools.costs import totals
from featherweight.tools.rankings import Importance
from golden import context, data, decibels, inputs, model, model_of
from heard import Heard

NETS = ("residual", "depthwise", "concat", "shuffle", "attention", "lstm", "squeeze_excite", "shared")
EXAMPLE = Path(__file__).parents[2] / "examples" / "fashion_mnist"
KEYS = {"macs": "macs", "parameters": "params", "bytes": "bytes"}


class Prices:
    """Costs of layers that are known: a second for a layer, by the product of what is left."""

    def seconds(self, layer: str, integers: bool) -> float | None:
        return 1.0

    def conversion(self, layer: str) -> float | None:
        return None

    def total(self, integers: bool) -> float | None:
        return 8.0

    def scaled(self, layer: str, inputs: float, outputs: float, integers: bool) -> float | None:
        return None if layer == "head" else 0.2 + 0.8 * inputs * outputs


def around(net: str, **more: Any) -> Context:
    return replace(context(model(net), data(net)), **more)


def left(net: str, done: Model, key: str) -> float:
    return totals(done)[key] / totals(model(net))[key]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("amount", KEYS)
def test_each_amount_is_reached(net: str, amount: str) -> None:
    notes = Heard()
    done = Prune.model_validate({amount: 0.6, "round_to": 1}).apply(model(net), around(net, progress=notes))
    assert notes.notes == []
    assert 0.5 < left(net, done, KEYS[amount]) <= 0.6
    x = torch.from_numpy(inputs(net, 3))
    with torch.no_grad():
        assert done.module(x).isfinite().all()
        assert done.module(x).shape == model(net).module(x).shape


@pytest.mark.parametrize("net", ["residual", "attention", "lstm", "depthwise"])
@pytest.mark.parametrize("importance", [*get_args(Importance), "auto"])
@pytest.mark.parametrize("scope", ["global", "layer", "isomorphic"])
def test_each_importance_in_each_scope(net: str, importance: str, scope: str) -> None:
    method = Prune.model_validate(
        {"macs": 0.6, "importance": importance, "scope": scope, "round_to": 1, "reconstruct": False}
    )
    if importance == "batch_norm" and net == "lstm":
        with pytest.raises(RecipeError, match="finds no norm"):
            method.apply(model(net), around(net))
        return
    done = method.apply(model(net), around(net))
    assert 0.4 < left(net, done, "macs") <= 0.6


def test_a_ratio_of_the_channels_goes() -> None:
    done = Prune(ratio=0.25, scope="layer", round_to=1).apply(model("residual"), around("residual"))
    assert [done.module.get_parameter(f"{one}.weight").shape[0] for one in ("stem.0", "layer2.conv1")] == [
        6,
        12,
    ]


def test_a_threshold_takes_weak_channels_of_each_group() -> None:
    module = model("residual").copy_module()
    with torch.no_grad():
        module.get_parameter("layer2.conv1.weight")[:5] *= 1e-3
        module.get_parameter("layer2.conv2.weight")[:, :5] *= 1e-3
    weak = model("residual").evolve(module=module)
    done = Prune(threshold=0.05, importance="l2", round_to=1).apply(weak, context(weak, data("residual")))
    assert done.module.get_parameter("layer2.conv1.weight").shape[0] == 11
    assert done.module.get_parameter("stem.0.weight").shape[0] == 8


def test_latency_is_that_of_the_table() -> None:
    where = around("residual", costs=Prices())
    done = Prune(latency=0.6, round_to=1).apply(model("residual"), where)
    first, then = model("residual").parameters, done.parameters
    names = [name for name in first if first[name].dim() == 4]
    seconds = 2.0  # of what is not in the table
    for name in names:
        shares = [a / b for a, b in zip(then[name].shape[:2], first[name].shape[:2], strict=True)]
        seconds += 0.2 + 0.8 * shares[0] * shares[1]
    assert 0.5 * 8 < seconds <= 0.6 * 8 + 1e-9


def test_latency_without_prices_says_what_to_do() -> None:
    with pytest.raises(RecipeError, match="tells nothing of what layers cost") as caught:
        Prune(latency=0.5).apply(model("residual"), around("residual"))
    assert caught.value.fix is not None


def test_widths_are_multiples_of_what_kernels_like() -> None:
    done = Prune(macs=0.5, round_to=4).apply(model("depthwise"), around("depthwise"))
    shapes = [p.shape[0] for name, p in done.parameters.items() if p.dim() == 4]
    assert all(size % 4 == 0 for size in shapes)
    narrow = Prune(macs=0.7, min_channels=12, round_to=1).apply(model("depthwise"), around("depthwise"))
    first = model("depthwise").parameters
    kept = {name: p.shape[0] for name, p in narrow.parameters.items()}
    assert all(kept[name] >= min(12, p.shape[0]) for name, p in first.items())


@pytest.mark.parametrize(("keep", "narrowest"), [(0.3, 0.2), (0.03, 0.0)])
def test_a_group_keeps_a_fifth_while_others_can_give(keep: float, narrowest: float) -> None:
    weak = model("residual").copy_module()
    with torch.no_grad():  # all but nothing depends on this group
        for name in ("layer2.conv1.weight", "layer2.bn1.weight", "layer2.bn1.bias"):
            weak.get_parameter(name)[1:] *= 1e-6
    net = model("residual").evolve(module=weak)
    done = Prune(macs=keep, round_to=1).apply(net, context(net, data("residual")))
    shares = [
        len(done.module.get_parameter(name)) / len(weight)
        for name, weight in net.parameters.items()
        if weight.dim() == 4
    ]
    assert min(shares) >= narrowest
    assert (min(shares) < 0.2) == (narrowest == 0.0)
    assert totals(done)["macs"] <= keep * totals(net)["macs"]
    alone = Prune(macs=0.7, round_to=1, max_ratio=1.0).apply(net, context(net, data("residual")))
    assert len(alone.module.get_parameter("layer2.conv1.weight")) < 0.2 * 16


def test_kinds_choose_what_may_go() -> None:
    done = Prune(parameters=0.9, kinds=("head",), round_to=1).apply(model("attention"), around("attention"))
    assert done.module.get_parameter("qkv.weight").shape[0] in (72, 48, 24)
    assert done.module.get_parameter("fc1.weight").shape == (64, 32)


class TestValues:
    @pytest.mark.parametrize("net", ["residual", "encoder"])
    @pytest.mark.parametrize("how", [True, "norms"])
    def test_the_trace_of_the_cut_holds_the_new_values(self, net: str, how: object) -> None:
        made = language_nets.encoder() if net == "encoder" else model(net)
        examples = Data.of(x_train=language_nets.ids(32)) if net == "encoder" else data(net)
        method = Prune.model_validate({"macs": 0.6, "importance": "l2", "reconstruct": how, "round_to": 1})
        done = method.apply(made, context(made, examples))
        assert set(done.traced) == set(done.entries)  # it is not exported once more
        x = made.entries["forward"].example_inputs
        with torch.no_grad():
            ours, anew = (
                trace(one).program.module(check_guards=False)(*x)
                for one in (done, done.evolve(module=done.module))
            )
            assert torch.equal(ours, anew)
            assert torch.allclose(ours, done.module(*x), atol=1e-6)

    @pytest.mark.parametrize("net", ["residual", "depthwise", "concat", "attention"])
    def test_solving_anew_brings_outputs_back(self, net: str) -> None:
        x = torch.from_numpy(inputs(net, 64, seed=5))
        found = {}
        for how in (True, False):
            method = Prune(macs=0.6, round_to=1, reconstruct=how, importance="l2")
            with torch.no_grad():
                found[how] = decibels(model(net).module(x), method.apply(model(net), around(net)).module(x))
        assert found[True] > found[False] + 6

    def test_only_statistics_of_norms(self) -> None:
        plain, norms = (
            Prune(macs=0.6, importance="l2", reconstruct=how).apply(model("residual"), around("residual"))
            for how in (False, "norms")
        )
        for name, value in plain.module.named_parameters():
            assert torch.equal(value, norms.module.get_parameter(name))
        name = "layer2.bn1.running_var"
        assert not torch.equal(plain.module.get_buffer(name), norms.module.get_buffer(name))

    def test_taylor_takes_labels_where_there_are(self) -> None:
        unlabelled = Data.of(inputs("attention", 8), x_train=inputs("attention", 32))
        method = Prune(macs=0.6, importance="taylor", round_to=1, reconstruct=False)
        with_labels = method.apply(model("attention"), around("attention"))
        without = method.apply(model("attention"), around("attention", data=unlabelled))
        assert left("attention", without, "macs") <= 0.6
        assert with_labels.edits != without.edits


class TestBadInput:
    def test_two_amounts(self) -> None:
        with pytest.raises(ValueError, match="prune takes one amount, and ratio and macs are given"):
            Prune(ratio=0.3, macs=0.5)

    @pytest.mark.parametrize(
        "amount", [{"ratio": 0.99}, {"macs": 0.001}, {"parameters": 0.01}, {"ratio": 0.9, "min_channels": 4}]
    )
    def test_more_than_can_go(self, amount: dict[str, Any]) -> None:
        with pytest.raises(RecipeError, match=r"prune can keep no less than 0\.\d+ of the") as caught:
            Prune(**amount).apply(model("residual"), around("residual"))
        assert "round_to" in str(caught.value.fix)

    def test_without_an_amount_it_goes_as_far_as_it_can_and_says_so(self) -> None:
        notes = Heard()
        where = around("residual", progress=notes)
        done = Prune(min_channels=7, round_to=1).apply(model("residual"), where)
        assert left("residual", done, "macs") > 0.5
        assert any("can keep no less than" in note for note in notes.notes)

    def test_nothing_may_go(self) -> None:
        method = Prune.model_validate({"macs": 0.5, "where": {"exclude": ["*"]}})
        with pytest.raises(RecipeError, match="finds no channels that may go"):
            method.apply(model("residual"), around("residual"))

    @pytest.mark.parametrize("asked", [{"reconstruct": True}, {"importance": "activation"}])
    def test_no_calibration_examples(self, asked: dict[str, Any]) -> None:
        where = around("residual", data=Data.of(inputs("residual", 8)))  # scored ones only
        with pytest.raises(DataError, match="no calibration examples") as caught:
            Prune.model_validate({"macs": 0.5, **asked}).apply(model("residual"), where)
        assert "x_train" in str(caught.value.fix)

    def test_it_works_on_weights_alone(self) -> None:
        where = around("residual", data=Data.of(inputs("residual", 8)))
        assert left("residual", Prune(macs=0.6, round_to=1).apply(model("residual"), where), "macs") <= 0.6

    def test_formats_come_later(self) -> None:
        from golden import folded, quantized

        with pytest.raises(RecipeError, match="formats"):
            Prune(macs=0.6).apply(quantized("residual"), context(folded("residual"), data("residual")))


def test_holes_are_the_amount_and_the_choices() -> None:
    found = Prune.holes(model("residual"), around("residual"))
    assert set(found) == {"macs", "importance", "scope"}
    assert found["importance"].first == "reconstruction"
    bare = Prune.holes(model("residual"), around("residual", data=Data.of(inputs("residual", 8))))
    assert bare["importance"].first == "l2"


def shipped(name: str, calibration: int) -> tuple[Model, Context, Data]:
    spec = importlib.util.spec_from_file_location("fashion_nets", EXAMPLE / "nets.py")
    assert spec is not None
    assert spec.loader is not None
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    module = getattr(nets, name)()
    module.load_state_dict(load_file(EXAMPLE / f"{name}.safetensors"))
    arrays = np.load(EXAMPLE / "data.npz")
    examples = Data.of(arrays["x"], arrays["y"], x_train=arrays["x_train"][:calibration])
    net = model_of(module.eval(), torch.from_numpy(arrays["x"][:2]))
    return net, context(net, examples), examples


def accuracy(net: Model, examples: Data, count: int) -> float:
    def run(x: np.ndarray) -> tuple[np.ndarray, ...]:
        with torch.no_grad():
            return (net.module(torch.from_numpy(x)).numpy(),)

    return float(next(iter(examples.score(run, np.arange(count)).values())).mean())


def test_half_of_a_trained_network_goes_without_labels() -> None:
    net, where, examples = shipped("resnet20", 128)
    done = Prune(macs=0.5, round_to=1).apply(net, where)
    assert totals(done)["macs"] <= 0.5 * totals(net)["macs"]
    assert accuracy(done, examples, 500) > 0.85


def test_amounts_share_their_rankings() -> None:
    kept: dict[str, Json] = {}

    def memo(name: str, parameters: Mapping[str, Json], compute: Callable[[], Json]) -> Json:
        key = json.dumps([name, dict(parameters)])
        if key not in kept:
            kept[key] = json.loads(json.dumps(compute()))
        return kept[key]

    where = around("residual", memo=memo)
    net = model("residual")
    for amount in (0.7, 0.4):
        done = Prune(macs=amount).apply(net, where)
        assert done.edits == Prune(macs=amount).apply(net, around("residual")).edits
        assert len(kept) == 1
    Prune(macs=0.4, samples=32).apply(net, where)
    assert len(kept) == 2
    held = Where(exclude=("layer1*",))
    done = Prune(macs=0.8, where=held).apply(net, where)
    assert done.edits == Prune(macs=0.8, where=held).apply(net, around("residual")).edits
    assert len(kept) == 3
    Prune(macs=0.7, importance="l2").apply(net, where)
    assert len(kept) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "macs", "least"),
    [("resnet20", 0.5, 0.92), ("resnet20", 0.25, 0.86), ("depthwise", 0.5, 0.91), ("depthwise", 0.25, 0.86)],
)
def test_accuracy_of_the_shipped_networks_before_any_training(name: str, macs: float, least: float) -> None:
    net, where, examples = shipped(name, 2000)
    done = Prune(macs=macs, round_to=1).apply(net, where)
    assert totals(done)["macs"] <= macs * totals(net)["macs"]
    assert accuracy(done, examples, 3000) >= least
