"""A time limit that ends long steps: progress is where they come by, so there they are stopped."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from featherweight.method import Progress

T = TypeVar("T")


class OutOfTime(Exception):
    """The time limit came while a step was running."""


class Bounded:
    """Progress that ends the work which reports to it when the time is up.

    Args:
        progress: Where it is shown.
        until: When the time is up, by ``time.monotonic``.
    """

    def __init__(self, progress: Progress, until: float) -> None:
        self._progress = progress
        self._until = until

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield the items while a bar grows.

        Raises:
            OutOfTime: The time is up.
        """
        for item in self._progress.track(items, description, total):
            if time.monotonic() >= self._until:
                raise OutOfTime
            yield item

    def note(self, message: str) -> None:
        """One line for the user."""
        self._progress.note(message)
