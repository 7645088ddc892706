"""Which measured artifact is best, what it breaks, and what it would take: pure functions of measurements.

Best is, among the artifacts within budget, the smallest latency ratio x bytes
ratio, unless another preference is given; among those that are even within the noise
of measuring, the one whose outputs are nearest to the original's. Only measured figures count; a latency
that the measuring could not resolve satisfies no latency budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from featherweight.outcome import (
    AXES,
    EVEN,
    Alternative,
    Axis,
    Budget,
    Measurement,
    Move,
    Preference,
    Relaxation,
    Trial,
    Violation,
    or_infinite,
)
from featherweight.outcome import score as score

ABOVE = "above the limit"
UNRESOLVED = "unresolved"
UNMEASURED = "not measured"
_UPPER_END = "above the limit at the upper end of the 95 % interval"

_NOTHING = 1e-12  # figures below it are written as zero
_UNRESOLVED_EXCESS = 0.05  # the width of the interval from which a latency counts as unresolved
_MEMORY_NOISE = 0.05  # pages come in steps and by chance: so much more is not yet worse than the twin
_SMALLEST_LIMIT: Mapping[Axis, float] = {  # what an excess is divided by where the limit is zero
    "quality_drop": 1e-3,
    "bytes": 1.0,
    "latency_s": 1e-6,
    "memory_bytes": 1.0,
}
_NAMES: Mapping[Axis, str] = {
    "quality_drop": "quality drop",
    "bytes": "size",
    "latency_s": "latency",
    "memory_bytes": "memory",
}


@dataclass(frozen=True)
class Verdict:
    """What is handed back.

    Attributes:
        trial: The best within budget, else the best so far; None: nothing was measured.
        met: Whether it keeps every limit.
        blocking: The limits that it does not keep.
        relaxation: The cheapest single limit to move so that a measured artifact would do.
    """

    trial: Trial | None
    met: bool
    blocking: tuple[Violation, ...] = ()
    relaxation: Relaxation | None = None


def violations(budget: Budget, measurement: Measurement, confident: bool = False) -> list[Violation]:
    """The limits that a measurement does not keep.

    Args:
        budget: The limits.
        measurement: What was seen.
        confident: Hold the upper end of the drop's 95 % interval against its limit, not the point.
    """
    found = []
    worst = _worst_task(budget, measurement, confident)
    for axis in AXES:
        limit = getattr(budget, axis)
        if axis == "quality_drop" and worst is not None:
            found.append(worst)
            continue
        if limit is None:
            continue
        value, reason = measurement.value(axis), ABOVE
        if axis == "quality_drop" and confident:
            interval = measurement.quality_drop_ci95
            value, reason = (None if interval is None else interval[1]), _UPPER_END
        if value is None or math.isnan(value):
            found.append(Violation(axis=axis, limit=limit, value=None, reason=UNMEASURED))
        elif axis == "latency_s" and not measurement.resolved:
            found.append(Violation(axis=axis, limit=limit, value=value, reason=UNRESOLVED))
        elif value > limit:
            found.append(Violation(axis=axis, limit=limit, value=value, reason=reason))
    return found


def _worst_task(budget: Budget, measurement: Measurement, confident: bool) -> Violation | None:
    """Of tasks with a limit each, the one that breaks its own most; None: all are kept."""
    broken = []
    for task in measurement.tasks:
        own = (budget.drops or {}).get(task.name, budget.quality_drop)
        seen = task.quality_drop_ci95[1] if confident and task.quality_drop_ci95 else task.quality_drop
        if own is not None and budget.drops and seen > own:
            end = _UPPER_END if confident else ABOVE
            broken.append(
                Violation(axis="quality_drop", limit=own, value=seen, reason=f"{end} of task '{task.name}'")
            )
    return max(broken, key=excess, default=None)


def excess(violation: Violation) -> float:
    """By how much a limit is broken, relative to it; infinite where nothing was measured."""
    if violation.value is None:
        return math.inf
    by = (violation.value - violation.limit) / max(violation.limit, _SMALLEST_LIMIT[violation.axis])
    return max(by, _UNRESOLVED_EXCESS) if violation.reason == UNRESOLVED else by


def within(trials: Sequence[Trial], budget: Budget, confident: bool = False) -> list[Trial]:
    """Those that were measured, may be an answer and keep every limit."""
    return [
        trial
        for trial in trials
        if trial.state == "measured"
        and trial.measurement is not None
        and not sum(map(excess, violations(budget, trial.measurement, confident)))
    ]


def rejection(
    measurement: Measurement, baseline: Measurement, budget: Budget, prefer: Preference
) -> str | None:
    """Why an artifact is no answer though it may keep the limits: it is worse than its twin.

    Worse counts on an axis that is budgeted or preferred; the quality is held against its limit only,
    since the twin's drop is zero by definition. Balanced means bytes and latency together: what is
    gained on one may be paid with the other, unless a limit stands there.

    Returns:
        A sentence such as 'slower than the original: latency ratio 1.21 [1.18, 1.24]', or None.
    """
    worse = _worse(measurement, baseline, budget, prefer)
    return worse[0].reason if worse else None


def choose(
    trials: Sequence[Trial],
    baseline: Measurement,
    budget: Budget,
    prefer: Preference,
    confident: bool = False,
) -> Verdict:
    """The best trial within budget; without one the best so far, what blocks it, and what would help.

    The best so far breaks its limits least (sum of the relative excesses). A rejected trial is
    handed back only when no other was measured.

    Args:
        trials: In any state; failed ones are passed over.
        baseline: The twin's measurement.
        budget: The limits.
        prefer: What is made small among the artifacts within budget.
        confident: As in :func:`violations`.
    """

    def rank(trial: Trial, seen: Measurement) -> tuple[float, tuple[float, ...], int]:
        total = sum(excess(item) for item in violations(budget, seen, confident))
        return total, score(seen, prefer, baseline), trial.number

    measured = [(trial, trial.measurement) for trial in trials if trial.measurement is not None]
    accepted = [(trial, seen) for trial, seen in measured if trial.state == "measured"]
    ranked = [
        (rank(trial, seen), trial, seen)
        for trial, seen in accepted or [pair for pair in measured if pair[0].state == "rejected"]
    ]
    if not ranked:
        return Verdict(None, met=False)
    # No excess means within budget, so one order holds both rules; a rank ends in the trial's number.
    first = min(rank for rank, _, _ in ranked)
    even = [item for item in ranked if _is_even(item[0], first, prefer)]
    _, best, seen = min(even, key=lambda item: (-fidelity(item[2]), item[0]))
    blocking = violations(budget, seen, confident)
    if best.state == "rejected":
        blocking = blocking or _worse(seen, baseline, budget, prefer)
    if not blocking and best.state == "measured":
        return Verdict(best, met=True)
    return Verdict(
        best, met=False, blocking=tuple(blocking), relaxation=relaxation(trials, budget, confident)
    )


def fidelity(measurement: Measurement) -> float:
    """How near the outputs are to the original's, larger is nearer: SQNR, else agreement.

    Both tell artifacts apart long before a score of right and wrong does, whose noise is larger.
    """
    seen = measurement.sqnr_db if measurement.sqnr_db is not None else measurement.agreement
    return -math.inf if seen is None or math.isnan(seen) else seen


def _is_even(
    rank: tuple[float, tuple[float, ...], int],
    first: tuple[float, tuple[float, ...], int],
    prefer: Preference,
) -> bool:
    """Whether a trial within budget is as good as the best one, but for noise."""
    if rank == first:
        return True
    even = rank[1][0] <= first[1][0] * (1 + EVEN)
    return rank[0] == first[0] == 0 and prefer != "quality" and math.isfinite(first[1][0]) and even


def relaxation(trials: Iterable[Trial], budget: Budget, confident: bool = False) -> Relaxation | None:
    """The cheapest single limit to move, relative to it, so that a measured artifact would do.

    None where every artifact breaks several limits, or one that no number would help
    (an unresolved latency, a figure that was not measured).
    """
    candidates = []
    for trial in trials:
        if trial.state != "measured" or trial.measurement is None:
            continue
        broken = violations(budget, trial.measurement, confident)
        if len(broken) == 1 and broken[0].value is not None and broken[0].reason != UNRESOLVED:
            candidates.append(
                (excess(broken[0]), trial.number, broken[0].value, broken[0], trial.measurement)
            )
    if not candidates:
        return None
    _, number, value, limit, seen = min(candidates, key=lambda item: item[:2])
    return Relaxation(
        axis=limit.axis, limit=value, trial=number, text=_relaxation_text(limit, value, seen, budget)
    )


def alternatives(trials: Iterable[Trial], budget: Budget, confident: bool = False) -> list[Alternative]:
    """What it would take: the limits to move so that one of the measured artifacts would do.

    One for each artifact that no other beats: none needs less on one axis and no more on the others.
    Those that move a single limit come first, each in the order of their cost, the sum of the relative
    moves. Artifacts that no number would help (an unresolved latency, a figure that was not measured)
    are passed over.
    """
    found: list[tuple[dict[Axis, float], int, list[Violation]]] = []
    for trial in trials:
        if trial.state != "measured" or trial.measurement is None:
            continue
        broken = violations(budget, trial.measurement, confident)
        if broken and all(item.value is not None and item.reason != UNRESOLVED for item in broken):
            found.append(({item.axis: excess(item) for item in broken}, trial.number, broken))
    points = [tuple(costs.get(axis, 0.0) for axis in AXES) for costs, _, _ in found]
    kept = [
        (len(broken), sum(costs.values()), number, broken)
        for index, (costs, number, broken) in enumerate(found)
        if not any(_dominates(other, points[index]) for other in points)
        and points.index(points[index]) == index
    ]
    return [
        _alternative(cost, number, broken)
        for _, cost, number, broken in sorted(kept, key=lambda one: one[:3])
    ]


def _alternative(cost: float, number: int, broken: Sequence[Violation]) -> Alternative:
    """E.g. 'a quality drop of 0.8 % (0.3 % more) and a size of 510 KB (210 KB more)'."""
    moves, said = [], []
    for item in broken:
        value = item.limit if item.value is None else item.value
        moves.append(Move(axis=item.axis, limit=value, by=value - item.limit))
        more = f"{figure(item.axis, value - item.limit)} more"
        at = " at the upper end of its 95 % interval" if item.reason == _UPPER_END else ""
        said.append(f"a {_NAMES[item.axis]} of {figure(item.axis, value)}{at} ({more})")
    return Alternative(moves=moves, trial=number, cost=cost, text=" and ".join(said))


def pareto_front(measurements: Sequence[Measurement]) -> list[int]:
    """Indices of the measurements that no other one beats on quality drop, bytes and latency at once.

    Latency is the ratio to the twin where every measurement has one, since that is what measuring at
    different times leaves comparable; else the median. A missing figure is worse than any other.
    """
    by_ratio = all(seen.latency_ratio is not None for seen in measurements)
    points = [
        (
            or_infinite(seen.quality_drop),
            or_infinite(seen.bytes),
            or_infinite(seen.latency_ratio if by_ratio else seen.value("latency_s")),
        )
        for seen in measurements
    ]
    return [
        index
        for index, point in enumerate(points)
        if not any(_dominates(other, point) for other in points) and point != (math.inf,) * 3
    ]


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _worse(
    measurement: Measurement, baseline: Measurement, budget: Budget, prefer: Preference
) -> list[Violation]:
    """The twin's figures as limits, on the axes where they count."""
    found = []
    slower = _slower(measurement, baseline)
    larger = _larger(measurement, baseline)
    if slower and (budget.latency_s is not None or prefer == "latency"):
        found.append(slower)
    if larger and (budget.bytes is not None or prefer == "bytes"):
        found.append(larger)
    if budget.memory_bytes is not None and measurement.memory_bytes and baseline.memory_bytes:
        memory, twin = measurement.memory_bytes, baseline.memory_bytes
        if memory > twin * (1 + _MEMORY_NOISE):
            text = f"{figure('memory_bytes', memory)} to {figure('memory_bytes', twin)}"
            reason = f"needs more memory than the original: {text}"
            found.append(Violation(axis="memory_bytes", limit=twin, value=memory, reason=reason))
    if not found and prefer == "balanced":
        product = score(measurement, prefer, baseline)[0]
        if math.isfinite(product) and product >= 1:
            found.append(_no_gain(measurement, baseline, product))
    return found


