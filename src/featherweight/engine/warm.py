"""Where a search begins: values of holes that a sensitivity analysis proposes (Method.starts)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featherweight.engine.run import Run
from featherweight.engine.search import Opening
from featherweight.errors import FeatherweightError
from featherweight.holes import Hole, find_holes
from featherweight.method import Method
from featherweight.model import Model
from featherweight.recipe import Recipe, Step


def starts(run: Run, step: Step, model: Model, holes: Mapping[str, Hole]) -> Sequence[Mapping[str, Any]]:
    """Values of a step's holes that are worth trying first on the model that reaches it.

    An analysis that fails is no reason to stop: the step says itself what is wrong when it is tried.
    """
    if not holes or not analyses(step):
        return ()
    open_ones = {str(path[0]) for path, _ in find_holes(step.parameters)}
    given = {name: value for name, value in step.parameters.items() if name not in open_ones}
    try:
        return step.method_type().starts(model, run.context(model), given, holes)
    except FeatherweightError as error:
        run.progress.note(f"warning: no sensitivity analysis of {step.method}: {error.what}")
        return ()


def analyses(step: Step) -> bool:
    """Whether a step's method has an analysis at all."""
    return step.method_type().starts.__func__ is not Method.starts.__func__  # type: ignore[attr-defined]


def openings(run: Run, recipe: Recipe, runtime: str = "") -> list[Opening]:
    """The first candidates of a recipe with holes; the others of its holes take their defaults."""
    found: list[Opening] = []
    filled = recipe
    for index, holes in recipe.holes().items():
        step = recipe.steps[index]
        if analyses(step):
            reached = run.apply(Recipe(filled.steps[:index]))
            values = starts(run, step, reached, holes)
            found += [Opening(runtime, values={index: dict(one)}) for one in values]
        filled = filled.filled({index: {address: hole.first for address, hole in holes.items()}})
    return found
