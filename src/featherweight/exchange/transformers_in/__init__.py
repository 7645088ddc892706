"""Hugging Face folders (config.json and weights) -> a module with an entry for each way of calling it.

Nothing is fetched and no code of the folder runs: files of the folder only, classes of the installed
transformers only, pickled weights as tensors only. Layers keep their names.

| kind | entries |
|---|---|
| encoder-only, images, sound | forward |
| decoder with past | prefill, decode |
| encoder-decoder | encoder, decoder, decode |
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import LoadError, MissingRuntime
from featherweight.exchange.key import file_digest, root_key
from featherweight.exchange.transformers_in.calls import Flat, FlatSeq2Seq, outputs_of
from featherweight.exchange.weights import check_finite
from featherweight.model import Entry, Model

_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"
_WEIGHTS = (_SAFE, f"{_SAFE}.index.json", _PICKLED, f"{_PICKLED}.index.json")
_LENGTH, _PAST = 8, 6  # of the examples that entries are traced with
_TEXT = ("input_ids", "attention_mask", "token_type_ids")
_Axes = dict[int, str]


def import_transformers(folder: Path, *, examples: Sequence[Tensor] | None = None) -> Model:
    """The model of a folder that ``save_pretrained`` wrote.

    Args:
        folder: With config.json and model.safetensors (or its index, or pytorch_model.bin).
        examples: For a model with one entry: a batch for each input; None: seeded ones.

    Raises:
        LoadError: A file is missing or does not fit, the model needs code of its own, transformers does not
            know it, or it is called in a way that is not known here.
        MissingRuntime: transformers is not installed.
    """
    config = _read_config(folder)
    weights = _weights(folder)
    _require(folder)
    with _offline():
        model = _load(folder, config, pickled=_PICKLED in weights.name)
    check_finite(model, str(folder))
    model.eval()
    entries = _entries(model, folder, examples)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
    origin = [file_digest(path) for path in files if path.name == "config.json" or path.suffix != ".json"]
    return Model(model, entries, key=root_key(model, entries, origin))


def _require(folder: Path) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise MissingRuntime(
            f"'{folder}' is a Hugging Face folder, and there is no package 'transformers'",
            fix='pip install "featherweight[transformers]"',
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise LoadError(
            f"'{folder}' has no config.json", fix="give the folder that model.save_pretrained(...) wrote"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise LoadError(f"'{path}' is damaged: {error}", fix="save the model again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise LoadError(
            f"'{path}' says no model_type, so it is no model of transformers",
            fix="give the folder that model.save_pretrained(...) wrote",
        )
    if config.get("auto_map"):
        raise LoadError(
            f"'{folder}' wants code of its own to be run ({next(iter(config['auto_map'].values()))})",
            fix="import that code yourself: path.py:callable with --weights model.safetensors",
        )
    return config


def _weights(folder: Path) -> Path:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            if name.endswith(".json"):
                _check_shards(folder, folder / name)
            return folder / name
    raise LoadError(f"'{folder}' holds no weights", fix=f"it needs {_SAFE}; save the model again")


def _check_shards(folder: Path, index: Path) -> None:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"'{index}' is damaged", fix="save the model again") from error
    for name in sorted(names):
        if Path(str(name)).name != name:
            raise LoadError(f"'{index}' names '{name}', outside of its folder", fix="save the model again")
        if not (folder / name).is_file():
            raise LoadError(f"'{folder}' lacks '{name}', a part of its weights", fix="copy it there too")


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """transformers without network, progress bars and warnings; its settings are put back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from huggingface_hub import constants
        from transformers.utils import logging

        offline, level, bars = (
            constants.HF_HUB_OFFLINE,
            logging.get_verbosity(),
            logging.is_progress_bar_enabled(),
        )
        constants.HF_HUB_OFFLINE = True
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = offline
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def _load(folder: Path, raw: Mapping[str, Any], *, pickled: bool) -> Any:
    import transformers

    how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **how)
    except Exception as error:  # its checks raise kinds of their own
        raise LoadError(
            f"transformers {transformers.__version__} cannot read '{folder / 'config.json'}', "
            f"of model type '{raw['model_type']}': {_first(error)}",
            fix="install the version that wrote it: "
            + str(raw.get("transformers_version", "see config.json")),
        ) from error
    kind = _class(transformers, config, folder)
    try:
        model, info = kind.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation=_attention(kind, config),
            use_safetensors=not pickled, weights_only=True, output_loading_info=True, local_files_only=True,
            ignore_mismatched_sizes=True,  # told below
        )  # fmt: skip
    except Exception as error:  # transformers, safetensors and torch raise what they like
        raise LoadError(
            f"the weights in '{folder}' cannot be read: {_first(error)}",
            fix="save the model again, as safetensors",
        ) from error
    missing = sorted(info["missing_keys"])
    wrong = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info["mismatched_keys"])
    if missing or wrong:
        said = f"lack {_some(missing)}" if missing else f"have other shapes in {_some(wrong)}"
        raise LoadError(
            f"the weights in '{folder}' do not fit {kind.__name__}: they {said}",
            fix="config.json and weights must come from the same model",
        )
    _ordinary(model)
    base = FlatSeq2Seq if config.is_encoder_decoder else Flat
    model.__class__ = type(kind.__name__, (base, kind), {"__module__": kind.__module__})
    return model


