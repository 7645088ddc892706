"""What each step of the chosen recipe bought and cost, as the rows of a waterfall: levels, changes, bars.

A bar spans from the figure before a step to the one after it; the first row is the original, the last one the
artifact. A step whose figure nobody knows has no bar, and the next one spans both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from featherweight import figures
from featherweight.figures import MISSING, scale_of
from featherweight.outcome import Measurement, Result, StepRow

Figure = Literal["quality_drop", "bytes", "latency_ratio"]
Kind = Literal["total", "better", "worse", "even", "none"]

FIGURES: tuple[tuple[Figure, str], ...] = (
    ("quality_drop", "Quality drop"),
    ("bytes", "Size"),
    ("latency_ratio", "Latency"),
)


@dataclass(frozen=True)
class Bar:
    """One figure of one row.

    Attributes:
        kind: ``total`` from zero; ``better``, ``worse`` or ``even`` after the step (latencies are even where
            their intervals overlap); ``none``: not known.
        left: Where it begins, as a share of the width.
        width: How long it is, as a share of the width.
        level: The figure after the step, written.
        change: What the step made of it, written; empty in a total.
    """

    kind: Kind
    left: float = 0.0
    width: float = 0.0
    level: str = MISSING
    change: str = ""


@dataclass(frozen=True)
class Row:
    """One row: the original, a step, or the artifact.

    Attributes:
        name: The method.
        parameters: In one line; empty without any.
        state: ``measured``, ``simulated`` or ``unknown``.
        note: Why it is not measured, and how many examples told.
        bars: One for each of ``FIGURES``.
    """

    name: str
    parameters: str
    state: str
    note: str
    bars: tuple[Bar, ...]


def waterfall(result: Result) -> list[Row]:
    """The rows, from the original to the artifact; none where no step is told."""
    if not result.steps:
        return []
    columns = [_column(result, name) for name, _ in FIGURES]
    bars = list(zip(*columns, strict=True))
    steps = [
        Row(_name(step, result), figures.plain(step.parameters, brackets=False), step.state, _note(step), row)
        for step, row in zip(result.steps, bars[1:-1], strict=True)
    ]
    return [
        Row("the original", "", "measured", "", bars[0]),
        *steps,
        Row("the artifact", "", "measured", "", bars[-1]),
    ]


def told(result: Result) -> list[str]:
    """The steps that made the largest differences, in sentences."""
    sentences = []
    for name, better, worse in (
        ("bytes", "took most of the size", ""),
        ("latency_ratio", "took most of the latency", ""),
        ("quality_drop", "gave most quality back", "cost most quality"),
    ):
        changes = _changes(result, name)  # type: ignore[arg-type]
        if not changes:
            continue
        _, write = _writer(result, name)  # type: ignore[arg-type]
        least = drop_noise(result) if name == "quality_drop" else 0.0
        for words, pick, sign in ((better, min, -1), (worse, max, 1)):
            change, step = pick(changes)
            if words and change * sign > least and write(abs(change)) != write(0.0):
                sentences.append(f"{step} {words} ({_signed(change, write)})")
    return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences]


def drop_noise(result: Result) -> float:
    """Below which a step's change of quality may be noise: half of the whole drop's interval."""
    bounds = result.chosen.quality_drop_ci95
    return 0.0 if bounds is None else (bounds[1] - bounds[0]) / 2


def _changes(result: Result, name: Figure) -> list[tuple[float, str]]:
    """What each step changed; steps between which the figure is not known are told together."""
    levels = _levels(result, name)
    before, together = levels[0], list[str]()
    found = []
    for step, after in zip(result.steps, levels[1:], strict=True):
        together.append(_name(step, result))
        if after is None:
            continue
        if before is not None:
            found.append((after - before, _listed(together)))
        before, together = after, []
    return found


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _levels(result: Result, name: Figure) -> list[float | None]:
    """The original's figure, then the one after each step."""
    starts: dict[Figure, float | None] = {
        "quality_drop": 0.0,
        "bytes": result.baseline.bytes,
        "latency_ratio": 1.0 if any(_value(step.measurement, name) for step in result.steps) else None,
    }
    return [starts[name], *(_value(step.measurement, name) for step in result.steps)]


def _value(seen: Measurement | None, name: Figure) -> float | None:
    return None if seen is None else getattr(seen, name)


def _column(result: Result, name: Figure) -> list[Bar]:
    level, write = _writer(result, name)
    levels = _levels(result, name)
    known = [value for value in levels if value is not None]
    lowest, highest = min([0.0, *known]), max([0.0, *known])
    extent = (highest - lowest) or 1.0

    def span(start: float, end: float) -> tuple[float, float]:
        left, right = sorted(((start - lowest) / extent, (end - lowest) / extent))
        return round(left, 4), round(right - left, 4)

    bars = [_total(levels[0], level, span)]
    before, last, gap = levels[0], "the original", False
    sure: tuple[float, float] | None = (1.0, 1.0)  # the interval of the latency before
    for step, after in zip(result.steps, levels[1:], strict=True):
        if after is None:
            bars.append(Bar("none"))
            gap = True
            continue
        if before is None:
            bars.append(Bar("none", level=level(after)))
        else:
            change = after - before
            now = None if step.measurement is None else step.measurement.latency_ratio_ci95
            even = write(abs(change)) == write(0.0)
            even |= name == "latency_ratio" and _overlap(sure, now)
            sure = now
            kind: Kind = "even" if even else "better" if change < 0 else "worse"
            since = f" since {last}" if gap else ""
            bars.append(Bar(kind, *span(before, after), level(after), _signed(change, write) + since))
        before, last, gap = after, _name(step, result), False
    return [*bars, _total(levels[-1], level, span)]


def _overlap(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool:
    return one is not None and other is not None and one[0] <= other[1] and other[0] <= one[1]


def _total(
    value: float | None, write: Callable[[float], str], span: Callable[[float, float], tuple[float, float]]
) -> Bar:
    return Bar("none") if value is None else Bar("total", *span(0.0, value), write(value))


def _writer(result: Result, name: Figure) -> tuple[Callable[[float], str], Callable[[float], str]]:
    """How a level and how a change are written; latencies in seconds where the original's is known."""
    if name == "quality_drop":
        return scale_of(result).drop, scale_of(result).drop
    if name == "bytes":
        return figures.size, figures.size
    latency = result.baseline.latency_s
    if latency is None or latency.median <= 0:
        return figures.ratio, figures.ratio

    def write(value: float) -> str:
        return figures.seconds(value * latency.median)

    return write, write


def _signed(change: float, write: Callable[[float], str]) -> str:
    text = write(abs(change))
    return f"±{text}" if text == write(0.0) else f"{'+' if change > 0 else '−'}{text}"


def _name(step: StepRow, result: Result) -> str:
    """The method, and which one where it comes twice."""
    same = [one for one in result.steps if one.name == step.name]
    if step.name == "student":
        return f"the student {result.student}".strip()
    if len(same) == 1:
        return step.name
    place = next(index for index, one in enumerate(same) if one is step)
    return f"{step.name} ({place + 1})"


def _note(step: StepRow) -> str:
    if step.state == "measured":
        return ""
    parts = [step.reason] if step.reason else []
    if step.state == "simulated" and step.examples:
        parts.append(f"quality of {step.examples:,} examples")
    return "; ".join(parts)
