"""The search, held against functions instead of runtimes: it finds, never repeats, ends, and goes on."""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from featherweight.engine.draws import Draw, Tried, parameter, random_value, suggest
from featherweight.engine.search import Failure, Opening, Search, score
from featherweight.errors import BudgetError, OutputError
from featherweight.holes import Choice, Hole, Range, canonical
from featherweight.outcome import Budget, Latency, Measurement, Preference
from featherweight.recipe import Recipe, Step

BASELINE = Measurement(bytes=1_000_000, latency_ratio=1.0, quality_drop=0.0)
SPACE = Recipe(
    (
        Step("prune", {"ratio": Range(0.0, 0.9)}),
        Step("quantize", {"activations": Choice(("int8", "none")), "bits": Range(4, 8)}),
    )
)
SMALL = Recipe((Step("quantize", {"bits": Choice((8, 4)), "keep": Choice(([], ["head"], ["stem"]))}),))


def measured(drop: float, size: float, ratio: float) -> Measurement:
    return Measurement(
        quality_drop=drop,
        bytes=round(size),
        latency_s=Latency(median=ratio / 100, q1=ratio / 100, q3=ratio / 100),
        latency_ratio=ratio,
        resolved=True,
    )


def device(recipe: Recipe) -> Measurement:
    """A made-up world: pruning costs quality late, low bits cost it early, int8 activations are fast."""
    prune, quantize = (step.parameters for step in recipe.steps)
    ratio, bits, fast = prune["ratio"], quantize["bits"], quantize["activations"] == "int8"
    drop = 0.05 * ratio**3 + 0.004 * (8 - bits) ** 2 + 0.001 * fast
    return measured(drop, 1e6 * (1 - ratio) * bits / 32, (1 - 0.8 * ratio) * (0.5 if fast else 1.0))


def run(search: Search, world: Callable[[Recipe], Measurement | Failure]) -> list[Recipe]:
    asked = []
    while (candidate := search.ask()) is not None:
        asked.append(candidate.recipe)
        search.tell(candidate, world(candidate.recipe))
    return asked


def search(recipe: Recipe = SPACE, budget: Budget | None = None, **told: Any) -> Search:
    return Search(recipe, budget or Budget(quality_drop=0.01), baseline=BASELINE, **told)


# ---- anytime


def test_the_first_candidate_is_the_default() -> None:
    candidate = search(
        Recipe((Step("a", {"x": Range(0.0, 1.0, default=0.9), "y": Choice(("b", "a"))}),))
    ).ask()
    assert candidate is not None and candidate.number == 0
    assert candidate.recipe.steps[0].parameters == {"x": 0.9, "y": "b"}


def test_there_is_an_answer_after_any_number_of_tells() -> None:
    one = search(trials=8)
    assert one.best().trial is None and one.pareto() == []
    best = None
    for number in range(8):
        candidate = one.ask()
        assert candidate is not None and not candidate.recipe.has_holes
        told = one.tell(candidate, device(candidate.recipe))
        assert told.number == number and told.recipe == candidate.recipe.to_dict()
        verdict = one.best()
        assert verdict.trial is not None
        if best is not None and best.met:
            assert verdict.met  # it never gets worse
        best = verdict
    assert one.ask() is None and one.ended == "trials"


def test_failures_are_kept_and_do_not_stop_the_search() -> None:
    one = search(trials=6)
    run(one, lambda recipe: Failure("the runner died"))
    assert [trial.state for trial in one.trials] == ["failed"] * 6
    assert one.trials[0].reason == "the runner died" and one.trials[0].measurement is None
    assert one.best().trial is None and one.pareto() == []


def test_failures_among_successes() -> None:
    def world(recipe: Recipe) -> Measurement | Failure:
        return Failure("too few bits") if recipe.steps[1].parameters["bits"] < 6 else device(recipe)

    one = search(trials=25)
    run(one, world)
    assert {trial.state for trial in one.trials} == {"failed", "measured"}
    assert one.best().met


