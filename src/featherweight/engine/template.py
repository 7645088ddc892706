"""The recipe that ``fit`` searches when none is given: Method.holes x Runtime.supports."""

from __future__ import annotations

from featherweight.method import Context
from featherweight.model import Model
from featherweight.plugins import find_method
from featherweight.recipe import Hole, Recipe, Step

_STEPS = ("fold", "quantize")  # structure before formats, as the order rule asks


def template() -> Recipe:
    """Steps with all their holes open: they are asked of the model that reaches the step."""
    return Recipe(tuple(Step(name, {}) for name in _STEPS))


def step_holes(name: str, model: Model, context: Context) -> dict[str, Hole]:
    """What the search may vary of a step on the model that reaches it."""
    return find_method(name).holes(model, context)
