"""Scores an artifact through its runner, and says what changed against the original.

Every call of a scoring run is recorded, by a digest of its inputs, so that artifacts can be compared
with the original (and the original's outputs stand in for labels) without running it again, and any subset of
the examples can be judged later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.data import Data, Run
from featherweight.engine.jobs import Served, disk_room
from featherweight.engine.timing import Limits
from featherweight.errors import DataError
from featherweight.metrics import Metric, drop_of_rows, paired_bootstrap, predicted_classes, sqnr_db
from featherweight.outcome import ClassChange, Flips, TaskScore, WorstClass
from featherweight.runtime import Artifact, Target
from featherweight.tasks import tasks_of
from featherweight.usercode import call_user

Outputs = tuple[np.ndarray, ...]

MOST_DB = 200.0  # of equal outputs, whose SQNR is infinite; JSON has no infinity
_WORST = 1e9  # a drop that is infinite or not a number


@dataclass(frozen=True)
class Call:
    """One call of a scoring run: what it was given, by digest, and what it answered, in files."""

    digest: str
    files: tuple[Path, ...]

    def load(self) -> Outputs:
        """The recorded outputs, read as they are used."""
        return tuple(np.load(file, mmap_mode="r", allow_pickle=False) for file in self.files)


@dataclass(frozen=True)
class Scored:
    """An artifact's scores, and the calls that they came from.

    Attributes:
        rows: Metric name -> rows (N, k), one per scored example.
        calls: In the order in which they were made.
    """

    rows: Mapping[str, np.ndarray]
    calls: tuple[Call, ...]

    @classmethod
    def load(cls, folder: Path) -> Scored:
        """What ``score_artifact`` left in a folder.

        Raises:
            FileNotFoundError: It did not get to its end there.
        """
        index = json.loads((folder / "scored.json").read_text())
        rows = {
            name: np.load(folder / f"rows{i}.npy", allow_pickle=False) for i, name in enumerate(index["rows"])
        }
        calls = [Call(digest, tuple(folder / file for file in files)) for digest, files in index["calls"]]
        return cls(rows, tuple(calls))

    def answer(self, *inputs: np.ndarray) -> Outputs:
        """The recorded outputs of a call with these inputs.

        Raises:
            DataError: There was no such call.
        """
        digest = _digest(inputs)
        for call in self.calls:
            if call.digest == digest:
                return call.load()
        raise DataError(
            "the original was never called with inputs that the artifact is called with",
            where="a score that depends on earlier outputs, without labels",
            fix="give labels and a metric that compares with them",
        )


def score_artifact(
    artifact: Artifact,
    target: Target,
    data: Data,
    folder: Path,
    *,
    original: Scored | None = None,
    limits: Limits | None = None,
) -> Scored:
    """Score every example through a runner, and record each call in ``folder``.

    Args:
        artifact: What is opened.
        target: Where and how.
        data: Its ``score`` makes the calls.
        folder: Takes the outputs; made if it is not there. ``Scored.load`` reads it again.
        original: The original's scores, whose outputs stand in for labels where a metric needs none;
            None when this is the original.
        limits: Only ``timeout_s`` counts.

    Raises:
        RunnerError: The process died or hangs, or refused the inputs.
        DataError: Examples and metric do not fit the outputs.
        MachineError: The disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with Served(artifact, target, limits) as served:
        recorder = _Recorder(served, folder)
        rows = _rows(data, recorder, recorder.again if original is None else original.answer)
    with disk_room(folder):
        for i, values in enumerate(rows.values()):
            np.save(folder / f"rows{i}.npy", values, allow_pickle=False)
        index = {"rows": list(rows), "calls": [(c.digest, [f.name for f in c.files]) for c in recorder.calls]}
        unfinished = folder / "scored.part"
        unfinished.write_text(json.dumps(index))
        unfinished.replace(folder / "scored.json")
    return Scored(dict(rows), tuple(recorder.calls))


def _rows(data: Data, run: Run, original: Run) -> Mapping[str, np.ndarray]:
    if type(data).score is not Data.score:
        return call_user(data.score, run, error=DataError)
    return data.score(run, original=original)


