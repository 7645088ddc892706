"""Margins start wide, follow what was seen, and keep what they promise."""

from __future__ import annotations

import math
import random

import pytest

from featherweight.engine.margins import Margin, Margins, median


def test_nothing_seen_leaves_the_prediction_and_a_wide_margin() -> None:
    one, factor = Margin(0.01, factor=False), Margin(0.2, factor=True)
    assert one.corrected(0.05) == 0.05 and factor.corrected(0.5) == 0.5
    assert one.best(0.05) == pytest.approx(0.05 - 3.182 * math.sqrt(2) * 0.01, abs=1e-4)
    assert factor.best(0.5) == pytest.approx(0.5 * math.exp(-3.182 * math.sqrt(2) * 0.2), abs=1e-4)


def test_a_steady_error_is_learned() -> None:
    """Predictions are half of what is measured: the correction comes near to two, the margin narrows."""
    one = Margin(0.2, factor=True)
    widths = []
    for size in (100.0, 250.0, 70.0, 120.0, 300.0, 90.0, 60.0, 500.0):
        widths.append(one.corrected(1.0) / one.best(1.0))
        one.learn(size, 2 * size)
    assert 1.8 < one.corrected(1.0) < 2.0
    assert one.corrected(1.0) / one.best(1.0) < widths[0]
    assert one.missed[0] == 0.5 and one.missed[-1] < 0.1


def test_what_is_measured_is_seldom_better_than_the_best_that_was_allowed() -> None:
    generator = random.Random(0)
    beyond = count = 0
    for _ in range(300):
        one, bias = Margin(0.01, factor=False), generator.gauss(0, 0.01)
        for number in range(12):
            measured = 0.05 + bias + generator.gauss(0, 0.008)
            if number > 1:
                beyond, count = beyond + (measured < one.best(0.05)), count + 1
            one.learn(0.05, measured)
    assert beyond / count < 0.05


def test_what_has_no_logarithm_teaches_nothing() -> None:
    one = Margin(0.2, factor=True)
    one.learn(0.0, 1.0)
    one.learn(1.0, 0.0)
    assert one.errors == [] and one.missed == []
    drop = Margin(0.2, factor=False)
    drop.learn(0.0, -0.1)
    assert drop.errors == [-0.1]


def test_kinds_are_apart_and_told_together() -> None:
    known = Margins()
    one = known.of(("cost", "bytes", "integers"), 0.1, factor=True)
    other = known.of(("cost", "bytes", "float"), 0.1, factor=True)
    assert known.of(("cost", "bytes", "integers"), 0.3, factor=True) is one
    one.learn(1.0, 2.0)
    other.learn(1.0, 1.0)
    assert other.corrected(1.0) == 1.0 < one.corrected(1.0)
    assert sorted(known.missed(where=("cost", "bytes"))) == [0.0, 0.5]
    assert known.missed(where=("cost", "latency_ratio")) == [] and median([]) is None
