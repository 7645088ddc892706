"""Which effort the time and the network's size give, and what a plan tries."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from featherweight.data import Data
from featherweight.engine import effort
from featherweight.engine.deadline import Bounded, OutOfTime
from featherweight.engine.effort import Pace, Took, pace_of, plan, planned
from featherweight.engine.run import Run
from featherweight.engine.store import Store
from featherweight.engine.template import Amounts, Shape, shape_of, step_holes, ways
from featherweight.method import Silent
from featherweight.outcome import LEVELS, Budget
from featherweight.plugins import method_names
from featherweight.recipe import Choice, Recipe, Step
from golden import context, data, inputs, model, target
from nets import NETS

SMALL = Pace(example_s=0.002, weights_s=2.0)
LARGE = Pace(example_s=2.0, weights_s=300.0)
CONVOLUTIONS = Shape(linear=0.01, recurrent=False)
MATRICES = Shape(linear=0.95, recurrent=False)
RECURRENT = Shape(linear=0.1, recurrent=True)
LIMITS = {"latency": 0.75}


def steps(recipe: Recipe) -> list[str]:
    return [step.method for step in recipe.steps]


class TestLevels:
    @pytest.mark.parametrize(
        ("seconds", "level"),
        [
            (0, "quick"),
            (30, "quick"),
            (60, "quick"),
            (300, "standard"),
            (600, "standard"),
            (1800, "thorough"),
        ],
    )
    def test_follow_from_the_time(self, seconds: int, level: str) -> None:
        assert planned(SMALL, CONVOLUTIONS, float(seconds)).level == level

    @pytest.mark.parametrize(("seconds", "level"), [(300.0, "quick"), (1800.0, "standard")])
    def test_of_a_large_network_are_lower_in_the_same_time(self, seconds: float, level: str) -> None:
        assert planned(LARGE, CONVOLUTIONS, seconds).level == level

    def test_rise_with_the_time_and_never_fall(self) -> None:
        for pace in (SMALL, Pace(0.1, 10.0), LARGE):
            seen = [LEVELS.index(planned(pace, CONVOLUTIONS, 10.0 * 1.3**n).level) for n in range(40)]
            assert seen == sorted(seen)
            assert seen[-1] == 2

    def test_try_more_the_higher_they_are(self) -> None:
        plans = [planned(SMALL, MATRICES, seconds, LIMITS) for seconds in (30.0, 300.0, 1800.0)]
        counts = [(len(one.ways), one.trials) for one in plans]
        assert counts == sorted(counts)
        assert len(set(counts)) == 3

    def test_keep_the_number_of_trials_that_is_asked_for(self) -> None:
        assert planned(SMALL, CONVOLUTIONS, 300.0, trials=2).trials == 2

    def test_learn_the_pace_with_the_part_that_no_work_takes(self) -> None:
        """A second that is always there makes ten times of a short step, and little of a long one."""
        made = planned(SMALL, CONVOLUTIONS, 300.0)
        made = replace(
            made, ways={"short": Recipe(()), "long": Recipe(())}, predicted_s={"short": 1.0, "long": 16.0}
        )
        assert made.seconds("long") == 16.0
        assert made.seconds("short", Took(seconds=3.0, predicted_s=1.0)) == 3.0
        assert made.seconds("long", Took(seconds=3.0, predicted_s=1.0)) == 16.0 + 2.0 * 4.0
        assert made.seconds("short", Took(seconds=32.0, predicted_s=16.0)) == 2.0
        assert made.seconds("long", Took(seconds=0.5, predicted_s=1.0)) == 8.0


class TestWays:
    def test_of_the_strongest_default_comes_first(self) -> None:
        for seconds, strongest in ((30.0, "nearest"), (300.0, "gptq"), (1800.0, "gptq")):
            assert next(iter(planned(SMALL, CONVOLUTIONS, seconds).ways)) == strongest

    def test_of_the_strongest_are_second_where_they_take_long(self) -> None:
        made = planned(Pace(0.02, 20.0), CONVOLUTIONS, 300.0)
        first, second, *_ = made.ways
        assert second == "gptq"
        integers = [spent for way, spent in made.predicted_s.items() if way != "halves"]
        assert made.predicted_s[first] == min(integers)

    def test_begin_with_plain_integers_where_the_strongest_takes_longer_than_other_quantizers(self) -> None:
        slow = Pace(0.02, 20.0)
        for seconds in (600.0, 3600.0):
            made = planned(slow, CONVOLUTIONS, seconds)
            first, second, *_ = made.ways
            assert (first, second) == ("plain", "gptq")
            assert made.predicted_s[first] <= 450 * slow.example_s < made.predicted_s[second]
            assert steps(made.ways[first]) == ["fold", "quantize"]
        assert made.trials == planned(SMALL, CONVOLUTIONS, 3600.0).trials + 1
        on_the_fly = planned(slow, MATRICES, 600.0).ways["plain"]
        assert on_the_fly.steps[1].parameters["activations"] == "dynamic"
        taught = Pace(0.02, 20.0, training=1000, student=True)  # untrained, its integers say nothing
        assert "plain" not in planned(taught, CONVOLUTIONS, 600.0).ways

    def test_of_the_strongest_is_first_where_there_is_plenty_of_time(self) -> None:
        tiny = Pace(example_s=2e-5, weights_s=0.01)
        assert next(iter(planned(tiny, CONVOLUTIONS, 7200.0).ways)) == "gptq"

    def test_begin_with_a_quick_one_where_time_is_tight(self) -> None:
        made = planned(Pace(0.03, 10.0), CONVOLUTIONS, 70.0)
        assert made.level == "standard"
        first = next(iter(made.ways))
        assert first != "gptq"
        integers = [spent for way, spent in made.predicted_s.items() if way != "halves"]
        assert made.predicted_s[first] == min(integers)

    def test_without_equalization_and_with_plain_rounding_stand_beside(self) -> None:
        found = planned(SMALL, CONVOLUTIONS, 300.0).ways
        assert steps(found["gptq"]) == ["fold", "equalize", "quantize", "rounding"]
        assert steps(found["gptq, not equalized"]) == ["fold", "quantize", "rounding"]
        assert steps(found["nearest"])[:2] == ["fold", "quantize"]

    def test_keep_an_answer_that_loses_nothing_where_integers_lose_too_much(self) -> None:
        for seconds in (30.0, 300.0, 1800.0):
            made = planned(SMALL, CONVOLUTIONS, seconds)
            assert steps(made.ways["halves"]) == ["fold", "cast"]
            assert next(iter(made.ways)) != "halves"

    def test_of_transformers_try_activations_on_the_fly_and_weights_alone(self) -> None:
        found = planned(SMALL, MATRICES, 300.0).ways
        assert found["dynamic"].steps[1].parameters["activations"] == "dynamic"
        assert found["weights"].steps[1].parameters["activations"] == "none"
        assert found["weights, 4 bits"].steps[1].parameters["weights"] == "int4"
        assert not {"dynamic", "weights"} & set(planned(SMALL, CONVOLUTIONS, 300.0).ways)

    def test_of_recurrent_networks_begin_on_the_fly(self) -> None:
        for seconds in (30.0, 300.0):
            assert next(iter(planned(SMALL, RECURRENT, seconds).ways)).startswith("dynamic")

    def test_of_mixed_precision_need_something_to_weigh(self) -> None:
        assert "mixed" not in planned(SMALL, CONVOLUTIONS, 1800.0).ways
        found = planned(SMALL, CONVOLUTIONS, 1800.0, {"bytes": 5000}).ways
        assert found["mixed"].steps[2].parameters["bytes"] == 5000

    @pytest.mark.parametrize("level", LEVELS)
    @pytest.mark.parametrize("shape", [CONVOLUTIONS, MATRICES, RECURRENT])
    def test_are_recipes_of_methods_that_exist(self, level: Any, shape: Shape) -> None:
        for recipe in ways(level, shape, Amounts(32, 500, LIMITS)).values():
            assert set(steps(recipe)) <= set(method_names())
            recipe.methods()

    def test_hold_no_hole_twice(self) -> None:
        said = Step("quantize", {"activations": "dynamic"})
        begun = model("linear3d")
        asked = context(begun, data("linear3d"), target())
        assert "activations" in step_holes(Step("quantize"), begun, asked)
        assert "activations" not in step_holes(said, begun, asked)
        own = Step("quantize", {"samples": Choice((8, 16))})
        assert step_holes(own, begun, asked)["samples"] == Choice((8, 16))


class TestAmounts:
    def test_of_examples_grow_with_the_time(self) -> None:
        pace = Pace(0.05, 5.0)
        counts = [pace.samples("standard", seconds) for seconds in (1.0, 60.0, 300.0, 7200.0)]
        assert counts == sorted(counts)
        assert counts[0] == 16
        assert counts[-1] == 256
        assert 16 < counts[2] < 256

    def test_of_iterations_grow_with_the_time(self) -> None:
        pace = Pace(0.02, 20.0)
        counts = [pace.iterations("standard", seconds) for seconds in (50.0, 300.0, 600.0, 1e9)]
        assert counts[0] == 0  # too few to be worth it
        assert counts[2] == pytest.approx(2 * counts[1], abs=1)
        assert counts[-1] == 500
        assert pace.iterations("thorough", 1e9) == 5000
        assert "blocks" not in planned(pace, CONVOLUTIONS, 90.0).ways

    def test_are_what_the_steps_take(self) -> None:
        recipe = ways("thorough", CONVOLUTIONS, Amounts(20, 333, {}))["blocks"]
        rounding = recipe.steps[-1]
        assert rounding.parameters == {"how": "blocks", "iterations": 333, "samples": 20}

    def test_are_predicted_in_passes(self) -> None:
        twice = Pace(2 * SMALL.example_s, 0.0)
        recipe = ways("standard", CONVOLUTIONS, Amounts(64, 333, {}))["gptq"]
        assert twice.of(recipe) == pytest.approx(2 * Pace(SMALL.example_s, 0.0).of(recipe))
        more = Pace(SMALL.example_s, 7.0).of(recipe) - Pace(SMALL.example_s, 0.0).of(recipe)
        assert more == pytest.approx(7.0)


class TestTraining:
    def test_takes_its_share_of_the_time(self) -> None:
        pace = Pace(0.002, 2.0, training=10_000, structure=True)
        counts = [pace.epochs("thorough", seconds) for seconds in (100.0, 900.0, 3600.0, 1e6)]
        assert counts[0] == 0  # too few examples to be worth it
        assert counts[2] == pytest.approx(0.08 * 3600 / (4 * 10_000 * 0.002), abs=0.01)
        assert counts[-1] == 10
        assert pace.epochs("quick", 1e6) == 0
        assert Pace(0.002, 2.0).epochs("thorough", 1e6) == 0

    def test_follows_the_ways_that_make_networks_smaller(self) -> None:
        made = planned(Pace(0.002, 2.0, training=2000, structure=True), CONVOLUTIONS, 600.0)
        assert made.level == "standard"
        recipe = made.ways["shrunk and pruned"]
        assert steps(recipe)[:4] == ["shrink", "prune", "finetune", "fold"]
        assert recipe.steps[2].parameters["teacher"] == "original"
        assert next(iter(made.ways)) == "gptq"

    def test_without_time_for_it_networks_are_made_smaller_by_calibration_alone(self) -> None:
        made = planned(Pace(0.5, 2.0, training=2000, structure=True), CONVOLUTIONS, 7200.0)
        assert made.level == "thorough"
        assert "finetune" not in steps(made.ways["pruned"])

    def test_without_examples_nothing_is_made_smaller(self) -> None:
        made = planned(SMALL, CONVOLUTIONS, 7200.0)
        assert not {"prune", "shrink", "factorize", "finetune"} & {
            method for recipe in made.ways.values() for method in steps(recipe)
        }

    def test_of_thorough_tries_every_method(self) -> None:
        made = planned(Pace(0.002, 2.0, training=2000, structure=True), MATRICES, 7200.0, LIMITS)
        tried = {method for recipe in made.ways.values() for method in steps(recipe)}
        assert {
            "prune",
            "shrink",
            "factorize",
            "sparsify",
            "finetune",
            "quantize",
            "mixed_precision",
        } <= tried

    def test_of_a_supernet_takes_its_share_of_a_long_time(self) -> None:
        pace = Pace(0.002, 2.0, training=2000, structure=True)
        made = planned(pace, CONVOLUTIONS, 7200.0)
        recipe = made.ways["subnet"]
        assert steps(recipe)[:4] == ["supernet", "subnet", "finetune", "fold"]
        assert recipe.steps[0].parameters["round_to"] == 8
        assert recipe.steps[0].build().targetless  # so that it serves every runtime
        assert 0.2 * 7200 < pace.of(recipe) < 0.5 * 7200
        assert "subnet" not in planned(pace, CONVOLUTIONS, 600.0).ways
        slow = Pace(0.002, 2.0, training=200_000, structure=True)
        assert planned(slow, CONVOLUTIONS, 3600.0).level == "thorough"
        assert "subnet" not in planned(slow, CONVOLUTIONS, 3600.0).ways
        assert pace.elastic("thorough", 1e9) == 60

    def test_of_a_student_comes_first_and_once(self) -> None:
        pace = Pace(0.002, 2.0, training=2000, structure=True, student=True, teacher="teacher")
        made = planned(pace, CONVOLUTIONS, 600.0)
        lesson = Step("finetune", {"epochs": pace.lessons(600.0), "teacher": "teacher"})
        assert all(recipe.steps[0] == lesson for recipe in made.ways.values())
        assert pace.lessons(600.0) == pytest.approx(0.4 * 600 / (4 * 2000 * 0.002))
        assert (pace.lessons(0.0), pace.lessons(1e9)) == (1.0, 100.0)
        assert planned(pace, CONVOLUTIONS, 30.0).ways["nearest"].steps[0].method == "finetune"

    def test_counts_examples_without_labels(self, tmp_path: Path) -> None:
        known = data("residual")
        run = Run(model("residual"), known, target(), Store(tmp_path))
        assert (pace_of(run).training, pace_of(run).structure) == (32, True)
        unlabelled = Data.of(known.scored.inputs[0], calibration=inputs("residual", 24))
        run = Run(model("residual"), unlabelled, target(), Store(tmp_path))
        assert (pace_of(run).training, pace_of(run).structure) == (24, True)
        random = Data.of(known.scored.inputs[0])
        run = Run(model("residual"), random, target(), Store(tmp_path))
        assert (pace_of(run).training, pace_of(run).structure) == (0, False)


class TestLonger:
    def test_tells_from_which_time_on_the_next_level_is_taken(self) -> None:
        for pace in (SMALL, LARGE):
            for seconds in (30.0, 300.0):
                made = planned(pace, CONVOLUTIONS, seconds)
                minutes = float(made.longer.split()[1].removesuffix("m"))
                above = planned(pace, CONVOLUTIONS, 60 * minutes)
                assert LEVELS.index(above.level) >= LEVELS.index(made.level) + 1

    def test_of_the_highest_adds_no_level(self) -> None:
        assert "iterations" in planned(SMALL, CONVOLUTIONS, 3600.0).longer


class TestPlan:
    def run(self, folder: Path) -> Run:
        return Run(model("residual"), data("residual"), target(), Store(folder))

    def test_times_a_pass_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = pace_of(self.run(tmp_path))
        assert 0 < first.example_s < 1
        assert first.weights_s > 0
        monkeypatch.setattr(effort, "_example_seconds", lambda run: pytest.fail("timed again"))
        assert pace_of(self.run(tmp_path)) == first

    def test_takes_the_bytes_of_the_budget(self, tmp_path: Path) -> None:
        made = plan(self.run(tmp_path), 1e5, Budget(bytes=4000))
        assert made.ways["mixed"].steps[2].parameters["bytes"] == 4000

    def test_is_told_with_its_trials(self, tmp_path: Path) -> None:
        made = plan(self.run(tmp_path), 300.0, Budget())
        told = made.told({"gptq": 3}, 12.5)
        assert (told.level, told.time_s, told.seconds) == ("standard", 300.0, 12.5)
        assert [way.name for way in told.ways] == list(made.ways)
        assert {way.name: way.trials for way in told.ways}["gptq"] == 3


@pytest.mark.parametrize(("net", "matrices"), [("residual", False), ("attention", True), ("lstm", True)])
def test_shapes_of_networks(net: str, matrices: bool) -> None:
    assert net in NETS
    assert shape_of(model(net)).of_matrices == matrices
    assert shape_of(model(net)).recurrent == any(
        isinstance(layer, nn.LSTM) for layer in model(net).module.modules()
    )


class TestBounded:
    def test_ends_when_the_time_is_up(self) -> None:
        done = []
        with pytest.raises(OutOfTime):
            for item in Bounded(Silent(), time.monotonic() + 0.05).track(range(10**6), "step"):
                done.append(item)
                time.sleep(0.01)
        assert 1 <= len(done) <= 10

    def test_lets_work_in_time_pass(self) -> None:
        assert list(Bounded(Silent(), time.monotonic() + 60).track(range(5), "step", 5)) == [0, 1, 2, 3, 4]
