"""Mixed precision: budgets are kept, the best bits go where the outputs feel them, losses are found once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

from featherweight.errors import RecipeError, TargetError
from featherweight.formats import IntQuant
from featherweight.method import Context
from featherweight.methods.mixed_precision import MixedPrecision
from featherweight.methods.quantize import Quantize
from featherweight.model import Model
from featherweight.tools.simulate import simulate, sqnr_db
from golden import context, data, folded, inputs, target

NET = "residual"


@dataclass(frozen=True)
class Prices:
    """Layers of which some are faster as float."""

    layers: Mapping[str, tuple[float, float]]  # float, integers
    border: float = 0.0

    def seconds(self, layer: str, integers: bool) -> float | None:
        found = self.layers.get(layer)
        return None if found is None else found[integers]

    def conversion(self, layer: str) -> float | None:
        return self.border if layer in self.layers else None

    def total(self, integers: bool) -> float | None:
        return 1.0 + sum(pair[integers] for pair in self.layers.values())

    def scaled(self, layer: str, inputs: float, outputs: float, integers: bool) -> float | None:
        found = self.seconds(layer, integers)
        return None if found is None else found * inputs * outputs


class Remembering:
    """A memory of what was computed, and how often it was."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.computed = 0

    def __call__(self, name: str, parameters: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        key = json.dumps([name, dict(parameters)], sort_keys=True)
        if key not in self.kept:
            self.computed += 1
            self.kept[key] = json.dumps(compute())
        return json.loads(self.kept[key])


@cache
def around(runtime: str = "torch") -> Context:
    return replace(context(folded(NET), data(NET), target(runtime)), memo=Remembering())


def mixed(**parameters: Any) -> Model:
    return MixedPrecision.model_validate(parameters).apply(folded(NET), around())


def weights(net: Model) -> dict[str, IntQuant]:
    found = {name: chain[-1] for name, chain in net.formats.items() if name in net.parameters}
    assert all(isinstance(fmt, IntQuant) for fmt in found.values())
    return found  # type: ignore[return-value]


def mean_bits(net: Model) -> float:
    sizes = {name: net.parameters[name].numel() for name in weights(net)}
    return 8 * sum(fmt.stored_bytes(sizes[name]) for name, fmt in weights(net).items()) / sum(sizes.values())


def decibels(net: Model) -> float:
    """SQNR of the outputs on examples that were not calibrated on."""
    x = torch.from_numpy(inputs(NET, 64, 5))
    with torch.no_grad():
        exact, made = folded(NET).module(x), simulate(net)(x)[0]
    return sqnr_db(float(exact.square().sum()), float((made - exact).square().sum()))


def widths(net: Model) -> list[int]:
    return [fmt.width for fmt in weights(net).values()]


@pytest.mark.parametrize("bits", [5.0, 6.0, 7.5])
def test_mean_of_bits_is_within_the_budget_and_near_it(bits: float) -> None:
    found = mean_bits(mixed(bits=bits))
    assert found <= bits
    assert found > bits - 0.7


def test_better_than_the_same_bits_everywhere() -> None:
    uniform = Quantize(weights="int5").apply(folded(NET), around())
    ours = mixed(bits=mean_bits(uniform), rounding="nearest", candidates=["int8", "int6", "int5", "int4"])
    assert mean_bits(ours) <= mean_bits(uniform)
    assert decibels(ours) > decibels(uniform)


def test_near_the_best_of_all_assignments() -> None:
    """Every assignment of two widths to the four largest layers is tried on other examples."""
    layers = [name.removesuffix(".weight") for name in list(weights(mixed()))[:4]]
    where = {"include": layers}
    size = {layer: folded(NET).parameters[f"{layer}.weight"].numel() for layer in layers}
    budget = 6.5 * sum(size.values())
    options: dict[str, Any] = {"where": where, "rounding": "nearest", "activations": "none"}
    ours = mixed(bits=6.5, candidates=["int8", "int3"], **options)
    tried = []
    for kinds in product(("int8", "int3"), repeat=len(layers)):
        rule = {layer: {"weights": kind} for layer, kind in zip(layers, kinds, strict=True)}
        net = Quantize(layers=rule, where=where, activations="none").apply(folded(NET), around())
        if mean_bits(net) * sum(size.values()) <= budget:
            tried.append(decibels(net))
    assert len(tried) > 2
    assert decibels(ours) >= max(tried) - 1.0


def test_bytes_count_what_is_not_decided_on() -> None:
    parameters = folded(NET).parameters
    total = sum(tensor.numel() for tensor in parameters.values())
    most = int(0.75 * total)
    net = mixed(bytes=most)
    stored = sum(
        net.formats[name][-1].stored_bytes(tensor.numel()) if name in net.formats else 4 * tensor.numel()
        for name, tensor in parameters.items()
    )
    assert stored <= most
    assert stored > 0.9 * most


def test_the_smallest_that_can_be_reached_is_told_and_can_be() -> None:
    with pytest.raises(RecipeError, match="bits of 1 cannot be reached: the least is") as told:
        mixed(bits=1.0)
    assert told.value.fix is not None
    least = float(told.value.fix.removeprefix("bits: ").partition(",")[0])
    assert set(widths(mixed(bits=least))) == {3}


def test_next_best_assignments_are_within_the_budget_too_and_differ() -> None:
    first, second, third = (mixed(bits=6.0, rank=rank) for rank in (1, 2, 3))
    assert len({tuple(widths(net)) for net in (first, second, third)}) == 3
    assert all(mean_bits(net) <= 6.0 for net in (first, second, third))


def test_more_ranks_than_assignments() -> None:
    with pytest.raises(RecipeError, match="only 1 assignment"):
        mixed(candidates=["int8"], rank=2)


def test_losses_are_computed_once_for_all_budgets_and_ranks() -> None:
    memory = Remembering()
    ctx = replace(around(), memo=memory)
    for parameters in ({"bits": 5.0}, {"bits": 6.0}, {"bits": 5.0, "rank": 2}, {"bytes": 60_000}):
        MixedPrecision.model_validate(parameters).apply(folded(NET), ctx)
    assert memory.computed == 1
    MixedPrecision(bits=5.0, rounding="nearest").apply(folded(NET), ctx)
    assert memory.computed == 2


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_gradient_and_output_rank_layers_alike(rounding: str) -> None:
    seen = []
    for measure in ("gradient", "output"):
        memory = Remembering()
        MixedPrecision.model_validate({"measure": measure, "rounding": rounding, "bits": 6.0}).apply(
            folded(NET), replace(around(), memo=memory)
        )
        (table,) = (json.loads(kept) for kept in memory.kept.values())
        seen.append([loss for own in table.values() for loss in own.values()])
    gradient, output = (torch.tensor(one).argsort().argsort().double() for one in seen)
    assert float(torch.corrcoef(torch.stack([gradient, output]))[0, 1]) > 0.85


def test_groups_are_candidates_like_any_other() -> None:
    fine = {"weights": "int4", "granularity": "per_group", "group": 8}
    net = mixed(candidates=["int4", fine], bits=4.8)
    kinds = {type(fmt.granularity).__name__ for fmt in weights(net).values()}
    assert kinds == {"PerChannel", "PerGroup"}
    assert mean_bits(net) <= 4.8


def test_layers_stay_float_where_that_costs_no_time() -> None:
    layers = sorted({name.removesuffix(".weight") for name in weights(mixed())})
    slow, rest = layers[0], layers[1:]
    prices = Prices({slow: (1.0, 3.0)} | dict.fromkeys(rest, (3.0, 1.0)))
    least = 1.0 + 1.0 + len(rest)
    asked = {"latency": least / (2.0 + 3.0 * len(rest)) + 1e-6, "candidates": ["int8", "float"]}
    net = MixedPrecision.model_validate(asked).apply(
        folded(NET), replace(around(), costs=Prices(prices.layers))
    )
    assert {name.removesuffix(".weight") for name in weights(net)} == set(rest)


def test_a_float_layer_pays_for_the_borders_around_it() -> None:
    layers = {name.removesuffix(".weight") for name in weights(mixed())}
    asked = {"latency": 0.99, "candidates": ["int8", "float"]}
    left = []
    for border in (0.0, 10.0):
        ctx = replace(around(), costs=Prices(dict.fromkeys(layers, (3.0, 1.0)), border))
        net = MixedPrecision.model_validate(asked).apply(folded(NET), ctx)
        left.append(len(layers) - len(weights(net)))
    assert left[0] > left[1]


def test_a_latency_that_is_too_short_is_told() -> None:
    layers = {name.removesuffix(".weight") for name in weights(mixed())}
    ctx = replace(around(), costs=Prices(dict.fromkeys(layers, (3.0, 1.0))))
    with pytest.raises(RecipeError, match=r"latency of 0\.1 cannot be reached: the least is") as told:
        MixedPrecision(latency=0.1).apply(folded(NET), ctx)
    least = (1 + len(layers)) / (1 + 3 * len(layers))
    assert f"latency: {math.ceil(1000 * least) / 1000:g}" in str(told.value.fix)


def test_a_runtime_without_times_has_no_latency() -> None:
    with pytest.raises(RecipeError, match="torch tells no times of its layers"):
        mixed(latency=0.5)


def test_only_what_the_runtime_stores_is_offered() -> None:
    net = MixedPrecision(bits=9.0).apply(folded(NET), around("onnxruntime"))
    assert set(widths(net)) == {8}
    with pytest.raises(RecipeError, match="cannot be reached"):
        MixedPrecision(bits=5.0).apply(folded(NET), around("onnxruntime"))


def test_what_no_runtime_stores_is_refused() -> None:
    with pytest.raises((RecipeError, TargetError)):
        MixedPrecision(candidates=("int3",)).apply(folded(NET), around("onnxruntime"))


def test_layers_that_share_a_weight_get_one_format() -> None:
    net = folded("shared")
    ctx = replace(context(net, data("shared"), target("torch")), memo=Remembering())
    done = MixedPrecision(bits=6.0).apply(net, ctx)
    assert mean_bits(done) <= 6.0
