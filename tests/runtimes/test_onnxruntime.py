"""ONNX Runtime: what we write becomes its integer kernels, and gives what the simulation says."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import Lowered
from featherweight.data import Data
from featherweight.errors import RecipeError, TargetError
from featherweight.formats import IntQuant, PerChannel, PerGroup
from featherweight.method import Method
from featherweight.methods.cast import Cast
from featherweight.methods.quantize import Quantize
from featherweight.model import Entry, Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Signature, Target
from featherweight.runtimes.onnxruntime import _options
from featherweight.tools.simulate import Replay, project, projected_parameters, simulate
from golden import KINDS, context, data, decibels, folded, inputs, model, model_of, quantized, target
from nets import NETS

ort = pytest.importorskip("onnxruntime", reason="the runtime 'onnxruntime' is not installed")
RUNTIME = find_runtime("onnxruntime")
HERE = target()
KERNELS = {  # float operator -> what it may become
    "conv2d": {"QLinearConv"},
    "linear": {"QGemm", "MatMulIntegerToFloat", "QLinearMatMul"},
}


def optimized(artifact: Artifact, folder: Path) -> Counter[str]:
    """Operators that run, read back from the graph that ONNX Runtime makes of ours."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(artifact.folder / artifact.files[0], options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


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


@cache
def small() -> Model:
    """Two convolutions and a head, enough for what needs no golden net."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
        )
        return model_of(net, torch.randn(16, 3, 8, 8))


@pytest.mark.parametrize("name", NETS)
class TestGoldenNets:
    def test_int8_gives_what_the_simulation_says(self, name: str, lowered: Lowered) -> None:
        x = inputs(name)
        seen = answers(lowered("onnxruntime", name, "int8"), x)
        assert seen.dtype == np.float32
        assert decibels(simulated(quantized(name), x), seen) >= 30

    def test_int8_is_near_the_float_net(self, name: str, lowered: Lowered) -> None:
        x = inputs(name, 16, 3)
        with torch.no_grad():
            wanted = model(name).module(torch.from_numpy(x)).numpy()
        assert decibels(wanted, answers(lowered("onnxruntime", name, "int8"), x)) >= 25

    def test_every_layer_runs_in_integers(self, name: str, lowered: Lowered, tmp_path: Path) -> None:
        seen = optimized(lowered("onnxruntime", name, "int8"), tmp_path)
        calls = Counter(node.op for node in _trace(quantized(name)))
        for op, kernels in KERNELS.items():
            assert sum(seen[kernel] for kernel in kernels) == calls[op], (op, seen)
        assert not {"Conv", "Gemm", "FusedConv", "ConvInteger"} & set(seen)
        assert not {"Relu", "Clip"} & set(seen) or name == "concat"  # there a batch norm stands before it

    def test_weights_are_stored_as_int8_and_biases_as_int32(self, name: str, lowered: Lowered) -> None:
        stored = RUNTIME.stored(lowered("onnxruntime", name, "int8"))
        parameters = quantized(name).parameters
        for weight in (key for key in quantized(name).formats if key in parameters):
            assert stored[weight].dtype == "int8"
            assert stored[weight].bytes == parameters[weight].numel()
        convs = {node.layer for node in _trace(quantized(name)) if node.op == "conv2d"}
        for layer in convs:
            assert f"{layer}.bias" not in parameters or stored[f"{layer}.bias"].dtype == "int32"

    def test_any_batch(self, name: str, lowered: Lowered) -> None:
        artifact = lowered("onnxruntime", name, "int8")
        x = inputs(name, 5)
        rows = np.concatenate([answers(artifact, x[i : i + 1]) for i in range(5)])
        slack = 5e-3 if name == "lstm" else 1e-3  # its kernel takes the range of the whole batch
        np.testing.assert_allclose(answers(artifact, x), rows, rtol=slack, atol=slack)

    def test_float_is_parity(self, name: str, lowered: Lowered) -> None:
        x = inputs(name, 3)
        with torch.no_grad():
            wanted = model(name).module(torch.from_numpy(x)).numpy()
        seen = answers(lowered("onnxruntime", name, "float"), x)
        np.testing.assert_allclose(seen, wanted, rtol=1e-4, atol=1e-5)


def _trace(net: Model) -> Any:
    from featherweight.graph import trace

    return trace(net)


class TestKernels:
    """How operators beside convolution and linear run: the facts that docs/adr/0003 names."""

    @pytest.mark.parametrize(
        ("name", "kernels"),
        [
            ("residual", {"QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QuantizeLinear": 1}),
            ("depthwise", {"QLinearAdd": 2}),
            ("concat", {"QLinearConcat": 3, "QLinearAveragePool": 1, "QLinearGlobalAveragePool": 1}),
            ("shuffle", {"QLinearConcat": 2}),
            ("squeeze_excite", {"QLinearMul": 1, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1}),
            ("attention", {"QLinearAdd": 2}),
        ],
    )
    def test_run_in_integers(
        self, name: str, kernels: dict[str, int], lowered: Lowered, tmp_path: Path
    ) -> None:
        seen = optimized(lowered("onnxruntime", name, "int8"), tmp_path)
        assert {kernel: seen[kernel] for kernel in kernels} == kernels

    def test_a_residual_net_has_nothing_left_in_float(self, lowered: Lowered, tmp_path: Path) -> None:
        seen = optimized(lowered("onnxruntime", "residual", "int8"), tmp_path)
        whole = {"QuantizeLinear", "QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm"}
        assert set(seen) <= {*whole, "Transpose", "Reshape"}

    def test_activations_are_unsigned(self, lowered: Lowered) -> None:
        proto = onnx.load(lowered("onnxruntime", "residual", "int8").folder / "model.onnx")
        constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        points = [
            constants[node.input[2]].data_type
            for node in proto.graph.node
            if node.op_type == "QuantizeLinear"
        ]
        assert set(points) == {onnx.TensorProto.UINT8}

    def test_a_maximum_pooling_stays_between_integers(self, tmp_path: Path) -> None:
        net = model_of(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1)),
            torch.randn(4, 3, 8, 8),
        )
        artifact = lower(quantize(net), tmp_path / "a")
        seen = optimized(artifact, tmp_path)
        assert seen["QLinearConv"] == 2
        assert seen["DequantizeLinear"] == 1
        assert seen["QuantizeLinear"] == 1


class TestFile:
    def test_the_same_model_is_the_same_file(self, lowered: Lowered, tmp_path: Path) -> None:
        """Built, folded, quantized and lowered anew."""
        module, example = NETS["linear3d"]()
        again = model_of(module, example)
        formats = Quantize().apply(again, context(again, data("linear3d"))).formats
        assert lower(again.evolve(formats=formats), tmp_path).sha256 == (
            lowered("onnxruntime", "linear3d", "int8").sha256
        )

    def test_lowering_twice_is_the_same_file(self, lowered: Lowered, tmp_path: Path) -> None:
        artifact = lowered("onnxruntime", "shared", "int8")
        assert lower(quantized("shared"), tmp_path / "b").sha256 == artifact.sha256

    def test_is_a_valid_model(self, lowered: Lowered) -> None:
        for name in ("residual", "attention", "shared"):
            onnx.checker.check_model(
                lowered("onnxruntime", name, "int8").folder / "model.onnx", full_check=True
            )

    def test_is_about_a_quarter(self, tmp_path: Path) -> None:
        net = model_of(
            nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)), torch.randn(2, 32, 8, 8)
        )
        before, after = lower(net, tmp_path / "a"), lower(quantize(net), tmp_path / "b")
        assert after.bytes < 0.28 * before.bytes

    def test_lowering_leaves_the_model_alone(self, tmp_path: Path) -> None:
        net = quantize(small())
        before = {name: tensor.clone() for name, tensor in net.module.state_dict().items()}
        lower(net, tmp_path / "a")
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.module.state_dict().items())

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
        assert artifact.entries == {"forward": "model.onnx", "twice": "model.twice.onnx"}
        session = RUNTIME.open(artifact, HERE)
        for entry, call in (("forward", net.module), ("twice", net.module.twice)):
            (y,) = session(x.numpy(), entry=entry)
            assert decibels(call(x).detach(), y) > 25  # type: ignore[operator]


class TestBiases:
    """Integer kernels hold a bias as int32 at the product of two scales, which may be too small for it."""

    @pytest.mark.parametrize("size", [0.0, 1e-9, 1e-7, 1e-5])
    def test_a_channel_of_next_to_nothing_keeps_its_bias(self, size: float, tmp_path: Path) -> None:
        module = small().copy_module()
        with torch.no_grad():
            for layer, channel, bias in ((0, 2, 3.0), (2, 1, 1.0), (5, 3, -2.0)):
                module[layer].weight[channel] *= size  # type: ignore[index]
                module[layer].bias[channel] = bias  # type: ignore[index]
        net = quantize(small().evolve(module=module))
        artifact = lower(net, tmp_path / "a")
        x = small().entries["forward"].example_inputs[0].numpy()
        assert decibels(simulated(net, x), answers(artifact, x)) > 50
        seen = optimized(artifact, tmp_path)
        assert (seen["QLinearConv"], seen["QGemm"]) == (2, 1)

    def test_a_bias_that_two_calls_share(self, lowered: Lowered) -> None:
        artifact = lowered("onnxruntime", "shared", "int8")
        graph = ir.load(artifact.folder / "model.onnx").graph
        weight = graph.initializers["block.weight"].uses()[0].node.outputs[0]
        calls = [use.node for use in weight.uses() if use.node.op_type == "Conv"]
        held = [node.inputs[2].producer().inputs for node in calls]  # type: ignore[union-attr]
        integers = [bias.const_value.numpy() for bias, _ in held]  # type: ignore[union-attr]
        real = [ints * scale.const_value.numpy() for ints, (_, scale) in zip(integers, held, strict=True)]  # type: ignore[union-attr]
        assert len(calls) == 2
        assert RUNTIME.stored(artifact)["block.bias"].dtype == "int32"
        assert not np.array_equal(*integers)  # each at the scale of its own call's input
        np.testing.assert_allclose(*real, atol=1e-5)  # half a step of each


class TestTarget:
    @pytest.mark.parametrize(("isa", "limit"), [("avx2", 63), ("avx512", 63), ("generic", 63), ("vnni", 127)])
    def test_weights_leave_a_bit_where_kernels_saturate(self, isa: str, limit: int, tmp_path: Path) -> None:
        where = target(isa=isa)
        artifact = lower(quantize(small(), where), tmp_path, where)
        values = {
            value.name: value.const_value.numpy()  # type: ignore[union-attr]
            for value in ir.load(artifact.folder / "model.onnx").graph.initializers.values()
        }
        largest = max(np.abs(values[f"{layer}.weight"].astype(int)).max() for layer in (0, 2, 5))
        assert largest == limit
        x = small().entries["forward"].example_inputs[0].numpy()
        assert decibels(simulated(quantize(small(), where), x), answers(artifact, x)) > 30

    def test_an_unknown_option_is_refused(self, lowered: Lowered) -> None:
        artifact = lowered("onnxruntime", "linear3d", "float")
        with pytest.raises(TargetError, match="no session option 'enable_mem_patern'") as told:
            RUNTIME.open(artifact, target(options={"enable_mem_patern": True}))
        assert told.value.fix == "did you mean 'enable_mem_pattern'?"
        with pytest.raises(TargetError, match="'enable_mem_pattern' cannot be 'yes'"):
            RUNTIME.open(artifact, target(options={"enable_mem_pattern": "yes"}))

    def test_an_option_is_set(self, lowered: Lowered, tmp_path: Path) -> None:
        file = tmp_path / "optimized.onnx"
        where = target(options={"optimized_model_filepath": str(file)})
        RUNTIME.open(lowered("onnxruntime", "linear3d", "float"), where)
        assert file.is_file()


class TestRefusals:
    def test_weights_that_it_has_no_kernels_for(self) -> None:
        asymmetric = IntQuant(-torch.ones(4), torch.ones(4), granularity=PerChannel(0))
        with pytest.raises(TargetError, match="asymmetric weights per channel") as told:
            RUNTIME.realise(asymmetric, HERE, "weight")
        assert told.value.fix is not None
        narrow = IntQuant(torch.tensor(-1.0), torch.tensor(1.0), 4, True)
        with pytest.raises(TargetError, match="cannot store 4 bits"):
            RUNTIME.realise(narrow, HERE, "activation")
        assert not RUNTIME.supports("conv2d", narrow, None, HERE)
        with pytest.raises(TargetError, match="not 3 in"):
            RUNTIME.realise(replace(narrow, width=3), HERE, "weight")
        per_channel = IntQuant(-torch.ones(4), torch.ones(4), 8, True, PerChannel(1))
        with pytest.raises(TargetError, match="activations per channel"):
            RUNTIME.realise(per_channel, HERE, "activation")

    def test_lowering_says_the_same(self, tmp_path: Path) -> None:
        weight = small().parameters["0.weight"].detach().flatten(1)
        fmt = IntQuant(weight.amin(1), weight.amax(1), granularity=PerChannel(0))
        with pytest.raises(TargetError, match="asymmetric weights per channel"):
            lower(small().evolve(formats={"0.weight": (fmt,)}), tmp_path)


class TestFloat:
    def test_an_excluded_layer_is_stored_as_float32(self, tmp_path: Path) -> None:
        net = quantize(small(), where={"exclude": ["2"]})
        stored = RUNTIME.stored(lower(net, tmp_path / "a"))
        kinds = {name: stored[name].dtype for name in ("0.weight", "2.weight", "2.bias", "5.weight")}
        assert kinds == {"0.weight": "int8", "2.weight": "float32", "2.bias": "float32", "5.weight": "int8"}

    @pytest.mark.parametrize("left", [["2"], ["4"], ["7"], ["9"], ["2", "7", "9"]])
    def test_an_excluded_layer_runs_in_float(self, left: list[str], tmp_path: Path) -> None:
        """ONNX Runtime would round the weights of a float layer between integer ones to int8 by itself."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = model_of(
                nn.Sequential(
                    nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.MaxPool2d(2),
                    nn.ConvTranspose2d(4, 4, 2, 2, groups=2, bias=False), nn.Conv2d(4, 4, 1), nn.Flatten(),
                    nn.Linear(144, 9), nn.ReLU(), nn.Linear(9, 6, bias=False), nn.ReLU(), nn.Linear(6, 5),
                ),
                torch.randn(16, 3, 8, 8),
            )  # fmt: skip
        rough = net.copy_module()
        with torch.no_grad():
            for index in (2, 4, 7, 9):  # weights that int8 per tensor would ruin
                rough[index].weight.view(-1)[0] = 60.0  # type: ignore[index]
        done = quantize(net.evolve(module=rough), where={"exclude": left})
        artifact = lower(done, tmp_path / "a")
        x = net.entries["forward"].example_inputs[0].numpy()
        assert decibels(simulated(done, x), answers(artifact, x)) > 40
        floats = {"4", *left}  # there are no integer kernels for a transposed convolution
        seen = optimized(artifact, tmp_path)
        assert seen["QLinearConv"] == len({"0", "2", "5"} - floats)
        assert seen["Gemm"] + seen["FusedGemm"] >= len({"7", "9"} & floats)
        assert seen["Conv"] + seen["FusedConv"] == len({"2"} & floats)
        assert seen["ConvTranspose"] == 1
        stored = RUNTIME.stored(artifact)
        assert {
            index for index in (0, 2, 4, 5, 7, 9, 11) if stored[f"{index}.weight"].dtype == "float32"
        } == {int(index) for index in floats}

    def test_an_excluded_linear_layer_on_three_axes_keeps_its_name(self, tmp_path: Path) -> None:
        net = model("linear3d")
        some = Quantize.model_validate({"where": {"exclude": ["fc1"]}})
        formats = some.apply(net, context(net, data("linear3d"))).formats
        stored = RUNTIME.stored(lower(net.evolve(formats=formats), tmp_path))
        assert stored["fc1.weight"].dtype == "float32"
        assert stored["fc2.weight"].dtype == "int8"

    def test_only_weights_as_integers(self, tmp_path: Path) -> None:
        net = quantize(small(), activations="none")
        artifact = lower(net, tmp_path)
        x = small().entries["forward"].example_inputs[0].numpy()
        assert decibels(simulated(net, x), answers(artifact, x)) > 80
        assert {RUNTIME.stored(artifact)[f"{i}.weight"].dtype for i in (0, 2, 5)} == {"int8"}

    def test_an_output_may_be_integers_inside(self, tmp_path: Path) -> None:
        """A convolution at the end: the session still returns floats under the entry's name."""
        net = model_of(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(4, 3, 6, 6))
        done = quantize(net)
        artifact = lower(done, tmp_path)
        graph = ir.load(artifact.folder / "model.onnx").graph
        assert [value.name for value in graph.outputs] == ["y"]
        x = net.entries["forward"].example_inputs[0].numpy()
        assert decibels(simulated(done, x), answers(artifact, x)) > 30


