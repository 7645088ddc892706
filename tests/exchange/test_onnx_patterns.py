"""What exporters take apart comes in as layers: norms, activations and the projections of attention."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from featherweight.exchange.onnx_in import import_onnx_bytes
from featherweight.model import Model

Nodes = list[tuple[str, list[str], str, dict[str, Any]]]


def imported(nodes: Nodes, constants: dict[str, Any], shape: tuple[int, ...], opset: int = 17) -> Model:
    """A graph from x to y; the import compares it with ONNX Runtime."""
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], **given) for op, inputs, output, given in nodes],
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return import_onnx_bytes(model.SerializeToString(), source="chain")


_RANDOM = np.random.default_rng(0)
_SCALE, _BIAS = _RANDOM.standard_normal(8), _RANDOM.standard_normal(8)
_LAST = {"axes": [-1], "keepdims": 1}


@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize("root", ["Sqrt", "Pow"])
@pytest.mark.parametrize("twice", [False, True])
def test_layer_norm(square: str, root: str, twice: bool) -> None:
    second = "d2" if twice else "d"
    nodes: Nodes = [
        ("ReduceMean", ["x"], "m", _LAST),
        ("Sub", ["x", "m"], "d", {}),
        *([("Sub", ["x", "m"], "d2", {})] if twice else []),
        ("Pow", [second, "two"], "s", {}) if square == "Pow" else ("Mul", [second, second], "s", {}),
        ("ReduceMean", ["s"], "v", _LAST),
        ("Add", ["v", "eps"], "e", {}),
        ("Sqrt", ["e"], "r", {}) if root == "Sqrt" else ("Pow", ["e", "half"], "r", {}),
        ("Div", ["d", "r"], "n", {}),
        ("Mul", ["n", "scale"], "w", {}),
        ("Add", ["w", "bias"], "y", {}),
    ]
    numbers = {"two": 2.0, "half": 0.5, "eps": 1e-5, "scale": _SCALE, "bias": _BIAS}
    model = imported(nodes, numbers, (2, 5, 8))
    (norm,) = [layer for layer in model.module.modules() if isinstance(layer, nn.LayerNorm)]
    assert norm.eps == pytest.approx(1e-5) and norm.bias is not None
    assert len(model.module.steps) == 1  # type: ignore[arg-type]


def test_layer_norm_whose_parts_are_read_elsewhere_stays_apart() -> None:
    nodes: Nodes = [
        ("ReduceMean", ["x"], "m", _LAST),
        ("Sub", ["x", "m"], "d", {}),
        ("Pow", ["d", "two"], "s", {}),
        ("ReduceMean", ["s"], "v", _LAST),
        ("Add", ["v", "eps"], "e", {}),
        ("Sqrt", ["e"], "r", {}),
        ("Div", ["d", "r"], "n", {}),
        ("Mul", ["n", "scale"], "w", {}),
        ("Add", ["w", "r"], "y", {}),
    ]
    model = imported(nodes, {"two": 2.0, "eps": 1e-5, "scale": _SCALE}, (2, 5, 8))
    assert not any(isinstance(layer, nn.LayerNorm) for layer in model.module.modules())


@pytest.mark.parametrize("form", ["div", "reciprocal", "one over"])
def test_rms_norm(form: str) -> None:
    ends: dict[str, Nodes] = {
        "div": [("Div", ["x", "r"], "n", {})],
        "reciprocal": [("Reciprocal", ["r"], "i", {}), ("Mul", ["x", "i"], "n", {})],
        "one over": [("Div", ["one", "r"], "i", {}), ("Mul", ["i", "x"], "n", {})],
    }
    nodes: Nodes = [
        ("Pow", ["x", "two"], "s", {}),
        ("ReduceMean", ["s"], "v", _LAST),
        ("Add", ["v", "eps"], "e", {}),
        ("Sqrt", ["e"], "r", {}),
        *ends[form],
        ("Mul", ["scale", "n"], "y", {}),
    ]
    numbers = {"one": 1.0, "two": 2.0, "eps": 1e-6, "scale": _SCALE}
    model = imported(nodes, numbers, (2, 5, 8))
    assert [type(layer) for layer in model.module.children()] == [nn.RMSNorm] or any(
        isinstance(layer, nn.RMSNorm) for layer in model.module.modules()
    )


_ERF: Nodes = [("Div", ["x", "root"], "d", {}), ("Erf", ["d"], "e", {}), ("Add", ["e", "one"], "a", {})]
_TANH: Nodes = [
    ("Pow", ["x", "three"], "p", {}),
    ("Mul", ["p", "cubic"], "q", {}),
    ("Add", ["x", "q"], "s", {}),
    ("Mul", ["s", "slope"], "t", {}),
    ("Tanh", ["t"], "h", {}),
    ("Add", ["one", "h"], "a", {}),
]
_ENDS: dict[str, Nodes] = {
    "half last": [("Mul", ["x", "a"], "m", {}), ("Mul", ["m", "half"], "y", {})],
    "half first": [("Mul", ["half", "x"], "m", {}), ("Mul", ["m", "a"], "y", {})],
    "half inside": [("Mul", ["a", "half"], "m", {}), ("Mul", ["x", "m"], "y", {})],
    "divided": [("Mul", ["x", "a"], "m", {}), ("Div", ["m", "two"], "y", {})],
}


@pytest.mark.parametrize("end", _ENDS)
@pytest.mark.parametrize("start", ["none", "tanh"])
def test_gelu(start: str, end: str) -> None:
    numbers = {"one": 1.0, "two": 2.0, "half": 0.5, "three": 3.0}
    numbers |= {"root": math.sqrt(2), "cubic": 0.044715, "slope": math.sqrt(2 / math.pi)}
    nodes = (_ERF if start == "none" else _TANH) + _ENDS[end]
    model = imported(nodes, numbers, (2, 8))
    (gelu,) = [layer for layer in model.module.modules() if isinstance(layer, nn.GELU)]
    assert gelu.approximate == start


def test_swish_and_mish() -> None:
    swish = imported([("Sigmoid", ["x"], "s", {}), ("Mul", ["x", "s"], "y", {})], {}, (2, 8))
    assert any(isinstance(layer, nn.SiLU) for layer in swish.module.modules())
    nodes: Nodes = [("Softplus", ["x"], "s", {}), ("Tanh", ["s"], "t", {}), ("Mul", ["x", "t"], "y", {})]
    assert any(isinstance(layer, nn.Mish) for layer in imported(nodes, {}, (2, 8)).module.modules())


class _Block(nn.Module):
    """A transformer block as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.reshape(y.shape[0], -1, 2, 8).transpose(1, 2)

        y = self.first(x)
        query, key, value = heads(self.q(y)), heads(self.k(y)), heads(self.v(y))
        shares = torch.softmax(query @ key.transpose(2, 3) / math.sqrt(8), -1)
        x = x + self.out((shares @ value).transpose(1, 2).reshape(x.shape))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


