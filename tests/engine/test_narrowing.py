"""What has quality to spare is stored in fewer levels, a bit at a time."""

from __future__ import annotations

from typing import Any

import pytest

from featherweight.engine.narrowing import headroom, narrowed
from featherweight.engine.search import Opening
from featherweight.outcome import Budget, Measurement, Trial

BASELINE = Measurement(quality=0.9, quality_drop=0.0, bytes=1000, packed_bytes=900, latency_ratio=1.0)
LIMIT = Budget(quality_drop=0.01)


def trial(number: int, drop: float, unused: int | None = None, **more: Any) -> Trial:
    given = {} if unused is None else {"headroom": unused}
    seen = Measurement(
        quality_drop=drop,
        quality_drop_ci95=(drop - 0.004, drop + 0.004),
        bytes=250,
        packed_bytes=220 - 27 * (unused or 0),
        latency_ratio=0.3,
    )
    steps = [{"fold": {}}, {"quantize": {"samples": 64, **given}}, {"rounding": {"how": "gptq"}}]
    told = {"number": number, "state": "measured", "seconds": 40.0, "way": "gptq", "runtime": "mnn", **more}
    return Trial(**{"recipe": {"version": 1, "steps": steps}, "measurement": seen, **told})


def found(*trials: Trial, budget: Budget = LIMIT, seconds: float = 60.0, **more: Any) -> Opening | None:
    return narrowed(trials, budget, more.pop("prefer", "balanced"), BASELINE, seconds, **more)


def unused(opening: Opening | None) -> int | None:
    assert opening is not None and opening.recipe is not None
    assert (opening.runtime, opening.way) == ("mnn", "gptq")
    told = opening.recipe.to_dict()
    assert [name for step in told["steps"] for name in step] == ["fold", "quantize", "rounding"]
    assert told["steps"][1]["quantize"]["samples"] == 64
    return headroom(told)


def test_two_bits_first_then_one_at_a_time_up_to_four() -> None:
    trials = [trial(0, 0.001)]
    asked = []
    while (opening := found(*trials)) is not None:
        asked.append(unused(opening))
        trials.append(trial(len(trials), 0.002, asked[-1]))
    assert asked == [2, 3, 4]


def test_one_bit_where_two_are_too_many_and_no_more_where_it_ends() -> None:
    assert unused(found(trial(0, 0.001), trial(1, 0.02, 2))) == 1
    assert found(trial(0, 0.001), trial(1, 0.02, 2), trial(2, 0.02, 1)) is None
    assert found(trial(0, 0.001), trial(1, 0.002, 2), trial(2, 0.02, 3)) is None


def test_a_failed_one_is_not_tried_again() -> None:
    failed = trial(1, 0.0, 2, state="failed", measurement=None)
    assert unused(found(trial(0, 0.001), failed)) == 1


@pytest.mark.parametrize("drop", [0.0086, 0.0101])
def test_nothing_to_spare(drop: float) -> None:
    assert found(trial(0, drop)) is None


def test_the_upper_end_counts_where_it_is_asked_to() -> None:
    assert found(trial(0, 0.005)) is not None
    assert found(trial(0, 0.005), confident=True) is None


def test_it_is_the_best_that_is_stored_in_fewer_levels() -> None:
    slower = trial(0, 0.0, way="nearest")
    assert slower.measurement is not None
    worse = slower.model_copy(update={"measurement": slower.measurement.model_copy(update={"bytes": 300})})
    assert unused(found(worse, trial(1, 0.001))) == 2


def test_only_where_it_counts_fits_and_can_be() -> None:
    assert found(trial(0, 0.001), prefer="bytes") is None, "the bytes on the device stay as they are"
    assert found(trial(0, 0.001), budget=Budget(bytes=500)) is None, "no limit of the drop"
    assert found(trial(0, 0.001), seconds=30.0) is None, "no time"
    assert found(trial(0, 0.001, training_s=20.0), seconds=30.0) is not None, "the training is known"
    assert found() is None


@pytest.mark.parametrize(
    "steps",
    [
        [{"fold": {}}, {"cast": {}}],
        [{"quantize": {"weights": "int4", "activations": "none"}}],
        [{"quantize": {"layers": {"*": {"weights": "int4"}}}}],
        [{"quantize": {"headroom": {"choice": [0, 2]}}}],
        [{"quantize": None}, {"quantize": None}],
    ],
)
def test_recipes_without_eight_bit_weights_of_one_kind(steps: list[dict[str, Any]]) -> None:
    recipe = {"version": 1, "steps": steps}
    assert headroom(recipe) is None
    assert found(trial(0, 0.001, recipe=recipe)) is None