def _slower(measurement: Measurement, baseline: Measurement) -> Violation | None:
    ratio, interval = measurement.latency_ratio, measurement.latency_ratio_ci95
    if ratio is None or (interval[0] if interval else ratio) <= 1:  # within its interval it is no slower
        return None
    text = f"slower than the original: latency ratio {ratio:.2f}"
    if interval:
        text += f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return _against_twin("latency_s", measurement, baseline, text)


def _larger(measurement: Measurement, baseline: Measurement) -> Violation | None:
    if measurement.bytes is None or baseline.bytes is None or measurement.bytes <= baseline.bytes:
        return None
    text = (
        f"larger than the original: {figure('bytes', measurement.bytes)} to {figure('bytes', baseline.bytes)}"
    )
    return _against_twin("bytes", measurement, baseline, text)


def _no_gain(measurement: Measurement, baseline: Measurement, product: float) -> Violation:
    ratio = measurement.latency_ratio or 0.0
    size = or_infinite(measurement.size_ratio(baseline))
    text = f"latency ratio {ratio:.2f} x size ratio {size:.2f} is {product:.2f}"
    axis: Axis = "latency_s" if ratio >= size else "bytes"
    return _against_twin(axis, measurement, baseline, f"no gain over the original: {text}")


def _against_twin(axis: Axis, measurement: Measurement, baseline: Measurement, reason: str) -> Violation:
    limit, value = baseline.value(axis), measurement.value(axis)
    if limit is None:  # latencies of twins are told as a ratio, whose limit is 1
        limit, value = 1.0, measurement.latency_ratio
    return Violation(axis=axis, limit=limit, value=value, reason=reason)


