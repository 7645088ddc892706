"""The card says what was measured and nothing of the user's machine; load.py runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
import yaml

from featherweight.bundle import loaders, model_card
from featherweight.model import Entry
from featherweight.outcome import ClassChange
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Target
from sample_results import bare_result, full_result, hostile_result, missed_result

ENTRY = Entry(
    example_inputs=(torch.zeros(2, 3, 4), torch.zeros(2, 5, dtype=torch.int64)),
    input_names=("x", "to'ken"),
    output_names=("y", "z"),
    dynamic_axes={"x": {0: "batch"}, "to'ken": {0: "batch"}},
)


def artifact(folder: Path, runtime: str = "onnxruntime") -> Artifact:
    """A small artifact with two inputs and two outputs."""
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Identity", ["to'ken"], ["z"])],
        "g",
        [
            helper.make_tensor_value_info("x", kinds.FLOAT, ["batch", 3, 4]),
            helper.make_tensor_value_info("to'ken", kinds.INT64, ["batch", 5]),
        ],
        [
            helper.make_tensor_value_info("y", kinds.FLOAT, ["batch", 3, 4]),
            helper.make_tensor_value_info("z", kinds.INT64, ["batch", 5]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return Artifact(runtime, folder, ("model.onnx",), {"forward": "model.onnx"})


def run(folder: Path, text: str) -> str:
    (folder / "load.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(folder / "load.py")],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ORT = find_runtime("onnxruntime")


def test_load_py_runs_the_artifact(tmp_path: Path) -> None:
    origin = full_result().examples["origin"]
    text = loaders(ORT, artifact(tmp_path), Target(threads=1), ENTRY, origin)["load.py"]
    assert run(tmp_path, text) == "(1, 3, 4) (1, 5)"
    lines = [line for line in text.splitlines() if line]
    assert len(lines) <= 12
    assert "# x: float32 (batch, 3, 4); to'ken: int64 (batch, 5)" in lines
    assert any("L images of 32 x 32" in line and "mean 0.286" in line for line in lines)
    modules = set(re.findall(r"^(?:import|from) (\w+)", text, re.M))
    assert modules == {"pathlib", "numpy", "onnxruntime"}


def test_load_py_repeats_the_options_of_the_measurement(tmp_path: Path) -> None:
    options = {"enable_cpu_mem_arena": False, "graph_optimization_level": "ORT_ENABLE_EXTENDED"}
    text = loaders(ORT, artifact(tmp_path), Target(threads=2, options=options), ENTRY)["load.py"]
    assert "intra_op_num_threads, options.inter_op_num_threads = 2, 1" in text
    assert "options.enable_cpu_mem_arena = False" in text
    assert "options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED" in text
    run(tmp_path, text)


def test_hostile_text_stays_a_comment(tmp_path: Path) -> None:
    origin = {"image_size": [4, 4], "layout": "N\nimport os; os.abort()"}
    texts = loaders(ORT, artifact(tmp_path), Target(), ENTRY, origin)
    for text in texts.values():
        assert not any(line.startswith("import os") for line in text.splitlines())
    run(tmp_path, texts["load.py"])


def test_the_card_has_front_matter_and_every_part() -> None:
    card = model_card(full_result(), name="resnet20-int8")
    _, front, body = card.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["library_name"] == "onnx"
    assert "quantize" in fields["tags"]
    assert fields["metrics"] == ["accuracy"]
    assert re.findall(r"^#+ (.+)$", body, re.M) == [
        "resnet20-int8",
        "How it was made",
        "Measured figures",
        "What it did to each class",
        "Inputs",
        "How to load it",
        "Limitations",
    ]
    assert yaml.safe_load(re.findall(r"```yaml\n(.*?)```", body, re.S)[0]) == full_result().recipe
    for words in (
        "| Size | 1.09 MB | 297 KB | 0.27× |",
        "Example CPU",
        "std 0.353",
        "2,000 examples",
        "ab" * 32,
    ):
        assert words in body, words


def test_the_card_of_a_missed_budget_says_so() -> None:
    assert "Latency blocks: 2.13 ms, above the limit" in model_card(missed_result())


@pytest.mark.parametrize(
    "folder", ["/home/ann/secret project", "C:\\Users\\ann\\secret project", "~/ann/secret"]
)
def test_the_card_holds_no_paths(folder: str) -> None:
    path = f"{folder}/net.pt" if "/" in folder else f"{folder}\\net.pt"
    recipe = {"version": 1, "steps": [{"finetune": {"teacher": path, "tags": [path]}}]}
    card = model_card(full_result(recipe=recipe, metric=f"{path}:score", examples={"origin": {"file": path}}))
    assert "ann" not in re.sub(r"channel|Ankle", "", card)
    assert "secret" not in card
    assert "teacher: net.pt" in card


def test_the_card_lets_no_markup_through() -> None:
    sharp = ClassChange(label="<b>|`x`\n# y", examples=1, before=1.0, after=0.0)
    for result in (hostile_result(), full_result(classes=[sharp])):
        body = model_card(result, name="a|b\n# c").split("---\n", 2)[2]
        assert "# a\\|b \\# c" in body
        assert "<" not in re.sub(r"`[^`]+`", "", re.sub(r"```.*?```", "", body, flags=re.S))
    assert "| &lt;b&gt;\\|\\`x\\` \\# y | 1 |" in body


def test_the_card_of_a_bare_result_has_no_none() -> None:
    assert "None" not in model_card(bare_result())
