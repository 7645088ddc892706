"""The ladder: what is of no use is dropped by what was predicted, with margins that measurements teach."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from featherweight.data import Data
from featherweight.drops import drop
from featherweight.engine.evaluate import Scales
from featherweight.engine.ladder import SHARE, Climb, Ladder, hopeless, parts, picked, simulated_drop
from featherweight.engine.lanes import Lane
from featherweight.engine.run import Run
from featherweight.engine.store import Store
from featherweight.methods.finetune import Finetune
from featherweight.methods.quantize import Quantize
from featherweight.methods.rounding import Rounding
from featherweight.outcome import Budget, Latency, Measurement, Prediction, Preference, Trial
from featherweight.recipe import Recipe
from featherweight.tools.simulate import as_run, simulate
from golden import data, model, target

BASELINE = Measurement(quality=0.9, quality_drop=0.0, bytes=1000)
NET = "residual"


def seen(drop: float | None = 0.0, size: int | None = 300, ratio: float | None = 0.5) -> Measurement:
    latency = None if ratio is None else Latency(median=ratio / 100, q1=ratio / 100, q3=ratio / 100)
    return Measurement(
        quality_drop=drop, bytes=size, latency_ratio=ratio, latency_s=latency, resolved=True, sqnr_db=30.0
    )


def trials(*figures: Measurement, state: Any = "measured") -> list[Trial]:
    return [
        Trial(number=index, recipe={}, state=state, measurement=figure)
        for index, figure in enumerate(figures)
    ]


def pairs(*figures: Measurement) -> list[tuple[Trial, Measurement]]:
    return list(zip(trials(*figures), figures, strict=True))


class TestHopeless:
    def judged(
        self, best: Measurement, *figures: Measurement, budget: Budget | None = None, **more: Any
    ) -> str | None:
        return hopeless(best, pairs(*figures), BASELINE, budget or Budget(), "balanced", **more)

    def test_what_breaks_a_limit_that_is_kept_already(self) -> None:
        limit = Budget(quality_drop=0.01)
        said = self.judged(seen(0.04, 100, 0.1), seen(0.005), budget=limit)
        assert said == "it breaks the limit of quality drop: 4 % at best, asked 1 %"
        assert self.judged(seen(0.009, 100, 0.1), seen(0.005), budget=limit) is None

    def test_not_what_breaks_it_less_than_the_best_so_far(self) -> None:
        limit = Budget(quality_drop=0.01)
        assert self.judged(seen(0.04, 100, 0.1), seen(0.05), budget=limit) is None
        assert self.judged(seen(0.06, 100, 0.1), seen(0.05), budget=limit) is not None

    def test_several_limits_add_up(self) -> None:
        limits = Budget(bytes=200, latency_s=0.004)
        assert self.judged(seen(0.0, 300, 0.3), seen(0.0, 290, 0.5), budget=limits) is None
        assert self.judged(seen(0.0, 300, 0.6), seen(0.0, 290, 0.5), budget=limits) is not None

    def test_what_would_be_rejected(self) -> None:
        assert "no gain" in (self.judged(seen(0.0, 900, 1.2), seen(0.5)) or "")
        assert self.judged(seen(None, 900, 1.2), seen(0.5)) is not None

    def test_what_a_measured_one_beats_on_every_axis(self) -> None:
        assert self.judged(seen(0.02, 310, 0.6), seen(0.01, 400, 0.5), seen(0.01, 300, 0.5)) == (
            "it is no better than trial 1 on any axis"
        )
        assert self.judged(seen(0.02, 310, 0.4), seen(0.01, 300, 0.5)) is None

    def test_what_is_better_by_next_to_nothing(self) -> None:
        """A twentieth of the limit, of the size and of the latency; no drop is foreseen to be below zero."""
        limit, kept = Budget(quality_drop=0.02), pairs(seen(0.001, 300, 0.5))

        def said(best: Measurement, prefer: Preference = "quality") -> str | None:
            return hopeless(best, kept, BASELINE, limit, prefer)

        assert said(seen(0.0001, 290, 0.48)) == "it is no better than trial 0 on any axis"
        assert said(seen(-0.01, 290, 0.48)) is not None
        assert said(seen(0.0001, 280, 0.48)) is None
        assert said(seen(0.0001, 290, 0.47)) is None
        assert said(seen(0.0001, 290, 0.48), "bytes") is None, "what is preferred counts whole"
        assert said(seen(0.0001, 290, 0.48), "latency") is None
        assert hopeless(seen(0.0001, 290, 0.48), kept, BASELINE, Budget(), "quality") is None
        smaller = Budget(quality_drop=0.02, bytes=295)
        near = hopeless(seen(0.0001, 290, 0.48), kept, BASELINE, smaller, "quality")
        assert near is None, "it keeps a limit that the measured one breaks"
        wide = seen(0.001, 300, 0.5).model_copy(update={"quality_drop_ci95": (-0.02, 0.03)})
        assert hopeless(seen(0.0, 290, 0.48), pairs(wide), BASELINE, limit, "quality", confident=True) is None
        far = pairs(seen(0.0201, 300, 0.5))
        assert hopeless(seen(0.0199, 300, 0.5), far, BASELINE, limit, "quality") is None, "it keeps the limit"

    def test_what_is_preferred_less_than_one_that_keeps_every_limit(self) -> None:
        limit = Budget(quality_drop=0.01)
        said = "it cannot be better than trial 1, which keeps every limit"
        figures = seen(0.02, 100, 0.1), seen(0.005, 300, 0.5)
        assert self.judged(seen(0.0, 300, 0.6), *figures, budget=limit) == said
        assert self.judged(seen(0.0, 300, 0.4), *figures, budget=limit) is None
        assert self.judged(seen(0.0, None, 0.6), *figures, budget=limit) is None
        assert self.judged(seen(0.0, 300, 0.6), *figures) is None, "without a limit, less drop is of use"
        nearer = hopeless(seen(0.0, 300, 0.6), pairs(*figures), BASELINE, limit, "quality")
        assert nearer is None, "a smaller drop is what is preferred"
        assert self.judged(seen(0.01, 300, 0.5), seen(0.01, 300, 0.5)) is None  # even is not beaten

    def test_what_is_not_known_is_taken_to_be_as_good_as_can_be(self) -> None:
        limits = Budget(quality_drop=0.01, bytes=350, latency_s=0.006, memory_bytes=10)
        measured = seen(0.0, 300, 0.5).model_copy(update={"memory_bytes": 5})
        assert self.judged(seen(None, None, None), measured, budget=limits) is None
        assert self.judged(seen(None, 340, None), measured, budget=limits) is None


@pytest.fixture
def lane(tmp_path: Path) -> Lane:
    run = Run(model(NET), data(NET), target("torch"), Store(tmp_path / "store"))
    scored = run.data.score(as_run(simulate(run.original)))
    twin = SimpleNamespace(bytes=30_000)
    return Lane(run, cast(Scales, SimpleNamespace(twin=twin, twin_scored=SimpleNamespace(rows=scored))))


def ladder(lane: Lane, budget: Budget | None = None, **told: Any) -> Ladder:
    baseline = Measurement(quality_drop=0.0, bytes=30_000)
    return Ladder([lane], baseline, None, budget or Budget(quality_drop=0.01), "balanced", **told)


class TestPredictions:
    def test_of_cost_come_without_running_anything(self, lane: Lane) -> None:
        one, climb = ladder(lane), Climb("torch")
        one.cost(climb, lane.run.apply(Recipe.parse("version: 1\nsteps:\n  - fold: {}\n")))
        (said,) = climb.seen
        assert said.rung == "cost" and said.quality_drop is None
        assert said.bytes is not None and 29_000 < said.bytes <= 30_000
        assert said.latency_ratio == pytest.approx(1.0)

    def test_of_latency_are_told_against_the_first_runtime(self, lane: Lane) -> None:
        slower = replace(lane, handicap=type(lane.handicap)(3.0, None))
        one, climb = ladder(slower), Climb("torch")
        one.cost(climb, lane.run.original)
        assert climb.seen[0].latency_ratio == pytest.approx(3.0)

    def test_of_quality_are_drops_of_the_simulation_on_the_picked_examples(self, lane: Lane) -> None:
        net = lane.run.apply(Recipe.parse("version: 1\nsteps:\n  - quantize: {weights: int2, samples: 8}\n"))
        some = np.array([1, 3, 4, 8])
        metric = lane.run.data.metric
        got = metric.rows(
            as_run(simulate(net))(*lane.run.data.scored.take(some)),  # type: ignore[union-attr]
            lane.run.data.scored.targets[some],  # type: ignore[union-attr,index]
        )
        before = lane.scales.twin_scored.rows[metric.name][some]
        wanted = drop(metric, metric.reduce(before), metric.reduce(got))
        assert simulated_drop(lane, net, some) == pytest.approx(wanted)

    def test_use_the_selecting_examples_and_as_many_as_the_time_allows(self) -> None:
        many = Data.of(np.zeros((4000, 2), np.float32), np.zeros(4000, np.int64))
        half = np.arange(0, 4000, 2)
        found = picked(many, half, None)
        assert found is not None and len(found) == 512 and set(found) <= set(half)
        slow = picked(many, half, 0.01)
        assert slow is not None and len(slow) == 166
        assert len(picked(many, half[:50], 0.001)) == 50  # type: ignore[arg-type]

    def test_leave_out_scores_that_are_the_users(self) -> None:
        class Own(Data):
            def score(self, *_: Any, **__: Any) -> Any:
                raise AssertionError

        own = Own(scored=data(NET).scored)
        assert picked(own, None, None) is None

    def test_which_steps_take_long(self) -> None:
        steps = [Quantize(), Rounding(), Rounding(how="blocks", iterations=200), Finetune(epochs=2.0)]
        assert parts(steps) == [2, 3]
        assert steps[2].part(SHARE) == Rounding(how="blocks", iterations=20)
        assert steps[3].part(SHARE) == Finetune(epochs=2.0 * SHARE)
        assert Finetune(steps=4).part(SHARE) == Finetune(steps=1)


class TestLearning:
    def climb(self, one: Ladder, lane: Lane, lost: float) -> Climb:
        """A candidate whose simulated drop is given."""
        climb = Climb("torch")
        one.cost(climb, lane.run.original)
        margin = one._margin("simulated", "quality_drop", 0.01, "torch", ())
        climb.kinds["simulated", "quality_drop"] = margin
        one._tell(climb, Prediction(rung="simulated", quality_drop=lost, seconds=0.5))
        return climb

    def test_nothing_is_dropped_before_something_was_measured(self, lane: Lane) -> None:
        one = ladder(lane)
        climb = self.climb(one, lane, 0.9)
        assert one.verdict(climb, []) is None
        assert one.verdict(climb, trials(seen(), state="rejected")) is None
        assert "simulation it breaks the limit" in (one.verdict(climb, trials(seen())) or "")

    def test_good_predictions_drop_what_bad_ones_keep(self, lane: Lane) -> None:
        known = trials(seen(0.001, 90_000, 1.0))
        good, bad = ladder(lane), ladder(lane)
        for number in range(8):
            off = 0.03 if number % 2 else -0.03
            good.learn(self.climb(good, lane, 0.01), seen(0.0101, 30_000, 1.0))
            bad.learn(self.climb(bad, lane, 0.01), seen(0.01 + off, 30_000, 1.0))
        assert good.verdict(self.climb(good, lane, 0.025), known) is not None
        assert bad.verdict(self.climb(bad, lane, 0.025), known) is None

    def test_rungs_tell_what_they_did_and_how_far_off_they_were(self, lane: Lane) -> None:
        now = [0.0]
        one = ladder(lane, clock=lambda: now[0])
        one.learn(self.climb(one, lane, 0.03), seen(0.01, 15_000, 2.0))
        one.verdict(self.climb(one, lane, 0.9), trials(seen(0.001)))
        told = [trial.model_copy(update={"seconds": 4.0}) for trial in trials(seen(), seen())]
        cost, simulated, recovered, measured = one.rows([*told, trials(seen(), state="dropped")[0]])
        assert (cost.candidates, cost.dropped, cost.compared) == (2, 0, 1)
        assert cost.bytes_error == pytest.approx(1.0) and cost.latency_error == pytest.approx(0.5)
        assert (simulated.candidates, simulated.dropped, simulated.seconds) == (2, 1, 1.0)
        assert simulated.drop_error == pytest.approx(0.02)
        assert recovered.candidates == 0 and recovered.drop_error is None
        assert (measured.name, measured.candidates, measured.seconds) == ("measured", 2, 8.0)

    def test_what_costs_the_same_by_shapes_and_formats_costs_the_same(self, lane: Lane) -> None:
        known = trials(seen(0.001, 30_000, 0.5))
        one = ladder(lane)
        assert one.verdict(self.climb(one, lane, 0.0), known) is None, (
            "by the forecast alone it may be faster"
        )
        one.learn(self.climb(one, lane, 0.0), seen(0.0, 40_000, 0.9))
        again = self.climb(one, lane, 0.0)
        assert one.at_best(again, []).bytes == pytest.approx(0.97 * 40_000, rel=1e-3)
        assert one.verdict(again, known) is not None

    def test_the_sampler_is_told_what_was_expected(self, lane: Lane) -> None:
        one = ladder(lane)
        climb = Climb("torch")
        one.cost(climb, lane.run.original)
        assert one.expected(climb) is None
        whole = one.expected(self.climb(one, lane, 0.3))
        assert whole is not None and whole.quality_drop == pytest.approx(0.3)
        assert whole.bytes == 30_000 and whole.latency_ratio == pytest.approx(1.0)

    def test_a_later_rung_knows_better(self, lane: Lane) -> None:
        one = ladder(lane)
        climb = self.climb(one, lane, 0.5)
        climb.kinds["recovered", "quality_drop"] = one._margin("recovered", "quality_drop", 0.01, "x")
        one._tell(climb, Prediction(rung="recovered", quality_drop=0.01))
        assert one.verdict(climb, trials(seen(0.0, 90_000, 1.0))) is None