class _Recorder:
    """Calls the served session and keeps what it answers."""

    def __init__(self, served: Served, folder: Path) -> None:
        self._served = served
        self._folder = folder
        self.calls: list[Call] = []

    def __call__(self, *inputs: np.ndarray) -> Outputs:
        outputs = self._served.run(*inputs)
        files = tuple(self._folder / f"call{len(self.calls):06d}.{i}.npy" for i in range(len(outputs)))
        with disk_room(self._folder):
            for file, output in zip(files, outputs, strict=True):
                np.save(file, output, allow_pickle=False)
        self.calls.append(Call(_digest(inputs), files))
        return outputs

    def again(self, *inputs: np.ndarray) -> Outputs:
        """The outputs for the same inputs as last time, else new ones, unrecorded."""
        if self.calls and self.calls[-1].digest == _digest(inputs):
            return self.calls[-1].load()
        return self._served.run(*inputs)


def _digest(inputs: tuple[np.ndarray, ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in inputs:
        plain = np.ascontiguousarray(array)
        digest.update(f"{plain.dtype.str}{np.shape(array)}".encode())
        digest.update(plain.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Compared:
    """The outputs of two scoring runs, example by example; None where they cannot be compared.

    Attributes:
        agrees: Share of positions with the same class (N,), where outputs are class scores.
        before: The original's classes (N, positions), -1 where a score is not a number.
        after: The artifact's.
        energies: Noise and signal (N, 2), over all floating-point outputs.
    """

    agrees: np.ndarray | None = None
    before: np.ndarray | None = None
    after: np.ndarray | None = None
    energies: np.ndarray | None = None


def compare_outputs(twin: Scored, artifact: Scored, metric: Metric) -> Compared:
    """Compare the recorded calls of the same inputs, one after the other.

    Nothing can be said where the calls differ, as they do when each depends on earlier outputs
    (beam search), or where the shapes of outputs do.
    """
    if [call.digest for call in twin.calls] != [call.digest for call in artifact.calls] or not twin.calls:
        return Compared()
    before, after, energies = [], [], []
    for ours, theirs in zip(artifact.calls, twin.calls, strict=True):
        got, meant = ours.load(), theirs.load()
        if [x.shape for x in got] != [x.shape for x in meant]:
            return Compared()
        energies.append(_energies(got, meant))
        if metric.classes:
            before.append(predicted_classes(meant[0]).reshape(len(meant[0]), -1))
            after.append(predicted_classes(got[0]).reshape(len(got[0]), -1))
    total = np.concatenate(energies)
    known = total if len(total) else None
    if not metric.classes or len({x.shape[1] for x in before}) > 1:
        return Compared(energies=known)
    first, second = np.concatenate(before), np.concatenate(after)
    return Compared(((first == second) & (second >= 0)).mean(axis=1), first, second, known)


def _energies(got: Outputs, meant: Outputs) -> np.ndarray:
    """Noise and signal of each example of a call; one row for the call where an output has no batch axis."""
    pairs = [(a, s) for a, s in zip(got, meant, strict=True) if s.dtype.kind == "f"]
    if not pairs:
        return np.empty((0, 2))
    lengths = {len(s) if s.ndim else -1 for _, s in pairs}
    count = lengths.pop() if len(lengths) == 1 and -1 not in lengths else 1
    energies = np.zeros((count, 2))
    for a, s in pairs:
        signal = np.asarray(s, np.float64).reshape(count, -1)
        noise = np.asarray(a, np.float64).reshape(count, -1) - signal
        energies += np.stack([np.square(noise).sum(axis=1), np.square(signal).sum(axis=1)], axis=1)
    energies[np.isnan(energies[:, 0]), 0] = np.inf
    return energies


@dataclass(frozen=True)
class Quality:
    """What the scored examples say of an artifact; the fields are those of ``Measurement``.

    Attributes:
        baseline: The original's score on the same examples.
        classes: Recall of each class before and after, where there are labels.
        tasks: Each of several tasks.
    """

    baseline: float
    quality: float
    quality_drop: float
    quality_drop_ci95: tuple[float, float]
    agreement: float | None
    sqnr_db: float | None
    flips: Flips | None
    worst_class: WorstClass | None
    classes: tuple[ClassChange, ...] = ()
    tasks: tuple[TaskScore, ...] = ()

    def fields(self) -> dict[str, Any]:
        """For ``Measurement(**fields)``."""
        names = (
            "quality",
            "quality_drop",
            "quality_drop_ci95",
            "agreement",
            "sqnr_db",
            "flips",
            "worst_class",
            "tasks",
        )
        return {name: getattr(self, name) for name in names}


def quality(
    data: Data, twin: Scored, artifact: Scored, *, indices: np.ndarray | None = None, seed: int = 0
) -> Quality:
    """Judge an artifact against its twin on the same examples.

    Args:
        data: Brings the metric, labels and names of classes.
        twin: The original's scores.
        artifact: The artifact's.
        indices: Which scored examples count; None for all.
        seed: Of the bootstrap.
    """
    metric = data.metric
    examples = len(twin.rows[metric.name])
    picked = np.arange(examples) if indices is None else indices
    rows_before, rows_after = (scored.rows[metric.name][picked] for scored in (twin, artifact))
    before, after = metric.reduce(rows_before), metric.reduce(rows_after)
    low, high = paired_bootstrap(metric, rows_before, rows_after, seed)
    compared = compare_outputs(twin, artifact, metric)
    classes = _classes(data, compared, picked, examples)
    return Quality(
        baseline=_finite(before),
        quality=_finite(after),
        quality_drop=_finite(drop_of_rows(metric, rows_before, rows_after)),
        quality_drop_ci95=(_finite(low), _finite(high)),
        agreement=_agreement(compared, picked, examples),
        sqnr_db=_decibels(compared, picked, examples),
        flips=_flips(data, compared, picked, examples),
        worst_class=_worst(classes),
        classes=classes,
        tasks=task_scores(metric, rows_before, rows_after, seed),
    )


def task_scores(metric: Metric, before: np.ndarray, after: np.ndarray, seed: int) -> tuple[TaskScore, ...]:
    """Each of several tasks after against before, on the same rows; none where there is one task."""
    found = []
    for task, (own, one), (_, other) in zip(
        tasks_of(metric), metric.parts(before), metric.parts(after), strict=True
    ):
        low, high = paired_bootstrap(own, one, other, seed)
        found.append(
            TaskScore(
                name=task.name,
                metric=own.name,
                bounded=own.bounded,
                quality=_finite(own.reduce(other)),
                quality_drop=_finite(drop_of_rows(own, one, other)),
                quality_drop_ci95=(_finite(low), _finite(high)),
            )
        )
    return tuple(found)


def _finite(value: float) -> float:
    """JSON has neither infinity nor NaN, and no limit is met by them."""
    return float(np.nan_to_num(value, nan=_WORST, posinf=_WORST, neginf=-_WORST))


def _agreement(compared: Compared, picked: np.ndarray, examples: int) -> float | None:
    if compared.agrees is None:
        return None
    return float(_of(compared.agrees, picked, examples).mean())


def _decibels(compared: Compared, picked: np.ndarray, examples: int) -> float | None:
    if compared.energies is None:
        return None
    value = sqnr_db(_of(compared.energies, picked, examples))
    return float(np.clip(np.nan_to_num(value, nan=-MOST_DB), -MOST_DB, MOST_DB))


def _of(values: np.ndarray, picked: np.ndarray, examples: int) -> np.ndarray:
    """The picked examples; all, where a scored example takes several calls and none can be told apart."""
    return values[picked] if len(values) == examples else values


def _labelled(
    data: Data, compared: Compared, picked: np.ndarray, examples: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Labels and the classes before and after, flat; None without labels for the outputs."""
    targets = None if data.scored is None else data.scored.targets
    before, after = compared.before, compared.after
    if before is None or after is None or targets is None or len(before) != examples:
        return None
    if targets.dtype.kind not in "iu" or targets.size != before.size:
        return None
    labels = targets.reshape(before.shape)[picked].reshape(-1)
    return labels, before[picked].reshape(-1), after[picked].reshape(-1)


def _flips(data: Data, compared: Compared, picked: np.ndarray, examples: int) -> Flips | None:
    known = _labelled(data, compared, picked, examples)
    if known is None:
        return None
    labels, before, after = known
    right, still = before == labels, after == labels
    return Flips(lost=int((right & ~still).sum()), won=int((~right & still).sum()))


def _classes(data: Data, compared: Compared, picked: np.ndarray, examples: int) -> tuple[ClassChange, ...]:
    known = _labelled(data, compared, picked, examples)
    if known is None:
        return ()
    labels, before, after = known
    changes = []
    for label in np.unique(labels[labels >= 0]):
        own = labels == label
        names = data.class_names
        changes.append(
            ClassChange(
                label=names[label] if names is not None and label < len(names) else str(label),
                examples=int(own.sum()),
                before=float((before[own] == label).mean()),
                after=float((after[own] == label).mean()),
            )
        )
    return tuple(changes)


def _worst(classes: tuple[ClassChange, ...]) -> WorstClass | None:
    if not classes:
        return None
    worst = max(classes, key=lambda change: change.before - change.after)
    return WorstClass(label=worst.label, drop=worst.before - worst.after)
