"""The ladder of a search: cheap looks at a candidate, so that the worst go no further; measuring decides.

    cost       shapes and formats: bytes, multiply-accumulates, the target's table of prices
    simulated  quality of the simulated network on some selecting examples, without the steps that take long
    recovered  the same after a short part of those steps
    measured   the artifact

A rung drops a candidate when even the best that its predictions allow, by the margin that was learned from
earlier predictions and measurements (margins.py), is of no use: it breaks the limits by more than the best
measured one, it would be rejected, or a measured artifact is better on every axis. Nothing is dropped before
something was measured, and kinds of predictions of which little is known have wide margins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from featherweight.data import Data
from featherweight.drops import drop_of_rows
from featherweight.engine.forecast import Forecast, Forecaster
from featherweight.engine.lanes import Lane
from featherweight.engine.margins import Margin, Margins, median
from featherweight.engine.verdict import excess, figure, rejection, score, violations
from featherweight.method import Method
from featherweight.model import Model
from featherweight.outcome import Budget, Latency, Measurement, Prediction, Preference, Rung, RungRow, Trial
from featherweight.tools.simulate import as_run, simulate

SHARE = 0.1  # of a long step's work, on the rung of short recovery
_EXAMPLES = 512  # simulated at most
_FEWEST = 64
_SIMULATED_S = 5.0  # that the simulation of a candidate may take
_PASSES = 3.0  # float forward passes that a simulated one takes
_AS_GOOD = 0.97  # of the size and latency of one that costs the same by shapes and formats, at best
_EVEN = 0.05  # of a limit, of a size and of a latency: what is less is nobody's gain
_RUNGS: tuple[Rung, ...] = ("cost", "simulated", "recovered")
# Spreads of errors that are expected before any was seen: logarithms of factors, and differences of drops.
_BYTES, _PRICED, _BY_MACS = 0.03, 0.2, 0.7
_SIMULATED, _PARTLY = 0.01, 0.2  # of drops, with all steps done, and without those that recover quality


@dataclass
class Climb:
    """One candidate on its way up.

    Attributes:
        lane: Whose runtime it is for.
        form: What candidates have in common that cost the same.
        seen: What the rungs so far predicted.
        kinds: Which margins these predictions are held against: (rung, axis) -> margin.
    """

    lane: str
    form: Hashable = None
    seen: list[Prediction] = field(default_factory=list)
    kinds: dict[tuple[Rung, str], Margin] = field(default_factory=dict)


class Ladder:
    """Predicts candidates and tells which of them are no use.

    Args:
        lanes: The original on each runtime.
        baseline: The first one's twin.
        indices: The scored examples that select; None for all.
        budget: The limits.
        prefer: What is best within them.
        confident: Hold the upper end of the drop's interval against its limit.
        example_s: Seconds of a float forward pass of one example; None: not known.
        prices: Whether the target's table of prices may be measured.
        widths: Whether layers may be measured at several widths.
        forecasters: Who forecasts for each runtime; None: the engine's own.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        baseline: Measurement,
        indices: np.ndarray | None,
        budget: Budget,
        prefer: Preference,
        *,
        confident: bool = False,
        example_s: float | None = None,
        prices: bool = True,
        widths: bool = False,
        forecasters: Mapping[str, Forecaster] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lanes = {lane.name: lane for lane in lanes}
        self._first = lanes[0]
        self._forecasters = forecasters or {
            lane.name: Forecaster(lane.run, lane.scales.twin.bytes, prices=prices, widths=widths)
            for lane in lanes
        }
        self._baseline = baseline
        self._budget, self._prefer, self._confident = budget, prefer, confident
        self._picked = picked(self._first.run.data, indices, example_s)
        self._margins = Margins()
        self._alike: dict[Hashable, Measurement] = {}  # by what they have in common
        self._clock = clock
        self._counts: dict[Rung, int] = dict.fromkeys(_RUNGS, 0)
        self._drops: dict[Rung, int] = dict.fromkeys(_RUNGS, 0)
        self._spent: dict[Rung, float] = dict.fromkeys(_RUNGS, 0.0)

    # ---- the rungs

    def cost(self, climb: Climb, model: Model) -> None:
        """What shapes and formats tell."""
        began = self._clock()
        lane, found = self._lanes[climb.lane], self._forecasters[climb.lane].of(model)
        climb.kinds |= {
            ("cost", "bytes"): self._margin("cost", "bytes", _BYTES, climb.lane, found.form),
            ("cost", "latency_ratio"): self._margin(
                "cost",
                "latency_ratio",
                _PRICED if found.priced else _BY_MACS,
                climb.lane,
                found.form,
                found.priced,
            ),
        }
        climb.form = climb.lane, found.bytes, found.macs, found.form
        self._tell(climb, _cost(found, lane.handicap.median, self._clock() - began))

    def quality(self, climb: Climb, model: Model, left_out: Sequence[str], *, recovered: bool) -> None:
        """What the simulated network loses on a few examples.

        Args:
            climb: The candidate.
            model: What its steps made, but for those that take long.
            left_out: Names of the methods that were left out, or done in part.
            recovered: Whether they were done in part.
        """
        if self._picked is None:
            return
        began = self._clock()
        rung: Rung = "recovered" if recovered else "simulated"
        lane = self._lanes[climb.lane]
        if lane.run.hands is not None:
            lost = lane.run.hands.simulated_drop(lane.run, model.key, self._picked.tolist())
        else:
            lost = simulated_drop(lane, model, self._picked)
        spread = _PARTLY if left_out else _SIMULATED
        climb.kinds[rung, "quality_drop"] = self._margin(
            rung, "quality_drop", spread, climb.lane, tuple(left_out)
        )
        self._tell(climb, Prediction(rung=rung, quality_drop=lost, seconds=self._clock() - began))

    @property
    def scores(self) -> bool:
        """Whether the quality of a simulated network can be told."""
        return self._picked is not None

    def quality_matters(self, climb: Climb, trials: Sequence[Trial]) -> bool:
        """Whether any drop at all would be a reason to go no further; always while nothing was learned."""
        measured = _accepted(trials)
        if not measured or not self.scores:
            return self.scores
        worst = self.at_best(climb, [seen for _, seen in measured])
        worst = worst.model_copy(update={"quality_drop": 1.0, "quality_drop_ci95": (1.0, 1.0)})
        return self._hopeless(worst, measured) is not None

    def add_seconds(self, climb: Climb, seconds: float) -> None:
        """What the steps before a look took: they are part of the look."""
        last = climb.seen[-1]
        climb.seen[-1] = last.model_copy(update={"seconds": last.seconds + seconds})
        self._spent[last.rung] += seconds

    def _margin(self, rung: Rung, axis: str, spread: float, *kind: object) -> Margin:
        return self._margins.of((rung, axis, *kind), spread, factor=axis != "quality_drop")

    def _tell(self, climb: Climb, prediction: Prediction) -> None:
        climb.seen.append(prediction)
        self._counts[prediction.rung] += 1
        self._spent[prediction.rung] += prediction.seconds

    # ---- judging

    def verdict(self, climb: Climb, trials: Sequence[Trial]) -> str | None:
        """Why a candidate goes no further, as a sentence; None: it does.

        Args:
            climb: What was predicted.
            trials: What was measured so far.
        """
        measured = _accepted(trials)
        if not measured or not climb.seen:
            return None
        rung = climb.seen[-1].rung
        reason = self._hopeless(self.at_best(climb, [seen for _, seen in measured]), measured)
        if reason is None:
            return None
        self._drops[rung] += 1
        return f"by its {_NAMES[rung]} {reason}"

    def _hopeless(self, best: Measurement, measured: Sequence[tuple[Trial, Measurement]]) -> str | None:
        return hopeless(best, measured, self._baseline, self._budget, self._prefer, confident=self._confident)

    def at_best(self, climb: Climb, measured: Sequence[Measurement]) -> Measurement:
        """The best measurement that the predictions allow; what none of them tells is None."""
        best: dict[str, float] = {}
        for prediction in climb.seen:  # a later rung knows better
            for axis in ("quality_drop", "bytes", "latency_ratio"):
                value, margin = getattr(prediction, axis), climb.kinds.get((prediction.rung, axis))
                if value is not None and margin is not None:
                    best[axis] = margin.best(value)
        alike = self._alike.get(climb.form)
        for axis in ("bytes", "latency_ratio"):
            value = None if alike is None else getattr(alike, axis)
            if value is not None and axis in best:
                best[axis] = max(best[axis], _AS_GOOD * value)
        ratio, lost, size = (best.get(axis) for axis in ("latency_ratio", "quality_drop", "bytes"))
        scale = seconds_of_ratio(measured)
        latency = None if ratio is None or scale is None else ratio * scale
        return Measurement(
            quality_drop=lost,
            quality_drop_ci95=None if lost is None else (lost, lost),
            bytes=None if size is None else math.floor(size),
            latency_ratio=ratio,
            latency_s=None if latency is None else Latency(median=latency, q1=latency, q3=latency),
            resolved=True,
        )

    def expected(self, climb: Climb) -> Measurement | None:
        """The most probable figures of what was not measured, for the sampler; None: too little is known."""
        likely: dict[str, float] = {}
        for prediction in climb.seen:
            for axis in ("quality_drop", "bytes", "latency_ratio"):
                value, margin = getattr(prediction, axis), climb.kinds.get((prediction.rung, axis))
                if value is not None and margin is not None:
                    likely[axis] = margin.corrected(value)
        if len(likely) < 3:
            return None
        return Measurement(
            quality_drop=likely["quality_drop"],
            bytes=round(likely["bytes"]),
            latency_ratio=likely["latency_ratio"],
        )

    # ---- learning

    def learn(self, climb: Climb, seen: Measurement) -> None:
        """What became of a candidate that was measured."""
        if climb.form is not None:
            self._alike[climb.form] = seen
        for prediction in climb.seen:
            for axis in ("quality_drop", "bytes", "latency_ratio"):
                predicted, measured = getattr(prediction, axis), getattr(seen, axis)
                margin = climb.kinds.get((prediction.rung, axis))
                known = predicted is not None and measured is not None and math.isfinite(measured)
                if known and margin is not None:
                    margin.learn(predicted, measured)

    def rows(self, trials: Sequence[Trial]) -> list[RungRow]:
        """The rungs and how well they predicted."""
        found = []
        for rung in _RUNGS:
            missed = {
                axis: self._margins.missed(where=(rung, axis))
                for axis in ("quality_drop", "bytes", "latency_ratio")
            }
            found.append(
                RungRow(
                    name=rung,
                    candidates=self._counts[rung],
                    dropped=self._drops[rung],
                    seconds=self._spent[rung],
                    compared=max(map(len, missed.values())),
                    drop_error=median(missed["quality_drop"]),
                    bytes_error=median(missed["bytes"]),
                    latency_error=median(missed["latency_ratio"]),
                )
            )
        last = [trial for trial in trials if trial.state != "dropped"]
        spent = sum(trial.seconds - sum(one.seconds for one in trial.predicted) for trial in last)
        return [*found, RungRow(name="measured", candidates=len(last), seconds=max(spent, 0.0))]


