"""Brings a model in: user code, an ONNX file, an exported program, a Keras file, a Hugging Face folder, or
(only when asked in words) a pickle.

Whatever comes in becomes a plain, eager, trainable ``nn.Module`` in inference mode, with one entry
whose example inputs are a batch of two, so that tracing keeps the batch dynamic.
"""

from __future__ import annotations

import inspect
import pickle
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.errors import LoadError
from featherweight.exchange.key import file_digest, root_key
from featherweight.exchange.weights import check_finite, fit_weights, load_safely, read_tensors
from featherweight.model import Entry, Model
from featherweight.usercode import call_user, load_callable

WAYS = (
    "a model is path.py:callable, package.module:callable (with --weights), a file (.onnx, .pt2, .keras, "
    ".h5), or a Hugging Face folder (config.json and safetensors)"
)
_SAFE = (
    "safe ways: path.py:callable with --weights (a state dict, best as safetensors), an .onnx file, "
    "a .pt2 file of torch.export.save; --allow-pickle runs this file's code"
)
_TF2ONNX = "where TensorFlow is installed: pip install tf2onnx; python -m tf2onnx.convert"
_ELSEWHERE = {
    ".pb": f"{_TF2ONNX} --saved-model DIR --output model.onnx",
    ".tflite": f"{_TF2ONNX} --tflite FILE --output model.onnx",
    ".safetensors": "give the code too: path.py:callable --weights with this file",
}


def _floats(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.float() / 255


def _channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1) if x.dim() > 2 else x


_SCALED = "x = x.astype('float32') / 255, and normalised as in training"
_FIRST = "channels come first: x = np.moveaxis(x, -1, 1)"
_MISTAKES: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    (_SCALED, _floats),
    (_FIRST, _channels_first),
    (f"{_FIRST}, then {_SCALED}", lambda x: _channels_first(_floats(x))),
    ("the channel axis is missing: x = x[:, None]", lambda x: x[:, None]),
    (f"the channel axis is missing: x = x[:, None], then {_SCALED}", lambda x: _floats(x)[:, None]),
    ("examples are flat: x = x.reshape(len(x), -1)", lambda x: x.flatten(1) if x.dim() > 2 else x),
    ("x = x.astype('int64')", lambda x: x.long()),
)