def figure(axis: Axis, value: float) -> str:
    """A figure with its unit, three digits, rounded up so that it can be written as a limit."""
    scale, unit = 100.0, "%"
    if axis == "latency_s":
        scale, unit = next(
            (pair for pair in ((1.0, "s"), (1e3, "ms")) if abs(value) * pair[0] >= 1), (1e6, "us")
        )
    elif axis != "quality_drop":
        sizes = ((1e-9, "GB"), (1e-6, "MB"), (1e-3, "KB"))
        scale, unit = next((pair for pair in sizes if abs(value) * pair[0] >= 1), (1.0, "B"))
    return f"{_rounded_up(value * scale)} {unit}"


def _rounded_up(value: float) -> str:
    if abs(value) < _NOTHING:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    grain = 10.0**digits
    up = math.ceil(value * grain - 1e-6) / grain
    return f"{up:.{max(digits, 0)}f}".rstrip("0").rstrip(".") if digits > 0 else f"{up:.0f}"


def _relaxation_text(broken: Violation, value: float, seen: Measurement, budget: Budget) -> str:
    """E.g. 'latency 4.1 ms is reached with a quality drop of 0.8 % (asked 0.5 %)'."""
    asked = figure(broken.axis, broken.limit)
    if broken.reason == _UPPER_END:
        asked = f"upper end of the 95 % interval; asked {asked}"
    moved = f"a {_NAMES[broken.axis]} of {figure(broken.axis, value)} (asked {asked})"
    kept = [
        f"{_NAMES[axis]} {figure(axis, reached)}"
        for axis in AXES
        if axis != broken.axis
        and getattr(budget, axis) is not None
        and (reached := seen.value(axis)) is not None
    ]
    if not kept:
        return f"the nearest that was measured has {moved}"
    listed = ", ".join(kept[:-1]) + " and " + kept[-1] if len(kept) > 1 else kept[0]
    return f"{listed} {'are' if len(kept) > 1 else 'is'} reached with {moved}"
