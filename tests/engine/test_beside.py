"""Robustness, calibration and membership through real sessions, and what is said where they do not apply."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featherweight import fit, robustness
from featherweight.corruptions import KINDS, SEVERITIES, corrupt
from featherweight.data import Data
from featherweight.engine import confidence
from featherweight.engine import robustness as corrupted
from featherweight.engine.jobs import Served
from featherweight.engine.robustness import CELLS, affordable, error_ratio, some_indices
from featherweight.engine.run import Run as EngineRun
from featherweight.engine.store import Store
from featherweight.errors import DataError
from featherweight.method import Silent
from featherweight.metrics import find_metric
from featherweight.outcome import Calibration, Privacy, Result, Robustness
from featherweight.picture_inputs import picture_input
from featherweight.recipe import Recipe, Step
from featherweight.tasks import Task, TasksMetric
from golden import model_of, target

INT8 = Recipe((Step("fold", {}), Step("quantize", {})))


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey pictures of two classes: the upper or the lower half is brighter, in noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    found = 0.35 + 0.25 * random.random((count, 1, 12, 12))
    for picture, label in zip(found, labels, strict=True):
        half = slice(0, 6) if label else slice(6, 12)
        picture[0, half] += 0.15 * random.random()
    found[0, 0, 0, 0], found[0, 0, 0, 1] = 0, 1
    return found.astype(np.float32), labels.astype(np.int64)


class Halves(nn.Module):
    """Tells which half is brighter; a little wrong on purpose."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(4 * 12 * 12, 2)
        with torch.no_grad():
            self.conv.weight.fill_(1 / 9)
            self.conv.bias.zero_()
            sign = torch.ones(4, 12, 12)
            sign[:, 6:] = -1
            self.head.weight.copy_(torch.stack([-sign.flatten(), sign.flatten()]) / 30)
            self.head.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).flatten(1))


def data(**changes: object) -> Data:
    x, y = pictures(200, 1)
    x_train, y_train = pictures(150, 2)
    given = {"x": x, "y": y, "x_train": x_train, "y_train": y_train, "batch_size": 32} | changes
    return Data.of(**given)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> EngineRun:
    model = model_of(Halves().eval(), torch.from_numpy(pictures(2, 3)[0]))
    return EngineRun(model, data(), target(), Store(tmp_path / "store"), progress=Silent())


class TestCorruptedRows:
    def test_are_those_of_the_session_on_what_corrupt_makes(self, run: EngineRun) -> None:
        examples, picks = run.data, np.arange(0, 200, 5)
        held = picture_input(examples, picks)
        artifact = run.lower(run.original)
        with Served(artifact, run.target) as served:
            rows = corrupted.corrupted_rows(
                {"after": served.run}, examples, held, picks, seed=3, progress=Silent()
            )["after"]
            assert rows.shape == (1 + len(KINDS) * len(SEVERITIES), 40, 1)
            x, y = pictures(200, 1)
            for cell in (("noise", 5), ("jpeg", 1), ("occlusion", 3)):
                shown = corrupt(x[picks].transpose(0, 2, 3, 1), *cell, seed=3, numbers=picks)
                (outputs,) = served.run(np.ascontiguousarray(shown.transpose(0, 3, 1, 2)))
                right = outputs.argmax(axis=1) == y[picks]
                assert np.array_equal(rows[1 + CELLS.index(cell), :, 0], right)
            (clean,) = served.run(x[picks])
            assert np.array_equal(rows[0, :, 0], clean.argmax(axis=1) == y[picks])

    def test_a_metric_that_compares_sees_both_on_the_same_picture(self) -> None:
        """The twin agrees with itself whatever the picture is."""
        examples = data(metric="agreement")
        runs = {
            "before": lambda x: (np.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], 1),),
            "after": lambda x: (np.stack([x.mean((1, 2, 3)), np.full(len(x), 0.45)], 1),),
        }
        held = picture_input(examples, np.arange(50))
        rows = corrupted.corrupted_rows(runs, examples, held, np.arange(50), seed=0, progress=Silent())
        assert (rows["before"] == 1).all()
        assert 0 < rows["after"].mean() < 1
        told = corrupted.told(examples.metric, rows, held, 0)
        assert told.drop_before == 0
        assert told.error_ratio is None

    def test_data_that_scores_itself_is_refused(self) -> None:
        class Own(Data):
            def score(self, run, indices=None, original=None):  # type: ignore[no-untyped-def]
                raise AssertionError

        x, y = pictures(10, 0)
        with pytest.raises(DataError, match="scores itself"):
            corrupted.robustness(None, lambda x: (x,), Own.of(x, y), np.arange(10), seed=0, progress=Silent())


