"""ExecuTorch: what we write is delegated to XNNPACK, stored as asked, and gives what the simulation says."""

from __future__ import annotations

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
from featherweight.formats import FloatCast, IntQuant, PerChannel, PerGroup, PerTensor
from featherweight.methods.quantize import Quantize
from featherweight.model import Entry, Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Kernel, Signature, Target
from featherweight.tools.simulate import simulate
from golden import context, data, decibels, inputs, model, model_of, quantized, target
from nets import NETS

pytest.importorskip("executorch", reason="the runtime 'executorch' is not installed")
RUNTIME = find_runtime("executorch")
HERE = target("executorch")
LAYERS = {"Conv2d", "DepthwiseConv2d", "FullyConnected"}
PLAIN = {  # what XNNPACK does not take, and why it cannot
    "attention": {"native_layer_norm", "mean"},
    "linear3d": {"native_layer_norm", "mean"},
    "lstm": {"full"},
}


def lower(net: Model, folder: Path) -> Artifact:
    folder.mkdir(exist_ok=True)
    return RUNTIME.lower(net, HERE, folder)


def quantize(net: Model, **parameters: Any) -> Model:
    examples = Data.of(x_train=net.entries["forward"].example_inputs[0].numpy())
    return Quantize.model_validate(parameters).apply(net, context(net, examples, HERE))


def answers(artifact: Artifact, x: np.ndarray, where: Target = HERE) -> np.ndarray:
    (y,) = RUNTIME.open(artifact, where)(x)
    return y


def simulated(net: Model, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        (y,) = simulate(net)(torch.from_numpy(x))
    return y.numpy()


def kernels(artifact: Artifact) -> list[Kernel]:
    return list(RUNTIME.kernels(artifact, HERE, []))


LOADED = """
import json, sys
from pathlib import Path
import numpy as np
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Target
artifact = Artifact.from_json(json.loads({artifact!r}), Path({folder!r}))
find_runtime('executorch').open(artifact, Target('executorch'))(np.zeros((1, 9, 12), 'f4'))
print([name for name in ('executorch.exir', 'torchao') if name in sys.modules])
"""


@cache
def small() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
        )
        return model_of(net, torch.randn(16, 3, 8, 8))


@cache
def perceptron() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(72, 96), nn.GELU(), nn.Linear(96, 10))
        return model_of(net, torch.randn(32, 72))


@pytest.mark.parametrize("name", NETS)
class TestGoldenNets:
    def test_int8_gives_what_the_simulation_says(self, name: str, lowered: Lowered) -> None:
        x = inputs(name, 8)
        seen = answers(lowered("executorch", name, "int8"), x)
        assert seen.dtype == np.float32
        assert decibels(simulated(quantized(name, "executorch"), x), seen) >= 30

    def test_all_is_delegated_but_what_xnnpack_has_not(self, name: str, lowered: Lowered) -> None:
        for kind in ("float", "int8"):
            plain = {kernel.op for kernel in kernels(lowered("executorch", name, kind)) if not kernel.fast}
            assert plain == PLAIN.get(name, set())

    def test_layers_with_formats_run_in_integers(self, name: str, lowered: Lowered) -> None:
        net = quantized(name, "executorch")
        seen = [kernel for kernel in kernels(lowered("executorch", name, "int8")) if kernel.op in LAYERS]
        floats = sum(kernel.dtype == "float32" for kernel in seen)
        recurrent = {"lstm": 16, "concat": 4}  # products with states; batch norms in front of convolutions
        assert floats == recurrent.get(name, 0)
        assert len(seen) > floats
        assert any(key in net.formats for key in net.parameters)

    def test_weights_are_stored_as_int8(self, name: str, lowered: Lowered) -> None:
        net = quantized(name, "executorch")
        stored = RUNTIME.stored(lowered("executorch", name, "int8"))
        for weight in (key for key in net.formats if key in net.parameters):
            assert (stored[weight].dtype, stored[weight].bytes) == ("int8", net.parameters[weight].numel())


