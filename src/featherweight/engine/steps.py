"""What each step of a recipe bought and cost: the networks between its steps, weighed like the artifact.

The figure after step k is that of the recipe's first k steps, lowered for the same runtime and scored on
the same examples, so the differences add up to the artifact's own figures. A trial that was this prefix tells
it for nothing; the others are weighed where the time allows it, with shorter timing and without memory, and
simulated where it does not. All of them are in the store, since the recipe ran through them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from featherweight.data import Data, Run
from featherweight.drops import drop_of_rows
from featherweight.engine.deadline import OutOfTime
from featherweight.engine.evaluate import Weighed
from featherweight.engine.lanes import Lane
from featherweight.engine.timing import Limits
from featherweight.errors import FeatherweightError
from featherweight.holes import canonical
from featherweight.model import Model
from featherweight.outcome import Measurement, StepRow
from featherweight.recipe import Recipe
from featherweight.tools.costs import stored_bytes
from featherweight.tools.layer_report import weight_bits
from featherweight.tools.simulate import as_run, simulate

Known = Mapping[str, Measurement]  # what was measured, by `prefix_key`

SHARE = 0.05  # of the time of a fit that may go to this
LEAST_SHARE = 0.01  # when nothing of that time is left
_SIMULATED = 256  # examples
_SECONDS, _LEAST_SECONDS, _THROUGHPUT_S, _PRECISION = 4.0, 0.3, 0.1, 0.03

NO_TIME = "no time was left to measure it"
INTERRUPTED = "the run was interrupted"


@dataclass(frozen=True)
class Clock:
    """The time that there is.

    Attributes:
        until: When it is up, by ``time.monotonic``.
        expected_s: What weighing one network will take, as far as one knows.
    """

    until: float
    expected_s: float

    @property
    def up(self) -> bool:
        """Whether nothing more may be begun."""
        return time.monotonic() >= self.until

    @property
    def allows(self) -> bool:
        """Whether there is time to weigh one more."""
        return time.monotonic() + self.expected_s <= self.until


def clock(deadline: float, time_limit: float, expected_s: float) -> Clock:
    """A twentieth of a fit's time, but not beyond its end; a hundredth when the end has come.

    Args:
        deadline: The end, by ``time.monotonic``.
        time_limit: Seconds that the fit has.
        expected_s: See :class:`Clock`.
    """
    now = time.monotonic()
    left = max(deadline - now, LEAST_SHARE * time_limit)
    return Clock(now + min(left, SHARE * time_limit), expected_s)


def prefix_key(steps: Sequence[Mapping[str, Any]]) -> str:
    """What two equal beginnings of recipes have in common."""
    return canonical([{name: dict(said or {}) for name, said in step.items()} for step in steps])


def step_rows(
    lane: Lane,
    chosen: Weighed,
    recipe: Recipe,
    seen: Measurement,
    *,
    known: Known,
    indices: np.ndarray | None,
    clock: Clock | None,
) -> list[StepRow]:
    """One row a step; with a student, one for it first.

    Args:
        lane: The runtime.
        chosen: What the whole recipe made, with the options of its session.
        recipe: Filled.
        seen: What was measured of it.
        known: What was measured of beginnings of the recipe, in the same way.
        indices: Scored examples that count; None for all.
        clock: None: nothing more is computed.
    """
    steps = recipe.to_dict()["steps"]
    scored = lane.scales.twin_scored.rows[lane.run.data.metric.name]
    examples = len(scored if indices is None else indices)
    rows: list[StepRow] = []
    prefixes = list(_prefixes(lane, recipe))
    whole = prefixes[-1][-1] if prefixes else None
    for number, name, said, made in prefixes:
        last = number == len(steps)
        measured = seen if last else known.get(prefix_key(steps[:number]))
        row = StepRow(name=name, parameters=said, state="unknown", reason=INTERRUPTED)
        if measured is not None:
            row = StepRow(
                name=name, parameters=said, state="measured", measurement=measured, examples=examples
            )
        elif clock is not None and whole is not None:
            started = time.monotonic()
            row = _row(row, lane, (made, whole), chosen, indices, examples, clock)
            if row.state == "measured":
                clock = replace(clock, expected_s=time.monotonic() - started)
        rows.append(row)
    return rows


def _prefixes(
    lane: Lane, recipe: Recipe
) -> Iterator[tuple[int, str, dict[str, Any], Callable[[float], Model]]]:
    """After each step: how many steps, the last one's name and parameters, and what makes the network."""
    run = lane.run
    steps, methods = recipe.to_dict()["steps"], recipe.methods()
    reached: list[Model] = [run.start]

    def after(number: int) -> Callable[[float], Model]:
        def made(until: float) -> Model:
            run.until = until
            try:
                while len(reached) <= number:
                    reached.append(run.step(reached[-1], methods[len(reached) - 1], len(reached)))
            finally:
                run.until = float("inf")
            return reached[number]

        return made

    if run.start is not run.original:
        yield 0, "student", {}, after(0)
    for number, step in enumerate(steps, 1):
        ((name, said),) = step.items()
        yield number, name, dict(said or {}), after(number)


