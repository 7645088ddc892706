"""Quantized files: in as a float model with formats, out again with the same integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

import golden
from featherweight.exchange.export import to_onnx
from featherweight.exchange.onnx_in import import_onnx, import_onnx_bytes
from featherweight.formats import IntQuant, PerChannel
from featherweight.plugins import find_runtime
from featherweight.tools.simulate import simulate


class _Batches(CalibrationDataReader):
    def __init__(self, name: str) -> None:
        self.rows = iter(golden.inputs(name, 32))

    def get_next(self) -> dict[str, np.ndarray] | None:
        row = next(self.rows, None)
        return None if row is None else {"x": row[None]}


def quantized_file(name: str, folder: Path, **settings: Any) -> Path:
    """A golden net, quantized by ONNX Runtime's own quantizer."""
    plain, made = folder / "plain.onnx", folder / "int8.onnx"
    onnx.save(onnx_proto(name), plain)
    quantize_static(plain, made, _Batches(name), **settings)
    return made


def onnx_proto(name: str) -> onnx.ModelProto:
    import onnx_ir

    return onnx_ir.to_proto(to_onnx(golden.folded(name)).model)


def integers(path: Path) -> dict[tuple[int, ...], list[np.ndarray]]:
    """The stored 8-bit tensors of more than one axis, by their shape."""
    found: dict[tuple[int, ...], list[np.ndarray]] = {}
    for tensor in onnx.load(path).graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind in "iu" and array.dtype.itemsize == 1 and array.ndim > 1:
            found.setdefault(tuple(sorted(array.shape)), []).append(array)
    return found


def run(path: Path, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return np.asarray(
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(
            None, {"x": x}
        )[0]
    )


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_static_comes_in_as_float_and_goes_out_with_the_same_integers(
    name: str, form: QuantFormat, tmp_path: Path
) -> None:
    path = quantized_file(name, tmp_path, quant_format=form, per_channel=True, weight_type=QuantType.QInt8)
    model = import_onnx(path)
    kinds = [type(layer).__name__ for layer in model.module.modules()]
    assert "Conv2d" in kinds and "Linear" in kinds
    weights = {name: kept[0] for name, kept in model.formats.items() if name in model.parameters}
    assert len(weights) == kinds.count("Conv2d") + kinds.count("Linear")
    assert any(isinstance(kept, IntQuant) and kept.granularity == PerChannel(0) for kept in weights.values())
    assert len(model.formats) > 2 * len(weights)  # values too

    x = golden.inputs(name, 16, 3)
    expected = run(path, x)
    with torch.no_grad():
        assert golden.decibels(expected, model.module(torch.from_numpy(x))) > 15
        held = simulate(model)(torch.from_numpy(x))
    assert golden.decibels(expected, held[0] if isinstance(held, tuple) else held) > 25

    target = golden.target()
    (tmp_path / "out").mkdir()
    artifact = find_runtime("onnxruntime").lower(model, target, tmp_path / "out")
    back = next((tmp_path / "out").rglob("*.onnx"))
    assert artifact is not None
    before, after = integers(path), integers(back)
    assert sum(map(len, before.values())) == len(weights)
    for shape, arrays in before.items():
        for array in arrays:
            centred = array.astype(np.int32)
            assert any(
                np.array_equal(np.sort(centred.reshape(-1)), np.sort(other.astype(np.int32).reshape(-1)))
                for other in after.get(shape, [])
            ), f"{shape} is not stored again"
    assert golden.decibels(expected, run(back, x)) > 60  # the same arithmetic


def test_dynamic_products_become_linear_layers(tmp_path: Path) -> None:
    plain, made = tmp_path / "plain.onnx", tmp_path / "dynamic.onnx"
    onnx.save(onnx_proto("linear3d"), plain)
    quantize_dynamic(plain, made, weight_type=QuantType.QInt8)
    assert any(node.op_type == "MatMulInteger" for node in onnx.load(made).graph.node)
    model = import_onnx(made)
    assert any(isinstance(layer, torch.nn.Linear) for layer in model.module.modules())
    assert model.formats
    x = golden.inputs("linear3d", 4, 3)
    with torch.no_grad():
        assert golden.decibels(run(made, x), model.module(torch.from_numpy(x))) > 25


def _quantized(value: np.ndarray, scale: float, zero: int, dtype: type) -> np.ndarray:
    limits = np.iinfo(dtype)
    return np.clip(np.round(value / scale) + zero, limits.min, limits.max).astype(dtype)


def one_node(op: str, values: list[tuple[str, np.ndarray]], free: str, **attributes: Any) -> onnx.ModelProto:
    """QuantizeLinear, one operator of com.microsoft, DequantizeLinear; ``free`` is the float input."""
    node = helper.make_node(op, [name for name, _ in values], ["y_q"], domain="com.microsoft", **attributes)
    x = dict(values)[free]
    scale, zero = numpy_helper.from_array(np.float32(0.05), "s"), numpy_helper.from_array(np.uint8(128), "z")
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], [free]),
            node,
            helper.make_node("DequantizeLinear", ["y_q", "s", "z"], ["y"]),
        ],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_empty_tensor_value_info("y")],
        [
            scale,
            zero,
            *(numpy_helper.from_array(array, name) for name, array in values if name not in (free, "s", "z")),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


S, Z = ("s", np.float32(0.05)), ("z", np.uint8(128))
_X = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)
_B = ("b", _quantized(np.random.default_rng(1).standard_normal(_X.shape), 0.05, 128, np.uint8))
_M = ("b", _quantized(np.random.default_rng(2).standard_normal((6, 5)), 0.05, 128, np.uint8))
_A: tuple[str, np.ndarray] = ("a", _X)
CASES: dict[str, tuple[list[tuple[str, Any]], dict[str, Any]]] = {
    "QLinearAdd": ([_A, S, Z, _B, S, Z, S, Z], {}),
    "QLinearMul": ([_A, S, Z, _B, S, Z, S, Z], {}),
    "QLinearSigmoid": ([_A, S, Z, S, Z], {}),
    "QLinearLeakyRelu": ([_A, S, Z, S, Z], {"alpha": 0.2}),
    "QLinearGlobalAveragePool": ([_A, S, Z, S, Z], {}),
    "QLinearAveragePool": ([_A, S, Z, S, Z], {"kernel_shape": [2, 2], "strides": [2, 2]}),
    "QLinearSoftmax": ([_A, S, Z, S, Z], {"axis": -1, "opset": 13}),
    "QLinearConcat": ([S, Z, _A, S, Z, _B, S, Z], {"axis": 1}),
}


