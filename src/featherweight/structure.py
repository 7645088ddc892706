"""What of a module is no value: types and settings of its layers, and a program without its tensors.

Modules that differ in values alone are exported once: the others take the program over with tensors of their
own. Everything that decides what an export sees is hashed, so a module of another structure is never taken
for a known one.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from featherweight.model import Model, encode_edit

_OWN = frozenset(nn.Module().__dict__)  # torch's own bookkeeping, 'training' among it


def settings(module: nn.Module) -> Iterator[str]:
    """Path, type and settings of every layer, one line each."""
    for path, layer in module.named_modules(remove_duplicate=False):
        own = {key: _plain(value) for key, value in vars(layer).items() if key not in _OWN}
        yield f"{path} {type(layer).__qualname__} {json.dumps(own, sort_keys=True)}"


def structure_key(model: Model, entry: str) -> str:
    """Hash of what the graph of an entry follows from, but for the values of parameters and buffers."""
    how, digest = model.entries[entry], hashlib.sha256()
    inputs = [[list(one.shape), str(one.dtype)] for one in how.example_inputs]
    edits = [encode_edit(edit) for edit in model.edits]
    told = [entry, how.method, inputs, str(how.dynamic_axes), str(how.tree), edits]
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    kinds = {id(type(layer)) for layer in model.module.modules()}  # two classes of one name are two
    for text in (*settings(model.module), str(sorted(kinds)), *_tensors(model.module)):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def skeleton(program: ExportedProgram) -> ExportedProgram:
    """A program without the values of its parameters and buffers; those of plain tensors stay."""
    return _with(program, {name: one.detach().to("meta") for name, one in program.state_dict.items()}, {})


def bound(program: ExportedProgram, module: nn.Module, prefix: str) -> ExportedProgram:
    """A skeleton with the tensors of a module of that structure.

    Args:
        program: From :func:`skeleton`.
        module: Whose parameters and buffers it takes.
        prefix: What names of the program have before those of the module.
    """
    own: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    own |= dict(module.named_buffers(remove_duplicate=False))
    state = {name: own[name.removeprefix(prefix)] for name in program.state_dict}
    unsaved = {  # buffers that no state_dict holds
        name: own[name.removeprefix(prefix)] for name in program.constants if name.removeprefix(prefix) in own
    }
    return _with(program, state, unsaved)


def _with(
    program: ExportedProgram, state: Mapping[str, Tensor], constants: Mapping[str, Tensor]
) -> ExportedProgram:
    """The same program on other tensors; the one that is given stays as it is."""
    changed = copy.copy(program)
    changed._state_dict = dict(state)
    changed._constants = {**program.constants, **constants}
    return changed


def _tensors(module: nn.Module) -> Iterator[str]:
    """Name, first name of a tied one, type and shape of every parameter and buffer."""
    first: dict[int, str] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        tied = first.setdefault(id(tensor), name)
        yield f"{name} {tied} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}"


def _plain(value: Any) -> Any:
    """A setting as JSON: numbers, texts and containers of them, functions by name; others by their type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)