def _row(
    row: StepRow,
    lane: Lane,
    made: tuple[Callable[[float], Model], Callable[[float], Model]],
    chosen: Weighed,
    indices: np.ndarray | None,
    examples: int,
    clock: Clock,
) -> StepRow:
    """Measured where there is time, else simulated, else not known; why, where it is not measured."""
    reason = NO_TIME
    prefix, whole = made
    try:
        model = prefix(clock.until)
        if clock.allows:
            try:
                weighed = lane.scales.beside(model, chosen, _shorter(lane.scales.limits))
                measured = lane.measurement(weighed, indices)
                done = {"state": "measured", "measurement": measured, "examples": examples, "reason": ""}
                return row.model_copy(update=done)
            except FeatherweightError as error:  # e.g. no runtime stores what only later steps make storable
                reason = error.what
        beside = chosen.artifact.bytes - _parameter_bytes(whole(clock.until))
        if not model.formats:
            beside = lane.scales.twin.bytes - _parameter_bytes(lane.run.original)
        guess, count = _simulated(lane, model, beside, indices, clock)
    except (FeatherweightError, OutOfTime) as error:
        reason = error.what if isinstance(error, FeatherweightError) else reason
        return row.model_copy(update={"reason": reason})
    return row.model_copy(
        update={"state": "simulated", "measurement": guess, "examples": count, "reason": reason}
    )


def _shorter(limits: Limits) -> Limits:
    return replace(
        limits,
        seconds=min(limits.seconds, _SECONDS),
        least_seconds=min(limits.least_seconds, _LEAST_SECONDS),
        throughput_s=min(limits.throughput_s, _THROUGHPUT_S),
        precision=max(limits.precision, _PRECISION),
    )


def _simulated(
    lane: Lane, model: Model, beside: int, indices: np.ndarray | None, clock: Clock
) -> tuple[Measurement, int]:
    """Static size and, on a few examples, the quality that the formats leave; and how many these are.

    Args:
        lane: The runtime.
        model: What was made so far.
        beside: Bytes that the files hold beside the parameters as they will be stored: as many as the
            artifact's where there are formats already, else as many as the original's.
        indices: Scored examples that count; None for all.
        clock: Ends it.
    """
    scales, run = lane.scales, lane.run
    figures: dict[str, Any] = {
        "bytes": max(_parameter_bytes(model) + beside, 0),
        "params": sum(tensor.numel() for tensor in model.parameters.values()),
        "weight_bits": weight_bits(model),
    }
    metric, data = run.data.metric, run.data
    if type(data).score is not Data.score or clock.up:  # a score of the user's own is of all examples
        return Measurement(**figures), 0
    before = scales.twin_scored.rows[metric.name]
    picked = np.arange(len(before)) if indices is None else indices
    if len(picked) > _SIMULATED:
        picked = np.sort(np.random.default_rng(run.seed).permutation(picked)[:_SIMULATED])
    original = _bounded(as_run(simulate(run.original)), clock)
    try:
        rows = data.score(_bounded(as_run(simulate(model)), clock), picked, original)[metric.name]
    except OutOfTime:
        return Measurement(**figures), 0
    quality = metric.reduce(rows)
    lost = drop_of_rows(metric, before[picked], rows)
    if not np.isfinite([quality, lost]).all():
        return Measurement(**figures), 0
    return Measurement(**figures, quality=float(quality), quality_drop=lost), len(picked)


def _parameter_bytes(model: Model) -> int:
    """Of the parameters as they will be stored; nothing is traced for it."""
    return sum(
        stored_bytes(tensor.numel(), model.formats.get(name, ())) for name, tensor in model.parameters.items()
    )


def _bounded(run: Run, clock: Clock) -> Run:
    def call(*inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        if clock.up:
            raise OutOfTime
        return run(*inputs)

    return call