_NAMES: Mapping[Rung, str] = {
    "cost": "shapes and formats",
    "simulated": "simulation",
    "recovered": "simulation after a short recovery",
}


def parts(methods: Sequence[Method]) -> list[int]:
    """Which steps take long: those that can be done in part."""
    return [index for index, method in enumerate(methods) if shortened(method) is not None]


def shortened(method: Method) -> Method | None:
    """A share of a long step; None where it is quick, or changes what later steps may vary (supernet)."""
    return None if method.kind == "structure" else method.part(SHARE)


def picked(data: Data, indices: np.ndarray | None, example_s: float | None) -> np.ndarray | None:
    """The examples that are simulated, evenly among those that select; None: these cannot be scored apart."""
    if data.scored is None or type(data).score is not Data.score:
        return None
    whole = np.arange(len(data.scored)) if indices is None else indices
    count = _EXAMPLES
    if example_s:
        count = int(np.clip(_SIMULATED_S / (_PASSES * example_s), _FEWEST, _EXAMPLES))
    evenly = np.linspace(0, len(whole) - 1, min(count, len(whole))).astype(int)
    found: np.ndarray = whole[evenly]
    return found


def simulated_drop(lane: Lane, model: Model, indices: np.ndarray) -> float:
    """What the simulated network loses against the original's artifact on these scored examples."""
    run, twin = lane.run, lane.scales.twin_scored
    metric = run.data.metric
    scored = run.data.score(as_run(simulate(model)), indices, as_run(simulate(run.original)))
    return drop_of_rows(metric, twin.rows[metric.name][indices], scored[metric.name])


