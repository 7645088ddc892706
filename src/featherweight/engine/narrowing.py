"""Where quality is to spare: weights of fewer levels in the same integers, so that the download shrinks.

A kernel of eight bits takes as long, and the file on the device is as large, whether its weights hold 255
levels or 31; what an entropy coder makes of the file follows the levels. The best answer so far is stored
with fewer of them, a bit at a time, for as long as it keeps its limit with something to spare: nothing is
trained again, so each try takes as long as rounding and measuring do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from featherweight.engine.search import Opening
from featherweight.engine.verdict import score, within
from featherweight.outcome import Budget, Measurement, Preference, Trial
from featherweight.recipe import Recipe

_SPARE = 0.85  # of the limit: what loses more than this has nothing to spare
_FIRST = 2  # bits at once: eight-bit weights hold them for next to nothing
_MOST = 4  # bits of eight left unused


def headroom(recipe: dict[str, Any]) -> int | None:
    """Bits that a recipe leaves unused in its eight-bit weights; None: it has none of one kind."""
    asked = [values or {} for step in recipe["steps"] for name, values in step.items() if name == "quantize"]
    if len(asked) != 1 or asked[0].get("weights", "int8") != "int8" or asked[0].get("layers"):
        return None
    unused = asked[0].get("headroom", 0)
    return unused if isinstance(unused, int) else None


def with_headroom(recipe: dict[str, Any], unused: int) -> dict[str, Any]:
    """The same recipe with so many bits unused."""
    steps = [
        {name: {**(values or {}), "headroom": unused} if name == "quantize" else values}
        for step in recipe["steps"]
        for name, values in step.items()
    ]
    return {**recipe, "steps": steps}


def narrowed(
    trials: Sequence[Trial],
    budget: Budget,
    prefer: Preference,
    baseline: Measurement,
    seconds: float,
    *,
    confident: bool = False,
) -> Opening | None:
    """The best so far with fewer levels; None: it has nothing to spare, or all was tried.

    Args:
        trials: All so far.
        budget: The limits; without one of the drop there is nothing to spare.
        prefer: What is best within them.
        baseline: The original's figures.
        seconds: That are left for it.
        confident: Hold the upper end of the drop's interval against its limit.
    """
    limit, kept = budget.quality_drop, within(trials, budget, confident)
    if not limit or prefer != "balanced" or not kept:
        return None
    best = min(kept, key=lambda one: score(one.measurement or baseline, prefer, baseline))
    seen, now = best.measurement or baseline, headroom(best.recipe)
    ends = seen.quality_drop_ci95 if confident else None
    drop = (seen.quality_drop or 0.0) if ends is None else ends[1]
    if now is None or drop > _SPARE * limit or best.seconds - best.training_s > seconds:
        return None
    tried = [one.recipe for one in trials if (one.runtime, one.way) == (best.runtime, best.way)]
    for unused in (_FIRST, 1) if now == 0 else (now + 1,):
        recipe = with_headroom(best.recipe, unused)
        if unused <= _MOST and recipe not in tried:
            return Opening(best.runtime, best.way, recipe=Recipe.from_dict(recipe))
    return None
