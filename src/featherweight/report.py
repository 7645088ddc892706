"""The report, a pure function of ``Result``: one HTML file that loads nothing.

The page's text lives in ``templates/report.html.j2``, its looks in ``report.css``; figures
are written by ``figures.py``, sentences by ``summary.py``. Vega is inlined once and its
expressions are interpreted, not evaluated, so the page's own content security policy can
forbid every request.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from featherweight import beside, figures
from featherweight.charts import (
    KINDS,
    SPARK_HEIGHT,
    SPARK_WIDTH,
    foreseen,
    kind,
    pareto_plots,
    sparkline,
    vega,
)
from featherweight.figures import MISSING, on_axis, quotient, scale_of, seconds, size
from featherweight.outcome import AXES, Axis, LayerRow, Measurement, Result, RungRow, Spread, Trial
from featherweight.summary import (
    RUNTIME_HEADERS,
    before_after,
    blockers,
    broken_axes,
    choice,
    doubts,
    effort,
    gains,
    runtime_cells,
    slow_kernels,
    task_rows,
    verdict_parts,
)
from featherweight.summary import explain as explain
from featherweight.summary import terminal_table as terminal_table
from featherweight.waterfall import FIGURES, drop_noise, told, waterfall


def render(result: Result) -> str:
    """The report as one HTML page that works offline: no request leaves it."""
    import yaml
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("featherweight"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "seconds": seconds, "count": figures.count, "plain": figures.plain}
    environment.filters |= {
        "percent": figures.percent,
        "decibel": figures.decibel,
        "recipe": figures.recipe_line,
    }
    plots, aside = pareto_plots(result), beside.Aside.of(result)
    return environment.get_template("report.html.j2").render(
        result=result,
        missing=MISSING,
        verdict=verdict_parts(result),
        gains=gains(result),
        blockers=blockers(result),
        doubts=doubts(result),
        choice=choice(result),
        effort=effort(result),
        spark=(SPARK_WIDTH, SPARK_HEIGHT),
        losses=[_loss_cells(row) for row in result.layers if row.weight or row.activation],
        tiles=list(_tiles(result)),
        limits=list(_limits(result)),
        rows=before_after(result),
        tasks=task_rows(result),
        steps=waterfall(result),
        steps_told=told(result),
        step_figures=[name for _, name in FIGURES],
        drop_noise=_drop_noise(result),
        mattered=_mattered(result),
        rungs=[_rung_cells(result, row) for row in result.ladder],
        plots=plots,
        vega=vega() if plots else "",
        kinds=[name for name in KINDS if name in {point for plot in plots for point in plot["kinds"]}],
        trials=[_trial_cells(result, trial) for trial in result.trials],
        recipe=yaml.safe_dump(result.recipe, sort_keys=False, allow_unicode=True),
        most_bytes=max([layer.bytes_before for layer in result.layers] + [1]),
        classes=_class_cells(result),
        corruptions=beside.corruption_rows(aside),
        corruptions_told=beside.corruption_caption(aside),
        curve=(beside.CURVE_WIDTH, beside.CURVE_HEIGHT),
        confidence=beside.confidence_rows(aside),
        beside_remarks=beside.remarks(aside),
        runtime_headers=RUNTIME_HEADERS,
        runtimes=[runtime_cells(row) for row in result.runtimes],
        slow=slow_kernels(result),
        examples=list(_flat(result.examples)),
    )


def _limits(result: Result) -> Iterator[dict[str, str]]:
    """Each axis of the budget: what was allowed, what was measured, whether it is kept."""
    scale = scale_of(result)
    broken = broken_axes(result)
    for axis in AXES:
        limit = getattr(result.budget, axis)
        kept = "" if limit is None else "broken" if axis in broken else "kept"
        yield {
            "axis": axis,
            "name": figures.AXIS_NAMES[axis].capitalize(),
            "limit": "no limit" if limit is None else f"at most {on_axis(axis, limit, scale)}",
            "value": on_axis(axis, result.chosen.value(axis), scale),
            "kept": kept,
        }


def _tiles(result: Result) -> Iterator[dict[str, str]]:
    """The four figures at the top, those that carry a limit marked."""
    marks = {limit["axis"]: limit for limit in _limits(result)}
    old, new, scale = result.baseline, result.chosen, scale_of(result)
    contents: tuple[tuple[Axis, str, str, str], ...] = (
        ("quality_drop", "Quality", scale.score(new.quality), scale.score(old.quality)),
        ("bytes", "Size", size(new.bytes), size(old.bytes)),
        ("latency_s", "Latency", seconds(new.value("latency_s")), seconds(old.value("latency_s"))),
        ("memory_bytes", "Memory", size(new.memory_bytes), size(old.memory_bytes)),
    )
    changes = {
        "quality_drop": scale.change(new.quality_drop),
        "bytes": figures.gain(quotient(new.bytes, old.bytes), "smaller", "larger"),
        "latency_s": figures.gain(new.latency_ratio, "faster", "slower"),
        "memory_bytes": figures.gain(quotient(new.memory_bytes, old.memory_bytes), "less", "more"),
    }
    for axis, name, after, before in contents:
        yield {
            "name": name,
            "after": after,
            "before": before,
            "change": changes[axis],
            **marks[axis],
            "title": name,
        }


def _trial_cells(result: Result, trial: Trial) -> dict[str, Any]:
    """A row of the table of trials, with the bare numbers that it is sorted by."""
    seen, scale = foreseen(trial) or Measurement(), scale_of(result)
    return {
        "trial": trial,
        "kind": kind(trial),
        "guess": trial.state == "dropped",
        "recipe": figures.recipe_line(trial.recipe),
        "drop": (scale.drop(seen.quality_drop), seen.quality_drop),
        "bytes": (size(seen.bytes), seen.bytes),
        "latency": (seconds(seen.value("latency_s")), seen.value("latency_s")),
        "ratio": (figures.ratio(seen.latency_ratio), seen.latency_ratio),
    }


def _drop_noise(result: Result) -> str:
    """Below which a step's change of quality may be noise, written; nothing where that is nothing."""
    half, scale = drop_noise(result), scale_of(result)
    return "" if scale.drop(half) == scale.drop(0.0) else scale.drop(half)


