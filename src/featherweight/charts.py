"""The report's plots, as Vega-Lite specifications made with altair, and the script that draws them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from featherweight import figures
from featherweight.figures import scale_of
from featherweight.outcome import Budget, Measurement, Result, Spread, Trial

SPARK_WIDTH, SPARK_HEIGHT = 48, 12  # of a small histogram, in the units of its drawing

# Colours of similar lightness, readable on light and dark and by colour-blind eyes; the shape says the same.
# report.css repeats them for the legend and the table.
KINDS = {
    "original": ("#7d8590", "square"),
    "chosen": ("#0f9d76", "diamond"),
    "within budget": ("#2f81c7", "circle"),
    "measured": ("#2f81c7", "circle"),
    "over budget": ("#d0661f", "triangle-up"),
    "rejected, measured": ("#a371c9", "cross"),
    "rejected, simulated": ("#8b929c", "triangle-down"),
    "dropped, predicted": ("#8b929c", "triangle-down"),
}
_GUESSED = ("rejected, simulated", "dropped, predicted")  # no artifact was measured
_RATIO = "format(datum.value, '.2~f') + '×'"
_BYTES = "replace(format(datum.value, '~s'), 'k', 'K') + 'B'"
_AXES = {
    "latency_ratio": ("Latency ratio", "Latency / latency of the original", _RATIO),
    "bytes": ("Size", "Size of the files that are loaded", _BYTES),
    "memory_bytes": ("Memory", "Memory above the runtime", _BYTES),
}
_DROP = "quality_drop"
# Name of a plot -> what is on it from left to right and from bottom to top, and its tab.
_PLOTS = {
    "latency_ratio": ("latency_ratio", _DROP, "Quality and latency"),
    "bytes": ("bytes", _DROP, "Quality and size"),
    "memory_bytes": ("memory_bytes", _DROP, "Quality and memory"),
    "size_latency": ("bytes", "latency_ratio", "Size and latency"),
}


def simulated(trial: Trial) -> bool:
    """Whether a trial's figures come from the simulation: it was dropped before an artifact was made."""
    return trial.measurement is not None and trial.state == "rejected" and trial.sha256 is None


def kind(trial: Trial) -> str:
    """The group that the plot and the table of trials put a trial in."""
    if trial.chosen:
        return "chosen"
    if trial.state == "failed":
        return "failed"
    if trial.state == "dropped":
        return "dropped, predicted"
    if trial.state == "rejected":
        return "rejected, simulated" if simulated(trial) else "rejected, measured"
    return {True: "within budget", False: "over budget", None: "measured"}[trial.within_budget]


def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script: all that the plots need, with nothing to fetch."""
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    # Its stub asks for a snippet, but only the bundle without one is kept within a process.
    script: str = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]
    # Inside a script element only this sequence could end it.
    return script.replace("</script", "<\\/script")


def foreseen(trial: Trial) -> Measurement | None:
    """What was measured of a trial; of one that was dropped before, the last that was predicted."""
    if trial.measurement is not None or not trial.predicted:
        return trial.measurement
    last: dict[str, Any] = {}
    for told in trial.predicted:
        last |= {
            name: value
            for name in ("quality_drop", "bytes", "latency_ratio", "macs")
            if (value := getattr(told, name)) is not None
        }
    return Measurement(**last)


def pareto_plots(result: Result) -> list[dict[str, Any]]:
    """One plot of all trials per pair of figures that has data.

    Returns:
        Mappings of axis, name, title, kinds of points, text in words, the points from left to right in words,
        and the specification.
    """
    plots = []
    for axis, (across, up, name) in _PLOTS.items():
        points = list(_points(result, across, up))
        if sum(point["kind"] != "original" for point in points) == 0:
            continue
        front = _front(points)
        words = _words(points, front, name)
        ordered = sorted(points, key=lambda point: (point["x"], point["y"]))
        plots.append(
            {
                "axis": axis,
                "name": name,
                "kinds": sorted({point["kind"] for point in points}),
                "words": words,
                "points": [{"trial": point["Trial"], "words": _sentence(point)} for point in ordered],
                "spec": {**_plot(result, (across, up), points, front), "description": words},
            }
        )
    return plots


def _points(result: Result, across: str, up: str) -> Iterator[dict[str, Any]]:
    scale = scale_of(result)

    def place(seen: Measurement, group: str, axis: str) -> float | None:
        if group == "original" and axis in ("latency_ratio", _DROP):
            return 1.0 if axis == "latency_ratio" else 0.0
        value: float | None = getattr(seen, axis)
        return None if value is None else 100 * value if axis == _DROP else value

    def point(seen: Measurement, group: str, name: str, recipe: str) -> dict[str, Any] | None:
        x, y = place(seen, group, across), place(seen, group, up)
        if x is None or y is None or not (math.isfinite(x) and math.isfinite(y)):
            return None
        ratio = 1.0 if group == "original" else seen.latency_ratio
        latency = figures.ratio(ratio)
        if seen.latency_s is not None:
            latency = f"{figures.seconds(seen.latency_s.median)}, {latency}"
        return {
            "x": x,
            "y": y,
            "kind": group,
            "Trial": name,
            "Recipe": recipe,
            "Quality drop": scale.drop(0.0 if group == "original" else seen.quality_drop),
            "Size": figures.size(seen.bytes),
            "Latency": latency,
        }

    candidates = [point(result.baseline, "original", "the original", "as it was")]
    for trial in result.trials:
        seen = foreseen(trial)
        if seen is not None and trial.state != "failed":
            recipe = figures.recipe_line(trial.recipe)
            candidates.append(point(seen, kind(trial), str(trial.number), recipe))
    yield from (candidate for candidate in candidates if candidate is not None)


def _sentence(point: dict[str, Any]) -> str:
    """A point in words, for those who cannot hover."""
    name = "The original" if point["kind"] == "original" else f"Trial {point['Trial']}, {point['kind']}"
    return (
        f"{name}: {point['Recipe']}. Quality drop {point['Quality drop']}, size {point['Size']}, "
        f"latency {point['Latency']}."
    )


def _front(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured points that no other measured point beats on both axes, from left to right."""
    front: list[dict[str, Any]] = []
    measured = [point for point in points if point["kind"] not in _GUESSED]
    for point in sorted(measured, key=lambda point: (point["x"], point["y"])):
        if not front or point["y"] < front[-1]["y"]:
            front.append(point)
    return front