def test_rejected_trials_are_told_but_not_chosen() -> None:
    one = search(trials=2)
    for reason in ("slower than the original", None):
        candidate = one.ask()
        assert candidate is not None
        one.tell(candidate, device(candidate.recipe), rejected=reason, seconds=1.5, sha256="ab")
    assert [trial.state for trial in one.trials] == ["rejected", "measured"]
    assert one.trials[0].reason == "slower than the original" and one.trials[0].sha256 == "ab"
    assert one.trials[0].seconds == 1.5
    assert one.best().trial == one.trials[1] and one.pareto() == [one.trials[1]]


def test_what_was_not_measured_does_not_break_the_sampler() -> None:
    one = search(budget=Budget(quality_drop=0.01, latency_s=0.001, memory_bytes=1), trials=12)
    run(one, lambda recipe: Measurement(bytes=1))
    assert len(one.trials) == 12 and not one.best().met
    two = search(budget=Budget(latency_s=0.001, memory_bytes=1), trials=12)
    run(two, lambda recipe: device(recipe).model_copy(update={"resolved": False}))
    assert [item.reason for item in two.best().blocking] == ["unresolved", "not measured"]


def test_the_time_is_up_but_one_candidate_is_always_there() -> None:
    now = [0.0]
    one = search(trials=100, deadline_s=10.0, clock=lambda: now[0])
    now[0] = 11.0
    candidate = one.ask()
    assert candidate is not None
    one.tell(candidate, device(candidate.recipe))
    assert one.ask() is None and one.ended == "time"


def test_no_trials_are_refused() -> None:
    with pytest.raises(BudgetError):
        search(trials=0)


# ---- finding


def chance(prefer: Preference, seed: int, trials: int) -> Search:
    """A search whose candidates were drawn evenly."""
    generator = random.Random(seed)
    one = search(prefer=prefer, trials=1)
    run(one, device)
    for number in range(1, trials):
        values = {
            step: {address: random_value(generator, hole, set()) for address, hole in holes.items()}
            for step, holes in SPACE.holes().items()
        }
        seen = device(SPACE.filled(values))
        one.trials.append(one.trials[0].model_copy(update={"number": number, "measurement": seen}))
    return one


def reached(one: Search) -> float:
    """The first figure of the best trial's score."""
    verdict = one.best()
    assert verdict.met and verdict.trial is not None and verdict.trial.measurement is not None
    return score(verdict.trial.measurement, one.prefer, BASELINE)[0]


def test_it_does_better_than_chance() -> None:
    """With as many trials; over preferences and seeds, since single runs may be lucky."""
    preferences: tuple[Preference, ...] = ("balanced", "latency", "bytes")
    gains = []
    for prefer in preferences:
        for seed in range(4):
            one = search(prefer=prefer, seed=seed, trials=40)
            run(one, device)
            gains.append(math.log(reached(one) / reached(chance(prefer, seed, 40))))
    assert statistics.mean(gains) < -0.05


def test_the_same_seed_and_answers_give_the_same_candidates() -> None:
    one, again = (run(search(seed=3, trials=20), device) for _ in range(2))
    assert one == again
    assert one != run(search(seed=4, trials=20), device)


def test_limits_on_other_axes_are_kept_too() -> None:
    one = search(budget=Budget(quality_drop=0.02, bytes=120_000), prefer="latency", trials=30)
    run(one, device)
    assert one.best().met
    told = [trial.user_attrs["excess"] for trial in one._study.trials if "excess" in trial.user_attrs]
    assert len(told) == 30 and all(len(excesses) == 1 for excesses in told)
    assert any(excesses == [0.0] for excesses in told) and any(excesses[0] > 0 for excesses in told)


def test_the_front_is_of_measured_trials() -> None:
    one = search(trials=15)
    run(one, device)
    front = one.pareto()
    assert front and all(trial in one.trials for trial in front)


# ---- no repeats, and an end


@pytest.mark.parametrize("seed", range(3))
def test_a_finite_space_is_tried_once_and_then_exhausted(seed: int) -> None:
    one = search(SMALL, seed=seed, trials=100)
    asked = run(one, lambda recipe: measured(0.0, 1e5, 0.5))
    points = {canonical(recipe.to_dict()) for recipe in asked}
    assert len(asked) == len(points) == 6
    assert one.ended == "exhausted" and one.ask() is None
    assert [trial.number for trial in one.trials] == list(range(6))


