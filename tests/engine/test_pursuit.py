"""Which smaller network is trained for long: sizes and epochs follow from what short trainings lost."""

from __future__ import annotations

import math
from typing import Any

import pytest

from featherweight.engine.pursuit import pursue
from featherweight.engine.search import Opening
from featherweight.outcome import Budget, Measurement, Prediction, Trial

BASELINE = Measurement(quality=0.9, quality_drop=0.0, bytes=1000, packed_bytes=1000, latency_ratio=1.0)
LIMIT = Budget(quality_drop=0.005)


def trial(
    number: int, steps: list[dict[str, Any]], drop: float, size: int, ratio: float, **more: Any
) -> Trial:
    seen = Measurement(
        quality_drop=drop, bytes=size, latency_ratio=ratio, quality_drop_ci95=(drop - 0.004, drop + 0.004)
    )
    told = {"number": number, "state": "measured", "seconds": 80.0, "way": "pruned", **more}
    return Trial(recipe={"version": 1, "steps": steps}, measurement=seen, **told)


def smaller(number: int, share: float, epochs: float, drop: float, **more: Any) -> Trial:
    steps: list[dict[str, Any]] = [
        {"prune": {"macs": share, "scope": "global"}},
        {"finetune": {"epochs": epochs, "learning_rate": 0.03}},
        {"fold": None},
        {"quantize": {"activations": "int8"}},
    ]
    return trial(number, steps, drop, **{"size": round(240 * share), "ratio": 0.3 * share, **more})


INTEGERS = trial(0, [{"fold": None}, {"quantize": None}], -0.0002, 300, 0.3, way="gptq", seconds=8.0)


def found(*trials: Trial, seconds: float = 800.0, budget: Budget = LIMIT, **more: Any) -> Opening | None:
    return pursue(trials, seconds, budget, more.pop("prefer", "balanced"), BASELINE, **more)


def steps(opening: Opening | None) -> list[tuple[str, dict[str, Any]]]:
    assert opening is not None and opening.recipe is not None
    told = opening.recipe.to_dict()["steps"]
    return [(name, values or {}) for step in told for name, values in step.items()]


def narrow(one: Trial, number: int, drop: float, unused: int) -> Trial:
    """The same network in fewer levels: nothing was trained for it."""
    assert one.measurement is not None
    stored = {"quantize": {"activations": "int8", "headroom": unused}}
    recipe = {"version": 1, "steps": [*one.recipe["steps"][:-1], stored]}
    size = round((one.measurement.packed_bytes or one.measurement.bytes or 0) * (1 - unused / 8))
    seen = one.measurement.model_copy(update={"quality_drop": drop, "packed_bytes": size})
    told = {"number": number, "recipe": recipe, "measurement": seen, "seconds": 9.0, "training_s": 0.0}
    return one.model_copy(update=told)


def test_what_was_stored_in_fewer_levels_goes_on_from_its_training() -> None:
    whole = smaller(1, 0.5, 1.0, 0.003, training_s=70.0)
    better, worse = narrow(whole, 2, 0.0032, 2), narrow(whole, 3, 0.03, 3)
    made = steps(found(INTEGERS, whole, better, worse))
    assert made[-1] == ("quantize", {"activations": "int8", "headroom": 2})
    assert made[3][1]["epochs"] == pytest.approx((0.92 * 800 - 10) / 70, abs=0.01)
    plain = steps(found(INTEGERS, whole))
    assert 1 < made[2][1]["macs"] / plain[2][1]["macs"] < 1.1, "what lost too much says nothing"


def test_what_may_be_smaller_is_pruned_on_as_it_was_trained() -> None:
    opening = found(INTEGERS, smaller(1, 0.5, 1.0, 0.006))
    made = steps(opening)
    assert opening is not None and opening.way == "pruned"
    assert [name for name, _ in made] == ["prune", "finetune", "prune", "finetune", "fold", "quantize"]
    assert made[0][1] == {"macs": 0.5, "scope": "global"} and made[1][1]["epochs"] == 1.0
    epochs, left = made[3][1]["epochs"], made[2][1]["macs"]
    assert epochs == pytest.approx(0.92 * 800 / 80, abs=0.01) and made[3][1]["learning_rate"] == 0.03
    assert 0.006 / left**2 * (1 / (1 + epochs)) ** 0.5 == pytest.approx(0.8 * 0.005, rel=0.03)


def test_what_was_made_too_small_begins_anew() -> None:
    made = steps(found(INTEGERS, smaller(1, 0.5, 1.0, 0.03)))
    assert [name for name, _ in made] == ["prune", "finetune", "fold", "quantize"]
    share, epochs = made[0][1]["macs"], made[1][1]["epochs"]
    assert share > 0.5
    assert 0.03 * (0.5 / share) ** 2 * (1 / epochs) ** 0.5 == pytest.approx(0.8 * 0.005, rel=0.03)


