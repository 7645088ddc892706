"""From Python: one fit and everything that it hands over, and what the functions refuse."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featherweight as fw
from featherweight import api
from featherweight.engine.timing import Limits
from featherweight.errors import BudgetError, DataError, OutputError, RecipeError, TargetError
from featherweight.outcome import Result

QUICK = Limits(seconds=0.2, least_seconds=0.0, warmup_s=0.01, throughput_s=0.02, memory_repeats=1)
NET = '''"""A small network with several outputs."""
import torch
from torch import nn


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Linear(32, 4)

    def forward(self, picture):
        features = self.deep(self.body(picture)).mean((2, 3))
        return {"scores": self.head(features), "features": features}


def several():
    torch.manual_seed(0)
    return Several().eval()
'''
RECIPE = "version: 1\nsteps:\n  - fold: {}\n  - quantize: {}\n"
MARK = b"SECRET-EXAMPLE"  # in the bytes of the user's data


@dataclass(frozen=True)
class Fitted:
    """One fit of a model whose outputs are a mapping, with data that are made in Python."""

    result: Result
    out: Path
    home: Path


def examples() -> fw.Data:
    random = np.random.default_rng(0)
    inputs = random.standard_normal((40, 3, 8, 8))
    inputs[0].reshape(-1)[:2] = np.frombuffer(MARK.ljust(16, b"!"), np.float64)
    inputs[np.abs(inputs) > 1e6] = 1.0  # as numbers the letters are huge: only their bytes matter in the file
    labels = np.arange(40) % 4
    return fw.Data.of(
        inputs[:32],
        labels[:32],
        x_train=inputs[32:],
        y_train=labels[32:],
        class_names=["ant", "bee", "cat", "dog"],
    )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    home = tmp_path_factory.mktemp("secret-home")
    (home / "net.py").write_text(NET)
    (home / "int8.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATHERWEIGHT_CACHE", str(home / "cache"))
        result = fw.fit(
            f"{home / 'net.py'}:several",
            examples(),
            out=home / "out",
            recipe=str(home / "int8.yaml"),
            budget=fw.Budget(bytes=1_000_000),
            limits=QUICK,
        )
    return Fitted(result, home / "out", home)


class TestDeliverables:
    def test_are_all_there(self, fitted: Fitted) -> None:
        assert {path.name for path in fitted.out.iterdir()} == {
            *("model.onnx", "recipe.yaml", "result.json", "report.html", "model_card.md", "artifact.json"),
            *("load.py", "load.cpp", "Load.java"),
        }

    def test_result_is_what_was_returned(self, fitted: Fitted) -> None:
        text = (fitted.out / "result.json").read_text()
        assert Result.model_validate_json(text) == fitted.result
        data = json.loads(text)
        assert data["schema"] == 1
        assert data["met"] is True
        assert data["chosen"]["artifact"] == "model.onnx"
        assert data["trials"][0]["chosen"] is True
        assert [change["label"] for change in data["classes"]] == ["ant", "bee", "cat", "dog"]
        assert data["examples"]["calibration"] == "training"
        assert "x is float64 and is cast to the model's float32" in data["warnings"]

    def test_digest_and_bytes_are_those_of_the_file(self, fitted: Fitted) -> None:
        import hashlib

        content = (fitted.out / "model.onnx").read_bytes()
        assert fitted.result.chosen.sha256 == hashlib.sha256(content).hexdigest()
        assert fitted.result.chosen.bytes == len(content)
        assert len(content) < (fitted.result.baseline.bytes or 0)

    def test_load_runs_elsewhere(self, fitted: Fitted, tmp_path: Path) -> None:
        for name in ("load.py", "model.onnx"):
            (tmp_path / name).write_bytes((fitted.out / name).read_bytes())
        done = subprocess.run(
            [sys.executable, "-I", str(tmp_path / "load.py")], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "(1, 4) (1, 32)"

    def test_recipe_makes_the_same_model_again(self, fitted: Fitted) -> None:
        assert fw.Recipe.load(fitted.out / "recipe.yaml").to_dict() == fitted.result.recipe

    def test_report_asks_for_nothing(self, fitted: Fitted) -> None:
        page = (fitted.out / "report.html").read_text()
        assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", page)
        assert not re.search(r"@import|url\(\s*['\"]?(?:https?:)?//", page)
        assert "<html" in page

    @pytest.mark.parametrize("name", ["model.onnx", "recipe.yaml", "result.json", "model_card.md", "load.py"])
    def test_hold_nothing_of_the_user(self, fitted: Fitted, name: str) -> None:
        content = (fitted.out / name).read_bytes()
        for private in (str(fitted.home), "secret-home", str(Path.home()), str(Path(fw.__file__).parent)):
            assert private.encode() not in content
        assert MARK not in content
        assert not re.search(rb"(?<![\w:/.])/(?:home|root|tmp|usr|work|Users)/\w", content)

    def test_nor_does_the_report(self, fitted: Fitted) -> None:
        page = (fitted.out / "report.html").read_text()
        assert "secret-home" not in page
        assert str(Path(fw.__file__).parent) not in page


class TestSearch:
    def test_an_impossible_budget_names_what_blocks(
        self, fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(fitted.home / "cache"))
        result = fw.fit(
            f"{fitted.home / 'net.py'}:several",
            examples(),
            out=tmp_path / "out",
            budget=fw.Budget(bytes=1000),
            trials=2,
            limits=QUICK,
        )
        assert not result.met
        assert [item.axis for item in result.blocking] == ["bytes"]
        if result.relaxation is not None:  # none where every artifact was slower than the original
            assert result.relaxation.axis == "bytes"
            assert result.relaxation.limit == min(
                t.measurement.bytes or 0 for t in result.trials if t.measurement
            )
        assert len(result.trials) == 2
        assert (tmp_path / "out" / "model.onnx").exists()


def test_without_data_inputs_are_random(fitted: Fitted, tmp_path: Path) -> None:
    """An ONNX file, as someone else's exporter left it: its own shapes are all there is."""
    fw.lower(f"{fitted.home / 'net.py'}:several", out=tmp_path / "twin", inputs=["3x8x8"])
    result = fw.fit(
        str(tmp_path / "twin" / "model.onnx"), out=tmp_path / "out", recipe=fw.Recipe(()), limits=QUICK
    )
    assert result.met  # there was no limit
    assert result.metric == "agreement"
    assert any("no data" in warning for warning in result.warnings)
    assert result.examples["origin"] == {"kind": "random", "seed": 0}
    assert result.chosen.agreement == 1.0


