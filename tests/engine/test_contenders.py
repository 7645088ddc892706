"""Which runtimes of a search go on."""

from __future__ import annotations

import pytest

from featherweight.engine.contenders import outpaced
from featherweight.outcome import Measurement, Trial

HANDICAPS = {"first": 1.0, "near": 1.8, "browser": 8.5}


def tried(runtime: str, ratio: float | None) -> Trial:
    seen = None if ratio is None else Measurement(latency_ratio=ratio)
    state = "failed" if seen is None else "measured"
    return Trial(number=0, runtime=runtime, recipe={}, state=state, measurement=seen)


def test_nothing_is_too_slow_before_anything_was_measured() -> None:
    assert outpaced("browser", [], HANDICAPS, "balanced") is None
    assert outpaced("browser", [tried("first", None)], HANDICAPS, "balanced") is None


def test_no_gain_seen_elsewhere_makes_up_for_a_slow_original() -> None:
    trials = [tried("first", 0.5)]
    assert outpaced("near", trials, HANDICAPS, "balanced") is None  # 0.9 x by the same gain
    reason = outpaced("browser", trials, HANDICAPS, "balanced")
    assert reason is not None
    assert "8.5 x as long as on first" in reason and "0.50 x" in reason


def test_a_large_gain_seen_on_any_runtime_may_be_had_on_another() -> None:
    trials = [tried("first", 0.9), tried("near", 0.36)]  # near became five times faster than it was
    assert outpaced("browser", trials, {**HANDICAPS, "browser": 3.0}, "latency") is None
    assert outpaced("browser", trials[:1], {**HANDICAPS, "browser": 3.0}, "latency") is not None


@pytest.mark.parametrize("prefer", ["bytes", "quality"])
def test_where_latency_has_no_part_no_runtime_is_too_slow(prefer: str) -> None:
    assert outpaced("browser", [tried("first", 0.5)], HANDICAPS, prefer) is None  # type: ignore[arg-type]


def test_a_runtime_that_was_tried_goes_on() -> None:
    trials = [tried("first", 0.5), tried("browser", 6.0)]
    assert outpaced("browser", trials, HANDICAPS, "balanced") is None
