"""LiteRT: what is stored in its flatbuffer, which kernels run, and that it gives what the simulation says."""

from __future__ import annotations

import copy
import json
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
from torch.nn import functional as F

from conftest import Lowered
from featherweight.data import Data
from featherweight.errors import TargetError
from featherweight.formats import FloatCast, IntQuant, PerChannel, PerGroup
from featherweight.methods.cast import Cast
from featherweight.methods.quantize import Quantize
from featherweight.model import Entry, Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Kernel, Signature, Target
from featherweight.tools.simulate import Replay, project, projected_parameters, simulate
from golden import context, decibels, inputs, model, model_of, quantized, target
from nets import NETS

pytest.importorskip("ai_edge_litert", reason="the runtime 'litert' is not installed")
pytest.importorskip("litert_torch", reason="the converter of the runtime 'litert' is not installed")
RUNTIME = find_runtime("litert")
HERE = target("litert")
LAYOUTS = {"CONV_2D": (0, 2, 3, 1), "DEPTHWISE_CONV_2D": (1, 2, 3, 0), "FULLY_CONNECTED": (0, 1)}
IN_FLOAT = {  # operators of the golden nets that have no fast kernels for integers
    *("SUB", "MUL", "ADD", "MEAN", "SQUARED_DIFFERENCE", "RSQRT", "BATCH_MATMUL", "SOFTMAX", "GELU"),
    *("HARD_SWISH", "AVERAGE_POOL_2D", "RESHAPE", "TRANSPOSE", "DEQUANTIZE", "SLICE", "LOGISTIC", "TANH"),
}


def flat(artifact: Artifact) -> Any:
    from featherweight.runtimes._litert_graph import FlatGraph

    return FlatGraph.read(artifact.folder / artifact.files[0])


def lower(net: Model, folder: Path, where: Target = HERE) -> Artifact:
    folder.mkdir(exist_ok=True)
    return RUNTIME.lower(net, where, folder)


def examples(net: Model) -> np.ndarray:
    return net.entries["forward"].example_inputs[0].numpy()


def quantize(net: Model, on: Target = HERE, **parameters: Any) -> Model:
    return Quantize.model_validate(parameters).apply(net, context(net, Data.of(x_train=examples(net)), on))


def answers(artifact: Artifact, x: np.ndarray, where: Target = HERE) -> np.ndarray:
    (y,) = RUNTIME.open(artifact, where)(x)
    return y