def _mattered(result: Result) -> list[dict[str, Any]]:
    """A row of the table of importances: shares, with the bare numbers that it is sorted by."""
    names = ("quality_drop", "bytes", "latency_ratio")
    rows = [] if result.importances is None else result.importances.rows
    return [
        {
            "parameter": row.parameter,
            "shares": [(figures.share_of(getattr(row, name)), getattr(row, name)) for name in names],
        }
        for row in rows
    ]


def _rung_cells(result: Result, row: RungRow) -> list[str]:
    """A row of the table of the ladder."""
    scale = scale_of(result)
    return [
        row.name,
        str(row.candidates),
        str(row.dropped),
        seconds(row.seconds),
        str(row.compared) if row.compared else MISSING,
        scale.drop(row.drop_error),
        figures.percent(row.bytes_error),
        figures.percent(row.latency_error),
    ]


def _loss_cells(row: LayerRow) -> dict[str, Any]:
    """A row of the table of errors: each layer alone, in place, and what its ranges cut off."""
    return {
        "row": row,
        "tensors": [_tensor_cells("weights", row.weight), _tensor_cells("inputs", row.activation)],
    }


def _tensor_cells(name: str, spread: Spread | None) -> dict[str, Any]:
    low, high = (None, None) if spread is None else (spread.low, spread.high)
    seen = MISSING if spread is None else figures.real_range(spread.seen_low, spread.seen_high)
    return {
        "name": name,
        "seen": seen,
        "range": (figures.real_range(low, high), None if low is None or high is None else high - low),
        "clipped": (figures.share(spread.clipped if spread else None), spread.clipped if spread else None),
        "spark": sparkline(spread),
    }


def _class_cells(result: Result) -> list[dict[str, Any]]:
    """Classes with the one that lost most first, with its share of the largest change."""
    changes = [(one.after - one.before, one) for one in result.classes]
    largest = max([abs(change) for change, _ in changes] + [1e-9])
    return [
        {"row": one, "change": change, "width": round(abs(change) / largest, 4)}
        for change, one in sorted(changes, key=lambda pair: pair[0])
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as (label, text)."""
    for key, value in values.items():
        label = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{label}: ")
        else:
            yield label[:1].upper() + label[1:], figures.plain(value, brackets=False)
