"""ONNX comes in as ordinary layers that compute the same, and hostile or unknown files are refused."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from featherweight.errors import LoadError, MissingRuntime
from featherweight.exchange.onnx_in import import_onnx, import_onnx_bytes, supported_operators
from featherweight.exchange.onnx_in import operators as table
from featherweight.exchange.onnx_in.node import Call
from featherweight.graph import trace
from featherweight.runtime import Runtime
from nets import NETS

onnxruntime = pytest.importorskip("onnxruntime")


# --- whole networks ---------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter logs what it skips; other tests see to its level."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def exported() -> Callable[[str], bytes]:
    """A golden net as torch.onnx exports it, once per session."""
    done: dict[str, bytes] = {}

    def export(name: str) -> bytes:
        if name not in done:
            module, x = NETS[name]()
            with warnings.catch_warnings(), quiet():
                warnings.simplefilter("ignore")  # the exporter warns of its own internals
                program = torch.onnx.export(
                    module,
                    (x,),
                    dynamo=True,
                    opset_version=18,
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
                    verbose=False,
                )
            assert program is not None
            done[name] = program.model_proto.SerializeToString()
        return done[name]

    return export


@pytest.mark.parametrize("name", NETS)
def test_golden_net_comes_back_the_same(name: str, exported: Callable[[str], bytes]) -> None:
    original, x = NETS[name]()
    model = import_onnx_bytes(exported(name), source=f"{name}.onnx")
    entry = model.entries["forward"]
    assert entry.dynamic_axes == {entry.input_names[0]: {0: "batch"}}
    other = torch.cat([x, x + 1, x - 1])[:5]
    with torch.no_grad():
        torch.testing.assert_close(model.module(other), original(other), rtol=1e-4, atol=1e-5)

    copied = copy.deepcopy(model.module)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    copied.load_state_dict(model.module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(copied(other), original(other), rtol=1e-4, atol=1e-5)

    copied.train()
    copied(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in copied.parameters())


@pytest.mark.parametrize("name", ["shuffle", "attention", "lstm"])
def test_import_is_traced_again_with_an_open_batch(name: str, exported: Callable[[str], bytes]) -> None:
    original, x = NETS[name]()
    graph = trace(import_onnx_bytes(exported(name), source=name))
    other = torch.cat([x, x + 1, x - 1])[:5]
    with torch.no_grad():
        torch.testing.assert_close(graph.program.module()(other), original(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "opset"), [("shuffle", 11), ("depthwise", 17), ("attention", 15)])
def test_files_of_the_older_exporter(name: str, opset: int) -> None:
    original, x = NETS[name]()
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            original,
            (x,),
            file,
            dynamo=False,
            opset_version=opset,
            input_names=["image"],
            output_names=["scores"],
            dynamic_axes={"image": {0: "n"}, "scores": {0: "n"}},
        )
    model = import_onnx_bytes(file.getvalue(), source=name)
    entry = model.entries["forward"]
    assert (entry.input_names, entry.output_names) == (("image",), ("scores",))
    assert entry.dynamic_axes == {"image": {0: "n"}}
    with torch.no_grad():
        torch.testing.assert_close(model.module(x), original(x), rtol=1e-4, atol=1e-5)


def test_layers_have_the_names_and_types_of_the_source(exported: Callable[[str], bytes]) -> None:
    layers = dict(import_onnx_bytes(exported("residual"), source="r").module.named_modules())
    assert isinstance(layers["stem.0"], nn.Conv2d)
    assert isinstance(layers["layer2.conv1"], nn.Conv2d)
    assert isinstance(layers["head"], nn.Linear)
    attention = dict(import_onnx_bytes(exported("attention"), source="a").module.named_modules())
    assert isinstance(attention["qkv"], nn.Linear)  # MatMul and Add
    assert attention["qkv"].bias is not None
    assert isinstance(attention["norm1"], nn.LayerNorm)
    depthwise = import_onnx_bytes(exported("depthwise"), source="d").module
    assert sum(isinstance(layer, nn.ReLU6) for layer in depthwise.modules()) == 8


def test_one_layer_called_twice_stays_one_and_tied_weights_stay_tied(
    exported: Callable[[str], bytes],
) -> None:
    original, _ = NETS["shared"]()
    module = import_onnx_bytes(exported("shared"), source="s").module
    convs = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convs) == 2  # stem and block, though block runs twice
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    assert len({id(layer.weight) for layer in linears}) == len(linears) - 1
    count = sum(parameter.numel() for parameter in original.parameters())
    assert sum(p.numel() for p in module.parameters()) <= count


def test_key_is_of_the_content(exported: Callable[[str], bytes]) -> None:
    first = import_onnx_bytes(exported("linear3d"), source="one")
    again = import_onnx_bytes(exported("linear3d"), source="two")
    other = import_onnx_bytes(exported("shared"), source="one")
    assert first.key == again.key != other.key


# --- operators one by one -----------------------------------------------------------------------------


class Constant:
    """An input that is an initializer."""

    def __init__(self, array: Any, dtype: Any = np.float32) -> None:
        self.array = np.asarray(array, dtype)


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape) + sum(shape)).standard_normal(shape).astype(np.float32)


def _weight(*shape: int) -> Constant:
    return Constant(_random(*shape) * 0.5)


def _ids(*values: int) -> Constant:
    return Constant(values, np.int64)


_KINDS = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}


def make_model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, np.ndarray],
    constants: dict[str, np.ndarray],
    outputs: list[str],
    opset: int = 17,
    *,
    batch: bool = True,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(
                name, _KINDS[value.dtype], ["N" if batch else value.shape[0], *value.shape[1:]]
            )
            for name, value in inputs.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


_X = _random(2, 4, 9, 7)
_V = _random(2, 6, 5)
_POSITIVE = np.abs(_X) + 0.1
_WHOLE = np.arange(2 * 6, dtype=np.int64).reshape(2, 6)

# operator, inputs, attributes, opset
CASES: list[tuple[str, list[np.ndarray | Constant | None], dict[str, Any], int]] = [
    ("Conv", [_X, _weight(6, 4, 3, 3), _weight(6)], {"pads": [1, 1, 1, 1], "strides": [2, 1]}, 17),
    ("Conv", [_X, _weight(6, 4, 3, 2)], {"pads": [0, 1, 2, 0]}, 17),
    ("Conv", [_X, _weight(8, 1, 3, 3)], {"group": 4, "dilations": [2, 2]}, 17),
    ("Conv", [_X, _weight(8, 1, 3, 2)], {"group": 4, "auto_pad": "SAME_UPPER"}, 17),
    ("Conv", [_X, _weight(6, 4, 3, 3)], {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, 17),
    ("Conv", [_X, _weight(6, 4, 3, 3)], {"auto_pad": "VALID"}, 11),
    ("Conv", [_V, _weight(3, 6, 3)], {"pads": [1, 1]}, 17),
    ("Conv", [_random(2, 2, 4, 5, 4), _weight(3, 2, 2, 3, 2)], {}, 17),
    ("ConvTranspose", [_X, _weight(4, 3, 3, 3), _weight(3)], {"strides": [2, 2], "pads": [1, 1, 1, 1]}, 17),
    ("ConvTranspose", [_X, _weight(4, 3, 3, 3)], {"strides": [2, 2], "pads": [0, 1, 1, 0]}, 17),
    ("ConvTranspose", [_X, _weight(4, 3, 3, 3)], {"strides": [2, 2], "output_padding": [1, 1]}, 17),
    ("ConvTranspose", [_X, _weight(4, 2, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}, 17),
    ("Gemm", [_random(2, 6), _weight(6, 3), _weight(3)], {}, 17),
    ("Gemm", [_random(2, 6), _weight(3, 6)], {"transB": 1}, 17),
    ("Gemm", [_random(2, 6), _weight(3, 6), _weight(1)], {"transB": 1, "alpha": 0.5, "beta": 2.0}, 17),
    ("MatMul", [_V, _weight(5, 3)], {}, 17),
    ("MatMul", [_V, _random(2, 5, 4)], {}, 17),
    ("MatMul", [_V, _weight(5)], {}, 17),
    ("Einsum", [_V, _random(2, 5, 4)], {"equation": "bij,bjk->bik"}, 17),
    (
        "BatchNormalization",
        [_X, _weight(4), _weight(4), _weight(4), Constant([0.5, 1, 2, 3])],
        {"epsilon": 1e-3},
        17,
    ),
    ("BatchNormalization", [_V, _weight(6), _weight(6), _weight(6), Constant(np.ones(6))], {}, 9),
    ("LayerNormalization", [_V, _weight(5), _weight(5)], {}, 17),
    ("LayerNormalization", [_X, _weight(9, 7)], {"axis": -2, "epsilon": 1e-3}, 17),
    ("InstanceNormalization", [_X, _weight(4), _weight(4)], {}, 17),
    ("GroupNormalization", [_X, _weight(4), _weight(4)], {"num_groups": 2}, 21),
    ("LpNormalization", [_V], {"axis": 1}, 17),
    ("LRN", [_X], {"size": 3, "alpha": 0.1}, 17),
    ("Relu", [_X], {}, 17),
    ("LeakyRelu", [_X], {"alpha": 0.2}, 17),
    ("PRelu", [_X, Constant(np.full((4, 1, 1), 0.3))], {}, 17),
    ("PRelu", [_X, _weight(7)], {}, 17),
    ("Clip", [_X, Constant(0.0), Constant(6.0)], {}, 17),
    ("Clip", [_X, None, Constant(0.5)], {}, 17),
    ("Clip", [_X], {"min": -0.5, "max": 0.5}, 7),
    ("Sigmoid", [_X], {}, 17),
    ("HardSigmoid", [_X], {"alpha": 1 / 6, "beta": 0.5}, 17),
    ("HardSigmoid", [_X], {}, 17),
    ("HardSwish", [_X * 3], {}, 17),
    ("Tanh", [_X], {}, 17),
    ("Elu", [_X], {"alpha": 0.7}, 17),
    ("Celu", [_X], {"alpha": 0.7}, 17),
    ("Selu", [_X], {}, 17),
    ("Softplus", [_X], {}, 17),
    ("Softsign", [_X], {}, 17),
    ("ThresholdedRelu", [_X], {"alpha": 0.3}, 17),
    ("Mish", [_X], {}, 18),
    ("Gelu", [_X], {}, 20),
    ("Gelu", [_X], {"approximate": "tanh"}, 20),
    ("Softmax", [_X], {"axis": 1}, 17),
    ("Softmax", [_X], {"axis": 1}, 11),
    ("LogSoftmax", [_V], {}, 17),
    ("Erf", [_X], {}, 17),
    ("Exp", [_X], {}, 17),
    ("Log", [_POSITIVE], {}, 17),
    ("Sqrt", [_POSITIVE], {}, 17),
    ("Reciprocal", [_POSITIVE], {}, 17),
    ("Abs", [_X], {}, 17),
    ("Neg", [_X], {}, 17),
    ("Sign", [_X], {}, 17),
    ("Floor", [_X * 3], {}, 17),
    ("Ceil", [_X * 3], {}, 17),
    ("Round", [_X * 3], {}, 17),
    ("Sin", [_X], {}, 17),
    ("Cos", [_X], {}, 17),
    ("Pow", [_POSITIVE, Constant(2.5)], {}, 17),
    ("Pow", [_X, _ids(2)], {}, 17),
    ("Add", [_X, _weight(4, 1, 1)], {}, 17),
    ("Sub", [Constant(1.0), _X], {}, 17),
    ("Mul", [_X, _X], {}, 17),
    ("Div", [_X, Constant(3.0)], {}, 17),
    ("Div", [_WHOLE - 5, _ids(3)], {}, 17),
    ("Mod", [_WHOLE - 5, _ids(3)], {}, 17),
    ("Mod", [_X, Constant(0.7)], {"fmod": 1}, 17),
    ("Min", [_X, Constant(0.2), _weight(7)], {}, 17),
    ("Max", [_X, Constant(0.2)], {}, 17),
    ("Sum", [_X, _X, _weight(7)], {}, 17),
    ("Mean", [_X, _X, _weight(7)], {}, 17),
    ("GlobalAveragePool", [_X], {}, 17),
    ("GlobalMaxPool", [_X], {}, 17),
    ("AveragePool", [_X], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 17),
    ("AveragePool", [_X], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}, 17),
    ("AveragePool", [_X], {"kernel_shape": [3, 3], "pads": [0, 1, 2, 0]}, 17),
    ("AveragePool", [_X], {"kernel_shape": [3, 3], "pads": [0, 1, 2, 0], "count_include_pad": 1}, 17),
    ("AveragePool", [_X], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, 19),
    ("AveragePool", [_X], {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}, 17),
    ("MaxPool", [_X], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 17),
    ("MaxPool", [_X], {"kernel_shape": [3, 3], "pads": [0, 0, 1, 1], "strides": [2, 2]}, 17),
    ("MaxPool", [_X], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, 17),
    ("MaxPool", [_X - 5], {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"}, 17),
    ("MaxPool", [_V], {"kernel_shape": [3], "dilations": [2]}, 17),
    ("LpPool", [_X], {"kernel_shape": [2, 2], "p": 2}, 18),
    ("Flatten", [_X], {}, 17),
    ("Flatten", [_X], {"axis": 2}, 17),
    ("Reshape", [_X, _ids(0, -1, 7)], {}, 17),
    ("Transpose", [_X], {"perm": [0, 2, 3, 1]}, 17),
    ("Concat", [_X, _X], {"axis": 1}, 17),
    ("Split", [_X], {"axis": 1, "split": [1, 3]}, 11),
    ("Split", [_X, _ids(1, 3)], {"axis": 1}, 17),
    ("Slice", [_X, _ids(1, -4), _ids(9, -1), _ids(2, 3)], {}, 17),
    ("Slice", [_X, _ids(-1), _ids(np.iinfo(np.int64).min), _ids(2), _ids(-2)], {}, 17),
    ("Slice", [_X], {"starts": [1], "ends": [1 << 40], "axes": [1]}, 9),
    ("Gather", [_X, Constant(-1, np.int64)], {"axis": 1}, 17),
    ("Gather", [_X, Constant([[0, 2], [1, -1]], np.int64)], {"axis": 2}, 17),
    ("Gather", [_weight(12, 3), _WHOLE], {}, 17),
    ("GatherElements", [_random(2, 6), _WHOLE % 6], {"axis": 1}, 17),
    ("Squeeze", [_random(2, 1, 3, 1)], {"axes": [1]}, 11),
    ("Squeeze", [_random(2, 1, 3, 1), _ids(-1, 1)], {}, 17),
    ("Unsqueeze", [_V], {"axes": [1]}, 11),
    ("Unsqueeze", [_V, _ids(0, -1)], {}, 17),
    ("Expand", [_random(2, 1, 3), _ids(1, 4, 3)], {}, 17),
    ("Tile", [_V, _ids(1, 2, 3)], {}, 17),
    ("Pad", [_X], {"pads": [0, 0, 1, 2, 0, 0, 0, 3], "value": 0.5}, 9),
    ("Pad", [_X, _ids(0, 1, 1, 2, 0, 0, 0, 3), Constant(0.5)], {}, 17),
    ("Pad", [_X, _ids(0, 0, 1, 2, 0, 0, 3, 3)], {"mode": "reflect"}, 17),
    ("Pad", [_X, _ids(0, 0, 1, 2, 0, 0, 3, 3)], {"mode": "edge"}, 17),
    ("Pad", [_X, _ids(1, 2), None, _ids(-1)], {}, 18),
    ("ReduceMean", [_X], {"axes": [2, 3], "keepdims": 0}, 17),
    ("ReduceMean", [_X, _ids(-1)], {}, 18),
    ("ReduceSum", [_X, _ids(1)], {"keepdims": 0}, 17),
    ("ReduceMax", [_X], {"axes": [1]}, 17),
    ("ReduceMin", [_X], {"axes": [1, 2], "keepdims": 0}, 17),
    ("ReduceProd", [_V], {"axes": [1]}, 17),
    ("ReduceL1", [_V], {"axes": [1]}, 17),
    ("ReduceL2", [_V], {"axes": [1]}, 17),
    ("ReduceSumSquare", [_V], {"axes": [1]}, 17),
    ("ReduceLogSumExp", [_V], {"axes": [1]}, 17),
    ("ArgMax", [_X], {"axis": 1, "keepdims": 0}, 17),
    ("ArgMin", [_X], {"axis": -1}, 17),
    ("TopK", [_V, _ids(2)], {"axis": 1}, 17),
    ("CumSum", [_V, Constant(1, np.int64)], {}, 17),
    ("Trilu", [_V, Constant(1, np.int64)], {"upper": 0}, 17),
    ("OneHot", [_WHOLE % 5, _ids(5), Constant([0.0, 2.0])], {"axis": 1}, 17),
    ("DepthToSpace", [_X], {"blocksize": 2}, 17),
    ("DepthToSpace", [_X], {"blocksize": 2, "mode": "CRD"}, 17),
    ("SpaceToDepth", [_random(2, 3, 4, 6)], {"blocksize": 2}, 17),
    ("Resize", [_X, None, Constant([1, 1, 2, 3])], {"mode": "nearest"}, 17),
    (
        "Resize",
        [_X, None, Constant([1, 1, 2, 2])],
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        17,
    ),
    ("Resize", [_X, None, Constant([1, 1, 0.6, 1.7])], {"mode": "nearest"}, 17),
    ("Resize", [_X, None, Constant([1, 1, 2, 1.5])], {"mode": "linear"}, 17),
    (
        "Resize",
        [_X, None, Constant([1, 1, 2, 2])],
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        17,
    ),
    (
        "Resize",
        [_X, None, Constant([1, 1, 2, 2])],
        {"mode": "linear", "coordinate_transformation_mode": "asymmetric"},
        17,
    ),
    ("Resize", [_X, None, Constant([1, 1, 2, 2])], {"mode": "cubic"}, 17),
    ("Upsample", [_X, Constant([1, 1, 2, 2])], {"mode": "nearest"}, 9),
    ("Dropout", [_X], {"ratio": 0.3}, 11),
    ("Identity", [_X], {}, 17),
]


def _outputs_of(op: str) -> list[str]:
    return ["y", "z"] if op in ("Split", "TopK") else ["y"]


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "opset"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)]
)
def test_operator(
    op: str, inputs: list[np.ndarray | Constant | None], attributes: dict[str, Any], opset: int
) -> None:
    names = ["" if item is None else f"i{index}" for index, item in enumerate(inputs)]
    moving = {n: item for n, item in zip(names, inputs, strict=True) if isinstance(item, np.ndarray)}
    fixed = {n: item.array for n, item in zip(names, inputs, strict=True) if isinstance(item, Constant)}
    outputs = _outputs_of(op)
    node = helper.make_node(op, names, outputs, name="the_node", **attributes)
    content = make_model([node], moving, fixed, outputs, opset).SerializeToString()
    # import_onnx_bytes compares with ONNX Runtime at the examples and at a batch of three
    examples = tuple(torch.from_numpy(value) for value in moving.values())
    model = import_onnx_bytes(content, source="op.onnx", examples=examples)

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    expected = session.run(None, moving)
    with torch.no_grad():
        found = model.module(*examples)
    for ours, theirs in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-5)


def test_comparisons_and_logic() -> None:
    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["a"]),
        helper.make_node("Less", ["x", "one"], ["b"]),
        helper.make_node("And", ["a", "b"], ["c"]),
        helper.make_node("Not", ["c"], ["d"]),
        helper.make_node("Equal", ["x", "x"], ["e"]),
        helper.make_node("Xor", ["d", "e"], ["f"]),
        helper.make_node("Where", ["f", "x", "zero"], ["g"]),
        helper.make_node("Cast", ["f"], ["h"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["g", "h"], ["y"]),
    ]
    constants = {"zero": np.zeros((), np.float32), "one": np.ones((), np.float32)}
    content = make_model(nodes, {"x": _X}, constants, ["y"]).SerializeToString()
    import_onnx_bytes(content, source="logic", examples=(torch.from_numpy(_X),))


def test_shape_arithmetic_keeps_the_batch_open() -> None:
    """Reshape to (batch, heads, -1) computed by Shape, Gather, Mul, Div, Unsqueeze, Cast and Concat."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "i0"], ["n"]),
        helper.make_node("Gather", ["s", "i1"], ["c"]),
        helper.make_node("Mul", ["c", "two"], ["c2"]),
        helper.make_node("Div", ["c2", "four"], ["half"]),
        helper.make_node("Cast", ["half"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Floor", ["f"], ["g"]),
        helper.make_node("Cast", ["g"], ["h"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["n", "axis"], ["n1"]),
        helper.make_node("Unsqueeze", ["h", "axis"], ["h1"]),
        helper.make_node("Concat", ["n1", "h1", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("ConstantOfShape", ["n1"], ["zeros"]),
        helper.make_node("Unsqueeze", ["zeros", "tail"], ["column"]),
        helper.make_node("Add", ["r", "column"], ["y"]),
    ]
    constants = {
        "i0": np.array(0),
        "i1": np.array(1),
        "two": np.array(2),
        "four": np.array(4),
        "axis": np.array([0]),
        "rest": np.array([-1]),
        "tail": np.array([1, 2]),
    }
    content = make_model(nodes, {"x": _X}, constants, ["y"]).SerializeToString()
    model = import_onnx_bytes(content, source="shape", examples=(torch.from_numpy(_X),))
    program = trace(model).program.module()
    assert program(torch.randn(5, 4, 9, 7)).shape == (5, 2, 126)
    assert [name for name, _ in model.module.named_buffers()] == []  # all folded, nothing stored


def test_recurrent_layers_become_torchs_own() -> None:
    rng = np.random.default_rng(0)
    for op, gates in (("LSTM", 4), ("GRU", 3)):
        weights = {
            "w": rng.standard_normal((2, gates * 5, 3)).astype(np.float32),
            "r": rng.standard_normal((2, gates * 5, 5)).astype(np.float32),
            "b": rng.standard_normal((2, gates * 10)).astype(np.float32),
        }
        attributes = {"hidden_size": 5, "direction": "bidirectional"}
        if op == "GRU":
            attributes["linear_before_reset"] = 1
        nodes = [
            helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
            helper.make_node(op, ["t", "w", "r", "b"], ["y", "h"], **attributes),
        ]
        content = make_model(nodes, {"x": _random(2, 7, 3)}, weights, ["y", "h"]).SerializeToString()
        model = import_onnx_bytes(content, source=op, examples=(torch.from_numpy(_random(2, 7, 3)),))
        kinds = [type(layer) for layer in model.module.modules()]
        assert getattr(nn, op) in kinds


def test_the_table_has_what_cnns_need() -> None:
    assert len(supported_operators()) >= 60


# --- what is refused ------------------------------------------------------------------------------------


def _relu_model(**extra: Any) -> onnx.ModelProto:
    node = helper.make_node("Relu", ["x"], ["y"], name="the_relu")
    return make_model([node], {"x": _V}, {}, ["y"], **extra)


def _linear_model(weight: np.ndarray) -> onnx.ModelProto:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="the_product")
    return make_model([node], {"x": _V}, {"w": weight}, ["y"])


def _refusal(model: onnx.ModelProto | bytes, tmp_path: Path) -> LoadError:
    path = tmp_path / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with pytest.raises(LoadError) as caught:
        import_onnx(path)
    assert caught.value.fix
    return caught.value


def test_unknown_operator_is_named_with_its_node(tmp_path: Path) -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="odd_one", domain="com.acme")
    error = _refusal(make_model([node], {"x": _V}, {}, ["y"]), tmp_path)
    assert "com.acme.Frobnicate" in error.what
    assert "odd_one" in (error.where or "")
    assert "Conv" in (error.fix or "")


def test_a_wrong_import_names_the_first_node_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(table.OPERATORS, ("", "Tanh"), lambda _: Call(torch.sin))
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="first"),
        helper.make_node("Tanh", ["a"], ["b"], name="second"),
        helper.make_node("Exp", ["b"], ["y"], name="third"),
    ]
    error = _refusal(make_model(nodes, {"x": _V}, {}, ["y"]), tmp_path)
    assert "something else than ONNX Runtime" in error.what
    assert "second" in (error.where or "")
    assert "Tanh" in (error.where or "")


