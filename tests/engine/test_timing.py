"""Intervals of medians against exact probabilities, and the order in which sessions are timed."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from featherweight.engine import timing
from featherweight.engine.timing import Limits

QUICK = Limits(seconds=0.3, least_seconds=0.0, warmup_s=0.0, rounds=6, block_s=0.0)


def silent(done: float) -> None:
    return None


@pytest.mark.parametrize("count", range(6))
def test_too_few_values_have_no_interval(count: int) -> None:
    assert timing.median_interval(list(range(count))) == (-math.inf, math.inf)


@pytest.mark.parametrize(("count", "rank"), [(6, 1), (8, 1), (9, 2), (15, 4), (20, 6), (100, 40)])
def test_ranks_of_the_tables(count: int, rank: int) -> None:
    """Ranks from the usual table of the sign test's interval at 95 %."""
    low, high = timing.median_interval(np.random.default_rng(0).permutation(count) + 1.0)
    assert (low, high) == (rank, count - rank + 1)


@pytest.mark.parametrize("count", [201, 1000, 2001])
def test_the_approximation_is_next_to_the_exact_rank(count: int) -> None:
    rank, below, term = 0, 0, 1
    while 40 * (below + term) <= 2**count:
        below, rank = below + term, rank + 1
        term = term * (count - rank + 1) // rank
    low, _ = timing.median_interval(np.arange(1.0, count + 1))
    assert abs(low - rank) <= 1


def test_the_interval_covers_the_median_of_skewed_noise() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        low, high = timing.median_interval(random.exponential(size=30))
        inside += low <= math.log(2) <= high
    assert 0.94 <= inside / 1000 <= 0.985  # discrete ranks: at least 95 %, less the draw's own noise


def test_a_machine_in_two_states_widens_the_interval() -> None:
    random = np.random.default_rng(0)
    ratios = np.concatenate([np.full(260, 0.54), np.full(240, 0.61)]) * random.normal(1, 0.05, 500)
    assert (
        timing.half_width(list(random.permutation(ratios))) < 0.02
    )  # as if rounds knew nothing of each other
    assert timing.half_width(timing.grouped(list(ratios))) > 0.05
    assert timing.half_width(timing.grouped(list(random.permutation(ratios)))) < 0.03


def test_few_rounds_are_not_grouped() -> None:
    assert timing.grouped([1.0] * 39) == [1.0] * 39
    assert timing.grouped([1.0] * 41) == [1.0] * 20


def test_half_width_is_a_fraction_of_the_median() -> None:
    assert timing.half_width([9.0, 9.0, 10.0, 10.0, 11.0, 11.0]) == pytest.approx(0.1)


def test_sessions_take_turns_and_collection_is_off() -> None:
    said: list[str] = []
    collects: set[bool] = set()

    def session(name: str) -> timing.Call:
        def call() -> None:
            said.append(name)
            collects.add(gc.isenabled())
            time.sleep(0.021)  # too long to need its caches warmed

        return call

    limits = Limits(seconds=60, least_seconds=0, warmup_s=0, rounds=10, block_s=0.0, precision=10.0)
    seen = timing.interleave([session("a"), session("b")], limits, silent)
    assert [len(one) for one in seen] == [10, 10]
    assert "".join(said[:4]) == "aabb"  # warm-up
    rounds = ["".join(said[i : i + 2]) for i in range(4, 24, 2)]
    assert set(rounds) == {"ab", "ba"}
    assert collects == {True, False}
    assert gc.isenabled()


def test_blocks_last_long_enough() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    timing.interleave([call], Limits(seconds=0.1, least_seconds=0, warmup_s=0.01, block_s=0.02), silent)
    assert calls > 10_000


def spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.fixture
def crowded() -> Iterator[None]:
    """This thread on one core with three busy processes."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        time.sleep(0.5)
        yield
    finally:
        os.sched_setaffinity(0, before)
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.usefixtures("crowded")
def test_time_that_others_had_the_core_does_not_count() -> None:
    start = time.perf_counter()
    seen = [timing.block(lambda: spin(0.01), 2) for _ in range(10)]
    assert (time.perf_counter() - start) / 20 > 0.02  # the core really was away
    assert float(np.median(seen)) == pytest.approx(0.01, rel=0.3)


@pytest.mark.usefixtures("crowded")
def test_time_that_our_own_threads_had_the_core_counts() -> None:
    def call() -> None:
        other = threading.Thread(target=spin, args=(0.01,))
        other.start()
        spin(0.01)
        other.join()

    assert timing.block(call, 5) > 0.015


def test_sleep_counts() -> None:
    assert timing.block(lambda: time.sleep(0.01), 3) == pytest.approx(0.01, rel=0.5)


def test_stops_at_the_time_limit_when_the_noise_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SAY_S", 0.0)  # after each round, however slow a busy machine makes it
    random = np.random.default_rng(0)
    told: list[float] = []
    start = time.perf_counter()
    limits = Limits(seconds=0.7, least_seconds=0.0, warmup_s=0.0, rounds=6, block_s=0.0)
    seen = timing.interleave([lambda: time.sleep(random.exponential(0.01))] * 2, limits, told.append)
    assert time.perf_counter() - start < 5
    assert timing.half_width(timing.compared(seen)) > 0.05
    assert told
    assert all(0 <= done <= 1.2 for done in told)


def test_steady_is_seconds_of_a_call() -> None:
    assert timing.steady(lambda: time.sleep(0.01), QUICK) == pytest.approx(0.01, rel=0.5)


class TestEnergy:
    def test_none_without_counters(self, tmp_path: Path) -> None:
        assert timing.energy(lambda: None, QUICK, tmp_path) is None
        assert timing.energy(lambda: None, QUICK, tmp_path / "missing") is None

    def test_joules_of_a_call_over_all_packages_and_a_wrap(self, tmp_path: Path) -> None:
        zones = [tmp_path / f"intel-rapl:{i}" for i in range(2)]
        for zone in zones:
            zone.mkdir()
            (zone / "max_energy_range_uj").write_text("9999999\n")
            (zone / "energy_uj").write_text("9000000\n")
        (tmp_path / "intel-rapl:0:0").mkdir()  # a part of a package, already in its sum

        def call() -> None:
            for zone in zones:
                used = int((zone / "energy_uj").read_text()) + 2_000_000
                (zone / "energy_uj").write_text(f"{used % 10_000_000}\n")

        once = Limits(throughput_s=0.0)
        assert timing.energy(call, once, tmp_path) == pytest.approx(4.0)
