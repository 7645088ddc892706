"""MNN: what is stored is ours to the last integer, what runs is told truthfully, and nothing reaches out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import Lowered
from featherweight.data import Data
from featherweight.errors import TargetError
from featherweight.formats import FloatCast, IntQuant, PerChannel
from featherweight.methods.cast import Cast
from featherweight.methods.quantize import Quantize
from featherweight.model import Entry, Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Signature
from featherweight.runtimes._mnn_file import QUANTIZED, File, integers
from featherweight.runtimes._mnn_lower import _converted
from featherweight.tools.simulate import Replay, project, projected_parameters, simulate
from golden import context, decibels, inputs, model, model_of, quantized, target, typical_decibels
from nets import NETS

pytest.importorskip("_tools", reason="the runtime 'mnn' is not installed")
RUNTIME = find_runtime("mnn")
HERE = target("mnn")
ROOT = Path(__file__).parents[2]


def lower(net: Model, folder: Path) -> Artifact:
    folder.mkdir(exist_ok=True)
    return RUNTIME.lower(net, HERE, folder)


def quantize(net: Model, **parameters: Any) -> Model:
    examples = Data.of(x_train=net.entries["forward"].example_inputs[0].numpy())
    return Quantize.model_validate(parameters).apply(net, context(net, examples, HERE))


def answers(artifact: Artifact, *x: np.ndarray) -> np.ndarray:
    (y,) = RUNTIME.open(artifact, HERE)(*x)
    return y


def simulated(net: Model, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        (y,) = simulate(net)(torch.from_numpy(x))
    return y.numpy()


def example(net: Model) -> np.ndarray:
    return net.entries["forward"].example_inputs[0].numpy()


def file_of(artifact: Artifact) -> File:
    return File((artifact.folder / artifact.files[0]).read_bytes())


def small_module(*layers: nn.Module, shape: Sequence[int] = (3, 8, 8)) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_of(nn.Sequential(*layers), torch.randn(16, *shape))


@cache
def small() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 6),
        )
    return small_module(*layers)


@pytest.mark.parametrize("name", NETS)
class TestGoldenNets:
    def test_int8_gives_what_the_simulation_says(self, name: str, lowered: Lowered) -> None:
        x = inputs(name)
        seen = answers(lowered("mnn", name, "int8"), x)
        assert seen.dtype == np.float32
        exact = name not in ("depthwise", "squeeze_excite")  # the depthwise kernel rounds halves its own way
        assert decibels(simulated(quantized(name, "mnn"), x), seen) >= (100 if exact else 45)

    def test_int8_is_near_the_float_net(self, name: str, lowered: Lowered) -> None:
        x = inputs(name, 16, 3)
        with torch.no_grad():
            wanted = model(name).module(torch.from_numpy(x)).numpy()
        assert decibels(wanted, answers(lowered("mnn", name, "int8"), x)) >= 30

    def test_the_stored_integers_are_those_of_the_formats(self, name: str, lowered: Lowered) -> None:
        artifact, net = lowered("mnn", name, "int8"), quantized(name, "mnn")
        assert stored_integers(artifact, net) == sum(
            key in net.formats
            for op in file_of(artifact).ops
            if (key := artifact.details["parameters"]["forward"].get(op.name, {}).get("weight"))
        )

    def test_every_layer_with_formats_runs_in_integers(self, name: str, lowered: Lowered) -> None:
        artifact, net = lowered("mnn", name, "int8"), quantized(name, "mnn")
        kernels = {kernel.name: kernel for kernel in RUNTIME.kernels(artifact, HERE, [inputs(name, 2)])}
        for op, parts in artifact.details["parameters"]["forward"].items():
            if parts["weight"] in net.formats:
                assert (kernels[op].dtype, kernels[op].fast) == ("int8", True)

    def test_values_are_those_of_the_simulation(self, name: str, lowered: Lowered) -> None:
        net, x = quantized(name, "mnn"), inputs(name, 4)
        seen: dict[str, Tensor] = {}

        def observe(value: str, tensor: Tensor) -> Tensor:
            seen[value] = project(tensor, net.formats[value]) if value in net.formats else tensor
            return seen[value]

        with torch.no_grad():
            Replay(net, "forward", projected_parameters(net))((torch.from_numpy(x),), observe)
        told = RUNTIME.values(lowered("mnn", name, "int8"), HERE, [x])
        assert told
        for value, array in told.items():
            assert array.shape == tuple(seen[value].shape), value
            assert decibels(seen[value], array) > 30, value


def stored_integers(artifact: Artifact, net: Model) -> int:
    """Compares every weight's integers with those of its format; returns how many there were."""
    found = 0
    for op in file_of(artifact).ops:
        name = artifact.details["parameters"]["forward"].get(op.name, {}).get("weight")
        coded = None if op.main is None or name not in net.formats else op.main.table(QUANTIZED)
        if coded is None:
            continue
        fmt = net.formats[name][-1]
        assert isinstance(fmt, IntQuant)
        weight = net.parameters[name].detach()
        wanted = fmt.quantize(weight).numpy().reshape(len(weight), -1)
        np.testing.assert_array_equal(integers(coded), wanted)
        found += 1
    return found


