"""Ask for a recipe, run it, weigh what comes out, tell the search; anytime, the best so far is known."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featherweight import figures
from featherweight.drops import examples_needed
from featherweight.engine.contenders import outpaced
from featherweight.engine.deadline import OutOfTime
from featherweight.engine.drafts import Ask, Draft, climb, draft
from featherweight.engine.dropped import dropped
from featherweight.engine.effort import Plan, Took
from featherweight.engine.evaluate import Weighed
from featherweight.engine.hands import Hands
from featherweight.engine.ladder import Climb, Ladder
from featherweight.engine.lanes import Direct, Lane, time_together
from featherweight.engine.parity import LEAST_DB
from featherweight.engine.pursuit import FROM, ROUNDS, pursue
from featherweight.engine.samplers import SamplerName
from featherweight.engine.search import Candidate, Failure, Opening, Search
from featherweight.engine.steps import clock, prefix_key, step_rows
from featherweight.engine.template import step_holes
from featherweight.engine.timetable import Timetable
from featherweight.engine.verdict import (
    alternatives,
    choose,
    excess,
    rejection,
    relaxation,
    score,
    violations,
)
from featherweight.engine.warm import openings, starts
from featherweight.engine.workers import Crew
from featherweight.errors import FeatherweightError, LoadError, RecipeError, RunnerError, TargetError
from featherweight.model import Model
from featherweight.outcome import (
    Budget,
    Chosen,
    Effort,
    LayerRow,
    Measurement,
    Prediction,
    Preference,
    Result,
    RuntimeRow,
    StepRow,
    Trial,
    Violation,
)
from featherweight.recipe import Hole, Recipe, Step

_FINALISTS = 3
_COMPARED = 4  # artifacts of different runtimes that are timed in turn before one is chosen
_PRICES_FROM, _WIDTHS_FROM = 120.0, 900.0  # seconds of a search in which profiling layers may pay
_FEWEST_TO_HALVE = 100  # below it, half of the examples says nothing


@dataclass(frozen=True)
class Question:
    """What is asked of a fit.

    Attributes:
        budget: The limits.
        prefer: What is best within them.
        confident: Hold the upper end of the drop's interval against its limit.
        recipe: Steps to run; what they leave open is searched.
        open_ended: The recipe is a template, whose holes are asked of the models that reach its steps.
        trials: Artifacts to measure at most; each runtime gets one at least.
        time_limit: Seconds that there are: no trial starts that would be ready later, but one always does.
        plan: What a template tries in this time, instead of ``recipe``.
        started: When the time began, by ``time.monotonic``; None: when the search does.
        tune: Measure the chosen artifact with the runtime's options that are fastest for it.
        journal: Where the search writes what it tried, and from where it goes on: a file, or the URL of a
            database; None: nowhere.
        anew: What a database has of this search is forgotten first.
        ladder: Look at candidates from cheap rungs first, and measure only those that may be of use.
        sampler: What proposes candidates.
    """

    budget: Budget
    prefer: Preference
    confident: bool
    recipe: Recipe
    open_ended: bool
    trials: int
    time_limit: float
    plan: Plan | None = None
    started: float | None = None
    tune: bool = True
    journal: Path | str | None = None
    anew: bool = False
    ladder: bool = False
    sampler: SamplerName = "auto"

    @property
    def searches(self) -> bool:
        """Whether several artifacts may compete; the one of a filled recipe is reported, never rejected."""
        return self.open_ended or self.recipe.has_holes


@dataclass(frozen=True)
class Fitted:
    """The answer.

    Attributes:
        result: What is handed back.
        lane: Whose runtime it is for.
        weighed: The artifact, and what was seen of it.
        finished: The search came to its own end, so asking again would answer the same.
    """

    result: Result
    lane: Lane
    weighed: Weighed
    finished: bool


@dataclass(frozen=True)
class _Finalist:
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


class Fit:
    """One search. Everything that it computes is in the store, so a second one resumes.

    Args:
        lanes: The original on each runtime; the first one is what latencies are told against.
        question: What is asked.
        left_out: Runtimes that could not take the original, and why.
        crew: Workers that make and weigh several candidates at a time; None: this process does it.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        question: Question,
        left_out: Mapping[str, FeatherweightError] | None = None,
        crew: Crew | None = None,
    ) -> None:
        self.lanes = {lane.name: lane for lane in lanes}
        self.handicaps = {lane.name: lane.handicap.median for lane in lanes}
        self.first = lanes[0]
        self.run, self.scales = self.first.run, self.first.scales
        self.question = question
        self.left_out = left_out or {}
        self.crew = crew
        self.weighed = _Recalled(self._recall)
        self.direct: dict[int, Direct] = {}
        self.unconfirmed: set[int] = set()  # trials that the reporting examples found above a limit
        self.trials = max(question.trials, len(lanes))
        self.started = time.monotonic() if question.started is None else question.started
        self.time = Timetable(
            self.started,
            question.time_limit,
            bounded=question.searches,
            comparing_s=self.scales.limits.seconds if len(lanes) > 1 else 0.0,
            tuning_s=max(lane.scales.tuning_s for lane in lanes) if question.tune else 0.0,
        )
        self.longest: Took | None = None  # of all trials whose steps were done here
        self.selecting, self.reporting = self._halves()
        self.baseline = self.scales.baseline(None, self.selecting)
        self.search = Search(
            question.recipe,
            question.budget,
            baseline=self.baseline,
            prefer=question.prefer,
            confident=question.confident,
            seed=self.run.seed,
            trials=self.trials,
            runtimes=list(self.lanes),
            ways=None if question.plan is None else question.plan.ways,
            deadline_s=self.time.until - time.monotonic(),
            storage=question.journal,
            anew=question.anew,
            sampler=question.sampler,
        )
        self.ladder = self._ladder() if question.ladder and question.searches else None
        self.climbs: dict[int, Climb] = {}
        self.pursued = 0  # rounds of longer training
        self.begun: set[tuple[str, str, int]] = set()  # runtimes, ways and steps whose analysis was heard
        self.resumed = len(self.search.trials)
        if self.resumed:
            self.run.progress.note(f"the search goes on after {self.resumed} trials")

    def _halves(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """One half of the examples selects and the other reports, when several artifacts compete."""
        data = self.run.data
        rows = self.scales.twin_scored.rows[data.metric.name]
        splits = data.scored is not None and len(rows) == len(data.scored)  # a score may have its own rows
        if self.trials == 1 or len(rows) < _FEWEST_TO_HALVE or not splits:
            return None, None
        return data.halves(self.run.seed)

    def _ladder(self) -> Ladder:
        question = self.question
        return Ladder(
            list(self.lanes.values()),
            self.baseline,
            self.selecting,
            question.budget,
            question.prefer,
            confident=question.confident,
            example_s=None if question.plan is None else question.plan.example_s,
            prices=question.time_limit >= _PRICES_FROM and self.crew is None,
            widths=question.time_limit >= _WIDTHS_FROM,
        )

    def answer(self) -> Fitted:
        """Search until the end, the time limit or Ctrl-C, and choose.

        Raises:
            FeatherweightError: Not one artifact could be measured: why the last one could not.
            KeyboardInterrupt: It came before the first artifact was measured.
        """
        interrupted = False
        try:
            failure = self._search()
        except KeyboardInterrupt:
            if not self._measured:
                raise
            interrupted = True
            self.run.progress.note("interrupted: the best so far is handed back")
        finally:
            self.search.close()
        if not self._measured:
            raise failure or self._nothing()
        try:
            return self._choose(interrupted)
        except KeyboardInterrupt:
            if interrupted:  # once more: now nothing is wanted
                raise
            self.run.progress.note("interrupted: the best so far is handed back")
            return self._choose(interrupted=True)

    def _nothing(self) -> FeatherweightError:
        """Why there is no artifact, where no trial of this search says it."""
        if not self.search.trials:
            return RecipeError("the search space holds no recipe", fix="leave a parameter open")
        said = self.search.trials[-1].reason
        return RecipeError(f"not one of {len(self.search.trials)} trials could be measured: {said}")

    def _recall(self, number: int) -> tuple[Lane, Weighed]:
        """The artifact of a trial that was measured before this search went on: the store has it."""
        trial = next(one for one in self.search.trials if one.number == number)
        lane = self.lanes[trial.runtime] if trial.runtime else self.first
        return lane, lane.scales.weigh(lane.run.apply(Recipe.from_dict(trial.recipe)))

    @property
    def _measured(self) -> bool:
        return any(trial.measurement is not None for trial in self.search.trials)

    def _open(self) -> None:
        """What a sensitivity analysis proposes for a recipe with holes comes first."""
        if self.question.open_ended or not self.question.recipe.has_holes or self.resumed:
            return
        for lane in self.lanes.values():
            runtime = lane.name if len(self.lanes) > 1 else ""
            self.search.open_with(openings(lane.run, self.question.recipe, runtime))

    def _search(self) -> FeatherweightError | None:
        """Try candidates until there is none, several at a time by workers; an error that stopped one."""
        self._open()
        if self.crew is None:
            return self._try_all()
        failures: list[FeatherweightError | None] = []
        hands = Hands(
            self.crew,
            until=lambda: self.time.until if self._measured else math.inf,
            cpus=self.run.devices,
            measures_here=self.run.target.device == "local",
        )
        try:
            for lane in self.lanes.values():
                lane.run.hands = hands
            self.crew.together(lambda: failures.append(self._try_all()))
        finally:
            for lane in self.lanes.values():
                lane.run.hands = None
        return next(filter(None, failures), None)

    def _try_all(self) -> FeatherweightError | None:
        """Try candidates until there is none; the error that stopped the last one that failed."""
        last = None
        while (candidate := self._next()) is not None:
            too_slow = outpaced(candidate.runtime, self.search.trials, self.handicaps, self.question.prefer)
            if too_slow is not None:
                self.run.progress.note(f"runtime {candidate.runtime} is not tried: {too_slow}")
                self.search.leave_out(candidate, too_slow)
            elif self._unpriced(candidate):
                self.search.rule_out(candidate, late=False)
            elif self._fits(candidate):
                subject = f"trial {candidate.number}"
                with nullcontext() if self.crew is None else self.crew.about(subject):
                    last = self._try(candidate) or last
            else:
                self.search.rule_out(candidate, late=True)
        return last

    def _unpriced(self, candidate: Candidate) -> bool:
        """Whether a way plans seconds of layers on a runtime that tells none."""
        if self.question.plan is None:
            return False
        steps = self.question.plan.ways[candidate.way].steps
        planned = any(one.method == "mixed_precision" and "latency" in one.parameters for one in steps)
        lane = self.lanes[candidate.runtime] if candidate.runtime else self.first
        return planned and not lane.run.costs.known

    def _next(self) -> Candidate | None:
        """The next candidate; when a part of the time is over, one that is worth training for long."""
        question, now, rounds = self.question, time.monotonic(), ROUNDS[self.pursued :]
        due = now >= self.started + FROM * question.time_limit or self.search.left <= len(rounds)
        if question.plan is not None and rounds and due:
            self.pursued += 1
            opening = pursue(
                self.search.trials,
                rounds[0] * (self.time.until - now) - self.time.weighing_s,
                question.budget,
                question.prefer,
                self.baseline,
                confident=question.confident,
            )
            if opening is not None:
                self.search.open_with([opening])
        return self.search.ask()

    def _fits(self, candidate: Candidate) -> bool:
        """Whether a candidate will be ready in time, as far as one knows; the first answer always is."""
        if not self._measured or candidate.beside:
            return True
        if self.question.plan is not None:
            return self.time.fits(self.question.plan.seconds(candidate.way, self.longest))
        own = self.search.trials[self.resumed :]
        longest = max((one.seconds for one in own if one.measurement is not None), default=0.0)
        if time.monotonic() + longest <= self.time.until:
            return True
        self.search.end()  # all of them take about as long
        return False

    def _try(self, candidate: Candidate) -> FeatherweightError | None:
        """Run and weigh one candidate; the error that stopped it, if one did."""
        started = time.monotonic()
        lane = self.lanes[candidate.runtime] if candidate.runtime else self.first
        lane.run.training_s = 0.0
        try:
            made = self._draft(candidate, lane)
            if made is None or self._dropped(candidate, lane, made, started):
                return None
            if made.left_out:
                lane.run.training_s = 0.0  # the short one was a look
            model = lane.run.apply(candidate.recipe) if made.left_out else made.model
            ready = time.monotonic()
            self._learn(candidate, ready - started)
            weighed = lane.scales.weigh(model)
            seen = lane.measurement(weighed, self.selecting)
        except (LoadError, RecipeError, RunnerError, TargetError) as error:  # of this recipe, not of all
            if self.question.searches or len(self.lanes) > 1:
                self.run.progress.note(f"trial {candidate.number} failed: {error.what}")
            self.search.tell(
                candidate,
                Failure(_without_paths(error.what), unfit=isinstance(error, RecipeError)),
                seconds=time.monotonic() - started,
            )
            return error
        except OutOfTime:
            said = "the time limit came while it was made"
            self.run.progress.note(f"trial {candidate.number} failed: {said}")
            self.search.out_of_time = True
            self.search.tell(candidate, Failure(said), seconds=time.monotonic() - started)
            return None
        finally:
            lane.run.until = math.inf  # what is left to do with what there is does not end with the time
        self.time.weighing_s = time.monotonic() - ready
        self.weighed[candidate.number] = lane, weighed
        self.search.tell(
            candidate,
            seen,
            rejected=self._rejected(seen),
            seconds=time.monotonic() - started,
            training_s=lane.run.training_s,
            sha256=weighed.artifact.sha256,
            predicted=self._predicted(candidate),
        )
        self._compare_predictions(candidate, lane, model, seen)
        return None

    def _dropped(self, candidate: Candidate, lane: Lane, made: Draft, started: float) -> bool:
        """Whether a cheap rung says that a candidate is of no use; the first one is measured in any case."""
        if self.ladder is None or not self._measured or candidate.beside:
            return False
        up, reason = climb(self.ladder, lane.run, candidate.recipe, made, self.search.trials)
        self.climbs[candidate.number] = up
        if reason is None:
            return False
        self.run.progress.note(f"trial {candidate.number} dropped: {reason}")
        self.search.drop(
            candidate,
            reason,
            predicted=up.seen,
            expected=self.ladder.expected(up),
            seconds=time.monotonic() - started,
        )
        return True

    def _compare_predictions(self, candidate: Candidate, lane: Lane, model: Model, seen: Measurement) -> None:
        """The ladder learns from what was measured; of the first one it says now what it would have said."""
        if self.ladder is None:
            return
        if candidate.number not in self.climbs and self.search.ended is None:
            up, _ = climb(self.ladder, lane.run, candidate.recipe, Draft(model), [])
            self.climbs[candidate.number] = up
        if candidate.number in self.climbs:
            self.ladder.learn(self.climbs[candidate.number], seen)

    def _predicted(self, candidate: Candidate) -> list[Prediction]:
        return self.climbs[candidate.number].seen if candidate.number in self.climbs else []

    def _learn(self, candidate: Candidate, taken_s: float) -> None:
        """How steps compare with their prediction; what the store had already tells nothing."""
        plan = self.question.plan
        if plan is not None and (self.longest is None or taken_s > self.longest.seconds):
            self.longest = Took(taken_s, max(plan.predicted_s[candidate.way], 1e-9))

    def _rejected(self, seen: Measurement) -> str | None:
        """Why this is no answer, whatever its figures; a filled recipe is reported, never rejected."""
        question = self.question
        if not question.searches:
            return None
        return rejection(seen, self.baseline, question.budget, question.prefer)

    def _draft(self, candidate: Candidate, lane: Lane) -> Draft | None:
        """The candidate's model, without what takes long where the ladder is asked first; None: tried before.

        A template's holes are asked of the model that reaches the step, since layers change on the way.
        """
        # There is one answer always.
        lane.run.until = self.time.until - self.time.weighing_s if self._measured else math.inf
        whole = self.ladder is None or not self._measured or candidate.beside
        if not self.question.open_ended and whole:
            self._announce(candidate)
            return Draft(lane.run.apply(candidate.recipe))
        return draft(lane.run, candidate, self._holes(lane), self._accepted, whole=whole)

    def _holes(self, lane: Lane) -> Ask:
        def ask(candidate: Candidate, index: int, step: Step, model: Model) -> Mapping[str, Hole]:
            if not self.question.open_ended:
                return {}
            holes = step_holes(step, model, lane.run.context(model))
            self._begin_well(candidate, lane, index, starts(lane.run, step, model, holes))
            return holes

        return ask

    def _begin_well(
        self, candidate: Candidate, lane: Lane, index: int, values: Sequence[Mapping[str, Any]]
    ) -> None:
        """The first candidate of a way takes what an analysis thinks best; others come right behind it."""
        place = candidate.runtime, candidate.way, index
        if candidate.opening is None or place in self.begun or not values:
            return
        self.begun.add(place)
        mine, *others = [Opening(*place[:2], values={index: dict(one)}) for one in values]
        candidate.opening = mine
        self.search.open_with(others)

    def _accepted(self, candidate: Candidate) -> bool:
        """Whether a candidate is new; those of a recipe with holes are by the time they are proposed."""
        if self.question.open_ended and not self.search.accept(candidate):
            return False
        self._announce(candidate)
        return True

    def _announce(self, candidate: Candidate) -> None:
        steps = " -> ".join(_told(step) for step in candidate.recipe.to_dict()["steps"])
        where = f" on {candidate.runtime}" if candidate.runtime else ""
        way = f" ({candidate.way})" if candidate.way else ""
        done = self.search.trials[self.resumed :]
        most = self.trials - self.resumed
        to_go = self.time.to_go(max(most, len(done)), len(done), sum(one.seconds for one in done))
        left = f"; at most {figures.seconds(to_go)} to go" if self.question.searches else ""
        self.run.progress.note(f"trial {candidate.number}{where}{way}: {steps or 'the original'}{left}")

    # ---- the choice

    def _choose(self, interrupted: bool) -> Fitted:
        timetable = self.time
        timetable.left_out.clear()
        if (
            len(self.lanes) > 1
            and not interrupted
            and timetable.allows("the comparison of the best", timetable.comparing_s)
        ):
            self._compare(self._best_of_lanes())
        chosen = self._finalist()
        tuning_s = timetable.tuning_s + timetable.weighing_s
        if timetable.tuning_s and not interrupted and timetable.allows("the runtime's options", tuning_s):
            chosen = self._tuned(chosen)
        trial, seen, question = chosen.trial, chosen.seen, self.question
        lane, weighed = self.weighed[trial.number]
        file = weighed.artifact.entries.get("forward", weighed.artifact.files[0])
        recipe = Recipe.from_dict(trial.recipe)
        model = lane.run.apply(recipe)
        rows = [] if interrupted or not timetable.allows("parity") else self._runtimes(trial.number)
        kernels = [] if interrupted or not timetable.allows("kernels") else lane.scales.kernels(weighed)
        layers = self._layers(lane, model, weighed, interrupted)
        judged = self._as_both_halves_see() if chosen.violated else []
        result = Result(
            met=not chosen.violated,
            met_confident=not chosen.violated and not violations(question.budget, seen, confident=True),
            budget=question.budget,
            prefer=question.prefer,
            metric=self.run.data.metric.name,
            baseline=self._twin(trial.number, self.reporting),
            chosen=Chosen(
                **seen.model_dump(),
                artifact=file,
                runtime=lane.name,
                sha256=weighed.artifact.sha256,
                options=dict(weighed.options),
            ),
            blocking=list(chosen.violated),
            relaxation=relaxation(judged, question.budget, question.confident),
            relaxations=alternatives(judged, question.budget, question.confident),
            examples_needed=self._examples_needed(seen),
            recipe=trial.recipe,
            trials=[
                one.model_copy(update={"chosen": one.number == trial.number}) for one in self.search.trials
            ],
            environment=lane.scales.environment,
            warnings=self._warnings(lane, weighed, rows, interrupted),
            layers=layers,
            classes=list(lane.scales.quality(weighed, self.reporting).classes),
            runtimes=rows,
            kernels=kernels,
            steps=self._steps(lane, weighed, recipe, seen, interrupted),
            dropped=dropped(
                self.search.trials,
                trial.number,
                baseline=self.baseline,
                budget=question.budget,
                prefer=question.prefer,
                confident=question.confident,
                unconfirmed=self.unconfirmed,
            ),
            importances=self.search.importances() if question.searches else None,
            examples=self._examples(),
            effort=self._effort(),
            resumed=self.resumed,
            ladder=[] if self.ladder is None else self.ladder.rows(self.search.trials),
        )
        ended = not interrupted and self.search.ended != "time" and not timetable.left_out
        return Fitted(result, lane, weighed, finished=ended)

    def _layers(self, lane: Lane, model: Model, weighed: Weighed, interrupted: bool) -> list[LayerRow]:
        """Each layer before and after; without what takes passes through the network when the time is up."""
        said = "errors of layers"
        if not interrupted and self.time.allows(said):
            lane.run.until = self.time.end
            try:
                return lane.scales.layers(model, weighed, figures=True)
            except OutOfTime:
                self.time.left_out.append(said)
            finally:
                lane.run.until = math.inf
        return lane.scales.layers(model, weighed, figures=False)

    def _steps(
        self, lane: Lane, weighed: Weighed, recipe: Recipe, seen: Measurement, interrupted: bool
    ) -> list[StepRow]:
        """What each step bought; trials that were a beginning of the recipe tell it for nothing."""
        steps, known = recipe.to_dict()["steps"], {}
        beginnings = {prefix_key(steps[:count]) for count in range(len(steps))}
        for trial in self.search.trials:
            key = prefix_key(trial.recipe["steps"])
            if trial.measurement is not None and trial.sha256 and key in beginnings:
                own, other = self.weighed[trial.number]
                if own is lane and other.options == weighed.options:
                    known[key] = self._seen(trial.number, self.reporting)
        given = None
        if not interrupted:
            given = clock(self.time.deadline, self.question.time_limit, self.time.weighing_s)
        return step_rows(lane, weighed, recipe, seen, known=known, indices=self.reporting, clock=given)

    def _effort(self) -> Effort | None:
        """What was done in the time, where no recipe said what to do."""
        if self.question.plan is None:
            return None
        trials = Counter(trial.way for trial in self.search.trials)
        return self.question.plan.told(trials, time.monotonic() - self.started)

    def _seen(self, number: int, indices: np.ndarray | None) -> Measurement:
        """What was seen of a trial's artifact on these scored examples."""
        lane, weighed = self.weighed[number]
        seen = lane.measurement(weighed, indices)
        return self.direct[number].applied(seen) if number in self.direct else seen

    def _twin(self, number: int, indices: np.ndarray | None) -> Measurement:
        """The original that a trial's latency is told against, timed in the same rounds where it was."""
        lane, weighed = self.weighed[number]
        if lane is self.first and number not in self.direct:
            return self.scales.baseline(weighed, indices)
        twin = self.scales.baseline(None, indices)
        return (
            twin.model_copy(update={"latency_s": self.direct[number].twin}) if number in self.direct else twin
        )

    def _best_of_lanes(self) -> list[int]:
        """The best trial of each runtime, the best ones first."""
        question = self.question
        found: list[tuple[float, tuple[float, ...], int]] = []
        for name in self.lanes:
            own = [trial for trial in self.search.trials if trial.runtime == name]
            trial = choose(own, self.baseline, question.budget, question.prefer, question.confident).trial
            if trial is not None and trial.measurement is not None:
                broken = violations(question.budget, trial.measurement, question.confident)
                order = score(trial.measurement, question.prefer, self.baseline)
                found.append((sum(map(excess, broken)), order, trial.number))
        return [number for _, _, number in sorted(found)]

    def _compare(self, numbers: Sequence[int], twin_options: Mapping[str, Any] | None = None) -> None:
        """Time the best few of different runtimes in turn; their trials take these ratios."""
        picked = list(numbers[:_COMPARED])
        told = time_together(
            self.first, [self.weighed[number] for number in picked], self.scales.limits, twin_options
        )
        self.direct |= {number: one for number, one in zip(picked, told, strict=True) if one is not None}
        for index, trial in enumerate(self.search.trials):
            if trial.number in self.direct and trial.measurement is not None:
                seen = self.direct[trial.number].applied(trial.measurement)
                self.search.trials[index] = trial.model_copy(update={"measurement": seen})

    def _tuned(self, chosen: _Finalist) -> _Finalist:
        """The choice with the options that are fastest for it, measured again where they are no defaults."""
        number = chosen.trial.number
        lane, weighed = self.weighed[number]
        tuned = lane.scales.tuned(weighed)
        if tuned is weighed:
            return chosen
        self.weighed[number] = lane, tuned
        if len(self.lanes) > 1:
            self._compare([number], self.scales.twin_options())
        return self._reported(chosen.trial)

    def _runtimes(self, chosen: int) -> list[RuntimeRow]:
        """One row for each runtime of the search, and for each one that was left out."""
        best = {self.weighed[number][0].name: number for number in reversed(self._best_of_lanes())}
        best[self.weighed[chosen][0].name] = chosen
        rows = [self._runtime_row(lane, best.get(name), chosen) for name, lane in self.lanes.items()]
        return rows + [
            RuntimeRow(runtime=name, reason=_without_paths(error.what))
            for name, error in self.left_out.items()
        ]

    def _runtime_row(self, lane: Lane, number: int | None, chosen: int) -> RuntimeRow:
        scales = lane.scales
        fields: dict[str, Any] = {
            "runtime": lane.name,
            "version": lane.run.runtime.version(),
            "twin_bytes": scales.twin.bytes,
            "twin_ratio": lane.handicap.median,
            "twin_ratio_ci95": lane.handicap.ci95,
            "float_error": scales.float_error(),
        }
        if number is None:
            failed = [trial.reason for trial in self.search.trials if trial.runtime == lane.name]
            return RuntimeRow(**fields, reason=failed[0] if failed else "no trial of it was measured")
        weighed, seen = self.weighed[number][1], self._seen(number, self.reporting)
        recipe = next(trial.recipe for trial in self.search.trials if trial.number == number)
        return RuntimeRow(
            **fields,
            trial=number,
            bytes=seen.bytes,
            latency_ratio=seen.latency_ratio,
            latency_ratio_ci95=seen.latency_ratio_ci95,
            own_ratio=weighed.timing.ratio,
            own_ratio_ci95=weighed.timing.ratio_ci95,
            agreement=seen.agreement,
            sqnr_db=seen.sqnr_db,
            parity_db=scales.parity(lane.run.apply(Recipe.from_dict(recipe)), weighed),
            chosen=number == chosen,
        )

    def _finalist(self) -> _Finalist:
        """The best by the selecting examples that the reporting ones confirm, among the best few.

        Where they confirm none, the one that breaks its limits least on the reporting examples.
        """
        question = self.question
        left = list(self.search.trials)
        finalists: list[_Finalist] = []
        while len(finalists) < _FINALISTS:
            verdict = choose(left, self.baseline, question.budget, question.prefer, question.confident)
            if verdict.trial is None or (finalists and not verdict.met):
                break
            finalists.append(self._reported(verdict.trial))
            if not finalists[-1].violated:
                return finalists[-1]
            self.unconfirmed.add(verdict.trial.number)
            left = [trial for trial in left if trial.number != verdict.trial.number]
        return min(finalists, key=lambda one: sum(excess(item) for item in one.violated))

    def _reported(self, trial: Trial) -> _Finalist:
        """What the reporting examples say of a trial, and the original beside it."""
        question = self.question
        seen = self._seen(trial.number, self.reporting)
        alone = [trial.model_copy(update={"measurement": seen})]
        twin = self._twin(trial.number, self.reporting)
        verdict = choose(alone, twin, question.budget, question.prefer, question.confident)
        return _Finalist(trial, seen, verdict.blocking)

    def _as_both_halves_see(self) -> list[Trial]:
        """The trials, with the worse of what both halves say of their drops."""
        trials = []
        for trial in self.search.trials:
            seen = trial.measurement
            if trial.state == "measured" and seen is not None and self.reporting is not None:
                seen = max(seen, self._seen(trial.number, self.reporting), key=self._drop_that_counts)
            trials.append(trial.model_copy(update={"measurement": seen}))
        return trials

    def _drop_that_counts(self, seen: Measurement) -> float:
        ends = seen.quality_drop_ci95 if self.question.confident else None
        return (seen.quality_drop or 0.0) if ends is None else ends[1]

    def _examples_needed(self, seen: Measurement) -> int | None:
        """Scored examples, both halves, that would settle whether the drop keeps its limit."""
        scored = len(self.scales.twin_scored.rows[self.run.data.metric.name])
        limit = self.question.budget.quality_drop
        return examples_needed(seen.quality_drop, seen.quality_drop_ci95, limit, scored)

    def _warnings(
        self, lane: Lane, weighed: Weighed, rows: Sequence[RuntimeRow], interrupted: bool
    ) -> list[str]:
        """What the reader of the figures should know, in the order of its weight."""
        run, said = self.run, []
        if lane.name == "torch":
            said.append(
                "runtime torch simulates formats: the quality is that of the formats, but bytes and latency "
                "are those of float PyTorch"
            )
        tried = len(self.search.trials)
        if interrupted:
            said.append(f"the search was interrupted after {tried} trials")
        elif self.search.ended == "time":
            said.append(f"the time limit ended the search after {tried} of {self.trials} trials")
        if self.time.left_out:
            said.append(f"the time was up before: {', '.join(self.time.left_out)}")
        if self.question.journal is not None and (interrupted or self.search.ended == "time"):
            said.append("the same command with --resume goes on from there")
        scored = len(self.scales.twin_scored.rows[run.data.metric.name])
        if tried > 1 and self.selecting is None:
            said.append(
                f"the same {scored} examples selected among {tried} trials and report, so the drop looks "
                f"smaller than it is; from {_FEWEST_TO_HALVE} examples on, one half reports"
            )
        said += [self._parting(row) for row in rows if row.parity_db is not None and row.parity_db < LEAST_DB]
        return [*said, *run.data.notes, *lane.run.warnings, *weighed.timing.notes]

    def _parting(self, row: RuntimeRow) -> str:
        """That an artifact is not what was simulated, and whether the network itself is the reason."""
        said = f"on {row.runtime} the outputs are {row.parity_db:.1f} dB from the simulation of the formats"
        trial = next(one for one in self.search.trials if one.number == row.trial)
        lane, weighed = self.weighed[trial.number]
        steady = lane.scales.steadiness(lane.run.apply(Recipe.from_dict(trial.recipe)), weighed)
        if steady is not None and steady < LEAST_DB:
            said += f"; the simulation is {steady:.1f} dB from itself when its inputs move by a millionth"
            return f"{said}, so the network amplifies every rounding"
        return said + "; featherweight compare tells where they part"

    def _examples(self) -> dict[str, Any]:
        data = self.run.data
        count = len(self.scales.twin_scored.rows[data.metric.name])
        return {
            "scored": count,
            "selecting": count if self.selecting is None else len(self.selecting),
            "reporting": count if self.reporting is None else len(self.reporting),
            "halved": self.selecting is not None,
            "calibration": data.calibration_source,
            "origin": data.origin,
        }


def _without_paths(text: str) -> str:
    """The sentence without the folders of this machine: it goes into what is handed back."""
    return re.sub(r"(?<![\w.])/(?:[^/\s'\":;,]+/)+", "", text)


def _told(step: Mapping[str, Any]) -> str:
    (name, parameters), *_ = step.items()
    return f"{name}({', '.join(f'{key}={value}' for key, value in (parameters or {}).items())})"
