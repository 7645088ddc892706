"""How far a changed network's outputs are from the original's on the same inputs; no labels needed.

``error`` is the noise-to-signal ratio of all float outputs, ``sum |y - y'|^2 / sum |y|^2``; ``kl`` is the
mean Kullback-Leibler divergence of the classes' probabilities, ``sum p log(p / p')``, in nats an example.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from featherweight.model import Model

Measure = Literal["error", "kl"]
Batches = Sequence[tuple[Tensor, ...]]
Outputs = list[tuple[Tensor, ...]]


def outputs(model: Model, batches: Iterable[tuple[Tensor, ...]], entry: str = "forward") -> Outputs:
    """Flat float outputs of each batch in inference mode."""
    how = model.entries[entry]
    modes = [(layer, layer.training) for layer in model.module.modules()]
    model.module.eval()
    try:
        with torch.no_grad():
            made = [getattr(model.module, how.method)(*how.arguments(batch)) for batch in batches]
    finally:
        for layer, training in modes:
            layer.training = training
    return [tuple(y for y in pytree.tree_leaves(one) if _is_float(y)) for one in made]


def _is_float(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def difference(wanted: Outputs, found: Outputs, measure: Measure = "error") -> float:
    """How far outputs are from those of the original; 0 where they are the same, inf where not finite.

    Args:
        wanted: Of the original.
        found: Of the changed network.
        measure: ``kl`` reads the first output as scores of classes on its last axis.
    """
    if measure == "kl":
        pairs = [(a[0].double(), b[0].double()) for a, b in zip(wanted, found, strict=True)]
        rows = torch.cat([_divergences(one, two) for one, two in pairs])
        value = float(rows.mean())
    else:
        flat = [pair for a, b in zip(wanted, found, strict=True) for pair in zip(a, b, strict=True)]
        noise = sum(float((b.double() - a.double()).square().sum()) for a, b in flat)
        signal = sum(float(a.double().square().sum()) for a, _ in flat)
        value = noise / max(signal, 1e-30)
    return value if value == value else float("inf")


def _divergences(wanted: Tensor, found: Tensor) -> Tensor:
    p, q = _log_probabilities(wanted), _log_probabilities(found)
    return (p.exp() * (p - q)).sum(-1).reshape(-1)


def _log_probabilities(scores: Tensor) -> Tensor:
    """Of logits, or of probabilities where the network ends in a softmax."""
    sums = scores.sum(-1)
    if bool((scores >= 0).all()) and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-3)):
        return scores.clamp(min=1e-12).log()
    return scores.log_softmax(-1)