class TestFile:
    def test_lowering_twice_is_the_same_file(self, lowered: Lowered, tmp_path: Path) -> None:
        artifact = lowered("executorch", "shared", "int8")
        assert lower(quantized("shared", "executorch"), tmp_path).sha256 == artifact.sha256

    def test_it_is_about_a_quarter(self, tmp_path: Path) -> None:
        net = model_of(
            nn.Sequential(nn.Conv2d(32, 96, 3), nn.ReLU(), nn.Conv2d(96, 96, 3)), torch.randn(2, 32, 8, 8)
        )
        assert lower(quantize(net), tmp_path / "b").bytes < 0.3 * lower(net, tmp_path / "a").bytes

    def test_every_parameter_is_found_again(self, lowered: Lowered) -> None:
        for kind in ("float", "int8"):
            for name in ("residual", "shuffle", "shared", "attention", "lstm"):
                net = quantized(name, "executorch") if kind == "int8" else model(name)
                norms = {key for key in net.parameters if ".bn" in key or key.endswith("norm")}
                there = RUNTIME.stored(lowered("executorch", name, kind))
                wanted = {key for key in net.parameters if key.endswith("weight") and key not in norms}
                assert {key for key in wanted if net.parameters[key].dim() > 1} <= set(there)

    def test_biases_are_int32(self, lowered: Lowered) -> None:
        stored = RUNTIME.stored(lowered("executorch", "residual", "int8"))
        assert stored["stem.0.bias"].dtype == "int32"

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
        assert artifact.entries == {"forward": "model.pte", "twice": "model.twice.pte"}
        session = RUNTIME.open(artifact, HERE)
        for entry, call in (("forward", net.module), ("twice", net.module.twice)):
            (y,) = session(x.numpy(), entry=entry)
            assert decibels(call(x).detach(), y) > 25  # type: ignore[operator]


class TestWeightsAlone:
    @pytest.mark.parametrize(
        ("parameters", "dtype", "share"),
        [
            ({"weights": "int8"}, "int8", 1.0),
            ({"weights": "int8", "granularity": "per_tensor"}, "int8", 1.0),
            ({"weights": "int4"}, "int4", 0.5),
            ({"weights": "int4", "granularity": "per_group", "group": 32}, "int4", 0.5),
        ],
    )
    def test_are_stored_and_read_as_integers(
        self, parameters: dict[str, Any], dtype: str, share: float, tmp_path: Path
    ) -> None:
        net = quantize(perceptron(), activations="none", **parameters)
        artifact = lower(net, tmp_path)
        x = perceptron().entries["forward"].example_inputs[0].numpy()
        assert decibels(simulated(net, x), answers(artifact, x)) >= 30
        stored = RUNTIME.stored(artifact)
        filled = 24 if parameters.get("granularity") == "per_group" else 0  # 72 inputs are no whole groups
        assert (stored["0.weight"].dtype, stored["2.weight"].dtype) == (dtype, dtype)
        assert stored["0.weight"].bytes == share * 96 * (72 + filled)
        assert stored["2.weight"].bytes == share * 960
        seen = Counter((kernel.op, kernel.dtype) for kernel in kernels(artifact))
        assert seen["FullyConnected", "int8"] == 2

    def test_of_convolutions_stay_float(self) -> None:
        weight = IntQuant(-torch.ones(1), torch.ones(1), 8, True, PerChannel(0))
        assert not RUNTIME.supports("conv2d", weight, None, HERE)
        assert RUNTIME.supports("linear", weight, None, HERE)

    def test_of_a_depthwise_convolution_are_refused(self, tmp_path: Path) -> None:
        net = model_of(nn.Conv2d(4, 4, 3, groups=4), torch.randn(2, 4, 8, 8))
        fmt = IntQuant(-torch.ones(4), torch.ones(4), 8, True, PerChannel(0))
        with pytest.raises(TargetError, match="the convolution of 'weight' in integers between floats"):
            lower(net.evolve(formats={"weight": (fmt,)}), tmp_path)

    def test_scales_of_groups_are_bfloat16(self) -> None:
        fmt = IntQuant(-torch.rand(5, 3) - 0.1, torch.rand(5, 3) + 0.1, 4, True, PerGroup(1, 32))
        grid = RUNTIME.realise(fmt, HERE, "weight")
        assert isinstance(grid, IntQuant)
        scale, _ = grid.grid()
        assert torch.allclose(scale, scale.to(torch.bfloat16).float(), rtol=1e-6)


