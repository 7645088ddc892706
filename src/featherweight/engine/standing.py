"""How the trials of a search stand: what each half of the examples says of them, and direct timings.

One half of the scored examples selects, the other reports; an artifact that only the selecting half finds
within the limits is not taken. Artifacts of several runtimes are compared by timing the best of them in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featherweight.drops import examples_needed
from featherweight.engine.evaluate import Scales, Weighed
from featherweight.engine.lanes import Direct, Lane, time_together
from featherweight.engine.question import Question
from featherweight.engine.run import Run
from featherweight.engine.verdict import choose, excess, score, violations
from featherweight.outcome import Measurement, Trial, Violation
from featherweight.recipe import Recipe

FEWEST_TO_HALVE = 100  # below it, half of the examples says nothing
_FINALISTS = 3
_COMPARED = 4  # artifacts of different runtimes that are timed in turn before one is chosen


@dataclass(frozen=True)
class Finalist:
    """A trial that the selecting examples prefer, as the reporting examples see it."""

    trial: Trial
    seen: Measurement
    violated: tuple[Violation, ...]


class _Recalled(dict[int, tuple[Lane, Weighed]]):
    """Trials' artifacts by their numbers; those of a search that goes on are read when they are asked for.

    Args:
        recall: Reads one.
    """

    def __init__(self, recall: Callable[[int], tuple[Lane, Weighed]]) -> None:
        super().__init__()
        self._recall = recall

    def __missing__(self, number: int) -> tuple[Lane, Weighed]:
        self[number] = self._recall(number)
        return self[number]


def halves(run: Run, scales: Scales, trials: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """One half of the examples selects and the other reports, when several artifacts compete."""
    data = run.data
    rows = scales.twin_scored.rows[data.metric.name]
    splits = data.scored is not None and len(rows) == len(data.scored)  # a score may have its own rows
    if trials == 1 or len(rows) < FEWEST_TO_HALVE or not splits:
        return None, None
    return data.halves(run.seed)


class Standing:
    """What is known of a search's trials.

    Args:
        lanes: The original on each runtime, the first one first.
        question: What is asked.
        trials: Of the search, so far; those that are timed in turn take the ratios.
        selecting: Rows of the scored examples that select; None: all.
        reporting: Rows that report; None: all.

    Attributes:
        baseline: The original's figures on the selecting examples.
        weighed: Number of a trial -> its lane and its artifact.
        direct: Number of a trial -> its timing in turn with the first lane's original.
        unconfirmed: Numbers of trials that the reporting examples found above a limit.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        question: Question,
        trials: list[Trial],
        baseline: Measurement,
        selecting: np.ndarray | None,
        reporting: np.ndarray | None,
    ) -> None:
        self.lanes = {lane.name: lane for lane in lanes}
        self.first, self.question, self.trials = lanes[0], question, trials
        self.scales, self.run = self.first.scales, self.first.run
        self.baseline, self.selecting, self.reporting = baseline, selecting, reporting
        self.weighed = _Recalled(self._recall)
        self.direct: dict[int, Direct] = {}
        self.unconfirmed: set[int] = set()

    def _recall(self, number: int) -> tuple[Lane, Weighed]:
        """The artifact of a trial that was measured before this search went on: the store has it."""
        trial = next(one for one in self.trials if one.number == number)
        lane = self.lanes[trial.runtime] if trial.runtime else self.first
        return lane, lane.scales.weigh(lane.run.apply(Recipe.from_dict(trial.recipe)))

    def seen(self, number: int, indices: np.ndarray | None) -> Measurement:
        """What was seen of a trial's artifact on these scored examples."""
        lane, weighed = self.weighed[number]
        seen = lane.measurement(weighed, indices)
        return self.direct[number].applied(seen) if number in self.direct else seen

    def twin(self, number: int, indices: np.ndarray | None) -> Measurement:
        """The original that a trial's latency is told against, timed in the same rounds where it was."""
        lane, weighed = self.weighed[number]
        if lane is self.first and number not in self.direct:
            return self.scales.baseline(weighed, indices)
        twin = self.scales.baseline(None, indices)
        return (
            twin.model_copy(update={"latency_s": self.direct[number].twin}) if number in self.direct else twin
        )

    def best_of_lanes(self) -> list[int]:
        """The best trial of each runtime, the best ones first."""
        question = self.question
        found: list[tuple[float, tuple[float, ...], int]] = []
        for name in self.lanes:
            own = [trial for trial in self.trials if trial.runtime == name]
            trial = choose(own, self.baseline, question.budget, question.prefer, question.confident).trial
            if trial is not None and trial.measurement is not None:
                broken = violations(question.budget, trial.measurement, question.confident)
                order = score(trial.measurement, question.prefer, self.baseline)
                found.append((sum(map(excess, broken)), order, trial.number))
        return [number for _, _, number in sorted(found)]

    def compare(self, numbers: Sequence[int], twin_options: Mapping[str, Any] | None = None) -> None:
        """Time the best few of different runtimes in turn; their trials take these ratios."""
        picked = list(numbers[:_COMPARED])
        told = time_together(
            self.first, [self.weighed[number] for number in picked], self.scales.limits, twin_options
        )
        self.direct |= {number: one for number, one in zip(picked, told, strict=True) if one is not None}
        for index, trial in enumerate(self.trials):
            if trial.number in self.direct and trial.measurement is not None:
                seen = self.direct[trial.number].applied(trial.measurement)
                self.trials[index] = trial.model_copy(update={"measurement": seen})

    def tuned(self, chosen: Finalist) -> Finalist:
        """The choice with the options that are fastest for it, measured again where they are no defaults."""
        number = chosen.trial.number
        lane, weighed = self.weighed[number]
        tuned = lane.scales.tuned(weighed)
        if tuned is weighed:
            return chosen
        self.weighed[number] = lane, tuned
        if len(self.lanes) > 1:
            self.compare([number], self.scales.twin_options())
        return self.reported(chosen.trial)

    def finalist(self) -> Finalist:
        """The best by the selecting examples that the reporting ones confirm, among the best few.

        Where they confirm none, the one that breaks its limits least on the reporting examples.
        """
        question = self.question
        left = list(self.trials)
        finalists: list[Finalist] = []
        while len(finalists) < _FINALISTS:
            verdict = choose(left, self.baseline, question.budget, question.prefer, question.confident)
            if verdict.trial is None or (finalists and not verdict.met):
                break
            finalists.append(self.reported(verdict.trial))
            if not finalists[-1].violated:
                return finalists[-1]
            self.unconfirmed.add(verdict.trial.number)
            left = [trial for trial in left if trial.number != verdict.trial.number]
        return min(finalists, key=lambda one: sum(excess(item) for item in one.violated))

    def reported(self, trial: Trial) -> Finalist:
        """What the reporting examples say of a trial, and the original beside it."""
        question = self.question
        seen = self.seen(trial.number, self.reporting)
        alone = [trial.model_copy(update={"measurement": seen})]
        twin = self.twin(trial.number, self.reporting)
        verdict = choose(alone, twin, question.budget, question.prefer, question.confident)
        return Finalist(trial, seen, verdict.blocking)

    def as_both_halves_see(self) -> list[Trial]:
        """The trials, with the worse of what both halves say of their drops."""
        trials = []
        for trial in self.trials:
            seen = trial.measurement
            if trial.state == "measured" and seen is not None and self.reporting is not None:
                seen = max(seen, self.seen(trial.number, self.reporting), key=self._drop_that_counts)
            trials.append(trial.model_copy(update={"measurement": seen}))
        return trials

    def _drop_that_counts(self, seen: Measurement) -> float:
        ends = seen.quality_drop_ci95 if self.question.confident else None
        return (seen.quality_drop or 0.0) if ends is None else ends[1]

    def examples_needed(self, seen: Measurement) -> int | None:
        """Scored examples, both halves, that would settle whether the drop keeps its limit."""
        limit = self.question.budget.quality_drop
        return examples_needed(seen.quality_drop, seen.quality_drop_ci95, limit, self.scored)

    @property
    def scored(self) -> int:
        """How many examples are scored, both halves."""
        return len(self.scales.twin_scored.rows[self.run.data.metric.name])