def test_candidates_that_are_still_running_are_not_asked_again() -> None:
    one = search(SMALL, trials=100)
    pending = [one.ask() for _ in range(6)]
    assert len({canonical(c.recipe.to_dict()) for c in pending if c}) == 6
    assert one.ask() is None and one.ended == "exhausted"
    for candidate in pending:
        assert candidate is not None
        one.tell(candidate, measured(0.0, 1e5, 0.5))
    assert [trial.number for trial in one.trials] == list(range(6))


def test_a_recipe_without_holes_is_one_trial() -> None:
    one = search(Recipe((Step("fold"),)), trials=10)
    assert [recipe.to_dict() for recipe in run(one, lambda recipe: measured(0.0, 1, 0.5))] == [
        {"version": 1, "steps": [{"fold": {}}]}
    ]
    assert one.ended == "exhausted"


# ---- holes asked on the way


def walk(one: Search, holes: Callable[[dict[str, Any]], dict[str, Hole]]) -> list[dict[str, Any]]:
    """As the engine does it for a template: the second step's holes depend on the first one's value."""
    points = []
    while (candidate := one.ask()) is not None:
        first = candidate.fill(0, {"kind": Choice(("small", "large"))})
        second = candidate.fill(1, holes(first))
        if not one.accept(candidate):
            continue
        assert candidate.recipe.steps[0].parameters == first
        assert candidate.recipe.steps[1].parameters == {"fixed": 1, **second}
        points.append({**first, **second})
        one.tell(candidate, measured(0.001 * len(points), 1e5, 0.5))
    return points


TEMPLATE = Recipe((Step("prune"), Step("quantize", {"fixed": 1})))


@pytest.mark.parametrize("seed", range(3))
def test_holes_may_depend_on_the_way(seed: int) -> None:
    def holes(first: dict[str, Any]) -> dict[str, Hole]:
        size = 2 if first["kind"] == "small" else 4
        return {"bits": Choice(tuple(range(size))), "low": Range(0, 2)}

    one = search(TEMPLATE, seed=seed, trials=100)
    points = walk(one, holes)
    assert points[0] == {"kind": "small", "bits": 0, "low": 1}
    assert len(points) == len({canonical(point) for point in points}) == 2 * 3 + 4 * 3
    assert one.ended == "exhausted"


def test_a_method_without_holes_ends_a_template_after_one_trial() -> None:
    one = search(TEMPLATE, trials=100)
    candidate = one.ask()
    assert candidate is not None and candidate.fill(0, {}) == {}
    assert one.accept(candidate)
    one.tell(candidate, measured(0, 1, 1))
    assert one.ask() is None


def test_a_prefix_that_fails_is_not_gone_through_again() -> None:
    one = search(TEMPLATE, trials=100)
    kinds = []
    while (candidate := one.ask()) is not None:
        kind = candidate.fill(0, {"kind": Choice(("broken", "good", "fine"))})["kind"]
        if kind == "broken":  # before the second step could be asked
            if one.accept(candidate):
                kinds.append(kind)
                one.tell(candidate, Failure("prune crashed"))
            continue
        candidate.fill(1, {"bits": Choice((4, 8))})
        if one.accept(candidate):
            kinds.append(kind)
            one.tell(candidate, measured(0, 1, 1))
    assert sorted(kinds) == ["broken", "fine", "fine", "good", "good"]


# ---- draws

HOLES: list[Hole] = [
    Choice(("a", None, [1, 2], {"k": 1})),
    Range(0.25, 0.75),
    Range(1e-5, 1e-1, log=True),
    Range(1, 1000, log=True),
    Range(3, 9),
    Range(3, 10, step=2),
    Range(0.1, 0.55, step=0.1),
    Range(0.1, 0.5, step=0.1, default=0.4),
]


