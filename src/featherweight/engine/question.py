"""What a fit is asked: the limits, what is best within them, and how much may be tried."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from featherweight.engine.effort import Plan
from featherweight.engine.samplers import SamplerName
from featherweight.outcome import Budget, Preference
from featherweight.recipe import Recipe


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
        robustness: Tell what compression did beside the score; None: where there is time.
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
    robustness: bool | None = None

    @property
    def searches(self) -> bool:
        """Whether several artifacts may compete; the one of a filled recipe is reported, never rejected."""
        return self.open_ended or self.recipe.has_holes
