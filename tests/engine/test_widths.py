"""What layers cost at some of their widths: the grid, the steps between, and the measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from featherweight.engine import costs, widths
from featherweight.engine.costs import MeasuredCosts
from featherweight.engine.run import Run, TargetSupports
from featherweight.engine.store import Store
from featherweight.engine.widths import Shape, Widths, grid, measure, network, shapes
from featherweight.model import Model
from featherweight.plugins import find_runtime
from golden import data, model, target

CONV = Shape("Conv2d", 64, 32, 1, (7, 7), (("bias", False), ("kernel_size", (3, 3)), ("padding", (1, 1))))
DEPTHWISE = Shape("Conv2d", 48, 48, 48, (7, 7), (("bias", True), ("kernel_size", (3, 3))))
LINEAR = Shape("Linear", 24, 10, 1, (5,), (("bias", True),))


def test_shapes_of_the_layers_with_weights() -> None:
    seen = shapes(model("depthwise"))
    filters = seen["block2.depthwise.0"]
    assert (filters.inputs, filters.outputs, filters.groups, filters.depthwise) == (24, 24, 24, True)
    assert filters.spatial == (8, 8)
    assert dict(filters.arguments)["stride"] == (2, 2)
    assert seen["head"] == Shape("Linear", 32, 10, 1, (), (("bias", True),))
    assert not any(layer.endswith(".1") for layer in seen)  # batch norms have no widths of their own
    tokens = shapes(model("linear3d"))
    assert tokens["fc2"].spatial == (9,)


def test_grids_are_whole_blocks_or_less_than_one() -> None:
    assert grid(CONV, 16) == ((16, 32, 64), (8, 16, 32))
    assert grid(CONV, 8) == ((16, 32, 64), (8, 16, 32))
    assert grid(LINEAR, 16) == ((6, 12, 24), (2, 5, 10))
    grouped = Shape("Conv2d", 48, 96, 3, (7, 7), (("kernel_size", (1, 1)),))
    assert all(width % 3 == 0 for side in grid(grouped, 16) for width in side)


def test_every_case_is_built_and_runs() -> None:
    cases = [(CONV, (16, 8)), (DEPTHWISE, (12, 12)), (LINEAR, (6, 10))]
    made = network(cases, seed=0)
    (x,) = made.entries["forward"].example_inputs
    assert made.module(x).shape == (1, 3)
    assert made.module.get_submodule("cases.1.layer").weight.shape == (12, 1, 3, 3)
    with torch.no_grad():
        assert torch.equal(network(cases, seed=0).module(x), made.module(x))


def test_time_is_a_step_function_of_blocks() -> None:
    seen = Widths((16, 32, 64), (8, 16, 32), ((1.0, 1.0, 2.0), (2.0, 2.0, 4.0), (4.0, 4.0, 8.0)))
    assert seen.ratio(1.0, 1.0, 16) == 1.0
    assert seen.ratio(0.5, 1.0, 16) == 0.5
    assert seen.ratio(33 / 64, 1.0, 16) == seen.ratio(48 / 64, 1.0, 16) == pytest.approx(0.75)
    assert seen.ratio(1.0, 17 / 32, 16) == 1.0  # 17 channels are two blocks
    assert seen.ratio(1.0, 16 / 32, 16) == 0.5
    assert seen.ratio(1.0, 2 / 32, 16) == pytest.approx(0.5 / 3)  # far below what was measured
    assert Widths.from_json(json.loads(json.dumps(seen.to_json()))) == seen


def test_a_depthwise_layer_has_one_width() -> None:
    seen = Widths((48,), (16, 32, 48), ((1.0, 2.0, 3.0),))
    assert seen.ratio(1 / 3, 1 / 3, 16) == seen.ratio(1.0, 1 / 3, 16) == pytest.approx(1 / 3)


def test_the_costliest_shapes_are_measured_and_others_cost_as_their_macs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(widths, "_MOST", 1)
    asked: list[Model] = []

    def profiler(net: Model) -> dict[str, float]:
        asked.append(net)
        return {f"cases.{i}.layer": 1.0 for i in range(len(net.module.get_submodule("cases")))}  # type: ignore[arg-type]

    seen = measure({"a": CONV, "b": LINEAR, "c": CONV}, {"a": 1.0, "b": 1.5, "c": 1.0}, 16, 0, profiler)
    assert len(asked) == 1
    assert len(asked[0].module.get_submodule("cases")) == 9  # type: ignore[arg-type]
    assert seen["a"] == seen["c"]
    assert seen["a"].ratio(0.5, 0.5, 16) == 1.0
    assert seen["b"].ratio(0.5, 0.5, 16) == pytest.approx(0.25)
    assert measure({}, {}, 16, 0, profiler) == {}


@pytest.mark.parametrize("integers", [False, True], ids=["float", "int8"])
def test_they_are_measured_once_on_the_target(
    integers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(model("depthwise"), data("depthwise"), target(), Store(tmp_path))
    prices = MeasuredCosts(run)
    for layer in shapes(run.original):
        whole = prices.seconds(layer, integers)
        assert whole is not None
        assert prices.scaled(layer, 1.0, 1.0, integers) == pytest.approx(whole)
        half = prices.scaled(layer, 0.5, 0.5, integers)
        assert half is not None
        assert half > 0
    assert prices.scaled("no.such.layer", 0.5, 0.5, integers) is None
    expected = prices.scaled("block2.project.0", 0.5, 0.5, integers)
    monkeypatch.setattr(costs, "profiled", lambda *_: pytest.fail("measured again"))
    assert MeasuredCosts(run).scaled("block2.project.0", 0.5, 0.5, integers) == expected


def test_a_runtime_that_tells_no_times_has_none(tmp_path: Path) -> None:
    run = Run(model("residual"), data("residual"), target("torch"), Store(tmp_path))
    assert MeasuredCosts(run).scaled("head", 0.5, 1.0, integers=False) is None
    assert run.context().supports.width_multiple == 8


def test_blocks_of_channels_follow_the_instruction_set() -> None:
    runtime = find_runtime("onnxruntime")
    multiples = {isa: TargetSupports(runtime, target(isa=isa)).width_multiple for isa in ("avx512", "avx2")}
    assert multiples == {"avx512": 16, "avx2": 8}
