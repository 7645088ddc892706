"""Chains that exporters write become the layer that they are, and only where nobody reads their inside."""

from __future__ import annotations

from collections.abc import Sequence

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
    "row": np.arange(6, dtype=np.float32),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),  # a 3x3 kernel keeps the size
    "zero": np.float32(0),
    "three": np.array([3], np.float32),
    "six": np.float32(6),
    "sixth": np.float32(1 / 6),
    "half": np.float32(0.5),
}


def make(operator: str, inputs: str, output: str, **attributes: float) -> NodeProto:
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


def test_an_added_bias_is_the_convolutions() -> None:
    for nodes in (
        [make("Conv", "x w", "m"), make("Add", "m b4", "y")],
        [make("Conv", "x w b", "m"), make("Add", "b4 m", "y")],
    ):
        assert layers(nodes) == ["Conv2d"]


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
