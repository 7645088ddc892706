"""The root key of a model: a hash of everything that decides what it computes.

SHA-256 over the tensors, each submodule's type, settings and the source that defines it, and the
entries. It needs no ``torch.export``, so that a finished run is recognised in milliseconds, and it
is the same in every process.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from featherweight.model import Entry
from featherweight.structure import settings


def root_key(module: nn.Module, entries: Mapping[str, Entry], origin: Iterable[str] = ()) -> str:
    """Hash of a module and its entries.

    Args:
        module: Its tensors, types, settings and sources count; the training flag does not.
        entries: Names, shapes, dtypes and dynamic axes count; the values of example inputs do not.
        origin: More that decides the model: the digest of the file that it was read from.
    """
    digest = hashlib.sha256()
    for text in (*origin, *_structure(module), *_entries(entries)):
        digest.update(text.encode() + b"\0")
    first: dict[int, str] = {}  # a tied tensor carries its first name
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        tied = first.setdefault(id(tensor), name)
        digest.update(f"{name} {tied} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        if tied == name:
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """The values in memory order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().tobytes()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _structure(module: nn.Module) -> Iterable[str]:
    kinds = {type(layer) for layer in module.modules()}
    yield from settings(module)
    yield from sorted({file_digest(path) for path in _sources(kinds)})


def _entries(entries: Mapping[str, Entry]) -> Iterable[str]:
    for name, entry in sorted(entries.items()):
        yield json.dumps(
            [
                name,
                entry.method,
                list(entry.input_names),
                [[str(item.dtype), list(item.shape)] for item in entry.example_inputs],
                list(entry.output_names),
                {key: {str(axis): s for axis, s in axes.items()} for key, axes in entry.dynamic_axes.items()},
            ],
            sort_keys=True,
        )


def _sources(kinds: Iterable[type]) -> set[Path]:
    """Files that define these types, and the user's own modules that those files use, and so on."""
    found: set[Path] = set()
    waiting = [sys.modules[kind.__module__] for kind in kinds if kind.__module__ in sys.modules]
    while waiting:
        module = waiting.pop()
        path = Path(file) if (file := inspect.getsourcefile(module) if _has_file(module) else None) else None
        if path is None or path in found or not path.is_file():
            continue
        found.add(path)
        if not _installed(path):
            waiting.extend(_used(module))
    return found


def _used(module: ModuleType) -> list[ModuleType]:
    """The user's own modules that a module imports, or whose functions and classes it uses."""
    used = []
    for value in list(vars(module).values()):
        other = (
            value
            if isinstance(value, ModuleType)
            else sys.modules.get(getattr(value, "__module__", "") or "")
        )
        if (
            other is not None
            and other is not module
            and _has_file(other)
            and not _installed(Path(str(other.__file__)))
        ):
            used.append(other)
    return used


def _has_file(module: ModuleType) -> bool:
    return isinstance(getattr(module, "__file__", None), str)


def _installed(path: Path) -> bool:
    """Part of Python or of an installed package: its version is enough, its imports are not followed."""
    parts = path.resolve().parts
    return bool({"site-packages", "dist-packages"} & set(parts)) or path.resolve().is_relative_to(
        sysconfig.get_paths()["stdlib"]
    )