def test_without_onnxruntime_the_pip_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "installed", classmethod(lambda cls: False))
    path = tmp_path / "model.onnx"
    path.write_bytes(_relu_model().SerializeToString())
    with pytest.raises(MissingRuntime, match="pip install"):
        import_onnx(path)


def test_nan_weights_are_named(tmp_path: Path) -> None:
    weight = np.ones((5, 3), np.float32)
    weight[1, 1] = np.nan
    assert "1 NaN" in _refusal(_linear_model(weight), tmp_path).what


def test_truncated_and_random_bytes(tmp_path: Path) -> None:
    content = _linear_model(np.ones((5, 3), np.float32)).SerializeToString()
    for broken in (content[:-9], b"\x93NUMPY garbage" * 9, b"hello, this is text\n" * 20):
        assert "model.onnx" in _refusal(broken, tmp_path).what


def test_cycle(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    assert "cycle" in _refusal(make_model(nodes, {"x": _V}, {}, ["b"]), tmp_path).what


def test_a_value_that_nothing_makes_and_one_made_twice(tmp_path: Path) -> None:
    missing = [helper.make_node("Add", ["x", "nowhere"], ["y"])]
    assert "'nowhere'" in _refusal(make_model(missing, {"x": _V}, {}, ["y"]), tmp_path).what
    twice = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Tanh", ["x"], ["y"])]
    assert "twice" in _refusal(make_model(twice, {"x": _V}, {}, ["y"]), tmp_path).what


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "link.bin"])
def test_external_data_outside_the_folder(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(60))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = _linear_model(np.ones((5, 3), np.float32))
    _point_outside(model.graph.initializer[0], location)
    assert "outside the model's folder" in _refusal(model, folder).what


