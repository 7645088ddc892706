"""What a result says, in rows of before and after and in sentences, wherever it is told."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from featherweight import beside, figures
from featherweight.figures import MISSING, Row, Scale, on_axis, quotient, scale_of, size
from featherweight.outcome import (
    AXES,
    EVEN,
    Alternative,
    Axis,
    KernelRow,
    Measurement,
    Move,
    Result,
    RuntimeRow,
    Trial,
    Violation,
    score,
)

_TOLD = 4  # relaxations in a sentence
_FACTORS = {
    "balanced": "product of latency ratio and size ratio",
    "latency": "latency ratio",
    "bytes": "size ratio",
    "quality": "quality drop",
}


RUNTIME_HEADERS = (
    *("runtime", "size fp32", "latency fp32", "fp32 error", "size", "latency", "/ its fp32"),
    *("agreement", "SQNR", "to simulation", ""),
)


def runtime_cells(row: RuntimeRow) -> list[str]:
    """One runtime of a search under ``RUNTIME_HEADERS``; latencies against the original on the first one."""
    told = "chosen" if row.chosen else row.reason
    return [
        row.runtime,
        size(row.twin_bytes),
        _between(row.twin_ratio, row.twin_ratio_ci95),
        MISSING if row.float_error is None else f"{row.float_error:.1e}",
        size(row.bytes),
        _between(row.latency_ratio, row.latency_ratio_ci95),
        _between(row.own_ratio, row.own_ratio_ci95),
        figures.percent(row.agreement),
        figures.decibel(row.sqnr_db),
        figures.decibel(row.parity_db),
        told,
    ]


def _between(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None:
        return figures.ratio(value)
    return f"{figures.ratio(value)} {figures.interval(interval)}"


def slow_kernels(result: Result) -> list[KernelRow]:
    """Steps of a call that were not fused, or not handed to fast kernels, the costliest first."""
    return [row for row in result.kernels if not row.fast]


def before_after(result: Result) -> list[Row]:
    """Every figure of the baseline and of what was chosen, in the order in which they matter."""
    old, new, scale = result.baseline, result.chosen, scale_of(result)
    drop = scale.change(new.quality_drop)
    if new.quality_drop_ci95 is not None:
        drop += f" {scale.interval(new.quality_drop_ci95)}"
    return [
        Row(_quality_label(result), scale.score(old.quality), scale.score(new.quality), drop),
        *task_rows(result),
        Row("Agreement with the original", MISSING, figures.percent(new.agreement)),
        Row("SQNR of the outputs", MISSING, figures.decibel(new.sqnr_db)),
        Row("Flipped predictions", MISSING, figures.flips(new)),
        _worst_class(new),
        *beside.summary(beside.Aside.of(result)),
        _compared("Size", size, old.bytes, new.bytes),
        _compared("Bits of a weight (mean, scales included)", figures.bits, old.weight_bits, new.weight_bits),
        _compared("Download size", size, old.packed_bytes, new.packed_bytes),
        Row(
            "Latency (median, quartiles)",
            figures.latency(old.latency_s),
            figures.latency(new.latency_s),
            _latency_change(new),
        ),
        _compared("Throughput", figures.rate, old.throughput, new.throughput),
        _compared("Memory above the runtime", size, old.memory_bytes, new.memory_bytes),
        _compared("Memory of the process (peak)", size, old.peak_rss_bytes, new.peak_rss_bytes),
        _compared("Energy of a call", figures.joules, old.energy_j, new.energy_j),
        _compared("MACs", figures.count, old.macs, new.macs),
        _compared("Parameters", figures.count, old.params, new.params),
    ]


def task_rows(result: Result) -> list[Row]:
    """Each of several tasks before and after, with the limit of its own where there is one."""
    before, limits = {task.name: task for task in result.baseline.tasks}, result.budget.drops or {}
    rows = []
    for task in result.chosen.tasks:
        scale, was = Scale(task.bounded), before.get(task.name)
        change = f"{scale.change(task.quality_drop)} {scale.interval(task.quality_drop_ci95)}"
        if task.name in limits:
            change += f", at most {scale.drop(limits[task.name])}"
        label = f"Task {task.name} ({task.metric})"
        rows.append(
            Row(label, scale.score(None if was is None else was.quality), scale.score(task.quality), change)
        )
    return rows


def _quality_label(result: Result) -> str:
    if result.chosen.tasks:
        return "Quality (mean of the tasks; the change is the worst one's)"
    return f"Quality ({result.metric})"


def _compared(
    label: str, write: Callable[[float | None], str], before: float | None, after: float | None
) -> Row:
    return Row(label, write(before), write(after), _ratio(after, before))


def _worst_class(new: Measurement) -> Row:
    worst = new.worst_class
    if worst is None:
        return Row("Worst class", MISSING, MISSING)
    return Row("Worst class", MISSING, worst.label, Scale(True).change(worst.drop))


def terminal_table(result: Result) -> list[tuple[str, str, str, str]]:
    """Rows of (label, before, after, change) for the command line: the figures that were measured."""
    return [(row.label, row.before, row.after, row.change) for row in before_after(result) if row.seen]


def _ratio(after: float | None, before: float | None) -> str:
    return figures.ratio(quotient(after, before))


def _latency_change(new: Measurement) -> str:
    text = figures.ratio(new.latency_ratio)
    if new.latency_ratio_ci95 is not None:
        text += f" {figures.interval(new.latency_ratio_ci95)}"
    return f"{text}, unresolved" if new.resolved is False else text


def explain(result: Result) -> list[str]:
    """What came out and why this artifact was chosen, in sentences."""
    return [
        verdict(result),
        *gains(result),
        *blockers(result),
        *doubts(result),
        *choice(result),
        *effort(result),
    ]


def effort(result: Result) -> list[str]:
    """How much was tried in the time, and what more time would add; nothing where a recipe was given."""
    done = result.effort
    if done is None:
        return []
    tried = ", ".join(f"{way.name} ({way.trials})" for way in done.ways if way.trials)
    left = ", ".join(way.name for way in done.ways if not way.trials)
    sentence = (
        f"Effort {done.level}: {figures.seconds(done.seconds)} of {figures.seconds(done.time_s)}, "
        f"where a pass of one example takes {figures.seconds(done.example_s)}"
    )
    if tried:
        sentence += f"; ways tried, with their trials: {tried}"
    if left:
        sentence += f"; not tried: {left}"
    return [f"{sentence}.", *([f"{done.longer[0].upper()}{done.longer[1:]}."] if done.longer else [])]


def verdict(result: Result) -> str:
    """One sentence: met, met with confidence, not met."""
    return ": ".join(verdict_parts(result)) + "."


def verdict_parts(result: Result) -> tuple[str, str]:
    """The verdict in a word or three, and what it means."""
    if not result.met:
        if result.blocking and not broken_axes(result):
            return "Not met", "the best artifact so far is worse than the original where it counts"
        return "Not met", "the best artifact so far does not keep every limit"
    if all(getattr(result.budget, axis) is None for axis in AXES) and not result.budget.drops:
        return "Met", "nothing was limited"
    if result.budget.quality_drop is None:
        return "Met", "the measured artifact keeps every limit"
    if result.met_confident:
        return (
            "Met with confidence",
            "the measured artifact keeps every limit, even at the far end of its drop's 95% interval",
        )
    return "Met", "the measured artifact keeps every limit, its quality by the point estimate"


def broken_axes(result: Result) -> set[Axis]:
    """Axes whose limit blocks; a violation may also hold the artifact against the original."""
    return {item.axis for item in result.blocking if _is_asked(result, item)}


def _is_asked(result: Result, item: Violation) -> bool:
    """Whether the limit is one of the budget's."""
    own = (result.budget.drops or {}).values() if item.axis == "quality_drop" else ()
    return item.limit == getattr(result.budget, item.axis) or item.limit in own


