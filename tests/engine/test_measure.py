"""Ratios, intervals and memory of sessions whose cost is known. Absolute times are never asserted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import pytest

from featherweight.engine.measure import (
    Limits,
    measure_latency,
    measure_memory,
)
from featherweight.errors import RunnerError
from featherweight.runtime import Artifact, Target

Make = Callable[..., Artifact]
T = TypeVar("T")
X = np.ones((1, 4), np.float32)
MIB = 2**20
QUICK = Limits(seconds=2, least_seconds=0.0, warmup_s=0.02, throughput_s=0.1, memory_repeats=1)


class Bars:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        self.seen[description] = 0
        for item in items:
            self.seen[description] += 1
            yield item

    def note(self, message: str) -> None:
        return None


class TestLatency:
    def test_twice_the_work_takes_twice_as_long(self, make: Make, target: Target) -> None:
        bars = Bars()
        timing = measure_latency(
            make("a", seconds=0.002), make("t", seconds=0.001), target, [X], limits=QUICK, progress=bars
        )
        assert timing.ratio == pytest.approx(2.0, rel=0.25)
        assert timing.ratio_ci95 is not None
        low, high = timing.ratio_ci95
        assert low <= timing.ratio <= high
        assert timing.resolved == ((high - low) / 2 / timing.ratio <= 0.05)
        assert timing.twin is not None
        for latency in (timing.twin, timing.artifact):
            assert latency.q1 <= latency.median <= latency.q3
        assert timing.rounds >= QUICK.rounds
        assert len(timing.cores) == 1
        assert bars.seen == {"Measuring latency": 100}

    def test_an_artifact_that_is_its_twin(self, make: Make, target: Target) -> None:
        artifact = make("a", seconds=0.001)
        timing = measure_latency(artifact, artifact, target, [X], limits=QUICK)
        assert timing.ratio == pytest.approx(1.0, rel=0.25)

    def test_alone(self, make: Make, target: Target) -> None:
        timing = measure_latency(make("a", seconds=0.001), None, target, [X], limits=QUICK)
        assert timing.twin is timing.ratio is timing.ratio_ci95 is timing.twin_throughput is None
        assert timing.throughput == pytest.approx(1 / timing.artifact.median)

    def test_noise_is_unresolved(self, make: Make, target: Target) -> None:
        limits = Limits(seconds=0.5, least_seconds=0, warmup_s=0.02, block_s=0.0)
        timing = measure_latency(
            make("a", seconds=0.003, noisy=True), make("t", seconds=0.003), target, [X], limits=limits
        )
        assert not timing.resolved

    def test_too_few_rounds_have_no_interval(self, make: Make, target: Target) -> None:
        limits = Limits(seconds=0.0, warmup_s=0.0)
        timing = measure_latency(make("a"), make("t"), target, [X], limits=limits)
        assert timing.rounds == 1
        assert timing.ratio_ci95 is None
        assert not timing.resolved

    def test_throughput_at_a_batch(self, make: Make, target: Target) -> None:
        limits = Limits(seconds=0.5, warmup_s=0.02, throughput_s=0.1, batch=8)
        timing = measure_latency(
            make("a", seconds=0.001), make("t", seconds=0.001, batch=1), target, [X], limits=limits
        )
        assert timing.throughput is not None
        assert timing.throughput * timing.artifact.median == pytest.approx(8, rel=0.5)
        assert timing.twin_throughput is None
        assert timing.notes == ("batch 8: the batch is fixed",)

    def test_a_crash_is_an_error(self, make: Make, target: Target) -> None:
        with pytest.raises(RunnerError, match="SIGABRT"):
            measure_latency(make("a", call="abort", after=3), make("t"), target, [X], limits=QUICK)


class TestMemory:
    def test_sees_what_a_session_holds(self, make: Make, target: Target) -> None:
        light = measure_memory(make("t"), target, [X], limits=QUICK)
        heavy = measure_memory(make("a", allocate=64 * MIB), target, [X], limits=QUICK)
        assert heavy.above_runtime - light.above_runtime == pytest.approx(64 * MIB, rel=0.1)
        assert heavy.peak > heavy.above_runtime
        assert light.above_runtime < 16 * MIB

    def test_what_this_process_holds_does_not_count(self, make: Make, target: Target) -> None:
        held = np.ones(128 * MIB // 8)
        assert measure_memory(make("t"), target, [X], limits=QUICK).peak < 96 * MIB
        assert held[-1] == 1

    def test_repeats(self, make: Make, target: Target) -> None:
        bars = Bars()
        measure_memory(make("t"), target, [X], limits=Limits(memory_repeats=2), progress=bars)
        assert bars.seen == {"Measuring memory": 2}
