"""The first layer at which two artifacts part, whichever runtimes they are for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.engine.asked import inner_values, told_kernels
from featherweight.engine.compare import compare_artifacts
from featherweight.engine.delivered import ABOUT, Delivered, delivered, described
from featherweight.errors import DataError, LoadError
from featherweight.method import Silent
from featherweight.model import Model
from featherweight.plugins import find_runtime
from golden import data, folded, inputs, model_of, quantized, target


def made(model: Model, runtime: str, folder: Path) -> Delivered:
    folder.mkdir()
    return Delivered(find_runtime(runtime).lower(model, target(runtime), folder), target(runtime))


def damaged(model: Model, parameter: str) -> Model:
    """The model with one parameter turned around."""
    module = model.copy_module()
    with torch.no_grad():
        module.get_parameter(parameter).neg_()
    return model.evolve(module=module)


def test_the_damaged_layer_is_found(tmp_path: Path) -> None:
    good = made(folded("residual"), "onnxruntime", tmp_path / "good")
    bad = made(damaged(folded("residual"), "layer2.conv1.weight"), "onnxruntime", tmp_path / "bad")
    told = compare_artifacts(good, bad, data("residual"), below=30.0, progress=Silent())
    assert told["parts_at"] in ("layer2.conv1#0:0", "layer2.relu#0:0")  # its clamp may be part of it
    assert told["largest_loss_at"] == told["parts_at"]
    before = [row["sqnr_db"] for row in told["values"]]
    place = [row["value"] for row in told["values"]].index(told["parts_at"])
    assert min(before[:place]) > 100
    assert told["outputs_db"] < 30
    assert told["values"][0]["loss_db"] is None


def test_an_artifact_does_not_part_from_itself(tmp_path: Path) -> None:
    one = made(quantized("residual"), "onnxruntime", tmp_path / "one")
    told = compare_artifacts(one, one, data("residual"), below=30.0, progress=Silent())
    assert told["parts_at"] is None
    assert {row["sqnr_db"] for row in told["values"]} == {120.0}
    assert len(told["values"]) >= 10


@pytest.mark.parametrize("other", ["openvino", "litert", "mnn", "ncnn", "onnxruntime-web"])
def test_across_runtimes_the_same_network_agrees_layer_by_layer(other: str, tmp_path: Path) -> None:
    if not find_runtime(other).installed():
        pytest.skip(f"runtime '{other}' is not installed")
    one = made(folded("residual"), "onnxruntime", tmp_path / "one")
    two = made(folded("residual"), other, tmp_path / "two")
    told = compare_artifacts(one, two, data("residual"), below=60.0, progress=Silent())
    assert told["parts_at"] is None, told["values"]
    assert len(told["values"]) >= 6
    assert told["outputs_db"] > 80


def test_what_shows_nothing_is_compared_by_its_outputs(tmp_path: Path) -> None:
    one = made(folded("linear3d"), "onnxruntime", tmp_path / "one")
    two = made(folded("linear3d"), "torch", tmp_path / "two")
    told = compare_artifacts(one, two, data("linear3d"), below=30.0, progress=Silent())
    assert told["values"] == []
    assert told["outputs_db"] > 100
    assert any("shows nothing but outputs" in note for note in told["notes"])


class Features(nn.Module):
    """Takes what the residual net takes, and gives something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x).mean((2, 3))


def test_other_networks_are_refused(tmp_path: Path) -> None:
    one = made(folded("residual"), "onnxruntime", tmp_path / "one")
    two = made(model_of(Features(), torch.randn(2, 3, 16, 16)), "onnxruntime", tmp_path / "two")
    with pytest.raises(DataError, match="different outputs"):
        compare_artifacts(one, two, data("residual"), below=30.0, progress=Silent())


def test_a_folder_tells_how_it_is_opened(tmp_path: Path) -> None:
    one = made(quantized("linear3d"), "onnxruntime", tmp_path / "one")
    where = replace(one.target, options={"enable_mem_pattern": False})
    about = described(one.artifact, find_runtime("onnxruntime"), where)
    (tmp_path / "one" / ABOUT).write_text(json.dumps(about))
    back = delivered(tmp_path / "one")
    assert back.target == where
    assert back.artifact.sha256 == one.artifact.sha256
    assert about["stored"]["fc1.weight"][0] == "int8" or "int8" in {
        dtype for dtype, _ in about["stored"].values()
    }
    values = inner_values(back.artifact, back.target, (inputs("linear3d", 1),))
    assert values
    assert all(np.isfinite(value).all() for value in values.values())


@pytest.mark.parametrize(
    ("text", "words"), [("{", "is damaged"), ("{}", "is damaged"), (None, "is a folder, not a file")]
)
def test_folders_that_are_none(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / ABOUT).write_text(text)
    with pytest.raises(LoadError, match=words):
        delivered(tmp_path)


def test_kernels_have_shares_of_the_time(tmp_path: Path) -> None:
    one = made(quantized("residual"), "onnxruntime", tmp_path / "one")
    rows = told_kernels(one.artifact, one.target, (inputs("residual", 1),))
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert [row["share"] for row in rows] == sorted((row["share"] for row in rows), reverse=True)
    assert {"QLinearConv"} <= {row["op"] for row in rows}
    assert all(row["note"] for row in rows if not row["fast"])
    silent = made(folded("linear3d"), "torch", tmp_path / "torch")
    assert told_kernels(silent.artifact, silent.target, (inputs("linear3d", 1),)) == []
