"""onnxruntime-web: the files of onnxruntime in WebAssembly, in a Node process that ends with its session."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from conftest import Lowered
from featherweight.data import Data
from featherweight.engine import phases
from featherweight.errors import MissingRuntime, RunnerError, TargetError
from featherweight.formats import IntQuant
from featherweight.graph import trace
from featherweight.methods.quantize import Quantize
from featherweight.model import Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Signature, Target
from featherweight.runtimes import _web
from featherweight.tools.simulate import Replay, simulate
from golden import context, decibels, inputs, model, model_of, quantized, target
from nets import NETS

NAME = "onnxruntime-web"
RUNTIME = find_runtime(NAME)
HERE = target(NAME)
if not RUNTIME.installed():
    pytest.skip(f"the runtime '{NAME}' is not installed", allow_module_level=True)

TYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "bool": TensorProto.BOOL,
}


def echo(folder: Path, *dtypes: str) -> Artifact:
    """A model that returns its inputs."""
    ends = [
        [
            helper.make_tensor_value_info(f"{end}{i}", TYPES[dtype], ["n", "m"])
            for i, dtype in enumerate(dtypes)
        ]
        for end in "xy"
    ]
    nodes = [helper.make_node("Identity", [f"x{i}"], [f"y{i}"]) for i in range(len(dtypes))]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", *ends), opset_imports=[helper.make_opsetid("", 20)]
    )
    proto.ir_version = 10
    onnx.save(proto, folder / "model.onnx")
    return Artifact(NAME, folder, ("model.onnx",), {"forward": "model.onnx"})


def quantize(net: Model, on: Target = HERE) -> Model:
    examples = Data.of(x_train=net.entries["forward"].example_inputs[0].numpy())
    return Quantize(range="minmax", weight_range="minmax").apply(net, context(net, examples, on))


@cache
def small() -> Model:
    """A layer of each kind that integers speed up or slow down here."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.Conv2d(16, 16, 3),
            nn.Conv2d(16, 16, 3, groups=16),
            nn.Conv2d(16, 32, 1),
            nn.ReLU(),
            nn.Conv2d(32, 8, 1),
            nn.Flatten(),
            nn.Linear(32, 5),
        )
        return model_of(net, torch.randn(16, 3, 8, 8))


def hosts() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "_web_host.mjs" in " ".join(child.cmdline())]


@pytest.mark.parametrize("net", NETS)
def test_int8_gives_what_the_simulation_says(net: str, lowered: Lowered) -> None:
    x = inputs(net)
    (seen,) = RUNTIME.open(lowered(NAME, net, "int8"), HERE)(x)
    with torch.no_grad():
        (wanted,) = simulate(quantized(net, NAME))(torch.from_numpy(x))
    assert seen.dtype == np.float32
    # The simulation leaves hidden states alone, which the kernel rounds.
    assert decibels(wanted, seen) >= (50 if net == "lstm" else 60)


class TestFormats:
    def test_sums_do_not_saturate_on_any_machine(self, tmp_path: Path) -> None:
        """Largest weights times largest activations: what adds in 16 bits would be off by half."""
        layer = nn.Conv2d(64, 8, 1, bias=False)
        nn.init.ones_(layer.weight)
        net = quantize(model_of(nn.Sequential(layer), torch.ones(4, 64, 4, 4)), target(NAME, "avx2"))
        weight = net.formats["0.weight"][-1]
        assert isinstance(weight, IntQuant)
        assert weight.quant_max == 127
        artifact = RUNTIME.lower(net, HERE, tmp_path)
        (seen,) = RUNTIME.open(artifact, HERE)(np.ones((1, 64, 4, 4), np.float32))
        np.testing.assert_allclose(seen, 64.0, rtol=1e-2)
        assert "QLinearConv" in {one.op for one in RUNTIME.kernels(artifact, HERE, [seen_input()])}

    def test_layers_that_integers_slow_down_keep_float_arithmetic(self, tmp_path: Path) -> None:
        graph = trace(small())
        pays = {n.layer: RUNTIME.integers_pay(n, graph, HERE) for n in graph if "weight" in n.parameters}
        assert pays == {"0": False, "1": True, "2": False, "3": False, "5": True, "7": False}
        artifact = RUNTIME.lower(quantize(small()), HERE, tmp_path)
        stored = RUNTIME.stored(artifact)
        assert {stored[f"{layer}.weight"].dtype for layer in pays} == {
            "int8"
        }  # smaller they are all the same
        x = small().entries["forward"].example_inputs[0].numpy()[:1]
        ops = [one.op for one in RUNTIME.kernels(artifact, HERE, [x])]
        assert ops.count("QLinearConv") == sum(pays.values())
        assert sum(op in ("Conv", "FusedConv") for op in ops) == 3

    def test_errors_name_this_runtime(self) -> None:
        fmt = IntQuant(torch.tensor(-1.0), torch.tensor(1.0), 16)
        with pytest.raises(TargetError, match="onnxruntime-web cannot store 16 bits"):
            RUNTIME.realise(fmt, HERE, "weight")


