"""Weights that lie on their grids become the same integers in every runtime's files, tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from itertools import permutations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from featherweight.formats import IntQuant
from featherweight.model import Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact
from golden import quantized, target

NETS = ("residual", "attention", "lstm")
RUNTIMES = ("onnxruntime", "onnxruntime-web", "openvino", "litert", "executorch", "mnn", "ncnn")


@cache
def rounded(net: str, runtime: str) -> tuple[Model, Mapping[str, np.ndarray]]:
    """A net with weights on their grids, but not at the nearest points; and the integers that they are."""
    model = quantized(net, runtime)
    module, draw = model.copy_module(), torch.Generator().manual_seed(0)
    integers: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fmt = model.formats[name][-1] if name in model.formats else None
            if not isinstance(fmt, IntQuant):
                continue
            nearest = fmt.quantize(parameter)
            moved = nearest + torch.randint(-1, 2, nearest.shape, generator=draw)
            moved = moved.clamp(fmt.quant_min, fmt.quant_max).int()
            assert (moved != nearest).any()
            parameter.copy_(fmt.dequantize(moved))
            integers[name] = moved.numpy()
            assert torch.equal(fmt.quantize(parameter), moved)
    return model.evolve(module=module), integers


# ---- what the files hold, each as an array of any shape


def _onnx(artifact: Artifact) -> dict[str, np.ndarray]:
    graph = onnx.load(artifact.folder / "model.onnx").graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def _openvino(artifact: Artifact) -> dict[str, np.ndarray]:
    data = (artifact.folder / "model.bin").read_bytes()
    found: dict[str, np.ndarray] = {}
    for layer in ElementTree.parse(artifact.folder / "model.xml").getroot().iter("layer"):
        about = layer.find("data")
        if layer.get("type") == "Const" and about is not None and about.get("element_type") in ("i8", "u8"):
            start, size = int(str(about.get("offset"))), int(str(about.get("size")))
            kind = np.int8 if about.get("element_type") == "i8" else np.uint8
            shape = [int(one) for one in str(about.get("shape")).split(",") if one.strip()]
            found[str(layer.get("name"))] = np.frombuffer(data[start : start + size], kind).reshape(shape)
    return found


def _litert(artifact: Artifact) -> dict[str, np.ndarray]:
    from featherweight.runtimes._litert_graph import FlatGraph

    graph = FlatGraph.read(artifact.folder / artifact.entries["forward"])
    read = {int(index) for operator in graph.operators for index in operator.inputs}
    return {
        graph.name(tensor): graph.constant(tensor)
        for tensor in read
        if graph.is_constant(tensor) and graph.dtype(tensor) == "int8"
    }


def _mnn(artifact: Artifact) -> dict[str, np.ndarray]:
    from featherweight.runtimes._mnn_file import QUANTIZED, File, integers

    names = artifact.details["parameters"]["forward"]
    found: dict[str, np.ndarray] = {}
    for op in File((artifact.folder / artifact.entries["forward"]).read_bytes()).ops:
        coded = None if op.main is None or not op.convolves else op.main.table(QUANTIZED)
        if coded is not None and "weight" in names.get(op.name, {}):
            found[names[op.name]["weight"]] = integers(coded)
    return found


def _ncnn(artifact: Artifact) -> dict[str, np.ndarray]:
    from featherweight.runtimes._ncnn_file import read

    names = artifact.details["parameters"]["forward"]
    layers = read(artifact.folder / "model.param", artifact.folder / "model.bin")
    return {
        names[layer.name]["weight"]: layer.tensors["weight"]
        for layer in layers
        if "weight" in names.get(layer.name, {})
    }


READERS: Mapping[str, Callable[[Artifact], dict[str, np.ndarray]]] = {
    "onnxruntime": _onnx,
    "onnxruntime-web": _onnx,
    "openvino": _openvino,
    "litert": _litert,
    "mnn": _mnn,
    "ncnn": _ncnn,
}


def layouts(integers: np.ndarray) -> list[bytes]:
    """The bytes in every order of the axes; of recurrent layers also with the gates as ONNX has them."""
    ways = [integers]
    if integers.ndim == 2 and len(integers) % 4 == 0:
        gates = integers.reshape(4, -1, integers.shape[1])
        ways.append(gates[[0, 3, 1, 2]].reshape(integers.shape))
    return [
        np.ascontiguousarray(way.transpose(order)).astype(np.int8).tobytes()
        for way in ways
        for order in permutations(range(way.ndim))
    ]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", RUNTIMES)
def test_the_integers_that_are_stored(name: str, net: str, tmp_path: Path) -> None:
    runtime = find_runtime(name)
    if not runtime.installed():
        pytest.skip(f"runtime '{name}' is not installed")
    model, integers = rounded(net, name)
    artifact = runtime.lower(model, target(name), tmp_path)
    assert integers
    if name == "executorch":  # knows constants by the digests of their bytes
        digests = artifact.details["tensors"]["forward"]
        for parameter, wanted in integers.items():
            known = {hashlib.sha256(data).hexdigest() for data in layouts(wanted)}
            assert digests[parameter] in known, parameter
        return
    stored = READERS[name](artifact)
    for parameter, wanted in integers.items():
        assert stored[parameter].size == wanted.size
        assert stored[parameter].astype(np.int8).tobytes() in layouts(wanted), parameter


def test_another_integer_is_noticed() -> None:
    """The comparison is of every element: a single one that differs by one step is found."""
    _, integers = rounded("residual", "onnxruntime")
    wanted = integers["stem.0.weight"]
    other = wanted.copy()
    other[0, 0, 0, 0] += 1
    assert wanted.astype(np.int8).tobytes() in layouts(wanted)
    assert other.astype(np.int8).tobytes() not in layouts(wanted)
