"""Ask for a recipe, run it, weigh what comes out, tell the search; anytime, the best so far is known."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from featherweight.engine.evaluate import Scales, Weighed
from featherweight.engine.run import Run
from featherweight.engine.search import Candidate, Failure, Search
from featherweight.engine.template import step_holes
from featherweight.engine.verdict import choose, excess, rejection, relaxation, violations
from featherweight.errors import FeatherweightError, LoadError, RecipeError, RunnerError, TargetError
from featherweight.model import Model
from featherweight.outcome import (
    Budget,
    Chosen,
    Measurement,
    Preference,
    Relaxation,
    Result,
    Trial,
    Violation,
)
from featherweight.recipe import Recipe

_FINALISTS = 3
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
        trials: Artifacts to measure at most.
        time_limit: No trial starts after so many seconds.
    """

    budget: Budget
    prefer: Preference
    confident: bool
    recipe: Recipe
    open_ended: bool
    trials: int
    time_limit: float

    @property
    def searches(self) -> bool:
        """Whether several artifacts may compete; the one of a filled recipe is reported, never rejected."""
        return self.open_ended or self.recipe.has_holes


@dataclass(frozen=True)
class Fitted:
    """The answer.

    Attributes:
        result: What is handed back.
        weighed: The artifact, and what was seen of it.
        finished: The search came to its own end, so asking again would answer the same.
    """

    result: Result
    weighed: Weighed
    finished: bool


@dataclass(frozen=True)
class _Finalist:
    """A trial that the selecting examples prefer, as the reporting examples see it."""

    trial: Trial
    seen: Measurement
    violated: tuple[Violation, ...]


