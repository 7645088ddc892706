"""Families of operators against ONNX Runtime: attributes, shapes, axes and opsets are drawn by hypothesis."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.build import build_module
from featherweight.exchange.onnx_in.check import difference
from featherweight.exchange.onnx_in.operators import OPERATORS
from featherweight.exchange.onnx_in.operators.about import LAYERS, LIMITS
from featherweight.exchange.onnx_in.read import read_model
from featherweight.exchange.opaque import opaque_layers

_MICROSOFT = "com.microsoft"
Draw = Callable[[Any], Any]


@dataclass(frozen=True)
class Case:
    """One node: its inputs (None is an absent one), those that are constants, and its attributes."""

    op: str
    inputs: list[np.ndarray | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    constant: tuple[int, ...] = ()
    outputs: int = 1
    opset: int = 20
    domain: str = ""
    tolerance: float = 1e-4

    def model(self) -> onnx.ModelProto:
        names = ["" if value is None else f"in_{index}" for index, value in enumerate(self.inputs)]
        made = [f"out_{index}" for index in range(self.outputs)]
        node = helper.make_node(self.op, names, made, domain=self.domain, **self.attributes)
        given_ = [(index, value) for index, value in enumerate(self.inputs) if value is not None]
        graph = helper.make_graph(
            [node],
            "one",
            [
                helper.make_tensor_value_info(
                    names[index], helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
                )
                for index, value in given_
                if index not in self.constant
            ],
            [helper.make_empty_tensor_value_info(name) for name in made],
            [
                onnx.numpy_helper.from_array(value, names[index])
                for index, value in given_
                if index in self.constant
            ],
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(_MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def check(self) -> None:
        """Import it, run both, compare every output."""
        content = self.model().SerializeToString()
        fed = {
            f"in_{index}": value
            for index, value in enumerate(self.inputs)
            if value is not None and index not in self.constant
        }
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        expected = session.run(None, fed)
        tensors = [host.tensor_of(value) for value in fed.values()]
        module = build_module(read_model(content, "one.onnx"), tensors, traced=False).module
        assert not opaque_layers(module), "left to ONNX Runtime"
        with torch.no_grad():
            result = module(*tensors)
        results = result if isinstance(result, tuple) else (result,)
        for ours, theirs in zip(results, expected, strict=True):
            off = difference(host.array_of(ours), np.asarray(theirs))
            assert off <= self.tolerance, f"{self.op} is off by {off}"


def one_of(*names: str) -> st.SearchStrategy[str]:
    """One of the words."""
    return st.sampled_from(" ".join(names).split())


def normal(draw: Draw, *shape: int) -> np.ndarray:
    seed = draw(st.integers(0, 1 << 16))
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def shape_of(draw: Draw, low: int = 1, high: int = 4, size: int = 5) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, size), min_size=low, max_size=high)))


def integers(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


@st.composite
def unary(draw: Draw) -> Case:
    op = draw(
        one_of(
            "Abs Neg Exp Erf Sign Floor Ceil Round Sin Cos Tan Atan Sinh Cosh Asinh Relu Sigmoid",
            "Tanh Softplus Softsign HardSwish Mish Reciprocal Elu Selu Celu LeakyRelu",
            "ThresholdedRelu HardSigmoid Shrink Gelu Softmax LogSoftmax Hardmax LpNormalization",
            "IsNaN IsInf Identity Flatten",
        )
    )
    x = normal(draw, *shape_of(draw)) * 2
    attributes: dict[str, Any] = {}
    if op in ("Elu", "Celu", "LeakyRelu", "ThresholdedRelu", "HardSigmoid"):
        attributes["alpha"] = draw(st.sampled_from([0.1, 0.3, 1.0, 1.5]))
    if op == "Shrink":
        attributes = {"lambd": draw(st.sampled_from([0.3, 0.5])), "bias": draw(st.sampled_from([0.0, 0.3]))}
    if op == "Gelu":
        attributes["approximate"] = draw(st.sampled_from(["none", "tanh"]))
    if op in ("Softmax", "LogSoftmax", "Hardmax"):
        attributes["axis"] = draw(st.integers(-x.ndim, x.ndim - 1))
        return Case(op, [x], attributes, opset=draw(st.sampled_from([9, 11, 13, 20])) if x.ndim > 1 else 13)
    if op == "LpNormalization":
        attributes = {"axis": draw(st.integers(-x.ndim, x.ndim - 1)), "p": draw(st.sampled_from([1, 2]))}
    return Case(op, [x], attributes)


@st.composite
def domain_limited(draw: Draw) -> Case:
    op = draw(st.sampled_from(["Log", "Sqrt", "Asin", "Acos", "Atanh", "Acosh"]))
    x = np.abs(normal(draw, *shape_of(draw)))
    x = x + 1 if op == "Acosh" else np.minimum(x, 0.95) if op in ("Asin", "Acos", "Atanh") else x
    return Case(op, [x.astype(np.float32)])


@st.composite
def binary(draw: Draw) -> Case:
    op = draw(
        one_of(
            "Add Sub Mul Div Pow Equal Greater GreaterOrEqual Less LessOrEqual Min Max Sum Mean",
            "PRelu",
        )
    )
    shape = shape_of(draw)
    other = tuple(size if draw(st.booleans()) else 1 for size in shape)
    a, b = normal(draw, *shape), normal(draw, *other)
    if op == "Pow":
        a = np.abs(a) + 0.1
    if op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Equal") and draw(st.booleans()):
        kind = draw(
            st.sampled_from([np.int32, np.int64, np.uint32, np.uint64][: 4 if op in ("Min", "Max") else 2])
        )
        a, b = (np.abs(value * 9).astype(kind) + kind(1) for value in (a, b))
    return Case(
        op, [a, b], constant=(1,) if draw(st.booleans()) else (), opset=draw(st.sampled_from([13, 17]))
    )


@st.composite
def logical(draw: Draw) -> Case:
    op = draw(
        st.sampled_from(["And", "Or", "Xor", "Not", "Where", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Mod"])
    )
    shape = shape_of(draw)
    a, b = normal(draw, *shape), normal(draw, *shape)
    if op == "Not":
        return Case(op, [a > 0])
    if op == "Where":
        return Case(op, [a > 0, a, b])
    if op.startswith("Bitwise"):
        return Case(op, [(a * 50).astype(np.int32), (b * 50).astype(np.int32)])
    if op == "Mod":
        x, y = (
            (a * 50).astype(np.int64),
            (np.abs(b * 9).astype(np.int64) + 1) * draw(st.sampled_from([1, -1])),
        )
        return Case(op, [x, y], {"fmod": draw(st.sampled_from([0, 1]))})
    return Case(op, [a > 0, b > 0])


@st.composite
def cast(draw: Draw) -> Case:
    to = draw(st.sampled_from(["FLOAT16", "DOUBLE", "INT32", "INT64", "UINT8", "BOOL", "BFLOAT16"]))
    x = np.abs(normal(draw, *shape_of(draw)) * 9).astype(draw(st.sampled_from([np.float32, np.int32])))
    if to == "BFLOAT16":
        back = TensorProto.FLOAT
        return Case("Cast", [x.astype(np.float32)], {"to": back})
    return Case("Cast", [x], {"to": getattr(TensorProto, to)})


@st.composite
def clip(draw: Draw) -> Case:
    x = normal(draw, *shape_of(draw)) * 4
    low = np.float32(draw(st.sampled_from([-1.0, 0.0])))
    high = np.float32(draw(st.sampled_from([1.0, 6.0])))
    sides: list[np.ndarray | None] = [
        np.asarray(side) if draw(st.booleans()) else None for side in (low, high)
    ]
    return Case("Clip", [x, *sides], constant=(1, 2) if draw(st.booleans()) else ())


@st.composite
def reduction(draw: Draw) -> Case:
    op = draw(
        one_of(
            "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2",
            "ReduceSumSquare ReduceLogSum ReduceLogSumExp ArgMax ArgMin",
        )
    )
    x = np.abs(normal(draw, *shape_of(draw))) + 0.1
    keep = draw(st.sampled_from([0, 1]))
    if op.startswith("Arg"):
        axis = draw(st.integers(-x.ndim, x.ndim - 1))
        last = draw(st.sampled_from([0, 1]))
        return Case(op, [np.round(x)], {"axis": axis, "keepdims": keep, "select_last_index": last})
    axes = draw(st.lists(st.integers(0, x.ndim - 1), unique=True, max_size=x.ndim))
    opset = draw(st.sampled_from([11, 18]))
    if opset == 18 or op == "ReduceSum":
        wanted = integers(*axes)
        attributes = {"keepdims": keep, "noop_with_empty_axes": draw(st.sampled_from([0, 1])) if axes else 0}
        return Case(op, [x, wanted], attributes, constant=(1,) if draw(st.booleans()) else (), opset=18)
    return Case(op, [x], {"keepdims": keep, **({"axes": axes} if axes else {})}, opset=opset)


@st.composite
def convolution(draw: Draw) -> Case:
    rank, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    x = normal(draw, 2, 2 * groups, *[draw(st.integers(5, 7)) for _ in range(rank)])
    transposed = draw(st.booleans())
    weight = normal(draw, 2 * groups, 2, *kernel) if transposed else normal(draw, 3 * groups, 2, *kernel)
    bias = normal(draw, 2 * groups if transposed else 3 * groups) if draw(st.booleans()) else None
    attributes = {
        "group": groups,
        "strides": [draw(st.integers(1, 2)) for _ in range(rank)],
        "dilations": [draw(st.integers(1, 2)) for _ in range(rank)],
    }
    pads = draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID", "numbers"]))
    if pads == "numbers":
        attributes["pads"] = [draw(st.integers(0, 1)) for _ in range(2 * rank)]
    elif not transposed or pads == "VALID":
        attributes["auto_pad"] = pads
        attributes["dilations"] = [1] * rank if pads.startswith("SAME") else attributes["dilations"]
    constant = (1, 2) if draw(st.booleans()) else ()
    return Case("ConvTranspose" if transposed else "Conv", [x, weight, bias], attributes, constant)


@st.composite
def pool(draw: Draw) -> Case:
    op = draw(
        st.sampled_from(
            ["MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"]
        )
    )
    rank = draw(st.integers(1, 3))
    x = normal(draw, 2, 3, *[draw(st.integers(5, 8)) for _ in range(rank)])
    if op.startswith("Global"):
        return Case(op, [x], {"p": 2} if op == "GlobalLpPool" else {})
    attributes: dict[str, Any] = {
        "kernel_shape": [draw(st.integers(2, 3)) for _ in range(rank)],
        "strides": [draw(st.integers(1, 3)) for _ in range(rank)],
    }
    if draw(st.booleans()):
        attributes["pads"] = [draw(st.integers(0, 1)) for _ in range(2 * rank)]
    if op != "LpPool":
        attributes["ceil_mode"] = draw(st.sampled_from([0, 1]))
    if op == "AveragePool":
        attributes["count_include_pad"] = draw(st.sampled_from([0, 1]))
        if draw(st.booleans()):
            attributes["dilations"] = [draw(st.integers(1, 2)) for _ in range(rank)]
    return Case(op, [x], attributes, opset=draw(st.sampled_from([19, 20])))


@st.composite
def norm(draw: Draw) -> Case:
    op = draw(
        st.sampled_from(
            [
                "BatchNormalization",
                "InstanceNormalization",
                "LayerNormalization",
                "LRN",
                "MeanVarianceNormalization",
            ]
        )
    )
    x = normal(draw, 2, 4, *[draw(st.integers(2, 5)) for _ in range(draw(st.integers(1, 2)))])
    constant = tuple(range(1, 5)) if draw(st.booleans()) else ()
    epsilon = {"epsilon": draw(st.sampled_from([1e-5, 1e-2]))}
    if op == "BatchNormalization":
        moments = [normal(draw, 4), normal(draw, 4), normal(draw, 4), np.abs(normal(draw, 4)) + 0.1]
        return Case(op, [x, *moments], epsilon, constant)
    if op == "InstanceNormalization":
        return Case(op, [x, normal(draw, 4), normal(draw, 4)], epsilon, constant)
    if op == "LayerNormalization":
        axis = draw(st.integers(1, x.ndim - 1))
        shape = x.shape[axis:]
        bias = normal(draw, *shape) if draw(st.booleans()) else None
        outputs = draw(st.sampled_from([1, 3]))
        return Case(op, [x, normal(draw, *shape), bias], {"axis": axis, **epsilon}, constant, outputs)
    if op == "LRN":
        return Case(
            op,
            [x[..., None] if x.ndim == 3 else x],
            {"size": draw(st.sampled_from([1, 3])), "alpha": 0.01, "beta": 0.6, "bias": 1.5},
        )
    return Case(op, [x[..., None] if x.ndim == 3 else x])


@st.composite
def product(draw: Draw) -> Case:
    op = draw(st.sampled_from(["MatMul", "Gemm", "Einsum"]))
    n, k, m = (draw(st.integers(1, 5)) for _ in range(3))
    constant = (1, 2) if draw(st.booleans()) else ()
    if op == "MatMul":
        left = normal(draw, *shape_of(draw, 0, 2), n, k)
        if draw(st.booleans()):
            return Case(op, [normal(draw, n, k), normal(draw, 2, k, m)], constant=(0,) if constant else ())
        return Case(op, [left, normal(draw, k, m)], constant=constant)
    if op == "Einsum":
        return Case(op, [normal(draw, 2, n, k), normal(draw, 2, k, m)], {"equation": "bij,bjk->bik"})
    a_turned, b_turned = draw(st.booleans()), draw(st.booleans())
    a = normal(draw, *((k, n) if a_turned else (n, k)))
    b = normal(draw, *((m, k) if b_turned else (k, m)))
    c = draw(st.sampled_from([None, (m,), (1,), (n, m), (n, 1)]))
    attributes = {
        "transA": int(a_turned),
        "transB": int(b_turned),
        "alpha": draw(st.sampled_from([1.0, 0.5])),
    }
    return Case(op, [a, b, None if c is None else normal(draw, *c)], attributes, constant)


@st.composite
def recurrent(draw: Draw) -> Case:
    op, hidden = draw(st.sampled_from(["RNN", "LSTM", "GRU"])), draw(st.integers(2, 4))
    direction = draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    ways = 2 if direction == "bidirectional" else 1
    gates = {"RNN": 1, "LSTM": 4, "GRU": 3}[op]
    steps, batch, size = 5, 3, 2
    inputs: list[np.ndarray | None] = [
        normal(draw, steps, batch, size),
        normal(draw, ways, gates * hidden, size) * 0.5,
        normal(draw, ways, gates * hidden, hidden) * 0.5,
        normal(draw, ways, 2 * gates * hidden) if draw(st.booleans()) else None,
        np.array([5, 2, 4], np.int32) if draw(st.booleans()) else None,
        normal(draw, ways, batch, hidden) if draw(st.booleans()) else None,
    ]
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if op == "GRU":
        attributes["linear_before_reset"] = draw(st.sampled_from([0, 1]))
    if op == "LSTM":
        inputs.append(normal(draw, ways, batch, hidden) if draw(st.booleans()) else None)
        inputs.append(normal(draw, ways, 3 * hidden) if draw(st.booleans()) else None)
    if draw(st.booleans()):
        attributes["clip"] = 0.7
    if op == "RNN" and draw(st.booleans()):
        attributes["activations"] = ["Relu"] * ways
    if op == "LSTM" and draw(st.booleans()):
        attributes["activations"] = ["HardSigmoid", "Tanh", "Softsign"] * ways
        attributes["activation_alpha"], attributes["activation_beta"] = [0.3] * ways, [0.4] * ways
    constant = (1, 2, 3, 4, 7) if draw(st.booleans()) else ()
    return Case(op, inputs, attributes, constant, 3 if op == "LSTM" else 2, opset=14)


@st.composite
def resize(draw: Draw) -> Case:
    mode = draw(st.sampled_from(["nearest", "linear", "cubic"]))
    rule = draw(
        st.sampled_from(
            ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric"]
        )
    )
    rows, columns = draw(st.integers(4, 7)), draw(st.integers(4, 7))
    x = normal(draw, 1, 2, rows, columns)
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": rule}
    if mode == "nearest":
        attributes["nearest_mode"] = draw(
            st.sampled_from(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
        )
    if rule == "half_pixel_symmetric":  # its offset is noise around zero, which floor and ceil would show
        attributes.pop("nearest_mode", None)
    if mode == "cubic":
        attributes["cubic_coeff_a"] = draw(st.sampled_from([-0.75, -0.5]))
        attributes["exclude_outside"] = draw(st.sampled_from([0, 1]))
    constant = (2, 3) if draw(st.booleans()) else ()
    if draw(st.booleans()):
        scales = np.array(
            [1, 1, draw(st.sampled_from([0.5, 2, 3])), draw(st.sampled_from([1, 2, 1.5]))], np.float32
        )
        return Case("Resize", [x, None, scales], attributes, constant, opset=draw(st.sampled_from([13, 18])))
    sizes = integers(1, 2, draw(st.integers(2, 10)), draw(st.integers(2, 10)))
    return Case("Resize", [x, None, None, sizes], attributes, constant, opset=draw(st.sampled_from([13, 18])))


@st.composite
def picking(draw: Draw) -> Case:
    op = draw(
        one_of(
            "Gather GatherElements GatherND ScatterElements ScatterND TopK Trilu CumSum OneHot",
            "NonZero Compress ReverseSequence EyeLike",
        )
    )
    x = normal(draw, 4, 3, 5)
    axis = draw(st.integers(-3, 2))
    size = x.shape[axis]
    random = np.random.default_rng(draw(st.integers(0, 99)))
    constant = (1,) if draw(st.booleans()) else ()
    if op == "Gather":
        return Case(op, [x, random.integers(-size, size, (2, 2))], {"axis": axis}, constant)
    if op == "GatherElements":
        return Case(op, [x, random.integers(-size, size, x.shape)], {"axis": axis}, constant)
    if op == "GatherND":
        batch = draw(st.integers(0, 1))
        ids = random.integers(0, 3, (4, 2, 2)) if batch else random.integers(0, 3, (2, 3))
        return Case(op, [x, ids], {"batch_dims": batch}, constant)
    if op == "ScatterElements":
        ids = np.argsort(random.random(x.shape), axis).astype(np.int64)
        how = draw(st.sampled_from(["none", "add", "mul", "max", "min"]))
        return Case(op, [x, ids, normal(draw, *x.shape)], {"axis": axis, "reduction": how}, opset=18)
    if op == "ScatterND":
        how = draw(st.sampled_from(["none", "add", "mul", "max", "min"]))
        ids = integers(2, 0, 3)[:, None]
        return Case(op, [x, ids, normal(draw, 3, 3, 5)], {"reduction": how}, opset=18)
    if op == "TopK":
        attributes = {"axis": axis, "largest": draw(st.sampled_from([0, 1]))}
        return Case(op, [np.round(x * 2), integers(draw(st.integers(1, size)))], attributes, constant, 2)
    if op == "Trilu":
        return Case(
            op, [x, np.asarray(draw(st.integers(-2, 2)))], {"upper": draw(st.sampled_from([0, 1]))}, constant
        )
    if op == "CumSum":
        attributes = {"exclusive": draw(st.sampled_from([0, 1])), "reverse": draw(st.sampled_from([0, 1]))}
        return Case(op, [x, np.asarray(axis)], attributes, constant)
    if op == "OneHot":
        ids = random.integers(-5, 5, (3, 2))
        return Case(op, [ids, np.asarray(5), np.array([-1, 2], np.float32)], {"axis": axis % 3}, (1, 2))
    if op == "Compress":
        return Case(op, [x, random.random(size) > 0.5], {"axis": axis}, constant)
    if op == "ReverseSequence":
        return Case(op, [x, integers(1, 4, 2)], {"time_axis": 0, "batch_axis": 1}, constant)
    if op == "EyeLike":
        return Case(op, [x[0]], {"k": draw(st.integers(-2, 2))})
    return Case(op, [np.round(x)])


@st.composite
def moving(draw: Draw) -> Case:
    op = draw(
        one_of(
            "Reshape Transpose Squeeze Unsqueeze Concat Split Expand Tile Pad Slice DepthToSpace",
            "SpaceToDepth Shape Size CenterCropPad Range ConstantOfShape",
        )
    )
    x = normal(draw, 4, 1, 7, 2)
    constant = (1, 2, 3, 4) if draw(st.booleans()) else ()
    if op == "Reshape":
        return Case(op, [x, integers(0, -1, 2)], {}, constant)
    if op == "Transpose":
        return Case(op, [x], {"perm": draw(st.permutations(range(4)))})
    if op == "Squeeze":
        return Case(op, [x, integers(draw(st.sampled_from([1, -3])))], {}, constant)
    if op == "Unsqueeze":
        return Case(op, [x, integers(*draw(st.sampled_from([(0, 2), (-1,), (5, 1)])))], {}, constant)
    if op == "Concat":
        return Case(op, [x, normal(draw, 4, 1, 7, 2)], {"axis": draw(st.integers(-4, 3))}, constant[:1])
    if op == "Split":
        if draw(st.booleans()):
            return Case(op, [x], {"axis": 2, "num_outputs": 2}, outputs=2)
        return Case(op, [x, integers(1, 6)], {"axis": 2}, constant, 2)
    if op == "Expand":
        return Case(op, [x, integers(2, 1, 3, 1, 1)], {}, constant)
    if op == "Tile":
        return Case(op, [x, integers(1, 2, 1, 3)], {}, constant)
    if op == "Pad":
        mode = draw(st.sampled_from(["constant", "reflect", "edge", "wrap"]))
        low = 0 if mode in ("reflect", "wrap") else -1
        rows = [draw(st.integers(low, 2)) for _ in range(4)]
        pads = [rows[0], 0, rows[1], 0, rows[2], 0, rows[3], 0]
        value = np.asarray(np.float32(1.5)) if mode == "constant" and draw(st.booleans()) else None
        if draw(st.booleans()):
            return Case(op, [x, integers(*rows), value, integers(0, -2)], {"mode": mode}, constant, opset=19)
        return Case(op, [x, integers(*pads), value], {"mode": mode}, constant, opset=19)
    if op == "Slice":
        steps = [draw(st.sampled_from([-2, -1, 1, 2])) for _ in range(2)]
        starts = [draw(st.integers(-6, 6)) for _ in range(2)]
        ends = [draw(st.sampled_from([-100, -2, 0, 3, 100])) for _ in range(2)]
        return Case(
            op, [x, integers(*starts), integers(*ends), integers(0, -2), integers(*steps)], {}, constant
        )
    if op in ("DepthToSpace", "SpaceToDepth"):
        image = normal(draw, 2, 8, 4, 6)
        kind = {"mode": draw(st.sampled_from(["DCR", "CRD"]))} if op == "DepthToSpace" else {}
        return Case(op, [image], {"blocksize": 2, **kind})
    if op == "CenterCropPad":
        return Case(op, [x, integers(7, 3)], {"axes": [0, 2]}, constant)
    if op == "Range":
        return Case(op, [np.asarray(value) for value in (1, draw(st.integers(2, 9)), 2)], {}, (0, 1, 2))
    if op == "ConstantOfShape":
        return Case(
            op, [integers(2, 3)], {"value": helper.make_tensor("v", TensorProto.INT32, [1], [7])}, (0,)
        )
    attributes = {"start": draw(st.integers(-3, 1)), "end": draw(st.integers(2, 4))} if op == "Shape" else {}
    return Case(op, [x], attributes)


@st.composite
def sampling(draw: Draw) -> Case:
    op = draw(st.sampled_from(["GridSample", "AffineGrid", "RoiAlign", "Col2Im", "MaxUnpool"]))
    x = normal(draw, 2, 3, 6, 5)
    if op == "GridSample":
        attributes = {
            "mode": draw(st.sampled_from(["linear", "nearest", "cubic"])),
            "padding_mode": draw(st.sampled_from(["zeros", "border", "reflection"])),
            "align_corners": draw(st.sampled_from([0, 1])),
        }
        return Case(op, [x, np.tanh(normal(draw, 2, 4, 3, 2)) * 1.2], attributes, tolerance=1e-3)
    if op == "AffineGrid":
        attributes = {"align_corners": draw(st.sampled_from([0, 1]))}
        return Case(op, [normal(draw, 2, 2, 3), integers(2, 3, 4, 5)], attributes, (1,))
    if op == "RoiAlign":
        regions = np.array([[0, 0, 4, 3], [1, 2, 3.5, 5], [0.5, 0, 2, 2]], np.float32)
        attributes = {
            "output_height": 2,
            "output_width": 3,
            "sampling_ratio": draw(st.sampled_from([1, 2])),
            "spatial_scale": draw(st.sampled_from([1.0, 0.5])),
            "coordinate_transformation_mode": draw(st.sampled_from(["half_pixel", "output_half_pixel"])),
        }
        return Case(op, [x, regions, integers(0, 1, 0)], attributes, opset=16)
    if op == "Col2Im":
        pads = [draw(st.integers(0, 1)) for _ in range(4)]
        steps = [(4 + pads[0] + pads[2] - 2) + 1, (5 + pads[1] + pads[3] - 2) + 1]
        x = normal(draw, 1, 3 * 4, math.prod(steps))
        return Case(op, [x, integers(4, 5), integers(2, 2)], {"pads": pads}, (1, 2))
    places = np.stack([np.arange(6).reshape(2, 3) * 2 + 24 * c for c in range(2)])[None].astype(np.int64)
    return Case(op, [normal(draw, 1, 2, 2, 3), places], {"kernel_shape": [2, 2], "strides": [2, 2]})


@st.composite
def signals(draw: Draw) -> Case:
    op = draw(
        st.sampled_from(["DFT", "STFT", "HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix"])
    )
    if op.endswith("Window"):
        return Case(
            op,
            [np.asarray(draw(st.integers(4, 12)))],
            {"periodic": draw(st.sampled_from([0, 1]))},
            (0,),
            opset=17,
        )
    if op == "MelWeightMatrix":
        given_ = [np.asarray(v) for v in (8, 64, 8000)] + [np.asarray(np.float32(v)) for v in (20.0, 3800.0)]
        return Case(op, given_, {}, (0, 1, 2, 3, 4), opset=17)
    if op == "STFT":
        x, window = normal(draw, 2, 32, 1), np.hanning(8).astype(np.float32)
        return Case(op, [x, np.asarray(draw(st.integers(2, 8))), window], {"onesided": 1}, (1,), opset=17)
    x = normal(draw, 2, draw(st.integers(4, 9)), draw(st.sampled_from([1, 2])))
    onesided = draw(st.sampled_from([0, 1])) if x.shape[-1] == 1 else 0
    return Case(op, [x], {"axis": 1, "onesided": onesided, "inverse": 0}, opset=17)


@st.composite
def quantized(draw: Draw) -> Case:
    op = draw(
        st.sampled_from(
            ["QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"]
        )
    )
    kind = draw(st.sampled_from([np.uint8, np.int8]))
    per_channel = draw(st.booleans())
    scale = np.array([0.1, 0.05, 0.2] if per_channel else 0.1, np.float32)
    zero = np.array([3, 5, 0] if per_channel else 4).astype(kind)
    random = np.random.default_rng(draw(st.integers(0, 99)))
    if op == "QuantizeLinear":
        return Case(op, [normal(draw, 2, 3, 4) * 3, scale, zero], {"axis": 1}, opset=13)
    if op == "DequantizeLinear":
        return Case(op, [random.integers(0, 100, (2, 3, 4)).astype(kind), scale, zero], {"axis": 1}, opset=13)
    if op == "DynamicQuantizeLinear":
        return Case(op, [normal(draw, 3, 4)], outputs=3, tolerance=1e-6)
    if op == "MatMulInteger":
        a, b = (
            random.integers(0, 99, (3, 4)).astype(np.uint8),
            random.integers(-99, 99, (4, 5)).astype(np.int8),
        )
        return Case(op, [a, b, np.asarray(np.uint8(7)), np.asarray(np.int8(2))], constant=(3,))
    x, w = (
        random.integers(0, 99, (1, 2, 5, 5)).astype(np.uint8),
        random.integers(0, 99, (3, 2, 3, 3)).astype(np.uint8),
    )
    return Case(op, [x, w, np.asarray(np.uint8(7))], {"pads": [1, 1, 1, 1]})


@st.composite
def microsoft(draw: Draw) -> Case:
    op = draw(
        one_of(
            "Gelu FastGelu BiasGelu QuickGelu FusedConv FusedGemm FusedMatMul",
            "SkipLayerNormalization SkipSimplifiedLayerNormalization EmbedLayerNormalization",
            "MatMulNBits",
        )
    )
    x = normal(draw, 2, 3, 8)
    if op in ("Gelu", "QuickGelu"):
        return Case(op, [x], domain=_MICROSOFT)
    if op in ("FastGelu", "BiasGelu"):
        return Case(op, [x, normal(draw, 8)], domain=_MICROSOFT, constant=(1,), tolerance=1e-3)
    if op == "FusedConv":
        kind = draw(st.sampled_from(["Relu", "Tanh", "Sigmoid", "LeakyRelu", "Clip", "HardSigmoid"]))
        attributes: dict[str, Any] = {"activation": kind, "pads": [1, 1, 1, 1]}
        if kind in ("LeakyRelu", "Clip", "HardSigmoid"):
            attributes["activation_params"] = [0.2, 0.5][: 1 if kind == "LeakyRelu" else 2]
        inputs = [normal(draw, 1, 2, 5, 5), normal(draw, 3, 2, 3, 3), normal(draw, 3)]
        more = normal(draw, 1, 3, 5, 5) if draw(st.booleans()) and kind == "Relu" else None
        return Case(op, [*inputs, more], attributes, (1, 2), domain=_MICROSOFT)
    if op == "FusedGemm":
        attributes = {"activation": "Relu", "transB": 1}
        return Case(op, [x[0], normal(draw, 5, 8), normal(draw, 5)], attributes, (1, 2), domain=_MICROSOFT)
    if op == "FusedMatMul":
        attributes = {"alpha": draw(st.sampled_from([1.0, 0.5])), "transB": draw(st.sampled_from([0, 1]))}
        weight = normal(draw, 8, 8)
        return Case(op, [x, weight], attributes, (1,) if draw(st.booleans()) else (), domain=_MICROSOFT)
    if op == "SkipLayerNormalization":
        inputs = [x, normal(draw, 2, 3, 8), normal(draw, 8), normal(draw, 8)]
        return Case(
            op,
            [*inputs, normal(draw, 8) if draw(st.booleans()) else None],
            constant=(2, 3, 4),
            domain=_MICROSOFT,
        )
    if op == "SkipSimplifiedLayerNormalization":
        inputs = [x, normal(draw, 2, 3, 8), normal(draw, 8)]
        return Case(op, inputs, {"epsilon": 1e-5}, (2,), domain=_MICROSOFT)
    if op == "EmbedLayerNormalization":
        ids = np.array([[1, 3, 2], [0, 4, 1]], np.int32)
        kinds = np.array([[0, 1, 1], [0, 0, 1]], np.int32)
        tables = [
            normal(draw, 5, 8),
            normal(draw, 3, 8),
            normal(draw, 2, 8),
            normal(draw, 8),
            normal(draw, 8),
        ]
        mask = np.array([[1, 1, 0], [1, 1, 1]], np.int32)
        return Case(op, [ids, kinds, *tables, mask], {}, (2, 3, 4, 5, 6), outputs=2, domain=_MICROSOFT)
    random = np.random.default_rng(draw(st.integers(0, 99)))
    packed = random.integers(0, 256, (5, 2, 16)).astype(np.uint8)
    zeros = random.integers(0, 256, (5, 1)).astype(np.uint8) if draw(st.booleans()) else None
    scales = np.abs(normal(draw, 5, 2)) if draw(st.booleans()) else np.abs(normal(draw, 10)).reshape(5, 2)
    attributes = {"K": 64, "N": 5, "bits": 4, "block_size": 32}
    inputs = [normal(draw, 2, 3, 64), packed, scales, zeros]
    return Case(op, inputs, attributes, (1, 2, 3), domain=_MICROSOFT, tolerance=1e-3)


@st.composite
def microsoft_attention(draw: Draw) -> Case:
    op = draw(st.sampled_from(["Attention", "MultiHeadAttention", "GroupQueryAttention", "RotaryEmbedding"]))
    steps, heads, size = draw(st.integers(2, 4)), 2, 16
    width = heads * size
    x = normal(draw, 2, steps, width)
    if op == "Attention":
        masks = [None, np.ones((2, steps), np.int32), np.array([steps, 1], np.int32)]
        mask = masks[draw(st.integers(0, 2))]
        if mask is not None and mask.ndim == 2:
            mask[1, -1] = 0
        attributes = {"num_heads": heads, "unidirectional": draw(st.sampled_from([0, 1]))}
        inputs = [x, normal(draw, width, 3 * width) * 0.3, normal(draw, 3 * width), mask]
        return Case(op, inputs, attributes, (1, 2), domain=_MICROSOFT)
    if op == "MultiHeadAttention":
        inputs = [normal(draw, 2, steps, width) for _ in range(3)]
        bias = normal(draw, 3 * width) if draw(st.booleans()) else None
        more = normal(draw, 1, heads, steps, steps) if draw(st.booleans()) else None
        return Case(op, [*inputs, bias, None, more], {"num_heads": heads}, (3,), domain=_MICROSOFT)
    if op == "GroupQueryAttention":
        past = draw(st.integers(0, 3))
        new = steps if past == 0 else 1
        cache = [normal(draw, 2, 1, past, size) for _ in range(2)]
        total = past + new
        inputs = [normal(draw, 2, new, width), normal(draw, 2, new, size), normal(draw, 2, new, size), *cache]
        inputs += [np.full(2, total - 1, np.int32), np.asarray(np.int32(total))]
        rotary = draw(st.sampled_from([0, 1]))
        inputs += [normal(draw, 16, size // 2), normal(draw, 16, size // 2)] if rotary else []
        attributes = {"num_heads": heads, "kv_num_heads": 1, "do_rotary": rotary}
        return Case(op, inputs, attributes, (6, 7, 8), 3, domain=_MICROSOFT)
    where = integers(1) if draw(st.booleans()) else np.arange(2 * steps).reshape(2, steps)
    inputs = [
        normal(draw, 2, heads, steps, size),
        where,
        normal(draw, 16, size // 2),
        normal(draw, 16, size // 2),
    ]
    return Case(op, inputs, {"interleaved": draw(st.sampled_from([0, 1]))}, (2, 3), domain=_MICROSOFT)


@st.composite
def attention(draw: Draw) -> Case:
    heads, groups, size = 4, draw(st.sampled_from([1, 2, 4])), 8
    steps, keys = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    query, key, value = (
        normal(draw, 2, heads, steps, size),
        normal(draw, 2, groups, keys, size),
        normal(draw, 2, groups, keys, size),
    )
    mask = normal(draw, steps, keys) if draw(st.booleans()) else None
    attributes = {"scale": draw(st.sampled_from([0.3, 0.5])), "softcap": draw(st.sampled_from([0.0, 2.0]))}
    return Case("Attention", [query, key, value, mask], attributes, opset=23)


FAMILIES: dict[str, Callable[[], st.SearchStrategy[Case]]] = {
    family.__name__: family
    for family in (
        unary,
        domain_limited,
        binary,
        logical,
        cast,
        clip,
        reduction,
        convolution,
        pool,
        norm,
        product,
        recurrent,
        resize,
        picking,
        moving,
        sampling,
        signals,
        quantized,
        attention,
        microsoft,
        microsoft_attention,
    )
}


def test_the_documentation_speaks_of_operators_that_are_there() -> None:
    assert {*LAYERS, *LIMITS} <= set(OPERATORS)
    assert len([name for domain, name in OPERATORS if not domain]) >= 130


def _run(family: str, examples: int) -> None:
    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(FAMILIES[family]())
    def agree(case: Case) -> None:
        case.check()

    agree()


@pytest.mark.parametrize("family", FAMILIES)
def test_family_agrees_with_onnxruntime(family: str) -> None:
    _run(family, 12)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_family_agrees_with_onnxruntime_at_length(family: str) -> None:
    _run(family, 300)
