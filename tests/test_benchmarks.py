"""The benchmarks can be imported, and their networks are the ones of the papers. Nothing is timed here."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
COMMANDS = ("int8", "quantize", "quantize_time", "calibration_memory", "startup")
NEEDS = dict.fromkeys(
    ("fit", "int8", "peers", "quantize", "quantize_int8", "runtimes", "runtime_peers", "size"), "onnxruntime"
)


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
    assert common.Parts("demo", {"seconds": 1}, common.Shown()).get("a", compute) == {"rows": 1}


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


# ---- quantization in depth


def test_scenes_and_views_are_seeded_and_differ(benchmark, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from PIL import Image

    pictures = benchmark("pictures")
    random = np.random.default_rng(0)
    backs, stamps = tmp_path / "templates", tmp_path / "stamps" / "animals"
    backs.mkdir(), stamps.mkdir(parents=True)
    for index in range(3):
        Image.fromarray(random.integers(0, 256, (300, 400, 3), np.uint8)).save(backs / f"{index}.jpg")
        Image.fromarray(random.integers(0, 256, (120, 100, 4), np.uint8)).save(stamps / f"{index}.png")
    places = {pictures.STAMPS: stamps.parent, pictures.TEMPLATES: backs}
    monkeypatch.setattr(pictures, "debian", lambda package, folder, place: places[package])
    made = pictures.scenes(4, 0, tmp_path)
    assert made.shape == (4, 224, 224, 3) and made.dtype == np.uint8
    np.testing.assert_array_equal(made, pictures.scenes(4, 0, tmp_path))
    assert (made != pictures.scenes(4, 1, tmp_path)).mean() > 0.5

    views = pictures.views(sorted(backs.glob("*.jpg")), 6, seed=1)
    np.testing.assert_array_equal(views, pictures.views(sorted(backs.glob("*.jpg")), 6, seed=1))
    assert len({view.tobytes() for view in views}) == 6
    ready = pictures.prepared(views)
    assert ready.shape == (6, 3, 224, 224) and -1 <= ready.min() < ready.max() <= 1


def test_a_debian_package_that_cannot_be_had_is_told(benchmark, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    pictures = benchmark("pictures")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="apt cannot get no-such-package"):
        pictures.debian("no-such-package", tmp_path, "usr/share")
    assert not (tmp_path / "no-such-package").exists()


def test_every_recipe_of_the_tables_is_one(benchmark) -> None:  # type: ignore[no-untyped-def]
    bits = benchmark("quantize_bits")
    recipes = benchmark("quantize_recipes")
    for case in (*bits.FEW_BITS, *bits.ABLATION):
        assert case.judged == "" or case.judged in case.recipes
        for name in (*case.recipes, *case.more):
            made = recipes.recipe(name, case.bits, 8, 10)
            assert made.steps[0].method == "fold"
            assert len(list(made.methods())) == len(made.steps)
    steps = recipes.recipe("equalize + gptq", recipes.W4A4, 8).steps
    assert [step.method for step in steps] == ["fold", "equalize", "quantize", "rounding"]
    assert steps[1].parameters["weight_bits"] == steps[1].parameters["activation_bits"] == 4


@pytest.fixture(scope="module")
def bits_rows(tmp_path_factory):  # type: ignore[no-untyped-def]
    """Two recipes on ResNet-20, few examples; made once."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(FOLDER))
    common, bits = importlib.import_module("common"), importlib.import_module("quantize_bits")
    layers, subjects = (
        importlib.import_module("quantize_layers"),
        importlib.import_module("quantize_subjects"),
    )
    patch.setattr(common, "RESULTS", tmp_path_factory.mktemp("results"))
    subject = subjects.subject("resnet20", Path("nowhere"), 8, 64)
    case = bits.Case("resnet20", "torch", bits.W4A8, ("nearest", "gptq"), "gptq", drop=100.0, alone=True)
    settings, shown = bits.BitsSettings(8, (0,), 10), common.Shown()
    parts = common.Parts("quantize", {}, shown)
    benches = importlib.import_module("quantize_recipes").Benches(tmp_path_factory.mktemp("benches"), shown)
    rows = bits.rows_of(case, subject, settings, parts, benches, shown)
    yield rows, case, lambda: layers.rows_of(subject, settings, parts, benches)
    patch.undo()