def _point_outside(tensor: TensorProto, location: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value=location)


def test_external_data_that_is_absent_or_short(tmp_path: Path) -> None:
    model = _linear_model(np.ones((5, 3), np.float32))
    _point_outside(model.graph.initializer[0], "weights.bin")
    assert "not there" in _refusal(model, tmp_path).what
    (tmp_path / "weights.bin").write_bytes(bytes(10))
    assert "which has 10" in _refusal(model, tmp_path).what


def test_external_data_beside_the_model_counts_in_the_key(tmp_path: Path) -> None:
    model = _linear_model(np.ones((5, 3), np.float32))
    _point_outside(model.graph.initializer[0], "weights.bin")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    keys = []
    for value in (1.0, 2.0):
        (tmp_path / "weights.bin").write_bytes(np.full((5, 3), value, np.float32).tobytes())
        loaded = import_onnx(path)
        keys.append(loaded.key)
        assert float(next(loaded.module.parameters()).detach().mean()) == value
    assert keys[0] != keys[1]


def test_sizes_that_are_absurd_or_do_not_fit(tmp_path: Path) -> None:
    model = _linear_model(np.ones((5, 3), np.float32))
    model.graph.initializer[0].dims[:] = [1 << 40, 1 << 20]
    assert "bytes are there" in _refusal(model, tmp_path).what
    model.graph.initializer[0].dims[:] = [-5, 3]
    assert "shape" in _refusal(model, tmp_path).what
    huge = [helper.make_node("Tile", ["x", "times"], ["y"], name="bomb")]
    bomb = make_model(huge, {"x": _V}, {"times": np.array([1, 1 << 30, 1 << 30])}, ["y"])
    assert "makes a tensor of shape" in _refusal(bomb, tmp_path).what
    input_ = make_model([helper.make_node("Relu", ["x"], ["y"])], {"x": _V}, {}, ["y"])
    input_.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1 << 60
    assert "absurd" in _refusal(input_, tmp_path).what


