"""Formats tell where their arrays lie; a file that breaks its format tells nothing."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from conftest import Lowered
from featherweight.bundles.layouts import named
from featherweight.plugins import find_runtime


def _model(array: np.ndarray) -> bytes:
    tensor = numpy_helper.from_array(array, "weight")
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    ends = [helper.make_tensor_value_info(one, onnx.TensorProto.FLOAT, None) for one in "xy"]
    graph = helper.make_graph([node], "net", ends[:1], ends[1:], [tensor])
    return helper.make_model(graph).SerializeToString()


def test_onnx() -> None:
    array = np.arange(60, dtype=np.float32).reshape(6, 10)
    data = _model(array)
    (span,) = named("model.onnx", data, {})
    assert (span.width, span.shape) == (32, (6, 10))
    assert data[span.start : span.stop] == array.tobytes()


def test_openvino_tells_in_its_xml() -> None:
    xml = (
        b'<net><layers><layer type="Const"><data element_type="i8" shape="2, 30" offset="4" size="60"/>'
        b'</layer><layer type="Result"/></layers></net>'
    )
    (span,) = named("a/model.bin", bytes(64), {"a/model.xml": partial(bytes, xml)})
    assert (span.start, span.stop, span.width, span.shape) == (4, 64, 8, (2, 30))


def test_ncnn_tells_in_its_param() -> None:
    param = b"7767517\n2 2\nInput x 0 1 x\nInnerProduct y 1 1 x y 0=10 1=1 2=200\n"
    data = bytes(4 + 800 + 40)
    (span,) = named("model.bin", data, {"model.param": partial(bytes, param)})
    assert (span.start, span.stop, span.width, span.shape) == (4, 804, 32, (10, 20))


def test_litert_and_executorch(lowered: Lowered) -> None:
    for runtime in ("litert", "executorch"):
        if not find_runtime(runtime).installed():
            pytest.skip(f"runtime '{runtime}' is not installed")
        artifact = lowered(runtime, "residual", "float")
        file = artifact.files[0]
        data = (artifact.folder / file).read_bytes()
        covered = sum(span.stop - span.start for span in named(file, data, {}))
        assert covered > 0.5 * len(data)


def test_broken_files_tell_nothing_wrong() -> None:
    data = _model(np.ones((20, 20), np.float32))
    for size in range(0, len(data), 37):
        assert all(0 <= span.start < span.stop <= size for span in named("m.onnx", data[:size], {}))
