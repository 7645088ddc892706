"""Scores on corrupted pictures, of an artifact and of its twin, through their runners.

Every corruption is made once for a batch and shown to both. What is scored, and how, is the data's business:
any metric will do. docs/robustness.md tells how to read the figures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from featherweight.corruptions import KINDS, SEVERITIES, constants_for, corrupt
from featherweight.data import Data, Run
from featherweight.errors import DataError
from featherweight.method import Progress
from featherweight.metrics import Metric, drop
from featherweight.outcome import CorruptionRow, Robustness, TaskRobustness
from featherweight.picture_inputs import PictureInput, picture_input
from featherweight.tasks import tasks_of

MOST = 500  # pictures of each corruption and severity
FEWEST = 100  # with fewer, where there are more, a score says little
CELLS = tuple((kind, severity) for kind in KINDS for severity in SEVERITIES)

_RESAMPLES = 1000
_PROBED = 8  # pictures that are corrupted to see what it takes

Rows = Mapping[str, np.ndarray]


class _Lost(NamedTuple):
    """Of one metric, by 'before' (where there is a twin) and 'after'."""

    scores: Mapping[str, np.ndarray]  # clean, then in the order of ``CELLS``
    drops: Mapping[str, float]
    extra: float | None
    extra_ci95: tuple[float, float] | None


def corrupted_rows(
    runs: Mapping[str, Run],
    data: Data,
    pictures: PictureInput,
    indices: np.ndarray,
    *,
    seed: int,
    progress: Progress,
) -> Rows:
    """Rows of the metric on clean and on corrupted pictures.

    Args:
        runs: What is scored, by name; outputs of the first one stand in for labels where a metric needs none.
        data: Brings pictures, metric and labels.
        pictures: How its inputs hold them.
        indices: Which scored examples.
        seed: Of the corruptions.
        progress: Shows a bar.

    Returns:
        Name -> rows (1 + corruptions x severities, N, k): clean ones first, then in the order of ``CELLS``.

    Raises:
        DataError: The data scores in a way of its own, or outputs do not fit the metric.
        RunnerError: A process died or hangs.
    """
    if type(data).score is not Data.score:
        raise DataError("the data scores itself, so nobody knows which pictures a score is of", fix="Data.of")
    scored = data.scored
    assert scored is not None
    parts: dict[str, list[list[np.ndarray]]] = {name: [] for name in runs}
    batches = [indices[i : i + data.batch_size] for i in range(0, len(indices), data.batch_size)]
    cells: Sequence[tuple[str, int] | None] = (None, *CELLS)
    for cell in progress.track(cells, "Corrupting pictures", total=len(cells)):
        for own in parts.values():
            own.append([])
        for pick in batches:
            (shown,) = scored.take(pick)
            if cell is not None:
                clean = pictures.decode(shown)
                shown = pictures.encode(corrupt(clean, *cell, seed=seed, numbers=pick))
            for name, rows in _scored(runs, data, pick, shown).items():
                parts[name][-1].append(rows)
    return {name: np.stack([np.concatenate(cell) for cell in own]) for name, own in parts.items()}


def _scored(
    runs: Mapping[str, Run], data: Data, pick: np.ndarray, shown: np.ndarray
) -> dict[str, np.ndarray]:
    """Rows of one batch whose inputs are replaced by what is shown."""
    first: tuple[np.ndarray, ...] | None = None
    found = {}
    for name, run in runs.items():
        outputs = run(shown)
        first = outputs if first is None else first
        (rows,) = data.score(_always(outputs), indices=pick, original=_always(first)).values()
        found[name] = rows
    return found


def _always(outputs: tuple[np.ndarray, ...]) -> Run:
    return lambda *_: outputs


def robustness(
    before: Run | None,
    after: Run,
    data: Data,
    indices: np.ndarray,
    *,
    seed: int,
    progress: Progress,
) -> Robustness:
    """What corruptions cost an artifact and its twin.

    Args:
        before: Calls the twin; None: there is none.
        after: Calls the artifact.
        data: Brings pictures, metric and labels.
        indices: Which scored examples count.
        seed: Of corruptions and bootstrap.
        progress: Shows a bar.

    Raises:
        DataError: The inputs are no pictures, or outputs do not fit the metric.
        RunnerError: A process died or hangs.
    """
    pictures = picture_input(data, indices)
    runs = {"after": after} if before is None else {"before": before, "after": after}
    rows = corrupted_rows(runs, data, pictures, indices, seed=seed, progress=progress)
    return told(data.metric, rows, pictures, seed)


def told(metric: Metric, rows: Rows, pictures: PictureInput, seed: int) -> Robustness:
    """What rows of :func:`corrupted_rows` by the names 'before' (where there is a twin) and 'after' say."""
    scores, drops, extra, ci95 = _losses(metric, rows, seed)
    before, after = scores.get("before"), scores["after"]
    return Robustness(
        examples=rows["after"].shape[1],
        pictures=str(pictures),
        constants=constants_for(pictures.height, pictures.width).name,
        clean_before=None if before is None else float(before[0]),
        clean_after=float(after[0]),
        mean_before=None if before is None else float(before[1:].mean()),
        mean_after=float(after[1:].mean()),
        drop_before=drops.get("before"),
        drop_after=drops["after"],
        extra_drop=extra,
        extra_drop_ci95=ci95,
        error_ratio=None if before is None else error_ratio(metric, before[1:], after[1:]),
        rows=[
            CorruptionRow(
                kind=kind,
                severity=severity,
                before=None if before is None else float(before[1 + i]),
                after=float(after[1 + i]),
            )
            for i, (kind, severity) in enumerate(CELLS)
        ],
        tasks=_each_task(metric, rows, seed),
    )


def _losses(metric: Metric, rows: Rows, seed: int) -> _Lost:
    """Scores of all cells, and what corruption costs in the mean."""
    scores = {name: np.array([metric.reduce(cell) for cell in own]) for name, own in rows.items()}
    drops = {
        name: float(np.mean([drop(metric, own[0], value) for value in own[1:]]))
        for name, own in scores.items()
    }
    if "before" not in drops:
        return _Lost(scores, drops, None, None)
    return _Lost(scores, drops, drops["after"] - drops["before"], extra_interval(metric, rows, seed))


def _each_task(metric: Metric, rows: Rows, seed: int) -> list[TaskRobustness]:
    """Each of several tasks by itself."""
    found = []
    parts = {name: [metric.parts(cell) for cell in cells] for name, cells in rows.items()}
    for i, task in enumerate(tasks_of(metric)):
        own = {name: np.stack([cell[i][1] for cell in cells]) for name, cells in parts.items()}
        scores, drops, extra, ci95 = _losses(task.metric, own, seed)
        found.append(
            TaskRobustness(
                name=task.name,
                metric=task.metric.name,
                bounded=task.metric.bounded,
                clean_before=float(scores["before"][0]) if "before" in scores else None,
                clean_after=float(scores["after"][0]),
                drop_before=drops.get("before"),
                drop_after=drops["after"],
                extra_drop=extra,
                extra_drop_ci95=ci95,
            )
        )
    return found


def error_ratio(metric: Metric, before: np.ndarray, after: np.ndarray) -> float | None:
    """Mean over corruptions of one error over the other, each added up over severities.

    The mCE of the paper, with the original where they have AlexNet.

    Args:
        metric: Its error is 1 - score where it is a rate that should be high, else the score itself.
        before: Scores in the order of ``CELLS``.
        after: Likewise.

    Returns:
        None where the metric has no error, or the original makes none on some corruption.
    """
    if metric.higher_is_better and not metric.bounded:
        return None
    errors = [1 - own if metric.higher_is_better else own for own in (before, after)]
    old, new = (own.reshape(len(KINDS), len(SEVERITIES)).sum(axis=1) for own in errors)
    if not (old > 0).all() or not np.isfinite(new / old).all():
        return None
    return float((new / old).mean())


def extra_interval(metric: Metric, rows: Rows, seed: int) -> tuple[float, float] | None:
    """95 % interval of how much more the artifact loses by corruption than its twin; pictures are resampled.

    With rows that are scores themselves, each picture has a loss of its own: the mean over its corruptions of
    what it lost after, less that before.
    """
    if not metric.additive or not metric.bounded or any(own.shape[2] != 1 for own in rows.values()):
        return None
    sign = 1 if metric.higher_is_better else -1
    lost = {name: sign * (own[0] - own[1:].mean(axis=0))[:, 0] for name, own in rows.items()}
    extra = lost["after"] - lost["before"]
    picks = np.random.default_rng(seed).integers(0, len(extra), (_RESAMPLES, len(extra)))
    low, high = np.quantile(extra[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def some_indices(scored: np.ndarray | int, count: int, seed: int) -> np.ndarray:
    """At most so many of the scored examples, by chance, in order."""
    given = np.arange(scored) if isinstance(scored, int) else scored
    if len(given) <= count:
        return given
    return np.sort(np.random.default_rng(seed).permutation(given)[:count])


def affordable(data: Data, indices: np.ndarray, call_s: float, room_s: float) -> int:
    """How many pictures there is time for.

    Args:
        data: Brings the pictures.
        indices: Which may be taken.
        call_s: Seconds that one example takes on both artifacts together.
        room_s: Seconds that there are.

    Returns:
        At most ``MOST``; 0 where it would be fewer than ``FEWEST`` and there are more.

    Raises:
        DataError: The inputs are no pictures.
    """
    probed = indices[:_PROBED]
    pictures = picture_input(data, indices[:MOST])
    most = min(MOST, len(indices))
    if math.isinf(room_s) or not room_s:
        return most if room_s else 0
    assert data.scored is not None
    began = time.monotonic()
    (shown,) = data.scored.take(probed)
    for cell in CELLS:
        pictures.encode(corrupt(pictures.decode(shown), *cell))
    each_s = (time.monotonic() - began) / len(probed) + call_s * (1 + len(CELLS))
    count = int(min(room_s / each_s, most))
    return count if count >= min(FEWEST, most) else 0
