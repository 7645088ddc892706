"""What each step bought: measured where there is time, else simulated, and always said which."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import golden
from featherweight.data import Data
from featherweight.engine import steps
from featherweight.engine.evaluate import Scales, Weighed
from featherweight.engine.lanes import Lane
from featherweight.engine.run import Run
from featherweight.engine.steps import INTERRUPTED, NO_TIME, Clock, clock, prefix_key, step_rows
from featherweight.engine.store import Store
from featherweight.engine.timing import Limits
from featherweight.errors import TargetError
from featherweight.outcome import Measurement
from featherweight.recipe import Recipe
from featherweight.runtime import Target

QUICK = Limits(seconds=0.2, least_seconds=0.0, warmup_s=0.01, throughput_s=0.02, memory_repeats=1)
QUANTIZE = {"weights": "int4", "activations": "none", "samples": 8}
RECIPE = Recipe.from_dict({"version": 1, "steps": [{"fold": {}}, {"quantize": QUANTIZE}, {"rounding": {}}]})


class World:
    """A golden net on ONNX Runtime, and the artifact of the whole recipe."""

    def __init__(self, folder: Path) -> None:
        x = np.random.default_rng(0).standard_normal((48, 3, 16, 16)).astype(np.float32)
        data = Data.of(x=x[:32], y=np.arange(32) % 10, x_train=x[32:])
        run = Run(golden.model("residual"), data, Target("onnxruntime", "", 1), Store(folder))
        self.lane = Lane(run, Scales(run, QUICK))
        self.chosen: Weighed = self.lane.scales.weigh(run.apply(RECIPE))
        self.seen: Measurement = self.lane.measurement(self.chosen)

    def rows(self, clock: Clock | None, **told: Any) -> Any:
        asked: dict[str, Any] = {"known": {}, "indices": None, **told}
        return step_rows(self.lane, self.chosen, RECIPE, self.seen, clock=clock, **asked)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("store"))


def long() -> Clock:
    return Clock(time.monotonic() + 600, 1.0)


def test_each_beginning_of_the_recipe_is_measured_like_the_artifact(world: World) -> None:
    fold, quantize, rounding = world.rows(long())
    assert [fold.name, quantize.name, rounding.name] == ["fold", "quantize", "rounding"]
    assert quantize.parameters == QUANTIZE
    assert {row.state for row in (fold, quantize, rounding)} == {"measured"}
    assert {row.examples for row in (fold, quantize, rounding)} == {32}
    assert rounding.measurement == world.seen
    assert fold.measurement.quality_drop == pytest.approx(0.0, abs=1 / 32)  # folding changes no answer
    assert quantize.measurement.bytes < fold.measurement.bytes
    assert rounding.measurement.sqnr_db > quantize.measurement.sqnr_db
    assert fold.measurement.latency_ratio > 0
    assert fold.measurement.memory_bytes is None  # nobody asked


def test_a_trial_that_was_the_beginning_tells_it_for_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Measurement(quality_drop=0.123, bytes=7)
    monkeypatch.setattr(world.lane.scales, "beside", lambda *_: pytest.fail("it was measured already"))
    known = {
        prefix_key([{"fold": {}}]): told,
        prefix_key([{"fold": {}}, {"quantize": dict(reversed(QUANTIZE.items()))}]): told,
    }
    rows = world.rows(long(), known=known)
    assert [row.measurement for row in rows] == [told, told, world.seen]
    assert [row.state for row in rows] == ["measured"] * 3


def test_without_the_time_to_measure_it_is_simulated_and_says_so(world: World) -> None:
    measured = world.rows(long())
    rows = world.rows(Clock(time.monotonic() + 600, 1e4))
    assert [row.state for row in rows] == ["simulated", "simulated", "measured"]
    for row, exact in zip(rows[:2], measured, strict=False):
        assert row.reason == NO_TIME
        assert row.examples == 32
        assert row.measurement.latency_ratio is None
        assert row.measurement.latency_s is None
        assert row.measurement.bytes == pytest.approx(exact.measurement.bytes, rel=0.05)
        assert row.measurement.params == exact.measurement.params
        assert row.measurement.quality_drop == pytest.approx(exact.measurement.quality_drop, abs=4 / 32)


def test_when_the_time_is_up_sizes_alone_are_told(world: World) -> None:
    rows = world.rows(Clock(time.monotonic() - 1, 1.0))
    assert [row.state for row in rows] == ["simulated", "simulated", "measured"]
    assert rows[0].measurement.quality_drop is None
    assert rows[0].examples == 0
    assert rows[0].measurement.bytes > 0


def test_the_time_may_end_within_the_simulation(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.rows(Clock(time.monotonic() + 600, 1e4))  # traced and read from the store

    whole = steps.as_run

    def slow(call: Any) -> Any:
        def run(*inputs: np.ndarray) -> Any:
            time.sleep(0.5)
            return whole(call)(*inputs)

        return run

    monkeypatch.setattr(steps, "as_run", slow)
    world.lane.run.data.batch_size = 8
    try:
        rows = world.rows(Clock(time.monotonic() + 0.4, 1e4))
    finally:
        world.lane.run.data.batch_size = 32
    assert all(row.measurement.quality_drop is None for row in rows[:2])


def test_interrupted_nothing_is_computed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.lane.run, "step", lambda *_: pytest.fail("a step was computed"))
    rows = world.rows(None)
    assert [(row.state, row.reason) for row in rows[:2]] == [("unknown", INTERRUPTED)] * 2
    assert rows[2].measurement == world.seen


def test_what_no_runtime_stores_is_simulated_with_the_reason(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise TargetError("onnxruntime cannot store it")

    monkeypatch.setattr(world.lane.scales, "beside", refuse)
    rows = world.rows(long())
    assert [row.reason for row in rows] == ["onnxruntime cannot store it"] * 2 + [""]
    assert rows[0].state == "simulated"


def test_the_reporting_half_counts(world: World) -> None:
    half = np.arange(16)
    rows = world.rows(long(), indices=half)
    assert {row.examples for row in rows[:2]} == {16}
    full = world.rows(long())
    scales = world.lane.scales
    model = world.lane.run.apply(Recipe.from_dict({"version": 1, "steps": RECIPE.to_dict()["steps"][:2]}))
    again = scales.beside(model, world.chosen, QUICK)
    assert rows[1].measurement.sqnr_db == world.lane.measurement(again, half).sqnr_db
    assert rows[1].measurement.sqnr_db != full[1].measurement.sqnr_db


def test_a_student_comes_first(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((16, 3, 16, 16)).astype(np.float32)
    data = Data.of(x=x, y=np.arange(16) % 10)
    model = golden.model("residual")
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        next(module.parameters()).mul_(1.5)
    student = golden.model_of(module, *model.entries["forward"].example_inputs)
    run = Run(model, data, Target("onnxruntime", "", 1), Store(tmp_path), student=student)
    recipe = Recipe.from_dict({"version": 1, "steps": [{"fold": {}}]})
    lane = Lane(run, Scales(run, QUICK))
    chosen = lane.scales.weigh(run.apply(recipe))
    seen = lane.measurement(chosen)
    rows = step_rows(lane, chosen, recipe, seen, known={}, indices=None, clock=long())
    assert [(row.name, row.state) for row in rows] == [("student", "measured"), ("fold", "measured")]
    assert rows[0].measurement is not None
    assert rows[0].measurement.sqnr_db == pytest.approx(seen.sqnr_db or 0.0, abs=1.0)


class TestClock:
    def test_takes_a_twentieth_of_the_time(self) -> None:
        made = clock(time.monotonic() + 100, 200.0, 1.0)
        assert made.until - time.monotonic() == pytest.approx(10.0, abs=0.5)
        assert made.allows

    def test_does_not_go_beyond_the_end_but_for_a_hundredth(self) -> None:
        made = clock(time.monotonic() + 4, 200.0, 5.0)
        assert made.until - time.monotonic() == pytest.approx(4.0, abs=0.5)
        assert not made.allows
        late = clock(time.monotonic() - 50, 200.0, 1.0)
        assert late.until - time.monotonic() == pytest.approx(2.0, abs=0.5)