class TestTold:
    def test_by_hand(self) -> None:
        """Four pictures; the original loses one of them everywhere, the artifact two."""
        accuracy = find_metric("accuracy")
        before, after = np.ones((31, 4, 1)), np.ones((31, 4, 1))
        before[1:, 0], after[1:, :2] = 0, 0
        held = picture_input(data(), np.arange(9))
        told = corrupted.told(accuracy, {"before": before, "after": after}, held, 0)
        assert (told.drop_before, told.drop_after, told.extra_drop) == (0.25, 0.5, 0.25)
        assert (told.mean_before, told.mean_after, told.error_ratio) == (0.75, 0.5, 2.0)
        assert told.extra_drop_ci95 is not None
        low, high = told.extra_drop_ci95
        assert low <= 0.25 <= high
        assert [(row.kind, row.severity) for row in told.rows] == list(CELLS)
        alone = corrupted.told(accuracy, {"after": after}, held, 0)
        assert alone.drop_after == 0.5
        assert (alone.drop_before, alone.extra_drop, alone.error_ratio) == (None, None, None)

    def test_each_of_several_tasks_is_told_by_itself(self) -> None:
        """Of four pictures the first task loses one more than its twin, the second one's error doubles."""
        tasks = (Task("kind", find_metric("accuracy"), (0, 1)), Task("ink", find_metric("mse"), (1, 2)))
        before, after = np.ones((31, 4, 4)), np.ones((31, 4, 4))  # columns of each, then right, then error
        before[1:, 0, 2], after[1:, :2, 2], after[1:, :, 3] = 0, 0, 2
        held = picture_input(data(), np.arange(9))
        told = corrupted.told(TasksMetric.of(tasks), {"before": before, "after": after}, held, 0)
        kind, ink = told.tasks
        assert (kind.name, kind.clean_after, kind.drop_before, kind.drop_after) == ("kind", 1, 0.25, 0.5)
        assert kind.extra_drop == 0.25
        assert kind.extra_drop_ci95 is not None
        assert kind.extra_drop_ci95[0] <= 0.25 <= kind.extra_drop_ci95[1]
        assert (ink.metric, ink.bounded) == ("mse", False)
        assert (ink.drop_before, ink.drop_after, ink.extra_drop, ink.extra_drop_ci95) == (0, 1, 1, None)
        alone = corrupted.told(TasksMetric.of(tasks), {"after": after}, held, 0).tasks[0]
        assert (alone.drop_after, alone.drop_before, alone.clean_before, alone.extra_drop) == (
            0.5,
            *3 * [None],
        )

    def test_errors_of_the_original_are_what_counts(self) -> None:
        scores = np.full(30, 0.8)
        worse = scores - np.repeat([0.2, 0, 0, 0, 0, 0], 5)
        assert error_ratio(find_metric("accuracy"), scores, worse) == pytest.approx((2 + 5) / 6)
        assert error_ratio(find_metric("mse"), scores, 2 * scores) == pytest.approx(2)
        assert error_ratio(find_metric("accuracy"), np.ones(30), scores) is None

    def test_some_indices_are_drawn_once(self) -> None:
        assert np.array_equal(some_indices(5, 9, 0), np.arange(5))
        picked = some_indices(np.arange(100, 400), 30, 1)
        assert len(set(picked)) == 30 and picked.min() >= 100
        assert np.array_equal(picked, some_indices(np.arange(100, 400), 30, 1))

    def test_what_there_is_time_for(self) -> None:
        examples, every = data(), np.arange(200)
        assert affordable(examples, every, 0.001, float("inf")) == 200
        assert affordable(examples, every, 0.001, 0.0) == 0
        assert affordable(examples, every, 1.0, 99 * 31.0) == 0  # fewer than 100
        assert 100 <= affordable(examples, every, 1.0, 150 * 31.0) < 151


