"""Seconds of layers that are yet to be, from those that were measured.

A line through the measured layers (Lawson and Hanson 1974, non-negative least squares)::

    seconds ≈ a MACs + b elements read and made + c calls

fitted to relative errors. A layer that was measured itself keeps its own seconds; its parts are predicted in
proportion to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from featherweight.method import Costs
from featherweight.model import Model
from featherweight.tools.factors import Candidate, Work, candidates
from featherweight.tools.forms import Form

_LEAST = 3  # measured layers that make a line


@dataclass(frozen=True)
class Pace:
    """How fast a target is.

    Attributes:
        rates: Seconds of a multiply-accumulate, of an element and of a call.
        measured: Layer -> seconds as measured, and as the line has it.
    """

    rates: tuple[float, float, float]
    measured: Mapping[str, tuple[float, float]]

    def seconds(self, one: Candidate, form: Form | None) -> float:
        """Seconds of a layer, whole or in a form."""
        seen, told = self.measured.get(one.path, (1.0, 1.0))
        return self.line(one.work(form)) * seen / told

    def line(self, work: Work) -> float:
        """Seconds of some work on the line."""
        return float(np.dot(self.rates, _features(work)))


def fitted_pace(original: Model, costs: Costs) -> Pace | None:
    """The line through the layers that were measured; None where too few were."""
    found, _ = candidates(original, lambda path, kind: True)
    known = {one.path: (one.work(), costs.seconds(one.path, False)) for one in found}
    seen = {path: (work, seconds) for path, (work, seconds) in known.items() if seconds}
    if len(seen) < _LEAST:
        return None
    rows = np.array([_features(work) for work, _ in seen.values()], float)
    times = np.array([seconds for _, seconds in seen.values()])
    scale = rows.max(axis=0)
    fitted, _ = nnls(rows / scale / times[:, None], np.ones(len(times)))
    a, b, c = fitted / scale
    pace = Pace((float(a), float(b), float(c)), {})
    return Pace(pace.rates, {path: (s, max(pace.line(work), 1e-12)) for path, (work, s) in seen.items()})


def _features(work: Work) -> tuple[int, int, int]:
    return work.macs, work.elements, work.parts
