"""Interleaved timing and its confidence interval.

Imports the standard library and numpy only, since it runs in the measuring process. Two sessions are
timed in turn, in rounds of a block of calls each; which one comes first is drawn, so that nothing
periodic falls into one of them alone. What disturbs the machine for longer than a block (frequency, a
neighbour) disturbs both, so much of it leaves the ratio of a round alone. The interval of the median
is that of order statistics: of ``n`` values, the k-th smallest and k-th largest enclose the median
with probability ``1 - 2 P(Binomial(n, 1/2) < k)``, whatever the distribution of the noise (David and
Nagaraja, *Order Statistics*, 7.1). Rounds that follow each other share the machine's state, so they
are grouped in time first and the groups' medians are the values (batch means: Law, *Simulation
Modeling and Analysis*, 9.5.3): a ratio that moves with the machine's load gets the wide interval that
it deserves.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Call = Callable[[], object]
Said = Callable[[float], None]

_GROUPS = 20
_EXACT = 200  # rounds up to which the binomial is summed; beyond it, its normal approximation
_SAY_S = 0.25
_SETTLE_S = 0.02  # calls longer than this do not notice the other session's caches


@dataclass(frozen=True)
class Limits:
    """How long and how well to measure.

    Attributes:
        seconds: Time limit of the interleaved rounds.
        least_seconds: Rounds go on at least this long, so that one phase of the machine's clock is not all.
        rounds: Least number of rounds.
        precision: Stop when the interval's half-width is within this fraction of the median.
        resolved: A half-width above this fraction at the end is ``unresolved``.
        block_s: A block lasts at least this long.
        warmup_s: Each session is called this long, at least twice, before anything counts.
        batch: Examples per call of the throughput.
        throughput_s: How long the throughput (and the energy) is measured.
        memory_repeats: Processes whose median is the memory.
        timeout_s: A runner that says nothing for this long is killed.
    """

    seconds: float = 20.0
    least_seconds: float = 1.0
    rounds: int = 20
    precision: float = 0.02
    resolved: float = 0.05
    block_s: float = 0.005
    warmup_s: float = 0.2
    batch: int = 1
    throughput_s: float = 0.5
    memory_repeats: int = 3
    timeout_s: float = 300.0


@dataclass(frozen=True)
class Summary:
    """Seconds of one call, over the rounds."""

    median: float
    q1: float
    q3: float


def summarize(values: Sequence[float]) -> Summary:
    """Median and quartiles."""
    q1, median, q3 = np.quantile(np.asarray(values), [0.25, 0.5, 0.75])
    return Summary(float(median), float(q1), float(q3))


def grouped(values: Sequence[float]) -> list[float]:
    """Medians of consecutive values, in twenty groups; the values themselves below two a group."""
    if len(values) < 2 * _GROUPS:
        return list(values)
    return [float(np.median(group)) for group in np.array_split(np.asarray(values), _GROUPS)]


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median from order statistics; infinite below six values."""
    count = len(values)
    rank = _rank(count)
    if rank < 1:
        return (-math.inf, math.inf)
    ordered = np.sort(np.asarray(values))
    return float(ordered[rank - 1]), float(ordered[count - rank])


def _rank(count: int) -> int:
    """The largest k with ``2 P(Binomial(count, 1/2) < k) <= 0.05``."""
    if count > _EXACT:
        return math.floor((count + 1 - 1.96 * math.sqrt(count)) / 2)
    rank, below = 0, 1
    while 2 * below <= 0.05 * 2**count:
        rank += 1
        below += math.comb(count, rank)
    return rank


def half_width(values: Sequence[float]) -> float:
    """Half the 95 % interval of the median, as a fraction of the median."""
    low, high = median_interval(values)
    return (high - low) / 2 / float(np.median(values))


def warm_up(call: Call, limits: Limits, said: Said | None = None) -> float:
    """Call until warm; seconds of a call."""
    fastest, made = math.inf, 0
    start = time.perf_counter()
    while made < 2 or time.perf_counter() - start < limits.warmup_s:
        seconds = block(call, 1)
        fastest = min(fastest, seconds)
        made += 1
        if said is not None and seconds > _SAY_S:
            said(0.0)  # slow, not dead
    return fastest


