"""OpenVINO: what its IR holds, which kernels run, and that nothing is sent anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import Lowered
from featherweight.data import Data
from featherweight.errors import TargetError
from featherweight.formats import FloatCast, IntQuant, PerChannel, PerGroup
from featherweight.graph import trace
from featherweight.methods.cast import Cast
from featherweight.methods.quantize import Quantize
from featherweight.model import Entry, Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Signature, Target
from featherweight.tools.simulate import Replay, project, projected_parameters, simulate
from golden import context, data, decibels, folded, inputs, model, model_of, quantized, target
from nets import NETS

RUNTIME = find_runtime("openvino")
if not RUNTIME.installed():
    pytest.skip("the runtime 'openvino' is not installed", allow_module_level=True)
HERE = target("openvino")
LAYERS = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")
SOME = ("residual", "depthwise", "attention", "squeeze_excite")


def lower(net: Model, folder: Path, where: Target = HERE) -> Artifact:
    folder.mkdir(exist_ok=True)
    return RUNTIME.lower(net, where, folder)


def quantize(net: Model, on: Target = HERE, **parameters: Any) -> Model:
    examples = Data.of(x_train=net.entries["forward"].example_inputs[0].numpy())
    return Quantize.model_validate(parameters).apply(net, context(net, examples, on))


def answers(artifact: Artifact, x: np.ndarray, where: Target = HERE) -> np.ndarray:
    (y,) = RUNTIME.open(artifact, where)(x)
    return y


def simulated(net: Model, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        (y,) = simulate(net)(torch.from_numpy(x))
    return y.numpy()


def kernels(artifact: Artifact, x: np.ndarray, where: Target = HERE) -> Counter[tuple[str, str]]:
    """How many layers run, by operator and type."""
    seen = RUNTIME.kernels(artifact, where, [x])
    assert all(kernel.seconds is not None and kernel.seconds >= 0 for kernel in seen)
    return Counter((kernel.op, kernel.dtype) for kernel in seen if kernel.op.startswith(LAYERS))


def integers(artifact: Artifact, name: str) -> np.ndarray:
    """A constant of the file, as OpenVINO reads it."""
    import openvino as ov

    found = ov.Core().read_model(artifact.folder / artifact.files[0])
    (node,) = [node for node in found.get_ops() if node.get_friendly_name() == name]
    return np.asarray(node.get_data())


@cache
def matrices() -> Model:
    """Three linear layers whose inputs are divided by 32, by 16 and not at all."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 6))
        return model_of(net, torch.randn(16, 64))


class TestGoldenNets:
    @pytest.mark.parametrize("name", NETS)
    def test_int8_is_the_simulation(self, name: str, lowered: Lowered) -> None:
        x = inputs(name, 6)
        seen = answers(lowered("openvino", name, "int8"), x)
        assert seen.dtype == np.float32
        assert decibels(simulated(quantized(name, "openvino"), x), seen) >= 90

    @pytest.mark.parametrize("name", NETS)
    def test_int8_is_near_the_float_net(self, name: str, lowered: Lowered) -> None:
        x = inputs(name, 16, 3)
        with torch.no_grad():
            wanted = model(name).module(torch.from_numpy(x)).numpy()
        assert decibels(wanted, answers(lowered("openvino", name, "int8"), x)) >= 30

    @pytest.mark.parametrize("name", SOME)
    def test_every_layer_runs_in_integers(self, name: str, lowered: Lowered) -> None:
        seen = kernels(lowered("openvino", name, "int8"), inputs(name, 1))
        calls = [node.op for node in trace(quantized(name, "openvino")) if node.op in ("conv2d", "linear")]
        assert {dtype for op, dtype in seen if op != "MatMul"} == {"int8"}
        assert sum(seen.values()) - seen["MatMul", "float32"] == len(calls)

    @pytest.mark.parametrize("name", SOME)
    def test_stored_integers_are_those_of_the_format(self, name: str, lowered: Lowered) -> None:
        artifact, net = lowered("openvino", name, "int8"), quantized(name, "openvino")
        for weight in (key for key in net.formats if key in net.parameters):
            fmt = net.formats[weight][-1]
            assert isinstance(fmt, IntQuant)
            wanted = fmt.quantize(net.parameters[weight].detach()).numpy()
            np.testing.assert_array_equal(
                np.sort(integers(artifact, weight).ravel()), np.sort(wanted.ravel())
            )

    def test_sums_are_added_inside_the_convolution(self, lowered: Lowered) -> None:
        seen = RUNTIME.kernels(lowered("openvino", "residual", "int8"), HERE, [inputs("residual", 1)])
        assert not {"Add", "Eltwise", "Subgraph"} & {kernel.op for kernel in seen if kernel.dtype == "int8"}
        assert all(kernel.fast and not kernel.note for kernel in seen)

    @pytest.mark.parametrize("name", SOME)
    def test_values_inside_are_the_simulated_ones(self, name: str, lowered: Lowered) -> None:
        net, x = quantized(name, "openvino"), inputs(name, 3)
        seen = RUNTIME.values(lowered("openvino", name, "int8"), HERE, [x])
        wanted: dict[str, Tensor] = {}

        def observe(value: str, tensor: Tensor) -> Tensor:
            wanted[value] = project(tensor, net.formats.get(value, ()))
            return wanted[value]

        with torch.no_grad():
            Replay(net, "forward", projected_parameters(net))((torch.from_numpy(x),), observe)
        assert len(seen) >= 0.6 * len(wanted)
        assert list(seen) == [value for value in wanted if value in seen]
        assert all(decibels(wanted[value], seen[value]) > 35 for value in seen)


