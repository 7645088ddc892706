"""Where a quantized network loses: each layer alone and in place, its ranges, what they cut off, histograms.

Both networks run call by call over the same examples (tools/walk.py). With a layer's float output y and the
one ŷ that it makes in its formats::

    SQNR = 10 log10 (sum y² / sum (ŷ - y)²)

*Alone*, the layer reads the float network's values, rounded where they have formats; *in place*, it reads
what the layers before it have made of them. Simulated, never measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from featherweight.formats import IntQuant, TensorFormat
from featherweight.graph import Node
from featherweight.method import Progress, Scratch
from featherweight.model import Model
from featherweight.outcome import Spread
from featherweight.tools.costs import stored_bytes
from featherweight.tools.ranges import Histogram
from featherweight.tools.simulate import project, readers_of, sqnr_db
from featherweight.tools.walk import Stop, walk

BINS = 48
_MATRIX = 2  # axes from which on a parameter is a weight; biases and scales stay float


@dataclass
class _Errors:
    """Energies of a signal and of what was lost of it."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, exact: Tensor, seen: Tensor) -> None:
        self.signal += float(exact.double().square().sum())
        self.noise += float((seen.double() - exact.double()).square().sum())

    @property
    def decibels(self) -> float:
        return sqnr_db(self.signal, self.noise)


@dataclass
class Seen:
    """A stream of values against the grid that they are rounded to; memory does not grow with it."""

    histogram: Histogram = field(default_factory=Histogram)
    outside: int = 0
    count: int = 0
    finite: bool = True

    def add(self, values: Tensor, grid: IntQuant | None, name: str) -> None:
        """Count values, and those further than half a step outside of the grid."""
        self.finite = self.finite and bool(torch.isfinite(values).all())
        if not self.finite or not values.numel():
            return
        self.histogram.update(values, name)
        self.count += values.numel()
        if grid is not None:
            scale, zero = grid.grid_of(values)
            steps = values / scale + zero
            past = (steps < grid.quant_min - 0.5) | (steps > grid.quant_max + 0.5)
            self.outside += int((past & (scale > 0)).sum())

    def spread(self, grid: IntQuant | None) -> Spread | None:
        """What was seen, for the report; None where nothing was, or what is no number."""
        if not self.count or not self.finite:
            return None
        return Spread(
            low=None if grid is None else float(grid.low.min()),
            high=None if grid is None else float(grid.high.max()),
            seen_low=self.histogram.low,
            seen_high=self.histogram.high,
            clipped=None if grid is None else self.outside / self.count,
            counts=binned(self.histogram),
        )


@dataclass(frozen=True)
class LayerFigures:
    """One call of a layer.

    Attributes:
        alone_db: SQNR of its output when it alone is in its formats.
        in_place_db: The same inside of the whole quantized network.
        weight: What its float weight holds, and the range that it is rounded to.
        activation: What it reads first in the float network, and that value's range.
    """

    alone_db: float
    in_place_db: float
    weight: Spread | None
    activation: Spread | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        spreads = {"weight": self.weight, "activation": self.activation}
        told = {name: None if one is None else one.model_dump() for name, one in spreads.items()}
        return {"alone_db": self.alone_db, "in_place_db": self.in_place_db, **told}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerFigures:
        """What :meth:`to_json` wrote."""
        spreads = {
            name: None if data[name] is None else Spread(**data[name]) for name in ("weight", "activation")
        }
        return cls(data["alone_db"], data["in_place_db"], **spreads)


def binned(histogram: Histogram, bins: int = BINS) -> list[int]:
    """Counts in so many equal bins from the smallest value seen to the largest."""
    low, high = histogram.low, histogram.high
    if not high > low:
        return [int(histogram.counts.sum())]
    places = ((histogram.centers - low) / (high - low) * bins).floor().clamp(0, bins - 1).long()
    return [
        int(count) for count in torch.zeros(bins, dtype=torch.float64).index_add(0, places, histogram.counts)
    ]


