"""How many examples would settle whether a drop keeps its limit."""

from __future__ import annotations

import math

import numpy as np
import pytest

from featherweight.drops import drop, examples_needed, paired_bootstrap
from featherweight.metrics import METRICS


@pytest.mark.parametrize("wrong", range(1, 100))
def test_a_drop_of_so_many_examples_is_the_fraction_that_a_user_writes(wrong: int) -> None:
    assert drop(METRICS["accuracy"], 1.0, 1 - wrong / 100) == wrong / 100
    assert drop(METRICS["accuracy"], 0.93, 0.93 - wrong / 1000) == wrong / 1000


def test_examples_needed() -> None:
    # (0.006 - 0.0025) / (0.005 - 0.0025) = 1.4, and 1.4 ** 2 * 2000 = 3920.
    assert examples_needed(0.0025, (-0.001, 0.006), 0.005, 2000) == 3920
    # The drop is above the limit, the interval's lower end below it: (0.004 - 0.006) / (0.005 - 0.006) = 2.
    assert examples_needed(0.006, (0.004, 0.008), 0.005, 1000) == 4000


@pytest.mark.parametrize(
    ("drop", "interval", "limit", "examples"),
    [
        (0.001, (0.0, 0.004), 0.005, 1000),  # settled: kept
        (0.001, (0.0, 0.005), 0.005, 1000),  # the end is the limit itself, which is kept
        (0.009, (0.006, 0.012), 0.005, 1000),  # settled: broken
        (0.005, (0.001, 0.009), 0.005, 1000),  # no number of examples would do
        (0.001, (0.0, math.inf), 0.005, 1000),
        (None, (0.0, 0.01), 0.005, 1000),
        (0.001, None, 0.005, 1000),
        (0.001, (0.0, 0.01), None, 1000),
        (0.001, (0.0, 0.01), 0.005, 0),
    ],
)
def test_nothing_is_needed_or_known(
    drop: float | None, interval: tuple[float, float] | None, limit: float | None, examples: int
) -> None:
    assert examples_needed(drop, interval, limit, examples) is None


def test_as_many_examples_as_are_needed_settle_it() -> None:
    """The same share of flips on so many examples: the interval's end is then at the limit."""
    metric = METRICS["accuracy"]

    def interval(count: int) -> tuple[float, tuple[float, float]]:
        before, after = np.ones((count, 1)), np.ones((count, 1))
        after[: round(0.02 * count)] = 0  # 2 % are lost
        before[count - round(0.01 * count) :] = 0  # and 1 % won
        seen = drop(metric, metric.reduce(before), metric.reduce(after))
        return seen, paired_bootstrap(metric, before, after, seed=0)

    seen, ends = interval(500)
    needed = examples_needed(seen, ends, 0.015, 500)
    assert needed is not None and needed > 500
    assert interval(round(0.7 * needed))[1][1] > 0.015
    assert interval(round(1.4 * needed))[1][1] <= 0.015


def test_what_no_example_showed_is_not_impossible() -> None:
    metric, ones = METRICS["accuracy"], np.ones((10_000, 1))
    assert paired_bootstrap(metric, ones[:30], ones[:30], seed=0) == pytest.approx(
        (-0.1157, 0.1157), abs=1e-4
    )
    low, high = paired_bootstrap(metric, ones, ones, seed=0)
    assert 0.0003 < high < 0.0004 and low == -high
    lost = ones.copy()
    lost[:200] = 0
    low, high = paired_bootstrap(metric, ones, lost, seed=0)
    assert 0.016 < low < 0.02 < high < 0.024, "where enough was seen, the resamples tell"


def test_a_true_upper_end_is_rarely_below_the_truth() -> None:
    """One flip in two hundred, and a hundred examples: most samples show none at all."""
    metric, random, covered = METRICS["agreement"], np.random.default_rng(0), 0
    for seed in range(300):
        after = (random.random((100, 1)) >= 0.005).astype(float)
        covered += paired_bootstrap(metric, np.ones((100, 1)), after, seed, 200)[1] >= 0.005
    assert covered / 300 >= 0.95