@pytest.mark.slow  # five processes import torch
def test_torch_is_told_as_simulated(fitted: Fitted, tmp_path: Path) -> None:
    result = fw.fit(
        f"{fitted.home / 'net.py'}:several",
        examples(),
        out=tmp_path / "out",
        recipe=str(fitted.home / "int8.yaml"),
        runtime="torch",
        limits=QUICK,
    )
    assert "simulates" in result.warnings[0]
    content = (tmp_path / "out" / "model.pt2").read_bytes()
    assert b"secret-home" not in content
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "out" / "load.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 4) (1, 32)"


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "error", "says"),
        [
            ({"trials": 0}, BudgetError, "0 trials"),
            ({"budget": fw.Budget(bytes=-1)}, BudgetError, "bytes -1"),
            ({"budget": fw.Budget(quality_drop=float("nan"))}, BudgetError, "quality_drop nan"),
            ({"prefer": "speed"}, BudgetError, "'speed'"),
            ({"threads": 4096}, TargetError, "4096 threads"),
            ({"mean": "0.5"}, DataError, "folder of images"),
            ({"recipe": "nothing.yaml"}, RecipeError, "nothing.yaml"),
        ],
    )
    def test_of_fit(
        self, fitted: Fitted, tmp_path: Path, given: dict[str, Any], error: type[Exception], says: str
    ) -> None:
        with pytest.raises(error, match=re.escape(says)):
            fw.fit(f"{fitted.home / 'net.py'}:several", examples(), out=tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()

    def test_of_a_place_that_holds_something_else(self, fitted: Fitted, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        for force in (False, True):
            with pytest.raises(OutputError, match="did not write"):
                fw.lower(f"{fitted.home / 'net.py'}:several", out=tmp_path, inputs=["3x8x8"], force=force)
        assert (tmp_path / "thesis.tex").read_text() == "years of work"

    def test_out_may_be_a_link(self, fitted: Fitted, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
        fw.lower(f"{fitted.home / 'net.py'}:several", out=tmp_path / "link", inputs=["3x8x8"])
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "elsewhere" / "model.onnx").exists()


def test_every_function_is_listed() -> None:
    assert all(callable(getattr(api, name)) for name in api.__all__)
    assert dir(api) == sorted(api.__all__)
    tree = ast.parse(Path(api.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    typed = [name.asname for node in checked.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert sorted(typed, key=str) == api.__all__  # what a type checker sees


def test_an_unknown_function_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compress'"):
        api.compress  # noqa: B018