class TestRefusals:
    def test_what_has_no_kernels(self) -> None:
        ends = -torch.ones(4), torch.ones(4)
        one = torch.tensor(-1.0), torch.tensor(1.0)
        refused = [
            (IntQuant(*ends, granularity=PerChannel(0)), "weight", "asymmetric weights"),
            (IntQuant(*ends, 8, True, PerChannel(0)), "activation", "activations per channel"),
            (IntQuant(*one, 4), "activation", "activations of 4-bit"),
            (IntQuant(*one, 16, True), "weight", "16-bit"),
            (IntQuant(*one, 4, True, PerTensor()), "weight", "int4 per channel or per group"),
            (
                IntQuant(-torch.ones(2, 2), torch.ones(2, 2), 4, True, PerGroup(1, 16)),
                "weight",
                "multiple of 32",
            ),
            (IntQuant(-torch.ones(2, 2), torch.ones(2, 2), 8, True, PerGroup(1, 32)), "weight", "4-bit"),
            (FloatCast(), "weight", "float32 or integers"),
        ]
        for fmt, role, words in refused:
            with pytest.raises(TargetError, match=words) as told:
                RUNTIME.realise(fmt, HERE, role)  # type: ignore[arg-type]
            assert told.value.fix is not None

    def test_an_unknown_option(self, lowered: Lowered) -> None:
        artifact = lowered("executorch", "linear3d", "float")
        with pytest.raises(TargetError, match="no option 'thread'") as told:
            RUNTIME.open(artifact, target("executorch", options={"thread": 1}))
        assert told.value.fix == "did you mean 'threads'?"
        with pytest.raises(TargetError, match="cannot be 'all'"):
            RUNTIME.open(artifact, target("executorch", options={"threads": "all"}))

    def test_other_shapes_than_those_of_the_file(self, lowered: Lowered) -> None:
        session = RUNTIME.open(lowered("executorch", "linear3d", "float"), HERE)
        with pytest.raises(TargetError, match="cannot run the entry 'forward'") as told:
            session(np.zeros((2, 8, 12), np.float32))
        assert "(1, 9, 12)" in str(told.value.fix)

    def test_a_sequence_too_long_to_write_out(self, tmp_path: Path) -> None:
        net = model_of(nn.Sequential(nn.LSTM(2, 2, batch_first=True)), torch.randn(1, 600, 2), outputs=3)
        with pytest.raises(TargetError, match="600 steps"):
            lower(net, tmp_path)


class TestSession:
    def test_threads_can_change_between_sessions(self, lowered: Lowered) -> None:
        artifact = lowered("executorch", "residual", "int8")
        x = inputs("residual", 2)
        one = RUNTIME.open(artifact, HERE)
        (first,) = one(x)
        two = RUNTIME.open(artifact, target("executorch", options={"threads": 2}))
        (second,) = two(x)
        (third,) = one(x)
        np.testing.assert_array_equal(first, third)
        np.testing.assert_allclose(first, second, atol=1e-5)

    def test_no_example(self, lowered: Lowered) -> None:
        y = answers(lowered("executorch", "residual", "float"), inputs("residual", 3)[:0])
        assert y.shape == (0, 10)

    def test_loading_leaves_the_exporter_alone(self, lowered: Lowered) -> None:
        artifact = lowered("executorch", "linear3d", "int8")
        code = LOADED.format(artifact=json.dumps(artifact.to_json()), folder=str(artifact.folder))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    def test_tunings_are_options(self, lowered: Lowered) -> None:
        artifact = lowered("executorch", "linear3d", "float")
        where = Target("executorch", threads=3)
        assert list(RUNTIME.tunings(where)) == [{"threads": 2}, {"threads": 1}]
        for options in RUNTIME.tunings(where):
            RUNTIME.open(artifact, target("executorch", options=options))(inputs("linear3d", 1))

    def test_inputs_of_several_kinds(self, tmp_path: Path) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(11, 8)
                self.head = nn.Linear(8, 3)

            def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
                return self.head((self.table(ids) * mask.unsqueeze(-1)).sum(1))

        ids, mask = torch.randint(0, 11, (3, 5)), torch.rand(3, 5)
        net = model_of(Net(), ids, mask)
        (y,) = RUNTIME.open(lower(net, tmp_path), HERE)(ids.numpy(), mask.numpy())
        with torch.no_grad():
            np.testing.assert_allclose(y, net.module(ids, mask).numpy(), rtol=1e-4, atol=1e-5)


