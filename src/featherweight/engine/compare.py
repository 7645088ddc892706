"""Where two artifacts of one network part: the values inside both, on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from featherweight.data import Data
from featherweight.engine.asked import inner_values
from featherweight.engine.delivered import Delivered
from featherweight.engine.jobs import Served
from featherweight.engine.parity import decibels
from featherweight.errors import DataError, TargetError
from featherweight.method import Progress

OUTPUTS = "outputs"


def compare_artifacts(
    first: Delivered, second: Delivered, data: Data, *, below: float, progress: Progress
) -> dict[str, Any]:
    """The signal-to-noise ratio of every value that both show, in the order of the first, and of the outputs.

    Args:
        first: The reference.
        second: What is held against it.
        data: The first example is taken.
        below: Decibels under which two values count as different.
        progress: Shows a bar.

    Raises:
        DataError: The artifacts do not take the example, or are of different networks.
    """
    example = tuple(array[:1] for array in data.example_inputs())
    one, two = (
        _seen(side, example) for side in progress.track((first, second), "Reading the values inside", total=2)
    )
    if len(one.outputs) != len(two.outputs) or any(
        a.shape != b.shape for a, b in zip(one.outputs, two.outputs, strict=True)
    ):
        raise DataError("the artifacts have different outputs", fix="compare artifacts of one network")
    pairs = ((name, value, two.inside[name]) for name, value in one.inside.items() if name in two.inside)
    rows = [row for pair in pairs if (row := _row(*pair)) is not None]
    before = None
    for row in rows:
        row["loss_db"] = None if before is None else before - row["sqnr_db"]
        before = row["sqnr_db"]
    parting = next((row["value"] for row in rows if row["sqnr_db"] < below), None)
    sharp = max((row for row in rows if row["loss_db"]), key=lambda row: row["loss_db"], default=None)
    return {
        "first": _told(first),
        "second": _told(second),
        "below_db": below,
        "parts_at": parting,
        "largest_loss_at": None if sharp is None else sharp["value"],
        "values": rows,
        "outputs_db": decibels(
            [value.astype(np.float64) for value in two.outputs],
            [value.astype(np.float64) for value in one.outputs],
        ),
        "notes": [note for note in (one.note, two.note) if note],
    }


class _Seen:
    """What one artifact showed."""

    def __init__(self, inside: Mapping[str, np.ndarray], outputs: tuple[np.ndarray, ...], note: str) -> None:
        self.inside, self.outputs, self.note = inside, outputs, note


def _seen(side: Delivered, example: tuple[np.ndarray, ...]) -> _Seen:
    with Served(side.artifact, side.target) as served:
        outputs = served.run(*example)
    try:
        return _Seen(inner_values(side.artifact, side.target, example), outputs, "")
    except TargetError as error:
        return _Seen({}, outputs, error.what)


def _row(name: str, wanted: np.ndarray, seen: np.ndarray) -> dict[str, Any] | None:
    """One value of both; None where they are not the same thing (another shape, or no floats)."""
    if wanted.shape != seen.shape or not np.issubdtype(wanted.dtype, np.floating):
        return None
    ratio = decibels([seen.astype(np.float64)], [wanted.astype(np.float64)])
    largest = float(np.abs(wanted.astype(np.float64) - seen).max(initial=0))
    return {"value": name, "shape": list(wanted.shape), "sqnr_db": ratio, "largest_error": largest}


def _told(side: Delivered) -> dict[str, Any]:
    return {
        "runtime": side.artifact.runtime,
        "files": list(side.artifact.files),
        "bytes": side.artifact.bytes,
    }
