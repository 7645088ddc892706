"""What a fit chooses, reports and survives, on figures that are given instead of measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from featherweight.engine import fit as fit_module
from featherweight.engine.beside import Beside
from featherweight.engine.deadline import Bounded
from featherweight.engine.effort import Plan
from featherweight.engine.evaluate import Scales, Weighed
from featherweight.engine.fit import Fit
from featherweight.engine.lanes import Lane
from featherweight.engine.question import Question
from featherweight.engine.run import Run
from featherweight.engine.search import Candidate
from featherweight.engine.timing import Limits
from featherweight.errors import (
    DataError,
    LoadError,
    MachineError,
    RecipeError,
    RunnerError,
    TargetError,
)
from featherweight.method import Method, Silent
from featherweight.outcome import Budget, Environment, Latency, Measurement, Trial
from featherweight.recipe import Choice, Recipe, Step

RANGES = ("mse", "percentile", "minmax")
ENVIRONMENT = Environment(
    cpu="c", isa="vnni", flags=[], cores=2, threads=1, memory_bytes=1, platform="p", python="3", versions={}
)
TWIN = Measurement(quality=0.9, quality_drop=0.0, bytes=1000, latency_s=Latency(median=1.0, q1=1, q3=1))
OPEN = Recipe.parse("version: 1\nsteps:\n  - quantize: {range: {choice: [mse, percentile, minmax]}}\n")
TEMPLATE = Recipe((Step("fold"), Step("quantize")))
FILLED = Recipe.parse("version: 1\nsteps:\n  - quantize: {range: mse}\n")


def seen(drop: float = 0.0, size: int = 300, ratio: float = 0.5, resolved: bool = True) -> Measurement:
    return Measurement(
        quality=0.9 - drop,
        quality_drop=drop,
        quality_drop_ci95=(drop - 0.01, drop + 0.01),
        bytes=size,
        latency_s=Latency(median=ratio, q1=ratio, q3=ratio),
        latency_ratio=ratio,
        latency_ratio_ci95=(ratio - 0.01, ratio + 0.01),
        resolved=resolved,
        macs=1,
        params=1,
    )


@pytest.fixture(autouse=True)
def _nothing_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told beside the score takes sessions, and this world has none (tests/engine/test_beside.py)."""

    def told(*given: Any) -> Beside:
        return Beside.nothing("no session")

    monkeypatch.setattr("featherweight.engine.telling.tell_beside", told)


