"""Which smaller network is trained for long: sizes and epochs follow from what short trainings lost."""

from __future__ import annotations

from typing import Any

import pytest

from featherweight.engine.pursuit import pursue
from featherweight.engine.search import Opening
from featherweight.outcome import Budget, Measurement, Prediction, Trial

BASELINE = Measurement(quality=0.9, quality_drop=0.0, bytes=1000, latency_ratio=1.0)
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


def test_a_small_miss_is_trained_longer() -> None:
    opening = found(INTEGERS, smaller(1, 0.5, 1.0, 0.006))
    assert opening is not None and opening.whole and opening.way == "pruned"
    prune, training = opening.values[0], opening.values[1]
    assert training["epochs"] == pytest.approx(0.85 * 800 / 80, abs=0.01)
    assert training["learning_rate"] == 0.03 and prune["scope"] == "global"
    lost = 0.006 * (0.5 / prune["macs"]) * (1.0 / training["epochs"]) ** 0.35
    assert lost == pytest.approx(0.8 * 0.005, rel=0.01)


def test_the_smaller_the_drop_the_smaller_the_network() -> None:
    shares = []
    for drop in (0.012, 0.008, 0.005, 0.002):
        opening = found(INTEGERS, smaller(1, 0.5, 1.0, drop))
        assert opening is not None
        shares.append(opening.values[0]["macs"])
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.5 > shares[-1] >= 0.3


def test_the_longest_training_of_a_way_tells_most() -> None:
    one, long = smaller(1, 0.5, 1.0, 0.006), smaller(2, 0.45, 8.0, 0.006, seconds=640.0)
    opening = found(INTEGERS, one, long)
    assert opening is not None
    assert opening.values[0]["macs"] > 0.45, "it missed the limit, so the next one is larger"


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
    point, end = found(smaller(1, 0.5, 1.0, 0.004)), found(smaller(1, 0.5, 1.0, 0.004), confident=True)
    assert point is not None and end is not None
    assert end.values[0]["macs"] > point.values[0]["macs"]


def test_what_does_not_depend_on_the_epochs_is_taken_off_first() -> None:
    looked = [Prediction(rung="recovered", quality_drop=0.01, seconds=10.0)]
    known = smaller(1, 0.5, 1.0, 0.006, training_s=40.0, predicted=looked)
    opening = found(INTEGERS, known)
    assert opening is not None
    assert opening.values[1]["epochs"] == pytest.approx((0.85 * 800 - 30) / 40, abs=0.01)
