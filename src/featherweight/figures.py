"""How figures are written for people, once for the terminal, the report and the model card.

Sizes are decimal (1 KB = 1000 bytes), as limits are read. A figure that nothing
measured is an en dash, never a zero. The inverse, reading '300KB', is in ``outcome.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from featherweight.metrics import METRICS
from featherweight.outcome import Axis, Latency, Measurement, Result

MISSING = "–"
AXIS_NAMES: Mapping[Axis, str] = {
    "quality_drop": "quality drop",
    "bytes": "size",
    "latency_s": "latency",
    "memory_bytes": "memory",
}


def _digits(value: float, digits: int = 3) -> str:
    """A number with that many significant digits and no exponent: 1.09, 28.4, 512."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return MISSING if math.isnan(value) else "∞" if value > 0 else "-∞"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value: 9.996 is 10.0
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def _scaled(value: float, steps: tuple[tuple[float, str], ...]) -> str:
    """The value in the largest unit that leaves at least one before the point (0.9995 rounds up to it)."""
    for unit, name in steps:
        if abs(value) >= 0.9995 * unit:
            return f"{_digits(value / unit)}{name}"
    unit, name = steps[-1]
    return f"{_digits(value / unit)}{name}"


def size(value: float | None) -> str:
    """Bytes: '290 KB', '1.09 MB'."""
    if value is None:
        return MISSING
    if abs(value) < 999.5:
        return f"{value:.0f} B"
    return _scaled(value, ((1e9, " GB"), (1e6, " MB"), (1e3, " KB")))


def seconds(value: float | None) -> str:
    """A duration: '850 us', '2.13 ms', '1.40 s', '12.5 min'."""
    if value is None:
        return MISSING
    if abs(value) >= 120:
        return f"{_digits(value / 60)} min"
    return _scaled(value, ((1.0, " s"), (1e-3, " ms"), (1e-6, " us")))


def latency(value: Latency | None) -> str:
    """The median with its quartiles: '2.13 ms (2.10 to 2.19)'."""
    if value is None:
        return MISSING
    low, high = (seconds(quartile) for quartile in (value.q1, value.q3))
    unit = seconds(value.median).rpartition(" ")[2]
    if low.endswith(f" {unit}") and high.endswith(f" {unit}"):
        low, high = low.removesuffix(f" {unit}"), high.removesuffix(f" {unit}")
    return f"{seconds(value.median)} ({low} to {high})"