def gains(result: Result) -> list[str]:
    """What the artifact is against the original."""
    new = result.chosen
    smaller = figures.gain(quotient(new.bytes, result.baseline.bytes), "smaller", "larger")
    faster = figures.gain(new.latency_ratio, "faster", "slower")
    parts = [part for part in (smaller, faster) if part != MISSING]
    if not parts:
        return []
    sentence = f"Measured through {new.runtime}, the artifact is {' and '.join(parts)} than the original"
    if new.quality_drop is not None:
        change = scale_of(result).change(new.quality_drop).replace("no change", "unchanged")
        whose = "the task that loses most" if new.tasks else f"its {result.metric}"
        sentence += f"; {whose} is {change}"
    return [f"{sentence}."]


def blockers(result: Result) -> list[str]:
    """The limits that are not kept, then what it would take to keep them."""
    scale, sentences = scale_of(result), []
    for broken in result.blocking:
        name, reason = figures.AXIS_NAMES[broken.axis].capitalize(), broken.reason.rstrip(".")
        if not _is_asked(result, broken):  # held against the original, not a limit
            sentences.append(f"{name} blocks: {reason}.")
            continue
        value = f"{on_axis(broken.axis, broken.value, scale)}, " if broken.value is not None else ""
        limit = on_axis(broken.axis, broken.limit, scale)
        sentences.append(f"{name} blocks: {value}{reason or 'above the limit'}; the limit is {limit}.")
    return sentences + relaxations(result)


def relaxations(result: Result) -> list[str]:
    """What it would take: '4.1 ms needs 0.3 points more drop (trial 2), or 210 KB more (trial 5).'

    Those that leave the limit that blocks where it is come first.
    """
    if not result.relaxations:
        told = result.relaxation
        return [] if told is None else [f"Cheapest relaxation: {told.text.rstrip('.')} (trial {told.trial})."]
    scale, held = scale_of(result), broken_axes(result)
    keep = [one for one in result.relaxations if len(held) == 1 and held.isdisjoint(_axes(one))]
    move = [one for one in result.relaxations if one not in keep]
    sentences = []
    if keep:
        (axis,) = held
        limit = on_axis(axis, getattr(result.budget, axis), scale)
        name = figures.AXIS_NAMES[axis].capitalize()
        sentences.append(f"{name} {limit} needs {_either(keep, scale)}.")
    if move:
        begin = "With other limits it would take" if keep else "To keep every limit it would take"
        sentences.append(f"{begin} {_either(move, scale)}.")
    return sentences


