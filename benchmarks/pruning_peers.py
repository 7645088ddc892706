"""Torch-Pruning (Fang et al. 2023, arXiv:2301.12900) as its users run it, on our module and data."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.model import Model

Importance = Literal["magnitude", "taylor", "batch_norm"]
Scope = Literal["global", "local", "isomorphic"]
_STEPS = 400  # of its gradual pruning; it stops at the first one within the MACs
_BATCH = 128


@dataclass(frozen=True)
class Setting:
    """How it ranks channels."""

    importance: Importance
    scope: Scope

    def __str__(self) -> str:
        return f"{self.importance}, {self.scope}"


SETTINGS: Sequence[Setting] = tuple(
    Setting(importance, scope)
    for importance in ("magnitude", "taylor", "batch_norm")
    for scope in ("global", "local", "isomorphic")
)


def torch_pruning(
    model: Model,
    setting: Setting,
    macs: float,
    labelled: tuple[Tensor, Tensor],
    round_to: int | None = None,
) -> Model:
    """A model pruned to at most a fraction of its multiply-accumulates.

    Args:
        model: One input, one output of class scores (N, classes).
        setting: Of the pruner.
        macs: Fraction to keep.
        labelled: Images and labels of which Taylor's gradients are taken.
        round_to: What widths are multiples of.
    """
    import torch_pruning as tp

    module = copy.deepcopy(model.module).eval()
    example = model.entries["forward"].example_inputs[0]
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    importances = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance,
        "batch_norm": tp.importance.BNScaleImportance,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecated calls
        pruner = tp.pruner.BasePruner(
            module,
            example,
            importance=importances[setting.importance](),
            global_pruning=setting.scope != "local",
            isomorphic=setting.scope == "isomorphic",
            pruning_ratio=0.95,
            max_pruning_ratio=0.95,
            iterative_steps=_STEPS,
            ignored_layers=[last],
            round_to=round_to,
        )
        if setting.importance == "taylor":
            _gradients(module, labelled)
        whole = multiply_accumulates(module, example[:1])
        for _ in range(_STEPS):
            pruner.step()
            if multiply_accumulates(module, example[:1]) <= macs * whole:
                break
    module.zero_grad(set_to_none=True)
    return model.evolve(module=module)


def multiply_accumulates(module: nn.Module, example: Tensor) -> int:
    """Of convolutions and linear layers, for one example (its own count has norms and pooling in it)."""
    seen: list[int] = []

    def count(layer: nn.Module, inputs: object, output: Tensor) -> None:
        positions = output.numel() // output.shape[1] if output.dim() > 2 else 1
        seen.append(positions * layer.get_parameter("weight").numel())

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        module(example)
    for hook in hooks:
        hook.remove()
    return sum(seen)


def _gradients(module: nn.Module, labelled: tuple[Tensor, Tensor]) -> None:
    images, labels = labelled
    for x, y in zip(images.split(_BATCH), labels.split(_BATCH), strict=True):
        (F.cross_entropy(module(x), y) / len(images) * len(x)).backward()
