"""A candidate as far as the cheap rungs of the ladder need it: its recipe without the steps that take long.

The steps in front of the first long one are those of the whole recipe, which the store then has already; so
what a dropped candidate did is not lost for others that begin alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from featherweight.engine.ladder import Climb, Ladder, shortened
from featherweight.engine.run import Run
from featherweight.engine.search import Candidate
from featherweight.errors import RecipeError
from featherweight.holes import Hole
from featherweight.model import Model
from featherweight.outcome import Trial
from featherweight.recipe import Recipe, Step

Ask = Callable[[Candidate, int, Step, Model], Mapping[str, Hole]]


@dataclass(frozen=True)
class Draft:
    """What a recipe makes without its long steps.

    Attributes:
        model: After the others.
        left_out: Methods of the long ones.
    """

    model: Model
    left_out: tuple[str, ...] = ()


def draft(
    run: Run, candidate: Candidate, ask: Ask, accept: Callable[[Candidate], bool], *, whole: bool
) -> Draft | None:
    """Walk along a candidate's steps: fill each one's holes, then do it unless it takes long.

    Args:
        run: Does the steps.
        candidate: Takes the values.
        ask: The holes of a step on the model that reaches it.
        accept: Whether the candidate is new; asked when its last hole is filled.
        whole: Leave nothing out.

    Returns:
        None where it is not new.

    Raises:
        RecipeError: A step does not fit the model.
    """
    model, left_out = run.start, list[str]()
    steps = len(candidate.recipe.steps)
    for index in range(steps):
        step = candidate.recipe.steps[index]
        candidate.fill(index, ask(candidate, index, step, model))
        if index == steps - 1 and not accept(candidate):
            return None
        method = candidate.recipe.steps[index].build()
        if not whole and shortened(method) is not None:
            left_out.append(step.method)
            continue
        try:
            model = run.step(model, method, index + 1)
        except RecipeError:
            if not left_out:
                raise
            # What was left out may be what it needs; so nothing is from here on.
            model = run.apply(Recipe(candidate.recipe.steps[: index + 1]))
            left_out, whole = [], True
    return Draft(model, tuple(left_out))


def in_part(run: Run, recipe: Recipe) -> Model:
    """What a recipe makes when its long steps do a share of their work."""
    model = run.start
    for number, method in enumerate(recipe.methods(), 1):
        model = run.step(model, shortened(method) or method, number)
    return model


def climb(
    ladder: Ladder, run: Run, recipe: Recipe, made: Draft, trials: Sequence[Trial]
) -> tuple[Climb, str | None]:
    """Look at a candidate from the cheap rungs, until one of them drops it.

    Args:
        ladder: Judges.
        run: Does the steps.
        recipe: Filled.
        made: What it makes without its long steps.
        trials: What was measured so far.

    Returns:
        What was predicted, and why the candidate goes no further; None: it does.
    """
    up = Climb(str(run.target.runtime))
    ladder.cost(up, made.model)
    reason = ladder.verdict(up, trials)
    if reason is not None or not ladder.quality_matters(up, trials):
        return up, reason
    ladder.quality(up, made.model, made.left_out, recovered=False)
    reason = ladder.verdict(up, trials)
    if reason is not None or not made.left_out or not ladder.scores:
        return up, reason
    began = time.monotonic()
    model = in_part(run, recipe)
    spent = time.monotonic() - began
    ladder.quality(up, model, made.left_out, recovered=True)
    ladder.add_seconds(up, spent)
    return up, ladder.verdict(up, trials)
