"""Networks of the same inputs side by side: one module that gives what each of them gives.

It is what a merged network is compared with: on one core, calling it is calling the networks one after the
other, so its parameters, bytes and latency are their sums.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.errors import LoadError
from featherweight.model import Entry, Model

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_CALL = "task_"  # how the method of one task begins
_FEWEST = 2
WHOLE = "forward"


class SideBySide(nn.Module):
    """Calls every network with the same inputs; the result is the flat tuple of what all of them give.

    ``task_NAME`` is the network of one task alone.

    Args:
        networks: By the task's name.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.tasks = nn.Module()
        for name, network in networks.items():
            self.tasks.add_module(name, network)

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        flat: list[Tensor] = []
        for network in self.tasks.children():
            made = pytree.tree_leaves(network(*inputs))
            flat += [leaf for leaf in made if isinstance(leaf, Tensor)]
        return tuple(flat)

    def __getattr__(self, name: str) -> Any:
        if name.startswith(_CALL):
            return self._modules["tasks"].get_submodule(name.removeprefix(_CALL))  # type: ignore[union-attr]
        return super().__getattr__(name)


def side_by_side(models: Mapping[str, Model], *, entries: bool = False) -> Model:
    """The model whose outputs are those of all models, each called by the task's name.

    Args:
        models: By the task's name; each is called by ``forward``, and takes what the others take.
        entries: Also an entry a task, named like it: its own network alone.

    Raises:
        LoadError: A name is none, the inputs differ, or there is one model only.
    """
    _check_names(models)
    first, *others = models.items()
    for other in others:
        _check_same_inputs(first, other)
    how = first[1].entries[WHOLE]
    module = SideBySide({name: copy.deepcopy(model.module) for name, model in models.items()})
    outputs = {name: _output_names(name, model) for name, model in models.items()}
    axes = {name: _common(models, place) for place, name in enumerate(how.input_names)}
    whole = replace(
        how, output_names=tuple(one for names in outputs.values() for one in names), dynamic_axes=axes
    )
    found = {WHOLE: whole}
    if entries:
        for name in models:
            found[name] = replace(whole, output_names=outputs[name], method=f"{_CALL}{name}")
    return Model(module, found)


def tasks_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the networks that stand side by side in a module, also after edits; none in any other."""
    inside = module._modules.get("tasks")
    return () if inside is None else tuple(name for name, _ in inside.named_children())


def _check_names(models: Mapping[str, Model]) -> None:
    if len(models) < _FEWEST:
        raise LoadError(
            f"{len(models)} model is nothing to merge" if models else "there is no model to merge",
            fix="give two models or more, NAME=MODEL each",
        )
    for name, model in models.items():
        if not _NAME.fullmatch(name) or name == WHOLE or hasattr(nn.Module, name):
            raise LoadError(f"'{name}' is no name for a task", fix="letters, digits and _, e.g. classes")
        if WHOLE not in model.entries:
            raise LoadError(
                f"'{name}' is called by {', '.join(model.entries)}",
                fix="merge takes models called by forward",
            )


def _check_same_inputs(first: tuple[str, Model], other: tuple[str, Model]) -> None:
    """Refuse networks that cannot be called with the same tensors."""
    shapes = [
        [(tuple(one.shape[1:]), str(one.dtype).removeprefix("torch.")) for one in how.example_inputs]
        for how in (first[1].entries[WHOLE], other[1].entries[WHOLE])
    ]
    if shapes[0] != shapes[1] or first[1].entries[WHOLE].tree != other[1].entries[WHOLE].tree:
        one, two = (
            " and ".join(f"{dtype} {shape}" for shape, dtype in inputs) or "nothing" for inputs in shapes
        )
        raise LoadError(
            f"inputs differ: an example of '{first[0]}' is {one}, and one of '{other[0]}' is {two}",
            fix="merge models that take the same inputs, prepared in the same way",
        )


def _output_names(name: str, model: Model) -> tuple[str, ...]:
    own = model.entries[WHOLE].output_names
    return (name,) if len(own) == 1 else tuple(f"{name}_{one}" for one in own)


def _common(models: Mapping[str, Model], place: int) -> dict[int, str]:
    """Axes of an input that are open in every network, as the first one calls them."""
    each = []
    for model in models.values():
        how: Entry = model.entries[WHOLE]
        each.append(how.dynamic_axes.get(how.input_names[place], {}))
    return {axis: symbol for axis, symbol in each[0].items() if all(axis in one for one in each)}


def flat_outputs(model: Model) -> tuple[Tensor, ...]:
    """What a model gives on its example inputs, flat."""
    how = model.entries[WHOLE]
    modes = [(layer, layer.training) for layer in model.module.modules()]
    model.module.eval()
    try:
        with torch.no_grad():
            made = getattr(model.module, how.method)(*how.arguments(how.example_inputs))
    finally:
        for layer, training in modes:
            layer.training = training
    return tuple(leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor))
