"""Artifacts timed in turn in processes of their own, and options that are chosen by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from featherweight.engine.paced import Entrant, measure_paced
from featherweight.engine.timing import Limits
from featherweight.engine.tune import tune
from featherweight.errors import FeatherweightError, RunnerError, TargetError
from featherweight.method import Silent
from featherweight.runtime import Artifact, Target

Make = Callable[..., Artifact]
X = np.ones((1, 4), np.float32)
QUICK = Limits(seconds=2, least_seconds=0.0, warmup_s=0.02, throughput_s=0.1, timeout_s=20)


def test_ratios_are_those_of_the_work(make: Make, target: Target) -> None:
    entrants = [Entrant(make(f"a{work}", seconds=work * 1e-3), target) for work in (1, 2, 3)]
    rounds = measure_paced(entrants, [X], limits=QUICK, progress=Silent())
    assert not rounds.failed
    assert len({len(one) for one in rounds.seconds}) == 1
    assert len(rounds.seconds[0]) >= QUICK.rounds
    assert rounds.ratio(1).median == pytest.approx(2, rel=0.25)
    assert rounds.ratio(2).median == pytest.approx(3, rel=0.25)
    assert rounds.ratio(1, to=2).median == pytest.approx(2 / 3, rel=0.25)
    low, high = rounds.ratio(1).ci95 or (0.0, 0.0)
    assert low <= rounds.ratio(1).median <= high
    summary = rounds.summary(0)
    assert summary.q1 <= summary.median <= summary.q3


def test_one_that_fails_costs_itself_alone(make: Make, target: Target) -> None:
    entrants = [
        Entrant(make("good", seconds=1e-3), target),
        Entrant(make("crashes", open="crash"), target),
        Entrant(make("refuses", open="refuse"), target),
        Entrant(make("aborts later", call="abort", after=40), target),
        Entrant(make("also good", seconds=1e-3), target),
    ]
    rounds = measure_paced(entrants, [X], limits=QUICK, progress=Silent())
    assert set(rounds.failed) == {1, 2, 3}
    assert isinstance(rounds.failed[2], TargetError)
    assert "SIGSEGV" in rounds.failed[1].what
    assert "SIGABRT" in rounds.failed[3].what
    assert rounds.seconds[1] == rounds.seconds[2] == rounds.seconds[3] == ()
    assert rounds.ratio(4).median == pytest.approx(1, rel=0.25)


def test_the_first_one_must_work(make: Make, target: Target) -> None:
    entrants = [Entrant(make("crashes", open="crash"), target), Entrant(make("good"), target)]
    with pytest.raises(RunnerError, match="SIGSEGV"):
        measure_paced(entrants, [X], limits=QUICK, progress=Silent())


def test_a_hang_ends_at_its_time(make: Make, target: Target) -> None:
    entrants = [Entrant(make("good"), target), Entrant(make("hangs", call="hang", after=1), target)]
    rounds = measure_paced(entrants, [X], limits=replace(QUICK, timeout_s=2), progress=Silent())
    assert "gave no answer" in rounds.failed[1].what
    assert rounds.seconds[0]


class TestTune:
    SETS = ({"factor": 3.0}, {"factor": 0.5}, {"refused": True})

    def test_the_faster_options_win(self, make: Make, target: Target) -> None:
        artifact = make("a", seconds=2e-3)
        found = tune(artifact, target, self.SETS, [X], limits=QUICK, entry="forward", progress=Silent())
        assert found == {"factor": 0.5}

    def test_nothing_faster_keeps_the_defaults(self, make: Make, target: Target) -> None:
        where = replace(target, options={"factor": 0.4})
        artifact = make("a", seconds=4e-3)
        found = tune(artifact, where, self.SETS, [X], limits=QUICK, entry="forward", progress=Silent())
        assert found == {"factor": 0.4}

    def test_without_sets_nothing_is_measured(self, make: Make, target: Target) -> None:
        broken = make("a", open="crash")
        assert tune(broken, target, (), [X], limits=QUICK, entry="forward", progress=Silent()) == {}

    def test_an_artifact_that_cannot_run_is_an_error(self, make: Make, target: Target) -> None:
        with pytest.raises(FeatherweightError):
            tune(
                make("a", open="crash"),
                target,
                self.SETS,
                [X],
                limits=QUICK,
                entry="forward",
                progress=Silent(),
            )
