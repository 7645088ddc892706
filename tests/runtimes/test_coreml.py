"""Core ML: what is written has the structure, the types and the numbers that were asked for.

Nothing here can run Core ML, so programs are evaluated by the definitions of their operators (``mil.py``).
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mil
from conftest import Lowered
from featherweight.data import Data
from featherweight.errors import TargetError
from featherweight.formats import FloatCast, IntQuant, PerChannel, PerGroup
from featherweight.methods.cast import Cast
from featherweight.methods.cluster import Cluster
from featherweight.methods.quantize import Quantize
from featherweight.model import Entry, Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Signature
from featherweight.runtimes._child import convert
from featherweight.tools.simulate import simulate
from golden import context, data, decibels, folded, inputs, model, model_of, quantized, target
from nets import NETS

NAME = "coreml"
RUNTIME = find_runtime(NAME)
HERE = target(NAME)
if not RUNTIME.installed():
    pytest.skip(f"the runtime '{NAME}' is not installed", allow_module_level=True)


def package(artifact: Artifact, entry: str = "forward") -> Path:
    return (artifact.folder / artifact.entries[entry]).parent


def look(what: str, artifact: Artifact, entry: str = "forward", **arguments: str) -> Any:
    where = {"package": str(package(artifact, entry)), **arguments}
    return convert(NAME, f"featherweight.runtimes._coreml_convert:{what}", where)


def kinds(artifact: Artifact) -> Counter[str]:
    return Counter(op["op"] for op in look("operators", artifact))


def answers(artifact: Artifact, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([mil.run(package(artifact), x=x[i : i + 1])["y"] for i in range(len(x))])


def lower(net: Model, folder: Path, **options: str) -> Artifact:
    folder.mkdir(exist_ok=True)
    return RUNTIME.lower(net, target(NAME, options=options), folder)


def quantize(net: Model, **parameters: Any) -> Model:
    examples = Data.of(x_train=net.entries["forward"].example_inputs[0].numpy())
    return Quantize.model_validate(parameters).apply(net, context(net, examples, HERE))


def integers(artifact: Artifact, parameter: str, part: str, folder: Path) -> np.ndarray:
    places = artifact.details["parameters"]["forward"]
    name = next(place for place, held in places.items() if held == parameter and not place.startswith("b_"))
    look("constant", artifact, name=name, part=part, out=str(folder / "constant.npy"))
    return np.load(folder / "constant.npy")


class TestGoldenNets:
    @pytest.mark.parametrize("net", NETS)
    def test_float_is_the_module(self, net: str, lowered: Lowered) -> None:
        x = inputs(net, 3)
        with torch.no_grad():
            wanted = model(net).module(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(answers(lowered(NAME, net, "float"), x), wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("net", NETS)
    def test_int8_is_the_simulation(self, net: str, lowered: Lowered) -> None:
        x = inputs(net, 3)
        artifact = lowered(NAME, net, "int8")
        with torch.no_grad():
            (wanted,) = simulate(quantized(net, NAME))(torch.from_numpy(x))
        assert decibels(wanted, answers(artifact, x)) >= 40

    @pytest.mark.parametrize("net", ["residual", "attention"])
    def test_weights_are_the_same_integers(self, net: str, lowered: Lowered, tmp_path: Path) -> None:
        artifact, made = lowered(NAME, net, "int8"), quantized(net, NAME)
        weights = [name for name in made.formats if name in made.parameters]
        assert len(weights) >= 6
        for name in weights:
            grid = RUNTIME.realise(made.formats[name][-1], HERE, "weight")
            assert isinstance(grid, IntQuant)
            wanted = grid.quantize(made.module.get_parameter(name).detach()).numpy()
            seen = integers(artifact, name, "quantized_data", tmp_path)
            assert seen.dtype == np.int8
            np.testing.assert_array_equal(seen, wanted)
            scale = integers(artifact, name, "scale", tmp_path)
            np.testing.assert_allclose(scale, grid.grid()[0].numpy(), rtol=1e-6)


class TestStructure:
    def test_int8_is_quantized_around_its_layers(self, lowered: Lowered) -> None:
        artifact = lowered(NAME, "residual", "int8")
        seen = kinds(artifact)
        assert (seen["conv"], seen["linear"], seen["constexpr_affine_dequantize"]) == (6, 1, 7)
        assert seen["quantize"] >= 8
        dtypes = {op["dtype"] for op in look("operators", artifact) if op["op"] == "quantize"}
        assert dtypes == {"int8", "uint8"}  # signed at the input, unsigned behind ReLU
        assert {op["dtype"] for op in look("operators", artifact) if op["op"] == "conv"} == {"float32"}

    def test_inputs_and_outputs_keep_their_names_and_types(self, lowered: Lowered) -> None:
        for kind in ("float", "int8"):
            assert look("features", lowered(NAME, "residual", kind)) == {
                "inputs": [["x", "float32", [1, 3, 16, 16]]],
                "outputs": [["y", "float32", [1, 10]]],
            }

    def test_a_package_is_what_core_ml_opens(self, lowered: Lowered) -> None:
        artifact = lowered(NAME, "residual", "int8")
        manifest = json.loads((package(artifact) / "Manifest.json").read_text())
        paths = {item["path"] for item in manifest["itemInfoEntries"].values()}
        assert paths == {"com.apple.CoreML/weights", "com.apple.CoreML/model.mlmodel"}
        root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
        assert root["name"] == "model.mlmodel"
        assert all(file.startswith("model.mlpackage/") for file in artifact.files)
        assert len(artifact.files) == 3

    def test_the_same_model_is_the_same_package(self, lowered: Lowered, tmp_path: Path) -> None:
        artifact = lowered(NAME, "shared", "int8")
        assert lower(quantized("shared", NAME), tmp_path / "a").sha256 == artifact.sha256

    def test_holds_no_path_date_or_version(self, lowered: Lowered) -> None:
        artifact = lowered(NAME, "residual", "float")
        held = b"".join((artifact.folder / file).read_bytes() for file in artifact.files)
        assert b"coremltools" not in held
        assert b"torch" not in held
        assert not re.search(rb"20\d\d-\d\d-\d\d|/tmp/|site-packages", held)

    def test_several_inputs_and_entries(self, tmp_path: Path) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(11, 6)
                self.body = nn.Linear(6, 6)

            def forward(self, ids: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
                y = self.body(self.table(ids)) * scale
                return y, y.argmax(-1)

            def plain(self, ids: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
                return self.forward(ids, scale)

        examples = (torch.randint(0, 11, (2, 4)), torch.rand(2, 4, 1))
        names, outs = ("ids", "scale"), ("scores", "best")
        axes = {name: {0: "batch"} for name in names}
        entries = {key: Entry(examples, names, outs, axes, key) for key in ("forward", "plain")}
        artifact = lower(Model(Net().eval(), entries, key="two"), tmp_path)
        assert artifact.entries == {
            "forward": "model.mlpackage/Manifest.json",
            "plain": "model.plain.mlpackage/Manifest.json",
        }
        for entry in entries:
            seen = look("features", artifact, entry)
            assert seen["inputs"] == [["ids", "int32", [1, 4]], ["scale", "float32", [1, 4, 1]]]
            assert [one[:2] for one in seen["outputs"]] == [["scores", "float32"], ["best", "int32"]]


class TestWeights:
    @pytest.mark.parametrize(
        ("parameters", "dtype", "operator"),
        [
            ({"weights": "int8"}, "int8", "constexpr_affine_dequantize"),
            ({"weights": "int8", "granularity": "per_tensor"}, "int8", "constexpr_affine_dequantize"),
            ({"weights": "int4"}, "int4", "constexpr_blockwise_shift_scale"),
            (
                {"weights": "int4", "granularity": "per_group", "group": 16},
                "int4",
                "constexpr_blockwise_shift_scale",
            ),
        ],
    )
    def test_alone_are_stored_as_asked(
        self, parameters: dict[str, Any], dtype: str, operator: str, tmp_path: Path
    ) -> None:
        net = folded("attention")
        made = Quantize.model_validate({"activations": "none", **parameters}).apply(
            net, context(net, data("attention"), HERE)
        )
        artifact = lower(made, tmp_path / "a")
        stored = RUNTIME.stored(artifact)
        assert len(made.formats) == 6
        assert {stored[name].dtype for name in made.formats} == {dtype}
        for name in made.formats:
            assert stored[name].bytes == net.parameters[name].numel() * int(dtype[3:]) // 8
        seen = kinds(artifact)
        assert (seen[operator], seen["quantize"]) == (6, 0)
        x = inputs("attention", 2)
        with torch.no_grad():
            (wanted,) = simulate(made)(torch.from_numpy(x))
        assert decibels(wanted, answers(artifact, x)) >= 80

    def test_groups_have_scales_of_their_own(self, tmp_path: Path) -> None:
        made = quantize(
            model_of(nn.Sequential(nn.Linear(64, 8)), torch.randn(4, 64)),
            weights="int4", granularity="per_group", group=32, activations="none",
        )  # fmt: skip
        artifact = lower(made, tmp_path)
        assert integers(artifact, "0.weight", "scale", tmp_path).shape == (8, 2)
        seen = integers(artifact, "0.weight", "data", tmp_path)
        wanted = made.formats["0.weight"][-1].quantize(made.module.get_parameter("0.weight").detach())  # type: ignore[attr-defined]
        np.testing.assert_array_equal(seen, wanted.numpy())

    def test_groups_that_do_not_divide_are_refused(self, tmp_path: Path) -> None:
        made = quantize(
            model_of(nn.Sequential(nn.Linear(40, 8)), torch.randn(4, 40)),
            weights="int4", granularity="per_group", group=32, activations="none",
        )  # fmt: skip
        with pytest.raises(TargetError, match=r"'0\.weight' in groups of 32: it has 40 inputs"):
            lower(made, tmp_path)

    @pytest.mark.parametrize("net", ["residual", "attention"])
    def test_half_precision(self, net: str, tmp_path: Path) -> None:
        made = Cast().apply(folded(net), context(folded(net), data(net), HERE))
        artifact = lower(made, tmp_path)
        stored = RUNTIME.stored(artifact)
        assert {stored[name].dtype for name in made.formats} == {"float16"}
        assert look("features", artifact)["outputs"] == [["y", "float32", [1, 10]]]
        assert {op["dtype"] for op in look("operators", artifact) if op["op"] in ("conv", "linear")} == {
            "float16"
        }
        assert kinds(artifact)["cast"] == 2  # at both ends alone
        x = inputs(net, 2)
        with torch.no_grad():
            (wanted,) = simulate(made)(torch.from_numpy(x))
        assert decibels(wanted, answers(artifact, x)) >= 50

    def test_half_precision_of_one_layer(self, tmp_path: Path) -> None:
        net = folded("residual")
        artifact = lower(net.evolve(formats={"head.weight": (FloatCast("float16"),)}), tmp_path)
        stored = RUNTIME.stored(artifact)
        assert (stored["head.weight"].dtype, stored["stem.0.weight"].dtype) == ("float16", "float32")
        assert look("features", artifact)["outputs"] == [["y", "float32", [1, 10]]]

    @pytest.mark.parametrize(
        ("net", "bits", "code"), [("residual", 3, 4), ("attention", 4, 4), ("depthwise", 1, 1)]
    )
    def test_palettes_are_tables_of_exactly_their_values(
        self, net: str, bits: int, code: int, tmp_path: Path
    ) -> None:
        made = Cluster(bits=bits).apply(folded(net), context(folded(net), data(net), HERE))
        artifact = lower(made, tmp_path)
        assert sorted(artifact.details["tables"]) == sorted(made.formats)
        assert kinds(artifact)["constexpr_lut_to_dense"] == len(made.formats)
        stored = RUNTIME.stored(artifact)
        for name in made.formats:
            assert stored[name].bytes == -(-made.parameters[name].numel() * code // 8)
        x = inputs(net, 2)
        with torch.no_grad():
            (wanted,) = simulate(made)(torch.from_numpy(x))
        np.testing.assert_allclose(answers(artifact, x), wanted, rtol=1e-4, atol=1e-5)

    def test_other_palettes_are_floats_of_the_same_values(self, tmp_path: Path) -> None:
        step = Cluster(bits=2, granularity="per_group", group=8)
        made = step.apply(folded("residual"), context(folded("residual"), data("residual"), HERE))
        artifact = lower(made, tmp_path)
        assert "constexpr_lut_to_dense" not in kinds(artifact)
        x = inputs("residual", 2)
        with torch.no_grad():
            (wanted,) = simulate(made)(torch.from_numpy(x))
        np.testing.assert_allclose(answers(artifact, x), wanted, rtol=1e-4, atol=1e-5)

    def test_a_weight_that_a_batch_norm_changes_is_no_silent_float(self, tmp_path: Path) -> None:
        net = model("residual").evolve(formats={"stem.0.weight": (FloatCast("float16"),)})
        with pytest.raises(TargetError, match=r"stored 'stem\.0\.weight' as float32, not as float16") as told:
            lower(net, tmp_path)
        assert "fold batch norms" in str(told.value.fix)


def test_poolings_have_their_strides(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(F.max_pool2d(F.relu(self.conv(x)), 2), 2).flatten(1)

    net = model_of(Net(), torch.randn(2, 3, 8, 8))
    x = net.entries["forward"].example_inputs[0]
    with torch.no_grad():
        assert decibels(net.module(x), answers(lower(net, tmp_path), x.numpy())) > 100


class TestTarget:
    WEIGHT = IntQuant(-torch.ones(1), torch.ones(1), 8, True, PerChannel(0))

    def test_is_written_not_measured(self, lowered: Lowered) -> None:
        assert RUNTIME.unmeasured == "written, not measured: needs an Apple device"
        with pytest.raises(TargetError, match="written, not measured: needs an Apple device"):
            RUNTIME.open(lowered(NAME, "residual", "float"), HERE)

    def test_systems_follow_from_the_formats(self, tmp_path: Path) -> None:
        net = model_of(nn.Sequential(nn.Linear(32, 8)), torch.randn(4, 32))
        made = quantize(net, weights="int4", activations="none")
        with pytest.raises(TargetError, match="for 'iOS17'") as told:
            lower(made, tmp_path, minimum_deployment_target="iOS17")
        assert "iOS18" in str(told.value.fix)
        with pytest.raises(TargetError, match="no option 'deployment_target'") as told:
            lower(net, tmp_path, deployment_target="iOS18")
        assert told.value.fix == "did you mean 'minimum_deployment_target'?"

    def test_supports_what_it_stores(self) -> None:
        activation = IntQuant(torch.tensor(-1.0), torch.tensor(1.0))
        grouped = IntQuant(-torch.ones(1, 1), torch.ones(1, 1), 4, True, PerGroup(1, 32))
        assert RUNTIME.supports("conv2d", self.WEIGHT, activation, HERE)
        assert RUNTIME.supports("conv_transpose2d", self.WEIGHT, None, HERE)
        assert not RUNTIME.supports("conv_transpose2d", self.WEIGHT, activation, HERE)
        assert RUNTIME.supports("linear", grouped, None, HERE)
        assert not RUNTIME.supports("conv2d", grouped, None, HERE)
        assert not RUNTIME.supports("linear", grouped, activation, HERE)
        assert not RUNTIME.supports("matmul", None, activation, HERE)
        assert not RUNTIME.supports("linear", FloatCast("bfloat16"), None, HERE)

    def test_activations_have_zero_at_zero(self) -> None:
        for low, signed in ((-1.0, True), (0.0, False)):
            grid = RUNTIME.realise(IntQuant(torch.tensor(low), torch.tensor(2.0)), HERE, "activation")
            assert isinstance(grid, IntQuant)
            assert grid.signed is signed
            assert int(grid.grid()[1]) == 0


class TestLoaders:
    def test_are_short_programs(self, lowered: Lowered, tmp_path: Path) -> None:
        signature = Signature((("x", "float32", (1, 3, 16, 16)),), ("y",))
        programs = RUNTIME.loaders(lowered(NAME, "residual", "float"), HERE, signature)
        assert set(programs) == {"load.py", "load.swift"}
        ast.parse(programs["load.py"])
        assert "'model.mlpackage'" in programs["load.py"]
        assert '"x": try MLMultiArray(shape: [1, 3, 16, 16], dataType: .float32)' in programs["load.swift"]
        assert all("featherweight" not in text for text in programs.values())
        assert all(len(text.splitlines()) <= 12 for text in programs.values())
        (tmp_path / "load.swift").write_text(programs["load.swift"])
        if shutil.which("swiftc") is not None:
            subprocess.run(["swiftc", "-parse", str(tmp_path / "load.swift")], check=True)
