"""Hugging Face folders: tiny random models of each kind, saved here; nothing is fetched."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from featherweight.errors import LoadError, MissingRuntime
from featherweight.exchange.load import load_model
from featherweight.graph import trace
from featherweight.model import Entry, Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Target

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason='transformers is not installed: pip install "featherweight[transformers]"',
)

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {**_SMALL, "vocab_size": 100}
_ENDS = {"bos_token_id": 0, "eos_token_id": 0}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _TEXT),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 100},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_SMALL, "image_size": 32, "patch_size": 8}),
    "mobilenet": (
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"depth_multiplier": 0.25, "image_size": 32},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64, **_ENDS},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_TEXT, "num_key_value_heads": 2, **_ENDS}),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "image_size": 32},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 100},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
            **{"d_model": 32, "vocab_size": 100, "max_position_embeddings": 64, **_ENDS},
            **{"pad_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": 0},
        },
    ),
}
_GROWS = {"batch": 1, "sequence": 3, "past": 2, "total": 2, "target": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """``folders(name)``: where a tiny model was saved, once."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            kind, config, settings = KINDS[name]
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = getattr(transformers, kind)(getattr(transformers, config)(**settings))
                model.save_pretrained(made[name])
        return made[name]

    yield save
    logging.enable_progress_bar()


def _grown(entry: Entry) -> tuple[Tensor, ...]:
    """Inputs with another size on every open axis."""
    grown = []
    for name, value in zip(entry.input_names, entry.example_inputs, strict=True):
        for axis, symbol in entry.dynamic_axes.get(name, {}).items():
            size = value.shape[axis] + _GROWS[symbol]
            value = value.index_select(axis, torch.arange(size) % value.shape[axis])
        grown.append(value)
    return tuple(grown)


def _check_on_onnxruntime(model: Model, folder: Path) -> None:
    artifact = find_runtime("onnxruntime").lower(model, Target(), folder)
    for name, entry in model.entries.items():
        session = ort.InferenceSession(folder / artifact.entries[name], providers=["CPUExecutionProvider"])
        assert [item.name for item in session.get_inputs()] == list(entry.input_names)
        assert [item.name for item in session.get_outputs()] == list(entry.output_names)
        for inputs in (entry.example_inputs, _grown(entry)):
            with torch.no_grad():
                meant = getattr(model.module, entry.method)(*inputs)
            expected = [meant] if isinstance(meant, Tensor) else list(meant)
            feed = {key: value.numpy() for key, value in zip(entry.input_names, inputs, strict=True)}
            for ours, theirs in zip(session.run(None, feed), expected, strict=True):
                assert np.abs(ours - theirs.numpy()).max() <= 1e-4 * np.abs(theirs.numpy()).max()


