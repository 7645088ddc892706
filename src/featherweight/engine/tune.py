"""Which of a runtime's options pay for an artifact: measured in turn with the defaults, never guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from featherweight.engine.paced import Entrant, Rounds, measure_paced
from featherweight.engine.timing import Limits
from featherweight.method import Progress
from featherweight.runtime import Artifact, Json, Target

_SECONDS = 4.0
LONGEST_S = 2 * _SECONDS  # sets of options alone, then together
_GAIN = 0.99  # the upper end of the ratio's interval must be below it: what gains less is noise


def tune(
    artifact: Artifact,
    target: Target,
    tunings: Sequence[Mapping[str, Json]],
    inputs: Sequence[np.ndarray],
    *,
    limits: Limits,
    entry: str,
    progress: Progress,
) -> dict[str, Any]:
    """The options with which the artifact is fastest; the target's own where nothing is surely faster.

    Sets that beat the defaults by themselves are also tried together. One that the runtime refuses, or
    that crashes it, is passed over.
    """
    default = dict(target.options)
    sets = [{**default, **given} for given in tunings if {**default, **given} != default]
    if not sets:
        return default
    limits = replace(limits, seconds=min(limits.seconds, _SECONDS), precision=0.01)

    def measured(tried: Sequence[Mapping[str, Any]]) -> Rounds:
        entrants = [Entrant(artifact, replace(target, options=options)) for options in (default, *tried)]
        return measure_paced(
            entrants, inputs, limits=limits, entry=entry, progress=progress, description="Tuning options"
        )

    rounds = measured(sets)
    gains = {index: ratio for index in range(len(sets)) if (ratio := _gain(rounds, index + 1)) is not None}
    if not gains:
        return default
    ranked = sorted(gains, key=lambda index: gains[index])
    best = sets[ranked[0]]
    together: dict[str, Any] = {}
    for index in reversed(ranked):  # where two name one option, the faster one says
        together |= sets[index]
    if together == best:
        return best
    rounds = measured([best, together])
    alone, both = _gain(rounds, 1), _gain(rounds, 2)
    return together if both is not None and (alone is None or both < alone) else best


def _gain(rounds: Rounds, index: int) -> float | None:
    """The ratio to the defaults of an entrant that is surely faster."""
    if index in rounds.failed:
        return None
    ratio = rounds.ratio(index)
    return ratio.median if ratio.ci95 is not None and ratio.ci95[1] < _GAIN else None
