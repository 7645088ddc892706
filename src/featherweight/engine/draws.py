"""How a hole gets a value: from Optuna's proposal, or evenly among what was not tried yet."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featherweight.holes import Choice, Hole, Range, canonical

if TYPE_CHECKING:
    import optuna

Point = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Draw:
    """One hole of a candidate and the value that it got."""

    name: str
    hole: Hole
    value: Any

    @property
    def key(self) -> tuple[str, str]:
        return self.name, canonical(self.value)


class Tried:
    """Which points were tried, as a tree of draws: a branch is finished when all its values are.

    Holes are met on the way, so the tree is all that is known of the space; it tells exactly
    when a finite space is exhausted.
    """

    def __init__(self) -> None:
        self._sizes: dict[Point, int | None] = {}
        self._finished: dict[Point, set[str]] = {}
        self.exhausted = False

    def enter(self, point: Point, size: int | None) -> None:
        """The draws so far lead to a hole with so many values."""
        self._sizes[point] = size

    def values(self, point: Point) -> set[str]:
        """Values of the next hole that lead nowhere new."""
        return self._finished.get(point, set())

    def has(self, point: Point) -> bool:
        """Whether nothing new lies behind these draws, or behind the first of them."""
        return self.exhausted or any(
            value in self.values(point[:index]) for index, (_, value) in enumerate(point)
        )

    def finish(self, point: Point) -> None:
        """Nothing new lies behind these draws."""
        while point:
            point, (_, value) = point[:-1], point[-1]
            finished = self._finished.setdefault(point, set())
            finished.add(value)
            size = self._sizes[point]
            if size is None or len(finished) < size:
                return
        self.exhausted = True


def suggest(trial: optuna.Trial, name: str, hole: Hole) -> Any:
    """The sampler's value; steps and choices are counted, so that options may be any data."""
    if isinstance(hole, Choice):
        return hole.at(trial.suggest_categorical(name, range(hole.size)))
    if hole.log and hole.whole:
        return trial.suggest_int(name, int(hole.low), int(hole.high), log=True)
    if hole.size is not None:
        return hole.at(trial.suggest_int(name, 0, hole.size - 1))
    return _short(trial.suggest_float(name, hole.low, hole.high, log=hole.log), hole)


def parameter(draw: Draw) -> Any:
    """What Optuna knows a value by; the inverse of :func:`suggest`."""
    hole, value = draw.hole, draw.value
    if isinstance(hole, Choice):
        return [canonical(option) for option in hole.options].index(canonical(value))
    if hole.grain is None or (hole.log and hole.whole):
        return value
    return round((value - hole.low) / hole.grain)


def random_value(generator: random.Random, hole: Hole, finished: set[str]) -> Any:
    """An even draw among the values that lead to something new; among all where none does."""
    if isinstance(hole, Range) and hole.size is None:
        if hole.log:
            return _short(math.exp(generator.uniform(math.log(hole.low), math.log(hole.high))), hole)
        return _short(generator.uniform(hole.low, hole.high), hole)
    size = hole.size or 0
    if size <= 2 * len(finished):
        values = [hole.at(index) for index in range(size)]
        return generator.choice([value for value in values if canonical(value) not in finished] or values)
    while canonical(value := hole.at(generator.randrange(size))) in finished:
        pass
    return value


def _short(value: float, hole: Range) -> float:
    """Six digits: a recipe is read by people, and no result hangs on the seventh."""
    return min(max(float(f"{value:.6g}"), hole.low), hole.high)
