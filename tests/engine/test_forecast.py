"""Forecasts of bytes and latency from shapes and formats, on golden nets with made-up prices."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from featherweight.engine.costs import MeasuredCosts
from featherweight.engine.forecast import Forecaster, integer_layers
from featherweight.engine.run import Run
from featherweight.engine.store import Store
from featherweight.recipe import Recipe
from featherweight.tools.costs import totals
from golden import data, model, target

NET = "residual"
INT8 = "version: 1\nsteps:\n  - fold: {}\n  - quantize: {samples: 16}\n"
PRUNED = "version: 1\nsteps:\n  - prune: {macs: 0.5, importance: l2}\n"


class Prices:
    """A float layer takes a second, an integer one a quarter; what is beside them, one and a half."""

    known = True

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.asked: list[tuple[float, float]] = []

    def seconds(self, layer: str, integers: bool) -> float:
        return 0.25 if integers else 1.0

    def total(self, integers: bool) -> float:
        return self.layers * self.seconds("", integers) + (0.5 if integers else 1.0)

    def conversion(self, layer: str) -> float:
        return 0.125

    def scaled(self, layer: str, inputs: float, outputs: float, integers: bool) -> float:
        self.asked.append((inputs, outputs))
        return self.seconds(layer, integers) * (inputs + outputs) / 2


def run(folder: Path, runtime: str = "onnxruntime") -> Run:
    return Run(model(NET), data(NET), target(runtime), Store(folder))


def priced(made: Run) -> Prices:
    layers = sum(1 for name in integer_layers(made.original))
    prices = Prices(layers)
    made.costs = cast(MeasuredCosts, prices)
    return prices


def test_the_original_is_itself(tmp_path: Path) -> None:
    made = run(tmp_path)
    prices = priced(made)
    seen = Forecaster(made, 30_000).of(made.original)
    assert (seen.bytes, seen.form, seen.priced) == (30_000, "float", True)
    assert seen.ratio == pytest.approx(1.0)
    assert seen.macs == totals(made.original)["macs"]
    assert prices.asked == []


def test_integers_take_their_prices_and_floats_among_them_the_borders(tmp_path: Path) -> None:
    made = run(tmp_path)
    prices = priced(made)
    forecaster = Forecaster(made, 30_000)
    int8 = made.apply(Recipe.parse(INT8))
    seen = forecaster.of(int8)
    assert seen.form == "integers"
    assert seen.ratio == pytest.approx(prices.total(True) / prices.total(False))
    assert seen.bytes == 30_000 - totals(made.original)["bytes"] + totals(int8)["bytes"] < 16_000
    spared = Recipe.parse(INT8.replace("16}", "16, where: {exclude: [layer2.conv1]}}"))
    assert list(integer_layers(made.apply(spared)).values()).count(False) == 1
    mixed = forecaster.of(made.apply(spared))
    assert mixed.form == "mixed"
    assert mixed.ratio - seen.ratio == pytest.approx((0.75 + 0.125) / prices.total(False))


@pytest.mark.parametrize("widths", [False, True])
def test_fewer_channels_take_less(tmp_path: Path, widths: bool) -> None:
    made = run(tmp_path)
    prices = priced(made)
    cut = made.apply(Recipe.parse(PRUNED))
    seen = Forecaster(made, 30_000, widths=widths).of(cut)
    assert seen.macs < 0.6 * totals(made.original)["macs"]
    assert 0.2 < seen.ratio < 0.9
    assert bool(prices.asked) == widths
    assert all(0 < share <= 1 for pair in prices.asked for share in pair)


def test_layers_that_the_original_has_not_cost_as_their_work(tmp_path: Path) -> None:
    made = run(tmp_path)
    prices = priced(made)
    fresh = Forecaster(made, 30_000)
    fresh._rows = {f"other.{name}": row for name, row in fresh._rows.items()}
    inside = prices.layers * 1.0 / prices.total(False)  # what is beside the layers stays as it is
    assert fresh.of(made.original).ratio == pytest.approx(1.0 + (1.0 - inside), rel=0.01)


@pytest.mark.parametrize("changed", [{"prices": False}, {}])
def test_without_prices_the_work_counts(tmp_path: Path, changed: dict[str, Any]) -> None:
    made = run(tmp_path, "torch")
    if changed:
        priced(made)
    cut = made.apply(Recipe.parse(PRUNED))
    seen = Forecaster(made, 30_000, **changed).of(cut)
    assert not seen.priced
    assert seen.ratio == pytest.approx(seen.macs / totals(made.original)["macs"])
