"""What is odd about the examples that ranges are taken from, told with figures.

Constant inputs, one example over and over, too few of them, and inputs that were prepared otherwise than
those of training: none is an error, each makes ranges that do not hold in use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from featherweight.data import Data
from featherweight.graph import Graph
from featherweight.tools.ranges import Histogram

_FEW = 16  # examples; ranges of fewer are hardly those of what comes later
_MARGIN = 0.1  # of the width of a range, within which another one counts as inside
_OUTSIDE = 0.01  # share of values above which it is told
_NAMED = 4


class CalibrationInputs:
    """What the calibration examples of one entry are like; memory does not grow with their number.

    Args:
        graph: The entry.
    """

    def __init__(self, graph: Graph) -> None:
        self._names = graph.inputs
        self._histograms: dict[str, Histogram] = {}
        self._first: tuple[Tensor, ...] = ()
        self._alike = True
        self.count = 0

    def update(self, batch: Sequence[Tensor]) -> None:
        """Add flat inputs of one call."""
        for name, value in zip(self._names, batch, strict=False):
            if value.is_floating_point() and value.numel():
                self._histograms.setdefault(name, Histogram()).update(value, name)
        self._first = self._first or tuple(value[:1].clone() for value in batch if value.dim())
        if self._alike:
            pairs = zip((value for value in batch if value.dim()), self._first, strict=True)
            self._alike = all(bool((value == first).all()) for value, first in pairs)
        self.count += batch[0].shape[0] if batch and batch[0].dim() else 1

    def notes(self, data: Data, seed: int) -> list[str]:
        """Warnings about what was added."""
        notes = []
        if self.count < _FEW:
            notes.append(
                f"ranges are taken from {self.count} calibration examples: what they do not show is clipped; "
                "give 100 or so"
            )
        constant = {name: seen.low for name, seen in self._histograms.items() if seen.low == seen.high}
        for name, value in constant.items():
            notes.append(
                f"'{name}' is {value:g} in all {self.count} calibration examples: "
                "its range holds nothing else"
            )
        if self._alike and not constant and self.count > 1:
            notes.append(f"all {self.count} calibration examples are the same one")
        if data.train is not None and data.calibration_source == "calibration":
            notes += self._against_training(data, seed)
        return notes

    def _against_training(self, data: Data, seed: int) -> list[str]:
        trained = {name: Histogram() for name in self._histograms}
        batches = -(-self.count // data.batch_size)
        for arrays, _ in islice(data.training(seed, data.batch_size), batches):
            for name, array in zip(self._names, arrays, strict=False):
                if name in trained and array.size:
                    trained[name].update(torch.from_numpy(array), name)
        notes = []
        for name, seen in self._histograms.items():
            other = trained[name]
            if not other.batches:
                continue
            spans = f"{seen.low:g} to {seen.high:g}, in training {other.low:g} to {other.high:g}"
            beyond, missed = _outside(seen, other), _outside(other, seen)
            if beyond > _OUTSIDE:
                notes.append(
                    f"{100 * beyond:.3g} % of '{name}' in calibration lies outside of what training shows "
                    f"({spans}): prepare both alike"
                )
            elif missed > _OUTSIDE:
                notes.append(
                    f"{100 * missed:.3g} % of '{name}' in training lies outside of what calibration shows "
                    f"({spans}) and will be clipped"
                )
        return notes


def _outside(seen: Histogram, other: Histogram) -> float:
    """The share of values outside another one's range and a margin."""
    margin = _MARGIN * (other.high - other.low)
    low, high = other.low - margin, other.high + margin
    if not seen.bound:
        return 0.0 if low <= 0 <= high else 1.0
    half = seen.bound / len(seen.counts)  # of a bin
    away = (seen.centers + half < low) | (seen.centers - half > high)
    return float(seen.counts[away].sum() / seen.counts.sum())


def constant_values(seen: Mapping[str, Histogram]) -> list[str]:
    """A warning about values inside the network that never changed."""
    names = [name for name, one in seen.items() if one.low == one.high and not name.startswith("input:")]
    if not names:
        return []
    first = seen[names[0]].low
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    named = ", ".join(f"'{name}'" for name in names[1:_NAMED])
    return [
        f"'{names[0]}' is {first:g} on every calibration example{more}{': ' + named if named else ''}: "
        "its range holds nothing else"
    ]
