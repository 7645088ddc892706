"""Files that are broken or mean harm: always a LoadError, soon, and without much memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from featherweight.errors import LoadError
from featherweight.exchange.onnx_in import import_onnx_bytes

pytest.importorskip("onnxruntime")

_SECONDS = 60.0  # for one file, which may hold an endless loop
_MEMORY = 2 << 30  # growth of the peak over all of them


def _weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _model(text: str, **constants: np.ndarray) -> bytes:
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return model.SerializeToString()


@cache
def files() -> tuple[bytes, ...]:
    """Small files with the shapes of real graphs: a convolutional, a recurrent and one with subgraphs."""
    convolutional = _model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 8, 8] x) => (float[N, 5] y) {
          a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w, b)
          c = BatchNormalization (a, s, s, s, v)
          r = Relu (c)
          p = GlobalAveragePool (r)
          shape = Shape (p)
          first = Gather <axis = 0> (shape, zero)
          row = Unsqueeze (first, axes)
          to = Concat <axis = 0> (row, rest)
          f = Reshape (p, to)
          y = Gemm <transB = 1> (f, m, d)
        }""",
        w=_weights(4, 3, 3, 3),
        b=_weights(4),
        s=np.ones(4, np.float32),
        v=np.ones(4, np.float32),
        zero=np.array(0),
        axes=np.array([0]),
        rest=np.array([-1]),
        m=_weights(5, 4),
        d=_weights(5),
    )
    recurrent = _model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[T, 2, 4] x) => (float[T, 2, 6] y) {
          h, last, cell = LSTM <hidden_size = 6> (x, w, r)
          q = Squeeze (h, one)
          t = Transpose <perm = [0, 1, 2]> (q)
          n = LayerNormalization <axis = -1> (t, s, s)
          parts = Softmax <axis = -1> (n)
          two = Tile (parts, times)
          y = Slice (two, from, to, axes)
        }""",
        w=_weights(1, 24, 4),
        r=_weights(1, 24, 6),
        s=np.ones(6, np.float32),
        one=np.array([1]),
        times=np.array([1, 1, 2]),
        axes=np.array([2]),
        **{"from": np.array([0]), "to": np.array([6])},
    )
    nested = _model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4] x, bool flag) => (float[N, 4] y) {
          n = Constant <value = int64 {2}> ()
          on = Constant <value = bool {1}> ()
          h = MatMul (x, w)
          l = Loop (n, on, h) <body = step (int64 i, bool go, float[N, 4] v) => (bool still, float[N, 4] u) {
            still = Identity (go)
            u = Add (v, x)
          }>
          y = If (flag) <then_branch = yes () => (float[N, 4] a) { a = Relu (l) },
                         else_branch = no () => (float[N, 4] b) { b = Pad (l, pads) }>
        }""",
        w=_weights(4, 4),
        pads=np.array([0, 0, 0, 0]),
    )
    return convolutional, recurrent, nested


def test_the_files_are_good() -> None:
    for content in files():
        import_onnx_bytes(content, source="good")


# --- mutations -------------------------------------------------------------------------------------------

_NUMBERS = st.one_of(
    st.integers(-3, 9), st.sampled_from([1 << 16, 1 << 31, -(1 << 31), 1 << 40, (1 << 63) - 1, -(1 << 63)])
)
_OPERATORS = (
    "Add",
    "Tile",
    "Expand",
    "Resize",
    "ConstantOfShape",
    "Range",
    "Pad",
    "Gather",
    "If",
    "Loop",
    "LSTM",
)


def _bytes(draw: st.DrawFn, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(["set", "drop", "cut", "repeat"]))
        if kind == "set":
            data[place] = draw(st.integers(0, 255))
        elif kind == "drop":
            del data[place : place + draw(st.integers(1, 8))]
        elif kind == "cut":
            del data[max(place, 8) :]
        else:
            data[place:place] = data[place : place + draw(st.integers(1, 32))]
        if not data:
            return b"\0"
    return bytes(data)