_FAST = ("vit",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _FAST else pytest.mark.slow) for name in KINDS]
)
def test_every_entry_runs_on_onnxruntime_with_other_sizes(
    folders: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    _check_on_onnxruntime(load_model(str(folders(name))), tmp_path)


def test_an_encoder(folders: Callable[[str], Path]) -> None:
    import transformers

    model = load_model(str(folders("bert")))
    entry = model.entries["forward"]
    assert entry.input_names == ("input_ids", "attention_mask", "token_type_ids")
    assert entry.output_names == ("logits",)
    assert entry.dynamic_axes["input_ids"] == {0: "batch", 1: "sequence"}
    own = transformers.BertForSequenceClassification.from_pretrained(folders("bert")).eval()
    assert model.module.state_dict().keys() == own.state_dict().keys()  # every layer keeps its name
    ids = torch.randint(0, 100, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.no_grad():
        ours, theirs = model.module(ids, mask), own(ids, mask).logits
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_inputs_are_as_many_as_the_data_has(folders: Callable[[str], Path]) -> None:
    ids = np.ones((4, 5), np.int32)
    entry = load_model(str(folders("bert")), example_inputs=(ids, ids)).entries["forward"]
    assert entry.input_names == ("input_ids", "attention_mask")
    assert all(value.dtype == torch.int64 for value in entry.example_inputs)
    with pytest.raises(LoadError, match=r"'input_ids' .* takes int64 of shape \(2, 8\), not float32"):
        load_model(str(folders("bert")), example_inputs=(np.ones((4, 5), np.float32),))


def test_images(folders: Callable[[str], Path]) -> None:
    entry = load_model(str(folders("mobilenet"))).entries["forward"]
    assert entry.input_names == ("pixel_values",) and entry.dynamic_axes == {"pixel_values": {0: "batch"}}
    assert tuple(entry.example_inputs[0].shape) == (2, 3, 32, 32)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_decoder_step_by_step_is_the_decoder_at_once(folders: Callable[[str], Path], name: str) -> None:
    import transformers

    model: Any = load_model(str(folders(name)))
    assert set(model.entries) == {"prefill", "decode"}
    assert model.entries["decode"].input_names[2:4] == ("past_key_values.0.key", "past_key_values.0.value")
    heads = 2 if name == "llama" else 4  # grouped queries share keys
    assert model.entries["decode"].example_inputs[2].shape == (2, heads, 6, 8)
    own = getattr(transformers, KINDS[name][0]).from_pretrained(folders(name)).eval()
    ids, mask = torch.randint(0, 100, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    with torch.no_grad():
        logits, *past = model.module.prefill(ids[:, :7], mask[:, :7])
        for place in (7, 8):
            logits, *past = model.module.decode(ids[:, place : place + 1], mask[:, : place + 1], *past)
        expected = own(ids).logits[:, -1:]
    assert torch.allclose(logits, expected, atol=1e-5)


def test_padding_on_the_left_changes_nothing(folders: Callable[[str], Path]) -> None:
    model: Any = load_model(str(folders("gpt2")))
    ids = torch.randint(0, 100, (1, 5))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 5])
    with torch.no_grad():
        ours = model.module.prefill(padded, mask)[0][:, -1]
        expected = model.module.prefill(ids, torch.ones_like(ids))[0][:, -1]
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_and_a_decoder(folders: Callable[[str], Path], name: str) -> None:
    import transformers

    model: Any = load_model(str(folders(name)))
    assert set(model.entries) == {"encoder", "decoder", "decode"}
    own = getattr(transformers, KINDS[name][0]).from_pretrained(folders(name)).eval()
    ids, tokens = torch.randint(2, 100, (2, 7)), torch.randint(2, 100, (2, 5))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with torch.no_grad():
        states = model.module.encode(ids, mask)
        _, *past = model.module.decode_first(tokens[:, :4], states, mask)
        logits, *_ = model.module.decode_next(tokens[:, 4:], mask, *past)
        expected = own(input_ids=ids, attention_mask=mask, decoder_input_ids=tokens).logits[:, -1:]
    assert torch.allclose(logits, expected, atol=1e-5)


def test_training_lowers_a_loss(folders: Callable[[str], Path]) -> None:
    model = load_model(str(folders("bert")))
    inputs, labels = model.entries["forward"].example_inputs, torch.tensor([0, 1])
    optimizer = torch.optim.SGD(model.module.parameters(), 0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model.module(*inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_attention_of_an_encoder_stays_fused(folders: Callable[[str], Path]) -> None:
    """Masks hold the smallest float: written out, integers would have to reach from there to the scores."""
    ops = [node.op for node in trace(load_model(str(folders("bert"))))]
    assert ops.count("scaled_dot_product_attention") == 2


def test_several_entries_are_inspected(folders: Callable[[str], Path]) -> None:
    from featherweight import api

    told = api.inspect(str(folders("gpt2")), static=True)
    assert set(told["entries"]) == {"prefill", "decode"}
    assert told["entries"]["prefill"]["macs"] > told["entries"]["decode"]["macs"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_weights_of_every_entry_are_stored_in_integers(
    folders: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    from featherweight import api

    (tmp_path / "int8.yaml").write_text("version: 1\nsteps:\n  - quantize: {activations: none}\n")
    told = api.lower(str(folders(name)), recipe=str(tmp_path / "int8.yaml"), out=tmp_path / "out")
    assert len(told["files"]) == len(load_model(str(folders(name))).entries)
    assert told["bytes_by_type"]["int8"] > 20_000


class TestBadFolders:
    def _refusal(self, folder: Path) -> LoadError:
        with pytest.raises(LoadError) as caught:
            load_model(str(folder))
        assert caught.value.fix
        return caught.value

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert "is a folder, not a model" in self._refusal(tmp_path).what

    def test_no_config(self, folders: Callable[[str], Path], tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes((folders("vit") / "model.safetensors").read_bytes())
        assert "has weights and no config.json" in self._refusal(tmp_path).what

    def test_no_weights(self, folders: Callable[[str], Path], tmp_path: Path) -> None:
        (tmp_path / "config.json").write_bytes((folders("vit") / "config.json").read_bytes())
        assert "holds no weights" in self._refusal(tmp_path).what

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"model_type": "no_such_type"}, "of model type 'no_such_type'"),
            ({"model_type": None}, "says no model_type"),
            ({"auto_map": {"AutoModel": "modeling.Evil"}}, "wants code of its own to be run (modeling.Evil)"),
            ({"num_hidden_layers": 3}, "they lack"),
            ({"hidden_size": 64}, "they have other shapes in "),
            ({"intermediate_size": "wide"}, "cannot read"),
        ],
        ids=str,
    )
    def test_a_config_of_another_model(
        self, folders: Callable[[str], Path], change: dict[str, Any], words: str, tmp_path: Path
    ) -> None:
        source = folders("vit")
        config = json.loads((source / "config.json").read_text()) | change
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
        assert words in self._refusal(tmp_path).what

    def test_damaged_files(self, folders: Callable[[str], Path], tmp_path: Path) -> None:
        source = folders("vit")
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes()[:40])
        (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:1000])
        assert "is damaged" in self._refusal(tmp_path).what
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        assert "cannot be read" in self._refusal(tmp_path).what

    def test_shards(self, folders: Callable[[str], Path], tmp_path: Path) -> None:
        (tmp_path / "config.json").write_bytes((folders("vit") / "config.json").read_bytes())
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
        assert "lacks 'model-1.safetensors'" in self._refusal(tmp_path).what
        index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
        assert "outside of its folder" in self._refusal(tmp_path).what

    def test_pickled_weights_are_tensors_or_nothing(
        self, folders: Callable[[str], Path], tmp_path: Path
    ) -> None:
        from safetensors.torch import load_file

        source = folders("vit")
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        tensors = load_file(source / "model.safetensors")
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        entry = load_model(str(tmp_path)).entries["forward"]
        assert entry.output_names == ("logits",)
        mark = tmp_path / "it ran"
        torch.save({**tensors, "evil": _Evil(str(mark))}, tmp_path / "pytorch_model.bin")
        assert "cannot be read" in self._refusal(tmp_path).what
        assert not mark.exists()

    def test_data_for_several_entries(self, folders: Callable[[str], Path]) -> None:
        with pytest.raises(LoadError, match="is called in several ways"):
            load_model(str(folders("gpt2")), example_inputs=(np.ones((2, 4), np.int64),))

    def test_without_transformers(
        self, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingRuntime) as caught:
            load_model(str(folders("vit")))
        assert caught.value.fix == 'pip install "featherweight[transformers]"'


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")
