"""``--student auto``: which family and width a student shall have, by what it costs on the target.

Of each family and depth the widest network is taken that keeps the limits, as predicted and then as found
by lowering it untrained (``student_table.py``). Those with the largest capacity, parameters x layers, and
at most one of a paper, are trained briefly on the same examples. Each sees them as often as the others, for
a network that is cheap to train is ahead at first and not in the end; only one that the time is too short
for, even if it is chosen, sees them less often. The worse half leaves, the others learn longer (successive
halving: Jamieson and Talwalkar 2016, arXiv:1502.07943). The best one is the student; where the objective is
not quality alone, the best by the objective that is as good as it has to be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from featherweight import figures
from featherweight.drops import drop_of_rows
from featherweight.engine.effort import pace_of
from featherweight.engine.environment import describe_device
from featherweight.engine.question import Question
from featherweight.engine.run import Run
from featherweight.engine.sources import Given, load_beside, scoring_code
from featherweight.engine.store import digest
from featherweight.engine.student_table import Counted, Found, Ladder, Table
from featherweight.engine.students import lesson_of
from featherweight.errors import BudgetError
from featherweight.examples import Arrays, Examples
from featherweight.model import Model
from featherweight.outcome import Budget, StudentRow
from featherweight.recipe import Recipe, Step
from featherweight.tools.simulate import as_run, simulate
from featherweight.tools.training_examples import training_examples

SHARE = 0.2  # of the time, in which a student is chosen
_TABLE = 0.4  # of that share: after it, no further candidate is lowered for the table
_ENOUGH = 10.0  # epochs in which a student learns most of what it can
_SPARE = {
    "bytes": 0.999,
    "latency_s": 0.95,
    "memory_bytes": 0.95,
}  # of a limit; timing is noisy, a file is not
_SMALLER = (1.0, 0.5, 0.25)  # of the limits, where the objective asks for less than they allow
_LARGEST = 0.5  # of the original's bytes and multiply-accumulates, where there is no limit
_TRAINED, _ROUNDS = 6, 2  # candidates that are trained at most, and how often they are judged
_FEWEST = 2000  # examples that a candidate learns from at least
_PASSES = 3.0  # how often it sees them
_MOST_EPOCHS = 30.0  # of those examples
_JUDGING = 2000  # scored examples at most
_CLOSE = 0.01  # of quality, within which the objective decides where no limit of the drop does


@dataclass(frozen=True)
class StudentChoice:
    """What was chosen.

    Attributes:
        student: As if the user had named it.
        rows: What was considered, the chosen one first.
        said: Why, for the user.
    """

    student: Given
    rows: tuple[StudentRow, ...]
    said: str


@dataclass(frozen=True)
class _Contestant:
    """A candidate that was lowered and keeps the limits."""

    counted: Counted
    found: Found
    predicted: Found | None = None
    epochs: float = 0.0
    drop: float | None = None


def choose_student(run: Run, question: Question) -> StudentChoice:
    """The family and width for a budget.

    Args:
        run: The original, its data, the target and the store; without a student.
        question: The budget, the preference, and the time, of which ``SHARE`` is for this.

    Raises:
        BudgetError: Not even the smallest keeps the limits: which one, and what it costs.
        LoadError: The original takes no picture and no signal, or gives no row of numbers.
    """
    key = digest(
        "student auto",
        [run.original.key, run.teacher and run.teacher.key, run.data.fingerprint],
        [run.data.metric.name, scoring_code(run.data)],
        [question.budget.model_dump(), question.prefer, question.time_limit],
        [run.target.to_json(), run.runtime.version(), describe_device(run.target).model_dump(mode="json")],
        [run.seed, run.devices, run.precision, run.sources, torch.__version__],
    )
    known: dict[str, Any] | None = run.store.get_json("students", key)
    if known is None:
        made = _Choosing(run, question).choose()
        run.store.put_json(
            "students", key, {"said": made.said, "rows": [one.model_dump() for one in made.rows]}
        )
    else:
        rows = tuple(StudentRow(**row) for row in known["rows"])
        made = StudentChoice(Given(rows[0].student), rows, known["said"])
    run.progress.note(made.said)
    return made


class _Choosing:
    """One choice, from the table to the contest."""

    def __init__(self, run: Run, question: Question) -> None:
        self.run, self.budget, self.prefer = run, question.budget, question.prefer
        self.table = Table(run, memory=question.budget.memory_bytes is not None)
        self.until = time.monotonic() + SHARE * question.time_limit
        self.lowering_until = time.monotonic() + _TABLE * SHARE * question.time_limit
        self.lesson_s = (1 - SHARE) * question.time_limit
        self.rows: dict[str, StudentRow] = {}

    def choose(self) -> StudentChoice:
        run = self.run
        run.progress.note(f"student auto: looking at {len(self.table.ladders)} families and depths")
        contestants = self._contestants()
        for one in contestants:
            self._tell(one, "keeps the limits")
        trained = self._contest(contestants)
        best = self._best(trained)
        said = self._said(best, trained)
        self._tell(best, said, chosen=True)
        rows = sorted(
            self.rows.values(),
            key=lambda row: (not row.chosen, row.quality_drop is None, row.quality_drop or 0.0),
        )
        return StudentChoice(Given(best.counted.spec), tuple(rows), said)

    # ---- the table

    def _contestants(self) -> list[_Contestant]:
        """Those to train: the largest within the limits, and where less is wanted smaller ones too."""
        limits = self._limits()
        self._first()
        levels = (1.0,) if self.prefer == "quality" else _SMALLER
        found: dict[str, _Contestant] = {}
        for level in levels:
            count = _TRAINED // len(levels)
            for one in self._at(_times(limits, level), level * self._original_macs, count):
                found.setdefault(one.counted.spec, one)
        if not found:
            raise self._nothing_fits(limits)
        return list(found.values())

    def _limits(self) -> Budget:
        """Those that a candidate has to keep; half of the original's bytes where there is none."""
        asked = self.budget
        bytes_, latency = asked.bytes, asked.latency_s
        if bytes_ is None:
            twin = self.run.lower(self.run.original).bytes  # four bytes a weight
            bytes_ = round(_LARGEST * (twin if latency is not None else twin / 4))
        return Budget(bytes=bytes_, latency_s=latency, memory_bytes=asked.memory_bytes)

    def _first(self) -> None:
        """One is lowered, by which files of others are predicted: a narrowest one that the runtime takes."""
        for ladder in self.table.ladders:
            if self.table.lower(ladder[0]) is not None:
                return

    def _at(self, limits: Budget, macs: float, count: int) -> list[_Contestant]:
        """The candidates of largest capacity within limits, at most one of a paper."""

        def within(candidate: Counted) -> bool:
            guess = self.table.found.get(candidate.spec) or self.table.predicted(candidate)
            return candidate.macs <= macs and (guess is None or not _broken(guess, limits))

        widest = [(ladder, index) for ladder in self.table.ladders if (index := ladder.widest(within)) >= 0]
        widest.sort(key=lambda pair: -pair[0][pair[1]].capacity)
        found: dict[str, _Contestant] = {}
        for ladder, index in widest:
            candidate = ladder[index]
            self._consider(candidate, "another one has more capacity")
            if candidate.paper in found or len(found) == count:
                continue
            if len(found) > 1 and time.monotonic() > self.lowering_until:
                self.run.progress.note("student auto: no time to lower more candidates")
                break
            fitting = self._lowered(ladder, index, limits, within)
            if fitting is not None:
                found[candidate.paper] = fitting
        return list(found.values())

    def _lowered(
        self, ladder: Ladder, index: int, limits: Budget, within: Callable[[Counted], bool]
    ) -> _Contestant | None:
        """The widest of a ladder that keeps the limits lowered, near the one that is predicted to."""
        fitting, tried = None, index
        while 0 <= tried < len(ladder):
            candidate = ladder[tried]
            predicted = self.table.predicted(candidate)
            found = self.table.lower(candidate)
            if found is None:
                self._consider(candidate, self.table.failed[candidate.spec])
                return fitting
            broken = _broken(found, limits)
            if broken:
                self._consider(candidate, f"{broken[0]} above the limit", predicted)
                if fitting is not None:
                    return fitting
                tried -= 1
                continue
            fitting = _Contestant(candidate, found, predicted)
            self._consider(candidate, "keeps the limits", predicted)
            tried += 1
            if tried <= index or tried == len(ladder) or not within(ladder[tried]):
                return fitting  # a wider one was too large, or is predicted to be
        return fitting

    @cached_property
    def _original_macs(self) -> float:
        """A student that computes more than its original is none."""
        return float(self.run.lower(self.run.original).details["macs"])

    def _nothing_fits(self, limits: Budget) -> BudgetError:
        """Which is the smallest, and what it costs."""
        found: list[tuple[float, Counted, Found]] = []
        for ladder in self.table.ladders:
            predicted = self.table.predicted(ladder[0])
            if predicted is not None:
                found.append((_excess(predicted, limits), ladder[0], predicted))
        for _, candidate, _ in sorted(found, key=lambda one: one[0]):
            seen = self.table.lower(candidate)
            if seen is None:
                continue
            broken = ", ".join(_broken(seen, limits)) or "multiply-accumulates"
            return BudgetError(
                f"no student of featherweight.nets keeps the limits: the smallest, {candidate.spec}, takes "
                f"{_costs(seen)} on {self.run.target.runtime} ({broken} above the limit)",
                fix="a larger budget, another runtime, or a student of your own: --student path.py:callable",
            )
        reasons = next(iter(self.table.failed.values()), "there is none for such inputs")
        return BudgetError(f"no student of featherweight.nets could be lowered: {reasons}")

    # ---- the contest

    def _contest(self, contestants: Sequence[_Contestant]) -> list[_Contestant]:
        """Train them briefly, the better half twice as long; those that got furthest first by quality."""
        rounds = min(math.ceil(math.log2(len(contestants))), _ROUNDS)
        left, out = list(contestants), list[_Contestant]()
        for number in range(rounds):
            share = (self.until - time.monotonic()) / (rounds - number)
            judged = self._train(left, share)
            if judged is None:
                self.run.progress.note("student auto: no time to train candidates, so the largest is taken")
                break
            judged.sort(key=lambda one: math.inf if one.drop is None else one.drop)
            keep = math.ceil(len(judged) / 2) if self.prefer == "quality" else len(judged)
            left, out = judged[:keep], [*judged[keep:], *out]
            if self.prefer != "quality":
                break
        return [*left, *out]

    def _train(self, left: Sequence[_Contestant], seconds: float) -> list[_Contestant] | None:
        """All are trained in so many seconds; None: that is too short to tell anything."""
        run, runs = self.run, [self._run_of(one) for one in left]
        paces = [pace_of(one, lesson_of(one.start)) for one in runs]
        shares = _shares([self.lesson_s / (pace.training_s * pace.training) for pace in paces])
        once = sum(share * pace.training_s for share, pace in zip(shares, paces, strict=True))  # an example
        asked = len(left) * paces[0].teacher_s
        examples = min(int(seconds / max(_PASSES * once + asked, 1e-9)), paces[0].training)
        if examples < min(_FEWEST, paces[0].training):
            return None
        passes = min((seconds / examples - asked) / once, _MOST_EPOCHS)
        data = _part(run, examples)
        judged = []
        what = f"student auto: training {', '.join(one.counted.spec for one in left)}"
        each = list(zip(left, runs, paces, shares, strict=True))
        for one, own, pace, share in run.progress.track(each, what, len(left)):
            epochs = round(max(share * passes, 1.0), 2)
            lesson = {"teacher": pace.teacher, **lesson_of(own.start), "epochs": epochs}
            own.data = data
            trained = own.apply(Recipe((Step("finetune", lesson),)))
            judged.append(replace(one, epochs=epochs * examples / pace.training, drop=self._drop(trained)))
            self._tell(judged[-1], "trained briefly")
        return judged

    def _run_of(self, one: _Contestant) -> Run:
        run = self.run
        model = load_beside(Given(one.counted.spec), "student", run.original, seed=run.seed)
        return Run(
            run.original, run.data, run.target, run.store, seed=run.seed, student=model, teacher=run.teacher,
            devices=run.devices, precision=run.precision,
        )  # fmt: skip

    def _drop(self, trained: Model) -> float:
        """What a float network loses against the original on examples that select."""
        run = self.run
        data, metric = run.data, run.data.metric
        picks = data.halves(run.seed)[0][:_JUDGING]
        original = as_run(simulate(run.original))
        mine, theirs = (data.score(one, picks, original) for one in (as_run(simulate(trained)), original))
        return float(drop_of_rows(metric, theirs[metric.name], mine[metric.name]))

    def _best(self, trained: Sequence[_Contestant]) -> _Contestant:
        """The best of those trained longest, or by the objective, among those as good as they must be."""
        drops = [one.drop for one in trained if one.drop is not None]
        if not drops or self.prefer == "quality":
            return trained[0]
        least, limit = min(drops), self.budget.quality_drop
        allowed = least + _CLOSE if limit is None else max(least, limit)
        good = [one for one in trained if one.drop is not None and one.drop <= allowed]
        return min(good, key=self._objective)

    def _objective(self, one: _Contestant) -> tuple[float, float]:
        size, latency = float(one.found.bytes), one.found.latency_s or float(one.counted.macs)
        orders = {"balanced": (size * latency, size), "latency": (latency, size), "bytes": (size, latency)}
        return orders[self.prefer]

    # ---- what is told

    def _said(self, best: _Contestant, trained: Sequence[_Contestant]) -> str:
        others = [one for one in trained if one is not best and one.drop is not None]
        why = "the one with the most capacity within the limits"
        if best.drop is not None and others:
            beside = ", ".join(f"{one.counted.spec} {figures.percent(one.drop)}" for one in others[:3])
            why = f"a drop of {figures.percent(best.drop)} after a short training ({beside})"
        return f"student auto: {best.counted.spec}, {_costs(best.found)}: {why}"

    def _consider(self, candidate: Counted, reason: str, predicted: Found | None = None) -> None:
        seen = self.table.found.get(candidate.spec)
        guess = predicted or self.table.predicted(candidate)
        self._row(candidate, seen, guess, reason)

    def _tell(self, one: _Contestant, reason: str, *, chosen: bool = False) -> None:
        self._row(one.counted, one.found, one.predicted, reason, one.epochs, one.drop, chosen)

    def _row(
        self,
        candidate: Counted,
        seen: Found | None,
        guess: Found | None,
        reason: str,
        epochs: float = 0.0,
        drop: float | None = None,
        chosen: bool = False,
    ) -> None:
        self.rows[candidate.spec] = StudentRow(
            student=candidate.spec,
            params=candidate.params,
            macs=candidate.macs,
            predicted_bytes=None if guess is None else guess.bytes,
            bytes=None if seen is None else seen.bytes,
            predicted_latency_s=None if guess is None else guess.latency_s,
            latency_s=None if seen is None else seen.latency_s,
            epochs=epochs,
            quality_drop=drop,
            chosen=chosen,
            reason=reason,
        )


