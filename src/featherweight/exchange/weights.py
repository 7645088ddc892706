"""Reads tensors from files without running code, and puts them into a module that they must fit exactly."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from featherweight.errors import LoadError

_SHOWN = 5
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # what training scripts store a state dict under
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel's and torch.compile's
_SAVE = "save them with safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file or a torch state dict (loaded with ``weights_only``).

    A state dict inside ``{'state_dict': ...}`` is found, and prefixes that wrappers add are removed.

    Raises:
        LoadError: No such file, not readable as tensors, or a pickle of more than tensors.
    """
    if not path.is_file():
        problem = "is a folder, not a file of weights" if path.is_dir() else "does not exist"
        raise LoadError(
            f"'{path}' {problem}", fix="give a .safetensors file or a state dict (.pt, .pth, .bin)"
        )
    if path.stat().st_size == 0:
        raise LoadError(f"weights '{path}' are an empty file", fix=_SAVE)
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_state_dict(path)
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise LoadError(f"'{path}' is no safetensors file: {error}", fix=_SAVE) from error


def load_safely(file: Path | BinaryIO) -> Any:
    """What ``torch.load`` reads without running code.

    Raises:
        pickle.UnpicklingError: It holds more than tensors.
        ValueError: It is malformed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickle protocols that it refuses anyway
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # torch raises many kinds on malformed files
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        found = load_safely(path)
    except pickle.UnpicklingError as error:
        raise LoadError(
            f"'{path}' is a pickle that holds more than tensors, or no state dict at all; it was not loaded",
            fix=_SAVE,
        ) from error
    except ValueError as error:
        raise LoadError(f"'{path}' holds no weights that torch can read", fix=_SAVE) from error
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found:
        raise LoadError(f"'{path}' holds a {type(found).__name__}, not a state dict", fix=_SAVE)
    odd = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if odd:
        raise LoadError(
            f"'{path}' holds things that are no tensors: {_some(odd)}",
            fix="save model.state_dict() alone, or under the key 'state_dict'",
        )
    return {str(name): value for name, value in found.items()}


def fit_weights(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str, model: str) -> None:
    """Copy tensors into a module, in place; every tensor must find its place and every place its tensor.

    Tied tensors may come under one of their names only, as safetensors stores them.

    Raises:
        LoadError: Names or shapes differ; says which.
    """
    expected = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    present = {_address(expected[name]) for name in tensors if name in expected}
    missing = [
        name
        for name, value in expected.items()
        if name not in tensors and _address(value) not in present and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in tensors if name not in expected]
    shapes = [
        f"{name}: file {tuple(tensor.shape)}, model {tuple(expected[name].shape)}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    problems = [
        f"{len(names)} {kind} ({_some(names)})"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise LoadError(
            f"weights '{source}' do not match '{model}': {'; '.join(problems)}",
            fix="give the weights that were saved from this module, or name the callable that built it",
        )
    module.load_state_dict(dict(tensors), strict=False)


def check_finite(module: nn.Module, source: str) -> None:
    """Refuse parameters that are not finite and buffers that are NaN (masks may hold infinities).

    Raises:
        LoadError: Names the tensors.
    """
    bad = []
    for name, tensor in _tensors(module):
        if tensor.is_meta:
            raise LoadError(
                f"tensor '{name}' of '{source}' has no values: it is on the meta device",
                fix="give --weights, or build the module outside torch.device('meta')",
            )
        if not tensor.is_floating_point():
            continue
        nan = int(torch.isnan(tensor).sum())
        infinite = int(torch.isinf(tensor).sum()) if isinstance(tensor, nn.Parameter) else 0
        if nan or infinite:
            counts = [f"{count} {kind}" for count, kind in ((nan, "NaN"), (infinite, "infinite")) if count]
            bad.append(f"{name} ({', '.join(counts)})")
    if bad:
        raise LoadError(
            f"{len(bad)} tensors of '{source}' hold values that are not finite: {_some(bad)}",
            fix="take a checkpoint from before the training diverged",
        )


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _address(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor."""
    return tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f", and {rest} more" if rest > 0 else "")
