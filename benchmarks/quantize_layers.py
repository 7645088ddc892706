"""What GPTQ and AdaRound leave of the error of nearest rounding, layer by layer, on calibration data.

Both read what the quantized network in front of the layer gives, X̂, and are held against what the float
layer makes of X in the float network; biases are the float ones on both sides::

    ratio = || W X - Q X̂ ||² / || W X - nearest(W) X̂ ||²
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from common import Bar, Parts
from quantize_bits import BitsSettings
from quantize_recipes import W4A8, W8A8, Bench, Benches, Bits, recipe
from quantize_subjects import Subject

from featherweight.errors import FeatherweightError
from featherweight.method import Context
from featherweight.model import Model
from featherweight.tools.simulate import project
from featherweight.tools.walk import Stop, walk

Json = dict[str, Any]
METHODS = ("gptq, biases left", "adaround, biases left")
BITS = (W8A8, W4A8)
_ITERATIONS = 100  # of adaround, unless the run is thorough


def rows_of(subject: Subject, settings: BitsSettings, parts: Parts, benches: Benches) -> list[Json]:
    """One row for each method and bits, with the ratio of each layer."""

    def computed() -> list[Json]:
        bench = benches.get(subject, "torch", settings.seeds[0])
        return [_row(bench, bits, method, settings) for bits in BITS for method in METHODS]

    rows: list[Json] = parts.get(f"layers-{subject.name}", computed)
    return rows


def _row(bench: Bench, bits: Bits, method: str, settings: BitsSettings) -> Json:
    row: Json = {"network": bench.subject.name, "bits": bits.name, "method": method.partition(",")[0]}
    try:
        iterations = settings.iterations or (None if settings.thorough else _ITERATIONS)
        model, _ = bench.model(recipe(method, bits, settings.calibration, iterations))
    except FeatherweightError as error:
        return {**row, "failed": error.what}
    nearest, _ = bench.model(recipe("nearest", bits, settings.calibration))
    return {**row, "ratios": errors(model, nearest, bench.run.context(model), settings.calibration)}


def errors(model: Model, nearest: Model, context: Context, samples: int) -> dict[str, float]:
    """Layer -> error of its output in units of what nearest rounding leaves on the same inputs.

    Args:
        model: With rounded weights.
        nearest: The same network and formats before rounding.
        context: Its float network is what both are held against.
        samples: Calibration examples.
    """
    batches = [
        tuple(torch.from_numpy(np.array(array)) for array in arrays)
        for arrays in context.data.calibration(samples)
    ]
    found: dict[str, float] = {}
    for stop in walk(model, context.float_model(model), batches, context.scratch):
        name = stop.node.parameters.get("weight")
        if name is not None and name in model.formats:
            found[stop.node.layer] = _ratio(stop, name, nearest)
    return found


@torch.no_grad()
def _ratio(stop: Stop, name: str, nearest: Model) -> float:
    chain = nearest.formats[name]
    plain = project(nearest.module.get_parameter(name).detach(), chain)
    ours = theirs = 0.0
    for batch in range(stop.exact.count):
        wanted = stop.exact.compute(stop.twin, batch)
        ours += float((stop.stored.compute(stop.node, batch) - wanted).double().square().sum())
        other = stop.stored.compute(stop.node, batch, parameters={name: plain})
        theirs += float((other - wanted).double().square().sum())
    return ours / theirs if theirs > 0 else float("inf") if ours > 0 else 1.0


# ---- what is printed

HEADERS = ("network", "bits", "method", "layers", "lowest", "mean", "highest", "not lower than nearest")


def cells(row: Json) -> tuple[str, ...]:
    """One line of the table."""
    head = (row["network"], row["bits"], row["method"])
    if "failed" in row:
        return (*head, "failed: " + row["failed"][:60], *("" for _ in HEADERS[4:]))
    ratios = list(row["ratios"].values())
    higher = [layer for layer, ratio in row["ratios"].items() if ratio >= 1]
    return (
        *head,
        str(len(ratios)),
        f"{min(ratios):.3f}",
        f"{float(np.mean(ratios)):.3f}",
        f"{max(ratios):.3f}",
        f"{len(higher)}" + (f": {', '.join(higher[:3])}" if higher else ""),
    )


def bars(rows: Sequence[Json]) -> list[Bar]:
    """Lower on every layer."""
    found = []
    for row in rows:
        about = f"{row['network']} {row['bits']} {row['method']}"
        asked = "output error lower than nearest on every layer"
        if "failed" in row:
            found.append(Bar(about, asked, "failed", None))
            continue
        higher = sum(ratio >= 1 for ratio in row["ratios"].values())
        words = f"{higher} of {len(row['ratios'])} not lower, the worst {max(row['ratios'].values()):.3f}"
        found.append(Bar(about, asked, words, higher == 0))
    return found