def test_asymmetric_weights_per_tensor(tmp_path: Path) -> None:
    net = quantize(small(), granularity="per_tensor", symmetric_weights=False)
    artifact = lower(net, tmp_path / "a")
    x = small().entries["forward"].example_inputs[0].numpy()
    assert decibels(simulated(net, x), answers(artifact, x)) > 30
    assert RUNTIME.stored(artifact)["0.weight"].dtype == "uint8"
    assert optimized(artifact, tmp_path)["QLinearConv"] == 2


def test_symmetric_activations(tmp_path: Path) -> None:
    net = quantize(small(), symmetric_activations=True)
    artifact = lower(net, tmp_path / "a")
    x = small().entries["forward"].example_inputs[0].numpy()
    assert decibels(simulated(net, x), answers(artifact, x)) > 30
    assert optimized(artifact, tmp_path)["QLinearConv"] == 2


def test_layers_of_a_length_axis(tmp_path: Path) -> None:
    net = model_of(nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 3)), torch.randn(8, 4, 16))
    done = quantize(net)
    artifact = lower(done, tmp_path / "a")
    x = net.entries["forward"].example_inputs[0].numpy()
    assert decibels(simulated(done, x), answers(artifact, x)) > 30
    assert optimized(artifact, tmp_path)["QLinearConv"] == 2


