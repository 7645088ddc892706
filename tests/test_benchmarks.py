"""The benchmarks can be imported, and their networks are the ones of the papers. Nothing is timed here."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
COMMANDS = ("int8", "quantize_time", "calibration_memory", "startup")
NEEDS = {"int8": "onnxruntime", "peers": "onnxruntime"}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_imports(benchmark, name: str) -> None:  # type: ignore[no-untyped-def]
    needed = NEEDS.get(name)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    module = benchmark(name)
    assert module.__doc__
    if name in COMMANDS:
        assert callable(module.main)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_parameter_counts(benchmark, name: str) -> None:  # type: ignore[no-untyped-def]
    networks = benchmark("networks")
    module = getattr(networks, name)()
    assert sum(parameter.numel() for parameter in module.parameters()) == networks.PARAMETERS[name]


def test_batch_norms_have_seen_images(benchmark) -> None:  # type: ignore[no-untyped-def]
    import torch
    from torch import nn

    networks = benchmark("networks")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    batch = networks.images(8, seed=3, size=32)
    networks.settle(module, batch, size=4)
    with torch.no_grad():
        convolved = module[0](torch.from_numpy(batch))
        settled = module(torch.from_numpy(batch))
    assert not module.training
    torch.testing.assert_close(module[1].running_mean, convolved.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    assert module[1].weight.std() > 0.1
    assert settled.std((0, 2, 3)) == pytest.approx(module[1].weight.detach(), rel=0.2)


def test_images_are_seeded_and_have_the_spectrum_of_photographs(benchmark) -> None:  # type: ignore[no-untyped-def]
    networks = benchmark("networks")
    made = networks.images(4, seed=1, size=64)
    np.testing.assert_array_equal(made[:2], networks.images(2, seed=1, size=64))
    assert not np.allclose(made, networks.images(4, seed=2, size=64))
    amplitude = np.abs(np.fft.rfft(made, axis=-1)).mean((0, 1, 2))
    slope = np.polyfit(np.log(np.arange(2, 24)), np.log(amplitude[2:24]), 1)[0]
    assert -1.6 < slope < -0.4  # white noise has 0


def test_calibration_is_not_scored(benchmark) -> None:  # type: ignore[no-untyped-def]
    networks = benchmark("networks")
    data, words = networks.fashion(16, 32)
    assert "32" in words
    assert data.calibration_source == "calibration"
    assert not [note for note in data.notes if "leak" in note]


def test_a_finished_part_is_kept_until_the_end(benchmark, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    common = benchmark("common")
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    made: list[int] = []

    def compute() -> dict[str, int]:
        made.append(1)
        return {"rows": len(made)}

    first = common.Parts("demo", {"seconds": 1}, common.Shown()).get("a", compute)
    again = common.Parts("demo", {"seconds": 1}, common.Shown()).get("a", compute)
    assert first == again == {"rows": 1}
    assert common.Parts("demo", {"seconds": 2}, common.Shown()).get("a", compute) == {"rows": 2}
    common.Parts("demo", {"seconds": 2}, common.Shown()).forget()
    assert common.Parts("demo", {"seconds": 2}, common.Shown()).get("a", compute) == {"rows": 3}


def test_bars_say_what_was_kept(benchmark) -> None:  # type: ignore[no-untyped-def]
    common = benchmark("common")
    said = [str(common.Bar("net", "x <= 1", "2", kept)) for kept in (True, False, None)]
    assert [line.split()[0] for line in said] == ["pass", "FAIL", "n/a"]


def test_stripped_file_computes_the_same(benchmark, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("onnxruntime")
    import onnx
    import onnxruntime
    from onnx import helper

    peers = benchmark("peers")
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3])
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 3])
    middle = helper.make_tensor_value_info("m", onnx.TensorProto.FLOAT, [1, 3])
    nodes = [
        helper.make_node("Relu", ["x"], ["m"], name="a long name"),
        helper.make_node("Neg", ["m"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "graph", [value], [result], value_info=[middle])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.metadata_props.add(key="made by", value="a tool" * 100)
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    peers.strip(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx").stat().st_size < (tmp_path / "a.onnx").stat().st_size - 600
    x = np.array([[-1.0, 0.0, 2.0]], np.float32)
    outputs = [
        onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"]).run(None, {"x": x})[
            0
        ]
        for name in ("a.onnx", "b.onnx")
    ]
    np.testing.assert_array_equal(*outputs)