def test_attributes_of_the_wrong_type_and_weights_of_the_wrong_shape(tmp_path: Path) -> None:
    node = helper.make_node("LeakyRelu", ["x"], ["y"], name="odd", alpha="text")
    error = _refusal(make_model([node], {"x": _V}, {}, ["y"]), tmp_path)
    assert "'alpha'" in error.what
    assert "odd" in (error.where or "")
    conv = helper.make_node("Conv", ["x", "w"], ["y"], name="c", strides=[0, 1])
    weights = {"w": np.ones((6, 4, 3, 3), np.float32)}
    assert "stride" in _refusal(make_model([conv], {"x": _X}, weights, ["y"]), tmp_path).what
    wide = {"w": np.ones((6, 9, 3, 3), np.float32)}
    conv = helper.make_node("Conv", ["x", "w"], ["y"], name="c")
    assert "Conv" in _refusal(make_model([conv], {"x": _X}, wide, ["y"]), tmp_path).what


def test_inputs_that_are_no_numbers_and_opsets_that_are_not_read(tmp_path: Path) -> None:
    model = _relu_model()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    assert "STRING" in _refusal(model, tmp_path).what
    assert "opset 3" in _refusal(_relu_model(opset=3), tmp_path).what


def test_examples_that_do_not_fit() -> None:
    content = _relu_model().SerializeToString()
    with pytest.raises(LoadError, match="takes float32"):
        import_onnx_bytes(content, source="m", examples=(torch.randn(2, 7, 5),))
    with pytest.raises(LoadError, match="not int64"):
        import_onnx_bytes(content, source="m", examples=(torch.zeros(2, 6, 5, dtype=torch.int64),))
    with pytest.raises(LoadError, match="takes 1 inputs"):
        import_onnx_bytes(content, source="m", examples=(torch.randn(2, 6, 5), torch.randn(2)))