def test_operators_that_write_in_place(tmp_path: Path) -> None:
    """``ReLU(inplace=True)`` and ``+=``, as most networks have them."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.a(x))
            z = self.b(y)
            z += y
            return self.relu(z)

    net = model_of(Block(), torch.randn(8, 3, 8, 8))
    x = net.entries["forward"].example_inputs[0].numpy()
    done = quantize(net)
    artifact = lower(done, tmp_path / "a")
    assert decibels(simulated(done, x), answers(artifact, x)) > 30
    seen = optimized(artifact, tmp_path)
    assert (seen["QLinearConv"], seen["QLinearAdd"], seen["Relu"]) == (2, 1, 0)


def test_folding_first_changes_only_what_it_should(lowered: Lowered, tmp_path: Path) -> None:
    artifact = lower(folded("concat"), tmp_path)
    x = inputs("concat", 3)
    np.testing.assert_allclose(
        answers(artifact, x), answers(lowered("onnxruntime", "concat", "float"), x), rtol=1e-4, atol=1e-5
    )


class Perceptron(nn.Module):
    """Products with a bias, a ReLU behind one, and inputs that groups do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(100, 64), nn.Linear(64, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@cache
def perceptron() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_of(Perceptron(), torch.randn(4, 100))


class TestWeightsAlone:
    """What is smaller without calibration: blocks of 4 bits that are multiplied as they are, half floats."""

    def lowered(self, method: Method, folder: Path) -> tuple[Model, Artifact]:
        examples = Data.of(x_train=perceptron().entries["forward"].example_inputs[0].numpy())
        changed = method.apply(perceptron(), context(perceptron(), examples))
        return changed, RUNTIME.lower(changed, HERE, folder)

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("group", [16, 32, 64])
    def test_four_bits_in_groups(self, symmetric: bool, group: int, tmp_path: Path) -> None:
        method = Quantize(
            weights="int4",
            activations="none",
            granularity="per_group",
            group=group,
            symmetric_weights=symmetric,
        )
        changed, artifact = self.lowered(method, tmp_path)
        x = np.random.default_rng(0).standard_normal((3, 100)).astype(np.float32)
        (seen,) = RUNTIME.open(artifact, HERE)(x)
        with torch.no_grad():
            (wanted,) = simulate(changed)(torch.from_numpy(x))
        assert decibels(wanted, seen) >= 35  # inputs are rounded to 8 bits per block
        stored = RUNTIME.stored(artifact)
        for name, rows, columns in (("first.weight", 64, 100), ("second.weight", 10, 64)):
            assert stored[name].dtype == "uint4"
            assert stored[name].bytes == rows * -(-columns // group) * group // 2
        ran = {kernel.op for kernel in RUNTIME.kernels(artifact, HERE, (x,))}
        assert "MatMulNBits" in ran
        assert not ran & {"MatMul", "Gemm", "FusedGemm", "DequantizeLinear"}

    def test_the_integers_are_those_of_the_format(self, tmp_path: Path) -> None:
        method = Quantize(weights="int4", activations="none", granularity="per_group", group=32)
        changed, _ = self.lowered(method, tmp_path)
        packed = next(
            numpy_helper.to_array(tensor)
            for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer
            if tensor.name == "first.weight"
        )
        integers = np.stack([packed & 15, packed >> 4], -1).reshape(64, -1)[:, :100].astype(int) - 8
        fmt = changed.formats["first.weight"][0]
        assert isinstance(fmt, IntQuant)
        assert np.array_equal(integers, fmt.quantize(perceptron().parameters["first.weight"]).numpy())

    @pytest.mark.parametrize("group", [8, 24])
    def test_other_groups_are_refused(self, group: int, tmp_path: Path) -> None:
        method = Quantize(weights="int4", activations="none", granularity="per_group", group=group)
        with pytest.raises(RecipeError, match="no layer that onnxruntime takes as asked"):
            self.lowered(method, tmp_path)
        one = torch.ones(2, 2)
        with pytest.raises(TargetError, match=f"in groups of 16, 32, 64..., not 4 in {group}"):
            RUNTIME.realise(IntQuant(-one, one, 4, True, PerGroup(1, group)), HERE, "weight")

    def test_half_floats(self, tmp_path: Path) -> None:
        changed, artifact = self.lowered(Cast(), tmp_path)
        stored = RUNTIME.stored(artifact)
        assert stored["first.weight"].dtype == "float16"
        assert stored["first.weight"].bytes == 2 * 6400
        assert stored["first.bias"].dtype == "float32"
        x = np.random.default_rng(0).standard_normal((3, 100)).astype(np.float32)
        with torch.no_grad():
            (wanted,) = simulate(changed)(torch.from_numpy(x))
        assert decibels(wanted, RUNTIME.open(artifact, HERE)(x)[0]) > 100
        assert decibels(perceptron().module(torch.from_numpy(x)).detach(), wanted) < 90

    def test_bfloat16_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="no weight that onnxruntime stores as bfloat16"):
            self.lowered(Cast(weights="bfloat16"), tmp_path)


class TestLook:
    """Values inside and kernels are those of the file."""

    @pytest.mark.parametrize("kind", ["float", "int8"])
    @pytest.mark.parametrize("net", ["residual", "attention", "depthwise"])
    def test_values_are_the_simulations(self, net: str, kind: str, lowered: Lowered) -> None:
        changed = KINDS[kind](net, "onnxruntime")
        x = inputs(net, 1)
        seen = RUNTIME.values(lowered("onnxruntime", net, kind), HERE, (x,))
        wanted: dict[str, torch.Tensor] = {}

        def observe(name: str, value: torch.Tensor) -> torch.Tensor:
            wanted[name] = project(value, changed.formats.get(name, ()))
            return wanted[name]

        with torch.no_grad():
            Replay(changed, parameters=projected_parameters(changed))((torch.from_numpy(x),), observe)
        floats = [name for name in seen if wanted[name].dtype == torch.float32]
        assert len(floats) >= 12
        for name in floats:
            assert decibels(wanted[name], seen[name]) > 40, name

    def test_what_is_not_fused_is_told(self, lowered: Lowered) -> None:
        told = RUNTIME.kernels(lowered("onnxruntime", "residual", "int8"), HERE, (inputs("residual", 1),))
        by_op = {kernel.op: kernel for kernel in told}
        assert by_op["QLinearConv"].dtype == "int8"
        assert by_op["QLinearConv"].fast
        assert not by_op["QuantizeLinear"].fast
        assert by_op["QuantizeLinear"].note

    def test_options_that_are_tried_are_options(self) -> None:
        for threads in (1, 2):
            where = replace(HERE, threads=threads)
            sets = RUNTIME.tunings(where)
            assert all(set(one) for one in sets)
            assert sum("intra_op_num_threads" in one for one in sets) == threads - 1
            for one in sets:
                _options(replace(where, options=one))


class TestLoaders:
    SIGNATURE = Signature((("x", "float32", (1, 3, 8, 8)), ("ids", "int64", (1, 4))), ("y", "z"))

    @pytest.fixture
    def texts(self, lowered: Lowered) -> Mapping[str, str]:
        where = target(options={"enable_mem_pattern": False, "graph_optimization_level": "ORT_ENABLE_BASIC"})
        return RUNTIME.loaders(lowered("onnxruntime", "residual", "int8"), where, self.SIGNATURE)

    def test_there_is_one_for_each_language(self, texts: Mapping[str, str]) -> None:
        assert set(texts) == {"load.py", "load.cpp", "Load.java"}
        compile(texts["load.py"], "load.py", "exec")
        for text in texts.values():
            assert "model.onnx" in text

    def test_cpp_is_correct(self, texts: Mapping[str, str], tmp_path: Path) -> None:
        """Against declarations of the part of the API that it uses, since the wheel ships no headers."""
        (tmp_path / "onnxruntime_cxx_api.h").write_text(CXX_API)
        (tmp_path / "load.cpp").write_text(texts["load.cpp"])
        command = ["g++", "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", "-I", str(tmp_path), "load.cpp"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "DisableMemPattern" in texts["load.cpp"]
        assert "SetGraphOptimizationLevel(ORT_ENABLE_BASIC)" in texts["load.cpp"]

    def test_java_is_correct(self, texts: Mapping[str, str], tmp_path: Path) -> None:
        for name, body in JAVA_API.items():
            file = tmp_path / "ai" / "onnxruntime" / f"{name}.java"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"package ai.onnxruntime;\n{body}\n")
        (tmp_path / "Load.java").write_text(texts["Load.java"])
        assert "setMemoryPatternOptimization(false)" in texts["Load.java"]
        assert "OptLevel.BASIC_OPT" in texts["Load.java"]
        declared = map(str, tmp_path.rglob("ai/**/*.java"))
        command = ["javac", "-d", str(tmp_path / "classes"), "Load.java", *declared]
        if shutil.which("javac") is None:
            pytest.skip("there is no Java compiler")
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


CXX_API = """
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>
enum OrtLoggingLevel { ORT_LOGGING_LEVEL_WARNING };
enum OrtAllocatorType { OrtArenaAllocator };
enum OrtMemType { OrtMemTypeDefault };
enum GraphOptimizationLevel { ORT_DISABLE_ALL, ORT_ENABLE_BASIC, ORT_ENABLE_EXTENDED };
namespace Ort {
struct Env { Env(OrtLoggingLevel, const char*) {} };
struct SessionOptions {
  void SetIntraOpNumThreads(int) {}
  void DisableMemPattern() {}
  void DisableCpuMemArena() {}
  void SetGraphOptimizationLevel(GraphOptimizationLevel) {}
};
struct MemoryInfo { static MemoryInfo CreateCpu(OrtAllocatorType, OrtMemType); };
struct Info { std::size_t GetElementCount(); };
struct Value {
  Info GetTensorTypeAndShapeInfo();
  template <typename T>
  static Value CreateTensor(const MemoryInfo&, T*, std::size_t, const int64_t*, std::size_t);
};
struct RunOptions {};
struct Session {
  Session(Env&, const char*, const SessionOptions&) {}
  std::vector<Value> Run(const RunOptions&, const char* const*, const Value*, std::size_t,
                         const char* const*, std::size_t);
};
}
"""
JAVA_API = {
    "OnnxTensor": """public class OnnxTensor {
  public static OnnxTensor createTensor(OrtEnvironment e, java.nio.FloatBuffer b, long[] s) { return null; }
  public static OnnxTensor createTensor(OrtEnvironment e, java.nio.LongBuffer b, long[] s) { return null; }
  public Object getInfo() { return null; } }""",
    "OrtEnvironment": """public class OrtEnvironment {
  public static OrtEnvironment getEnvironment() { return null; }
  public OrtSession createSession(String f, OrtSession.SessionOptions o) { return null; } }""",
    "OrtSession": """public class OrtSession {
  public static class SessionOptions {
    public enum OptLevel { BASIC_OPT }
    public void setIntraOpNumThreads(int n) {}
    public void setMemoryPatternOptimization(boolean b) {}
    public void setOptimizationLevel(OptLevel l) {} }
  public static class Result { public OnnxTensor get(int i) { return null; } }
  public Result run(java.util.Map<String, OnnxTensor> m) { return null; } }""",
}


class Padded(nn.Module):
    """Zeros around an image by layers of their own, as networks that came from TensorFlow have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2, padding=(1, 0), groups=8)
        self.third = nn.Conv2d(8, 4, 1)
        self.pad = nn.ZeroPad2d((0, 1, 2, 1))
        self.ones = nn.ConstantPad2d(1, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.ones(F.relu6(self.second(self.pad(F.relu6(self.first(x)))))))


def test_zeros_around_an_image_become_the_convolutions_own(tmp_path: Path) -> None:
    net = model_of(Padded(), torch.randn(4, 3, 14, 14))
    x = np.random.default_rng(0).standard_normal((2, 3, 14, 14)).astype(np.float32)
    changed = Quantize().apply(net, context(net, Data.of(x_train=x)))
    assert changed.formats["pad#0:0"] == changed.formats["/relu6#0:0"]  # zeros are on every grid
    assert changed.formats["ones#0:0"] != changed.formats["/relu6#1:0"]  # ones are not
    artifact = RUNTIME.lower(changed, HERE, tmp_path)
    nodes = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert nodes["Pad"] == 1  # the ones
    with torch.no_grad():
        (wanted,) = simulate(changed)(torch.from_numpy(x))
    assert decibels(wanted, RUNTIME.open(artifact, HERE)(x)[0]) >= 40
    ran = optimized(artifact, tmp_path)
    assert ran["QLinearConv"] == 3
