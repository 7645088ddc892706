"""Progress that tests listen to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Heard:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        yield from items

    def note(self, message: str) -> None:
        self.notes.append(message)
