"""Transformers and recurrent networks on ONNX Runtime: products rounded at each call, tables, LSTM, GRU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from featherweight.data import Data
from featherweight.errors import TargetError
from featherweight.formats import Dynamic, IntQuant, PerChannel, PerGroup, PerTensor
from featherweight.methods.quantize import Quantize
from featherweight.model import Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact
from featherweight.runtimes._ort_recurrent import GATES
from featherweight.tools.simulate import simulate
from golden import context, decibels, model_of, target
from language_nets import encoder, ids, recurrent, sequences

HERE = target()
RUNTIME = find_runtime("onnxruntime")
SCALES = {"MatMulNBits": 2, "GatherBlockQuantized": 2}  # which input holds them


def quantized(net: Model, x: np.ndarray, folder: Path, **settings: object) -> tuple[Model, Artifact]:
    changed = Quantize.model_validate(settings).apply(net, context(net, Data.of(x_train=x)))
    return changed, RUNTIME.lower(changed, HERE, folder)


def parity(changed: Model, artifact: Artifact, x: np.ndarray) -> float:
    with torch.no_grad():
        (wanted,) = simulate(changed)(torch.from_numpy(x))
    return decibels(wanted, RUNTIME.open(artifact, HERE)(x)[0])


def ran(artifact: Artifact, x: np.ndarray) -> list[str]:
    return [kernel.op for kernel in RUNTIME.kernels(artifact, HERE, (x,))]


def tensors(artifact: Artifact) -> Mapping[str, np.ndarray]:
    graph = onnx.load(artifact.folder / "model.onnx").graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def unpacked(packed: np.ndarray, width: int, columns: int) -> np.ndarray:
    """Integers above their middle, a row for each output."""
    parts = [packed >> shift & ((1 << width) - 1) for shift in range(0, 8, width)]
    return np.stack(parts, -1).reshape(len(packed), -1)[:, :columns].astype(int)


class TestRoundedAtEachCall:
    @pytest.fixture(params=["token", "tensor"])
    def per(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_products_run_in_integers(self, per: str, tmp_path: Path) -> None:
        settings = {"activations": "dynamic", "where": {"exclude": ["table", "head"]}}
        changed, _ = quantized(encoder(), ids(4), tmp_path, **settings)
        read = {name: chain for name, chain in changed.formats.items() if isinstance(chain[-1], Dynamic)}
        assert len(read) == 3  # q, k and v read the same value
        asked = (Dynamic(8, symmetric=per == "token", per=per, readers=frozenset({"linear"})),)  # type: ignore[arg-type]
        changed = changed.evolve(formats={**changed.formats, **dict.fromkeys(read, asked)})
        artifact = RUNTIME.lower(changed, HERE, tmp_path)
        assert parity(changed, artifact, ids(3)) >= 45
        stored = RUNTIME.stored(artifact)
        assert all(stored[f"{layer}.weight"].dtype == "int8" for layer in ("q", "k", "v", "fc1", "fc2"))
        seen = ran(artifact, ids(3))
        assert seen.count("MatMulIntegerToFloat") + seen.count("DynamicQuantizeMatMul") == 5
        assert seen.count("QuantizeLinear") == (3 if per == "token" else 0)

    def test_what_it_reads_is_what_the_formats_say(self, per: str) -> None:
        fmt = RUNTIME.realise(Dynamic(8, per=per), HERE, "activation")  # type: ignore[arg-type]
        assert isinstance(fmt, Dynamic)
        assert (fmt.per, fmt.symmetric, fmt.signed) == (per, per == "token", False)

    def test_a_token_of_zeros(self, tmp_path: Path) -> None:
        net = model_of(nn.Sequential(nn.Linear(12, 8)), sequences_tensor())
        changed, artifact = quantized(net, sequences(4), tmp_path, activations="dynamic")
        x = sequences(2)
        x[:, 3] = 0
        assert parity(changed, artifact, x) >= 60
        assert np.isfinite(RUNTIME.open(artifact, HERE)(x)[0]).all()


def sequences_tensor() -> Tensor:
    return torch.from_numpy(sequences(2))


class TestTables:
    @pytest.mark.parametrize(("width", "size"), [(2, 16), (4, 32), (8, 32)])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_a_table_that_is_a_head_too(self, width: int, size: int, symmetric: bool, tmp_path: Path) -> None:
        """It is stored once, and both readers run on the packed integers."""
        changed, artifact = quantized(
            encoder(), ids(4), tmp_path, weights=f"int{width}", activations="none",
            granularity="per_group", group=size, symmetric_weights=symmetric,
        )  # fmt: skip
        assert parity(changed, artifact, ids(3)) >= 35  # products round their inputs to 8 bits per block
        stored = RUNTIME.stored(artifact)["table.weight"]
        assert stored.dtype == f"uint{width}"
        assert stored.bytes == 90 * 48 * width // 8
        seen = ran(artifact, ids(3))
        assert (seen.count("GatherBlockQuantized"), seen.count("MatMulNBits")) == (1, 6)
        assert not {"MatMul", "Gemm", "Gather"} & set(seen) or seen.count("MatMul") == 1  # of attention
        fmt = RUNTIME.realise(changed.formats["table.weight"][0], HERE, "weight")  # scales as half floats
        assert isinstance(fmt, IntQuant)
        wanted = fmt.quantize(encoder().parameters["table.weight"]).numpy()
        found = unpacked(tensors(artifact)["table.weight"], width, 48)
        assert np.array_equal(found - (1 << (width - 1)) * symmetric, wanted)

    @pytest.mark.parametrize("width", [2, 4, 8])
    @pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
    def test_one_scale_for_a_row_or_all(self, width: int, granularity: str, tmp_path: Path) -> None:
        changed, artifact = quantized(
            encoder(), ids(4), tmp_path, weights=f"int{width}", activations="none", granularity=granularity
        )
        assert parity(changed, artifact, ids(3)) >= 35
        assert RUNTIME.stored(artifact)["table.weight"].dtype == f"uint{width}"

    def test_scales_are_half_floats(self, tmp_path: Path) -> None:
        _, artifact = quantized(
            encoder(), ids(4), tmp_path, weights="int4", activations="none", granularity="per_group"
        )
        nodes = onnx.load(artifact.folder / "model.onnx").graph.node
        sources = {node.output[0]: node.input[0] for node in nodes if node.op_type in ("Cast", "Reshape")}
        scales = [node.input[SCALES[node.op_type]] for node in nodes if node.op_type in SCALES]
        assert len(scales) == 7  # of a table and six products, one of which reads the table
        while any(name in sources for name in scales):
            scales = [sources.get(name, name) for name in scales]
        assert {tensors(artifact)[name].dtype.name for name in scales} == {"float16"}

    def test_scales_too_small_for_half_floats_stay_float32(self) -> None:
        small, large = torch.full((2, 2), 1e-6), torch.ones(2, 2)
        for limit, kept in ((small, True), (large, False)):
            fmt = IntQuant(-limit, limit, 4, True, PerGroup(1, 32))
            stored = RUNTIME.realise(fmt, HERE, "weight")
            assert isinstance(stored, IntQuant)
            assert torch.equal(stored.grid()[0], fmt.grid()[0]) is kept
            assert torch.allclose(stored.grid()[0], fmt.grid()[0], rtol=2**-11)


@pytest.mark.parametrize("both", [False, True])
class TestRecurrent:
    @pytest.mark.parametrize("kind", ["LSTM", "GRU"])
    @pytest.mark.parametrize("activations", ["dynamic", "none"])
    def test_weights_are_integers(self, kind: str, both: bool, activations: str, tmp_path: Path) -> None:
        net = recurrent(kind, both)
        changed, artifact = quantized(net, sequences(4), tmp_path, activations=activations)
        assert parity(changed, artifact, sequences(3)) >= 30
        stored, held = RUNTIME.stored(artifact), tensors(artifact)
        names = [name for name in net.parameters if "weight" in name and name.startswith("layers")]
        assert len(names) == (8 if both else 4)
        for name in names:
            fmt = changed.formats[name][0]
            assert isinstance(fmt, IntQuant)
            assert stored[name].dtype == "int8"
            rows = held[name][0] if activations == "none" or kind == "GRU" else held[name][0].T
            blocks = fmt.quantize(net.parameters[name]).numpy().reshape(len(GATES[kind]), 16, -1)
            assert np.array_equal(rows, blocks[list(GATES[kind])].reshape(rows.shape)), name
        seen = ran(artifact, sequences(3))
        rounding = kind == "LSTM" and activations == "dynamic"
        assert seen.count("DynamicQuantizeLSTM") == (2 if rounding else 0)
        assert seen.count(kind) == (0 if rounding else 2)
        assert not {"DequantizeLinear", "Cast"} & set(seen)  # restored once, when the file is loaded

    def test_one_direction_alone_is_refused(self, both: bool, tmp_path: Path) -> None:
        net = recurrent("LSTM", both)
        fmt = IntQuant(-torch.ones(64), torch.ones(64), 8, True, PerChannel(0))
        changed = net.evolve(formats={"layers.weight_hh_l0": (fmt,)})
        if both:
            with pytest.raises(TargetError, match="found no recurrent layer that reads"):
                RUNTIME.lower(changed, HERE, tmp_path)
        else:
            artifact = RUNTIME.lower(changed, HERE, tmp_path)
            stored = RUNTIME.stored(artifact)
            assert stored["layers.weight_hh_l0"].dtype == "int8"
            assert parity(changed, artifact, sequences(3)) >= 90


def test_what_it_says_it_supports() -> None:
    def ask(op: str, weight: IntQuant, activation: Dynamic | None) -> bool:
        return RUNTIME.supports(op, weight, activation, HERE)

    one = torch.tensor(1.0)
    row, whole = (
        IntQuant(-one.reshape(1), one.reshape(1), 8, True, PerChannel(0)),
        IntQuant(-one, one, 8, False, PerTensor()),
    )
    group = IntQuant(-one.reshape(1, 1), one.reshape(1, 1), 4, True, PerGroup(1, 32))
    token, tensor = Dynamic(8, per="token"), Dynamic(8)
    assert all(ask("linear", weight, read) for weight in (row, whole) for read in (token, tensor))
    assert ask("lstm", row, tensor) and not ask("lstm", row, token)
    assert not any(ask("gru", row, read) for read in (token, tensor))
    assert ask("gru", row, None) and ask("lstm", row, None)
    assert not any(ask("conv2d", row, read) for read in (token, tensor))
    assert ask("linear", group, None) and ask("embedding", group, None)
    assert not ask("linear", group, token) and not ask("conv2d", group, None) and not ask("lstm", group, None)
    assert not ask("linear", row, Dynamic(4))
