"""What proposes candidates: which one ``auto`` is, and that NSGA-II finds, also where holes differ."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from featherweight.engine.draws import Point
from featherweight.engine.samplers import Genetic, SamplerName, chosen_sampler
from featherweight.engine.search import Candidate, Opening, Search, score
from featherweight.holes import Choice, Hole, Range, canonical
from featherweight.outcome import Budget, Latency, Measurement, Prediction
from featherweight.recipe import Recipe, Step

BASELINE = Measurement(bytes=1_000_000, latency_ratio=1.0, quality_drop=0.0)
WAYS = {"wide": Recipe((Step("prune"), Step("quantize"))), "deep": Recipe((Step("shrink"), Step("quantize")))}


def seen(drop: float, size: float, ratio: float) -> Measurement:
    latency = Latency(median=ratio / 100, q1=ratio / 100, q3=ratio / 100)
    return Measurement(
        quality_drop=drop, bytes=round(size), latency_s=latency, latency_ratio=ratio, resolved=True
    )


def holes(way: str, step: int) -> dict[str, Hole]:
    """Both ways share the second step's holes; the first one's are their own."""
    if step == 1:
        return {"bits": Range(3, 8), "range": Choice(("mse", "minmax"))}
    return {"ratio": Range(0.0, 0.9)} if way == "wide" else {"blocks": Range(0, 6)}


def world(candidate: Candidate) -> Measurement:
    first, second = (step.parameters for step in candidate.recipe.steps)
    bits = second["bits"]
    gone = first["ratio"] if candidate.way == "wide" else 0.1 * first["blocks"]
    lost = 0.05 * gone**3 if candidate.way == "wide" else 0.3 * gone**2
    lost += 0.003 * (8 - bits) ** 2 + (0.004 if second["range"] == "minmax" else 0.0)
    return seen(lost, 1e6 * (1 - gone) * bits / 32, (1 - 0.8 * gone) * (0.4 + 0.075 * bits))


def searched(sampler: SamplerName, trials: int, seed: int = 0, **told: Any) -> Search:
    one = Search(
        Recipe(()),
        Budget(quality_drop=0.02, bytes=150_000),
        baseline=BASELINE,
        trials=trials,
        seed=seed,
        ways=WAYS,
        sampler=sampler,
        **told,
    )
    while (candidate := one.ask()) is not None:
        for step in (0, 1):
            candidate.fill(step, holes(candidate.way, step))
        if one.accept(candidate):
            one.tell(candidate, world(candidate))
    return one


def reached(one: Search) -> float:
    verdict = one.best()
    assert verdict.trial is not None and verdict.trial.measurement is not None
    return score(verdict.trial.measurement, one.prefer, BASELINE)[0] if verdict.met else 1.0


def test_auto_follows_the_number_of_trials() -> None:
    assert chosen_sampler("auto", 24) == "tpe"
    assert chosen_sampler("auto", 1000) == "nsga2"
    assert chosen_sampler("random", 1000) == "random"


def volume(sampler: SamplerName, seed: int) -> float:
    """Of the front of eight layers' bits: each costs bytes and seconds, and some much quality."""
    space = Recipe(tuple(Step("quantize", {"bits": Range(2, 16)}) for _ in range(8)))
    one = Search(space, Budget(quality_drop=0.05), baseline=BASELINE, sampler=sampler, trials=150, seed=seed)
    points = []
    while (candidate := one.ask()) is not None:
        bits = [step.parameters["bits"] for step in candidate.recipe.steps]
        lost = math.fsum(0.05 * (index + 1) * 2.0 ** (-count / 2) for index, count in enumerate(bits))
        one.tell(candidate, seen(lost, 1e6 * sum(bits) / 128, sum(bits) / 128))
        points.append(((sum(bits) / 128) ** 2, lost))
    found, below = 0.0, 0.4
    for cost, lost in sorted(points):
        if lost < below:
            found, below = found + (1 - cost) * (below - lost), lost
    return found


def test_populations_do_better_than_chance() -> None:
    """TPE's test stands in test_search.py."""
    gains = [volume("nsga2", seed) / volume("random", seed) for seed in range(3)]
    assert statistics.mean(gains) > 1.02


@pytest.mark.parametrize("seed", range(2))
def test_ways_with_holes_of_their_own_are_searched(seed: int) -> None:
    assert searched("nsga2", 60, seed).best().met
    assert searched("tpe", 30, seed).best().met


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_the_same_seed_gives_the_same_candidates(sampler: SamplerName) -> None:
    one, again, other = (searched(sampler, 30, seed) for seed in (1, 1, 2))
    recipes = [[trial.recipe for trial in each.trials] for each in (one, again, other)]
    assert recipes[0] == recipes[1] != recipes[2]
    assert len({canonical([trial.way, trial.recipe]) for trial in one.trials}) == 30