def _shares(epochs: Sequence[float]) -> list[float]:
    """How often each sees the examples, beside the one that sees them most often.

    Args:
        epochs: That each would learn for if it were chosen.
    """
    useful = [min(one, _ENOUGH) for one in epochs]
    return [one / max(useful) for one in useful]


def _times(limits: Budget, factor: float) -> Budget:
    size, latency, memory = limits.bytes, limits.latency_s, limits.memory_bytes
    return Budget(
        bytes=None if size is None else int(size * factor),
        latency_s=None if latency is None else latency * factor,
        memory_bytes=None if memory is None else int(memory * factor),
    )


_NAMES = {"bytes": "size", "latency_s": "latency", "memory_bytes": "memory"}


def _broken(found: Found, limits: Budget) -> list[str]:
    """Limits that a candidate does not keep, in words; what is not known keeps them."""
    broken = []
    for axis, name in _NAMES.items():
        value, limit = getattr(found, axis), getattr(limits, axis)
        if value is not None and limit is not None and value > _SPARE[axis] * limit:
            broken.append(name)
    return broken


def _excess(found: Found, limits: Budget) -> float:
    """By how much the worst limit is broken."""
    pairs = [(getattr(found, axis), getattr(limits, axis)) for axis in _NAMES]
    return max(
        (value / max(limit, 1e-9) for value, limit in pairs if None not in (value, limit)), default=0.0
    )


def _costs(found: Found) -> str:
    said = figures.size(found.bytes)
    return said if found.latency_s is None else f"{said} and {figures.seconds(found.latency_s)}"


def _part(run: Run, count: int) -> Any:
    """The data with so many of its training examples."""
    source = training_examples(run.data, taught=True).source
    picks = np.sort(np.random.default_rng(run.seed).permutation(len(source))[:count])
    targets = source.targets
    inputs = tuple(Arrays(array) for array in source.take(picks))
    return run.data.evolve(train=Examples(inputs, None if targets is None else targets[picks]))
