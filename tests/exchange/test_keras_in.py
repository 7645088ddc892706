"""Keras files: every layer that is taken over; the import itself compares each model with Keras."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from featherweight.errors import LoadError, MissingRuntime
from featherweight.exchange.keras_in.module import KerasModel
from featherweight.exchange.load import InputSpec, load_model
from featherweight.graph import trace
from featherweight.model import Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Target

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("keras") is None or importlib.util.find_spec("h5py") is None,
        reason='Keras is not installed: pip install "featherweight[keras]"',
    ),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras, when it saves
]


@pytest.fixture(scope="module")
def keras() -> Iterator[Any]:
    from featherweight.exchange.keras_in.read import import_keras_package

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Keras calls .h5 legacy
    yield import_keras_package()
    logging.disable(level)


def _chain(k: Any, shape: tuple[int | None, ...], *layers: Any, dtype: str | None = None) -> Any:
    x = given = k.Input(shape, dtype=dtype)
    for layer in layers:
        x = layer(x)
    return k.Model(given, x)


def _cnn(k: Any) -> Any:
    L = k.layers
    i = k.Input((16, 16, 3))
    x = L.Rescaling(1 / 255.0)(i)
    x = L.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(x)
    x = L.ReLU(6.0)(L.BatchNormalization()(x))
    x = L.Add()([L.SeparableConv2D(8, 3, padding="same", activation="relu")(x), x])
    s = L.GlobalAveragePooling2D(keepdims=True)(x)
    s = L.Conv2D(8, 1, activation="sigmoid")(L.Conv2D(4, 1, activation="swish")(s))
    x = L.Multiply()([x, s])
    x = L.DepthwiseConv2D(5, strides=2, padding="same", depth_multiplier=2)(x)
    x = L.MaxPooling2D(3, 2, padding="same")(x)
    x = L.Flatten()(L.Dropout(0.2)(L.Concatenate()([x, x])))
    return k.Model(i, L.Dense(5, activation="softmax", name="scores")(x))


def _nested(k: Any) -> Any:
    L = k.layers
    body = [k.Input((8, 8, 4)), L.Conv2D(4, 3, padding="same", activation="gelu", name="conv")]
    backbone = k.Sequential([*body, L.LayerNormalization(name="norm")], name="backbone")
    i, j = k.Input((8, 8, 4), name="left"), k.Input((8, 8, 4), name="right")
    a, b = backbone(i), backbone(j)
    x = L.Subtract()([L.Average()([a, b]), a])
    p = L.Dense(3, name="p")(L.GlobalMaxPooling2D()(x))
    return k.Model({"left": i, "right": j}, {"p": p, "q": x})


def _transformer(k: Any) -> Any:
    L = k.layers
    i, j = k.Input((10, 16)), k.Input((7, 16))
    x = L.LayerNormalization(epsilon=1e-6)(L.Add()([L.MultiHeadAttention(4, 4, name="mha")(i, i), i]))
    x = L.Add()([x, L.Dense(16)(L.Dense(32, activation="gelu")(x))])
    x = L.MultiHeadAttention(4, 4, value_dim=6)(x, j)
    x = L.MultiHeadAttention(2, 4)(x, x, use_causal_mask=True)
    return k.Model([i, j], L.Dense(2)(L.GlobalAveragePooling1D()(x)))


def _recurrent(k: Any) -> Any:
    L = k.layers
    i = k.Input((9, 6))
    x = L.Bidirectional(L.GRU(5, return_sequences=True))(L.LSTM(8, return_sequences=True)(i))
    x, h, c = L.LSTM(4, return_sequences=True, return_state=True, go_backwards=True)(x)
    return k.Model(i, [L.LSTM(4)(x, initial_state=[h, c]), L.SimpleRNN(3)(x), h])


def _operations(k: Any) -> Any:
    L, ops = k.layers, k.ops
    i = k.Input((6, 6, 4))
    y = 1.0 - L.Conv2D(4, 3, padding="same")(i) * 2
    x = ops.relu(y + ops.mean(y, axis=(1, 2), keepdims=True))[:, 1:, ::2]
    x = ops.softmax(ops.reshape(ops.transpose(x, (0, 3, 1, 2)), (-1, 4, 15)))
    return k.Model(i, ops.maximum(x, 0.1) / 3.0)


def _over_time(k: Any) -> Any:
    L = k.layers
    i = k.Input((5, 8, 8, 3))
    x = L.TimeDistributed(L.Conv2D(4, 3, activation="relu"))(i)
    x = L.TimeDistributed(L.Dense(6))(L.TimeDistributed(L.Flatten())(x))
    return k.Model(i, L.GRU(4)(x))


def _gates(k: Any) -> Any:
    L = k.layers
    i = k.Input((8, 8, 6))
    x = L.Conv2D(8, 3)(i)
    g = L.Reshape((1, 1, 8))(L.GlobalAveragePooling2D()(x))
    x = L.Multiply()([x, L.Conv2D(8, 1, activation="hard_sigmoid")(g)])
    return k.Model(i, L.GlobalAveragePooling2D()(x))


def _channels_first(k: Any) -> Any:
    L = k.layers
    i, how = k.Input((3, 16, 16)), {"data_format": "channels_first"}
    x = L.BatchNormalization(axis=1)(L.Conv2D(4, 3, padding="same", strides=2, **how)(i))
    return k.Model(i, L.GlobalAveragePooling2D(**how)(L.MaxPooling2D(**how)(x)))


def _dot(k: Any) -> Any:
    a, b = k.Input((4, 5)), k.Input((5, 6))
    return k.Model([a, b], k.layers.Dot((2, 1))([a, b]))


NETS: dict[str, Callable[[Any], Any]] = {
    "cnn": _cnn,
    "nested": _nested,
    "transformer": _transformer,
    "recurrent": _recurrent,
    "operations": _operations,
    "over time": _over_time,
    "channels first": _channels_first,
    "gates": _gates,
    "dot": _dot,
    "text": lambda k: _chain(
        k, (7,), k.layers.Embedding(20, 8),
        k.layers.Conv1D(6, 3, padding="causal", dilation_rate=2, activation="tanh"),
        k.layers.AveragePooling1D(2), k.layers.LSTM(5), k.layers.Dense(1, activation="sigmoid"),
    ),
    "integers": lambda k: _chain(
        k, (7,), k.layers.Embedding(20, 8), k.layers.GlobalMaxPooling1D(), dtype="int32"
    ),
    "bytes": lambda k: _chain(
        k, (8, 8, 3), k.layers.Rescaling(1 / 127.5, -1), k.layers.Conv2D(4, 3), dtype="uint8"
    ),
    "transposed": lambda k: _chain(
        k, (5, 5, 3), k.layers.Conv2DTranspose(4, 3, strides=2, padding="same"),
        k.layers.Conv2DTranspose(4, 4, strides=2, padding="same"), k.layers.Conv2DTranspose(4, 3, strides=2),
        k.layers.Conv2DTranspose(2, 2, strides=3, padding="same"),
    ),
    "one axis": lambda k: _chain(
        k, (12, 4), k.layers.SeparableConv1D(6, 3, strides=2, padding="same"), k.layers.DepthwiseConv1D(3),
        k.layers.UpSampling1D(2), k.layers.Cropping1D(1), k.layers.ZeroPadding1D(2),
        k.layers.Conv1DTranspose(4, 3, strides=2, padding="same"),
    ),
    "three axes": lambda k: _chain(
        k, (6, 6, 6, 2), k.layers.Conv3D(4, 3, padding="same"), k.layers.MaxPooling3D(),
        k.layers.BatchNormalization(), k.layers.GlobalAveragePooling3D(),
    ),
    "sizes": lambda k: _chain(
        k, (6, 6, 2), k.layers.ZeroPadding2D(((1, 2), (0, 1))), k.layers.Cropping2D(((1, 0), (2, 1))),
        k.layers.UpSampling2D(2), k.layers.UpSampling2D(2, interpolation="bilinear"),
        k.layers.AveragePooling2D(3, 2, padding="same"), k.layers.Resizing(7, 5),
    ),
    "norms": lambda k: _chain(
        k, (6, 6, 8), k.layers.Normalization(mean=[1.0] * 8, variance=[2.0] * 8),
        k.layers.GroupNormalization(4),
        k.layers.LayerNormalization(), k.layers.RMSNormalization(), k.layers.UnitNormalization(),
        k.layers.BatchNormalization(center=False, scale=False),
    ),
    "activations": lambda k: _chain(
        k, (6, 6, 4), k.layers.Conv2D(4, 1, activation="leaky_relu"), k.layers.PReLU(shared_axes=[1, 2]),
        k.layers.ELU(0.5), k.layers.LeakyReLU(0.1), k.layers.Softmax(), k.layers.Activation("hard_silu"),
        k.layers.Activation("mish"), k.layers.Activation("log_softmax"),
        k.layers.ReLU(negative_slope=0.1, threshold=0.2, max_value=1.0), k.layers.Activation("exponential"),
    ),
    "shapes": lambda k: _chain(
        k, (6, 6, 4), k.layers.Conv2D(4, 1), k.layers.Dense(3, activation="relu"),
        k.layers.Permute((3, 1, 2)),
        k.layers.Reshape((9, -1)), k.layers.EinsumDense("abc,cd->abd", output_shape=(None, 5), bias_axes="d"),
    ),
    "repeated": lambda k: _chain(
        k, (6,), k.layers.Dense(4), k.layers.RepeatVector(3), k.layers.GRU(4, return_sequences=True),
    ),
    "dilated": lambda k: _chain(
        k, (12, 12, 4), k.layers.Conv2D(6, 3, dilation_rate=2, padding="same", groups=2),
        k.layers.SpatialDropout2D(0.1), k.layers.MaxPooling2D(2, 2, padding="same"),
        k.layers.Conv2D(4, (5, 2), strides=(3, 2), padding="same"),
    ),
}  # fmt: skip


def _saved(k: Any, model: Any, path: Path) -> Path:
    """The model with weights that are neither zeros nor ones, in a file."""
    random = np.random.default_rng(0)
    for weight in model.weights:
        if any(word in weight.path for word in ("moving", "gamma", "beta", "bias", "alpha", "scale")):
            weight.assign(random.random(weight.shape) + 0.3)
    model.save(path)
    return path


def _build(k: Any, name: str) -> Any:
    k.utils.set_random_seed(0)
    k.backend.clear_session()
    return NETS[name](k)


@pytest.mark.parametrize("name", NETS)
def test_every_layer_is_taken_over(keras: Any, name: str, tmp_path: Path) -> None:
    """The import compares with Keras on two batches and raises when they differ."""
    path = _saved(keras, _build(keras, name), tmp_path / "net.keras")
    model = load_model(str(path))
    assert isinstance(model.module, KerasModel)  # not by way of ONNX
    entry = model.entries["forward"]
    bigger = tuple(torch.cat([value, value]) for value in entry.example_inputs)
    with torch.no_grad():
        outputs = torch.utils._pytree.tree_leaves(model.module(*bigger))
    assert [len(output) for output in outputs] == [4] * len(entry.output_names)


@pytest.mark.parametrize("name", ["cnn", "recurrent", "text", "norms"])
def test_legacy_files(keras: Any, name: str, tmp_path: Path) -> None:
    model = _build(keras, name)
    one = load_model(str(_saved(keras, model, tmp_path / "net.h5")))
    other = load_model(str(_saved(keras, model, tmp_path / "net.keras")))
    ours, theirs = one.module.state_dict(), other.module.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["MobileNetV3Small", "EfficientNetB0", "DenseNet121", "ConvNeXtTiny", "InceptionResNetV2"]
)
def test_applications(keras: Any, name: str, tmp_path: Path) -> None:
    keras.backend.clear_session()
    net = getattr(keras.applications, name)(weights=None, input_shape=(96, 96, 3))
    net.save(tmp_path / "net.keras")
    assert isinstance(load_model(str(tmp_path / "net.keras")).module, KerasModel)


@pytest.mark.parametrize("mode", ["concat", "sum", "ave", "mul", None])
@pytest.mark.parametrize("sequences", [True, False])
def test_both_directions(keras: Any, mode: str | None, sequences: bool, tmp_path: Path) -> None:
    inner = keras.layers.LSTM(5, return_sequences=sequences)
    net = _chain(keras, (9, 6), keras.layers.Bidirectional(inner, merge_mode=mode, name="both"))
    model = load_model(str(_saved(keras, net, tmp_path / "net.keras")))
    assert isinstance(model.module.get_submodule("both"), nn.LSTM)


class TestHowItLooks:
    def test_layers_keep_their_names_and_channels_are_moved_once(self, keras: Any, tmp_path: Path) -> None:
        model = load_model(str(_saved(keras, _build(keras, "cnn"), tmp_path / "net.keras")))
        layers = {name: type(layer).__name__ for name, layer in model.module.named_modules()}
        assert layers["conv2d"] == "Conv2d" and layers["batch_normalization"] == "BatchNorm2d"
        assert layers["separable_conv2d.depthwise"] == "Conv2d" and layers["scores"] == "Linear"
        moves = [step for step in model.module.steps if step.function == "permute"]  # type: ignore[union-attr]
        assert len(moves) == 2  # behind the input and before Flatten

    def test_gates_are_not_turned(self, keras: Any, tmp_path: Path) -> None:
        model = load_model(str(_saved(keras, _build(keras, "gates"), tmp_path / "net.keras")))
        assert sum(step.function == "permute" for step in model.module.steps) == 1  # type: ignore[union-attr]

    def test_nested_models_keep_their_folders_and_share_their_layers(
        self, keras: Any, tmp_path: Path
    ) -> None:
        model = load_model(str(_saved(keras, _build(keras, "nested"), tmp_path / "net.keras")))
        assert isinstance(model.module.get_submodule("backbone.conv"), nn.Conv2d)
        entry = model.entries["forward"]
        assert entry.input_names == ("left", "right") and entry.output_names == ("p", "q")
        calls = [node.name for node in trace(model) if node.layer == "backbone.conv" and "/" not in node.name]
        assert calls == ["backbone.conv#0", "backbone.conv#1"]

    def test_inputs_look_as_in_keras(self, keras: Any, tmp_path: Path) -> None:
        model = load_model(str(_saved(keras, _build(keras, "cnn"), tmp_path / "net.keras")))
        entry = model.entries["forward"]
        assert tuple(entry.example_inputs[0].shape) == (2, 16, 16, 3)
        assert entry.dynamic_axes == {"input_layer": {0: "batch"}} and entry.output_names == ("scores",)


@pytest.mark.parametrize("name", ["cnn", "text", "over time"])
def test_it_exports_and_trains(keras: Any, name: str, tmp_path: Path) -> None:
    source = _build(keras, name)
    model = load_model(str(_saved(keras, source, tmp_path / "net.keras")))
    _same_on_onnxruntime(model, source, tmp_path)
    inputs = model.entries["forward"].example_inputs
    target = torch.rand_like(model.module(*inputs).detach())
    optimizer = torch.optim.SGD(model.module.parameters(), 1e-2)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model.module(*inputs), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]


def _same_on_onnxruntime(model: Model, source: Any, folder: Path) -> None:
    artifact = find_runtime("onnxruntime").lower(model, Target(), folder)
    session = ort.InferenceSession(folder / artifact.files[0], providers=["CPUExecutionProvider"])
    batch = [value[[0, 1, 0]] for value in model.entries["forward"].example_inputs]
    feed = {item.name: value.numpy() for item, value in zip(session.get_inputs(), batch, strict=True)}
    with torch.no_grad():
        expected = source(batch[0], training=False).numpy()
    (found,) = session.run(None, feed)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


class TestWhatIsRefused:
    def test_code_in_a_file(self, keras: Any, tmp_path: Path) -> None:
        mark = tmp_path / "it ran"
        place = str(mark)
        code = keras.layers.Lambda(lambda x: (open(place, "w").close(), x)[1], name="bad")  # noqa: PTH123
        net = _chain(keras, (4,), code)
        mark.unlink()
        for name in ("net.keras", "net.h5"):
            net.save(tmp_path / name)
            with pytest.raises(LoadError, match=r"layer 'bad' of .* is a Lambda, which holds code") as caught:
                load_model(str(tmp_path / name))
            assert caught.value.fix is not None and "format='onnx'" in caught.value.fix
        assert not mark.exists()

    def test_a_class_of_another_house(self, tmp_path: Path) -> None:
        config = {"module": "os", "class_name": "system", "config": {"name": "x"}}
        with zipfile.ZipFile(tmp_path / "net.keras", "w") as archive:
            archive.writestr("config.json", json.dumps({"class_name": "Sequential", "config": [config]}))
        with pytest.raises(LoadError, match=r"'x' of .* is a os\.system, none of Keras' own"):
            load_model(str(tmp_path / "net.keras"))

    def test_a_custom_class(self, keras: Any, tmp_path: Path) -> None:
        @keras.saving.register_keras_serializable("mine")
        class Odd(keras.layers.Layer):  # type: ignore[misc, name-defined]
            def call(self, x: Any) -> Any:
                return x * 2

        _chain(keras, (4,), Odd()).save(tmp_path / "net.keras")
        with pytest.raises(LoadError, match="its code is not run"):
            load_model(str(tmp_path / "net.keras"))

    def test_weights_alone(self, keras: Any, tmp_path: Path) -> None:
        _chain(keras, (4,), keras.layers.Dense(2)).save_weights(tmp_path / "net.weights.h5")
        with pytest.raises(LoadError, match="holds weights without a model"):
            load_model(str(tmp_path / "net.weights.h5"))

    @pytest.mark.parametrize("name", ["net.keras", "net.h5"])
    def test_damaged_files(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b"PK\x03\x04 nothing")
        with pytest.raises(LoadError, match="is no Keras file, or a damaged one"):
            load_model(str(tmp_path / name))

    def test_a_truncated_file(self, keras: Any, tmp_path: Path) -> None:
        path = _saved(keras, _build(keras, "bytes"), tmp_path / "net.keras")
        for share in (0.2, 0.6, 0.95):
            cut = tmp_path / "cut.keras"
            cut.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
            with pytest.raises(LoadError):
                load_model(str(cut))

    def test_inputs_that_do_not_fit(self, keras: Any, tmp_path: Path) -> None:
        path = _saved(keras, _build(keras, "cnn"), tmp_path / "net.keras")
        with pytest.raises(LoadError, match=r"takes float32 \('any', 16, 16, 3\), not \(2, 3, 16, 16\)"):
            load_model(str(path), inputs=[InputSpec.parse("3x16x16")])

    def test_an_open_axis_asks_for_its_size(self, keras: Any, tmp_path: Path) -> None:
        path = _saved(keras, _chain(keras, (None, 6), keras.layers.LSTM(4)), tmp_path / "net.keras")
        keras.backend.clear_session()
        with pytest.raises(LoadError, match=r"leaves its axes \[1\] open"):
            load_model(str(path))
        model = load_model(str(path), inputs=[InputSpec.parse("5x6")])
        (name,) = model.entries["forward"].input_names
        assert model.entries["forward"].dynamic_axes == {name: {0: "batch", 1: f"{name}_axis1"}}
        assert model.module(torch.randn(3, 11, 6)).shape == (3, 4)

    def test_without_keras(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        (tmp_path / "net.keras").write_bytes(b"PK")
        with pytest.raises(MissingRuntime) as caught:
            load_model(str(tmp_path / "net.keras"))
        assert caught.value.fix == 'pip install "featherweight[keras]"'


def test_other_layers_come_by_way_of_onnx(keras: Any, tmp_path: Path) -> None:
    x = given = keras.Input((8,), name="x")
    net = keras.Model(given, keras.ops.cumsum(keras.layers.Dense(4)(x), axis=1))
    model = load_model(str(_saved(keras, net, tmp_path / "net.keras")))
    assert type(model.module).__name__ == "Imported"
    entry = model.entries["forward"]
    assert entry.input_names == ("x",) and entry.dynamic_axes == {"x": {0: "batch"}}


def test_keras_is_imported_only_for_its_files_and_leaves_nothing_behind(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from featherweight.api import *\n"
        "import featherweight.cli, featherweight.exchange.load\n"
        "assert not {'keras', 'h5py', 'transformers'} & set(sys.modules)\n"
        "before = dict(os.environ)\n"
        "from featherweight.exchange.keras_in.read import import_keras_package\n"
        "assert import_keras_package().backend.backend() == 'torch'\n"
        "assert dict(os.environ) == before\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("KERAS_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / ".keras").exists()
