"""Rounding: on-grid results that beat the nearest, by every way; what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.errors import DataError
from featherweight.formats import IntQuant
from featherweight.method import Context
from featherweight.methods.quantize import Quantize
from featherweight.methods.rounding import Rounding, Way
from featherweight.model import Model
from featherweight.recipe import Where
from featherweight.tools.simulate import simulate
from golden import context, data, decibels, folded, inputs, model_of, target
from nets import NETS

WAYS = get_args(Way)


def begun(net: str, weights: str = "int4", **how: Any) -> tuple[Model, Context]:
    """A golden net with formats, and a context that knows its float network."""
    start = folded(net)
    where = replace(context(start, data(net), target("torch")), models={"original": start, "float": start})
    return Quantize(weights=weights, **how).apply(start, where), where  # type: ignore[arg-type]


def sqnr(net: str, stored: Model) -> float:
    """On examples that were not calibrated on."""
    x = torch.from_numpy(inputs(net, 64, seed=5))
    with torch.inference_mode():
        return decibels(folded(net).module(x), simulate(stored)(x)[0])


def quick(how: str, **more: Any) -> Rounding:
    return Rounding.model_validate({"how": how, "iterations": 30, **more})


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("net", ["residual", "attention"])
def test_weights_lie_on_the_grid_that_is_stored(how: str, net: str) -> None:
    start, where = begun(net)
    done = quick(how).apply(start, where)
    held = [name for name in start.parameters if name in start.formats]
    assert held
    for name in held:
        (fmt,) = done.formats[name]
        weight = done.module.get_parameter(name).detach()
        assert torch.equal(fmt.project(weight), weight), name
        assert isinstance(fmt, IntQuant)
        assert torch.equal(fmt.dequantize(fmt.quantize(weight)), weight), name
        if how in ("gptq", "adaround", "nearest"):
            assert fmt is start.formats[name][0]


@pytest.mark.parametrize("net", sorted(set(NETS) - {"lstm"}))
def test_gptq_keeps_the_outputs_nearer_to_the_float_networks(net: str) -> None:
    start, where = begun(net)
    nearest = sqnr(net, start)
    done = Rounding().apply(start, where)
    assert sqnr(net, done) > nearest + 1.0


def test_layers_that_are_no_products_are_rounded_to_the_nearest() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 8)
            self.head = nn.Linear(8, 5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids).mean(1))

    torch.manual_seed(0)
    ids = torch.randint(0, 20, (40, 6))
    net = model_of(Words(), ids[:2])
    formats = {}
    for name in ("table.weight", "head.weight"):
        limit = net.module.get_parameter(name).detach().abs().max()
        formats[name] = (IntQuant(-limit, limit, 4, True),)
    start = net.evolve(formats=formats)
    where = context(net, Data.of(x=ids.numpy()[:8], calibration=ids.numpy()[8:]), target("torch"))
    done = Rounding().apply(start, where)
    table = net.module.get_parameter("table.weight").detach()
    assert torch.equal(done.module.get_parameter("table.weight"), formats["table.weight"][0].project(table))
    head = net.module.get_parameter("head.weight").detach()
    assert not torch.equal(done.module.get_parameter("head.weight"), formats["head.weight"][0].project(head))


def test_a_layer_without_bias_gets_one_by_an_edit() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8, bias=False)
            self.head = nn.Linear(8, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.first(x)))

    torch.manual_seed(0)
    x = torch.randn(40, 6) + 1
    net = model_of(Bare(), x[:2])
    where = context(net, Data.of(x=x.numpy()[:8], calibration=x.numpy()[8:]), target("torch"))
    start = Quantize(weights="int4").apply(net, where)
    done = Rounding().apply(start, where)
    assert [edit.path for edit in done.edits] == ["first", "head"]
    rebuilt = net.rebuild(done.edits, done.module.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(x), done.module(x))
    plain = Rounding(correct_bias=False).apply(start, where)
    assert not plain.edits
    assert set(plain.parameters) == set(net.parameters)


def test_where_is_obeyed_and_shared_weights_with_it() -> None:
    start, where = begun("shared")
    spared = Rounding(where=Where(rules=({"exclude": ["second"]},))).apply(start, where)  # type: ignore[arg-type]
    first = start.module.get_parameter("first.weight")
    assert torch.equal(spared.module.get_parameter("first.weight"), first)
    assert not torch.equal(
        spared.module.get_parameter("stem.0.weight"), start.module.get_parameter("stem.0.weight")
    )


def test_without_formats_nothing_changes() -> None:
    net = folded("residual")
    done = Rounding().apply(net, context(net, data("residual")))
    assert not done.formats
    assert all(torch.equal(value, done.module.get_parameter(name)) for name, value in net.parameters.items())


@pytest.mark.parametrize("how", ["hqq", "nearest"])
def test_some_ways_need_no_data(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start, where = begun("residual", activations="none")
    monkeypatch.setattr(Data, "calibration", lambda self, limit=None: iter(()))
    done = quick(how, correct_bias=False).apply(start, where)
    assert set(done.formats) == set(start.formats)
    with pytest.raises(DataError, match="no calibration examples"):
        Rounding().apply(start, where)


def test_hqq_moves_ranges_of_few_bits_and_helps() -> None:
    start, where = begun("attention", activations="none", weight_range="minmax")
    done = quick("hqq", correct_bias=False).apply(start, where)
    assert sqnr("attention", done) > sqnr("attention", start)


def test_a_seed_decides_and_the_input_stays() -> None:
    start, where = begun("depthwise")
    before = {name: value.clone() for name, value in start.module.state_dict().items()}
    one, two = (Rounding().apply(start, where) for _ in range(2))
    assert all(torch.equal(value, two.module.get_parameter(name)) for name, value in one.parameters.items())
    assert all(torch.equal(value, before[name]) for name, value in start.module.state_dict().items())
