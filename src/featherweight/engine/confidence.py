"""What class scores and labels say beside the score: calibration, and what a loss gives away.

Calibration is read off the outputs that scoring recorded. The membership attack also needs the outputs for
training examples, which are asked of both artifacts through their runners.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from featherweight.calibration_error import (
    adaptive_calibration_error,
    are_probabilities,
    expected_calibration_error,
    log_probabilities,
)
from featherweight.data import Data, Examples, Run
from featherweight.engine.quality import Scored
from featherweight.errors import DataError
from featherweight.membership import attack_areas
from featherweight.method import Progress
from featherweight.outcome import Attack, Calibration, Confidence, Privacy
from featherweight.tasks import tasks_in

MOST_MEMBERS = 2000  # of each kind; from there on an interval is some 0.03 wide

Classes = Mapping[str, np.ndarray]  # by 'before' (where there is a twin) and 'after': class scores (N, C)


class _Told(NamedTuple):
    """Logarithms of class probabilities, by name, with the labels."""

    logs: Mapping[str, np.ndarray]
    labels: np.ndarray
    probabilities: bool


def scored_outputs(data: Data, scored: Scored) -> np.ndarray:
    """First output of every scored example, as it was recorded.

    Raises:
        DataError: A scored example takes several calls, or outputs differ in shape.
    """
    parts = [call.load()[0] for call in scored.calls]
    count = 0 if data.scored is None else len(data.scored)
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) != 1 or sum(map(len, parts)) != count:
        raise DataError("outputs cannot be told apart by example", fix="Data.of(x=..., y=...)")
    return np.concatenate(parts)


def calibration(data: Data, outputs: Classes, indices: np.ndarray) -> Calibration:
    """Calibration errors of class probabilities.

    Args:
        data: Brings the labels.
        outputs: Of all scored examples, through the runtime.
        indices: Which scored examples count.

    Raises:
        DataError: The outputs are no class scores (N, C), or there are no labels.
    """
    assert data.scored is not None
    _check_one_task(data)
    found = _told(outputs, data.scored.targets, indices)
    seen = {name: _confidence(logs, found.labels) for name, logs in found.logs.items()}
    return Calibration(
        examples=len(indices),
        outputs="probabilities" if found.probabilities else "scores",
        before=seen.get("before"),
        after=seen["after"],
    )


def _confidence(logs: np.ndarray, labels: np.ndarray) -> Confidence:
    predicted = logs.argmax(axis=1)
    confidence, right = np.exp(logs.max(axis=1)), predicted == labels
    return Confidence(
        ece=expected_calibration_error(confidence, right),
        adaptive_ece=adaptive_calibration_error(confidence, right),
        confidence=float(confidence.mean()),
        accuracy=float(right.mean()),
        loss=float(_losses(logs, labels).mean()),
    )


def membership(
    data: Data,
    outputs: Classes,
    opened: Callable[[], Mapping[str, Run]],
    *,
    most: int,
    seed: int,
    progress: Progress,
) -> Privacy:
    """A loss-threshold attack: as many training examples as scored ones.

    Args:
        data: Brings scored and training examples with their labels.
        outputs: Of all scored examples, through the runtime.
        opened: What calls the same artifacts, by the same names; asked for when the first pass is made.
        most: Examples of each kind at most.
        seed: Of which ones.
        progress: Shows a bar.

    Raises:
        DataError: There are no training examples with labels, or the outputs are no class scores (N, C).
        RunnerError: A process died or hangs.
    """
    scored, train = data.scored, data.train
    assert scored is not None
    _check_one_task(data)
    if train is None or train.targets is None:
        raise DataError(
            "there are no training examples with labels", fix="add x_train and y_train to the data"
        )
    count = min(len(scored), len(train), most)
    if count < 2:
        raise DataError(f"{count} training examples are too few", fix="add more x_train and y_train")
    random = np.random.default_rng(seed)
    others, members = (np.sort(random.permutation(len(one))[:count]) for one in (scored, train))
    outside = _told(outputs, scored.targets, others)
    asked = {
        name: first_outputs(run, train, members, data.batch_size, progress) for name, run in opened().items()
    }
    inside = _told(asked, train.targets[members], np.arange(count), probabilities=outside.probabilities)
    names = list(outputs)
    lost = {
        name: (_losses(inside.logs[name], inside.labels), _losses(outside.logs[name], outside.labels))
        for name in names
    }
    areas = attack_areas([lost[name][0] for name in names], [lost[name][1] for name in names])
    seen = {
        name: Attack(
            auc=float(areas.values[i]),
            auc_ci95=areas.interval(i),
            member_loss=float(lost[name][0].mean()),
            other_loss=float(lost[name][1].mean()),
        )
        for i, name in enumerate(names)
    }
    change, interval = areas.change(0, 1) if len(names) > 1 else (None, None)
    return Privacy(
        members=count,
        others=count,
        before=seen.get("before"),
        after=seen["after"],
        change=change,
        change_ci95=interval,
    )


def first_outputs(
    run: Run, examples: Examples, picks: np.ndarray, size: int, progress: Progress
) -> np.ndarray:
    """First output of these examples, so many a call."""
    batches = [picks[i : i + size] for i in range(0, len(picks), size)]
    shown = progress.track(batches, "Asking for outputs", total=len(batches))
    return np.concatenate([run(*examples.take(pick))[0] for pick in shown])


def _check_one_task(data: Data) -> None:
    if tasks_in(data):
        raise DataError(
            "it is told of networks with one task, and this one has several", fix="ask of each one"
        )


def _told(
    outputs: Classes, targets: np.ndarray | None, indices: np.ndarray, probabilities: bool | None = None
) -> _Told:
    """Class probabilities of picked examples, with their labels.

    Raises:
        DataError: There are none.
    """
    if targets is None or targets.dtype.kind not in "iu":
        raise DataError("there are no class labels", fix="add labels y to the data")
    picked = {name: np.asarray(values)[indices] for name, values in outputs.items()}
    first = next(iter(picked.values()))
    labels = targets[indices].reshape(len(indices), -1)
    if first.ndim != 2 or first.shape[1] < 2 or labels.shape[1] != 1 or first.dtype.kind != "f":
        raise DataError(
            f"the outputs are {first.dtype} of the shape {first.shape[1:]} an example, not class scores",
            fix="a first output (N, C) with one label for each example",
        )
    labels = labels[:, 0].astype(np.int64)
    if labels.min() < 0 or labels.max() >= first.shape[1]:
        raise DataError(f"labels are outside of 0..{first.shape[1] - 1}", fix="one output for each class")
    if not all(np.isfinite(values).all() for values in picked.values()):
        raise DataError("an output is NaN or infinite", fix="look at the artifact's quality first")
    known = are_probabilities(first) if probabilities is None else probabilities
    return _Told({name: log_probabilities(values, known) for name, values in picked.items()}, labels, known)


def _losses(logs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.asarray(-logs[np.arange(len(labels)), labels])