@pytest.mark.parametrize("opset", [13, 18])
def test_a_transformer_block_comes_back_as_its_layers(opset: int) -> None:
    torch.manual_seed(0)
    block, file = _Block().eval(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter is deprecated; files of it are everywhere
        torch.onnx.export(
            block, (torch.randn(2, 5, 16),), file, dynamo=False, opset_version=opset, input_names=["x"]
        )
    if opset == 13:
        kinds = {node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node}
        assert "LayerNormalization" not in kinds and "Erf" in kinds
    model = import_onnx_bytes(file.getvalue(), source="block")
    found = dict(model.module.named_modules())
    for name in ("q", "k", "v", "out", "up", "down"):
        assert isinstance(found[name], nn.Linear), name
    assert [isinstance(layer, nn.LayerNorm) for layer in found.values()].count(True) == 2
    assert any(isinstance(layer, nn.GELU) for layer in found.values())
    x = torch.randn(2, 5, 16)
    assert torch.allclose(model.module(x), block(x), atol=1e-5)


@pytest.mark.parametrize("opset", [13, 20])
def test_group_norm(opset: int) -> None:
    torch.manual_seed(0)
    norm, file = nn.GroupNorm(2, 6).eval(), io.BytesIO()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(norm, (torch.randn(2, 6, 4, 4),), file, dynamo=False, opset_version=opset)
    model = import_onnx_bytes(file.getvalue(), source="norm")
    (back,) = [layer for layer in model.module.modules() if isinstance(layer, nn.GroupNorm)]
    assert back.num_groups == 2 and torch.allclose(back.weight, norm.weight)
