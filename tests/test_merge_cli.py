"""``featherweight merge`` from the files of a user to the folder that he gets, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from featherweight.cli import main
from featherweight.outcome import Result

NETS = '''"""Small networks of the same inputs, and one of others."""
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self, classes, seed, channels=1):
        super().__init__()
        torch.manual_seed(seed)
        first, second = nn.Conv2d(channels, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.body = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def ten():
    return Small(10, 0)


def five():
    return Small(5, 1)


def three():
    return Small(3, 2)


def coloured():
    return Small(4, 3, channels=3)
'''
QUICK = "version: 1\nsteps:\n- merge: {epochs: 1}\n"
EIGHT = "version: 1\nsteps:\n- merge: {epochs: 1}\n- fold: {}\n- quantize: {}\n"
PLAIN = "version: 1\nsteps:\n- fold: {}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("merge")
    (place / "nets.py").write_text(NETS)
    for name, text in (("quick", QUICK), ("eight", EIGHT), ("plain", PLAIN)):
        (place / f"{name}.yaml").write_text(text)
    rng = np.random.default_rng(0)
    x, more = (rng.standard_normal((n, 1, 12, 12)).astype(np.float32) for n in (48, 128))
    nets: dict[str, Any] = {}
    exec(NETS, nets)
    for name in ("ten", "five"):  # labels are what the network says, so that there is something to lose
        with torch.no_grad():
            y, y_train = (nets[name]()(torch.from_numpy(one)).argmax(1).numpy() for one in (x, more))
        np.savez(place / f"{name}.npz", x=x, y=y, x_train=more, y_train=y_train)
    np.savez(place / "turned.npz", x=x[::-1].copy(), y=rng.integers(0, 5, 48))
    np.savez(place / "short.npz", x=x[:40], y=rng.integers(0, 5, 40))
    np.savez(
        place / "colour.npz",
        x=rng.standard_normal((8, 3, 12, 12)).astype(np.float32),
        y=rng.integers(0, 4, 8),
    )
    return place


def merge(folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(folder / "cache"))
    return main(["merge", *command.split(), "--measure-time", "0.5s"])


BOTH = "a=nets.py:ten b=nets.py:five --data a=ten.npz --data b=five.npz"


class TestMerge:
    def test_writes_one_artifact_whose_outputs_have_the_names_of_tasks(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = "--recipe quick.yaml --max-drop 100% --robustness --out out"
        code = merge(folder, f"{BOTH} {given}", monkeypatch)
        assert code == 0
        result = Result.model_validate_json((folder / "out" / "result.json").read_text())
        base, seen = result.baseline, result.chosen
        assert base.params and seen.params and base.macs and seen.macs
        assert seen.params <= 0.6 * base.params
        assert seen.macs <= 0.6 * base.macs
        assert seen.latency_ratio is not None
        assert [(task.name, task.metric) for task in seen.tasks] == [("a", "accuracy"), ("b", "accuracy")]
        assert seen.quality_drop == max(task.quality_drop for task in seen.tasks)
        session = onnxruntime.InferenceSession(str(folder / "out" / seen.artifact))
        assert [output.name for output in session.get_outputs()] == ["a", "b"]
        x, right = np.load(folder / "ten.npz"), np.load(folder / "five.npz")
        answers = session.run(None, {session.get_inputs()[0].name: x["x"]})
        for task, answer, labels in zip(seen.tasks, answers, (x["y"], right["y"]), strict=True):
            assert task.quality == pytest.approx(float((answer.argmax(1) == labels).mean()))
        assert result.robustness is not None
        for task, own in zip(seen.tasks, result.robustness.tasks, strict=True):
            assert (own.name, own.clean_after) == (task.name, task.quality)
            assert own.drop_before is not None
            assert own.drop_before > 0
        assert {name for name, said in result.omitted.items() if "several" in said} == {
            "calibration",
            "privacy",
        }
        page = (folder / "out" / "report.html").read_text()
        assert 'id="tasks"' in page
        assert "Drop by corruption, b (accuracy)" in page
        assert "Task b (accuracy)" in page
        assert (folder / "out" / "load.py").is_file()
        assert "merge" in (folder / "out" / "recipe.yaml").read_text()

    def test_steps_may_follow_and_a_third_task_needs_no_data(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        code = merge(folder, f"{BOTH} c=nets.py:three --recipe eight.yaml --out eight", monkeypatch)
        assert code == 0
        result = Result.model_validate_json((folder / "eight" / "result.json").read_text())
        assert [task.metric for task in result.chosen.tasks] == ["accuracy", "accuracy", "agreement"]
        assert result.baseline.tasks[2].quality == 1.0
        assert result.chosen.weight_bits is not None
        assert result.chosen.weight_bits < 16

    def test_a_limit_of_one_task_is_held_against_that_task(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert merge(folder, f"{BOTH} --recipe quick.yaml --max-drop 100% --out wide", monkeypatch) == 0
        whole = json.loads((folder / "wide" / "result.json").read_text())
        drops = {task["name"]: task["quality_drop"] for task in whole["chosen"]["tasks"]}
        worst = max(drops, key=lambda name: drops[name])
        assert drops[worst] > 0.01
        command = f"{BOTH} --recipe quick.yaml --max-drop {worst}={drops[worst] - 0.01:.4f} --out tight"
        assert merge(folder, command, monkeypatch) == 3
        result = Result.model_validate_json((folder / "tight" / "result.json").read_text())
        (blocking,) = [one for one in result.blocking if one.axis == "quality_drop"]
        assert f"task '{worst}'" in blocking.reason
        assert "Quality drop blocks" in capsys.readouterr().out


class TestRefusals:
    @pytest.mark.parametrize(
        ("command", "says"),
        [
            ("a=nets.py:ten", "1 model is nothing to merge"),
            ("a=nets.py:ten a=nets.py:five", "given twice for 'a'"),
            ("a=nets.py:ten nets.py:five", "'nets.py:five' names no task"),
            ("a=nets.py:ten b=nets.py:coloured --data a=ten.npz --data b=colour.npz", "(1, 12, 12), and one"),
            ("a=nets.py:ten b=nets.py:coloured --data a=ten.npz", "shape (1, 12, 12)"),
            ("a=nets.py:ten b=nets.py:five --data a=ten.npz --data b=turned.npz", "example 0 of 'a'"),
            (
                "a=nets.py:ten b=nets.py:five --data a=ten.npz --data b=short.npz",
                "48 examples and 'b' has 40",
            ),
            (f"{BOTH} --data c=ten.npz", "data are given for 'c'"),
            (f"{BOTH} --data a=five.npz", "--data is given twice"),
            (f"{BOTH} --max-drop c=1%", "'c', which is no task"),
            (f"{BOTH} --max-drop a=1x", "unknown unit"),
            (f"{BOTH} --recipe plain.yaml", "no step merge"),
            ("forward=nets.py:ten b=nets.py:five --data b=five.npz", "'forward' is no name for a task"),
        ],
    )
    def test_bad_input_is_told_and_nothing_is_written(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        command: str,
        says: str,
    ) -> None:
        assert merge(folder, f"{command} --out bad", monkeypatch) == 2
        said = capsys.readouterr().err
        assert says in said
        assert "fix: " in said
        assert not (folder / "bad").exists()

    def test_an_amount_below_the_deepest_merge(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (folder / "small.yaml").write_text("version: 1\nsteps:\n- merge: {parameters: 0.2}\n")
        assert merge(folder, f"{BOTH} --recipe small.yaml --out bad", monkeypatch) == 2
        said = capsys.readouterr().err
        assert "parameters: 0.2 is less than any merge keeps" in said
        assert "or more" in said