def test_a_fixed_batch_stays_fixed() -> None:
    content = _relu_model(batch=False).SerializeToString()
    model = import_onnx_bytes(content, source="m", examples=(torch.randn(1, 6, 5),))
    assert model.entries["forward"].dynamic_axes == {}
    assert model.entries["forward"].example_inputs[0].shape == (2, 6, 5)


def test_open_sizes_get_a_usual_size_or_need_an_input_shape() -> None:
    model = _relu_model()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "length"
    usual = import_onnx_bytes(model.SerializeToString(), source="m").entries["forward"]
    assert usual.example_inputs[0].shape == (2, 6, 64)
    assert usual.dynamic_axes == {"x": {0: "N", 2: "length"}}
    odd = make_model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": _V}, {"w": _random(77, 2)}, ["y"])
    odd.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "length"
    with pytest.raises(LoadError, match="leaves its axes"):
        import_onnx_bytes(odd.SerializeToString(), source="m")
    loaded = import_onnx_bytes(model.SerializeToString(), source="m", examples=(torch.randn(2, 6, 8),))
    assert loaded.entries["forward"].dynamic_axes == {"x": {0: "N", 2: "length"}}


def test_a_function_that_calls_itself(tmp_path: Path) -> None:
    body = helper.make_node("Loop1", ["a"], ["b"], domain="local")
    function = helper.make_function("local", "Loop1", ["a"], ["b"], [body], [helper.make_opsetid("local", 1)])
    model = make_model([helper.make_node("Loop1", ["x"], ["y"], domain="local")], {"x": _V}, {}, ["y"])
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    assert "calls itself" in _refusal(model, tmp_path).what