@dataclass
class World:
    """Figures by the value of ``range``: on the selecting half, on the reporting half, or what goes wrong."""

    figures: Mapping[str, tuple[Measurement, Measurement] | BaseException]
    examples: int = 200
    runtime: str = "onnxruntime"
    weighed: list[str] = field(default_factory=list)
    slow: Mapping[str, float] = field(default_factory=dict)  # seconds that the step of this range takes
    run: Any = None

    def fit(self, question: Question) -> Fit:
        data = SimpleNamespace(
            metric=SimpleNamespace(name="accuracy"),
            scored=range(self.examples),
            halves=lambda seed: (np.arange(self.examples // 2), np.arange(self.examples // 2, self.examples)),
            notes=("a note of the data",),
            calibration_source="training",
            origin={"kind": "arrays"},
        )
        run = SimpleNamespace(
            data=data,
            seed=0,
            progress=Silent(),
            original="original",
            start="original",
            target=SimpleNamespace(runtime=self.runtime),
            runtime=SimpleNamespace(version=lambda: "1"),
            warnings={"a warning of the run": None},
            apply=lambda recipe: recipe.to_dict()["steps"][-1]["quantize"]["range"],
            context=lambda model: "context",
            step=self.step,
        )
        self.run = run
        scales = SimpleNamespace(
            twin_scored=SimpleNamespace(rows={"accuracy": np.zeros((self.examples, 1))}),
            environment=ENVIRONMENT,
            limits=Limits(),
            twin=SimpleNamespace(bytes=1000),
            tuned=lambda weighed: weighed,
            tuning_s=0.0,
            float_error=lambda: 1e-6,
            parity=lambda model, weighed: 40.0,
            kernels=lambda weighed: [],
            baseline=lambda weighed, indices: TWIN,
            weigh=self.weigh,
            beside=lambda model, other, limits: other,
            measurement=self.measurement,
            quality=lambda weighed, indices: SimpleNamespace(classes=()),
            layers=lambda model, weighed, figures: [],
        )
        return Fit([Lane(cast(Run, run), cast(Scales, scales))], question)

    def step(self, model: Any, method: Method, number: int) -> str:
        seconds = self.slow.get(getattr(method, "range", ""), 0.0)
        until = getattr(self.run, "until", math.inf)
        for _ in Bounded(Silent(), until).track(range(round(seconds / 0.005)), "a slow step"):
            time.sleep(0.005)
        return str(getattr(method, "range", f"{model}, folded"))

    def weigh(self, model: str) -> Any:
        self.weighed.append(model)
        figure = self.figures[model]
        if isinstance(figure, BaseException):
            raise figure
        artifact = SimpleNamespace(entries={"forward": "model.onnx"}, files=("model.onnx",), sha256=model)
        return SimpleNamespace(
            artifact=artifact,
            timing=SimpleNamespace(notes=("a note of timing",), ratio=0.5, ratio_ci95=(0.49, 0.51)),
            options={},
            key=model,
        )

    def measurement(self, weighed: Weighed, indices: np.ndarray | None) -> Measurement:
        figure = self.figures[cast(Any, weighed).key]
        assert not isinstance(figure, BaseException)
        return figure[0] if indices is None or indices[0] == 0 else figure[1]


def asked(recipe: Recipe = OPEN, **changes: Any) -> Question:
    question = Question(
        budget=Budget(quality_drop=0.005),
        prefer="balanced",
        confident=False,
        recipe=recipe,
        open_ended=False,
        trials=3,
        time_limit=60.0,
    )
    return replace(question, **changes)


def both(**figures: Measurement | BaseException) -> dict[str, Any]:
    """The same on both halves."""
    return {
        key: value if isinstance(value, BaseException) else (value, value) for key, value in figures.items()
    }


class TestChoice:
    def test_best_within_the_budget(self) -> None:
        world = World(both(mse=seen(size=400), percentile=seen(size=300), minmax=seen(0.02, size=100)))
        fitted = world.fit(asked()).answer()
        result = fitted.result
        assert result.met
        assert result.chosen.sha256 == "percentile"
        assert result.recipe["steps"] == [{"quantize": {"range": "percentile"}}]
        assert [trial.chosen for trial in result.trials] == [t.sha256 == "percentile" for t in result.trials]
        assert result.blocking == []
        assert result.relaxation is None
        assert fitted.finished

    def test_the_reporting_half_must_confirm(self) -> None:
        world = World(
            {
                "mse": (seen(0.0, 100), seen(0.02, 100)),  # best by the half that selects
                "percentile": (seen(0.001, 300), seen(0.004, 300)),
                "minmax": (seen(0.0, 500), seen(0.0, 500)),
            }
        )
        result = world.fit(asked()).answer().result
        assert result.met
        assert result.chosen.sha256 == "percentile"
        assert result.chosen.quality_drop == 0.004  # the reporting half's figure
        assert result.examples["halved"]
        assert result.examples["selecting"] == result.examples["reporting"] == 100

    def test_nothing_is_met_that_the_reporting_half_denies(self) -> None:
        world = World(
            {key: (seen(0.0, 100 * (1 + i)), seen(0.03 - 0.01 * i, 100)) for i, key in enumerate(RANGES)}
        )
        result = world.fit(asked()).answer().result
        assert not result.met
        assert not result.met_confident
        assert result.chosen.sha256 == "minmax"  # breaks the limit least
        assert [item.axis for item in result.blocking] == ["quality_drop"]
        assert result.relaxation is not None
        assert result.relaxation.limit == pytest.approx(0.01)  # not the 0 that the selecting half saw

    def test_a_blocked_budget_names_the_cheapest_relaxation(self) -> None:
        world = World(both(mse=seen(0.0, 400), percentile=seen(0.002, 320), minmax=seen(0.09, 100)))
        result = world.fit(asked(budget=Budget(quality_drop=0.005, bytes=300))).answer().result
        assert not result.met
        assert result.chosen.sha256 == "percentile"
        assert [(item.axis, item.value) for item in result.blocking] == [("bytes", 320)]
        assert result.relaxation is not None
        assert (result.relaxation.axis, result.relaxation.limit) == ("bytes", 320)

    def test_confident_holds_the_upper_end(self) -> None:
        world = World(both(mse=seen(0.001), percentile=seen(0.002), minmax=seen(0.003)))
        assert world.fit(asked()).answer().result.met
        result = World(world.figures).fit(asked(confident=True)).answer().result
        assert not result.met

    def test_met_confident_stands_beside(self) -> None:
        world = World(both(mse=seen(-0.02), percentile=seen(0.004), minmax=seen(0.004)))
        assert world.fit(asked()).answer().result.met_confident
        result = World(both(mse=seen(0.004), percentile=seen(0.004), minmax=seen(0.004)))
        assert not result.fit(asked()).answer().result.met_confident

    def test_an_unresolved_latency_satisfies_no_limit(self) -> None:
        world = World(both(**{key: seen(resolved=False) for key in RANGES}))
        result = world.fit(asked(budget=Budget(latency_s=1.0))).answer().result
        assert not result.met
        assert result.blocking[0].reason == "unresolved"


class TestRejection:
    def test_what_is_worse_than_the_original_is_no_answer(self) -> None:
        world = World(
            both(mse=seen(size=100, ratio=11.0), percentile=seen(0.01, 500), minmax=seen(0.01, 500))
        )
        result = world.fit(asked(budget=Budget(bytes=200))).answer().result
        assert not result.met
        assert result.chosen.sha256 != "mse"
        states = {trial.sha256: trial.state for trial in result.trials}
        assert states["mse"] == "rejected"

    def test_the_only_one_is_handed_back_with_the_reason(self) -> None:
        world = World(both(**{key: seen(size=300, ratio=5.0) for key in RANGES}))
        result = world.fit(asked()).answer().result
        assert not result.met
        assert "no gain over the original" in result.blocking[0].reason

    def test_a_filled_recipe_is_reported_never_rejected(self) -> None:
        world = World(both(mse=seen(size=300, ratio=5.0)))
        result = world.fit(asked(FILLED, trials=1)).answer().result
        assert result.met
        assert result.trials[0].state == "measured"

    def test_one_trial_of_a_search_may_be_rejected(self) -> None:
        world = World(both(mse=seen(size=300, ratio=5.0)))
        result = world.fit(asked(trials=1)).answer().result
        assert not result.met
        assert result.trials[0].state == "rejected"


class TestFailure:
    @pytest.mark.parametrize("kind", [LoadError, RecipeError, RunnerError, TargetError])
    def test_of_one_trial_lets_the_others_go_on(self, kind: type[Exception]) -> None:
        world = World(
            both(mse=kind("cannot store '/root/.cache/x/model.onnx'"), percentile=seen(), minmax=seen())
        )
        result = world.fit(asked()).answer().result
        assert result.met
        failed = next(trial for trial in result.trials if trial.state == "failed")
        assert failed.reason == "cannot store 'model.onnx'"
        assert failed.measurement is None
        assert not failed.chosen

    def test_of_all_trials_is_told_by_the_last(self) -> None:
        world = World({key: TargetError(f"no kernel for {key}") for key in RANGES})
        with pytest.raises(TargetError, match="no kernel for"):
            world.fit(asked()).answer()
        assert sorted(world.weighed) == sorted(RANGES)

    def test_of_the_only_trial(self) -> None:
        with pytest.raises(RunnerError, match="crashed"):
            World({"mse": RunnerError("crashed")}).fit(asked(FILLED, trials=1)).answer()

    @pytest.mark.parametrize("kind", [MachineError, DataError])
    def test_that_is_not_the_recipes_ends_the_search(self, kind: type[Exception]) -> None:
        world = World({key: kind("the disk is full") for key in RANGES})
        with pytest.raises(kind):
            world.fit(asked()).answer()
        assert len(world.weighed) == 1

    def test_a_fault_of_ours_is_not_hidden(self) -> None:
        world = World({key: ZeroDivisionError("a bug") for key in RANGES})
        with pytest.raises(ZeroDivisionError):
            world.fit(asked()).answer()


class TestEnd:
    def test_of_time_leaves_one_trial_and_is_no_end_of_its_own(self) -> None:
        fitted = World(both(**{key: seen() for key in RANGES})).fit(asked(time_limit=0.0)).answer()
        assert len(fitted.result.trials) == 1
        assert not fitted.finished
        assert "the time limit ended the search after 1 of 3 trials" in fitted.result.warnings

    def test_that_has_no_time_for_one_more_trial_stops(self) -> None:
        """Each takes as long as the first one, so the second would end within what is reserved."""
        world = World(both(**{key: seen() for key in RANGES}))
        weigh = world.weigh
        world.weigh = lambda model: (time.sleep(0.3), weigh(model))[1]  # type: ignore[method-assign,func-returns-value]
        started = time.monotonic()
        fitted = world.fit(asked(time_limit=0.6)).answer()
        assert time.monotonic() - started < 0.6
        assert len(fitted.result.trials) == 1
        assert not fitted.finished

    def test_leaves_out_what_would_come_late_and_says_so(self) -> None:
        world = World(both(**{key: seen() for key in RANGES}))
        fitted = world.fit(asked(time_limit=0.0)).answer()
        assert "the time was up before: parity, kernels, errors of layers" in fitted.result.warnings
        assert fitted.result.runtimes == []
        whole = World(both(mse=seen())).fit(asked(FILLED, trials=1, time_limit=0.0)).answer().result
        assert len(whole.runtimes) == 1  # nothing competes: no trial's time is taken
        assert not any("the time was up" in said for said in whole.warnings)

    def test_by_interruption_hands_back_the_best_so_far(self) -> None:
        figures = both(mse=seen(), percentile=KeyboardInterrupt(), minmax=KeyboardInterrupt())
        fitted = World(figures).fit(asked()).answer()
        assert fitted.result.chosen.sha256 == "mse"
        assert not fitted.finished
        assert "the search was interrupted after 1 trials" in fitted.result.warnings

    def test_by_interruption_before_anything(self) -> None:
        with pytest.raises(KeyboardInterrupt):
            World({key: KeyboardInterrupt() for key in RANGES}).fit(asked()).answer()

    def test_by_interruption_after_a_failure_only(self) -> None:
        figures = {"mse": TargetError("no"), "percentile": KeyboardInterrupt(), "minmax": KeyboardInterrupt()}
        with pytest.raises(KeyboardInterrupt):
            World(figures).fit(asked()).answer()

    def test_nothing_is_tried_twice(self) -> None:
        world = World(both(**{key: seen() for key in RANGES}))
        assert world.fit(asked(trials=9)).answer().finished
        assert sorted(world.weighed) == sorted(RANGES)


class TestWarnings:
    def test_say_what_is_simulated(self) -> None:
        world = World(both(mse=seen()), runtime="torch")
        warnings = world.fit(asked(FILLED, trials=1)).answer().result.warnings
        assert "simulates" in warnings[0]
        assert warnings[1:] == ["a note of the data", "a warning of the run", "a note of timing"]

    def test_say_that_few_examples_select_and_report(self) -> None:
        world = World(both(**{key: seen() for key in RANGES}), examples=40)
        result = world.fit(asked()).answer().result
        assert any("the same 40 examples" in warning for warning in result.warnings)
        assert not result.examples["halved"]

    def test_one_trial_has_nothing_to_select(self) -> None:
        result = World(both(mse=seen())).fit(asked(FILLED, trials=1)).answer().result
        assert not result.examples["halved"]
        assert not any("the same" in warning for warning in result.warnings)


def way(name: str) -> Recipe:
    return Recipe((Step("quantize", {"range": name}),))


def planned(time_s: float = 60.0, **predicted: float) -> Plan:
    """Ways that are told by their ranges, with what is predicted of them."""
    ways = {name: way(name) for name in predicted}
    return Plan("standard", time_s, 0.001, ways, predicted, trials=9, longer="--time 15m adds more")


def searched(plan: Plan, **changes: Any) -> Question:
    return asked(Recipe(()), open_ended=True, plan=plan, trials=9, time_limit=plan.time_s, **changes)


@pytest.fixture
def _no_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "step_holes", lambda step, model, context: {})


@pytest.mark.usefixtures("_no_holes")
class TestWays:
    def test_are_tried_in_their_order_and_told(self) -> None:
        world = World(both(mse=seen(), percentile=seen(), minmax=seen()))
        fitted = world.fit(searched(planned(minmax=0.1, mse=0.1, percentile=0.1))).answer()
        assert world.weighed == ["minmax", "mse", "percentile"]
        assert [trial.way for trial in fitted.result.trials] == world.weighed
        assert fitted.finished
        told = fitted.result.effort
        assert told is not None
        assert {one.name: one.trials for one in told.ways} == {"minmax": 1, "mse": 1, "percentile": 1}
        assert told.longer == "--time 15m adds more"
        assert 0 <= told.seconds < 60

    def test_that_would_be_ready_too_late_do_not_start(self) -> None:
        world = World(both(mse=seen(), percentile=seen(), minmax=seen()))
        fitted = world.fit(searched(planned(mse=0.1, percentile=1e6, minmax=0.2))).answer()
        assert world.weighed == ["mse", "minmax"]
        assert not fitted.finished  # with more time there would be more
        assert fitted.result.effort is not None
        assert [one.trials for one in fitted.result.effort.ways] == [1, 0, 1]
        assert any("the time limit ended the search after 2 of 9" in said for said in fitted.result.warnings)

    def test_of_the_first_answer_start_whatever_they_take(self) -> None:
        world = World(both(mse=seen()))
        assert world.fit(searched(planned(mse=1e6))).answer().result.chosen.sha256 == "mse"

    @pytest.mark.parametrize(
        ("question", "left_out"), [(asked(), False), (searched(planned(mse=0.1)), True)], ids=["own", "any"]
    )
    def test_of_a_slow_runtime_are_left_out_unless_the_recipe_is_the_users(
        self, question: Question, left_out: bool
    ) -> None:
        fit = World(both(mse=seen())).fit(question)
        fit.handicaps = {"fast": 1.0, "slow": 9.0}
        tried = Trial(number=0, runtime="fast", recipe={}, state="measured", measurement=seen())
        fit.search.trials.append(tried)
        slow = cast(Candidate, SimpleNamespace(runtime="slow"))
        assert (fit._outpaced(slow) is not None) == left_out

    def test_slower_than_predicted_are_learned_from(self) -> None:
        """The first one takes a hundred times what was predicted, so the second one would not be ready."""
        world = World(both(mse=seen(), percentile=seen()), slow={"mse": 0.2})
        plan = planned(1.0, mse=0.002, percentile=0.1)
        world.fit(searched(plan)).answer()
        assert world.weighed == ["mse"]

    def test_end_within_the_time_though_a_step_would_not(self) -> None:
        world = World(both(mse=seen(), percentile=seen()), slow={"percentile": 30.0})
        started = time.monotonic()
        fitted = world.fit(searched(planned(0.5, mse=0.01, percentile=0.01))).answer()
        assert time.monotonic() - started < 5
        assert fitted.result.chosen.sha256 == "mse"
        failed = fitted.result.trials[1]
        assert (failed.state, failed.reason) == ("failed", "the time limit came while it was made")
        assert failed.seconds >= 0.3
        assert world.run.until == math.inf  # the report's own passes are not cut off
        assert not fitted.finished

    def test_are_not_cut_off_before_there_is_an_answer(self) -> None:
        world = World(both(mse=seen()), slow={"mse": 0.3})
        fitted = world.fit(searched(planned(0.05, mse=0.01))).answer()
        assert fitted.result.chosen.sha256 == "mse"

    def test_that_fail_leave_the_others(self) -> None:
        world = World(both(mse=TargetError("no dynamic here"), percentile=seen()))
        fitted = world.fit(searched(planned(mse=0.1, percentile=0.1))).answer()
        assert [trial.state for trial in fitted.result.trials] == ["failed", "measured"]
        assert fitted.finished

    @pytest.mark.parametrize(("drop", "unused"), [(0.001, [None, 2, 1]), (0.0049, [None])])
    def test_that_have_quality_to_spare_are_stored_in_fewer_levels(
        self, drop: float, unused: list[int | None]
    ) -> None:
        """Here all levels are even, so nothing is won by the first try, nor by the second."""
        world = World(both(mse=seen(drop)))
        fitted = world.fit(replace(searched(planned(mse=0.1)), trials=3)).answer()
        told = [trial.recipe["steps"][0]["quantize"].get("headroom") for trial in fitted.result.trials]
        assert told == unused

    def test_in_fewer_levels_are_made_once_though_others_ask_meanwhile(self) -> None:
        fit = World(both(mse=seen())).fit(replace(searched(planned(mse=0.1)), trials=9))
        fit.search.trials.append(
            Trial(
                number=0,
                way="mse",
                recipe={"version": 1, "steps": [{"quantize": {"range": "mse"}}]},
                state="measured",
                measurement=seen(),
            )
        )
        fit.pursued = 1
        first = fit._beside()
        assert first is not None and first.recipe is not None
        assert first.recipe.to_dict()["steps"][0]["quantize"]["headroom"] == 2
        assert fit._beside() is None, "a worker makes it already"

    def test_interrupted_hand_back_the_best_so_far(self) -> None:
        world = World(both(mse=seen(), percentile=KeyboardInterrupt()))
        fitted = world.fit(searched(planned(mse=0.1, percentile=0.1))).answer()
        assert fitted.result.chosen.sha256 == "mse"
        assert not fitted.finished

    def test_that_are_even_are_told_apart_by_their_outputs(self) -> None:
        near = {"sqnr_db": 30.0}, {"sqnr_db": 20.0}
        one, two = (
            seen(ratio=ratio).model_copy(update=more) for ratio, more in zip((0.505, 0.5), near, strict=True)
        )
        fitted = World(both(mse=one, percentile=two)).fit(searched(planned(mse=0.1, percentile=0.1))).answer()
        assert fitted.result.chosen.sha256 == "mse"
        faster = seen(ratio=0.4).model_copy(update={"sqnr_db": 20.0})
        fitted = (
            World(both(mse=one, percentile=faster)).fit(searched(planned(mse=0.1, percentile=0.1))).answer()
        )
        assert fitted.result.chosen.sha256 == "percentile"


def test_holes_are_asked_of_the_model_that_reaches_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[tuple[str, Any]] = []

    def holes(step: Step, model: Any, context: Any) -> dict[str, Choice]:
        known.append((step.method, model))
        return {"range": Choice(RANGES)} if step.method == "quantize" else {}

    monkeypatch.setattr(fit_module, "step_holes", holes)
    world = World(both(**{key: seen() for key in RANGES}))
    result = world.fit(asked(TEMPLATE, open_ended=True, trials=9)).answer().result
    assert sorted(world.weighed) == sorted(RANGES)
    assert known[:2] == [("fold", "original"), ("quantize", "original, folded")]
    assert result.recipe["steps"][0] == {"fold": {}}


def test_seconds_of_trials_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(both(mse=seen()))
    weigh: Callable[[str], Any] = world.weigh
    monkeypatch.setattr(world, "weigh", lambda model: (time.sleep(0.02), weigh(model))[1])
    assert world.fit(asked(FILLED, trials=1)).answer().result.trials[0].seconds >= 0.02
