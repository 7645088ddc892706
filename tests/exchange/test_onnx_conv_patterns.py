"""Chains that exporters write become the layer that they are, and only where nobody reads their inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx.reference
import onnx_ir as ir
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from featherweight.exchange.export import to_onnx
from featherweight.exchange.onnx_in import import_onnx_bytes

pytest.importorskip("onnxruntime")

CONSTANTS = {
    "w": np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32),
    "b": np.arange(4, dtype=np.float32),
    "b4": np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1),
    "wg": np.random.default_rng(1).standard_normal((6, 1, 3, 3)).astype(np.float32),
    "wt": np.random.default_rng(2).standard_normal((3, 2, 3, 3)).astype(np.float32),
    "c3": np.array([0.5, -1, 2], np.float32).reshape(1, 3, 1, 1),
    "c6": np.linspace(-1, 1, 6, dtype=np.float32).reshape(6, 1, 1),
    "row": np.arange(6, dtype=np.float32),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),  # a 3x3 kernel keeps the size
    "zero": np.float32(0),
    "three": np.array([3], np.float32),
    "six": np.float32(6),
    "sixth": np.float32(1 / 6),
    "half": np.float32(0.5),
}


def make(operator: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs.split(), [output], **attributes)


def layers(nodes: Sequence[NodeProto], outputs: Sequence[str] = ("y",)) -> list[str]:
    """Classes of the layers that the nodes become; the import itself compares with ONNX Runtime."""
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 6, 6])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in CONSTANTS.items() if k in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    module = import_onnx_bytes(model.SerializeToString(), source="test").module
    return [type(layer).__name__ for layer in module.modules() if not list(layer.children())]


SHIFT = [make("Add", "x three", "a"), make("Clip", "a zero six", "c")]
HARD_SWISH = {
    "divided at last": [*SHIFT, make("Mul", "x c", "m"), make("Div", "m six", "y")],
    "multiplied at last": [*SHIFT, make("Mul", "c x", "m"), make("Mul", "m sixth", "y")],
    "gate divided": [*SHIFT, make("Div", "c six", "d"), make("Mul", "d x", "y")],
    "HardSigmoid": [make("HardSigmoid", "x", "h", alpha=1 / 6, beta=0.5), make("Mul", "x h", "y")],
}


@pytest.mark.parametrize("nodes", HARD_SWISH.values(), ids=HARD_SWISH)
def test_hard_swish(nodes: list[NodeProto]) -> None:
    assert layers(nodes) == ["Hardswish"]


@pytest.mark.parametrize(
    "nodes",
    [
        [make("Add", "x half", "a"), make("Clip", "a zero six", "c"), *HARD_SWISH["divided at last"][2:]],
        [make("Add", "x three", "a"), make("Clip", "a zero three", "c"), *HARD_SWISH["divided at last"][2:]],
        [*SHIFT, make("Mul", "x c", "m"), make("Div", "m three", "y")],
        [*SHIFT, make("Div", "six c", "d"), make("Mul", "d x", "y")],
        [make("HardSigmoid", "x", "h", alpha=0.2, beta=0.5), make("Mul", "x h", "y")],
    ],
    ids=["another shift", "another end", "another divisor", "divided by it", "another slope"],
)
def test_what_only_looks_like_hard_swish(nodes: list[NodeProto]) -> None:
    assert "Hardswish" not in layers(nodes)


def test_an_inside_that_is_an_output_stays() -> None:
    assert "Hardswish" not in layers(HARD_SWISH["divided at last"], ("y", "m"))


CONVOLUTIONS = {
    "an added bias": [make("Conv", "x w", "m"), make("Add", "m b4", "y")],
    "a bias added to one": [make("Conv", "x w b", "m"), make("Add", "b4 m", "y")],
    "scaled, then shifted": [make("Conv", "x w", "m"), make("Mul", "b4 m", "n"), make("Add", "n half", "y")],
    "divided": [make("Conv", "x w b", "m"), make("Div", "m six", "y")],
    "scaled before": [make("Mul", "x c3", "m"), make("Conv", "m w b", "y", pads=[1, 1, 1, 1])],
    "shifted before": [make("Mul", "x c3", "m"), make("Add", "m three", "n"), make("Conv", "n w", "y")],
    "by groups": [
        make("Add", "x c3", "m"),
        make("Conv", "m wg", "n", group=3),
        make("Mul", "n c6", "p"),
        make("Add", "p c6", "y"),
    ],
    "transposed by groups": [
        make("ConvTranspose", "x wt", "n", group=3),
        make("Mul", "n c6", "p"),
        make("Add", "p c6", "y"),
    ],
}


@pytest.mark.parametrize("nodes", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_what_only_scales_and_shifts_channels_is_the_convolutions(nodes: list[NodeProto]) -> None:
    assert layers(nodes) in (["Conv2d"], ["ConvTranspose2d"])


def test_a_shift_before_padding_stays() -> None:
    nodes = [make("Add", "x three", "m"), make("Conv", "m w", "y", pads=[1, 1, 1, 1])]
    assert len(layers(nodes)) == 2


def test_a_division_by_the_convolution_stays() -> None:
    assert len(layers([make("Conv", "x w", "m"), make("Div", "six m", "y")])) == 2


def test_a_sum_along_another_axis_is_no_bias() -> None:
    """One number for each of six columns, where a bias would have one for each of four channels."""
    nodes = [make("Pad", "x pads", "p"), make("Conv", "p w", "m"), make("Add", "m row", "y")]
    assert layers(nodes) == ["Conv2d", "Scope"]  # which holds what is added


@pytest.mark.parametrize("slope", [0.2, 1 / 6])
def test_any_hard_sigmoid_goes_out_as_one(slope: float) -> None:
    node = make("HardSigmoid", "x", "y", alpha=slope, beta=0.5)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    imported = import_onnx_bytes(model.SerializeToString(), source="test")
    exported = to_onnx(imported).model
    assert [found.op_type for found in exported.graph] == ["HardSigmoid"]
    x = torch.randn(5, 3) * 4
    session = onnx.reference.ReferenceEvaluator(ir.to_proto(exported))
    expected = torch.clamp(slope * x + 0.5, 0, 1)
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected.numpy(), atol=1e-6)