def count(value: float | None) -> str:
    """A number of parameters or multiply-accumulates: '272k', '40.8M'."""
    if value is None:
        return MISSING
    if abs(value) < 999.5:
        return f"{value:.0f}"
    return _scaled(value, ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")))


def percent(value: float | None) -> str:
    """A fraction: '93.12%'."""
    return MISSING if value is None else f"{100 * value:.2f}%"


def ratio(value: float | None) -> str:
    """After over before: '0.27×'."""
    if value is None:
        return MISSING
    return f"{value:.2f}×" if abs(value) >= 0.095 else f"{_digits(value, 2)}×"


def gain(factor: float | None, better: str, worse: str) -> str:
    """A ratio as a comparison: '3.7× smaller', '1.2× slower'."""
    if factor is None or factor <= 0:
        return MISSING
    factor_up, word = (1 / factor, better) if factor <= 1 else (factor, worse)
    return f"{factor_up:.1f}× {word}" if factor_up < 10 else f"{factor_up:.0f}× {word}"


def interval(bounds: tuple[float, float] | None) -> str:
    """The 95 % interval of a ratio: '[0.40, 0.42]'."""
    return MISSING if bounds is None else f"[{bounds[0]:.2f}, {bounds[1]:.2f}]"


def decibel(value: float | None) -> str:
    """A signal to noise ratio: '28.4 dB'; infinite for equal outputs."""
    if value is None:
        return MISSING
    return f"{value:.1f} dB" if math.isfinite(value) else f"{_digits(value)} dB"


def real_range(low: float | None, high: float | None) -> str:
    """Both ends of a range: '-1.20 to 3.40'."""
    return MISSING if low is None or high is None else f"{_digits(low)} to {_digits(high)}"


def share(value: float | None) -> str:
    """A small fraction: '0.31%', '< 0.01%', '0'."""
    if value is None:
        return MISSING
    return "0" if value == 0 else "< 0.01%" if value < 1e-4 else percent(value)


def share_of(value: float | None) -> str:
    """A part of a whole: '63%', '< 1%'."""
    if value is None:
        return MISSING
    return "< 1%" if 0 < value < 0.005 else f"{100 * value:.0f}%"


def bits(value: float | None) -> str:
    """Stored bits of a number: '8.12 bits'."""
    return MISSING if value is None else f"{_digits(value)} bits"


def rate(value: float | None) -> str:
    """Examples a second: '470/s'."""
    return MISSING if value is None else f"{count(value) if value >= 100 else _digits(value)}/s"


def joules(value: float | None) -> str:
    """Energy: '4.20 mJ'."""
    return MISSING if value is None else _scaled(value, ((1.0, " J"), (1e-3, " mJ"), (1e-6, " uJ")))


def quotient(after: float | None, before: float | None) -> float | None:
    """after / before, None where one is missing or before is zero."""
    return None if after is None or not before else after / before


def flips(measurement: Measurement) -> str:
    """'31 lost, 12 won'."""
    seen = measurement.flips
    return MISSING if seen is None else f"{seen.lost} lost, {seen.won} won"


@dataclass(frozen=True)
class Row:
    """One figure before and after.

    Attributes:
        label: What it is.
        before: Of the original, through the same runtime.
        after: Of the artifact.
        change: One against the other.
    """

    label: str
    before: str
    after: str
    change: str = MISSING

    @property
    def seen(self) -> bool:
        """Whether anything measured it."""
        return (self.before, self.after) != (MISSING, MISSING)


@dataclass(frozen=True)
class Scale:
    """How the scores and drops of a metric are written.

    Attributes:
        bounded: Scores lie in 0..1 and are written in percent, their drops in points; other
            scores are written as they are, their drops in percent of the original's score.
    """

    bounded: bool

    @property
    def unit(self) -> str:
        """The unit of a drop times 100."""
        return "points" if self.bounded else "%"

    def score(self, value: float | None) -> str:
        """'93.12%' or '4.31'."""
        if value is None:
            return MISSING
        return percent(value) if self.bounded else _digits(value, 4)

    def drop(self, value: float | None) -> str:
        """'0.25 points' or '1.20%'; negative where the score became better."""
        if value is None:
            return MISSING
        return f"{self._hundred(value)} points" if self.bounded else f"{self._hundred(value)}%"

    def change(self, value: float | None) -> str:
        """'0.25 points worse', 'no change'."""
        if value is None:
            return MISSING
        if self._hundred(value) == "0.00":
            return "no change"
        return f"{self.drop(abs(value))} {'worse' if value > 0 else 'better'}"

    def interval(self, bounds: tuple[float, float] | None) -> str:
        """'[-0.10, 0.60]', in the unit of the drop."""
        return MISSING if bounds is None else f"[{self._hundred(bounds[0])}, {self._hundred(bounds[1])}]"

    @staticmethod
    def _hundred(value: float) -> str:
        text = f"{100 * value:.2f}" if math.isfinite(value) else _digits(value)
        return "0.00" if text == "-0.00" else text


def scale_of(result: Result) -> Scale:
    """The scale of the result's metric.

    A metric may be the user's own function, whose name says nothing; then it is read off the
    numbers, whether the drop is the difference of the scores or a fraction of the baseline.
    """
    if result.chosen.tasks:
        return Scale(all(task.bounded for task in result.chosen.tasks))
    if result.metric in METRICS:
        return Scale(METRICS[result.metric].bounded)
    before, after, drop = result.baseline.quality, result.chosen.quality, result.chosen.quality_drop
    if before and after is not None and drop is not None:
        absolute, relative = abs(before - after), abs(before - after) / abs(before)
        if not math.isclose(absolute, relative, rel_tol=1e-6):
            return Scale(abs(absolute - abs(drop)) < abs(relative - abs(drop)))
    return Scale(all(0 <= value <= 1 for value in (before, after) if value is not None))


def on_axis(axis: Axis, value: float | None, scale: Scale) -> str:
    """A limit or a value of a budget's axis."""
    if axis == "quality_drop":
        return scale.drop(value)
    return seconds(value) if axis == "latency_s" else size(value)


def recipe_line(recipe: Mapping[str, Any]) -> str:
    """A recipe in one line: 'fold → quantize(weights: int8, activations: int8)'."""
    return " → ".join(
        name + (f"({plain(parameters, brackets=False)})" if parameters else "")
        for step in recipe.get("steps") or []
        for name, parameters in step.items()
    )


def plain(value: Any, *, brackets: bool = True) -> str:
    """Any JSON value as short text."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping) and len(value) == 1 and brackets:
        return " ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple) and len(value) == 1:
        return plain(value[0], brackets=brackets)
    if isinstance(value, Mapping):
        text = ", ".join(f"{key}: {plain(item)}" for key, item in value.items())
        return f"{{{text}}}" if brackets else text
    if isinstance(value, list | tuple):
        text = ", ".join(plain(item) for item in value)
        return f"[{text}]" if brackets else text
    return str(value)