class InputsRefused(LoadError):
    """A module that cannot be called with the inputs that it was given."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a model, when no data says it.

    Attributes:
        shape: Without the batch.
        dtype: NumPy's name: float32, int64 ...
        name: Its name in the entry; None: the parameter's name in ``forward``, or the file's.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> InputSpec:
        """``3x224x224``, ``int64:128``, ``ids=int64:128``, or ``int64:`` for one number per example.

        Raises:
            LoadError: Not of that form.
        """
        name, equals, rest = text.rpartition("=")
        dtype, colon, sizes = rest.rpartition(":")
        try:
            shape = tuple(int(size) for size in sizes.replace(",", "x").split("x") if sizes)
            known = str(np.dtype(dtype if colon else "float32"))
        except (ValueError, TypeError) as error:
            raise LoadError(f"'{text}' is no input", fix="write [NAME=][DTYPE:]3x224x224") from error
        if any(size < 1 for size in shape) or (equals and not name):
            raise LoadError(
                f"'{text}' is no input", fix="write [NAME=][DTYPE:]3x224x224, every size at least 1"
            )
        return cls(shape, known, name or None)

    def example(self, batch: int, seed: int) -> np.ndarray:
        """Seeded values: normal for floats, 0 or 1 for integers, which embeddings and masks accept."""
        random = np.random.default_rng(seed)
        shape = (batch, *self.shape)
        if np.issubdtype(np.dtype(self.dtype), np.floating):
            return random.standard_normal(shape).astype(self.dtype)
        return random.integers(0, 2, shape).astype(self.dtype)


def load_model(
    spec: str,
    *,
    weights: str | None = None,
    inputs: Sequence[InputSpec] | None = None,
    example_inputs: tuple[np.ndarray, ...] | None = None,
    method: str = "forward",
    allow_pickle: bool = False,
) -> Model:
    """The model that ``spec`` names, ready for methods.

    Args:
        spec: ``path.py:callable``, ``package.module:callable``, a file (.onnx, .pt2, .keras, .h5), or a
            Hugging Face folder.
        weights: A safetensors file or a torch state dict for the callable's module.
        inputs: What the model takes, when there are no example inputs. An ONNX file needs it only for sizes
            that it leaves open.
        example_inputs: One array per input with a leading batch, usually ``data.example_inputs()``.
        method: The module's method to call.
        allow_pickle: Load a pickled module, which runs the code that it holds.

    Raises:
        LoadError: Nothing there, not a model, weights that do not fit or are not finite, inputs that the
            model does not take, or an import that computes something else than its source.
        MissingRuntime: An ONNX import cannot be checked, since onnxruntime is not installed; or Keras or
            transformers, which read such models, are not.
    """
    examples = _examples(inputs, example_inputs)
    names = tuple(item.name for item in inputs) if inputs else ()
    if _names_code(spec):
        return _from_module(_build(spec, weights), spec, examples, names, method)
    path = Path(spec)
    _check_file(path)
    if weights is not None:
        raise LoadError(
            f"'{spec}' holds its own weights, so --weights has no place", fix="leave --weights out"
        )
    if path.suffix == ".onnx":
        from featherweight.exchange.onnx_in import import_onnx

        return import_onnx(path, examples=examples)
    if path.is_dir():
        from featherweight.exchange.transformers_in import import_transformers

        return import_transformers(path, examples=examples)
    if path.suffix in (".keras", ".h5", ".hdf5"):
        from featherweight.exchange.keras_in import import_keras

        return import_keras(path, examples=examples)
    if path.suffix == ".pt2":
        from featherweight.exchange.onnx_in import import_onnx_bytes
        from featherweight.exchange.pt2 import pt2_to_onnx

        content = pt2_to_onnx(path, allow_pickle=allow_pickle)
        return import_onnx_bytes(content, source=spec, origin=file_digest(path), examples=examples)
    return _from_module(_unpickle(path, allow_pickle=allow_pickle), spec, examples, names, method)


def model_of_module(module: nn.Module, name: str, example_inputs: tuple[np.ndarray, ...]) -> Model:
    """The model of a module that is there already.

    Args:
        module: Its weights are checked, and it is put into inference mode.
        name: What errors call it.
        example_inputs: One array per input with a leading batch.

    Raises:
        LoadError: Weights that are not finite, or inputs that it does not take.
    """
    return _from_module(module, name, _examples(None, example_inputs), (), "forward")


def _examples(
    inputs: Sequence[InputSpec] | None, arrays: tuple[np.ndarray, ...] | None
) -> tuple[Tensor, ...] | None:
    """Two examples of each input."""
    if arrays is None:
        if inputs is None:
            return None
        arrays = tuple(item.example(2, seed) for seed, item in enumerate(inputs))
    tensors = []
    for index, array in enumerate(arrays):
        if array.dtype.kind not in "fiub":
            raise LoadError(
                f"input {index} is of dtype {array.dtype}, which no model takes",
                fix="give numbers or booleans",
            )
        # Tracing takes a size of 1 for a constant; two examples keep the batch open.
        few = array[:2] if array.ndim == 0 or len(array) != 1 else np.concatenate([array, array])
        tensors.append(torch.from_numpy(np.ascontiguousarray(few)).clone())
    return tuple(tensors)


def _names_code(spec: str) -> bool:
    source, colon, _ = spec.rpartition(":")
    if spec.endswith(".py"):
        return True
    dotted = all(part.isidentifier() for part in source.split("."))
    return bool(colon) and not Path(spec).exists() and (source.endswith(".py") or dotted)


def _check_file(path: Path) -> None:
    if not path.exists():
        raise LoadError(f"there is no model '{path}'", fix=f"check the path; {WAYS}")
    if path.is_dir():
        _check_folder(path)
        return
    if path.stat().st_size == 0:
        raise LoadError(f"'{path}' is an empty file", fix=WAYS)
    if path.suffix in _ELSEWHERE:
        raise LoadError(f"'{path}' cannot be read directly", fix=_ELSEWHERE[path.suffix])


def _check_folder(path: Path) -> None:
    if (path / "config.json").is_file():
        return
    if any(path.glob("*.safetensors")):
        raise LoadError(
            f"'{path}' has weights and no config.json",
            fix="give the folder that model.save_pretrained(...) wrote, or path.py:callable --weights",
        )
    fix = _ELSEWHERE[".pb"] if (path / "saved_model.pb").exists() else WAYS
    raise LoadError(f"'{path}' is a folder, not a model", fix=fix)


def _build(spec: str, weights: str | None) -> nn.Module:
    """The module of user code, with its weights."""
    found = load_callable(spec, LoadError)
    module: Any = found if isinstance(found, nn.Module) else _call_builder(found, spec)
    if isinstance(module, torch.jit.ScriptModule):
        raise LoadError(f"'{spec}' returns a TorchScript module", fix="return the plain nn.Module")
    if not isinstance(module, nn.Module):
        raise LoadError(
            f"'{spec}' returns a {type(module).__name__}, not an nn.Module", fix="return the module itself"
        )
    if weights is not None:
        fit_weights(module, read_tensors(Path(weights)), source=weights, model=spec)
    return module


def _call_builder(function: Callable[..., Any], spec: str) -> Any:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise LoadError(
            f"'{spec}' cannot be called without arguments: {error}",
            fix="write a function without arguments that returns the module",
        ) from error
    except ValueError:  # a callable that has no signature to ask
        return call_user(function, error=LoadError)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # without --weights the module must be the same in every run
        return call_user(function, error=LoadError)


def _from_module(
    module: nn.Module,
    spec: str,
    examples: tuple[Tensor, ...] | None,
    names: tuple[str | None, ...],
    method: str,
) -> Model:
    check_finite(module, spec)
    module.eval()
    if not callable(getattr(module, method, None)):
        raise LoadError(f"'{spec}' has no method '{method}'", fix="name a method that its class defines")
    if examples is None:
        raise LoadError(
            f"nothing says what '{spec}' takes",
            fix="give --data, or the input's shape without the batch: --input 3x224x224",
        )
    examples = _as_its_floats(module, examples)
    chosen = _input_names(getattr(module, method), len(examples), names)
    outputs = _run(module, method, chosen, examples, spec)
    entry = Entry(
        example_inputs=examples,
        input_names=chosen,
        output_names=_output_names(outputs, spec),
        dynamic_axes={name: {0: "batch"} for name, item in zip(chosen, examples, strict=True) if item.dim()},
        method=method,
    )
    entries = {"forward": entry}
    return Model(module=module, entries=entries, key=root_key(module, entries))


def _input_names(function: Callable[..., Any], count: int, given: tuple[str | None, ...]) -> tuple[str, ...]:
    """Given names, else those of the method's parameters, else input, input_1 ..."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = [item.name for item in inspect.signature(function).parameters.values() if item.kind in kinds]
    if len(own) < count:
        own = [_numbered("input", index) for index in range(count)]
    return tuple(given[i] if i < len(given) and given[i] else own[i] for i in range(count))  # type: ignore[misc]


