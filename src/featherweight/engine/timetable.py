"""How the time of a search is divided, so that it ends in time with everything done.

    started ---- trials ---- until -- comparison of the best, options, report -- deadline -- end

What comes after the last trial has a part of the time reserved for it: as much as it takes at most, but no
more than a fifth of all. Whatever of it would not be done by the end is left out, and the result says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_SHARE = 0.2  # of the time, reserved at most
_REPORT = 0.05  # of the time, reserved for the report
_GRACE = 0.05  # of the time, that the end may come later: half of what a user is promised
_MEASURING = 15.0  # the time over that of one measurement of a latency, at least
_LEAST_S = 1.0


@dataclass
class Timetable:
    """When things must be done. All moments are those of the clock.

    Attributes:
        started: When the time began.
        time_limit: Seconds that there are.
        bounded: Whether the time binds what comes after the last trial; it does where recipes compete.
        comparing_s: Seconds that the comparison of the best takes at most.
        tuning_s: Seconds that finding the options takes at most.
        weighing_s: What scoring and timing the last artifact took.
        left_out: What was not done, since the time was up.
        clock: Seconds, never going back.
    """

    started: float
    time_limit: float
    bounded: bool = True
    comparing_s: float = 0.0
    tuning_s: float = 0.0
    weighing_s: float = 0.0
    left_out: list[str] = field(default_factory=list)
    clock: Callable[[], float] = time.monotonic

    @property
    def deadline(self) -> float:
        """When the time is up."""
        return self.started + self.time_limit

    @property
    def end(self) -> float:
        """By when everything must be done."""
        return self.deadline + _GRACE * self.time_limit if self.bounded else math.inf

    @property
    def reserve_s(self) -> float:
        """Seconds for what comes after the last trial."""
        if not self.bounded:
            return 0.0
        tuned = self.tuning_s + self.weighing_s if self.tuning_s else 0.0
        return min(self.comparing_s + tuned + _REPORT * self.time_limit, _SHARE * self.time_limit)

    @property
    def until(self) -> float:
        """By when the last trial must be measured."""
        return self.deadline - self.reserve_s

    def fits(self, seconds: float) -> bool:
        """Whether a trial whose steps take so long will be measured in time, as far as one knows."""
        return self.clock() + seconds + self.weighing_s <= self.until

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there is time for something after the last trial; if not, that is remembered."""
        if self.clock() + seconds <= self.end:
            return True
        self.left_out.append(what)
        return False

    def to_go(self, trials: int, done: int, spent_s: float) -> float:
        """Seconds until all is done, as far as one knows.

        Args:
            trials: How many there will be at most.
            done: How many there were.
            spent_s: What they took together.
        """
        left = max(self.deadline - self.clock(), 0.0)
        if not done:
            return left
        return min((trials - done) * spent_s / done + self.reserve_s, left)


def longest_measurement(seconds: float, time_limit: float) -> float:
    """How long one latency may be measured, so that a search comes to several trials.

    Args:
        seconds: As it was asked for.
        time_limit: Of the search.
    """
    return min(seconds, max(time_limit / _MEASURING, _LEAST_S))
