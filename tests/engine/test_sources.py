"""A model and its data are loaded so that they fit each other, or the user is told what does not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featherweight.data import Data
from featherweight.engine.sources import Sources, follow, load_sources, scoring_code
from featherweight.errors import DataError, LoadError

CODE = '''
import torch
from torch import nn


class Net(nn.Module):
    """Four classes from three channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


class Pair(Net):
    def forward(self, x):
        scores = super().forward(x)
        return {"scores": scores, "norm": scores.norm(dim=1)}


class Tuple(Net):
    def forward(self, x):
        return super().forward(x), (x.mean(1),)


class Values(nn.Linear):
    def __init__(self):
        super().__init__(5, 1)


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(2, 4)

    def forward(self, ids):
        return self.table(ids).mean(1)


class Fixed(Net):
    def forward(self, x):
        return super().forward(x.reshape(2, 3, 8, 8))


class Folds(Net):
    def forward(self, x):
        return super().forward(x[:2])


class Branches(Net):
    def forward(self, x):
        scores = super().forward(x)
        if scores.sum() > 0:
            return scores
        return -scores
'''
X = np.random.default_rng(0).standard_normal((6, 3, 8, 8))
Y = np.arange(6) % 4


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "net.py"
    file.write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return file


def sources(name: str, **given: Any) -> Sources:
    return load_sources(f"net.py:{name}", **given)


@pytest.mark.usefixtures("code")
class TestDtypes:
    @pytest.mark.parametrize("dtype", ["float64", "float16"])
    def test_other_floats_are_cast_with_a_note(self, dtype: str) -> None:
        loaded = sources("Net", data=Data.of(X.astype(dtype), Y))
        assert loaded.model.entries["forward"].example_inputs[0].dtype == torch.float32
        (batch,) = loaded.data.example_inputs()
        assert batch.dtype == np.float32
        assert f"x is {dtype} and is cast to the model's float32" in loaded.notes

    def test_other_integers_are_cast_with_a_note(self) -> None:
        loaded = sources("Embedded", data=Data.of(np.zeros((6, 5), np.int32), Y))
        assert loaded.model.entries["forward"].example_inputs[0].dtype == torch.int32  # embeddings take both

    def test_integers_are_not_scaled_by_a_guess(self) -> None:
        with pytest.raises(LoadError) as caught:
            sources("Net", data=Data.of(np.zeros((6, 3, 8, 8), np.uint8), Y))
        assert "/ 255" in str(caught.value.fix)
        assert "it takes float32 (2, 3, 8, 8)" in str(caught.value.fix)


@pytest.mark.usefixtures("code")
class TestShapes:
    @pytest.mark.parametrize(
        ("inputs", "advice"),
        [
            (np.moveaxis(X, 1, -1), "channels come first: x = np.moveaxis(x, -1, 1)"),
            (np.zeros((6, 8, 8, 3), np.uint8), "channels come first"),
        ],
    )
    def test_a_usual_mistake_is_named(self, inputs: np.ndarray, advice: str) -> None:
        with pytest.raises(LoadError) as caught:
            sources("Net", data=Data.of(inputs, Y))
        assert str(caught.value.fix).startswith(advice)
        assert str(inputs[:2].shape) in caught.value.what

    def test_roles_of_several_shapes(self) -> None:
        with pytest.raises(DataError, match=r"x_train has shape \(1, 8, 8\), and one of x has \(3, 8, 8\)"):
            sources("Net", data=Data.of(X, Y, x_train=X[:, :1], y_train=Y))

    def test_a_fixed_batch_is_refused(self) -> None:
        with pytest.raises(LoadError, match="works on 2 examples and not on 3: RuntimeError"):
            sources("Fixed", data=Data.of(X, Y))

    def test_so_is_a_network_that_drops_examples(self) -> None:
        with pytest.raises(LoadError, match="not on 3: it gives 2 rows"):
            sources("Folds", data=Data.of(X, Y))


@pytest.mark.usefixtures("code")
class TestOutputs:
    @pytest.mark.parametrize("name", ["Pair", "Tuple"])
    def test_may_be_several(self, name: str) -> None:
        loaded = sources(name, data=Data.of(X, Y))
        assert len(loaded.model.entries["forward"].output_names) == 2
        assert loaded.data.metric.name == "accuracy"

    def test_labels_beyond_the_classes(self) -> None:
        with pytest.raises(DataError, match=r"label 4 is outside 0\.\.3"):
            sources("Net", data=Data.of(X, Y + 2))

    @pytest.mark.parametrize(
        ("name", "shape", "metric"), [("Net", "3x8x8", "agreement"), ("Values", "5", "sqnr")]
    )
    def test_decide_the_metric_without_labels(self, name: str, shape: str, metric: str) -> None:
        loaded = sources(name, inputs=[shape])
        assert loaded.data.metric.name == metric
        assert any("random" in note for note in loaded.notes)

    def test_a_metric_may_be_named_without_data(self) -> None:
        assert sources("Net", inputs=["3x8x8"], metric="sqnr").data.metric.name == "sqnr"

    def test_a_metric_replaces_that_of_the_data(self) -> None:
        assert sources("Net", data=Data.of(X, Y), metric="f1").data.metric.name == "f1"


@pytest.mark.usefixtures("code")
class TestOptions:
    def test_image_settings_need_a_folder(self) -> None:
        for data in (None, Data.of(X, Y)):
            with pytest.raises(DataError, match="for a folder of images"):
                sources("Net", data=data, inputs=["3x8x8"], mean="0.5")

    def test_random_inputs_follow_the_seed(self) -> None:
        one, two, other = (sources("Net", inputs=["3x8x8"], seed=seed).data.fingerprint for seed in (1, 1, 2))
        assert one == two != other


class TestScoringCode:
    def test_is_the_content_of_the_users_files(self, code: Path) -> None:
        seen = set()
        for column in (0, 1, 0):
            text = f"def right(outputs, targets):\n    return outputs[:, {column}] > 0\n"
            (code.parent / "metric.py").write_text(text)
            data = sources("Net", data=Data.of(X, Y), metric="metric.py:right").data
            assert data.metric.name == "right"
            seen.add(scoring_code(data))
        assert len(seen) == 2

    def test_is_empty_for_metrics_by_name(self) -> None:
        assert scoring_code(Data.of(X, Y)) == ""

    def test_counts_a_score_of_the_users_own(self) -> None:
        class Beam(Data):
            def score(self, *given: Any) -> Any:
                return {}

        assert scoring_code(Beam.of(X, Y)) != ""


@pytest.mark.usefixtures("code")
class TestFollow:
    def test_shows_the_users_line_and_nothing_of_torch(self, capfd: pytest.CaptureFixture[str]) -> None:
        loaded = sources("Branches", data=Data.of(X, Y))
        with pytest.raises(LoadError) as caught:
            follow(loaded.model)
        assert str(caught.value.where).endswith("if scores.sum() > 0:")
        assert "net.py:55" in str(caught.value.where)
        said = capfd.readouterr()
        assert (said.out, said.err) == ("", "")
        assert logging.root.manager.disable == logging.NOTSET

    def test_keeps_what_it_traced(self) -> None:
        loaded = sources("Net", data=Data.of(X, Y))
        follow(loaded.model)
        assert "forward" in loaded.model.traced