def _as_its_floats(module: nn.Module, examples: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Floating examples in the dtype of the module's first floating parameter; others as they are."""
    floats = (value.dtype for value in module.parameters() if value.is_floating_point())
    dtype = next(floats, None)
    if dtype is None:
        return examples
    return tuple(value.to(dtype) if value.is_floating_point() else value for value in examples)


def _run(
    module: nn.Module, method: str, names: tuple[str, ...], examples: tuple[Tensor, ...], spec: str
) -> Any:
    """One call on the examples, so that a wrong shape is told here and not by the tracer."""
    try:
        with torch.no_grad():
            return call_user(
                module if method == "forward" else getattr(module, method), *examples, error=LoadError
            )
    except LoadError as error:
        cause = error.__cause__ or error
        first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        given = ", ".join(
            f"{name} {str(item.dtype).removeprefix('torch.')} {tuple(item.shape)}"
            for name, item in zip(names, examples, strict=True)
        )
        raise InputsRefused(
            f"'{spec}' cannot be called with {given}: {type(cause).__name__}: {first[:300]}",
            where=error.where,
            fix=_advice(module, method, examples),
        ) from error


def _advice(module: nn.Module, method: str, examples: tuple[Tensor, ...]) -> str:
    """What to do with the data: a usual mistake, if undoing it lets the module take the examples."""
    call = module if method == "forward" else getattr(module, method)
    for text, change in _MISTAKES:
        changed = tuple(change(value) for value in examples)
        if all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(changed, examples, strict=True)):
            continue
        try:
            with torch.no_grad():
                call(*changed)
        except Exception:  # noqa: BLE001 - not this mistake; the user's module may raise anything
            continue
        shapes = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in changed)
        return f"{text}; it takes {shapes}"
    return "give data (or --input) of the shape and dtype that it takes; the first axis is the batch"


