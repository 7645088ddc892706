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
}
_AXES = {
    "latency_ratio": (
        "Latency ratio",
        "Latency / latency of the original",
        "format(datum.value, '.2~f') + '×'",
    ),
    "bytes": (
        "Size",
        "Size of the files that are loaded",
        "replace(format(datum.value, '~s'), 'k', 'K') + 'B'",
    ),
    "memory_bytes": (
        "Memory",
        "Memory above the runtime",
        "replace(format(datum.value, '~s'), 'k', 'K') + 'B'",
    ),
}


def simulated(trial: Trial) -> bool:
    """Whether a trial's figures come from the simulation: it was dropped before an artifact was made."""
    return trial.measurement is not None and trial.state == "rejected" and trial.sha256 is None


def kind(trial: Trial) -> str:
    """The group that the plot and the table of trials put a trial in."""
    if trial.chosen:
        return "chosen"
    if trial.state in ("failed", "dropped"):
        return trial.state
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


def pareto_plots(result: Result) -> list[dict[str, Any]]:
    """One plot of all trials per horizontal axis that has data: name, title, text in words, specification."""
    plots = []
    for axis, (name, _, _) in _AXES.items():
        points = list(_points(result, axis))
        if sum(point["kind"] != "original" for point in points) == 0:
            continue
        front = _front(points)
        plots.append(
            {
                "axis": axis,
                "name": name,
                "kinds": sorted({point["kind"] for point in points}),
                "words": _words(points, front, name),
                "spec": _plot(result, axis, points, front),
            }
        )
    return plots


def _points(result: Result, axis: str) -> Iterator[dict[str, Any]]:
    scale = scale_of(result)

    def point(seen: Measurement, group: str, name: str, recipe: str) -> dict[str, Any] | None:
        x = 1.0 if group == "original" and axis == "latency_ratio" else getattr(seen, axis)
        drop = 0.0 if group == "original" else seen.quality_drop
        if x is None or drop is None or not (math.isfinite(x) and math.isfinite(drop)):
            return None
        ratio = 1.0 if group == "original" else seen.latency_ratio
        return {
            "x": x,
            "drop": 100 * drop,
            "kind": group,
            "Trial": name,
            "Recipe": recipe,
            "Quality drop": scale.drop(drop),
            "Size": figures.size(seen.bytes),
            "Latency": f"{figures.seconds(seen.value('latency_s'))}, {figures.ratio(ratio)}",
        }

    candidates = [point(result.baseline, "original", "the original", "as it was")]
    for trial in result.trials:
        if trial.measurement is not None and trial.state != "failed":
            recipe = figures.recipe_line(trial.recipe)
            candidates.append(point(trial.measurement, kind(trial), str(trial.number), recipe))
    yield from (candidate for candidate in candidates if candidate is not None)