def test_local_functions_are_inlined() -> None:
    body = helper.make_node("Relu", ["a"], ["b"])
    function = helper.make_function("local", "Act", ["a"], ["b"], [body], [helper.make_opsetid("", 17)])
    model = make_model([helper.make_node("Act", ["x"], ["y"], domain="local")], {"x": _V}, {}, ["y"])
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    loaded = import_onnx_bytes(model.SerializeToString(), source="m")
    assert any(isinstance(layer, nn.ReLU) for layer in loaded.module.modules())


def test_long_chains_do_not_recurse() -> None:
    nodes = [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in range(1500)]
    content = make_model(nodes, {"v0": _V}, {}, ["v1500"]).SerializeToString()
    loaded = import_onnx_bytes(content, source="m")
    assert len(loaded.module.steps) == 1500


def test_names_that_torch_cannot_take() -> None:
    weights = {"forward.weight": _random(6, 4, 3, 3), "0.weight": _random(4, 6, 3, 3), "a b/日本": _random(7)}
    nodes = [
        helper.make_node("Conv", ["x", "forward.weight"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "0.weight"], ["b"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["b"], ["c"], name="/" + "/".join(["deep"] * 300)),
        helper.make_node("Add", ["c", "a b/日本"], ["y"], name="..//.."),
    ]
    model = import_onnx_bytes(make_model(nodes, {"x": _X}, weights, ["y"]).SerializeToString(), source="m")
    for name, _ in model.module.named_parameters():
        assert all(part.isascii() and (part.isidentifier() or part.isdigit()) for part in name.split("."))
        assert not name[0].isdigit()
    assert [name for name, _ in model.module.named_children()][:2] == ["forward_", "layer_0"]
