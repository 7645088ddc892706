"""Where a search begins: limits along the front that the sensitivity of layers predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featherweight.engine.run import Run
from featherweight.engine.search import Search
from featherweight.engine.store import Store
from featherweight.engine.warm import analyses, openings, starts
from featherweight.errors import DataError
from featherweight.holes import Choice, Range
from featherweight.method import Method, Silent
from featherweight.methods.mixed_precision import MixedPrecision
from featherweight.outcome import Budget, Measurement
from featherweight.recipe import Recipe, Step
from featherweight.tools.choices import Choices
from golden import data, model, target

NET = "residual"
MIXED = Step("mixed_precision", {"bits": Range(3.2, 9.0, default=7.77), "samples": 4, "rounding": "nearest"})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(model(NET), data(NET), target("torch"), Store(tmp_path / "store"))


def test_limits_lie_along_the_predicted_front(run: Run) -> None:
    found = [one["bits"] for one in starts(run, MIXED, run.original, MIXED.holes())]
    between, cheapest, dearest = found
    assert 3.2 <= cheapest < between < dearest <= 9.0
    losses, context = [], run.context(run.original)
    for bits in (cheapest, between, dearest):
        method = MixedPrecision(bits=bits, samples=4, rounding="nearest")
        choices = Choices.of(run.original, method._offers(run.original, context))
        predicted = method._predicted(choices, method._losses(choices, context), context)
        assert predicted is not None
        losses.append(predicted.loss)
    assert losses[0] > losses[1] > losses[2]


def test_limits_out_of_reach_are_left_out(run: Run) -> None:
    step = Step("mixed_precision", {"bits": Choice((0.5, 1.0, 8.9)), "samples": 4, "rounding": "nearest"})
    assert [dict(one) for one in starts(run, step, run.original, step.holes())] == [{"bits": 8.9}]


def test_other_holes_and_methods_have_no_analysis(run: Run) -> None:
    assert analyses(MIXED) and not analyses(Step("quantize"))
    ranked = Step("mixed_precision", {"bits": 8.9, "samples": 4})
    assert list(starts(run, ranked, run.original, {"rank": Choice((1, 2))})) == []
    quantize = Step("quantize", {"range": Choice(("mse", "minmax"))})
    assert list(starts(run, quantize, run.original, quantize.holes())) == []


def test_an_analysis_that_fails_is_told_and_passed_over(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []

    class Told(Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    def fails(*_: Any) -> Any:
        raise DataError("there are no calibration examples")

    run.progress = Told()
    monkeypatch.setattr(MixedPrecision, "starts", classmethod(fails))
    assert MixedPrecision.starts.__func__ is not Method.starts.__func__  # type: ignore[attr-defined]
    assert list(starts(run, MIXED, run.original, MIXED.holes())) == []
    assert notes == ["warning: no sensitivity analysis of mixed_precision: there are no calibration examples"]


def test_a_recipe_begins_with_them(run: Run) -> None:
    recipe = Recipe((Step("fold"), MIXED, Step("rounding", {"how": Choice(("gptq", "nearest"))})))
    found = openings(run, recipe)
    assert len(found) == 3 and all(list(one.values) == [1] for one in found)
    search = Search(recipe, Budget(), baseline=Measurement(bytes=1, latency_ratio=1.0, quality_drop=0.0))
    search.open_with(found)
    first = [search.ask() for _ in range(4)]
    told = [one.recipe.steps[1].parameters["bits"] for one in first if one is not None]
    assert told[:3] == [one.values[1]["bits"] for one in found]
    assert told[3] == MIXED.holes()["bits"].first
    assert all(one.recipe.steps[2].parameters["how"] == "gptq" for one in first if one is not None)