@pytest.mark.parametrize("hole", HOLES, ids=str)
def test_every_draw_fits_its_hole_and_optuna_takes_it_back(hole: Hole) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    generator = random.Random(0)
    drawn = [suggest(study.ask(), "x", hole) for _ in range(30)]
    drawn += [hole.first, *(random_value(generator, hole, set()) for _ in range(30))]
    for value in drawn:
        assert hole.admits(value)
        study.enqueue_trial({"x": parameter(Draw("x", hole, value))})
        assert canonical(suggest(study.ask(), "x", hole)) == canonical(value)
    if hole.size is not None:
        grid = {canonical(hole.at(index)) for index in range(hole.size)}
        assert {canonical(value) for value in drawn} <= grid


def test_random_values_avoid_what_is_finished() -> None:
    hole = Range(1, 10)
    finished: set[str] = set()
    generator = random.Random(1)
    for _ in range(10):
        value = random_value(generator, hole, finished)
        assert canonical(value) not in finished
        finished.add(canonical(value))
    assert hole.admits(random_value(generator, hole, finished))  # nothing is left: any


def test_a_branch_is_finished_when_all_below_is() -> None:
    tried = Tried()
    tried.enter((), 2)
    for first in "ab":
        tried.enter((("x", first),), 2)
    for point in ((("x", "a"), ("y", "1")), (("x", "a"), ("y", "2"))):
        assert not tried.has(point)
        tried.finish(point)
        assert tried.has(point)
    assert tried.values(()) == {"a"} and tried.has((("x", "a"),)) and not tried.exhausted
    tried.finish((("x", "b"),))
    assert tried.exhausted and tried.has((("x", "b"), ("y", "1")))


# ---- the journal


def test_a_search_goes_on_from_its_journal(tmp_path: Path) -> None:
    journal = tmp_path / "search.journal"
    first = search(SMALL, trials=4, storage=journal)
    asked = run(first, lambda recipe: measured(0.002, 1e5, 0.5))
    first.close()
    again = search(SMALL, trials=4, storage=journal)
    assert again.trials == first.trials and again.ended == "trials"
    assert again.best() == first.best()
    again.close()
    more = search(SMALL, trials=100, storage=journal)
    assert [trial.number for trial in more.trials] == [0, 1, 2, 3]
    asked += run(more, lambda recipe: measured(0.001, 1e5, 0.5))
    assert len({canonical(recipe.to_dict()) for recipe in asked}) == len(asked) == 6
    assert more.ended == "exhausted" and more.best().trial is not None
    more.close()


def test_another_question_in_the_same_journal_starts_anew(tmp_path: Path) -> None:
    journal = tmp_path / "search.journal"
    first = search(trials=3, storage=journal)
    run(first, device)
    first.close()
    other = search(budget=Budget(bytes=1), trials=3, storage=journal)
    assert other.trials == []
    other.close()


def test_a_journal_that_a_kill_left_behind(tmp_path: Path) -> None:
    """A torn line, a candidate that was never told, one that Optuna was to hear of: all are taken up."""
    journal = tmp_path / "search.journal"
    first = search(trials=10, storage=journal)
    for _ in range(3):
        candidate = first.ask()
        assert candidate is not None
        first.tell(candidate, device(candidate.recipe))
    assert first.ask() is not None
    first._study.enqueue_trial({})
    first.close()
    with journal.open("ab") as file:
        file.write(b'{"op_code": 5, "worker_')
    again = search(trials=10, storage=journal)
    assert again.trials == first.trials
    assert len(run(again, device)) == 7
    assert [trial.number for trial in again.trials] == list(range(10))
    states = [trial.state for trial in again._study.trials]
    assert optuna.trial.TrialState.RUNNING not in states and optuna.trial.TrialState.WAITING not in states
    again.close()


def test_two_processes_do_not_share_a_journal(tmp_path: Path) -> None:
    journal = tmp_path / "search.journal"
    one = search(storage=journal)
    with pytest.raises(OutputError, match="another process"):
        search(storage=journal)
    one.close()
    search(storage=journal).close()


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    journal = tmp_path / "search.journal"
    journal.write_text("this is no journal\nnor this\n")
    with pytest.raises(OutputError, match="is damaged"):
        search(storage=journal)


# ---- imports