class TestWeightsAlone:
    @pytest.mark.parametrize("name", ["attention", "residual"])
    @pytest.mark.parametrize("weights", ["int8", "int4"])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_integers(self, name: str, weights: str, symmetric: bool, tmp_path: Path) -> None:
        net = quantize(model(name), weights=weights, activations="none", symmetric_weights=symmetric)
        artifact = lower(net, tmp_path)
        x = inputs(name, 4)
        assert decibels(simulated(net, x), answers(artifact, x)) > 80
        stored, parameters = RUNTIME.stored(artifact), net.parameters
        for key in net.formats:
            bits = int(weights.removeprefix("int"))
            assert (stored[key].dtype, stored[key].bytes) == (
                weights,
                -(-parameters[key].numel() * bits // 8),
            )
        if name == "attention":  # in the other one batch norms go into the weights, a negative one turns them
            assert stored_integers(artifact, net) == len(net.formats)

    def test_groups(self, tmp_path: Path) -> None:
        net = quantize(
            model("attention"), weights="int4", activations="none", granularity="per_group", group=8
        )
        artifact = lower(net, tmp_path)
        x = inputs("attention", 4)
        assert decibels(simulated(net, x), answers(artifact, x)) > 80
        assert stored_integers(artifact, net) == len(net.formats)
        assert {RUNTIME.stored(artifact)[key].dtype for key in net.formats} == {"int4"}

    def test_a_group_that_does_not_divide_is_refused(self, tmp_path: Path) -> None:
        net = quantize(
            model("linear3d"), weights="int4", activations="none", granularity="per_group", group=8
        )
        with pytest.raises(TargetError, match=r"8 does not divide the 12 inputs of 'fc1\.weight'"):
            lower(net, tmp_path)

    def test_halves(self, tmp_path: Path) -> None:
        x = inputs("residual", 4)
        net = Cast().apply(model("residual"), context(model("residual"), Data.of(x_train=x), HERE))
        artifact = lower(net, tmp_path / "a")
        assert decibels(simulated(net, x), answers(artifact, x)) > 65
        stored = RUNTIME.stored(artifact)
        for key in net.formats:
            assert (stored[key].dtype, stored[key].bytes) == ("float16", 2 * net.parameters[key].numel())
        assert artifact.bytes < 0.75 * lower(model("residual"), tmp_path / "b").bytes

    def test_they_are_told_to_run_as_floats(self, tmp_path: Path) -> None:
        artifact = lower(quantize(small(), activations="none"), tmp_path)
        kernels = RUNTIME.kernels(artifact, HERE, [example(small())])
        assert {kernel.dtype for kernel in kernels} == {"float32"}


class TestLayers:
    @pytest.mark.parametrize(
        ("layers", "shape"),
        [
            ((nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 3)), (4, 16)),
            (
                (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)),
                None,
            ),
            ((nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)), None),
            ((nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.AvgPool2d(2), nn.Conv2d(8, 4, 1)), None),
            ((nn.Flatten(), nn.Linear(192, 8), nn.ReLU6(), nn.Linear(8, 4)), None),
            ((nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 1)), None),
            ((nn.Conv2d(3, 4, 3),), None),
        ],
    )
    def test_float_and_int8(
        self, layers: tuple[nn.Module, ...], shape: tuple[int, ...] | None, tmp_path: Path
    ) -> None:
        net = small_module(*layers, shape=shape or (3, 8, 8))
        x = example(net)
        with torch.no_grad():
            wanted = net.module(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(answers(lower(net, tmp_path / "a"), x), wanted, rtol=1e-4, atol=1e-5)
        done = quantize(net)
        seen = answers(lower(done, tmp_path / "b"), x)
        assert seen.shape == wanted.shape
        assert typical_decibels(simulated(done, x), seen) > 100
        assert decibels(simulated(done, x), seen) > 50
        assert 25 < decibels(wanted, seen) < 60

    def test_a_transposed_convolution_stays_float_between_integers(self, tmp_path: Path) -> None:
        net = small_module(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(4, 4, 1))
        done = quantize(net)
        artifact = lower(done, tmp_path)
        stored = RUNTIME.stored(artifact)
        kinds = [stored[f"{index}.weight"].dtype for index in (0, 2, 3)]
        assert kinds == ["int8", "float32", "int8"]
        assert decibels(simulated(done, example(net)), answers(artifact, example(net))) > 50

    def test_a_convolution_in_groups_is_told_to_run_as_floats(self, tmp_path: Path) -> None:
        net = small_module(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
        artifact = lower(quantize(net), tmp_path)
        kernels = {kernel.name: kernel for kernel in RUNTIME.kernels(artifact, HERE, [example(net)])}
        by_weight = {
            parts["weight"]: kernels[op] for op, parts in artifact.details["parameters"]["forward"].items()
        }
        assert by_weight["0.weight"].dtype == "int8"
        assert by_weight["2.weight"].dtype == "float32"
        assert "turned into floats" in by_weight["2.weight"].note

    def test_two_that_read_integers_as_floats(self, tmp_path: Path) -> None:
        """MNN itself lets them share a cast, and crashes when the batch changes."""

        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 8, 3)

            def forward(self, x: Tensor) -> Tensor:
                y = self.conv(x)
                return torch.cat([torch.tanh(y), y * torch.sigmoid(y)], 1)[:, 2:]

        net = model_of(Both(), torch.randn(16, 3, 8, 8))
        done, x = quantize(net), example(net)
        session = RUNTIME.open(lower(done, tmp_path), HERE)
        for batch in (1, 2, 16):
            (seen,) = session(x[:batch])
            assert decibels(simulated(done, x[:batch]), seen) > 40

    def test_symmetric_activations(self, tmp_path: Path) -> None:
        done = quantize(model("residual"), symmetric_activations=True)
        with pytest.raises(TargetError, match="put fold before quantize"):
            lower(done, tmp_path / "a")
        folded_net = quantized("residual", "mnn")
        assert folded_net.formats
        net = small_module(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        done = quantize(net, symmetric_activations=True)
        x = example(net)
        assert decibels(simulated(done, x), answers(lower(done, tmp_path / "b"), x)) > 100

    def test_integers_wide_inputs_and_outputs_in_their_types(self, tmp_path: Path) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc, self.table = nn.Linear(4, 4), nn.Embedding(10, 4)

            def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
                return self.fc(x) + self.table(ids), x.argmax(1)

        x, ids = torch.randn(5, 4), torch.arange(5)
        net = model_of(Two(), x, ids, outputs=2)
        session = RUNTIME.open(lower(net, tmp_path), HERE)
        for batch in (5, 2):
            seen = session(x[:batch].numpy(), ids[:batch].numpy())
            with torch.no_grad():
                wanted = net.module(x[:batch], ids[:batch])
            assert [y.dtype for y in seen] == [np.float32, np.int64]
            for one, other in zip(seen, wanted, strict=True):
                np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=1e-6)

    def test_another_entry_is_another_file(self, tmp_path: Path) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Linear(6, 6)

            def forward(self, x: Tensor) -> Tensor:
                return self.body(x)

            def twice(self, x: Tensor) -> Tensor:
                return self.body(F.relu(self.body(x)))

        x = torch.randn(8, 6)
        entries = {n: Entry((x,), ("x",), ("y",), {"x": {0: "n"}}, n) for n in ("forward", "twice")}
        net = quantize(Model(Net().eval(), entries, key="two"))
        artifact = lower(net, tmp_path)
        assert artifact.entries == {"forward": "model.mnn", "twice": "model.twice.mnn"}
        session = RUNTIME.open(artifact, HERE)
        for entry, call in (("forward", net.module), ("twice", net.module.twice)):
            (y,) = session(x.numpy(), entry=entry)
            assert decibels(call(x).detach(), y) > 25  # type: ignore[operator]


class TestFile:
    def test_lowering_twice_is_the_same_file(self, lowered: Lowered, tmp_path: Path) -> None:
        again = lower(quantized("shared", "mnn"), tmp_path)
        assert again.sha256 == lowered("mnn", "shared", "int8").sha256

    def test_int8_is_about_a_quarter(self, tmp_path: Path) -> None:
        net = small_module(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), shape=(32, 8, 8))
        before, after = lower(net, tmp_path / "a"), lower(quantize(net), tmp_path / "b")
        assert after.bytes < 0.27 * before.bytes

    def test_an_excluded_layer_is_stored_as_float32(self, tmp_path: Path) -> None:
        net = quantize(small(), where={"exclude": ["2"]})
        artifact = lower(net, tmp_path)
        stored = RUNTIME.stored(artifact)
        kinds = {name: stored[name].dtype for name in ("0.weight", "2.weight", "2.bias", "5.weight")}
        assert kinds == {"0.weight": "int8", "2.weight": "float32", "2.bias": "float32", "5.weight": "int8"}
        assert decibels(simulated(net, example(net)), answers(artifact, example(net))) > 60

    def test_activations_keep_their_scales(self, lowered: Lowered) -> None:
        net = quantized("residual", "mnn")
        file = file_of(lowered("mnn", "residual", "int8"))
        wanted = {
            (float(np.float32(scale)), int(zero))
            for name, chain in net.formats.items()
            if name not in net.parameters
            for scale, zero in [chain[-1].grid()]  # type: ignore[union-attr]
        }
        assert set(file.quantized.values()) == wanted