class TestShapes:
    """Operators in other spellings than the golden nets have."""

    def test_in_one_delegate(self, tmp_path: Path) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 12, 3, padding=1)
                self.line = nn.Conv1d(6, 6, 3, padding=1)
                self.out = nn.Linear(6, 4)

            def forward(self, x: Tensor) -> Tensor:
                a, b = F.max_pool2d(F.relu(self.conv(x)), 2).split([6, 6], 1)
                c = F.avg_pool2d(a, 2) + F.hardsigmoid(F.avg_pool2d(b, 2))
                d = self.line(c.flatten(2)).unsqueeze(-1).squeeze(3)
                q, k, v = torch.stack([d, d * 2, d + 1]).unbind(0)
                e = F.scaled_dot_product_attention(q, k, v)
                return self.out(e.transpose(1, 2).select(1, 0))

        net = model_of(Net(), torch.randn(8, 3, 8, 8))
        x = net.entries["forward"].example_inputs[0].numpy()
        artifact = lower(net, tmp_path / "a")
        with torch.no_grad():
            wanted = net.module(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(answers(artifact, x), wanted, rtol=1e-4, atol=1e-5)
        assert all(kernel.fast for kernel in kernels(artifact))
        done = quantize(net)
        artifact = lower(done, tmp_path / "b")
        assert decibels(simulated(done, x), answers(artifact, x)) >= 30

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
    @pytest.mark.parametrize("options", [{"batch_first": True}, {"bidirectional": True}, {"bias": False}])
    def test_recurrent_layers(self, kind: type[nn.Module], options: dict[str, bool], tmp_path: Path) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = kind(5, 6, **options)  # type: ignore[arg-type]

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                turned = x if options.get("batch_first") else x.transpose(0, 1)
                y, state = self.body(turned)
                last = state[0] if isinstance(state, tuple) else state
                y = y if options.get("batch_first") else y.transpose(0, 1)
                return y, last.transpose(0, 1)

        net = model_of(Net(), torch.randn(2, 3, 5), outputs=2)
        x = net.entries["forward"].example_inputs[0]
        seen = RUNTIME.open(lower(net, tmp_path), HERE)(x.numpy())
        with torch.no_grad():
            wanted = net.module(x)
        for one, two in zip(seen, wanted, strict=True):
            np.testing.assert_allclose(one, two.numpy(), rtol=1e-4, atol=1e-5)

    def test_an_excluded_layer_runs_in_float(self, tmp_path: Path) -> None:
        net = quantize(small(), where={"exclude": ["2"]})
        artifact = lower(net, tmp_path)
        stored = RUNTIME.stored(artifact)
        kinds = {name: stored[name].dtype for name in ("0.weight", "2.weight", "2.bias", "5.weight")}
        assert kinds == {"0.weight": "int8", "2.weight": "float32", "2.bias": "float32", "5.weight": "int8"}
        x = small().entries["forward"].example_inputs[0].numpy()
        assert decibels(simulated(net, x), answers(artifact, x)) >= 30

    def test_clamps_cost_nothing(self, tmp_path: Path) -> None:
        seen = Counter(kernel.op for kernel in kernels(lower(quantize(small()), tmp_path)))
        assert seen["Clamp"] == 0
        assert seen["Conv2d"] == 2


class TestLoaders:
    def test_the_python_one_runs(self, lowered: Lowered, tmp_path: Path) -> None:
        artifact = lowered("executorch", "residual", "int8")
        signature = Signature((("x", "float32", (1, 3, 16, 16)),), ("y",))
        texts = RUNTIME.loaders(artifact, HERE, signature)
        assert set(texts) == {"load.py", "load.cpp", "Load.kt", "load.swift"}
        (tmp_path / "model.pte").write_bytes((artifact.folder / "model.pte").read_bytes())
        (tmp_path / "load.py").write_text(texts["load.py"])
        done = subprocess.run(
            [sys.executable, "load.py"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip() == "(1, 10)"

    def test_each_names_the_file_and_the_shape(self, lowered: Lowered) -> None:
        signature = Signature((("x", "float32", (1, 9, 12)), ("ids", "int64", (1, 4))), ("y",))
        texts = RUNTIME.loaders(lowered("executorch", "linear3d", "float"), HERE, signature)
        for name, text in texts.items():
            assert "model" in text, name
            assert "1, 9, 12" in text, name
            assert "1, 4" in text, name


def test_data_is_not_in_the_file(tmp_path: Path) -> None:
    """The examples that a model was traced with stay here."""
    net = model_of(nn.Linear(6, 2), torch.full((2, 6), 0.123456))
    artifact = lower(net, tmp_path)
    assert np.float32(0.123456).tobytes() not in (artifact.folder / "model.pte").read_bytes()
    assert len(data("linear3d").example_inputs()) == 1