def seconds_of_ratio(measured: Sequence[Measurement]) -> float | None:
    """Seconds of the original, by those of what was measured beside it; None: not known."""
    known = [
        seen.latency_s.median / seen.latency_ratio
        for seen in measured
        if seen.latency_s is not None and seen.latency_ratio
    ]
    return median(known)


def hopeless(
    best: Measurement,
    measured: Sequence[tuple[Trial, Measurement]],
    baseline: Measurement,
    budget: Budget,
    prefer: Preference,
    *,
    confident: bool = False,
) -> str | None:
    """Why a candidate is of no use even at its best; None: it may be.

    Args:
        best: Its figures at best; what is not known is None, and taken to be as good as can be.
        measured: The trials so far that were accepted, with what was seen.
        baseline: The twin.
        budget: The limits.
        prefer: What is best within them.
        confident: Hold the upper end of the drop's interval against its limit.
    """
    broken = [one for one in violations(budget, best, confident) if one.value is not None]
    least = min(sum(map(excess, violations(budget, seen, confident))) for _, seen in measured)
    if sum(map(excess, broken)) > least:
        worst = max(broken, key=excess)
        said = f"{figure(worst.axis, worst.value or 0.0)} at best, asked {figure(worst.axis, worst.limit)}"
        return f"it breaks the limit of {worst.axis.removesuffix('_s').replace('_', ' ')}: {said}"
    worse = rejection(best, baseline, budget, prefer)
    if worse is not None:
        return f"it is {worse} at best"
    kept = [pair for pair in measured if not violations(budget, pair[1], confident)]
    for trial, seen in measured:
        if _beats(seen, best):
            return f"it is no better than trial {trial.number} on any axis"
    if budget.quality_drop is None:
        return None
    for trial, seen in kept:
        if _as_good(seen, best, budget.quality_drop, prefer):
            return f"it is no better than trial {trial.number} on any axis"
    if prefer == "quality" or None in (best.bytes, best.latency_ratio):
        return None
    for trial, seen in kept:
        alike = seen.model_copy(update={"packed_bytes": None})  # which nothing foresees
        if score(alike, prefer, baseline)[0] <= score(best, prefer, baseline)[0]:
            return f"it cannot be better than trial {trial.number}, which keeps every limit"
    return None