def _output_names(outputs: Any, spec: str) -> tuple[str, ...]:
    """One name per flat output: a dict's key, else output, output_1 ..."""
    flat, _ = pytree.tree_flatten_with_path(outputs)
    names: list[str] = []
    for index, (path, value) in enumerate(flat):
        if not isinstance(value, Tensor):
            raise LoadError(
                f"'{spec}' returns a {type(value).__name__} where a tensor should be",
                fix="return tensors, or tuples, lists and dicts of tensors",
            )
        keys = [str(key.key) for key in path if isinstance(key, pytree.MappingKey)]
        name = keys[-1] if keys else _numbered("output", index)
        names.append(name if name not in names else _numbered(name, index))
    if not names:
        raise LoadError(f"'{spec}' returns no tensor", fix="return at least one")
    return tuple(names)


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


def _unpickle(path: Path, *, allow_pickle: bool) -> nn.Module:
    """A pickled module, if it may run; else the error that names the safe ways."""
    head = _head(path)
    if head != b"PK" and head[:1] != b"\x80":
        raise LoadError(f"'{path}' is not a model that can be read", fix=WAYS)
    if _is_torchscript(path):
        raise LoadError(
            f"'{path}' is a TorchScript archive, which has no trainable layers",
            fix="export the original module: torch.export.save(...) to .pt2, or torch.onnx.export(...)",
        )
    if _holds_tensors_only(path):
        raise LoadError(
            f"'{path}' holds weights without the code of a model", fix=f"path.py:callable --weights {path}"
        )
    if not allow_pickle:
        raise LoadError(f"'{path}' is a pickle, which can run any code when it is loaded", fix=_SAFE)
    try:
        module = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # a pickle runs code of anyone, which may raise anything
        raise LoadError(
            f"'{path}' cannot be unpickled: {type(error).__name__}: {error}",
            fix="start where the classes that it names can be imported",
        ) from error
    if not isinstance(module, nn.Module):
        raise LoadError(f"'{path}' holds a {type(module).__name__}, not an nn.Module", fix=WAYS)
    return module


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return False
    return any(name.endswith("constants.pkl") or "/code/" in name for name in names)


def _holds_tensors_only(path: Path) -> bool:
    try:
        load_safely(path)
    except (pickle.UnpicklingError, ValueError):
        return False
    return True