def test_only_the_search_imports_optuna() -> None:
    code = (
        "import sys; import featherweight.recipe, featherweight.engine.verdict, featherweight.engine.draws;"
        "sys.exit('optuna' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_follows_the_first_way_is_tried_on_the_runtimes_that_did_best() -> None:
    ways = {name: Recipe((Step(name, {}),)) for name in ("first", "second", "third")}
    one = search(Recipe(()), trials=20, runtimes=("a", "b", "c", "d", "e"), ways=ways)
    ratios = {"a": 0.5, "b": 0.31, "c": 0.3, "d": 0.32, "e": 0.2}
    asked = []
    while (candidate := one.ask()) is not None:
        if not one.accept(candidate):
            continue
        asked.append((candidate.way, candidate.runtime))
        drop = {"a": 0.0, "b": 0.02, "c": 0.0, "d": 0.0, "e": 0.5}[candidate.runtime]
        one.tell(candidate, measured(drop, 5e5, ratios[candidate.runtime]))
        if len(asked) == 9:
            break
    assert asked[:5] == [("first", name) for name in "abcde"]
    # The drop of b is above its limit, which another way may mend; that of e is far from it.
    assert asked[5:] == [("second", "c"), ("second", "b"), ("third", "c"), ("third", "b")]


def test_a_recipe_beside_the_space_is_made_as_it_is_and_exhausts_nothing(tmp_path: Path) -> None:
    ways = {"a": Recipe((Step("a", {}),)), "b": Recipe((Step("b", {}),))}
    other = Recipe((Step("a", {"twice": True}),))

    def begin() -> Search:
        return search(Recipe(()), trials=6, ways=ways, storage=tmp_path / "journal")

    one = begin()
    one.open_with([Opening(way="a", recipe=other)])
    first = one.ask()
    assert first is not None and first.beside and first.way == "a" and first.recipe == other
    assert first.fill(0, {"x": Range(0.0, 1.0)}) == {}, "nothing of it is left open"
    assert one.accept(first)
    one.tell(first, measured(0.0, 5e5, 0.5))
    one.open_with([Opening(way="a", recipe=other)])
    again = one.ask()
    assert again is not None and not again.beside, "it was tried"
    one.close()
    two = begin()
    assert [trial.recipe for trial in two.trials] == [other.to_dict()] and two.ended is None
    asked = []
    while (candidate := two.ask()) is not None:
        if two.accept(candidate):
            asked.append(candidate.way)
            two.tell(candidate, measured(0.0, 5e5, 0.5))
    assert sorted(asked) == ["a", "b"] and two.ended == "exhausted"
    two.close()


def test_what_suits_nothing_counts_for_no_trial_and_its_way_is_not_proposed_again() -> None:
    ways = {name: Recipe((Step(name, {}),)) for name in ("good", "bad")}
    one, asked = search(Recipe(()), trials=6, ways=ways), []
    while (candidate := one.ask()) is not None:
        candidate.fill(0, {"x": Range(0.0, 1.0)})
        asked.append(candidate.way)
        if one.accept(candidate):
            fits = candidate.way == "good"
            one.tell(candidate, measured(0.0, 5e5, 0.5) if fits else Failure("no layer", unfit=True))
    assert asked.count("bad") == 1 and asked.count("good") == 6
    assert one.ended == "trials"


def test_nothing_is_proposed_on_a_runtime_that_is_left_out() -> None:
    ways = {name: Recipe((Step(name, {}),)) for name in ("first", "second")}
    one = search(Recipe(()), trials=12, runtimes=("a", "b", "c"), ways=ways)
    asked = []
    while (candidate := one.ask()) is not None:
        if candidate.runtime == "b":
            one.leave_out(candidate, "too slow")
            continue
        candidate.fill(0, {"x": Range(0.0, 1.0)})
        if one.accept(candidate):
            asked.append(candidate.runtime)
            one.tell(candidate, measured(0.0, 5e5, 0.5))
    assert set(asked) == {"a", "c"} and len(asked) == 12
    (left,) = [trial for trial in one.trials if trial.runtime == "b"]
    assert (left.state, left.reason) == ("dropped", "too slow")