class TestConfidence:
    def test_probabilities_and_scores_say_the_same(self) -> None:
        random = np.random.default_rng(0)
        examples = data()
        logits = random.standard_normal((200, 2)).astype(np.float32)
        soft = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
        seen = [
            confidence.calibration(examples, {"after": outputs}, np.arange(50, 200))
            for outputs in (logits, soft)
        ]
        assert [one.outputs for one in seen] == ["scores", "probabilities"]
        assert seen[0].after.ece == pytest.approx(seen[1].after.ece, abs=1e-6)
        assert seen[0].after.loss == pytest.approx(seen[1].after.loss, abs=1e-6)
        assert seen[0].examples == 150 and seen[0].before is None

    @pytest.mark.parametrize(
        ("outputs", "said"),
        [
            (np.zeros((200, 3, 4), np.float32), "not class scores"),
            (np.zeros((200, 1), np.float32), "not class scores"),
            (np.full((200, 2), np.nan, np.float32), "NaN or infinite"),
        ],
    )
    def test_other_outputs_are_refused(self, outputs: np.ndarray, said: str) -> None:
        with pytest.raises(DataError, match=said):
            confidence.calibration(data(), {"after": outputs}, np.arange(200))

    def test_the_attack_finds_what_was_learned_by_heart(self) -> None:
        examples = data()
        assert examples.train is not None and examples.train.targets is not None
        x, y = pictures(150, 2)
        known = {one.tobytes(): label for one, label in zip(x, y, strict=True)}

        def by_heart(shown: np.ndarray) -> tuple[np.ndarray]:
            return (np.stack([9 * np.eye(2)[known[one.tobytes()]] for one in shown]).astype(np.float32),)

        outputs = np.random.default_rng(0).standard_normal((200, 2)).astype(np.float32)
        seen = confidence.membership(
            examples,
            {"before": outputs, "after": outputs},
            lambda: {"before": by_heart, "after": lambda shown: (np.zeros((len(shown), 2), np.float32),)},
            most=100,
            seed=0,
            progress=Silent(),
        )
        assert (seen.members, seen.others) == (100, 100)
        assert seen.before is not None and seen.before.auc > 0.99
        assert seen.after.auc < 0.6
        assert seen.change_ci95 is not None and seen.change_ci95[1] < -0.3

    def test_without_training_examples_no_session_is_asked(self) -> None:
        examples = data(x_train=None, y_train=None)
        outputs = {"after": np.zeros((200, 2), np.float32)}

        def never() -> dict[str, object]:
            raise AssertionError

        with pytest.raises(DataError, match="no training examples with labels"):
            confidence.membership(
                examples,
                outputs,
                never,
                most=9,
                seed=0,
                progress=Silent(),  # type: ignore[arg-type]
            )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Quantized through ONNX Runtime, with everything beside the score."""
    folder = tmp_path_factory.mktemp("fitted")
    (folder / "net.py").write_text(_source())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATHERWEIGHT_CACHE", str(folder / "cache"))
        result = fit(
            f"{folder / 'net.py'}:net", data(), out=folder / "out", recipe=INT8, robustness=True, tune=False
        )
    return folder, result


def _source() -> str:
    """A file with the network, as a user has it."""
    end = "def net():\n    return Halves().eval()\n"
    return f"import torch\nfrom torch import nn\n\n{inspect.getsource(Halves)}\n\n{end}"


class TestFit:
    def test_everything_is_in_the_result(self, fitted: tuple[Path, Result]) -> None:
        folder, result = fitted
        assert result.omitted == {}
        seen = result.robustness
        assert seen is not None and result.calibration is not None and result.privacy is not None
        assert len(seen.rows) == 30 and seen.examples == 200 and seen.constants == "CIFAR-10-C"
        assert seen.clean_after == result.chosen.quality
        assert seen.clean_before == result.baseline.quality
        assert result.calibration.after.accuracy == result.chosen.quality
        assert result.privacy.members == 150
        told = json.loads((folder / "out" / "result.json").read_text())
        assert len(told["robustness"]["rows"]) == 30
        report = (folder / "out" / "report.html").read_text()
        assert "Beside the score" in report and "constants of CIFAR-10-C" in report
        assert "Membership attack (AUC)" in (folder / "out" / "model_card.md").read_text()

    def test_the_command_finds_the_same(self, fitted: tuple[Path, Result], tmp_path: Path) -> None:
        folder, result = fitted
        told = robustness(folder / "out", data=data(), examples=200)
        assert told["omitted"] == {} and told["metric"] == "accuracy"
        mine = Robustness.model_validate(told["robustness"])
        assert result.robustness is not None
        assert [row.after for row in mine.rows] == [row.after for row in result.robustness.rows]
        assert mine.drop_before is None
        assert result.calibration is not None
        seen = Calibration.model_validate(told["calibration"])
        assert seen.after == result.calibration.after
        assert Privacy.model_validate(told["privacy"]).before is None

    def test_a_recipe_without_holes_is_not_slowed_down(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))
        (tmp_path / "net.py").write_text(_source())
        results = [
            fit(
                f"{tmp_path / 'net.py'}:net", data(), out=tmp_path / f"{wanted}",
                recipe=Recipe(()), robustness=wanted, tune=False,
            )
            for wanted in (None, False)
        ]  # fmt: skip
        assert results[0].robustness is None and results[0].privacy is None
        assert results[0].calibration is not None
        assert set(results[0].omitted) == {"robustness", "privacy"}
        assert "--robustness" in results[0].omitted["robustness"]
        assert results[1].omitted == dict.fromkeys(
            ("robustness", "calibration", "privacy"), "--no-robustness"
        )

    def test_nothing_that_applies_is_an_error(self, fitted: tuple[Path, Result]) -> None:
        folder, _ = fitted
        x, _ = pictures(20, 0)
        with pytest.raises(DataError, match="compares with the original"):
            robustness(folder / "out", data=Data.of(x, metric="agreement"))
