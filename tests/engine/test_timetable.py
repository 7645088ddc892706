"""The time of a search: what is reserved, what starts, what is left out."""

from __future__ import annotations

import pytest

from featherweight.engine.timetable import Timetable, longest_measurement


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def table(clock: Clock, **told: float | bool) -> Timetable:
    return Timetable(1000.0, 300.0, clock=clock, **told)  # type: ignore[arg-type]


def test_what_comes_after_the_last_trial_has_its_time_reserved() -> None:
    assert table(Clock()).reserve_s == pytest.approx(15.0)  # the report
    several = table(Clock(), comparing_s=20.0, tuning_s=16.0, weighing_s=4.0)
    assert several.reserve_s == pytest.approx(55.0)
    assert several.until == pytest.approx(1245.0)
    assert table(Clock(), comparing_s=500.0).reserve_s == pytest.approx(60.0)  # a fifth at most


def test_a_trial_fits_that_is_weighed_before_the_reserve_begins() -> None:
    clock = Clock()
    one = table(clock, weighing_s=10.0)
    clock.now = 1000.0 + 300.0 - 15.0 - 10.0 - 5.0
    assert one.fits(5.0)
    assert not one.fits(5.1)


def test_what_would_end_later_is_left_out_and_remembered() -> None:
    clock = Clock()
    one = table(clock)
    clock.now = 1290.0
    assert one.allows("the comparison of the best", 24.0)
    assert not one.allows("the runtime's options", 26.0)  # 15 s of grace
    assert one.left_out == ["the runtime's options"]


def test_one_filled_recipe_is_never_short_of_time() -> None:
    clock = Clock()
    one = table(clock, bounded=False, comparing_s=20.0)
    clock.now = 9000.0
    assert one.allows("parity", 1e6)
    assert (one.left_out, one.reserve_s) == ([], 0.0)


def test_the_time_to_go() -> None:
    clock = Clock()
    one = table(clock)
    clock.now = 1100.0
    assert one.to_go(trials=8, done=0, spent_s=0.0) == pytest.approx(200.0)  # nothing is known yet
    assert one.to_go(trials=8, done=2, spent_s=20.0) == pytest.approx(6 * 10.0 + 15.0)
    assert one.to_go(trials=8, done=2, spent_s=90.0) == pytest.approx(200.0)  # the time ends it
    clock.now = 1400.0
    assert one.to_go(trials=8, done=2, spent_s=20.0) == 0.0


@pytest.mark.parametrize(
    ("seconds", "time_limit", "longest"), [(20, 600, 20), (20, 60, 4), (20, 1, 1), (0.2, 1, 0.2)]
)
def test_one_measurement_takes_a_small_share(seconds: float, time_limit: float, longest: float) -> None:
    assert longest_measurement(seconds, time_limit) == pytest.approx(longest)