def seen_input() -> np.ndarray:
    return np.ones((1, 64, 4, 4), np.float32)


class TestSession:
    @pytest.mark.parametrize("dtype", TYPES)
    def test_every_type_comes_back_as_it_went(self, dtype: str, tmp_path: Path) -> None:
        x = np.arange(-6, 6).reshape(3, 4).astype(dtype)
        (seen,) = RUNTIME.open(echo(tmp_path, dtype), HERE)(x)
        assert seen.dtype == x.dtype
        np.testing.assert_array_equal(seen, x)

    def test_several_inputs_and_outputs_in_order(self, tmp_path: Path) -> None:
        session = RUNTIME.open(echo(tmp_path, "float32", "int64", "bool"), HERE)
        given = (np.float32([[0.5]]), np.int64([[2**60, -1]]), np.array([[True], [False]]))
        for one, other in zip(session(*given), given, strict=True):
            np.testing.assert_array_equal(one, other)

    def test_more_than_a_pipe_holds(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).standard_normal((1500, 2000)).astype(np.float32)
        session = RUNTIME.open(echo(tmp_path, "float32"), HERE)
        np.testing.assert_array_equal(session(x)[0], x)
        np.testing.assert_array_equal(session(x[:, ::7])[0], x[:, ::7])
        assert session(x[:0])[0].shape == (0, 2000)

    def test_a_refused_call_leaves_it_usable(self, tmp_path: Path) -> None:
        session = RUNTIME.open(echo(tmp_path, "float32"), HERE)
        x = np.ones((2, 3), np.float32)
        with pytest.raises(ValueError, match="1 inputs, and 2 were given"):
            session(x, x)
        with pytest.raises(ValueError, match="onnxruntime-web"):
            session(x.astype(np.float64))
        with pytest.raises(TypeError, match="complex64"):
            session(x.astype(np.complex64))
        np.testing.assert_array_equal(session(x)[0], x)

    def test_answers_stay_what_they_were(self, tmp_path: Path) -> None:
        session = RUNTIME.open(echo(tmp_path, "float32"), HERE)
        (first,) = session(np.ones((2, 3), np.float32))
        session(np.zeros((2, 3), np.float32))
        np.testing.assert_array_equal(first, 1)

    def test_options_are_checked(self, tmp_path: Path) -> None:
        artifact = echo(tmp_path, "float32")
        with pytest.raises(TargetError, match="no option 'graphOptimisationLevel'") as told:
            RUNTIME.open(artifact, target(NAME, options={"graphOptimisationLevel": "all"}))
        assert told.value.fix == "did you mean 'graphOptimizationLevel'?"
        with pytest.raises(TargetError, match=r"cannot open 'model\.onnx'") as told:
            RUNTIME.open(artifact, target(NAME, options={"graphOptimizationLevel": "most"}))
        assert told.value.where is not None

    @pytest.mark.parametrize("options", RUNTIME.tunings(Target(NAME, "", 2)))
    def test_tunings_are_options_that_it_takes(self, options: dict[str, object], lowered: Lowered) -> None:
        artifact, x = lowered(NAME, "residual", "float"), inputs("residual", 2)
        (seen,) = RUNTIME.open(artifact, target(NAME, options=options))(x)
        np.testing.assert_allclose(seen, RUNTIME.open(artifact, HERE)(x)[0], rtol=1e-4, atol=1e-5)

    def test_a_file_that_is_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(b"nothing")
        with pytest.raises(TargetError, match="cannot open"):
            RUNTIME.open(Artifact(NAME, tmp_path, ("model.onnx",), {"forward": "model.onnx"}), HERE)