class TestTarget:
    def test_an_unknown_option_is_refused(self, lowered: Lowered) -> None:
        artifact = lowered("mnn", "linear3d", "float")
        with pytest.raises(TargetError, match="no session option 'precison'") as told:
            RUNTIME.open(artifact, target("mnn", options={"precison": "low"}))
        assert told.value.fix == "did you mean 'precision'?"
        with pytest.raises(TargetError, match="'memory' cannot be 'none'"):
            RUNTIME.open(artifact, target("mnn", options={"memory": "none"}))
        with pytest.raises(TargetError, match="'winograd' cannot be True"):
            RUNTIME.open(artifact, target("mnn", options={"winograd": True}))

    def test_tunings_keep_the_results(self, lowered: Lowered) -> None:
        x = inputs("residual", 2)
        for kind in ("float", "int8"):
            artifact = lowered("mnn", "residual", kind)
            wanted = answers(artifact, x)
            for options in RUNTIME.tunings(HERE):
                (seen,) = RUNTIME.open(artifact, target("mnn", options=options))(x)
                assert decibels(wanted, seen) > 80, options

    def test_opening_prints_nothing(self, lowered: Lowered, capfd: pytest.CaptureFixture[str]) -> None:
        RUNTIME.open(lowered("mnn", "linear3d", "float"), HERE)
        assert capfd.readouterr().out == ""


