"""Times artifacts of several runtimes in turn: each in its own process, on the same cores, block by block.

``timing.interleave`` compares two sessions of one runtime in one process. Runtimes cannot share a process
(their thread pools and allocators meet), so here the engine hands out the blocks: it draws an order, asks
one process after the other for a block of calls, and compares rounds, as in-process timing does. While one
process works, the others wait on their pipes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from featherweight.engine import timing
from featherweight.engine.devices import ConnectionLost, retried
from featherweight.engine.jobs import Runner
from featherweight.engine.timing import Limits
from featherweight.errors import FeatherweightError
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
    """Seconds of a call, by entrant and round.

    Attributes:
        seconds: None at all for an entrant that failed.
        failed: Index of an entrant -> why it could not be timed.
    """

    seconds: tuple[tuple[float, ...], ...]
    failed: Mapping[int, FeatherweightError] = field(default_factory=dict)

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
        FeatherweightError: The first entrant could not be timed; others that fail are told in ``failed``.
    """
    limits = limits or Limits()

    def measured() -> Rounds:
        with ExitStack() as stack:
            group = _Group(limits)
            for index, one in enumerate(entrants):
                group.enter(stack, index, one, inputs, entry)
            for _ in progress.track(group.percents(), description, total=100):
                pass
        return Rounds(tuple(tuple(group.seen[index]) for index in range(len(entrants))), group.failed)

    return retried(measured, entrants[0].target.device)


class _Group:
    """The processes at work, and what was seen of each."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.runners: dict[int, Runner] = {}
        self.seen: dict[int, list[float]] = {}
        self.failed: dict[int, FeatherweightError] = {}
        self._cores: dict[tuple[str, int], list[int]] = {}

    def enter(
        self, stack: ExitStack, index: int, one: Entrant, inputs: Sequence[np.ndarray], entry: str
    ) -> None:
        """Start one process and wait until it is warm, on the cores that the others took."""
        place = (one.target.device, one.target.threads)
        artifacts, cores = {"artifact": one.artifact}, self._cores.get(place, ())
        self.seen[index] = []
        runner = Runner(
            "paced", artifacts, one.target, inputs=inputs, limits=self.limits, entry=entry, cores=cores
        )
        try:
            stack.enter_context(runner)
            taken = _ready(runner)
        except FeatherweightError as error:
            self._drop(index, error)
            return
        self.runners[index] = runner
        self._cores.setdefault(place, taken)

    def _drop(self, index: int, error: FeatherweightError) -> None:
        if index == 0 or isinstance(error, ConnectionLost):
            raise error
        self.failed[index] = error
        self.seen[index] = []
        self.runners.pop(index, None)

    def percents(self) -> Iterator[int]:
        """Go round after round; one item per percent that is done."""
        draw = random.Random(0)
        start, shown = time.monotonic(), 0
        while True:
            order = list(self.runners)
            draw.shuffle(order)
            for index in order:
                try:
                    self.seen[index].append(_block(self.runners[index]))
                except FeatherweightError as error:
                    self._drop(index, error)
            passed = time.monotonic() - start
            if passed >= self.limits.seconds or self._narrow(passed):
                break
            done = min(99, int(100 * passed / self.limits.seconds))
            yield from range(shown, done)
            shown = max(shown, done)
        yield from range(shown, 100)

    def _narrow(self, passed: float) -> bool:
        """Whether every ratio to the first (alone: its latency) is known well enough; asked now and then."""
        first = self.seen[0]
        if len(first) < self.limits.rounds or len(first) % 5 or passed < self.limits.least_seconds:
            return False
        others = [[first, self.seen[index]] for index in self.runners if index] or [[first]]
        return all(timing.half_width(timing.compared(pair)) <= self.limits.precision for pair in others)


def _ready(runner: Runner) -> list[int]:
    """Wait until a process is warm; the cores that it took."""
    while (frame := runner.receive()) is not None:
        if frame[0].get("ready"):
            return [int(core) for core in frame[0]["cores"]]
    raise runner.failure()


def _block(runner: Runner) -> float:
    """Seconds of a call, over the next block."""
    runner.send({"block": True}, ())
    frame = runner.receive()
    if frame is None:
        raise runner.failure()
    return float(frame[0]["seconds"])