def _front(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured points that no other measured point beats on both axes, from left to right."""
    front: list[dict[str, Any]] = []
    measured = [point for point in points if point["kind"] != "rejected, simulated"]
    for point in sorted(measured, key=lambda point: (point["x"], point["drop"])):
        if not front or point["drop"] < front[-1]["drop"]:
            front.append(point)
    return front


def _words(points: list[dict[str, Any]], front: list[dict[str, Any]], name: str) -> str:
    """The plot's text alternative."""
    trials = sum(point["kind"] != "original" for point in points)
    best = ", ".join(
        point["Trial"] if point["kind"] == "original" else f"trial {point['Trial']}" for point in front
    )
    return (
        f"{name} against quality drop: {trials} trial{'' if trials == 1 else 's'} and the original, "
        f"lower left is better. Best trade-offs, from left to right: {best}."
    )


def _plot(
    result: Result, axis: str, points: list[dict[str, Any]], front: list[dict[str, Any]]
) -> dict[str, Any]:
    import altair as alt

    _, title, label = _AXES[axis]
    scale = scale_of(result)
    top, bottom = _range(result, points)
    x = alt.X("x:Q", title=title, scale=alt.Scale(zero=False, nice=True, padding=24)).axis(
        labelExpr=label, tickCount=6
    )
    y = alt.Y(
        "drop:Q", title=f"Quality drop ({scale.unit})", scale=alt.Scale(domain=[bottom, top], clamp=True)
    )
    kinds = [name for name in KINDS if any(point["kind"] == name for point in points)]
    names = alt.Scale(domain=kinds, range=[KINDS[name][0] for name in kinds])
    shapes = alt.Scale(domain=kinds, range=[KINDS[name][1] for name in kinds])
    large = "datum.kind === 'chosen' || datum.kind === 'original'"
    layers: list[Any] = list(_limit_rules(result, axis))
    layers.append(
        alt.Chart(alt.InlineData(values=front))
        .mark_line(interpolate="step-after", strokeDash=[1, 3], strokeWidth=1.5, color="#7d8590")
        .encode(x=x, y=y, order=alt.Order("x:Q"))
    )
    layers.append(
        alt.Chart(alt.InlineData(values=points))
        .mark_point(filled=True, opacity=0.9, cursor="pointer")
        .encode(
            x=x,
            y=y,
            color=alt.Color("kind:N", scale=names, legend=None),  # the page's own legend wraps on a phone
            shape=alt.Shape("kind:N", scale=shapes, legend=None),
            size=alt.condition(large, alt.value(220), alt.value(80)),
            tooltip=[
                alt.Tooltip(f"{field}:N") for field in ("Trial", "Recipe", "Quality drop", "Size", "Latency")
            ],
        )
    )
    chart = alt.layer(*layers).properties(width="container", height=360, background="transparent")
    chart = chart.configure(font="system-ui, sans-serif").configure_view(stroke=None)
    chart = chart.configure_axis(
        gridColor="#80808030", domainColor="#80808080", labelFontSize=12, titleFontSize=12, titlePadding=10
    )
    spec: dict[str, Any] = chart.to_dict()
    return spec


def _range(result: Result, points: list[dict[str, Any]]) -> tuple[float, float]:
    """Upper and lower end of the vertical axis; one collapsed trial must not flatten all others."""
    drops = [point["drop"] for point in points]
    limit = 100 * (result.budget.quality_drop or 0.0)
    reference = max([limit, 0.5] + [point["drop"] for point in points if point["kind"] == "chosen"])
    top = min(max([*drops, 1.2 * limit, 0.1]), 5 * reference)
    bottom = min(*drops, 0.0)
    margin = 0.06 * (top - bottom)
    return top + margin, bottom - margin


def _limit_rules(result: Result, axis: str) -> Iterator[Any]:
    """Dashed lines where the budget ends, with their names."""
    import altair as alt

    line: dict[str, Any] = {"color": "#c9342f", "strokeDash": [6, 4], "strokeWidth": 1.2}
    text: dict[str, Any] = {"color": "#c9342f", "fontSize": 12}
    vertical = _budget_lines(result.budget, result.baseline).get(axis)
    if vertical is not None:
        data = alt.Chart(
            alt.InlineData(
                values=[{"x": vertical, "text": f"largest {_AXES[axis][0].removesuffix(' ratio').lower()}"}]
            )
        )
        yield data.mark_rule(**line).encode(x="x:Q")
        yield data.mark_text(align="left", baseline="top", dx=4, dy=2, **text).encode(
            x="x:Q", y=alt.value(0), text="text:N"
        )
    if result.budget.quality_drop is not None:
        limit = 100 * result.budget.quality_drop
        data = alt.Chart(alt.InlineData(values=[{"drop": limit, "text": "largest drop"}]))
        yield data.mark_rule(**line).encode(y="drop:Q")
        yield data.mark_text(align="right", baseline="bottom", dx=-4, dy=-3, **text).encode(
            x=alt.value("width"), y="drop:Q", text="text:N"
        )


def _budget_lines(budget: Budget, baseline: Measurement) -> dict[str, float]:
    """Limits as positions on the plot's horizontal axes, by axis name."""
    lines: dict[str, float] = {}
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