class TestProcess:
    @pytest.fixture(autouse=True)
    def _nothing_left(self) -> Iterator[None]:
        gc.collect()
        before = len(hosts())
        yield
        gc.collect()
        assert len(hosts()) == before

    def test_is_one_for_all_calls_and_ends_with_the_session(self, tmp_path: Path) -> None:
        before = len(hosts())
        session = RUNTIME.open(echo(tmp_path, "float32"), HERE)
        for _ in range(3):
            session(np.ones((1, 1), np.float32))
        assert len(hosts()) == before + 1
        del session

    def test_is_the_one_that_was_loaded_before(self, tmp_path: Path) -> None:
        runtime = find_runtime(NAME)
        runtime.load(HERE)
        loaded = {host.pid for host in hosts()}
        session = runtime.open(echo(tmp_path, "float32"), HERE)
        assert {host.pid for host in hosts()} == loaded
        del session

    def test_starts_workers_only_for_more_threads(self) -> None:
        counts = []
        for threads in (1, 2, 3):
            host = _web.Host(threads)
            counts.append(hosts()[-1].num_threads())
            host.close()
        assert (counts[1] - counts[0], counts[2] - counts[1]) == (1, 1)

    def test_takes_the_cores_of_its_parent(self) -> None:
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        try:
            host = _web.Host(1)
            assert hosts()[-1].cpu_affinity() == [min(cores)]
            host.close()
        finally:
            os.sched_setaffinity(0, cores)

    def test_its_death_is_told(self, tmp_path: Path) -> None:
        session = RUNTIME.open(echo(tmp_path, "float32"), HERE)
        hosts()[-1].send_signal(signal.SIGKILL)
        with pytest.raises(RunnerError, match="ended with exit code -9"):
            session(np.ones((1, 1), np.float32))

    def test_ends_when_its_parent_is_killed(self) -> None:
        code = (
            "import time; from featherweight.runtimes._web import Host; host = Host(1);"
            "print('up', flush=True); time.sleep(60)"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"up\n"
            (host,) = psutil.Process(parent.pid).children()
            parent.kill()
        deadline = time.monotonic() + 10
        while host.is_running() and host.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not host.is_running() or host.status() == psutil.STATUS_ZOMBIE

    def test_its_memory_counts(self) -> None:
        before, _ = phases._resident()
        host = _web.Host(1)
        now, peak = phases._resident()
        seen = hosts()[-1].memory_info().rss
        assert 0.8 * seen < now - before < 1.2 * seen
        assert peak >= now > 30e6
        host.close()


def test_values_inside_are_those_of_the_module(lowered: Lowered) -> None:
    x = inputs("residual", 2)
    artifact = lowered(NAME, "residual", "float")
    assert artifact.details["values"]["forward"]
    seen = RUNTIME.values(artifact, HERE, [x])
    assert set(seen) >= {"layer1.conv2#0:0", "head#0:0"} & set(artifact.details["values"]["forward"])
    stages: dict[str, torch.Tensor] = {}
    Replay(model("residual"))((torch.from_numpy(x),), stages.setdefault)
    for name, value in seen.items():
        np.testing.assert_allclose(value, stages[name].detach().numpy(), rtol=1e-3, atol=1e-4)


class TestKernels:
    def test_are_told_with_their_times(self, lowered: Lowered) -> None:
        seen = RUNTIME.kernels(lowered(NAME, "residual", "int8"), HERE, [inputs("residual", 1)])
        assert all(one.seconds is not None and one.seconds > 0 for one in seen)
        integers = [one for one in seen if one.op == "QLinearConv"]
        assert len(integers) >= 4
        assert all(one.dtype == "int8" and one.fast for one in integers)
        between = [one for one in seen if one.op == "QuantizeLinear"]
        assert between
        assert not any(one.fast for one in between[1:])
        assert all(one.note for one in seen if not one.fast)

    def test_of_a_float_model(self, lowered: Lowered) -> None:
        seen = RUNTIME.kernels(lowered(NAME, "residual", "float"), HERE, [inputs("residual", 1)])
        assert {one.dtype for one in seen if "Conv" in one.op} == {"float32"}

    def test_profiles_are_left_to_the_native_runtime(self, lowered: Lowered, tmp_path: Path) -> None:
        with pytest.raises(TargetError, match="onnxruntime-web tells no times"):
            RUNTIME.profile(lowered(NAME, "residual", "float"), HERE, [], tmp_path, entry="forward")


class TestPackage:
    @pytest.fixture
    def nowhere(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        monkeypatch.setattr(_web, "_places", lambda: [tmp_path])
        return tmp_path

    def test_version_is_that_of_its_package_json(self) -> None:
        assert RUNTIME.version() == f"onnxruntime-web {_web.version()}"
        assert _web.version()[0].isdigit()

    def test_a_missing_package_is_told_with_its_npm_line(self, nowhere: Path) -> None:
        assert not RUNTIME.installed()
        with pytest.raises(MissingRuntime, match="no npm package 'onnxruntime-web'") as told:
            RUNTIME.require()
        assert told.value.fix == f"npm install --prefix {sys.prefix} onnxruntime-web@1.30.0"

    def test_a_missing_node_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "which", lambda name: None)
        with pytest.raises(MissingRuntime, match="no program 'node'") as told:
            RUNTIME.require()
        assert "npm install --prefix" in str(told.value.fix)

    def test_is_found_where_the_user_says(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "onnxruntime-web").mkdir()
        (tmp_path / "onnxruntime-web" / "package.json").write_text('{"version": "9.9.9"}')
        monkeypatch.setenv("FEATHERWEIGHT_NODE_MODULES", str(tmp_path))
        assert _web.package() == tmp_path / "onnxruntime-web"
        assert _web.version() == "9.9.9"


class TestLoaders:
    @pytest.mark.parametrize(("net", "kind"), [("residual", "int8"), ("linear3d", "float")])
    def test_run_without_this_package(self, net: str, kind: str, lowered: Lowered, tmp_path: Path) -> None:
        artifact = lowered(NAME, net, kind)
        shape = (1, *inputs(net, 1).shape[1:])
        where = target(NAME, options={"graphOptimizationLevel": "extended"})
        programs = RUNTIME.loaders(artifact, where, Signature((("x", "float32", shape),), ("y",)))
        assert set(programs) == {"load.py", "load.mjs"}
        for name, text in programs.items():
            assert "featherweight" not in text
            (tmp_path / name).write_text(text)
        shutil.copy(artifact.folder / "model.onnx", tmp_path)
        done = subprocess.run(
            [sys.executable, "load.py"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "(1, 10)\n"
        assert '"graphOptimizationLevel": "extended"' in programs["load.mjs"]

    def test_know_every_type(self, tmp_path: Path) -> None:
        dtypes = list(TYPES)
        artifact = echo(tmp_path, *dtypes)
        signature = Signature(
            tuple((f"x{i}", dtype, (1, 2)) for i, dtype in enumerate(dtypes)),
            tuple(f"y{i}" for i in range(len(dtypes))),
        )
        for name, text in RUNTIME.loaders(artifact, HERE, signature).items():
            (tmp_path / name).write_text(text)
        done = subprocess.run(
            [sys.executable, "load.py"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.stdout == "(1, 2)\n" * len(dtypes), done.stderr