@pytest.mark.parametrize("name", ["residual", "depthwise", "attention"])
def test_symmetric_activations_are_signed_where_they_have_signs(name: str, tmp_path: Path) -> None:
    net = folded(name)
    done = Quantize(symmetric_activations=True).apply(net, context(net, data(name), HERE))
    kinds = {(fmt.signed, bool(fmt.low < 0)) for fmt in activations(done)}
    assert kinds == {(True, True), (False, False)} or kinds == {(True, True)}
    artifact, x = lower(done, tmp_path), inputs(name, 6)
    assert decibels(simulated(done, x), answers(artifact, x)) > 40
    assert {dtype for op, dtype in kernels(artifact, x) if op != "MatMul"} == {"int8"}


def activations(net: Model) -> list[IntQuant]:
    formats = [chain[-1] for name, chain in net.formats.items() if name not in net.parameters]
    return [fmt for fmt in formats if isinstance(fmt, IntQuant)]


class TestWeightsAlone:
    @pytest.mark.parametrize(("weights", "symmetric", "dtype"), [
        ("int8", True, "int8"), ("int8", False, "uint8"), ("int4", True, "int4"), ("int4", False, "uint4"),
    ])  # fmt: skip
    def test_matrices_stay_compressed(
        self, weights: str, symmetric: bool, dtype: str, tmp_path: Path
    ) -> None:
        net = quantize(matrices(), weights=weights, activations="none", symmetric_weights=symmetric)
        artifact = lower(net, tmp_path / "a")
        stored = RUNTIME.stored(artifact)
        assert {stored[f"{layer}.weight"].dtype for layer in (0, 2, 4)} == {dtype}
        assert stored["0.weight"].bytes == 64 * 48 * int(weights[3:]) // 8
        x = matrices().entries["forward"].example_inputs[0].numpy()
        assert decibels(simulated(net, x), answers(artifact, x)) > 90
        assert kernels(artifact, x[:1])["FullyConnectedCompressed", "float32"] >= 2

    def test_groups_that_do_not_divide_become_smaller_ones(self, tmp_path: Path) -> None:
        net = quantize(matrices(), weights="int4", activations="none", granularity="per_group", group=32)
        artifact = lower(net, tmp_path / "a")
        shapes = [integers(artifact, f"{layer}.weight").size for layer in (0, 2, 4)]
        assert shapes == [64 * 48 // 2, 48 * 24 // 2, 24 * 6 // 2]  # two to a byte
        x = matrices().entries["forward"].example_inputs[0].numpy()
        assert decibels(simulated(net, x), answers(artifact, x)) > 90

    def test_groups_that_fit_nothing_are_refused(self, tmp_path: Path) -> None:
        net = model_of(nn.Linear(37, 8), torch.randn(8, 37))
        done = quantize(net, weights="int4", activations="none", granularity="per_group", group=32)
        with pytest.raises(
            TargetError, match="cannot cut the 37 inputs of 'weight' into groups of 32"
        ) as told:
            lower(done, tmp_path)
        assert "divides 37" in str(told.value.fix)

    @pytest.mark.parametrize("name", ["depthwise", "attention", "lstm"])
    def test_half_precision_is_stored_and_computed_in_float32(self, name: str, tmp_path: Path) -> None:
        net = Cast().apply(folded(name), context(folded(name), data(name), HERE))
        artifact = lower(net, tmp_path)
        stored = RUNTIME.stored(artifact)
        assert {stored[weight].dtype for weight in net.formats} == {"float16"}
        assert all(stored[weight].bytes == 2 * net.parameters[weight].numel() for weight in net.formats)
        x = inputs(name, 3)
        assert decibels(simulated(net, x), answers(artifact, x)) > 90
        assert {dtype for _, dtype in kernels(artifact, x)} == {"float32"}


class TestFile:
    def test_lowering_twice_is_the_same_file(self, lowered: Lowered, tmp_path: Path) -> None:
        for kind, net in (("float", model("concat")), ("int8", quantized("concat", "openvino"))):
            assert lower(net, tmp_path / kind).sha256 == lowered("openvino", "concat", kind).sha256

    def test_float_weights_and_biases_keep_their_names(self, lowered: Lowered) -> None:
        stored = RUNTIME.stored(lowered("openvino", "squeeze_excite", "float"))
        for name in ("reduce.weight", "reduce.bias", "expand.bias", "head.weight", "head.bias"):
            assert stored[name].dtype == "float32"
            assert stored[name].bytes == 4 * model("squeeze_excite").parameters[name].numel()

    def test_another_entry_is_another_file(self, tmp_path: Path) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Linear(6, 6)

            def forward(self, x: Tensor) -> Tensor:
                return self.body(x)

            def twice(self, x: Tensor) -> Tensor:
                return self.body(torch.relu(self.body(x)))

        x = torch.randn(8, 6)
        entries = {n: Entry((x,), ("x",), ("y",), {"x": {0: "n"}}, n) for n in ("forward", "twice")}
        net = Model(Net().eval(), entries, key="two")
        artifact = lower(net, tmp_path)
        assert artifact.files == ("model.xml", "model.bin", "model.twice.xml", "model.twice.bin")
        session = RUNTIME.open(artifact, HERE)
        for entry, call in (("forward", net.module), ("twice", net.module.twice)):
            (y,) = session(x.numpy(), entry=entry)
            np.testing.assert_allclose(y, call(x).detach().numpy(), rtol=1e-4, atol=1e-6)  # type: ignore[operator]

    def test_an_excluded_layer_stays_float(self, tmp_path: Path) -> None:
        net = quantize(matrices(), where={"exclude": ["2"]})
        artifact = lower(net, tmp_path)
        stored = RUNTIME.stored(artifact)
        kinds = [stored[f"{layer}.weight"].dtype for layer in (0, 2, 4)]
        assert kinds == ["int8", "float32", "int8"]
        x = matrices().entries["forward"].example_inputs[0].numpy()
        assert decibels(simulated(net, x), answers(artifact, x)) > 90
        notes = [kernel.note for kernel in RUNTIME.kernels(artifact, HERE, [x]) if not kernel.fast]
        assert notes == ["float among integers: it has no integer kernel, or its weight or input no format"]


class TestSession:
    def test_many_shapes(self, lowered: Lowered) -> None:
        """The first ones are compiled for; the others share what takes any."""
        session = RUNTIME.open(lowered("openvino", "depthwise", "int8"), HERE)
        x = inputs("depthwise", 12)
        (wanted,) = session(x)
        for batch in (1, 2, 3, 5, 7, 11, 1, 7):
            (seen,) = session(x[:batch])
            np.testing.assert_allclose(seen, wanted[:batch], rtol=1e-4, atol=1e-4)

    def test_options(self, lowered: Lowered) -> None:
        artifact = lowered("openvino", "linear3d", "float")
        with pytest.raises(TargetError, match="no property 'ENABLE_CPU_PINING'") as told:
            RUNTIME.open(artifact, target("openvino", options={"ENABLE_CPU_PINING": True}))
        assert told.value.fix == "did you mean 'ENABLE_CPU_PINNING'?"
        with pytest.raises(TargetError, match="'PERFORMANCE_HINT' cannot be 'FAST'"):
            RUNTIME.open(artifact, target("openvino", options={"PERFORMANCE_HINT": "FAST"}))
        x = inputs("linear3d", 2)
        for options in RUNTIME.tunings(Target("openvino", "vnni", 2)):
            seen = answers(artifact, x, target("openvino", options=options))
            np.testing.assert_allclose(seen, answers(artifact, x), rtol=1e-5, atol=1e-6)

    def test_float_stays_float32_unless_asked(self, lowered: Lowered) -> None:
        artifact, x = lowered("openvino", "residual", "float"), inputs("residual", 1)
        assert {dtype for _, dtype in kernels(artifact, x)} == {"float32"}
        import openvino as ov

        if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            short = target("openvino", options={"INFERENCE_PRECISION_HINT": "bf16"})
            assert "bfloat16" in {kernel.dtype for kernel in RUNTIME.kernels(artifact, short, [x])}


class TestRefusals:
    def test_formats_it_cannot_store(self) -> None:
        one = torch.ones(4)
        for fmt, role in (
            (IntQuant(-one, one, 8, True, PerChannel(1)), "activation"),
            (IntQuant(-one[0], one[0], 4), "activation"),
            (IntQuant(-one[0], one[0], 16), "weight"),
            (FloatCast("bfloat16"), "weight"),
            (FloatCast("float16"), "activation"),
        ):
            with pytest.raises(TargetError, match="openvino") as told:
                RUNTIME.realise(fmt, HERE, role)  # type: ignore[arg-type]
            assert told.value.fix
        grouped = IntQuant(-torch.ones(1, 1), torch.ones(1, 1), 4, True, PerGroup(1, 32))
        assert RUNTIME.supports("linear", grouped, None, HERE)
        assert not RUNTIME.supports("conv2d", grouped, None, HERE)
        assert not RUNTIME.supports("linear", grouped, IntQuant(-one[0], one[0]), HERE)

    @pytest.mark.parametrize(("isa", "limit"), [("avx2", 63), ("vnni", 127)])
    def test_weights_leave_a_bit_where_kernels_saturate(self, isa: str, limit: int, tmp_path: Path) -> None:
        where = target("openvino", isa=isa)
        artifact = lower(quantize(matrices(), where), tmp_path, where)
        assert np.abs(integers(artifact, "0.weight").astype(int)).max() == limit

    def test_an_operator_it_does_not_know(self, tmp_path: Path) -> None:
        class Odd(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.linalg.det(x)

        with pytest.raises(TargetError):
            lower(model_of(Odd(), torch.randn(2, 3, 3)), tmp_path)


ALONE = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from featherweight.plugins import find_runtime
from golden import inputs, model, target
artifact = find_runtime('openvino').lower(model('linear3d'), target('openvino'), Path({folder!r}))
find_runtime('openvino').open(artifact, target('openvino'))(inputs('linear3d', 1))
"""


def test_nothing_is_left_in_the_users_home(tmp_path: Path) -> None:
    """Importing openvino as it comes writes an identity there and reports to its vendor."""
    home, folder = tmp_path / "home", tmp_path / "artifact"
    home.mkdir()
    folder.mkdir()
    code = ALONE.format(tests=str(Path(__file__).parents[1]), folder=str(folder))
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "GITHUB_ACTIONS")}
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment | {"HOME": str(home)}, capture_output=True
    )
    assert list(home.iterdir()) == []


class TestLoaders:
    SIGNATURE = Signature((("x", "float32", (1, 3, 16, 16)),), ("y",))

    @pytest.fixture
    def folder(self, lowered: Lowered, tmp_path: Path) -> Path:
        artifact = lowered("openvino", "residual", "int8")
        for file in artifact.files:
            shutil.copy(artifact.folder / file, tmp_path)
        texts = RUNTIME.loaders(
            artifact, target("openvino", options={"CPU_DENORMALS_OPTIMIZATION": True}), self.SIGNATURE
        )
        assert set(texts) == {"load.py", "load.cpp"}
        for name, text in texts.items():
            (tmp_path / name).write_text(text)
        return tmp_path

    def test_python(self, folder: Path) -> None:
        done = subprocess.run(
            [sys.executable, str(folder / "load.py")], cwd="/", capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "(1, 10)"

    @pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
    def test_cpp(self, folder: Path) -> None:
        """Against the headers and libraries that the wheel brings."""
        import openvino as ov

        root = Path(str(ov.__file__)).parent
        (library,) = (root / "libs").glob("libopenvino.so*")
        command = ["g++", "-std=c++17", "-Wall", "-Werror", f"-I{root / 'include'}", "load.cpp", str(library)]
        command += [f"-Wl,-rpath,{root / 'libs'}", "-Wl,--allow-shlib-undefined", "-o", "load"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        ran = subprocess.run([folder / "load"], cwd=folder, capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == "[1,10]"
