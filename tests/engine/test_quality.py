"""What is said of an artifact's outputs, against figures worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featherweight.data import Data
from featherweight.engine import quality as module
from featherweight.engine.quality import MOST_DB, Call, Scored, compare_outputs, quality, score_artifact
from featherweight.errors import DataError, MachineError
from featherweight.metrics import find_metric
from featherweight.outcome import Flips, WorstClass
from featherweight.runtime import Artifact, Target

Make = Callable[..., Artifact]


def few(x: np.ndarray, metric: str, y: np.ndarray | None = None, **more: Any) -> Data:
    return Data.of(x, y, metric=metric, batch_size=2, **more)


def recorded(folder: Path, data: Data, outputs: np.ndarray, original: Scored | None = None) -> Scored:
    """A scoring run whose session answered with these outputs, two examples a call."""
    assert data.scored is not None
    folder.mkdir()
    calls = []
    for i in range(0, len(outputs), 2):
        np.save(folder / f"{i}.npy", outputs[i : i + 2])
        calls.append(Call(module._digest(data.scored.take(np.arange(i, i + 2))), (folder / f"{i}.npy",)))
    bare = Scored({}, tuple(calls))
    return Scored(data.score(bare.answer, original=(original or bare).answer), tuple(calls))


def one_hot(*labels: int, high: float = 1.0) -> np.ndarray:
    return np.eye(3, dtype=np.float32)[list(labels)] * high


X = np.arange(12, dtype=np.float32).reshape(6, 2)
LABELS = np.array([0, 0, 1, 1, 2, 2])


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Data, Scored, Scored]:
    """The original errs on example 5, the artifact on 1 and 2."""
    data = few(X, "accuracy", LABELS, class_names=("ankle boot", "bag", "coat"))
    twin = recorded(tmp_path / "twin", data, one_hot(0, 0, 1, 1, 2, 0))
    artifact = recorded(tmp_path / "artifact", data, one_hot(0, 1, 0, 1, 2, 2, high=0.9))
    return data, twin, artifact


class TestQuality:
    def test_labels(self, pair: tuple[Data, Scored, Scored]) -> None:
        seen = quality(*pair)
        assert seen.baseline == pytest.approx(5 / 6)
        assert seen.quality == pytest.approx(4 / 6)
        assert seen.quality_drop == pytest.approx(1 / 6)
        low, high = seen.quality_drop_ci95
        assert low < 1 / 6 < high
        assert seen.flips == Flips(lost=2, won=1)
        assert seen.agreement == pytest.approx(3 / 6)
        assert seen.worst_class == WorstClass(label="ankle boot", drop=0.5)
        changes = {change.label: (change.examples, change.before, change.after) for change in seen.classes}
        assert changes == {"ankle boot": (2, 1.0, 0.5), "bag": (2, 1.0, 0.5), "coat": (2, 0.5, 1.0)}
        noise = 3 * 0.1**2 + 3 * (1 + 0.9**2)
        assert seen.sqnr_db == pytest.approx(10 * math.log10(6 / noise), abs=1e-5)

    def test_a_half(self, pair: tuple[Data, Scored, Scored]) -> None:
        seen = quality(*pair, indices=np.array([0, 3, 4, 5]))
        assert (seen.baseline, seen.quality) == (0.75, 1.0)
        assert seen.quality_drop == -0.25
        assert seen.flips == Flips(lost=0, won=1)
        assert seen.agreement == 0.75
        assert {change.label: change.examples for change in seen.classes} == {
            "ankle boot": 1,
            "bag": 1,
            "coat": 2,
        }
        noise = 3 * 0.1**2 + 1 + 0.9**2
        assert seen.sqnr_db == pytest.approx(10 * math.log10(4 / noise), abs=1e-5)

    def test_halves_make_up_the_whole(self, pair: tuple[Data, Scored, Scored]) -> None:
        first = quality(*pair, indices=np.array([1, 2, 5]))
        second = quality(*pair, indices=np.array([0, 3, 4]))
        assert first.flips == Flips(lost=2, won=1)
        assert second.flips == Flips(lost=0, won=0)
        assert second.quality_drop == 0

    def test_the_original_against_itself(self, pair: tuple[Data, Scored, Scored]) -> None:
        data, twin, _ = pair
        seen = quality(data, twin, twin)
        unseen = 1 - 0.025 ** (1 / len(twin.rows["accuracy"]))  # so few examples show little
        assert (seen.quality_drop, seen.agreement) == (0, 1)
        assert seen.quality_drop_ci95 == pytest.approx((-unseen, unseen))
        assert seen.sqnr_db == MOST_DB

    def test_same_seed_same_interval(self, pair: tuple[Data, Scored, Scored]) -> None:
        seen = [quality(*pair, seed=seed) for seed in (1, 1, 2)]
        assert seen[0] == seen[1]

    def test_fields_are_those_of_a_measurement(self, pair: tuple[Data, Scored, Scored]) -> None:
        from featherweight.outcome import Measurement

        seen = quality(*pair)
        assert Measurement(**seen.fields()).flips == seen.flips

    def test_names_of_classes_may_be_missing(self, pair: tuple[Data, Scored, Scored], tmp_path: Path) -> None:
        _, twin, artifact = pair
        seen = quality(few(X, "accuracy", LABELS), twin, artifact)
        assert [change.label for change in seen.classes] == ["0", "1", "2"]


class TestWithoutLabels:
    @pytest.mark.parametrize(("metric", "drop"), [("agreement", 0.5), ("sqnr", 5.46 / 6)])
    def test_the_original_is_the_truth(self, tmp_path: Path, metric: str, drop: float) -> None:
        data = few(X, metric)
        twin = recorded(tmp_path / "twin", data, one_hot(0, 0, 1, 1, 2, 0))
        artifact = recorded(tmp_path / "artifact", data, one_hot(0, 1, 0, 1, 2, 2, high=0.9), twin)
        seen = quality(data, twin, artifact)
        assert seen.baseline == 1.0
        assert seen.quality_drop == pytest.approx(drop, abs=1e-6)
        assert seen.flips is None
        assert seen.worst_class is None
        assert (seen.agreement is None) == (metric == "sqnr")

    def test_numbers_that_are_none_are_the_worst(self, tmp_path: Path) -> None:
        data = few(X, "mse", np.ones((6, 3), np.float32))
        twin = recorded(tmp_path / "twin", data, one_hot(0, 0, 1, 1, 2, 0))
        artifact = recorded(tmp_path / "artifact", data, one_hot(0, 0, 1, 1, 2, 0) * np.float32(np.nan))
        seen = quality(data, twin, artifact)
        assert seen.quality_drop == 1e9
        assert seen.sqnr_db == -MOST_DB
        assert seen.agreement is None


class TestCompare:
    def test_other_calls_cannot_be_compared(self, pair: tuple[Data, Scored, Scored]) -> None:
        data, twin, artifact = pair
        fewer = Scored(artifact.rows, artifact.calls[1:])
        assert compare_outputs(twin, fewer, data.metric).energies is None
        turned = Scored(artifact.rows, artifact.calls[::-1])
        assert compare_outputs(twin, turned, data.metric).agrees is None
        assert quality(data, twin, turned).agreement is None

    def test_other_shapes_cannot_be_compared(self, pair: tuple[Data, Scored, Scored], tmp_path: Path) -> None:
        data, twin, _ = pair
        wide = few(X, "accuracy", LABELS)
        artifact = recorded(tmp_path / "wide", wide, np.eye(4, dtype=np.float32)[[0, 1, 0, 1, 2, 2]])
        assert compare_outputs(twin, artifact, data.metric).energies is None

    def test_an_output_without_a_batch_counts_as_one(self, tmp_path: Path) -> None:
        def scored(name: str, value: float) -> Scored:
            np.save(tmp_path / f"{name}.npy", np.float32(value))
            return Scored({}, (Call("x", (tmp_path / f"{name}.npy",)),))

        compared = compare_outputs(scored("a", 2.0), scored("b", 1.0), find_metric("mse"))
        np.testing.assert_array_equal(compared.energies, [[1.0, 4.0]])

    def test_dense_classes_count_positions(self, tmp_path: Path) -> None:
        scores = np.zeros((2, 3, 4), np.float32)
        scores[:, 1] = 1.0
        changed = scores.copy()
        changed[0, 2, 0] = 5.0
        data = few(X[:2], "accuracy", np.ones((2, 4), np.int64))
        twin, artifact = (
            recorded(tmp_path / name, data, values) for name, values in (("a", scores), ("b", changed))
        )
        seen = quality(data, twin, artifact)
        assert seen.flips == Flips(lost=1, won=0)
        assert seen.agreement == 7 / 8
        assert seen.worst_class == WorstClass(label="1", drop=1 / 8)


class TestScoreArtifact:
    def test_scores_through_the_runner_and_can_be_read_again(
        self, make: Make, target: Target, tmp_path: Path
    ) -> None:
        data = few(X, "mse", X)
        twin = score_artifact(make("twin"), target, data, tmp_path / "t")
        artifact = score_artifact(
            make("artifact", shift=1.0),
            target,
            data,
            tmp_path / "a",
            original=twin,
        )
        np.testing.assert_array_equal(twin.rows["mse"], np.zeros((6, 1)))
        np.testing.assert_array_equal(artifact.rows["mse"], np.ones((6, 1)))
        assert [call.digest for call in twin.calls] == [call.digest for call in artifact.calls]
        assert len(twin.calls) == 3
        again = Scored.load(tmp_path / "a")
        assert again.calls == artifact.calls
        np.testing.assert_array_equal(again.rows["mse"], artifact.rows["mse"])
        np.testing.assert_array_equal(again.calls[1].load()[0], X[2:4] + 1)

    def test_the_original_stands_in_for_labels(self, make: Make, target: Target, tmp_path: Path) -> None:
        data = few(X + 1, "sqnr")
        twin = score_artifact(make("twin"), target, data, tmp_path / "t")
        artifact = score_artifact(
            make("artifact", scale=0.9),
            target,
            data,
            tmp_path / "a",
            original=twin,
        )
        seen = quality(data, twin, artifact)
        assert seen.baseline == 1.0
        assert seen.quality_drop == pytest.approx(0.01, rel=1e-4)
        assert seen.sqnr_db == pytest.approx(20, rel=1e-4)

    def test_a_score_of_the_users_own(self, make: Make, target: Target, tmp_path: Path) -> None:
        class Own(Data):
            def score(self, run: Any, indices: Any = None) -> dict[str, np.ndarray]:  # type: ignore[override]
                (first,) = run(X[:1])
                (second,) = run(first)  # depends on what came before, as beam search does
                if second[0, 0] > 10:
                    raise ValueError("lost the beam")
                return {self.metric.name: second.astype(np.float64)}

        def length(outputs: Any, targets: Any) -> Any:
            raise AssertionError("not called: the rows are given")

        data = Own.of(X, metric=length)
        twin = score_artifact(make("twin"), target, data, tmp_path / "t")
        artifact = score_artifact(make("a", shift=0.5), target, data, tmp_path / "a", original=twin)
        seen = quality(data, twin, artifact)
        assert seen.quality_drop == pytest.approx(-1.0)
        assert seen.agreement is seen.sqnr_db is seen.flips is None
        with pytest.raises(DataError, match="lost the beam") as told:
            score_artifact(make("b", shift=20.0), target, data, tmp_path / "b", original=twin)
        assert "raise ValueError" in str(told.value)

    def test_unfinished_is_not_read(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            Scored.load(tmp_path)

    def test_calls_that_the_original_never_had(self, pair: tuple[Data, Scored, Scored]) -> None:
        with pytest.raises(DataError, match="never called"):
            pair[1].answer(X + 1)

    def test_a_full_disk_is_told(
        self, make: Make, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: object, **named: object) -> None:
            raise OSError(28, "No space left on device")

        data = few(X, "mse", X)
        artifact = make("a")
        monkeypatch.setattr(module.np, "save", full)
        with pytest.raises(MachineError, match="the disk is full"):
            score_artifact(artifact, target, data, tmp_path / "t")
