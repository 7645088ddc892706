"""Ask and tell over a recipe's holes under a budget: Optuna proposes, measurements answer.

Ask for a candidate, run it, tell what was measured; stop at any moment, and ``best`` is the best so far.
The sampler (samplers.py) has two objectives, with limits as constraints. The first candidate is the default
of every hole, so that an answer stands early; what a sensitivity analysis proposes comes next, and no point
is proposed twice. A candidate that a cheap prediction ends is dropped: it is no measured trial, but the
sampler learns of it.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.trial import TrialState

from featherweight.engine.contenders import contenders
from featherweight.engine.draws import Draw, Point, Tried, parameter, random_value, suggest
from featherweight.engine.importances import importances
from featherweight.engine.samplers import SamplerName, chosen_sampler, make_sampler
from featherweight.engine.study import backend, database, forget, hold, hold_journal, release
from featherweight.engine.verdict import (
    Verdict,
    choose,
    excess,
    pareto_front,
    rejection,
    relaxation,
    score,
    violations,
)
from featherweight.errors import BudgetError, OutputError
from featherweight.holes import Choice, Hole, canonical
from featherweight.outcome import AXES, Budget, Importances, Measurement, Prediction, Preference, Trial
from featherweight.recipe import Recipe

__all__ = [
    "Candidate",
    "Failure",
    "Search",
    "Verdict",
    "choose",
    "pareto_front",
    "rejection",
    "relaxation",
    "score",
    "violations",
]

Ended = Literal["trials", "time", "exhausted"]
_PROPOSALS = 5  # the sampler may repeat itself so often before an untried point is drawn for it
_RUNTIME, _WAY = "runtime", "way"  # what Optuna calls the draws; those of holes begin with a step's number
_IDLE = 8  # candidates that may be dropped, or suit nothing, for each one that is measured
_WORST = 1e6  # Optuna wants finite figures; no relative excess that matters comes near


@dataclass(frozen=True)
class Failure:
    """A candidate that could not be measured.

    Attributes:
        reason: In one sentence.
        unfit: The recipe does not suit the model or the target, so nothing was made: it counts for no trial.
    """

    reason: str
    unfit: bool = False


@dataclass(frozen=True)
class Opening:
    """One of the first candidates: a runtime and a recipe, with the default of every hole but some.

    Attributes:
        runtime: Which one, where there are several.
        way: Which recipe, where there are several.
        values: Step -> address -> the value of a hole whose default is not taken.
        recipe: A filled one beside the search space, to be made as it is, without a cheaper look first.
    """

    runtime: str = ""
    way: str = ""
    values: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    recipe: Recipe | None = None


class Candidate:
    """A recipe whose holes are being filled.

    Attributes:
        number: Counts the trials from 0.
        recipe: As far as it is filled.
        runtime: Which one it is for, where the search has several.
        way: Which of the search's recipes it fills, where it has several.
    """

    def __init__(
        self,
        search: Search,
        number: int,
        recipe: Recipe,
        proposal: optuna.Trial | None,
        opening: Opening | None,
    ) -> None:
        self.number = number
        self.recipe = recipe
        self.runtime = self.way = ""
        self.draws: list[Draw] = []
        self.proposal = proposal
        self._search = search
        self.opening = opening

    @property
    def beside(self) -> bool:
        """Whether it is no point of the search space."""
        return self.opening is not None and self.opening.recipe is not None

    @property
    def point(self) -> Point:
        """What tells this candidate from others: its holes and their values, in order."""
        return tuple(draw.key for draw in self.draws)

    def place(self, runtimes: Sequence[str], ways: Mapping[str, Recipe], opening: Opening | None) -> None:
        """Draw the runtime and the recipe before any of its holes; the first candidates are given theirs."""
        if opening is not None and opening.recipe is not None:
            self.runtime, self.way, self.recipe = opening.runtime, opening.way, opening.recipe
            return
        if len(runtimes) > 1:
            self.runtime = self._placed(_RUNTIME, runtimes, None if opening is None else opening.runtime)
        if ways:
            self.way = self._placed(_WAY, tuple(ways), None if opening is None else opening.way)
            self.recipe = ways[self.way]

    def _placed(self, name: str, options: Sequence[str], given: str | None) -> str:
        hole = Choice(tuple(options))
        self._search.tried.enter(self.point, hole.size)
        value: str = self._value(name, hole) if given is None else given
        self.draws.append(Draw(name, hole, value))
        return value

    def fill(self, step: int, holes: Mapping[str, Hole]) -> dict[str, Any]:
        """Values for holes of one step (counted from 0), by address; the recipe takes them over.

        Holes are asked of the model that reaches the step, so call this when it is known.
        """
        values: dict[str, Any] = {}
        if self.beside:
            return values
        for address, hole in holes.items():
            # A hole may differ from one prefix to another; Optuna wants one distribution a name.
            text = f"{type(hole).__name__} {canonical(hole.to_data())}"
            name = f"{step}/{address}#{hashlib.sha256(text.encode()).hexdigest()[:8]}"
            self._search.tried.enter(self.point, hole.size)
            values[address] = self._value(name, hole, step, address)
            self.draws.append(Draw(name, hole, values[address]))
        self.recipe = self.recipe.filled({step: values})
        return values

    def _value(self, name: str, hole: Hole, step: int = -1, address: str = "") -> Any:
        if self.opening is not None:
            given = self.opening.values.get(step, {}).get(address, hole.first)
            return given if hole.admits(given) else hole.first
        if self.proposal is None:
            return random_value(self._search.random, hole, self._search.tried.values(self.point))
        return suggest(self.proposal, name, hole)


class Search:
    """Proposes filled recipes and learns from their measurements.

    A recipe with holes is filled by :meth:`ask`. One without is either a single candidate, or a
    template whose holes the caller asks of the methods on the way and hands to
    :meth:`Candidate.fill`; then :meth:`accept` tells whether the point is new.

    Args:
        recipe: The search space, or a template.
        budget: The limits; those on other axes than the quality drop are the sampler's constraints.
        baseline: The twin's measurement.
        prefer: What is made small among the artifacts within budget.
        confident: Hold the upper end of the drop's 95 % interval against its limit.
        seed: The same seed and answers give the same candidates.
        trials: Largest number of candidates.
        runtimes: Names among which each candidate takes one; the first candidates take one each, with the
            default of every hole. One or none: there is no such choice.
        ways: Recipes among which each candidate takes one, instead of ``recipe``; the first candidates take
            one after the other, on each runtime, with the default of every hole.
        deadline_s: Seconds from now after which no candidate is proposed.
        sampler: What proposes: tpe, nsga2, random, or auto, which follows the number of trials.
        storage: A journal, or the URL of a database, to go on from; without one the search is forgotten with
            the process.
        anew: What the database has of this search is forgotten first.
        clock: Seconds, never going back.

    Raises:
        BudgetError: Fewer than one trial is asked for.
        OutputError: Another process works on the journal, or it is damaged.
    """

    def __init__(
        self,
        recipe: Recipe,
        budget: Budget,
        *,
        baseline: Measurement,
        prefer: Preference = "balanced",
        confident: bool = False,
        seed: int = 0,
        trials: int = 20,
        runtimes: Sequence[str] = (),
        ways: Mapping[str, Recipe] | None = None,
        deadline_s: float | None = None,
        sampler: SamplerName = "auto",
        storage: Path | str | None = None,
        anew: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if trials < 1:
            raise BudgetError(f"{trials} trials are none", fix="write --trials 1 or more")
        self.recipe, self.budget, self.baseline = recipe, budget, baseline
        self.prefer, self.confident, self.limit = prefer, confident, trials
        self.runtimes = tuple(runtimes) if len(runtimes) > 1 else ()
        self.ways = dict(ways or {})
        self._clock = clock
        self._deadline = math.inf if deadline_s is None else clock() + deadline_s
        self.trials: list[Trial] = []
        self.tried = Tried()
        self._asked = self._idle = 0  # candidates, and those of them of which nothing was made
        self._numbers: set[int] = set()
        self._repeated = self.out_of_time = False
        self._lock = hold_journal(storage) if isinstance(storage, Path) else None
        self._in_database = isinstance(storage, str)
        self._study = self._open(storage, seed, anew)
        known = self._take_up()
        self.sampler = chosen_sampler(sampler, trials)
        openings = [Opening(one, way) for way in self.ways or ("",) for one in self.runtimes or ("",)]
        told = {(trial.runtime, trial.way) for trial in self.trials}
        self._openings = [one for one in openings if (one.runtime, one.way) not in told]
        if self.sampler == "random":
            self._openings = []
        # A search that goes on must not draw again what it drew before.
        self.random = random.Random(f"{seed}/{known}")
        self._study.sampler = make_sampler(
            self.sampler, self.random.randrange(2**32), trials, bool(self._excesses(baseline))
        )

    def close(self) -> None:
        """Let another process go on with the journal."""
        if self._lock is not None:
            self._lock.close()
        if self._in_database:
            self._in_database = False
            release(self._study)

    @property
    def ended(self) -> Ended | None:
        """Why no further candidate will come; None: one will."""
        if self.tried.exhausted and not self._openings:
            return "time" if self.out_of_time else "exhausted"
        if self.left <= 0 or self._idle >= _IDLE * self.limit:
            return "trials"
        return "time" if self._asked and self._clock() >= self._deadline else None

    @property
    def left(self) -> int:
        """How many candidates may still be measured."""
        return self.limit - (self._asked - self._idle)

    def end(self) -> None:
        """Propose nothing more: the time is up."""
        self._deadline = -math.inf

    def ask(self) -> Candidate | None:
        """The next candidate; None when the search has ended."""
        for proposal in range(_PROPOSALS + 1):
            if self.ended:
                return None
            last = proposal == _PROPOSALS
            candidate = self._candidate(explore=last or (self._repeated and not self.recipe.has_holes))
            if not self.recipe.has_holes:  # one recipe, or a template whose caller fills it
                if not self._is_known(candidate):
                    return candidate
                self._forget(candidate)
                continue
            for step, holes in self.recipe.holes().items():
                candidate.fill(step, holes)
            if self.accept(candidate):
                return candidate
        return None

    def accept(self, candidate: Candidate) -> bool:
        """Whether a candidate that the caller filled is new; one that is not is dropped, so ask again."""
        if self._is_known(candidate):
            self._forget(candidate)
            return False
        self._repeated = False
        self._finish(candidate)
        return True

    def _is_known(self, candidate: Candidate) -> bool:
        if candidate.beside:
            told = candidate.recipe.to_dict()
            return any((trial.runtime, trial.recipe) == (candidate.runtime, told) for trial in self.trials)
        return self.tried.has(candidate.point)

    def _finish(self, candidate: Candidate) -> None:
        if not candidate.beside:
            self.tried.finish(candidate.point)

    def open_with(self, openings: Sequence[Opening]) -> None:
        """Candidates to propose next, before the sampler has its say: what a prediction thinks best of."""
        if self.sampler != "random":
            self._openings = [*openings, *self._openings]

    def _forget(self, candidate: Candidate) -> None:
        self._repeated = True
        self._asked -= 1
        self._numbers.discard(candidate.number)
        if candidate.proposal is not None:
            self._study.tell(candidate.proposal, state=TrialState.FAIL)
        self._finish(candidate)

    def rule_out(self, candidate: Candidate, *, late: bool) -> None:
        """Drop a candidate before its holes are filled, and propose its way on its runtime no more.

        Args:
            candidate: From :meth:`ask`.
            late: Whether it is for want of time.
        """
        self.out_of_time |= late
        self._forget(candidate)

    def tell(
        self,
        candidate: Candidate,
        outcome: Measurement | Failure,
        *,
        rejected: str | None = None,
        seconds: float = 0.0,
        training_s: float = 0.0,
        sha256: str | None = None,
        predicted: Sequence[Prediction] = (),
    ) -> Trial:
        """What became of a candidate.

        Args:
            candidate: From :meth:`ask`.
            outcome: What was measured, or why nothing was.
            rejected: Why it is no answer all the same (see :func:`rejection`).
            seconds: How long it took.
            training_s: How much of it steps took that train.
            sha256: Of the artifact.
            predicted: What cheaper looks had said of it.
        """
        seen = None if isinstance(outcome, Failure) else outcome
        trial = Trial(
            number=candidate.number,
            runtime=candidate.runtime,
            way=candidate.way,
            recipe=candidate.recipe.to_dict(),
            state="failed" if seen is None else "rejected" if rejected else "measured",
            measurement=seen,
            within_budget=None if seen is None else not violations(self.budget, seen, self.confident),
            reason=outcome.reason if isinstance(outcome, Failure) else rejected or "",
            seconds=seconds,
            training_s=training_s,
            sha256=sha256,
            predicted=list(predicted),
        )
        unfit = isinstance(outcome, Failure) and outcome.unfit
        self._tell(candidate, trial, seen, idle=unfit)
        placed = bool(self.runtimes) + bool(self.ways)
        opening = candidate.opening
        if unfit and placed and opening is not None and not opening.values and not candidate.beside:
            self.tried.finish(candidate.point[:placed])  # not even the way's defaults suit this runtime
        return trial

    def drop(
        self,
        candidate: Candidate,
        reason: str,
        *,
        predicted: Sequence[Prediction] = (),
        expected: Measurement | None = None,
        seconds: float = 0.0,
    ) -> Trial:
        """A candidate goes no further: what was predicted of it is of no use.

        Args:
            candidate: From :meth:`ask`.
            reason: Why, as a sentence.
            predicted: By which looks.
            expected: Its most probable figures, from which the sampler learns; None: they are not known.
            seconds: How long it took.
        """
        trial = Trial(
            number=candidate.number,
            runtime=candidate.runtime,
            way=candidate.way,
            recipe=candidate.recipe.to_dict(),
            state="dropped",
            reason=reason,
            seconds=seconds,
            predicted=list(predicted),
        )
        self._tell(candidate, trial, expected, idle=True)
        return trial

    def leave_out(self, candidate: Candidate, reason: str) -> None:
        """Drop a candidate whose runtime is of no use, and propose nothing on that runtime again."""
        self.drop(candidate, reason)
        self.tried.finish(candidate.point[:1])
        self._openings = [one for one in self._openings if one.runtime != candidate.runtime]

    def _tell(self, candidate: Candidate, trial: Trial, seen: Measurement | None, *, idle: bool) -> None:
        self._idle += idle
        self.trials.append(trial)
        self._finish(candidate)
        self._record(candidate, trial, seen, idle)

    def best(self) -> Verdict:
        """The best of what was told so far."""
        return choose(self.trials, self.baseline, self.budget, self.prefer, self.confident)

    def pareto(self) -> list[Trial]:
        """Measured trials that no other one beats on quality drop, bytes and latency at once."""
        measured = [
            (trial, trial.measurement)
            for trial in self.trials
            if trial.state == "measured" and trial.measurement is not None
        ]
        return [measured[index][0] for index in pareto_front([seen for _, seen in measured])]

    def importances(self) -> Importances:
        """Which open parameters decided."""
        return importances(self._study)

    # ---- Optuna's side

    def _open(self, storage: Path | str | None, seed: int, anew: bool) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space: list[Any] = [
            self.recipe.to_dict(),
            self.budget.model_dump(),
            self.prefer,
            self.confident,
            seed,
        ]
        space += [list(self.runtimes)] if self.runtimes else []
        space += [[name, way.to_dict()] for name, way in self.ways.items()]
        name = hashlib.sha256(canonical(space).encode()).hexdigest()[:16]
        if isinstance(storage, str):
            rows = database(storage)
            if anew:
                forget(rows, name)
            study = optuna.create_study(
                storage=rows, study_name=name, load_if_exists=True, directions=["minimize", "minimize"]
            )
            hold(study)
            return study
        try:
            journal = None if storage is None else JournalStorage(backend(storage))
            return optuna.create_study(
                storage=journal,
                study_name=name,
                load_if_exists=True,
                directions=["minimize", "minimize"],
            )
        except (ValueError, KeyError, TypeError) as error:  # lines that are no JSON, or none of Optuna's
            self.close()
            raise OutputError(f"the search's journal '{storage}' is damaged", fix="delete it") from error

    def _take_up(self) -> int:
        """What a journal knows: told trials are told again, begun ones given up. Their number."""
        for frozen in self._study.trials:
            if frozen.state == TrialState.WAITING:
                self._study.tell(self._study.ask(), state=TrialState.FAIL)
            elif frozen.state == TrialState.RUNNING:
                self._study.tell(frozen.number, state=TrialState.FAIL)
            if "trial" in frozen.user_attrs:
                self.trials.append(Trial.model_validate_json(frozen.user_attrs["trial"]))
                self._idle += frozen.user_attrs.get("idle", False)
                if frozen.user_attrs.get("beside"):
                    continue
                point: Point = ()
                for name, size, value in frozen.user_attrs["draws"]:
                    self.tried.enter(point, size)
                    point = (*point, (name, value))
                self.tried.finish(point)
        self.trials.sort(key=lambda trial: trial.number)
        self._asked = len(self.trials)
        self._numbers = {trial.number for trial in self.trials}
        return len(self._study.trials)

    def _next_opening(self) -> Opening | None:
        """The next of the first candidates: way after way, on the runtimes that may win, the best first."""
        while self._openings:
            first = self._openings[0]
            able = contenders(
                self.trials,
                self.runtimes,
                baseline=self.baseline,
                budget=self.budget,
                prefer=self.prefer,
                confident=self.confident,
            )
            if first.recipe or not able:
                return self._openings.pop(0)
            same = [one for one in self._openings if one.way == first.way and not one.recipe]
            known = [one for one in same if one.runtime in able]
            if known:
                best = min(known, key=lambda one: able.index(one.runtime))
                self._openings.remove(best)
                return best
            self._openings = [one for one in self._openings if one not in same]
        return None

    def _candidate(self, explore: bool) -> Candidate:
        opening = self._next_opening()
        by_chance = opening is not None or explore or self.sampler == "random"
        proposal = None if by_chance else self._study.ask()
        # Several may be on their way, and one of them be forgotten before the others are told.
        number = next(one for one in count() if one not in self._numbers)
        candidate = Candidate(self, number, self.recipe, proposal, opening)
        self._numbers.add(number)
        self._asked += 1
        candidate.place(self.runtimes, self.ways, opening)
        return candidate

    def _record(self, candidate: Candidate, trial: Trial, seen: Measurement | None, idle: bool) -> None:
        proposal = candidate.proposal
        if proposal is None:  # a point of our own choice: Optuna learns of it now
            self._study.enqueue_trial({draw.name: parameter(draw) for draw in candidate.draws})
            proposal = self._study.ask()
            for draw in candidate.draws:
                suggest(proposal, draw.name, draw.hole)
        proposal.set_user_attr("beside", candidate.beside)
        proposal.set_user_attr("idle", idle)
        draws = [(draw.name, draw.hole.size, canonical(draw.value)) for draw in candidate.draws]
        proposal.set_user_attr("draws", draws)
        proposal.set_user_attr("trial", trial.model_dump_json())
        objectives = None if seen is None or candidate.beside else self._objectives(seen)
        if seen is None or objectives is None:
            self._study.tell(proposal, state=TrialState.FAIL)
            return
        proposal.set_user_attr("excess", self._excesses(seen))
        self._study.tell(proposal, objectives)

    def _objectives(self, measurement: Measurement) -> tuple[float, float] | None:
        """What is preferred against the quality drop (or, where that is preferred, bytes x latency)."""
        order = score(measurement, self.prefer, self.baseline)
        both = order[0], order[-1]
        return both if all(math.isfinite(value) for value in both) else None

    def _excesses(self, measurement: Measurement) -> list[float]:
        """Relative excess over every limit that is no objective; 0 where it is kept.

        The quality drop is always an objective, and guides the sampler sooner so than as a constraint.
        """
        broken = {item.axis: excess(item) for item in violations(self.budget, measurement, self.confident)}
        limited = [axis for axis in AXES if axis != "quality_drop" and getattr(self.budget, axis) is not None]
        return [min(broken.get(axis, 0.0), _WORST) for axis in limited]