def _ordinary(model: nn.Module) -> None:
    """GPT-2's layers that hold a transposed weight become ``nn.Linear``, which every method knows."""
    from transformers.pytorch_utils import Conv1D

    for path, layer in list(model.named_modules()):
        if isinstance(layer, Conv1D):
            inputs, outputs = layer.weight.shape
            made = nn.Linear(inputs, outputs)
            made.weight.data, made.bias.data = layer.weight.data.T.contiguous(), layer.bias.data
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made)


def _class(transformers: Any, config: Any, folder: Path) -> Any:
    """The class that config.json names, else the one that transformers takes for such models."""
    for name in config.architectures or ():
        kind = getattr(transformers, str(name), None)
        if inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    try:
        return transformers.AutoModel._model_mapping[type(config)]
    except KeyError as error:
        raise LoadError(
            f"'{folder}' names the class {_some(list(config.architectures or ['none']))}, "
            f"which transformers {transformers.__version__} does not have",
            fix="install the version that wrote it",
        ) from error


def _attention(kind: Any, config: Any) -> str:
    """Fused in encoders, so that no method touches scores and masks; written out in decoders.

    A fused kernel gives zeros where a token may look at nothing (padding on the left), which no exported
    graph does.
    """
    from featherweight.exchange.transformers_in.attention import register

    generates = config.is_encoder_decoder or kind.can_generate()
    return register() if getattr(kind, "_supports_sdpa", False) and not generates else "eager"


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _some(names: Sequence[str]) -> str:
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")


# ---- entries


def _entries(model: Any, folder: Path, examples: Sequence[Tensor] | None) -> dict[str, Entry]:
    config = model.config
    main = str(model.main_input_name)
    if config.is_encoder_decoder and main == "input_ids":
        _refuse_examples(folder, examples)
        return _encoder_decoder(model, folder)
    if main == "input_ids" and model.can_generate():
        _refuse_examples(folder, examples)
        return _decoder(model, folder)
    if config.is_encoder_decoder:
        raise LoadError(
            f"'{folder}' ({config.model_type}) takes {main} into an encoder and a decoder: not known here",
            fix="export its parts to ONNX, and give those files",
        )
    return {"forward": _forward(model, main, folder, examples)}


def _refuse_examples(folder: Path, examples: Sequence[Tensor] | None) -> None:
    if examples is not None:
        raise LoadError(
            f"'{folder}' is called in several ways, and data (or --input) has one",
            fix="featherweight inspect shows it without data; fit and measure take models with one entry",
        )


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """Those of the model's own forward, behind ours."""
    own: Any = next(kind for kind in type(model).__mro__[1:] if not issubclass(kind, Flat))
    return inspect.signature(own.forward).parameters


def _whole(*shape: int, below: int, seed: int) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def _forward(model: Any, main: str, folder: Path, examples: Sequence[Tensor] | None) -> Entry:
    config = model.config
    known = _parameters(model)
    if main == "input_ids":
        names = [name for name in _TEXT if name in known]
        if getattr(config, "type_vocab_size", 2) < 2 and "token_type_ids" in names:
            names.remove("token_type_ids")
        ids = _whole(2, _LENGTH, below=config.vocab_size, seed=0)
        made = {"input_ids": ids, "attention_mask": _mask(_LENGTH), "token_type_ids": torch.zeros_like(ids)}
        axes: _Axes = {0: "batch", 1: "sequence"}
    elif main == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (2, int(getattr(config, "num_channels", 3)), int(height), int(width))
        names, made = [main], {main: torch.randn(shape, generator=torch.Generator().manual_seed(0))}
        axes = {0: "batch"}
    elif main == "input_values":
        names, made = [main], {main: torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))}
        axes = {0: "batch", 1: "samples"}
    else:
        raise LoadError(
            f"'{folder}' ({config.model_type}) takes {main}, which is not known", fix="give path.py:callable"
        )
    values = [made[name] for name in names]
    if examples is not None:
        if len(examples) > len(names):
            raise LoadError(
                f"'{folder}' takes at most {len(names)} inputs ({', '.join(names)}), not {len(examples)}",
                fix="give one array per input, in this order",
            )
        values = [
            _like(value, made[name], name, folder) for name, value in zip(names, examples, strict=False)
        ]
    model.flat_names = tuple(names[: len(values)])
    model.flat_layers, model.flat_positions = 0, False
    outputs = _call(model, values, folder)
    return Entry(tuple(values), model.flat_names, outputs, {name: dict(axes) for name in model.flat_names})


def _mask(length: int) -> Tensor:
    """All tokens count, but for the last two of the second example, so that the mask matters."""
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, -2:] = 0
    return mask


