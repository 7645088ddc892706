"""Importances, held against worlds in which one knows what decides."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from featherweight.engine.importances import LEAST
from featherweight.engine.search import Failure, Search
from featherweight.holes import Choice, Range
from featherweight.outcome import Budget, Importance, Importances, Measurement
from featherweight.recipe import Recipe, Step

BASELINE = Measurement(bytes=1_000_000, latency_ratio=1.0, quality_drop=0.0)
SPACE = Recipe(
    (
        Step("prune", {"ratio": Range(0.0, 0.9)}),
        Step("quantize", {"bits": Choice((8, 6, 4)), "range": Choice(("mse", "minmax"))}),
    )
)
World = Callable[[Recipe, int], Measurement | Failure]


def device(recipe: Recipe, number: int) -> Measurement:
    """Bits alone cost quality, pruning alone makes it fast, the range does nothing."""
    prune, quantize = (step.parameters for step in recipe.steps)
    noise = random.Random(number).random() / 1e4
    return Measurement(
        quality_drop=0.01 * (8 - quantize["bits"]) + noise,
        bytes=round(1e6 * (1 - 0.9 * prune["ratio"])),
        latency_ratio=1 - prune["ratio"],
    )


def told(trials: int, world: World = device, recipe: Recipe = SPACE, **more: object) -> Importances:
    search = Search(recipe, Budget(), baseline=BASELINE, trials=trials, seed=3, **more)  # type: ignore[arg-type]
    while (candidate := search.ask()) is not None:
        search.tell(candidate, world(candidate.recipe, candidate.number), sha256="0" * 64)
    return search.importances()


def shares(found: Importances, name: str) -> dict[str, float]:
    return {row.parameter: getattr(row, name) or 0.0 for row in found.rows}


def test_what_decides_is_found_for_each_figure() -> None:
    found = told(40)
    assert (found.evaluator, found.trials, found.reason) == ("PED-ANOVA", 40, "")
    assert set(shares(found, "bytes")) == {"prune: ratio", "quantize: bits", "quantize: range"}
    drop, size, latency = (shares(found, name) for name in ("quality_drop", "bytes", "latency_ratio"))
    assert max(drop, key=drop.__getitem__) == "quantize: bits"
    assert max(size, key=size.__getitem__) == "prune: ratio"
    assert max(latency, key=latency.__getitem__) == "prune: ratio"
    assert drop["quantize: bits"] > 0.4
    for one in (drop, size, latency):
        assert sum(one.values()) == pytest.approx(1.0)


def test_few_trials_tell_nothing_and_say_so() -> None:
    found = told(LEAST - 1)
    assert found.rows == []
    assert found.reason == f"{LEAST - 1} measured trials are too few to tell: it takes {LEAST}"
    assert told(LEAST).rows


def test_failures_do_not_count() -> None:
    def half(recipe: Recipe, number: int) -> Measurement | Failure:
        return Failure("no") if number % 2 else device(recipe, number)

    assert told(20, half).trials == 10
    assert told(20, half).rows == []


def test_a_figure_that_never_changes_has_no_shares() -> None:
    def flat(recipe: Recipe, number: int) -> Measurement:
        return device(recipe, number).model_copy(update={"latency_ratio": 0.5, "bytes": 10})

    found = told(24, flat)
    assert {row.latency_ratio for row in found.rows} == {None}
    assert any(row.quality_drop for row in found.rows)


def test_ways_and_repeated_methods_have_names() -> None:
    ways = {
        "one": Recipe((Step("quantize", {"bits": Choice((8, 4))}),)),
        "two": Recipe(
            (
                Step("prune", {"ratio": Range(0.1, 0.9)}),
                Step("quantize"),
                Step("prune", {"ratio": Range(0.2, 0.8)}),
            )
        ),
    }

    def world(recipe: Recipe, number: int) -> Measurement:
        smaller = 0.2 if recipe.steps[0].method == "prune" else 1.0
        return Measurement(
            quality_drop=0.01 * random.Random(number).random(),
            bytes=round(1e6 * smaller),
            latency_ratio=smaller,
        )

    search = Search(Recipe(()), Budget(), baseline=BASELINE, trials=24, seed=1, ways=ways)
    while (candidate := search.ask()) is not None:
        for step, holes in candidate.recipe.holes().items():
            candidate.fill(step, holes)
        if search.accept(candidate):
            search.tell(candidate, world(candidate.recipe, candidate.number), sha256="0" * 64)
    found = search.importances()
    assert {row.parameter for row in found.rows} >= {"way", "quantize: bits"}
    assert {row.parameter for row in found.rows} >= {"prune (step 1): ratio", "prune (step 3): ratio"}
    assert isinstance(found.rows[0], Importance)