def layer_figures(
    model: Model,
    reference: Model,
    batches: Sequence[tuple[Tensor, ...]],
    scratch: Scratch,
    progress: Progress,
    entry: str = "forward",
) -> dict[str, LayerFigures]:
    """Figures of every call that has weights or formats, by the name of the call.

    Args:
        model: With formats.
        reference: The same network as float.
        batches: Flat inputs; both networks' values of all of them live in ``scratch``.
        scratch: Where values live.
        progress: Shows how far it is.
        entry: Which way of calling it.
    """
    found: dict[str, LayerFigures] = {}
    stops = walk(model, reference, batches, scratch, entry)
    with torch.inference_mode():
        for stop in progress.track(stops, "comparing layers", None):
            if _is_touched(stop.node, model):
                figures = _figures(stop, model)
                found |= {} if figures is None else {stop.node.name: figures}
    return found


def _is_touched(node: Node, model: Model) -> bool:
    return any(name in model.formats for name in (*node.parameters.values(), *node.inputs))


def _figures(stop: Stop, model: Model) -> LayerFigures | None:
    node, twin = stop.node, stop.twin
    alone, in_place, activation = _Errors(), _Errors(), Seen()
    read = node.inputs[0] if node.inputs else None
    grid = None if read is None else _grid(model.formats.get(read, ()), node.op)
    for batch in range(stop.exact.count):
        exact = stop.exact.compute(twin, batch)
        exact = exact if isinstance(exact, Tensor) else exact[0]
        if not exact.is_floating_point():
            return None
        floats = {name: stop.exact.value(name, batch) for name in node.inputs}
        rounded = {
            name: project(value, tuple(fmt for fmt in model.formats.get(name, ()) if not readers_of(fmt)))
            for name, value in floats.items()
        }
        alone.add(exact, _first(stop.stored.compute(node, batch, values=rounded)))
        in_place.add(exact, _first(stop.stored.compute(node, batch, rounded=True)))
        if read is not None and floats[read].is_floating_point():
            activation.add(floats[read], grid, read)
    return LayerFigures(alone.decibels, in_place.decibels, _weight(stop, model), activation.spread(grid))


def _first(result: Tensor | Sequence[Tensor]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _weight(stop: Stop, model: Model) -> Spread | None:
    """The largest weight of a layer, as the float network holds it."""
    names = [
        name
        for name in stop.twin.parameters.values()
        if name in stop.node.parameters.values() and stop.exact.parameter(name).dim() >= _MATRIX
    ]
    if not names:
        return None
    name = max(names, key=lambda one: stop.exact.parameter(one).numel())
    grid, seen = _grid(model.formats.get(name, ()), stop.node.op), Seen()
    seen.add(stop.exact.parameter(name).detach(), grid, name)
    return seen.spread(grid)


def _grid(formats: Sequence[TensorFormat], operator: str) -> IntQuant | None:
    """The integers that an operator reads a tensor as, where their range is fixed."""
    for fmt in reversed(formats):
        if isinstance(fmt, IntQuant) and (not readers_of(fmt) or operator in readers_of(fmt)):
            return fmt
    return None


def by_layer(calls: dict[str, LayerFigures]) -> dict[str, LayerFigures]:
    """One row a layer: of several calls, the one that loses most in place."""
    found: dict[str, LayerFigures] = {}
    for name, figures in calls.items():
        layer = name.partition("#")[0] if "/" not in name else name
        before = found.get(layer)
        if before is None or figures.in_place_db < before.in_place_db:
            found[layer] = figures
    return found


def weight_bits(model: Model) -> float | None:
    """Mean stored bits of a weight, scales and zero points included; None without weights.

    Weights are the parameters of two axes or more; biases and the scales of norms are none.
    """
    weights = {name: one.numel() for name, one in model.parameters.items() if one.dim() >= _MATRIX}
    total = sum(weights.values())
    if not total:
        return None
    size = sum(stored_bytes(count, model.formats.get(name, ())) for name, count in weights.items())
    return 8 * size / total