def _words(points: list[dict[str, Any]], front: list[dict[str, Any]], name: str) -> str:
    """The plot's text alternative."""
    trials = sum(point["kind"] != "original" for point in points)
    best = ", ".join(
        point["Trial"] if point["kind"] == "original" else f"trial {point['Trial']}" for point in front
    )
    return (
        f"{name}: {trials} trial{'' if trials == 1 else 's'} and the original, "
        f"lower left is better. Best trade-offs, from left to right: {best}."
    )


def _plot(
    result: Result, axes: tuple[str, str], points: list[dict[str, Any]], front: list[dict[str, Any]]
) -> dict[str, Any]:
    import altair as alt

    across, up = axes
    _, title, label = _AXES[across]
    x = alt.X("x:Q", title=title, scale=alt.Scale(zero=False, nice=True, padding=24)).axis(
        labelExpr=label, tickCount=6
    )
    if up == _DROP:
        top, bottom = _range(result, points)
        drops = f"Quality drop ({scale_of(result).unit})"
        y = alt.Y("y:Q", title=drops, scale=alt.Scale(domain=[bottom, top], clamp=True))
    else:
        _, title, label = _AXES[up]
        y = alt.Y("y:Q", title=title, scale=alt.Scale(zero=False, nice=True, padding=24)).axis(
            labelExpr=label, tickCount=6
        )
    layers: list[Any] = list(_limit_rules(result, axes))
    layers.append(
        alt.Chart(alt.InlineData(values=front))
        .mark_line(interpolate="step-after", strokeDash=[1, 3], strokeWidth=1.5, color="#7d8590")
        .encode(x=x, y=y, order=alt.Order("x:Q"))
    )
    layers += [_ring(points, x, y), _marks(points, x, y)]  # what lies above is hovered
    chart = alt.layer(*layers).properties(width="container", height=360, background="transparent")
    chart = chart.configure(font="system-ui, sans-serif").configure_view(stroke=None)
    chart = chart.configure_axis(
        gridColor="#80808030", domainColor="#80808080", labelFontSize=12, titleFontSize=12, titlePadding=10
    )
    spec: dict[str, Any] = chart.to_dict()
    return spec


def _marks(points: list[dict[str, Any]], x: Any, y: Any) -> Any:
    """The points, whose tooltip is the recipe and its figures; what was not measured is hollow."""
    import altair as alt

    kinds = [name for name in KINDS if any(point["kind"] == name for point in points)]
    names = alt.Scale(domain=kinds, range=[KINDS[name][0] for name in kinds])
    shapes = alt.Scale(domain=kinds, range=[KINDS[name][1] for name in kinds])
    large = "datum.kind === 'chosen' || datum.kind === 'original'"
    guessed = " || ".join(f"datum.kind === '{name}'" for name in _GUESSED)
    shown = ("Trial", "Recipe", "Quality drop", "Size", "Latency")
    return (
        alt.Chart(alt.InlineData(values=points))
        .mark_point(opacity=0.9, cursor="pointer", strokeWidth=1.5)
        .encode(
            x=x,
            y=y,
            # No legend: the page's own wraps on a phone.
            stroke=alt.Stroke("kind:N", scale=names, legend=None),
            fill=alt.condition(
                guessed, alt.value("transparent"), alt.Fill("kind:N", scale=names, legend=None)
            ),
            shape=alt.Shape("kind:N", scale=shapes, legend=None),
            size=alt.condition(large, alt.value(220), alt.value(80)),
            tooltip=[alt.Tooltip(f"{field}:N") for field in shown],
        )
    )


