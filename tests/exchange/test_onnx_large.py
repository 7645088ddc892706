"""A model of more than 2 GB: weights beside the file, in and out, with one copy in the importer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

_SIZE, _LAYERS = 8192, 9
_BYTES = _LAYERS * _SIZE * _SIZE * 4

# ru_maxrss is of the whole process, so it gets one of its own.
_CODE = """
import resource, sys
from pathlib import Path
import numpy as np
from featherweight.exchange.load import load_model
from featherweight.plugins import find_runtime
from featherweight.runtime import Target

folder = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(str(folder / "model.onnx"))
runtime, target = find_runtime("onnxruntime"), Target("onnxruntime", "", 1).resolved()
(folder / "out").mkdir()
artifact = runtime.lower(model, target, folder / "out")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
x = model.entries["forward"].example_inputs[0]
expected = model.module(x).detach().numpy()
del model
found = runtime.open(artifact, target)(x.numpy())[0]
print(float(np.abs(found - expected).max() / np.abs(expected).max()))
"""


def _write(folder: Path) -> None:
    random = np.random.default_rng(0)
    graph = onnx.GraphProto(name="large")
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", _SIZE]))
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", _SIZE]))
    with (folder / "weights.bin").open("wb") as file:
        for index in range(_LAYERS):
            tensor = graph.initializer.add(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[_SIZE, _SIZE])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights.bin"), ("offset", str(file.tell()))):
                tensor.external_data.add(key=key, value=value)
            file.write((random.standard_normal((_SIZE, _SIZE), np.float32) / _SIZE**0.5).tobytes())
            last = "y" if index == _LAYERS - 1 else f"h{index + 1}"
            graph.node.append(
                helper.make_node("MatMul", [f"h{index}" if index else "x", f"w{index}"], [last])
            )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


@pytest.mark.timeout(900)
def test_more_than_two_gigabytes(tmp_path: Path) -> None:
    """One copy in the module, the mapped file, and the copy of the ONNX Runtime that it is checked with."""
    if psutil.virtual_memory().available < 4 * _BYTES:
        pytest.skip(f"needs {4 * _BYTES >> 30} GB of free memory")
    _write(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _CODE, str(tmp_path)], capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr
    peak, error = (float(line) for line in done.stdout.split())
    assert peak * 1024 < 3.5 * _BYTES
    assert error < 1e-4