@pytest.mark.slow
def test_few_bits_are_judged_whole_and_in_parts(benchmark, bits_rows) -> None:  # type: ignore[no-untyped-def]
    bits = benchmark("quantize_bits")
    rows, case = bits_rows[:2]
    nearest, gptq = rows
    assert gptq["weights_alone"]["sqnr_db"] > nearest["weights_alone"]["sqnr_db"] + 1
    assert nearest["activations_alone"] == gptq["activations_alone"]
    assert nearest["activations_alone"]["sqnr_db"] > nearest["sqnr_db"]
    assert 4 < gptq["stored_bits"] < 5
    assert all(line[1] == "W4A8 (simulated)" for line in bits.cells(rows))
    (bar,) = bits.bars([case], rows)
    assert bar.kept
    failed = [{**row, "failed": "why"} for row in rows]
    assert [bar.kept for bar in bits.bars([case], failed)] == [None]
    assert bits.cells(failed)[0][4] == "failed: why"


@pytest.mark.slow
def test_layer_errors_are_those_of_nearest_rounding_and_less(benchmark, bits_rows) -> None:  # type: ignore[no-untyped-def]
    layers = benchmark("quantize_layers")
    rows = bits_rows[2]()
    gptq = next(row for row in rows if row["method"] == "gptq" and row["bits"] == "W4A8")
    assert len(gptq["ratios"]) == 22
    assert np.mean(list(gptq["ratios"].values())) < 0.9
    assert {bar.about.split()[0] for bar in layers.bars(rows)} == {"resnet20"}


def test_eight_bits_are_told_by_their_worst_seed(benchmark) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("onnxruntime")
    int8 = benchmark("quantize_int8")
    same = {"network": "net", "runtime": "onnxruntime", "bytes": 10, "seconds": 20.0}
    ratio = {"median": 1.1, "ci95": (1.0, 1.2)}
    rows = [
        {**same, "method": "fp32", "seed": 0, "bytes": 40},
        {**same, "method": int8.BEST, "seed": 0, "agreement": 0.99, "sqnr_db": 24.0},
        {**same, "method": int8.BEST, "seed": 1, "agreement": 0.97, "sqnr_db": 25.0},
        {**same, "method": "ort-minmax", "seed": 0, "agreement": 0.9, "sqnr_db": 9.0, "ours_to_this": ratio},
        {**same, "method": "ort-percentile", "seed": 0, "failed": "it did"},
    ]
    kept = {bar.asked.split()[0]: bar.kept for bar in int8.bars(rows)}
    assert kept == {"agreement": False, "SQNR": True, "quantized": True, "latency": False}
    lines = {line[1]: line for line in int8.cells(rows)}
    assert lines[int8.BEST][2:5] == ("2", "98.0%", "[97.0%, 99.0%]")
    assert lines["ort-percentile"][3] == "failed: it did"
    assert lines["ort-minmax"][9] == "0.250"


@pytest.mark.slow
def test_memory_of_a_whole_recipe_is_told(benchmark) -> None:  # type: ignore[no-untyped-def]
    memory = benchmark("calibration_memory")
    common = benchmark("common")
    rows = [memory.measured(8, 1, common.Shown(), memory.WHOLE)]
    assert rows[0]["peak"] > rows[0]["own"] > rows[0]["runs"][0]["before"] / 4
    assert [bar.kept for bar in memory.bars(rows)] == [True]
    assert len(memory.cells(rows)[0]) == len(memory.HEADERS)


def test_volume_is_what_the_front_rules(benchmark) -> None:  # type: ignore[no-untyped-def]
    from featherweight.outcome import Measurement

    search = benchmark("search")
    limit = search.REFERENCE[0]

    def seen(drop: float, size: float, ratio: float) -> Measurement:
        return Measurement(quality_drop=drop * limit, bytes=round(1000 * size), latency_ratio=ratio)

    twin = Measurement(bytes=1000)
    assert search.volume([], twin) == 0
    assert search.volume([seen(0.5, 0.5, 0.5)], twin) == pytest.approx(0.125)
    assert search.volume([seen(0.5, 0.5, 0.5), seen(0.6, 0.5, 0.5)], twin) == pytest.approx(0.125)
    assert search.volume([seen(0.5, 0.5, 0.5), seen(0.5, 0.5, 0.25)], twin) == pytest.approx(0.1875)
    both = [seen(0.5, 0.5, 0.5), seen(0.25, 0.75, 0.5)]
    assert search.volume(both, twin) == pytest.approx(0.5 * (0.25 + 0.0625))
    assert search.volume([seen(-0.1, 0.5, 0.5)], twin) == pytest.approx(0.25)
    assert search.volume([seen(0.5, 0.5, 1.0), seen(1.0, 0.1, 0.1)], twin) == 0
    assert search.volume([seen(0.5, 0.25, 0.25)], twin, search.HALF) == pytest.approx(0.125)
    assert search.volume([seen(0.5, 0.6, 0.1)], twin, search.HALF) == 0


