"""Data of several tasks on the same inputs: targets and a metric each, scored by one run.

The targets of all tasks are the columns of one float64 matrix, which holds class numbers and float32 values
exactly. What a run is worth is the mean of the tasks' scores; how much worse one is than another is the drop
of the task that loses most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from featherweight.data import Data
from featherweight.errors import DataError
from featherweight.examples import Examples
from featherweight.metrics import Metric, Outputs, Targets

__all__ = ["Columns", "Task", "TasksMetric", "tasks_data", "tasks_in", "tasks_of"]


@dataclass(frozen=True)
class Columns:
    """Where a task's targets are in the matrix of all.

    Attributes:
        start: The first column.
        shape: Of one example's target.
        dtype: Of the targets, as numpy writes it.
    """

    start: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    def of(self, matrix: np.ndarray) -> np.ndarray:
        """The task's own targets (N, *shape)."""
        taken: np.ndarray = matrix[:, self.start : self.stop]
        return taken.reshape(len(matrix), *self.shape).astype(self.dtype)


@dataclass(frozen=True)
class Task:
    """One of several tasks of a network.

    Attributes:
        name: The user's.
        metric: What scores it.
        outputs: First and last + 1 of the network's flat outputs that are its own.
        scored: Its targets among those of the scored examples; None: it has none.
        trained: Among those of the training examples.
    """

    name: str
    metric: Metric
    outputs: tuple[int, int]
    scored: Columns | None = None
    trained: Columns | None = None

    def own(self, outputs: Outputs) -> Outputs:
        """Its own of the network's flat outputs."""
        return outputs[slice(*self.outputs)]


@dataclass(frozen=True)
class TasksMetric(Metric):
    """Scores each task by its own metric.

    Rows are (numbers of columns of each task's rows ..., the tasks' rows ...).
    """

    name: str = "tasks"
    needs_labels: bool = False
    tasks: tuple[Task, ...] = ()

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> TasksMetric:
        """The metric of these tasks, named after all of them."""
        name = ", ".join(f"{task.name}: {task.metric.name}" for task in tasks)
        return cls(name=name, tasks=tuple(tasks))

    @property
    def compares(self) -> bool:
        return any(task.metric.compares for task in self.tasks)

    def beside(self, targets: Targets, original: Outputs) -> Targets:
        """The original's outputs, then the labels if there are any."""
        return original if targets is None else (*original, np.asarray(targets))

    def rows(self, outputs: Outputs, targets: Targets) -> np.ndarray:
        labels, original = self._apart(targets)
        parts = []
        for task in self.tasks:
            given: Targets = None
            if task.metric.compares:
                given = None if original is None else task.own(original)
            elif labels is not None and task.scored is not None:
                given = task.scored.of(labels)
            try:
                parts.append(task.metric.rows(task.own(outputs), given))
            except DataError as error:
                error.where = f"task '{task.name}'" + (f", {error.where}" if error.where else "")
                raise
        widths = np.tile([float(part.shape[1]) for part in parts], (len(parts[0]), 1))
        return np.concatenate([widths, *parts], axis=1)

    def parts(self, rows: np.ndarray) -> list[tuple[Metric, np.ndarray]]:
        return [(task.metric, part) for task, part in zip(self.tasks, self._split(rows), strict=True)]

    def reduce(self, rows: np.ndarray) -> float:
        return float(np.mean([metric.reduce(part) for metric, part in self.parts(rows)]))

    def _apart(self, targets: Targets) -> tuple[np.ndarray | None, Outputs | None]:
        """Labels of all tasks, and the original's outputs."""
        if not isinstance(targets, tuple):
            return targets, None
        count = self.tasks[-1].outputs[1]
        return (targets[count] if len(targets) > count else None), targets[:count]

    def _split(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        start = len(self.tasks)
        for width in rows[0, :start].astype(int):
            yield rows[:, start : start + width]
            start += width


def tasks_in(data: Data) -> tuple[Task, ...]:
    """The tasks that data has; none where it is of one."""
    return tasks_of(data.metric) if data.has_metric else ()


def tasks_of(metric: Metric) -> tuple[Task, ...]:
    """The tasks that a metric scores; none where it is of one."""
    return metric.tasks if isinstance(metric, TasksMetric) else ()


def tasks_data(given: Mapping[str, Data], outputs: Mapping[str, int]) -> Data:
    """One data of several: the same examples, each task's targets and metric.

    Args:
        given: By the task's name, in the order of the network's outputs; each has a metric.
        outputs: How many flat outputs each task's network has.

    Raises:
        DataError: Examples differ, or a task compares texts.
    """
    first = next(iter(given.values()))
    for name, data in given.items():
        if data.metric.text:
            raise DataError(
                f"task '{name}' compares texts, which one run of several tasks cannot",
                fix="give targets as numbers, and a metric that compares numbers",
            )
    scored = _joined(given, "x", {name: data.scored for name, data in given.items()})
    train = _joined(given, "x_train", {name: data.train for name, data in given.items()})
    calibration = next(
        (data.calibration_examples for data in given.values() if data.calibration_examples is not None), None
    )
    tasks, start = [], 0
    for name, data in given.items():
        own = (start, start + outputs[name])
        tasks.append(Task(name, data.metric, own, scored[1].get(name), train[1].get(name)))
        start = own[1]
    notes = tuple(dict.fromkeys(note for data in given.values() for note in data._notes))
    return Data(
        scored=scored[0],
        train=train[0],
        calibration=calibration,
        metric=TasksMetric.of(tasks),
        augment=next((data.augment for data in given.values() if data.augment is not None), None),
        batch_size=first.batch_size,
        origin={"kind": "tasks", "tasks": {name: data.origin for name, data in given.items()}},
        notes=notes,
    )


def _joined(
    given: Mapping[str, Data], role: str, examples: Mapping[str, Examples | None]
) -> tuple[Examples | None, dict[str, Columns]]:
    """The examples that all tasks share, with the targets of all, and where each one's are."""
    there = {name: one for name, one in examples.items() if one is not None}
    if not there:
        return None, {}
    (first, source), *others = there.items()
    for name, other in others:
        _check_same_rows(role, (first, source), (name, other))
    columns: dict[str, Columns] = {}
    matrices: list[np.ndarray] = []
    start = 0
    for name, one in there.items():
        targets = one.targets
        if targets is None or (role == "x" and given[name].metric.compares):
            continue
        columns[name] = Columns(start, tuple(targets.shape[1:]), targets.dtype.str)
        start = columns[name].stop
        matrices.append(targets.reshape(len(targets), -1).astype(np.float64))
        if not np.array_equal(
            columns[name].of(np.pad(matrices[-1], ((0, 0), (columns[name].start, 0)))), targets
        ):
            raise DataError(
                f"targets of '{name}' do not fit float64", where=role, fix="give class numbers below 2^53"
            )
    return replace(source, targets=np.concatenate(matrices, axis=1) if matrices else None), columns


def _check_same_rows(role: str, first: tuple[str, Examples], other: tuple[str, Examples]) -> None:
    one, two = first[1], other[1]
    if len(one) != len(two):
        what = f"'{first[0]}' has {len(one)} examples and '{other[0]}' has {len(two)}"
    elif list(one.digests) != list(two.digests):
        row = next(
            i for i, pair in enumerate(zip(one.digests, two.digests, strict=True)) if pair[0] != pair[1]
        )
        what = f"example {row} of '{first[0]}' is not that of '{other[0]}'"
    else:
        return
    raise DataError(
        f"{role} of two tasks differ: {what}",
        fix="give every task the same examples in the same order; targets may be left out",
    )