class TestRefusals:
    def test_what_it_cannot_store(self) -> None:
        one = torch.tensor(1.0)
        with pytest.raises(TargetError, match="16-bit integers"):
            RUNTIME.realise(IntQuant(-one, one, 16, True), HERE, "weight")
        with pytest.raises(TargetError, match="4-bit integers for activations"):
            RUNTIME.realise(IntQuant(-one, one, 4), HERE, "activation")
        with pytest.raises(TargetError, match="one scale for an activation"):
            RUNTIME.realise(
                IntQuant(-torch.ones(2), torch.ones(2), 8, True, PerChannel(1)), HERE, "activation"
            )
        with pytest.raises(TargetError, match="bfloat16"):
            RUNTIME.realise(FloatCast("bfloat16"), HERE, "weight")

    def test_asymmetric_weights_are_for_floats_alone(self) -> None:
        weight = IntQuant(-torch.ones(4), torch.ones(4), granularity=PerChannel(0))
        activation = IntQuant(torch.tensor(-1.0), torch.tensor(1.0))
        assert RUNTIME.supports("conv2d", weight, None, HERE)
        assert not RUNTIME.supports("conv2d", weight, activation, HERE)

    def test_an_operator_without_a_form(self, tmp_path: Path) -> None:
        made = onnx.helper.make_tensor_value_info
        x, y = (made(name, onnx.TensorProto.FLOAT, [1, 3]) for name in "xy")
        node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])
        graph = onnx.helper.make_graph([node], "odd", [x], [y])
        onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
        with pytest.raises(TargetError, match="mnn") as told:
            _converted(tmp_path / "model.onnx", False)
        assert told.value.fix is not None