def block(call: Call, calls: int) -> float:
    """Seconds of a call, over a block of them, less the time in which another process had the core.

    The kernel counts how long this thread was ready and did not run. What our own other threads did meanwhile
    stays in, so a runtime that starts more threads than it has cores gets nothing for it.
    """
    waited, others = _away()
    worked, start = time.thread_time(), time.perf_counter()
    for _ in range(calls):
        call()
    seconds, worked = time.perf_counter() - start, time.thread_time() - worked
    waited_now, others_now = _away()
    lost = max(0.0, (waited_now - waited) - (others_now - others))
    return max(seconds - lost, worked) / calls


def _away() -> tuple[float, float]:
    """Seconds, so far, that this thread was ready without a core, and that our other threads worked."""
    try:
        waited = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) * 1e-9
    except OSError:
        waited = 0.0  # not this kernel: nothing is taken off
    return waited, time.process_time() - time.thread_time()


def interleave(sessions: Sequence[Call], limits: Limits, said: Said) -> list[list[float]]:
    """Time one or two sessions in turn until the interval is narrow or the time is up.

    Args:
        sessions: The twin and the artifact, or one session alone. With two, the interval is that
            of the median ratio second/first, else that of the median latency.
        limits: When to stop.
        said: Told now and then which fraction of the work is done.

    Returns:
        Per session, seconds of a call in each round.
    """
    single = [warm_up(call, limits, said) for call in sessions]
    calls = [max(1, math.ceil(limits.block_s / seconds)) for seconds in single]
    seen: list[list[float]] = [[] for _ in sessions]
    order, draw = list(range(len(sessions))), random.Random(0)
    start = spoke = time.perf_counter()
    with _no_collection():
        while True:
            draw.shuffle(order)
            for index in order:
                if single[index] < _SETTLE_S:
                    sessions[index]()  # brings its weights back into the caches; not timed
                seen[index].append(block(sessions[index], calls[index]))
            now = time.perf_counter()
            if now - start >= limits.seconds:
                return seen
            ripe = len(seen[0]) >= limits.rounds and now - start >= limits.least_seconds
            # Looking after every round would stop at the first lucky streak.
            if ripe and len(seen[0]) % 5 == 0 and half_width(compared(seen)) <= limits.precision:
                return seen
            if now - spoke > _SAY_S:
                spoke = now
                # The width falls with the square root of the rounds.
                near = (
                    min(limits.precision / max(half_width(compared(seen)), 1e-9), 1.0) ** 2 if ripe else 0.0
                )
                said(max((now - start) / limits.seconds, near))


def compared(seen: list[list[float]]) -> list[float]:
    """What the interval is about, grouped: each round's ratio, or its latency where there is one session."""
    if len(seen) == 1:
        return grouped(seen[0])
    return grouped([second / first for first, second in zip(seen[0], seen[1], strict=True)])


def steady(call: Call, limits: Limits) -> float:
    """Median seconds of a call when it is called without a pause."""
    calls = max(1, math.ceil(limits.block_s / warm_up(call, limits)))
    seen: list[float] = []
    start = time.perf_counter()
    with _no_collection():
        while not seen or time.perf_counter() - start < limits.throughput_s:
            seen.append(block(call, calls))
    return float(np.median(seen))


def energy(call: Call, limits: Limits, root: Path = Path("/sys/class/powercap")) -> float | None:
    """Joules of a call by the processor's own counters (RAPL), everything else on the machine included.

    None where the counters are missing or only root may read them.
    """
    zones = sorted(root.glob("intel-rapl:?")) if root.is_dir() else []
    try:
        before = [int((zone / "energy_uj").read_text()) for zone in zones]
        spans = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
    except OSError:
        return None
    if not zones:
        return None
    made = 0
    start = time.perf_counter()
    while not made or time.perf_counter() - start < limits.throughput_s:
        call()
        made += 1
    after = [int((zone / "energy_uj").read_text()) for zone in zones]
    # The counter starts again at 0 behind its range.
    used = sum((b - a) % (span + 1) for a, b, span in zip(before, after, spans, strict=True))
    return used / 1e6 / made


class _no_collection:  # noqa: N801 - reads as the statement that it is
    """No garbage collection inside the block: it would fall into whichever session is being timed."""

    def __enter__(self) -> None:
        self._enabled = gc.isenabled()
        gc.collect()
        gc.disable()

    def __exit__(self, *error: object) -> None:
        if self._enabled:
            gc.enable()