@pytest.mark.parametrize("op", CASES)
def test_integer_operators_of_onnxruntime(op: str) -> None:
    values, attributes = CASES[op]
    content = one_node(op, values, "a", **attributes).SerializeToString()
    model = import_onnx_bytes(content, source=op)
    assert {"input:x"} <= set(model.formats)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": _X})[0]
    with torch.no_grad():
        found = model.module(torch.from_numpy(_X)).numpy()
    assert np.abs(found - expected).max() <= 0.15  # three steps of 0.05: both inputs and the result


def test_products_with_scales_of_their_own() -> None:
    random = np.random.default_rng(3)
    weight = random.integers(-127, 128, (8, 5)).astype(np.int8)
    scale = np.abs(random.standard_normal(5)).astype(np.float32) / 100
    node = helper.make_node(
        "DynamicQuantizeMatMul", ["x", "w", "ws", "", "bias"], ["y"], domain="com.microsoft"
    )
    bias = random.standard_normal(5).astype(np.float32)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (3, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (3, 5))],
        [
            numpy_helper.from_array(array, name)
            for name, array in (("w", weight), ("ws", scale), ("bias", bias))
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    content = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    model = import_onnx_bytes(content, source="dynamic")
    (linear,) = [layer for layer in model.module.modules() if isinstance(layer, torch.nn.Linear)]
    np.testing.assert_allclose(linear.weight.detach().numpy(), (weight * scale).T, rtol=1e-6)
    (kept,) = model.formats.values()
    assert isinstance(kept[0], IntQuant)
    np.testing.assert_array_equal(kept[0].quantize(linear.weight).numpy().T, weight)


def test_a_relu_that_saturation_stood_for_comes_back() -> None:
    weight = np.eye(4, dtype=np.float32)
    zero = numpy_helper.from_array(np.uint8(0), "z")
    scale = numpy_helper.from_array(np.float32(0.1), "s")
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("QuantizeLinear", ["h", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 4))],
        [numpy_helper.from_array(weight, "w"), scale, zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    found = import_onnx_bytes(model.SerializeToString(), source="relu")
    x = torch.tensor([[-1.0, 2.0, -3.0, 4.0]]).expand(2, 4)
    assert torch.equal(found.module(x), x.clamp(min=0))