def _accepted(trials: Sequence[Trial]) -> list[tuple[Trial, Measurement]]:
    """What may be an answer, with what was seen."""
    return [
        (trial, trial.measurement)
        for trial in trials
        if trial.state == "measured" and trial.measurement is not None
    ]


def _beats(seen: Measurement, best: Measurement) -> bool:
    """Whether a measured artifact is at least as good on every axis, and better on one."""
    pairs = _pairs(seen, best)
    if any(one is None or other is None for one, other in pairs):
        return False
    return all(one <= other for one, other in pairs) and any(one < other for one, other in pairs)


def _as_good(seen: Measurement, best: Measurement, limit: float, prefer: Preference) -> bool:
    """Whether a candidate is better by next to nothing than a measured artifact that keeps every limit.

    That is by less than a part of the limit and of what the artifact costs (epsilon dominance: Laumanns
    et al. 2002, doi:10.1162/106365602760234108), but for the axis that is preferred. No candidate is foreseen
    to be better than the original.
    """
    pairs = _pairs(seen, best)
    if any(one is None or other is None for one, other in pairs):
        return False
    (drop, lost), (size, smaller), (ratio, faster) = pairs
    bytes_even = 1.0 if prefer == "bytes" else 1 + _EVEN
    latency_even = 1.0 if prefer == "latency" else 1 + _EVEN
    return bool(
        drop <= max(lost, 0.0) + _EVEN * limit
        and size < smaller * bytes_even
        and ratio < faster * latency_even
    )


def _pairs(seen: Measurement, best: Measurement) -> list[tuple[Any, Any]]:
    return [(getattr(seen, axis), getattr(best, axis)) for axis in ("quality_drop", "bytes", "latency_ratio")]


def _cost(found: Forecast, handicap: float, seconds: float) -> Prediction:
    return Prediction(
        rung="cost",
        bytes=found.bytes,
        latency_ratio=found.ratio * handicap,
        macs=found.macs,
        seconds=seconds,
    )