def test_chance_does_not_begin_with_the_defaults() -> None:
    first = [searched("random", 1, seed).trials[0] for seed in range(8)]
    assert len({canonical(trial.recipe) for trial in first}) > 4
    assert {trial.way for trial in first} == {"wide", "deep"}


def test_children_inherit_the_holes_that_only_some_trials_have() -> None:
    one = searched("nsga2", 120)
    sampler = one._study.sampler
    assert isinstance(sampler, Genetic)
    space = sampler.infer_relative_search_space(one._study, one._study.trials[-1])
    own = {name.partition("#")[0] for name in space}
    assert own == {"way", "0/ratio", "0/blocks", "1/bits", "1/range"}
    wide = [trial for trial in one._study.trials if any(name.startswith("0/ratio") for name in trial.params)]
    child = sampler._child(one._study, space, wide[:2])
    given = {name: {trial.params[name] for trial in wide[:2]} for name in child}
    assert child and all(value in given[name] for name, value in child.items())


def test_openings_come_next_with_their_values() -> None:
    one = Search(Recipe(()), Budget(), baseline=BASELINE, trials=9, ways=WAYS)

    def asked() -> tuple[str, Any]:
        candidate = one.ask()
        assert candidate is not None
        for step in (0, 1):
            candidate.fill(step, holes(candidate.way, step))
        assert one.accept(candidate)
        one.tell(candidate, world(candidate))
        return candidate.way, [step.parameters for step in candidate.recipe.steps]

    assert asked() == ("wide", [{"ratio": 0.45}, {"bits": 5, "range": "mse"}])
    one.open_with([Opening("", "wide", {1: {"bits": 4}}), Opening("", "deep", {0: {"blocks": 99}})])
    assert asked() == ("wide", [{"ratio": 0.45}, {"bits": 4, "range": "mse"}])
    assert asked() == ("deep", [{"blocks": 3}, {"bits": 5, "range": "mse"}])  # 99 fits no hole


class TestDropped:
    def search(self, trials: int = 3, **told: Any) -> Search:
        space = Recipe((Step("quantize", {"bits": Range(1, 100)}),))
        return Search(space, Budget(), baseline=BASELINE, trials=trials, **told)

    def test_candidates_are_told_and_are_no_trials(self) -> None:
        one = self.search()
        points: list[Point] = []
        for number in range(6):
            candidate = one.ask()
            assert candidate is not None and candidate.number == number
            points.append(candidate.point)
            if number % 2:
                one.tell(candidate, seen(0.0, 1e5, 0.5))
                continue
            told = [Prediction(rung="cost", bytes=9)]
            trial = one.drop(candidate, "too large", predicted=told, seconds=2.0)
            assert (trial.state, trial.reason, trial.seconds) == ("dropped", "too large", 2.0)
            assert trial.measurement is None and trial.within_budget is None and trial.predicted == told
        assert one.ask() is None and one.ended == "trials"
        assert len(set(points)) == 6
        assert one.best().trial in one.trials and len(one.pareto()) == 3

    def test_the_sampler_learns_what_was_expected(self) -> None:
        one = self.search()
        for expected in (seen(0.1, 9e5, 0.9), None):
            candidate = one.ask()
            assert candidate is not None
            one.drop(candidate, "no use", expected=expected)
        known = [trial for trial in one._study.trials if trial.values]
        assert [trial.values for trial in known] == [[pytest.approx(0.81), 0.1]]

    def test_they_do_not_go_on_for_ever(self) -> None:
        one = self.search(trials=2)
        count = 0
        while (candidate := one.ask()) is not None:
            one.drop(candidate, "no use")
            count += 1
        assert count == 16 and one.ended == "trials"

    def test_a_journal_knows_them(self, tmp_path: Any) -> None:
        one = self.search(storage=tmp_path / "journal")
        for expected in (None, seen(0.1, 9e5, 0.9)):
            candidate = one.ask()
            assert candidate is not None
            one.drop(candidate, "no use", predicted=[Prediction(rung="cost", macs=3)], expected=expected)
        one.close()
        again = self.search(storage=tmp_path / "journal")
        assert again.trials == one.trials
        asked = 0
        while (candidate := again.ask()) is not None:
            again.tell(candidate, seen(0.0, 1e5, 0.5))
            asked += 1
        assert asked == 3
        again.close()