# ---- downloads


@pytest.mark.parametrize("name", ["lenet_300_100", "lenet_5"])
def test_lenets_are_those_of_the_paper(benchmark, name: str) -> None:  # type: ignore[no-untyped-def]
    import torch

    lenets = benchmark("lenets")
    module = getattr(lenets, name)()
    assert sum(parameter.numel() for parameter in module.parameters()) == lenets.PARAMETERS[name]
    assert module(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_every_plan_of_the_sizes_is_a_recipe(benchmark) -> None:  # type: ignore[no-untyped-def]
    size = benchmark("size")
    assert tuple(size.plans()) == size.NETWORKS
    for network, plan in size.plans().items():
        whole, part = (size.Job(network, 0, 100, 10, share) for share in (1.0, 0.5))
        for steps in (plan.trained, plan.thinned, plan.recipe):
            assert len(list(whole.recipe(steps).methods())) == len(steps)
        epochs = [
            [step.parameters["epochs"] for step in job.recipe(plan.recipe).steps if step.method == "finetune"]
            for job in (whole, part)
        ]
        assert epochs[1] == [share / 2 for share in epochs[0]]


def test_sizes_are_told_by_the_mean_of_seeds(benchmark) -> None:  # type: ignore[no-untyped-def]
    size = benchmark("size")
    same = {"network": "lenet_5", "examples": 100, "fp32": 91.0, "measure": "accuracy", "raw": 6300}
    rows = [
        {**same, "seed": 0, "after": 91.1, "coded": 100, "zstd": 120, "xz": 119},
        {**same, "seed": 1, "after": 90.7, "coded": 110, "zstd": 120, "xz": 109},
    ]
    assert [bar.kept for bar in size.bars_of(rows)] == [True, True, False]
    assert [line[1] for line in size.cells(rows)] == ["0", "1", "mean"]
    assert size.cells(rows)[2][4:8] == ["0.10", "6300", "105", "60.0"]
    one = [{**rows[0], "network": size.EFFICIENTNET, "measure": "agreement", "fp32": 100.0, "after": 94.0}]
    assert [bar.kept for bar in size.bars_of(one)] == [True, False, True]


@pytest.mark.slow
def test_a_lenet_is_trained_compressed_and_packed(benchmark, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("onnxruntime")
    from featherweight.data import Data

    size = benchmark("size")
    shipped = np.load(size.EXAMPLES / "data.npz")
    x, y = shipped["x"], shipped["y"]
    few = Data.of(x=x[:32], y=y[:32], x_train=x[32:1056], y_train=y[32:1056], calibration=x[:32])
    monkeypatch.setattr(size, "images", lambda examples, scored: few)
    row = size.row_of(size.Job("lenet_300_100", 0, 1024, 32, 0.03), tmp_path)
    assert row["coded"] < min(row["zstd"], row["xz"]) < row["artifact"]
    assert row["raw"] > 50 * row["coded"]
    assert 0 <= row["after"] <= 100


def test_a_supernet_is_held_against_pruning_with_its_largest_network_that_is_as_fast(benchmark) -> None:  # type: ignore[no-untyped-def]
    supernet = benchmark("supernet")
    ratios = {"small": 0.4, "as_fast": 0.604, "slower": 0.7, "larger": 0.5}
    macs = {"small": 0.2, "as_fast": 0.45, "slower": 0.6, "larger": 0.5}
    front = [
        (supernet.Step("subnet", {"macs": macs[name]}), {"macs": macs[name], "ratio": ratio})
        for name, ratio in ratios.items()
    ]
    assert supernet._as_fast(front, 0.6) == front[3][0]
    assert supernet._as_fast(front, 0.45) == front[0][0]
    assert supernet._as_fast(front[:2], 0.6) == front[1][0]  # as equal as can be measured
    assert supernet._as_fast(front, 0.3) is None