class Fit:
    """One search. Everything that it computes is in the store, so a second one resumes.

    Args:
        run: The original, its data and its target.
        scales: What weighs artifacts.
        question: What is asked.
    """

    def __init__(self, run: Run, scales: Scales, question: Question) -> None:
        self.run = run
        self.scales = scales
        self.question = question
        self.weighed: dict[int, Weighed] = {}
        self.selecting, self.reporting = self._halves()
        self.baseline = scales.baseline(None, self.selecting)
        self.search = Search(
            question.recipe,
            question.budget,
            baseline=self.baseline,
            prefer=question.prefer,
            confident=question.confident,
            seed=run.seed,
            trials=question.trials,
            deadline_s=question.time_limit,
        )

    def _halves(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """One half of the examples selects and the other reports, when several artifacts compete."""
        data = self.run.data
        rows = self.scales.twin_scored.rows[data.metric.name]
        splits = data.scored is not None and len(rows) == len(data.scored)  # a score may have its own rows
        if self.question.trials == 1 or len(rows) < _FEWEST_TO_HALVE or not splits:
            return None, None
        return data.halves(self.run.seed)

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
            raise failure or RecipeError("the search space holds no recipe", fix="leave a parameter open")
        try:
            return self._choose(interrupted)
        except KeyboardInterrupt:
            if interrupted:  # once more: now nothing is wanted
                raise
            self.run.progress.note("interrupted: the best so far is handed back")
            return self._choose(interrupted=True)

    @property
    def _measured(self) -> bool:
        return any(trial.measurement is not None for trial in self.search.trials)

    def _search(self) -> FeatherweightError | None:
        """Try candidates until there is none; the error that stopped the last one that failed."""
        last = None
        while (candidate := self.search.ask()) is not None:
            last = self._try(candidate) or last
        return last

    def _try(self, candidate: Candidate) -> FeatherweightError | None:
        """Run and weigh one candidate; the error that stopped it, if one did."""
        started = time.monotonic()
        try:
            model = self._model(candidate)
            if model is None:
                return None
            weighed = self.scales.weigh(model)
            seen = self.scales.measurement(weighed, self.selecting)
        except (LoadError, RecipeError, RunnerError, TargetError) as error:  # of this recipe, not of all
            if self.question.searches:
                self.run.progress.note(f"trial {candidate.number} failed: {error.what}")
            self.search.tell(
                candidate, Failure(_without_paths(error.what)), seconds=time.monotonic() - started
            )
            return error
        self.weighed[candidate.number] = weighed
        self.search.tell(
            candidate,
            seen,
            rejected=self._rejected(seen),
            seconds=time.monotonic() - started,
            sha256=weighed.artifact.sha256,
        )
        return None

    def _rejected(self, seen: Measurement) -> str | None:
        """Why this is no answer, whatever its figures; a filled recipe is reported, never rejected."""
        question = self.question
        if not question.searches:
            return None
        return rejection(seen, self.baseline, question.budget, question.prefer)

    def _model(self, candidate: Candidate) -> Model | None:
        """The candidate's model; None for a point that was tried before.

        A template's holes are asked of the model that reaches the step, since layers change on the way.
        """
        if not self.question.open_ended:
            self._announce(candidate)
            return self.run.apply(candidate.recipe)
        model, context = self.run.original, self.run.context()
        for index, step in enumerate(candidate.recipe.steps):
            candidate.fill(index, step_holes(step.method, model, context))
            if index == len(candidate.recipe.steps) - 1:
                if not self.search.accept(candidate):
                    return None
                self._announce(candidate)
            model = self.run.step(model, candidate.recipe.steps[index].build(), index + 1)
        return model

    def _announce(self, candidate: Candidate) -> None:
        steps = " -> ".join(_told(step) for step in candidate.recipe.to_dict()["steps"])
        self.run.progress.note(f"trial {candidate.number}: {steps or 'the original'}")

    # ---- the choice

    def _choose(self, interrupted: bool) -> Fitted:
        chosen = self._finalist()
        trial, seen, question = chosen.trial, chosen.seen, self.question
        weighed = self.weighed[trial.number]
        file = weighed.artifact.entries.get("forward", weighed.artifact.files[0])
        recipe = Recipe.from_dict(trial.recipe)
        layers = self.scales.layers(self.run.apply(recipe), weighed)
        result = Result(
            met=not chosen.violated,
            met_confident=not chosen.violated and not violations(question.budget, seen, confident=True),
            budget=question.budget,
            prefer=question.prefer,
            metric=self.run.data.metric.name,
            baseline=self.scales.baseline(weighed, self.reporting),
            chosen=Chosen(
                **seen.model_dump(),
                artifact=file,
                runtime=self.run.target.runtime,
                sha256=weighed.artifact.sha256,
            ),
            blocking=list(chosen.violated),
            relaxation=self._relaxation() if chosen.violated else None,
            recipe=trial.recipe,
            trials=[
                one.model_copy(update={"chosen": one.number == trial.number}) for one in self.search.trials
            ],
            environment=self.scales.environment,
            warnings=self._warnings(weighed, interrupted),
            layers=layers,
            classes=list(self.scales.quality(weighed, self.reporting).classes),
            examples=self._examples(),
        )
        return Fitted(result, weighed, finished=not interrupted and self.search.ended != "time")

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
            left = [trial for trial in left if trial.number != verdict.trial.number]
        return min(finalists, key=lambda one: sum(excess(item) for item in one.violated))

    def _reported(self, trial: Trial) -> _Finalist:
        """What the reporting examples say of a trial, and the original beside it."""
        question, weighed = self.question, self.weighed[trial.number]
        seen = self.scales.measurement(weighed, self.reporting)
        alone = [trial.model_copy(update={"measurement": seen})]
        twin = self.scales.baseline(weighed, self.reporting)
        verdict = choose(alone, twin, question.budget, question.prefer, question.confident)
        return _Finalist(trial, seen, verdict.blocking)

    def _relaxation(self) -> Relaxation | None:
        """The cheapest limit to move; a drop counts as the worse of what both halves say of it."""
        trials = []
        for trial in self.search.trials:
            seen = trial.measurement
            if seen is not None and self.reporting is not None:
                other = self.scales.measurement(self.weighed[trial.number], self.reporting)
                seen = max(seen, other, key=lambda one: one.quality_drop or 0.0)
            trials.append(trial.model_copy(update={"measurement": seen}))
        return relaxation(trials, self.question.budget, self.question.confident)

    def _warnings(self, weighed: Weighed, interrupted: bool) -> list[str]:
        """What the reader of the figures should know, in the order of its weight."""
        run, question, said = self.run, self.question, []
        if run.target.runtime == "torch":
            said.append(
                "runtime torch simulates formats: the quality is that of the formats, but bytes and latency "
                "are those of float PyTorch"
            )
        tried = len(self.search.trials)
        if interrupted:
            said.append(f"the search was interrupted after {tried} trials")
        elif self.search.ended == "time":
            said.append(f"the time limit ended the search after {tried} of {question.trials} trials")
        scored = len(self.scales.twin_scored.rows[run.data.metric.name])
        if tried > 1 and self.selecting is None:
            said.append(
                f"the same {scored} examples selected among {tried} trials and report, so the drop looks "
                f"smaller than it is; from {_FEWEST_TO_HALVE} examples on, one half reports"
            )
        return [*said, *run.data.notes, *run.warnings, *weighed.timing.notes]

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