def simulated(net: Model, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        (y,) = simulate(net)(torch.from_numpy(x))
    return y.numpy()


def slow(kernels: Any) -> list[Kernel]:
    return [kernel for kernel in kernels if not kernel.fast]


@cache
def matrices() -> Model:
    """Three linear layers, wide enough for groups."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 48), nn.LayerNorm(48), nn.Linear(48, 8)
        )
        return model_of(net, torch.randn(16, 96))


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
        seen = answers(lowered("litert", name, "int8"), x)
        assert seen.dtype == np.float32
        assert decibels(simulated(quantized(name, "litert"), x), seen) >= 35

    def test_the_integers_are_ours(self, name: str, lowered: Lowered) -> None:
        graph, net = flat(lowered("litert", name, "int8")), quantized(name, "litert")
        constants = {
            graph.name(i): (graph.kind(op), i) for op in graph.operators for i in map(int, op.inputs)
        }
        checked = 0
        for key, fmts in net.formats.items():
            if key not in net.parameters:
                continue
            kind, tensor = constants[key]
            fmt: Any = fmts[-1]
            wanted = fmt.quantize(net.parameters[key]).permute(LAYOUTS[kind]).numpy()
            assert graph.dtype(tensor) == "int8"
            np.testing.assert_array_equal(graph.constant(tensor), wanted)
            np.testing.assert_array_equal(graph.grid(tensor).scale, fmt.grid()[0].numpy())
            checked += 1
        assert checked

    def test_xnnpack_takes_every_operator(self, name: str, lowered: Lowered) -> None:
        kernels = RUNTIME.kernels(lowered("litert", name, "int8"), HERE, [inputs(name, 2)])
        assert kernels
        left = Counter(kernel.op for kernel in slow(kernels))
        assert left == ({"CONCATENATION": 2} if name == "lstm" else {})  # of seven tensors
        floats = {kernel.op for kernel in kernels if kernel.dtype != "int8"}
        assert floats <= IN_FLOAT | ({"FULLY_CONNECTED", "CONCATENATION"} if name == "lstm" else set())

    def test_values_are_those_of_the_simulation(self, name: str, lowered: Lowered) -> None:
        net, x = quantized(name, "litert"), inputs(name, 2)
        seen = RUNTIME.values(lowered("litert", name, "int8"), HERE, [x])
        wanted: dict[str, np.ndarray] = {}

        def observe(value: str, tensor: Tensor) -> Tensor:
            rounded = project(tensor, net.formats.get(value, ()))
            wanted[value] = rounded.numpy()
            return rounded

        with torch.no_grad():
            Replay(net, "forward", projected_parameters(net))((torch.from_numpy(x),), observe)
        activations = {value for value in net.formats if value in wanted}
        assert activations <= set(seen)
        for value, array in seen.items():
            if wanted[value].shape[0] == 2:
                assert array.shape == wanted[value].shape
                assert decibels(wanted[value], array) > 30, value


class TestStorage:
    def test_biases_are_int32(self, lowered: Lowered) -> None:
        stored = RUNTIME.stored(lowered("litert", "residual", "int8"))
        assert stored["head.bias"].dtype == "int32"
        assert stored["stem.0.bias"].bytes == 4 * 8

    def test_lowering_twice_is_the_same_file(self, lowered: Lowered, tmp_path: Path) -> None:
        artifact = lowered("litert", "residual", "int8")
        assert lower(quantized("residual", "litert"), tmp_path / "b").sha256 == artifact.sha256

    def test_no_names_of_the_exporter_are_left(self, lowered: Lowered) -> None:
        text = (lowered("litert", "residual", "float").folder / "model.tflite").read_bytes()
        assert b"torch.nn" not in text
        assert b"layer1.bn2#0:0" in text

    @pytest.mark.parametrize("size", [0.0, 1e-9, 1e-5])
    def test_a_channel_of_next_to_nothing_keeps_its_bias(self, size: float, tmp_path: Path) -> None:
        module = small().copy_module()
        with torch.no_grad():
            for layer, channel, bias in ((0, 2, 3.0), (2, 1, 1.0), (5, 3, -2.0)):
                module[layer].weight[channel] *= size  # type: ignore[index]
                module[layer].bias[channel] = bias  # type: ignore[index]
        net = quantize(small().evolve(module=module))
        artifact = lower(net, tmp_path)
        assert decibels(simulated(net, examples(net)), answers(artifact, examples(net))) > 40
        assert not slow(RUNTIME.kernels(artifact, HERE, [examples(net)]))

    def test_a_batch_norm_that_was_not_folded_stays_beside(self, tmp_path: Path) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = model_of(
                nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)),
                torch.randn(8, 3, 8, 8),
            )
        done = quantize(net)
        artifact = lower(done, tmp_path)
        assert RUNTIME.stored(artifact)["0.weight"].dtype == "int8"
        assert decibels(simulated(done, examples(net)), answers(artifact, examples(net))) > 35

    def test_layers_that_are_copies_of_each_other(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 4, 3, padding=1)
        net = model_of(
            nn.Sequential(layer, nn.ReLU(), copy.deepcopy(layer), nn.ReLU(), copy.deepcopy(layer)),
            torch.randn(8, 4, 6, 6),
        )
        done = quantize(net)
        artifact = lower(done, tmp_path)
        stored = RUNTIME.stored(artifact)
        assert {stored[f"{i}.weight"].dtype for i in (0, 2, 4)} == {"int8"}
        assert decibels(simulated(done, examples(net)), answers(artifact, examples(net))) > 35

    def test_an_excluded_layer_stays_float(self, tmp_path: Path) -> None:
        net = quantize(small(), where={"exclude": ["2"]})
        artifact = lower(net, tmp_path)
        stored = RUNTIME.stored(artifact)
        kinds = {name: stored[name].dtype for name in ("0.weight", "2.weight", "2.bias", "5.weight")}
        assert kinds == {"0.weight": "int8", "2.weight": "float32", "2.bias": "float32", "5.weight": "int8"}
        assert decibels(simulated(net, examples(net)), answers(artifact, examples(net))) > 40


class TestWeightsAlone:
    def test_int8_is_restored_exactly(self, tmp_path: Path) -> None:
        net = quantize(small(), activations="none")
        artifact = lower(net, tmp_path)
        assert {RUNTIME.stored(artifact)[f"{i}.weight"].dtype for i in (0, 2, 5)} == {"int8"}
        assert decibels(simulated(net, examples(net)), answers(artifact, examples(net))) > 80

    def test_float16(self, tmp_path: Path) -> None:
        net = Cast().apply(small(), context(small(), Data.of(x_train=examples(small())), HERE))
        artifact = lower(net, tmp_path)
        stored = RUNTIME.stored(artifact)
        assert {stored[f"{i}.weight"].dtype for i in (0, 2, 5)} == {"float16"}
        assert stored["5.weight"].bytes == 2 * 5 * 144
        assert decibels(simulated(net, examples(net)), answers(artifact, examples(net))) > 80

    @pytest.mark.parametrize(
        ("parameters", "dtype", "at_least"),
        [
            ({}, "int8", 35),
            ({"weights": "int4"}, "int4", 35),
            ({"weights": "int4", "granularity": "per_group", "group": 32}, "int4", 35),
        ],
    )
    def test_matrices_of_integers_are_multiplied_as_they_are(
        self, parameters: dict[str, Any], dtype: str, at_least: float, tmp_path: Path
    ) -> None:
        where = target("litert", options={"dynamic": True})
        done = quantize(matrices(), where, activations="none", where={"exclude": ["4"]}, **parameters)
        artifact = lower(done, tmp_path, where)
        stored = RUNTIME.stored(artifact)
        assert {stored[name].dtype for name in ("0.weight", "2.weight")} == {dtype}
        assert stored["0.weight"].bytes == 96 * 64 // (1 if dtype == "int8" else 2)
        x = examples(done)
        assert decibels(simulated(done, x), answers(artifact, x, where)) > at_least
        kernels = RUNTIME.kernels(artifact, where, [x])
        assert not slow(kernels)
        assert "DEQUANTIZE" not in {kernel.op for kernel in kernels}

    def test_groups_are_stored_as_asked(self, tmp_path: Path) -> None:
        done = quantize(
            matrices(), activations="none", weights="int4", granularity="per_group", where={"include": ["0"]}
        )
        graph = flat(lower(done, tmp_path))
        read = {int(index) for operator in graph.operators for index in operator.inputs}
        (tensor,) = [index for index in read if graph.name(index) == "0.weight"]
        packed = np.frombuffer(graph.model.buffers[graph.graph.tensors[tensor].buffer].data, np.uint8)
        pairs = np.stack([packed & 15, packed >> 4], 1).reshape(64, 96).astype(np.int8)
        fmt: Any = done.formats["0.weight"][-1]
        wanted = fmt.quantize(done.parameters["0.weight"]).numpy()
        np.testing.assert_array_equal(np.where(pairs > 7, pairs - 16, pairs), wanted)
        scales = graph.constant(graph.scales_of(tensor))
        np.testing.assert_allclose(scales, fmt.grid()[0].numpy(), rtol=2**-11)

    def test_groups_that_do_not_fill_a_row_are_refused(self, tmp_path: Path) -> None:
        done = quantize(matrices(), activations="none", weights="int4", granularity="per_group", group=64)
        with pytest.raises(TargetError, match=r"'0.weight' in groups of 64: its rows have 96") as told:
            lower(done, tmp_path)
        assert "exclude '0'" in str(told.value.fix)


class TestOperators:
    """Shapes of graphs that the golden nets do not have."""

    def run(self, net: nn.Module, x: Tensor, folder: Path) -> tuple[float, list[Kernel]]:
        done = quantize(model_of(net, x))
        artifact = lower(done, folder)
        kernels = list(RUNTIME.kernels(artifact, HERE, [x.numpy()]))
        return decibels(simulated(done, x.numpy()), answers(artifact, x.numpy())), kernels

    def test_a_padded_maximum(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 4, 1))
        close, kernels = self.run(net, torch.randn(8, 3, 9, 9), tmp_path)
        assert close > 35
        assert not slow(kernels)

    def test_a_padded_maximum_of_negative_values(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 8, 3)
        nn.init.constant_(conv.bias, -5.0)  # type: ignore[arg-type]
        net = nn.Sequential(conv, nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 4, 1))
        close, _ = self.run(net, torch.randn(8, 3, 9, 9), tmp_path)
        assert close > 35

    def test_a_relu_behind_a_pool(self, tmp_path: Path) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

            def forward(self, x: Tensor) -> Tensor:
                y = F.max_pool2d(self.a(x), 2)
                return self.b(F.relu(y) + torch.tanh(y))

        torch.manual_seed(0)
        close, kernels = self.run(Net(), torch.randn(8, 3, 10, 10), tmp_path)
        assert close > 35
        assert not slow(kernels)

    def test_silu_is_one_of_integers(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1))
        close, kernels = self.run(net, torch.randn(8, 3, 8, 8), tmp_path)
        assert close > 35
        assert {kernel.op for kernel in kernels if kernel.dtype != "int8"} == {"DEQUANTIZE"}

    def test_convolutions_over_time_groups_and_upwards(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        line = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 3))
        close, kernels = self.run(line, torch.randn(8, 4, 16), tmp_path / "a")
        assert close > 35
        assert not slow(kernels)
        up = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2))
        close, kernels = self.run(up, torch.randn(8, 4, 8, 8), tmp_path / "b")
        assert close > 35
        assert not slow(kernels)

    def test_whole_numbers_in_and_out(self, tmp_path: Path) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 5)

            def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
                y = self.head(self.table(ids).mean(1))
                return y, y.argmax(1)

        torch.manual_seed(0)
        ids = torch.randint(0, 11, (4, 6))
        net = model_of(Net(), ids, outputs=2)
        y, best = RUNTIME.open(lower(net, tmp_path), HERE)(ids.numpy())
        assert (y.dtype, best.dtype) == (np.float32, np.int64)
        with torch.no_grad():
            wanted = net.module(ids)
        np.testing.assert_allclose(y, wanted[0].numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(best, wanted[1].numpy())


class TestSession:
    @pytest.mark.parametrize("name", ["residual", "attention"])
    def test_any_batch(self, name: str, lowered: Lowered) -> None:
        artifact = lowered("litert", name, "int8")
        assert artifact.details["entries"]["forward"]["batches"] is (name == "residual")
        session, x = RUNTIME.open(artifact, HERE), inputs(name, 5)
        rows = np.concatenate([session(x[i : i + 1])[0] for i in range(5)])
        np.testing.assert_allclose(session(x)[0], rows, rtol=1e-3, atol=1e-3)

    def test_another_shape_is_refused(self, lowered: Lowered) -> None:
        session = RUNTIME.open(lowered("litert", "residual", "float"), HERE)
        with pytest.raises(TargetError, match=r"input 0 of shape \(1, 3, 16, 16\), not \(1, 3, 8, 8\)"):
            session(np.zeros((1, 3, 8, 8), np.float32))

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
        assert artifact.entries == {"forward": "model.tflite", "twice": "model.twice.tflite"}
        session = RUNTIME.open(artifact, HERE)
        for entry, call in (("forward", net.module), ("twice", net.module.twice)):
            (y,) = session(x.numpy(), entry=entry)
            assert decibels(call(x).detach(), y) > 25  # type: ignore[operator]

    def test_nested_inputs_and_outputs_are_flat(self, tmp_path: Path) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.left, self.right = nn.Linear(6, 4), nn.Linear(5, 4)

            def forward(self, pair: tuple[Tensor, Tensor]) -> dict[str, Any]:
                y = self.left(pair[0]) + self.right(pair[1])
                return {"sum": y, "both": [y * 2, pair[0]]}

        torch.manual_seed(0)
        one, two = torch.randn(3, 6), torch.randn(3, 5)
        tree = torch.utils._pytree.tree_structure(((one, two),))
        axes = {"a": {0: "n"}, "b": {0: "n"}}
        entry = Entry((one, two), ("a", "b"), ("both0", "both1", "sum"), axes, "forward", tree)
        net = Model(Net().eval(), {"forward": entry}, key="nested")
        with torch.no_grad():
            wanted = torch.utils._pytree.tree_leaves(net.module((one, two)))
        seen = RUNTIME.open(lower(net, tmp_path), HERE)(one.numpy(), two.numpy())
        for left, right in zip(seen, wanted, strict=True):
            np.testing.assert_allclose(left, right.numpy(), rtol=1e-4, atol=1e-5)

    def test_options(self, lowered: Lowered) -> None:
        artifact = lowered("litert", "linear3d", "float")
        with pytest.raises(TargetError, match="no option 'resolvr'") as told:
            RUNTIME.open(artifact, target("litert", options={"resolvr": "AUTO"}))
        assert told.value.fix == "did you mean 'resolver'?"
        with pytest.raises(TargetError, match="'resolver' cannot be 'FAST'"):
            RUNTIME.open(artifact, target("litert", options={"resolver": "FAST"}))
        where = target("litert", options={"resolver": "BUILTIN_WITHOUT_DEFAULT_DELEGATES"})
        kernels = RUNTIME.kernels(artifact, where, [inputs("linear3d", 1)])
        assert all(not kernel.fast and kernel.note for kernel in kernels)

    def test_fewer_threads_are_worth_a_look(self) -> None:
        assert RUNTIME.tunings(HERE) == []
        assert RUNTIME.tunings(Target("litert", threads=3)) == [{"threads": 1}, {"threads": 2}]

    def test_the_session_needs_no_torch(self, lowered: Lowered) -> None:
        artifact = lowered("litert", "linear3d", "float")
        subprocess.run(
            [sys.executable, "-c", ALONE, json.dumps(artifact.to_json()), str(artifact.folder)],
            check=True,
            capture_output=True,
        )


ALONE = """
import json, sys
from pathlib import Path
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Target
artifact = Artifact.from_json(json.loads(sys.argv[1]), Path(sys.argv[2]))
runtime = find_runtime('litert')
runtime.open(artifact, Target('litert'))
runtime.stored(artifact)
assert not {'torch', 'litert_torch', 'tensorflow'} & set(sys.modules)
"""


class TestLoaders:
    def test_python_runs(self, lowered: Lowered, tmp_path: Path) -> None:
        artifact = lowered("litert", "residual", "int8")
        signature = Signature((("x", "float32", (1, 3, 16, 16)),), ("y",))
        texts = RUNTIME.loaders(artifact, HERE, signature)
        assert set(texts) == {"load.py", "load.cpp", "Load.kt", "load.swift"}
        (tmp_path / "model.tflite").write_bytes((artifact.folder / "model.tflite").read_bytes())
        (tmp_path / "load.py").write_text(texts["load.py"])
        done = subprocess.run(
            [sys.executable, str(tmp_path / "load.py")], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "y (1, 10)"

    def test_options_and_threads_are_in_them(self, lowered: Lowered) -> None:
        where = Target("litert", threads=3, options={"resolver": "BUILTIN_REF", "threads": 2})
        signature = Signature((("x", "float32", (1, 9, 12)),), ("y",))
        texts = RUNTIME.loaders(lowered("litert", "linear3d", "float"), where, signature)
        assert "num_threads=2, experimental_op_resolver_type=OpResolverType.BUILTIN_REF" in texts["load.py"]
        assert "setNumThreads(2)" in texts["Load.kt"]
        assert "threadCount = 2" in texts["load.swift"]
        assert "(&interpreter, 2)" in texts["load.cpp"]
        assert f"{4 * 9 * 12}" in texts["Load.kt"]


class TestRefusals:
    def test_formats_that_it_has_no_kernels_for(self) -> None:
        one = torch.ones(4)
        for fmt, words in (
            (IntQuant(-one, one, 8, False, PerChannel(0)), "asymmetric weights"),
            (IntQuant(-one[:, None], one[:, None], 8, True, PerGroup(1, 32)), "8-bit integers per group"),
            (
                IntQuant(-one[:, None], one[:, None], 4, True, PerGroup(1, 16)),
                "4-bit integers per group of 16",
            ),
            (IntQuant(-one, one, 16, True, PerChannel(0)), "16-bit integers"),
            (FloatCast("bfloat16"), "bfloat16"),
        ):
            with pytest.raises(TargetError, match=words) as told:
                RUNTIME.realise(fmt, HERE, "weight")
            assert told.value.fix is not None
            assert not RUNTIME.supports("linear", fmt, None, HERE)

    def test_four_bits_are_for_matrices_alone(self) -> None:
        four = IntQuant(-torch.ones(4), torch.ones(4), 4, True, PerChannel(0))
        eight = IntQuant(torch.tensor(-1.0), torch.tensor(1.0))
        assert RUNTIME.supports("linear", four, None, HERE)
        assert not RUNTIME.supports("conv2d", four, None, HERE)
        assert not RUNTIME.supports("linear", four, eight, HERE)

    def test_a_weight_that_is_stored_otherwise_is_told(self, tmp_path: Path) -> None:
        four = IntQuant(-torch.ones(8), torch.ones(8), 4, True, PerChannel(0))
        with pytest.raises(TargetError, match=r"cannot store '0\.weight' in its format"):
            lower(small().evolve(formats={"0.weight": (four,)}), tmp_path)


def test_operators_without_integer_kernels_are_not_claimed() -> None:
    eight = IntQuant(torch.tensor(-1.0), torch.tensor(1.0))
    for op in ("matmul", "softmax", "avg_pool2d", "hardswish", "layer_norm"):
        assert not RUNTIME.supports(op, None, eight, HERE)
    assert RUNTIME.supports("cat", None, eight, HERE)


def test_float_weights_keep_their_names(lowered: Lowered) -> None:
    stored = RUNTIME.stored(lowered("litert", "residual", "float"))
    wanted = {name for name, value in model("residual").parameters.items() if value.dim() > 1}
    assert wanted <= set(stored)  # though batch norms were folded into them