@pytest.mark.parametrize("of_limit", [0.79, 0.95])
def test_what_is_just_right_or_a_little_too_small_is_only_trained_on(of_limit: float) -> None:
    drop = of_limit * 0.005 * (1 + 9.2) ** 0.5
    made = steps(found(INTEGERS, smaller(1, 0.5, 1.0, drop)))
    assert [name for name, _ in made] == ["prune", "finetune", "finetune", "fold", "quantize"]


def test_all_that_made_it_smaller_counts() -> None:
    both: list[dict[str, Any]] = [
        {"shrink": {"macs": 0.75, "samples": 64}},
        {"prune": {"macs": 0.6, "samples": 64}},
        {"finetune": {"epochs": 1.0}},
        {"quantize": None},
    ]
    once = trial(1, both, 0.004, 120, 0.15)
    made = steps(found(INTEGERS, once))
    assert [name for name, _ in made] == ["shrink", "prune", "finetune", "prune", "finetune", "quantize"]
    assert made[3][1]["samples"] == 64
    lost = 0.004 / made[3][1]["macs"] ** 2 * (1 / (1 + made[4][1]["epochs"])) ** 0.5
    assert lost == pytest.approx(0.8 * 0.005, rel=0.03)
    shrunk = trial(1, [both[0], *both[2:]], 0.02, 200, 0.25)
    assert found(INTEGERS, shrunk) is None, "shrink takes few shares, so it cannot begin anew with another"


def test_the_smaller_the_drop_the_smaller_the_network() -> None:
    shares = []
    for drop in (0.03, 0.008, 0.005, 0.002):
        made = steps(found(INTEGERS, smaller(1, 0.5, 1.0, drop)))
        shares.append(math.prod(values["macs"] for name, values in made if name == "prune"))
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.5 > shares[-1] >= 0.15


def test_the_longest_training_of_a_way_tells_most() -> None:
    one, long = smaller(1, 0.5, 1.0, 0.006), smaller(2, 0.45, 8.0, 0.012, seconds=640.0)
    assert found(INTEGERS, one) is not None
    made = steps(found(INTEGERS, one, long, seconds=2000.0))
    assert made[0][1]["macs"] > 0.45, "it missed the limit, so the next one is larger"


def test_the_way_that_promises_most_is_taken() -> None:
    other = smaller(2, 0.5, 1.0, 0.006, way="shrunk and pruned", ratio=0.1)
    opening = found(INTEGERS, smaller(1, 0.5, 1.0, 0.006), other)
    assert opening is not None and opening.way == "shrunk and pruned"


def test_nothing_is_trained_long_for_nothing() -> None:
    short = smaller(1, 0.5, 1.0, 0.006)
    assert found(INTEGERS) is None
    assert found(INTEGERS, short, seconds=100.0) is None, "no longer than the short training"
    assert found(INTEGERS, smaller(1, 0.5, 1.0, 0.3)) is None, "so large a network is no better than integers"
    assert found(INTEGERS, short, budget=Budget(bytes=100)) is None, "no limit of the drop to aim at"
    assert found(INTEGERS, short, prefer="quality") is None
    assert found(INTEGERS, short.model_copy(update={"state": "rejected"})) is None


def test_with_confidence_the_upper_end_counts() -> None:
    def share(**more: Any) -> float:
        made = steps(found(smaller(1, 0.5, 1.0, 0.004), **more))
        return math.prod(values["macs"] for name, values in made if name == "prune")

    assert share(confident=True) > share()


def test_what_does_not_depend_on_the_epochs_is_taken_off_first() -> None:
    looked = [Prediction(rung="recovered", quality_drop=0.01, seconds=10.0)]
    made = steps(found(INTEGERS, smaller(1, 0.5, 1.0, 0.006, training_s=40.0, predicted=looked)))
    assert made[3][1]["epochs"] == pytest.approx((0.92 * 800 - 30) / 40, abs=0.01)


def test_what_is_trained_on_afterwards_may_be_smaller() -> None:
    one = smaller(1, 0.5, 1.0, 0.006)
    now, both = (steps(found(INTEGERS, one, later_s=later)) for later in (0.0, 800.0))
    assert now[3][1]["epochs"] == both[3][1]["epochs"]
    assert both[2][1]["macs"] < now[2][1]["macs"]


def test_trials_of_about_the_same_size_tell_most() -> None:
    """Two that lost nothing are far from one that lost more than it may: it says what half of it would."""
    near = smaller(1, 0.4, 1.0, 0.008)
    far = [smaller(number, 0.8, 1.0, 0.0, way=f"way {number}", ratio=0.3) for number in (2, 3)]
    alone, all_of_them = (steps(found(INTEGERS, near, *others)) for others in ((), far))
    shares = [
        math.prod(values["macs"] for name, values in made if name == "prune") for made in (alone, all_of_them)
    ]
    assert shares[1] == pytest.approx(shares[0], rel=0.15)
