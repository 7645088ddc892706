"""What code outside of a layer reads of it besides calling it: no other layer can stand for such a one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from featherweight.model import Model


def read_outside(model: Model, kinds: Collection[type[nn.Module]], names: Collection[str]) -> dict[str, str]:
    """Run a copy of the module on its example inputs, and watch.

    Args:
        model: Whose entries are called.
        kinds: Exact types of the layers to watch.
        names: Attributes that count.

    Returns:
        Layer -> the first of these attributes that code outside of the layer read.
    """
    module = model.copy_module()
    seen: dict[str, str] = {}
    for path, layer in module.named_modules():
        if type(layer) in kinds:
            _watch(layer, path, names, seen)
    for entry in model.entries.values():
        call = module if entry.method == "forward" else getattr(module, entry.method)
        with torch.no_grad():
            call(*entry.arguments(entry.example_inputs))
    return seen


def _watch(layer: nn.Module, path: str, names: Collection[str], seen: dict[str, str]) -> None:
    """Write down what others read of a layer while it is not running itself."""
    kind = type(layer)
    running: list[bool] = []

    def attribute(self: nn.Module, name: str) -> Any:
        if name in names and not running:
            seen.setdefault(path, name)
        return kind.__getattribute__(self, name)

    def missing(self: nn.Module, name: str) -> Any:
        return kind.__getattr__(self, name)

    def call(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        running.append(True)
        try:
            return kind.__call__(self, *inputs, **named)
        finally:
            running.pop()

    watched = {"__getattribute__": attribute, "__getattr__": missing, "__call__": call}
    layer.__class__ = type(kind.__name__, (kind,), watched)
