"""Times artifacts of several runtimes in turn: each in its own process, on the same cores, block by block.

``timing.interleave`` compares two sessions of one runtime in one process. Runtimes cannot share a process
(their thread pools and allocators meet), so here the engine hands out the blocks: it draws an order, asks
one process after the other for a block of calls, and compares rounds, as in-process timing does. While one
process works, the others wait on their pipes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from featherweight.engine import timing
from featherweight.engine.jobs import Runner
from featherweight.engine.timing import Limits
from featherweight.method import Progress
from featherweight.runtime import Artifact, Target


@dataclass(frozen=True)
class Entrant:
    """What is timed: an artifact, and how it runs."""

    artifact: Artifact
    target: Target


@dataclass(frozen=True)
class Ratio:
    """A median of ratios over rounds, and its 95 % interval; None below six rounds."""

    median: float
    ci95: tuple[float, float] | None

    @property
    def resolved(self) -> bool:
        """Whether the interval's half-width is within 5 % of the median."""
        return self.ci95 is not None and (self.ci95[1] - self.ci95[0]) / 2 <= 0.05 * self.median


@dataclass(frozen=True)
class Rounds:
    """Seconds of a call, by entrant and round."""

    seconds: tuple[tuple[float, ...], ...]

    def summary(self, index: int) -> timing.Summary:
        """Median and quartiles of one entrant."""
        return timing.summarize(self.seconds[index])

    def ratio(self, index: int, to: int = 0) -> Ratio:
        """How an entrant's latency compares with another one's, round by round."""
        pairs = zip(self.seconds[index], self.seconds[to], strict=True)
        grouped = timing.grouped([one / other for one, other in pairs])
        low, high = timing.median_interval(grouped)
        return Ratio(float(np.median(grouped)), (low, high) if np.isfinite(low) else None)


def measure_paced(
    entrants: Sequence[Entrant],
    inputs: Sequence[np.ndarray],
    *,
    limits: Limits | None = None,
    entry: str = "forward",
    progress: Progress,
    description: str = "Measuring latency",
) -> Rounds:
    """Time several artifacts in turn, whichever runtimes they are for.

    Args:
        entrants: What is timed; ratios are told against the first one.
        inputs: Arrays of one call.
        limits: When to stop, as for two sessions: each ratio to the first narrow enough, or time is up.
        entry: Which entry is called.
        progress: Shows a bar.
        description: Of the bar.

    Raises:
        RunnerError: A process crashed or hung.
        FeatherweightError: What a runner told.
    """
    limits = limits or Limits()
    with ExitStack() as stack:
        runners: list[Runner] = []
        cores: dict[str, list[int]] = {}
        for one in entrants:
            runner = Runner(
                "paced",
                {"artifact": one.artifact},
                one.target,
                inputs=inputs,
                limits=limits,
                entry=entry,
                cores=cores.get(f"{one.target.device} {one.target.threads}", ()),
            )
            runners.append(stack.enter_context(runner))
            cores.setdefault(f"{one.target.device} {one.target.threads}", _ready(runner))
        seen: list[list[float]] = [[] for _ in runners]
        for _ in progress.track(_percents(runners, seen, limits), description, total=100):
            pass
    return Rounds(tuple(tuple(one) for one in seen))


def _ready(runner: Runner) -> list[int]:
    """Wait until a process is warm; the cores that it took."""
    while (frame := runner.receive()) is not None:
        if frame[0].get("ready"):
            return [int(core) for core in frame[0]["cores"]]
    raise runner.failure()


def _percents(runners: Sequence[Runner], seen: list[list[float]], limits: Limits) -> Iterator[int]:
    """Fill ``seen`` round by round; one item per percent that is done."""
    order, draw = list(range(len(runners))), random.Random(0)
    start, shown = time.monotonic(), 0
    while True:
        draw.shuffle(order)
        for index in order:
            runners[index].send({"block": len(seen[index])}, ())
            frame = runners[index].receive()
            if frame is None:
                raise runners[index].failure()
            seen[index].append(float(frame[0]["seconds"]))
        passed = time.monotonic() - start
        if passed >= limits.seconds or _narrow(seen, limits, passed):
            break
        done = min(99, int(100 * passed / limits.seconds))
        yield from range(shown, done)
        shown = max(shown, done)
    yield from range(shown, 100)


def _narrow(seen: list[list[float]], limits: Limits, passed: float) -> bool:
    """Whether every ratio to the first (alone: its latency) is known well enough; looked at now and then."""
    rounds = len(seen[0])
    if rounds < limits.rounds or rounds % 5 or passed < limits.least_seconds:
        return False
    others = [[seen[0], one] for one in seen[1:]] or [seen]
    return all(timing.half_width(timing.compared(pair)) <= limits.precision for pair in others)