def _axes(one: Alternative) -> set[Axis]:
    return {move.axis for move in one.moves}


def _either(many: list[Alternative], scale: Scale) -> str:
    """A few of them with 'or' between; all are in result.json."""
    told = [
        f"{' and '.join(_more(move, scale) for move in one.moves)} (trial {one.trial})"
        for one in many[:_TOLD]
    ]
    rest = len(many) - len(told)
    return ", or ".join(told) + (f", or one of {rest} more in result.json" if rest else "")


def _more(move: Move, scale: Scale) -> str:
    """'0.30 points more drop'."""
    noun = {"quality_drop": " drop", "latency_s": " latency", "memory_bytes": " memory"}.get(move.axis, "")
    return f"{on_axis(move.axis, move.by, scale)} more{noun}"


def doubts(result: Result) -> list[str]:
    """Where the measurement itself leaves a question open."""
    new, scale, sentences = result.chosen, scale_of(result), []
    if new.runtime == "torch":
        sentences.append(
            "The torch runtime simulates the formats: quality is what they do to the model, "
            "size and latency are those of float PyTorch."
        )
    if new.resolved is False:
        sentences.append(
            "The latency is unresolved: its ratio's 95% interval stayed too wide, "
            "so it cannot satisfy a latency limit."
        )
    limit, drop, bounds = result.budget.quality_drop, new.quality_drop, new.quality_drop_ci95
    if limit is None or drop is None or bounds is None or not bounds[0] <= limit < bounds[1]:
        return sentences
    if drop <= limit:
        sentence = (
            f"The drop's 95% interval ends at {scale.drop(bounds[1])}, above the limit of {scale.drop(limit)}"
        )
    else:
        sentence = (
            f"The drop's 95% interval begins at {scale.drop(bounds[0])}, within the limit of "
            f"{scale.drop(limit)}, so it is not sure that the limit is broken"
        )
    needed, scored = result.examples_needed, result.examples.get("scored")
    if needed is not None and isinstance(scored, int):
        sentence += (
            f"; some {needed:,} scored examples instead of {scored:,} would settle it if the drop stays"
        )
    return [*sentences, f"{sentence}."]


def choice(result: Result) -> list[str]:
    """How the chosen trial was found: how many were tried, how many fit, which score decided."""
    trials = result.trials
    chosen = next((trial for trial in trials if trial.chosen), None)
    if not trials:
        return []
    states = Counter(trial.state for trial in trials)
    within = [trial for trial in trials if trial.within_budget and trial.state == "measured"]
    if len(trials) == 1:
        sentences = ["One recipe was tried."]
    else:
        kinds = ", ".join(
            f"{states[state]} {state}"
            for state in ("measured", "rejected", "failed", "dropped")
            if states[state]
        )
        keep = f"{len(within)} of them keep{'s' if len(within) == 1 else ''} every limit"
        sentences = [
            f"{len(trials)} recipes were tried: {kinds}; {keep if within else 'none keeps every limit'}."
        ]
    if chosen is None or chosen.measurement is None:
        return sentences
    own = _score(result, chosen)
    if own is None:
        return [*sentences, f"Trial {chosen.number} was chosen."]
    rivals = [
        (score, trial.number)
        for trial in (within or trials)
        if trial is not chosen and trial.state == "measured" and (score := _score(result, trial)) is not None
    ]
    reason = f"its {_FACTORS[result.prefer]} is {_written(result, own)}"
    if chosen.measurement.quality_drop != result.chosen.quality_drop:
        sentences.append(
            "Trials are compared on one half of the examples; the other half gives the figures above."
        )
    if not result.met:
        return [*sentences, f"Trial {chosen.number} is the best so far: {reason}."]
    if rivals:
        best, number = min(rivals)
        if own <= best:
            reason += f", the smallest among them; trial {number} is next with {_written(result, best)}"
        elif own <= best * (1 + EVEN) and chosen.measurement.sqnr_db is not None:
            reason += (
                f", within {100 * EVEN:.0f}% of the smallest, {_written(result, best)} of trial {number}, "
                "and its outputs are nearest to the original's "
                f"({figures.decibel(chosen.measurement.sqnr_db)})"
            )
    return [*sentences, f"Trial {chosen.number} was chosen: {reason}."]


def _score(result: Result, trial: Trial) -> float | None:
    """What the search minimises among the artifacts within the budget."""
    if trial.measurement is None:
        return None
    found = score(trial.measurement, result.prefer, result.baseline)[0]
    return found if math.isfinite(found) else None


def _written(result: Result, score: float) -> str:
    return scale_of(result).drop(score) if result.prefer == "quality" else f"{score:.3f}"