def _like(value: Tensor, wanted: Tensor, name: str, folder: Path) -> Tensor:
    if value.dim() != wanted.dim() or value.is_floating_point() != wanted.is_floating_point():
        raise LoadError(
            f"input '{name}' of '{folder}' takes {str(wanted.dtype).removeprefix('torch.')} of shape "
            f"{tuple(wanted.shape)}, not {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}",
            fix="give data (or --input) of this shape and dtype; the batch comes first",
        )
    return value.to(wanted.dtype)


def _call(model: Any, values: Sequence[Tensor], folder: Path) -> tuple[str, ...]:
    """Names of the outputs, from one call."""
    try:
        with torch.no_grad():
            outputs = model.call_model(**dict(zip(model.flat_names, values, strict=True)), **model._quiet())
    except Exception as error:  # models raise what they like
        raise LoadError(
            f"'{folder}' cannot be called with {', '.join(model.flat_names)}: {_first(error)}",
            fix="give data (or --input) of the shape that it takes",
        ) from error
    names = tuple(outputs_of(outputs))
    if not names:
        raise LoadError(f"'{folder}' returns no tensor", fix="give path.py:callable")
    return names


def _decoder(model: Any, folder: Path) -> dict[str, Entry]:
    config = model.config.get_text_config(decoder=True)
    layers = int(config.num_hidden_layers)
    model.flat_names, model.flat_layers = ("input_ids", "attention_mask"), layers
    model.flat_positions = "position_ids" in _parameters(model)
    ids, mask = _whole(2, _LENGTH, below=config.vocab_size, seed=0), torch.ones(2, _LENGTH, dtype=torch.int64)
    mask[1, :2] = 0  # padding is on the left of a decoder's texts
    both: _Axes = {0: "batch", 1: "sequence"}
    try:
        with torch.no_grad():
            _, *past = model.prefill(ids[:, :_PAST], mask[:, :_PAST])
    except Exception as error:  # models raise what they like
        raise _other_cache(model, folder, _first(error)) from error
    if any(tensor is None for tensor in past):
        raise _other_cache(model, folder, "they stay empty")
    names = [f"{index}.{part}" for index in range(layers) for part in ("key", "value")]
    outputs = ("logits", *(f"present.{name}" for name in names))
    keys = tuple(f"past_key_values.{name}" for name in names)
    return {
        "prefill": Entry(
            (ids, mask), ("input_ids", "attention_mask"), outputs,
            {"input_ids": both, "attention_mask": both}, "prefill",
        ),
        "decode": Entry(
            (ids[:, :1], mask[:, : _PAST + 1], *past), ("input_ids", "attention_mask", *keys), outputs,
            {
                "input_ids": {0: "batch"},
                "attention_mask": {0: "batch", 1: "total"},
                **{name: {0: "batch", 2: "past"} for name in keys},
            },
            "decode",
        ),
    }  # fmt: skip


def _other_cache(model: Any, folder: Path, why: str) -> LoadError:
    """States of a recurrence, and other caches."""
    return LoadError(
        f"'{folder}' ({model.config.model_type}) does not keep keys and values for each layer: {why}",
        fix="give path.py:callable, with a method for each way of calling it",
    )


def _encoder_decoder(model: Any, folder: Path) -> dict[str, Entry]:
    config = model.config
    layers = int(getattr(config, "num_decoder_layers", None) or config.decoder_layers)
    model.flat_names, model.flat_layers, model.flat_positions = ("input_ids", "attention_mask"), layers, False
    ids, mask = _whole(2, _LENGTH, below=config.vocab_size, seed=0), _mask(_LENGTH)
    tokens = _whole(2, _PAST, below=config.vocab_size, seed=1)
    try:
        with torch.no_grad():
            states = model.encode(ids, mask)
            _, *past = model.decode_first(tokens, states, mask)
    except Exception as error:  # models raise what they like
        raise _other_cache(model, folder, _first(error)) from error
    parts = [
        f"{i}.{side}.{part}"
        for i in range(layers)
        for side in ("decoder", "encoder")
        for part in ("key", "value")
    ]
    own = [name for name in parts if ".decoder." in name]
    keys = tuple(f"past_key_values.{name}" for name in parts)
    both: _Axes = {0: "batch", 1: "sequence"}
    there: dict[str, _Axes] = {"encoder_attention_mask": {0: "batch", 1: "sequence"}}
    return {
        "encoder": Entry(
            (ids, mask), ("input_ids", "attention_mask"), ("last_hidden_state",),
            {"input_ids": both, "attention_mask": both}, "encode",
        ),
        "decoder": Entry(
            (tokens, states, mask),
            ("decoder_input_ids", "encoder_hidden_states", "encoder_attention_mask"),
            ("logits", *(f"present.{name}" for name in parts)),
            {"decoder_input_ids": {0: "batch", 1: "target"}, "encoder_hidden_states": both, **there},
            "decode_first",
        ),
        "decode": Entry(
            (tokens[:, :1], mask, *past), ("decoder_input_ids", "encoder_attention_mask", *keys),
            ("logits", *(f"present.{name}" for name in own)),
            {
                "decoder_input_ids": {0: "batch"},
                **there,
                **{n: {0: "batch", 2: "past" if ".decoder." in n else "sequence"} for n in keys},
            },
            "decode_next",
        ),
    }  # fmt: skip
