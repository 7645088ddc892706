"""Data of several tasks: targets side by side, a metric each, the drop of the one that loses most."""

from __future__ import annotations

import numpy as np
import pytest

from featherweight.data import Data
from featherweight.drops import drop_of_rows, paired_bootstrap
from featherweight.engine.verdict import violations
from featherweight.errors import DataError
from featherweight.outcome import Budget, Measurement, TaskScore
from featherweight.tasks import Columns, TasksMetric, tasks_data, tasks_in

X = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
CLASSES = np.arange(40) % 4
VALUES = X[:, :2] * 2


def both(**more: Data) -> Data:
    each = {"kind": Data.of(X, CLASSES), "value": Data.of(X, VALUES), **more}
    return tasks_data(each, dict.fromkeys(each, 1))


def scores(classes: np.ndarray) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[classes]


class TestColumns:
    def test_give_targets_back_as_they_were(self) -> None:
        data = both()
        assert data.scored is not None and data.scored.targets is not None
        kind, value = tasks_in(data)
        assert kind.scored is not None and value.scored is not None
        assert np.array_equal(kind.scored.of(data.scored.targets), CLASSES)
        again = value.scored.of(data.scored.targets)
        assert again.dtype == VALUES.dtype
        assert np.array_equal(again, VALUES)

    def test_have_the_shape_of_one_target(self) -> None:
        assert Columns(3, (2, 2), "<f4").stop == 7


class TestScore:
    def test_one_run_scores_all_tasks(self) -> None:
        data, wrong = both(), CLASSES.copy()
        wrong[:10] = (wrong[:10] + 1) % 4
        rows = data.score(lambda x: self.answer(x, wrong))[data.metric.name]
        (accuracy, first), (mse, second) = data.metric.parts(rows)
        assert accuracy.reduce(first) == pytest.approx(0.75)
        assert mse.reduce(second) == pytest.approx(0.25)
        assert data.metric.reduce(rows) == pytest.approx(0.5)

    def answer(self, x: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, ...]:
        places = [int(np.flatnonzero((row == X).all(1))[0]) for row in x]
        return scores(classes[places]), VALUES[places] + 0.5

    def test_a_task_without_targets_is_compared_with_the_original(self) -> None:
        data = both(free=Data.of(X, metric="agreement"))
        turned = (CLASSES + (np.arange(40) < 4)) % 4

        def run(x: np.ndarray) -> tuple[np.ndarray, ...]:
            first, second = self.answer(x, CLASSES)
            return first, second, self.answer(x, turned)[0]

        def original(x: np.ndarray) -> tuple[np.ndarray, ...]:
            first, second = self.answer(x, CLASSES)
            return first, second, first

        rows = data.score(run, original=original)[data.metric.name]
        assert [own.reduce(part) for own, part in data.metric.parts(rows)] == pytest.approx([1.0, 0.25, 0.9])

    def test_a_subset_is_scored_as_in_the_whole(self) -> None:
        data, some = both(), np.array([3, 8, 21])
        whole = data.score(lambda x: self.answer(x, CLASSES))[data.metric.name]
        assert np.array_equal(
            data.score(lambda x: self.answer(x, CLASSES), some)[data.metric.name], whole[some]
        )

    def test_what_is_wrong_names_the_task(self) -> None:
        data = both()
        with pytest.raises(DataError) as caught:
            data.score(lambda x: (scores(CLASSES[: len(x)]), scores(CLASSES[: len(x)])))
        assert "task 'value'" in str(caught.value)


class TestDrop:
    def rows(self, first: float, second: float) -> tuple[TasksMetric, np.ndarray]:
        metric = tasks_in(two_classes())
        made = TasksMetric.of(metric)
        right = [np.arange(100) < share * 100 for share in (first, second)]
        return made, np.stack([np.ones(100), np.ones(100), *right], axis=1).astype(float)

    def test_is_that_of_the_task_that_loses_most(self) -> None:
        metric, before = self.rows(0.9, 0.8)
        _, after = self.rows(0.89, 0.75)
        assert drop_of_rows(metric, before, after) == pytest.approx(0.05)

    def test_its_interval_holds_it_and_no_task_is_below_its_low_end(self) -> None:
        metric, before = self.rows(0.9, 0.8)
        _, after = self.rows(0.85, 0.7)
        low, high = paired_bootstrap(metric, before, after, seed=0)
        assert low <= 0.1 <= high
        each = [
            paired_bootstrap(own, one, other, seed=0)
            for (own, one), (_, other) in zip(metric.parts(before), metric.parts(after), strict=True)
        ]
        assert high >= max(end for _, end in each)


def two_classes() -> Data:
    each = {"one": Data.of(X, CLASSES), "two": Data.of(X, CLASSES)}
    return tasks_data(each, {"one": 1, "two": 1})


class TestBudget:
    def seen(self, *drops: float) -> Measurement:
        tasks = [
            TaskScore(name=name, metric="accuracy", quality=0.9, quality_drop=lost)
            for name, lost in zip("ab", drops, strict=True)
        ]
        return Measurement(quality_drop=max(drops), tasks=tasks)

    def test_each_task_has_a_limit_of_its_own(self) -> None:
        budget = Budget(drops={"a": 0.01, "b": 0.05}, quality_drop=0.05)
        assert not violations(budget, self.seen(0.01, 0.04))
        (broken,) = violations(budget, self.seen(0.02, 0.04))
        assert (broken.limit, broken.value) == (0.01, 0.02)
        assert "task 'a'" in broken.reason

    def test_one_limit_holds_for_the_worst(self) -> None:
        assert not violations(Budget(quality_drop=0.05), self.seen(0.01, 0.04))
        (broken,) = violations(Budget(quality_drop=0.03), self.seen(0.01, 0.04))
        assert broken.value == 0.04


class TestRefusals:
    def test_examples_of_another_order(self) -> None:
        with pytest.raises(DataError, match="example 0 of 'a' is not that of 'b'"):
            tasks_data({"a": Data.of(X, CLASSES), "b": Data.of(X[::-1].copy(), CLASSES)}, {"a": 1, "b": 1})

    def test_texts(self) -> None:
        said = Data.of(X, [str(one) for one in CLASSES], decode=lambda outputs: [""])
        with pytest.raises(DataError, match="compares texts"):
            tasks_data({"a": Data.of(X, CLASSES), "b": said}, {"a": 1, "b": 1})