def _dims(draw: st.DrawFn, model: onnx.ModelProto) -> None:
    tensor = draw(st.sampled_from(list(model.graph.initializer)))
    if tensor.dims:
        tensor.dims[draw(st.integers(0, len(tensor.dims) - 1))] = draw(_NUMBERS)


def _values(draw: st.DrawFn, model: onnx.ModelProto) -> None:
    tensor = draw(st.sampled_from(list(model.graph.initializer)))
    raw = tensor.raw_data
    tensor.raw_data = draw(_NUMBERS).to_bytes(8, "little", signed=True)[: len(raw)] + raw[8:]


def _type(draw: st.DrawFn, model: onnx.ModelProto) -> None:
    draw(st.sampled_from(list(model.graph.initializer))).data_type = draw(st.integers(-1, 30))


def _input(draw: st.DrawFn, model: onnx.ModelProto) -> None:
    value = draw(st.sampled_from(list(model.graph.input))).type.tensor_type
    value.elem_type = draw(st.sampled_from([value.elem_type, 0, 6, 7, 8, 11, 16, 99]))
    for dim in value.shape.dim:
        if draw(st.booleans()):
            dim.dim_value = draw(_NUMBERS)


def _wires(draw: st.DrawFn, model: onnx.ModelProto) -> None:
    names = [name for node in model.graph.node for name in (*node.input, *node.output)]
    node = draw(st.sampled_from(list(model.graph.node)))
    side = draw(st.sampled_from([node.input, node.output]))
    if side:
        side[draw(st.integers(0, len(side) - 1))] = draw(st.sampled_from([*names, "", "nowhere"]))


def _attributes(draw: st.DrawFn, model: onnx.ModelProto) -> None:
    node = draw(st.sampled_from(list(model.graph.node)))
    name = draw(
        st.sampled_from(["axis", "group", "strides", "pads", "hidden_size", "perm", "kernel_shape", "to"])
    )
    for item in [item for item in node.attribute if item.name == name]:
        node.attribute.remove(item)
    several = name in ("strides", "pads", "perm", "kernel_shape")
    value = draw(st.lists(_NUMBERS, min_size=1, max_size=6)) if several else draw(_NUMBERS)
    node.attribute.append(helper.make_attribute(name, value))


def _operator(draw: st.DrawFn, model: onnx.ModelProto) -> None:
    node = draw(st.sampled_from(list(model.graph.node)))
    node.op_type = draw(st.sampled_from(_OPERATORS))
    if draw(st.booleans()):
        node.domain = draw(st.sampled_from(["com.microsoft", "ai.onnx", "nobody"]))


def _opset(draw: st.DrawFn, model: onnx.ModelProto) -> None:
    model.opset_import[0].version = draw(_NUMBERS)


_MUTATIONS: tuple[Callable[[st.DrawFn, onnx.ModelProto], None], ...] = (
    _dims,
    _values,
    _type,
    _input,
    _wires,
    _attributes,
    _operator,
    _opset,
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good file with something wrong: in its bytes, or in what they say."""
    content = draw(st.sampled_from(files()))
    if draw(st.integers(0, 3)) == 0:
        return _bytes(draw, content)
    model = onnx.load_from_string(content)
    for _ in range(draw(st.integers(1, 2))):
        draw(st.sampled_from(_MUTATIONS))(draw, model)
    return model.SerializeToString()


def _imported_or_refused(content: bytes) -> None:
    start = time.monotonic()
    try:
        import_onnx_bytes(content, source="mutated")
    except LoadError as error:
        assert error.fix
    assert time.monotonic() - start < _SECONDS


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _fuzz(count: int) -> None:
    before = _peak()
    everything = list(HealthCheck)
    settings(max_examples=count, deadline=None, database=None, suppress_health_check=everything)(
        given(mutated())(_imported_or_refused)
    )()
    assert _peak() - before < _MEMORY


@pytest.mark.filterwarnings("ignore")  # torch warns of numbers that mutation made large
def test_a_hundred_mutated_files() -> None:
    _fuzz(100)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")  # torch warns of numbers that mutation made large
def test_five_thousand_mutated_files() -> None:
    _fuzz(5000)
