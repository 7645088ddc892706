"""Kernels are given to the layers whose work they do, fused ones too."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from featherweight.exchange.attribution import Attribution, attribute, write_named
from featherweight.graph import Graph, trace
from featherweight.model import Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Target
from featherweight.tools.costs import node_macs
from golden import model, model_of


def _attributed(net: Model, folder: Path) -> tuple[Attribution, Graph, onnx.ModelProto]:
    artifact = find_runtime("onnxruntime").lower(net, Target(), folder)
    place = folder / "named"
    place.mkdir()
    named = write_named(folder / artifact.entries["forward"], place)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(place / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(named, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(place / "optimized.onnx")
    graph = trace(net)
    macs = {node.name: node_macs(graph, node) for node in graph}
    return attribute(onnx.load(named), optimized, graph, macs), graph, optimized


_SLOW = ("depthwise", "lstm", "squeeze_excite")


@pytest.mark.parametrize(
    "net",
    ["residual", "attention", "shared", *(pytest.param(name, marks=pytest.mark.slow) for name in _SLOW)],
)
def test_every_layer_that_multiplies_has_a_kernel(net: str, tmp_path: Path) -> None:
    found, graph, optimized = _attributed(model(net), tmp_path)
    timed = {call for share in found.shares.values() for call in share}
    assert {node.name for node in graph if node_macs(graph, node)} <= timed
    assert set(found.shares) == {node.name for node in optimized.graph.node}
    assert all(sum(share.values()) == pytest.approx(1) for share in found.shares.values() if share)
    lost = [node.op_type for node in optimized.graph.node if not found.shares[node.name]]
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "LSTM"} & set(lost)


def test_what_is_fused_is_said(tmp_path: Path) -> None:
    found, _, _ = _attributed(model("residual"), tmp_path)
    assert found.fused["stem.1#0"] == ("stem.0#0",)  # batch norm, folded when the file was written
    assert found.fused["stem.2#0"] == ("stem.0#0",)  # ReLU, by the runtime
    assert found.fused["layer1/add#0"] == ("layer1.conv2#0",)  # the addition, at the end of the convolution


def test_names_that_tracing_again_has_lost(tmp_path: Path) -> None:
    """Group norm is decomposed, which renames the values around it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.ZeroPad2d(1), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3)]
        module = nn.Sequential(
            *layers, nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
        )
    found, _, _ = _attributed(model_of(module, torch.randn(2, 3, 12, 12)), tmp_path)
    timed = {call for share in found.shares.values() for call in share}
    assert {"1#0", "4#0", "6#0", "8#0"} <= timed
    assert (
        found.fused["0#0"] == ("1#0",) and found.fused["2#0"] == ("1#0",) and found.fused["3#0"] == ("1#0",)
    )