class TestLoaders:
    SIGNATURE = Signature((("x", "float32", (1, 3, 16, 16)),), ("y",))

    def test_python_runs(self, lowered: Lowered, tmp_path: Path) -> None:
        for kind in ("float", "int8"):
            artifact = lowered("mnn", "residual", kind)
            shutil.copy(artifact.folder / "model.mnn", tmp_path)
            for options in ({}, {"winograd": 0, "power": "high"}):
                texts = RUNTIME.loaders(artifact, target("mnn", options=options), self.SIGNATURE)
                (tmp_path / "load.py").write_text(texts["load.py"])
                done = subprocess.run(
                    [sys.executable, "load.py"], cwd=tmp_path, capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, done.stderr
                assert done.stdout.splitlines()[-1] == "(1, 10)"

    def test_others_name_the_file_and_the_tensors(self, lowered: Lowered) -> None:
        texts = RUNTIME.loaders(lowered("mnn", "residual", "float"), HERE, self.SIGNATURE)
        assert set(texts) == {"load.py", "load.cpp", "Load.java", "Load.kt"}
        for name, text in texts.items():
            assert "model.mnn" in text, name
            assert '"x"' in text or "'x'" in text, name
            assert text.count("{") == text.count("}"), name


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_nothing_connects_and_nothing_is_installed(tmp_path: Path) -> None:
    """Converts and runs under strace, which sees what native code does too."""
    log, folder = tmp_path / "strace.txt", tmp_path / "out"
    folder.mkdir()
    code = WATCHED.format(tests=str(ROOT / "tests"), folder=str(folder))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,execve", "-o", str(log), sys.executable]
    done = subprocess.run(
        [*command, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip("this machine does not let strace trace")
    assert done.returncode == 0, done.stderr[-2000:]
    calls = log.read_text().splitlines()
    assert not [call for call in calls if re.search(r"(connect|sendto)\(.*AF_INET", call)]
    started = [call for call in calls if "execve(" in call and call.rstrip().endswith("= 0")]
    assert len(started) >= 2  # Python, and the converter's child
    assert not [call for call in started if re.search(r"\bpip\b|mnnconvert|/sh\b", call)]
    assert json.loads(done.stdout.splitlines()[-1]) == [2, 10]


WATCHED = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from featherweight.plugins import find_runtime
from golden import inputs, model, target
engine = find_runtime('mnn')
artifact = engine.lower(model('linear3d'), target('mnn'), Path({folder!r}))
(y,) = engine.open(artifact, target('mnn'))(inputs('linear3d', 2))
print(json.dumps(list(y.shape)))
"""
