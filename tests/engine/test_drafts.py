"""Recipes that begin alike share the work, and long steps come only behind the cheap looks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from featherweight.engine.drafts import Draft, climb, draft, in_part
from featherweight.engine.ladder import Ladder
from featherweight.engine.run import Run
from featherweight.engine.search import Candidate, Search
from featherweight.engine.store import Store
from featherweight.errors import RecipeError
from featherweight.holes import Choice, Hole
from featherweight.methods.fold import Fold
from featherweight.methods.quantize import Quantize
from featherweight.methods.rounding import Rounding
from featherweight.model import Model
from featherweight.outcome import Budget, Measurement, Prediction, Trial
from featherweight.recipe import Recipe, Step
from golden import data, model, target

NET = "shared"
BLOCKS = Step("rounding", {"how": "blocks", "iterations": 20, "samples": 4})
TEMPLATE = Recipe((Step("fold"), Step("quantize", {"samples": 4}), BLOCKS))
Done = Counter[str]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Done:
    """How often each method really computed, by its name and, for rounding, its iterations."""
    found: Done = Counter()

    def watch(kind: Any) -> None:
        apply: Callable[..., Model] = kind.apply

        def watched(self: Any, reached: Model, context: Any) -> Model:
            name = type(self).__name__.lower()
            found[f"{name} {self.iterations}" if name == "rounding" else name] += 1
            return apply(self, reached, context)

        monkeypatch.setattr(kind, "apply", watched)

    for kind in (Fold, Quantize, Rounding):
        watch(kind)
    return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(model(NET), data(NET), target("torch"), Store(tmp_path / "store"))


def asked(recipe: Recipe = TEMPLATE) -> Candidate:
    candidate = Search(recipe, Budget(), baseline=Measurement()).ask()
    assert candidate is not None
    return candidate


def no_holes(candidate: Candidate, index: int, step: Step, model: Model) -> Mapping[str, Hole]:
    return {}


def recipes() -> list[Recipe]:
    """Six that differ in their last steps alone."""
    fold, common = Step("fold"), Step("quantize", {"samples": 4})
    ends = [(), (Step("rounding", {"how": "nearest"}),), (Step("rounding", {"how": "gptq", "samples": 4}),)]
    coarse = Step("quantize", {"samples": 4, "weights": "int4"})
    return [Recipe((fold, middle, *end)) for middle in (common, coarse) for end in ends]


def test_what_recipes_share_is_computed_once(run: Run, done: Done) -> None:
    """Sixteen steps in six recipes are seven different ones."""
    tried = recipes()
    assert sum(len(recipe.steps) for recipe in tried) == 16
    for recipe in tried:
        run.apply(recipe)
    assert done == {"fold": 1, "quantize": 2, "rounding 1000": 4}
    again = Run(model(NET), data(NET), target("torch"), run.store)
    for recipe in tried:
        again.apply(recipe)
    assert sum(done.values()) == 7


def test_long_steps_are_left_out_and_what_is_before_them_is_not_done_again(run: Run, done: Done) -> None:
    candidate = asked()
    made = draft(run, candidate, no_holes, lambda one: True, whole=False)
    assert made is not None and made.left_out == ("rounding",)
    assert done == {"fold": 1, "quantize": 1}
    part = in_part(run, candidate.recipe)
    assert done == {"fold": 1, "quantize": 1, "rounding 2": 1}
    whole = run.apply(candidate.recipe)
    assert done == {"fold": 1, "quantize": 1, "rounding 2": 1, "rounding 20": 1}
    assert len({made.model.key, part.key, whole.key}) == 3


def test_the_whole_leaves_nothing_out(run: Run, done: Done) -> None:
    made = draft(run, asked(), no_holes, lambda one: True, whole=True)
    assert made is not None and made.left_out == ()
    assert done["rounding 20"] == 1


def test_holes_are_filled_and_what_was_tried_before_is_not_computed(run: Run, done: Done) -> None:
    def holes(candidate: Candidate, index: int, step: Step, model: Model) -> Mapping[str, Hole]:
        return {"iterations": Choice((10, 30))} if index == 2 else {}

    open_ended = Recipe((*TEMPLATE.steps[:2], Step("rounding", {"how": "blocks", "samples": 4})))
    candidate = asked(open_ended)
    assert draft(run, candidate, holes, lambda one: False, whole=True) is None
    assert candidate.recipe.steps[2].parameters["iterations"] == 10
    assert done == {"fold": 1, "quantize": 1}


def test_a_step_that_needs_what_was_left_out_gets_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    step, refused = run.step, list[int]()

    def picky(model: Model, method: Any, number: int = 1) -> Model:
        if number == 3 and len(refused) == 0:
            refused.append(number)
            raise RecipeError("nothing was trained")
        return step(model, method, number)

    monkeypatch.setattr(run, "step", picky)
    recipe = Recipe((*TEMPLATE.steps[:1], Step("quantize", {"samples": 4}), BLOCKS))
    swapped = Recipe((recipe.steps[0], recipe.steps[1], BLOCKS, Step("correct_bias", {"samples": 4})))
    monkeypatch.setattr(run, "step", lambda m, method, number=1: picky(m, method, number - (number == 4)))
    made = draft(run, asked(swapped), no_holes, lambda one: True, whole=False)
    assert refused == [3] and made is not None and made.left_out == ()


class Judge:
    """A ladder that is told at which rung a candidate ends."""

    def __init__(self, ends: str = "", matters: bool = True) -> None:
        self.ends, self.matters, self.scores = ends, matters, True
        self.keys: list[str] = []

    def cost(self, up: Any, model: Model) -> None:
        self.keys.append(model.key)
        up.seen.append(Prediction(rung="cost"))

    def quality(self, up: Any, model: Model, left_out: Any, *, recovered: bool) -> None:
        self.keys.append(model.key)
        up.seen.append(Prediction(rung="recovered" if recovered else "simulated"))

    def quality_matters(self, up: Any, trials: Any) -> bool:
        return self.matters

    def add_seconds(self, up: Any, seconds: float) -> None:
        assert up.seen[-1].rung == "recovered" and seconds > 0

    def verdict(self, up: Any, trials: list[Trial]) -> str | None:
        return "no use" if up.seen[-1].rung == self.ends else None


@pytest.mark.parametrize(
    ("judge", "rungs", "computed"),
    [
        (Judge("cost"), ["cost"], 0),
        (Judge(matters=False), ["cost"], 0),
        (Judge("simulated"), ["cost", "simulated"], 0),
        (Judge("recovered"), ["cost", "simulated", "recovered"], 1),
        (Judge(), ["cost", "simulated", "recovered"], 1),
    ],
)
def test_a_candidate_climbs_until_a_rung_drops_it(
    run: Run, done: Done, judge: Judge, rungs: list[str], computed: int
) -> None:
    made = draft(run, asked(), no_holes, lambda one: True, whole=False)
    assert made is not None
    up, reason = climb(cast(Ladder, judge), run, TEMPLATE, made, [])
    assert [one.rung for one in up.seen] == rungs
    assert (reason is not None) == (judge.ends == rungs[-1])
    assert done["rounding 2"] == computed and done["rounding 20"] == 0
    assert judge.keys[0] == made.model.key


def test_nothing_is_left_to_recover_where_nothing_was_left_out(run: Run) -> None:
    up, reason = climb(cast(Ladder, Judge()), run, Recipe(()), Draft(run.start), [])
    assert [one.rung for one in up.seen] == ["cost", "simulated"] and reason is None