def _ring(points: list[dict[str, Any]], x: Any, y: Any) -> Any:
    """A ring around the point that is picked, by a click or by keys."""
    import altair as alt

    picked = alt.param(name="picked", value="")
    chart = alt.Chart(alt.InlineData(values=points)).mark_point(
        filled=False, color="#e0a100", strokeWidth=2.5, size=520, shape="circle"
    )
    ringed = alt.condition("datum.Trial === picked", alt.value(1), alt.value(0))
    return chart.encode(x=x, y=y, opacity=ringed, tooltip=alt.value(None)).add_params(picked)


def _range(result: Result, points: list[dict[str, Any]]) -> tuple[float, float]:
    """Upper and lower end of the vertical axis; one collapsed trial must not flatten all others."""
    drops = [point["y"] for point in points]
    limit = 100 * (result.budget.quality_drop or 0.0)
    reference = max([limit, 0.5] + [point["y"] for point in points if point["kind"] == "chosen"])
    top = min(max([*drops, 1.2 * limit, 0.1]), 5 * reference)
    bottom = min(*drops, 0.0)
    margin = 0.06 * (top - bottom)
    return top + margin, bottom - margin


def _limit_rules(result: Result, axes: tuple[str, str]) -> Iterator[Any]:
    """Dashed lines where the budget ends, with their names."""
    import altair as alt

    line: dict[str, Any] = {"color": "#c9342f", "strokeDash": [6, 4], "strokeWidth": 1.2}
    text: dict[str, Any] = {"color": "#c9342f", "fontSize": 12}
    limits, (across, up) = _budget_lines(result.budget, result.baseline), axes
    names = {axis: f"largest {name.removesuffix(' ratio').lower()}" for axis, (name, _, _) in _AXES.items()}
    names[_DROP] = "largest drop"
    if across in limits:
        data = alt.Chart(alt.InlineData(values=[{"x": limits[across], "text": names[across]}]))
        yield data.mark_rule(**line).encode(x="x:Q")
        yield data.mark_text(align="left", baseline="top", dx=4, dy=2, **text).encode(
            x="x:Q", y=alt.value(0), text="text:N"
        )
    if up in limits:
        data = alt.Chart(alt.InlineData(values=[{"y": limits[up], "text": names[up]}]))
        yield data.mark_rule(**line).encode(y="y:Q")
        yield data.mark_text(align="right", baseline="bottom", dx=-4, dy=-3, **text).encode(
            x=alt.value("width"), y="y:Q", text="text:N"
        )


def _budget_lines(budget: Budget, baseline: Measurement) -> dict[str, float]:
    """Limits as positions on the plots' axes, by figure."""
    lines: dict[str, float] = {}
    if budget.quality_drop is not None:
        lines[_DROP] = 100 * budget.quality_drop
    if budget.latency_s is not None and baseline.latency_s is not None and baseline.latency_s.median > 0:
        lines["latency_ratio"] = budget.latency_s / baseline.latency_s.median
    if budget.bytes is not None:
        lines["bytes"] = float(budget.bytes)
    if budget.memory_bytes is not None:
        lines["memory_bytes"] = float(budget.memory_bytes)
    return lines


def sparkline(spread: Spread | None) -> dict[str, Any] | None:
    """A histogram as the path of an SVG of SPARK_WIDTH x SPARK_HEIGHT, with the ends of the range marked.

    Heights are square roots of the counts, so that tails show. A bin of the path is as wide as any other.

    Returns:
        ``path``, and ``low`` and ``high``: where the range's ends are across it, None outside of what was
        seen; None where there is no histogram.
    """
    if spread is None or not spread.counts:
        return None
    largest = max(*spread.counts, 1)
    width = SPARK_WIDTH / len(spread.counts)
    heights = [SPARK_HEIGHT * (count / largest) ** 0.5 for count in spread.counts]
    tops = "".join(f"V{SPARK_HEIGHT - height:.3g}h{width:.3g}" for height in heights)
    extent = spread.seen_high - spread.seen_low

    def across(end: float | None) -> float | None:
        if end is None or extent <= 0 or not spread.seen_low < end < spread.seen_high:
            return None
        return round(SPARK_WIDTH * (end - spread.seen_low) / extent, 1)

    return {
        "path": f"M0 {SPARK_HEIGHT}{tops}V{SPARK_HEIGHT}Z",
        "low": across(spread.low),
        "high": across(spread.high),
    }
