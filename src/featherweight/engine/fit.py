"""Ask for a recipe, run it, weigh what comes out, tell the search; anytime, the best so far is known."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from featherweight import figures
from featherweight.engine.contenders import outpaced
from featherweight.engine.deadline import OutOfTime
from featherweight.engine.drafts import Ask, Draft, climb, draft
from featherweight.engine.dropped import dropped
from featherweight.engine.effort import Took
from featherweight.engine.evaluate import Weighed
from featherweight.engine.hands import Hands
from featherweight.engine.ladder import Climb, Ladder
from featherweight.engine.lanes import Lane
from featherweight.engine.narrowing import narrowed
from featherweight.engine.pursuit import FROM, ROUNDS, pursue
from featherweight.engine.question import Question
from featherweight.engine.search import Candidate, Failure, Opening, Search
from featherweight.engine.standing import Standing, halves
from featherweight.engine.telling import Telling, without_paths
from featherweight.engine.template import step_holes
from featherweight.engine.timetable import Timetable
from featherweight.engine.verdict import (
    alternatives,
    rejection,
    relaxation,
    violations,
)
from featherweight.engine.warm import openings, starts
from featherweight.engine.workers import Crew
from featherweight.errors import FeatherweightError, LoadError, RecipeError, RunnerError, TargetError
from featherweight.model import Model
from featherweight.outcome import (
    Chosen,
    Effort,
    Measurement,
    Prediction,
    Result,
)
from featherweight.recipe import Hole, Recipe, Step

_FINALISTS = 3
_COMPARED = 4  # artifacts of different runtimes that are timed in turn before one is chosen
_PRICES_FROM, _WIDTHS_FROM = 120.0, 900.0  # seconds of a search in which profiling layers may pay
_FEWEST_TO_HALVE = 100  # below it, half of the examples says nothing


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
        selecting, reporting = halves(self.run, self.scales, self.trials)
        self.baseline = self.scales.baseline(None, selecting)
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
        self.standing = Standing(lanes, question, self.search.trials, self.baseline, selecting, reporting)
        self.ladder = self._ladder() if question.ladder and question.searches else None
        self.climbs: dict[int, Climb] = {}
        self.pursued = 0  # rounds of longer training
        self.narrowed: list[Opening] = []  # in fewer levels, whether or not they are measured yet
        self.begun: set[tuple[str, str, int]] = set()  # runtimes, ways and steps whose analysis was heard
        self.resumed = len(self.search.trials)
        if self.resumed:
            self.run.progress.note(f"the search goes on after {self.resumed} trials")

    def _ladder(self) -> Ladder:
        question = self.question
        return Ladder(
            list(self.lanes.values()),
            self.baseline,
            self.standing.selecting,
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
            too_slow = self._outpaced(candidate)
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

    def _outpaced(self, candidate: Candidate) -> str | None:
        """Why a candidate's runtime is not tried; a user's own recipe is, however slow the runtime is."""
        if self.question.plan is None:
            return None
        return outpaced(candidate.runtime, self.search.trials, self.handicaps, self.question.prefer)

    def _unpriced(self, candidate: Candidate) -> bool:
        """Whether a way plans seconds of layers on a runtime that tells none."""
        if self.question.plan is None:
            return False
        steps = self.question.plan.ways[candidate.way].steps
        planned = any(one.method == "mixed_precision" and "latency" in one.parameters for one in steps)
        lane = self.lanes[candidate.runtime] if candidate.runtime else self.first
        return planned and not lane.run.costs.known

    def _next(self) -> Candidate | None:
        """The next candidate; when a part of the time is over, one beside the search space first."""
        if self.question.plan is not None:
            opening = self._beside()
            if opening is not None:
                self.search.open_with([opening])
        return self.search.ask()

    def _beside(self) -> Opening | None:
        """What is worth training for long, or the best so far in fewer levels; None: it is not yet time."""
        question = self.question
        while True:
            now, rounds = time.monotonic(), ROUNDS[self.pursued :]
            left = self.time.until - now
            if self.pursued and self.search.left > len(rounds):
                opening = narrowed(
                    self.search.trials,
                    question.budget,
                    question.prefer,
                    self.baseline,
                    left,
                    confident=question.confident,
                )
                if opening is not None and opening not in self.narrowed:
                    self.narrowed.append(opening)
                    return opening
            due = now >= self.started + FROM * question.time_limit or self.search.left <= len(rounds)
            if not rounds or not due:
                return None
            self.pursued += 1
            opening = pursue(
                self.search.trials,
                rounds[0] * left - self.time.weighing_s,
                question.budget,
                question.prefer,
                self.baseline,
                confident=question.confident,
                later_s=(1 - rounds[0]) * left,
            )
            if opening is not None:
                return opening

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
            seen = lane.measurement(weighed, self.standing.selecting)
        except (LoadError, RecipeError, RunnerError, TargetError) as error:  # of this recipe, not of all
            if self.question.searches or len(self.lanes) > 1:
                self.run.progress.note(f"trial {candidate.number} failed: {error.what}")
            self.search.tell(
                candidate,
                Failure(without_paths(error.what), unfit=isinstance(error, RecipeError)),
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
        self.standing.weighed[candidate.number] = lane, weighed
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
            self.standing.compare(self.standing.best_of_lanes())
        chosen = self.standing.finalist()
        tuning_s = timetable.tuning_s + timetable.weighing_s
        if timetable.tuning_s and not interrupted and timetable.allows("the runtime's options", tuning_s):
            chosen = self.standing.tuned(chosen)
        trial, seen, question = chosen.trial, chosen.seen, self.question
        lane, weighed = self.standing.weighed[trial.number]
        file = weighed.artifact.entries.get("forward", weighed.artifact.files[0])
        recipe = Recipe.from_dict(trial.recipe)
        model = lane.run.apply(recipe)
        telling = Telling(self.standing, self.search, timetable, self.left_out, interrupted=interrupted)
        rows = [] if interrupted or not timetable.allows("parity") else telling.runtimes(trial.number)
        kernels = [] if interrupted or not timetable.allows("kernels") else lane.scales.kernels(weighed)
        layers = telling.layers(lane, model, weighed)
        beside = telling.beside(lane, weighed)
        judged = self.standing.as_both_halves_see() if chosen.violated else []
        result = Result(
            met=not chosen.violated,
            met_confident=not chosen.violated and not violations(question.budget, seen, confident=True),
            budget=question.budget,
            prefer=question.prefer,
            metric=self.run.data.metric.name,
            baseline=self.standing.twin(trial.number, self.standing.reporting),
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
            examples_needed=self.standing.examples_needed(seen),
            recipe=trial.recipe,
            trials=[
                one.model_copy(update={"chosen": one.number == trial.number}) for one in self.search.trials
            ],
            environment=lane.scales.environment,
            warnings=telling.warnings(lane, weighed, rows),
            layers=layers,
            classes=list(lane.scales.quality(weighed, self.standing.reporting).classes),
            runtimes=rows,
            kernels=kernels,
            steps=telling.steps(lane, weighed, recipe, seen),
            dropped=dropped(
                self.search.trials,
                trial.number,
                baseline=self.baseline,
                budget=question.budget,
                prefer=question.prefer,
                confident=question.confident,
                unconfirmed=self.standing.unconfirmed,
            ),
            importances=self.search.importances() if question.searches else None,
            robustness=beside.robustness,
            calibration=beside.calibration,
            privacy=beside.privacy,
            omitted=dict(beside.omitted),
            examples=telling.examples(),
            effort=self._effort(),
            resumed=self.resumed,
            ladder=[] if self.ladder is None else self.ladder.rows(self.search.trials),
        )
        ended = not interrupted and self.search.ended != "time" and not timetable.left_out
        return Fitted(result, lane, weighed, finished=ended)

    def _effort(self) -> Effort | None:
        """What was done in the time, where no recipe said what to do."""
        if self.question.plan is None:
            return None
        trials = Counter(trial.way for trial in self.search.trials)
        return self.question.plan.told(trials, time.monotonic() - self.started)


def _told(step: Mapping[str, Any]) -> str:
    (name, parameters), *_ = step.items()
    return f"{name}({', '.join(f'{key}={value}' for key, value in (parameters or {}).items())})"
