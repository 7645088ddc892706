"""Palettes for a network's weights: which may have one, what it begins with, and what files hold of it.

Centroids are k-means of the weights as the formats before leave them (tools/kmeans.py), of a tensor, of a
group of its channels, or of several tensors together, each in units of its own scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from featherweight.errors import DataError
from featherweight.formats import Palette, Sparse, TensorFormat, floats_alone
from featherweight.graph import trace
from featherweight.model import Model
from featherweight.tools.integers import weights_of
from featherweight.tools.kmeans import Init, kmeans
from featherweight.tools.simulate import project


@dataclass(frozen=True)
class Fit:
    """How centroids are found.

    Attributes:
        init: Where iterations begin.
        iterations: Of Lloyd, at most.
        seed: Of what is drawn.
    """

    init: Init = "optimal"
    iterations: int = 50
    seed: int = 0


def weights_to_share(model: Model, selects: Callable[[str, str], bool]) -> tuple[dict[str, int], list[str]]:
    """Weights that may get a palette -> the axis of their channels; and those that formats hold back.

    Args:
        model: With formats or without; zeros may be in the weights.
        selects: Whether a layer, by path and type, may be touched.
    """
    found: dict[str, int] = {}
    held: set[str] = set()
    for entry in model.entries:
        graph = trace(model, entry)
        for node in graph:
            if selects(node.layer, node.layer_type):
                for name, axis in weights_of(node, graph).items():
                    found.setdefault(name, axis)
            else:
                held |= set(node.parameters.values())
    known = model.parameters
    free = {
        name: axis
        for name, axis in found.items()
        if name in known and name not in held and known[name].is_floating_point()
    }
    taken = [name for name in free if not all(isinstance(fmt, Sparse) for fmt in model.formats.get(name, ()))]
    return {name: axis for name, axis in free.items() if name not in taken}, taken


def value_of(model: Model, name: str) -> Tensor:
    """A weight with the zeros that formats put in."""
    value = project(model.parameters[name].detach(), model.formats.get(name, ())).float()
    if not torch.isfinite(value).all():
        raise DataError(f"'{name}' holds NaN or infinite weights", fix="train or load the model again")
    return value


def root_mean_squares(value: Tensor, axis: int | None) -> Tensor:
    """Scale of a tensor, or of each of its channels: of what is not zero; 1 where all is."""
    rows = value.reshape(1, -1) if axis is None else value.movedim(axis, 0).flatten(1)
    count = (rows != 0).sum(1)
    scale = (rows.double().square().sum(1) / count.clamp(min=1)).sqrt().float()
    scale = torch.where(scale > 0, scale, 1.0)
    return scale[0] if axis is None else scale


def own_palette(value: Tensor, like: Palette, colors: int, fit: Fit) -> Palette:
    """A palette of a tensor's own.

    Args:
        value: The tensor.
        like: Its layout: zero, axis, group, scale.
        colors: Values of a palette, zero included; fewer where a tensor has fewer.
        fit: How centroids are found.
    """
    relative = _relative(value, like)
    parts: Sequence[Tensor] = [relative]
    if like.group:
        parts = torch.split(relative.movedim(like.axis, 0), like.group)
    found = [_centroids([part], colors, like.zero, fit) for part in parts]
    most = max(len(one) for one in found)
    rows = torch.stack([torch.cat([one, one[-1:].expand(most - len(one))]) for one in found])
    return replace(like, centroids=rows if like.group else rows[0])


def shared_palettes(
    values: Mapping[str, Tensor], likes: Mapping[str, Palette], colors: int, fit: Fit
) -> dict[str, Palette]:
    """One codebook for several tensors; arguments as above, by name."""
    zero = any(like.zero for like in likes.values())
    parts = [_relative(values[name], like) for name, like in likes.items()]
    centroids = _centroids(parts, colors, zero, fit)
    count = len(likes)
    codebook = next(iter(likes)) if count > 1 else ""
    return {
        name: replace(like, centroids=centroids, zero=zero, codebook=codebook, tensors=count)
        for name, like in likes.items()
    }


def _relative(value: Tensor, like: Palette) -> Tensor:
    if like.scale is None or not like.scale.dim():
        return value if like.scale is None else value / like.scale
    shape = [1] * value.dim()
    shape[like.axis] = -1
    return value / like.scale.reshape(shape)


def _centroids(parts: Sequence[Tensor], colors: int, zero: bool, fit: Fit) -> Tensor:
    values = np.concatenate([part.reshape(-1).numpy() for part in parts])
    found = kmeans(
        values, max(1, colors - zero), init=fit.init, zero=zero, iterations=fit.iterations, seed=fit.seed
    )
    return torch.from_numpy(found if len(found) else np.zeros(1)).float()


def in_floats(model: Model) -> Model:
    """The model as files of floats hold it: zeros and the values of palettes are in the weights.

    What follows them in a chain stays a format.
    """
    chains = {name: chain for name, chain in model.formats.items() if name in model.parameters}
    leading = {name: _leading(chain) for name, chain in chains.items()}
    if not any(leading.values()):
        return model
    module, formats = model.copy_module(), dict(model.formats)
    with torch.no_grad():
        for name, count in leading.items():
            if not count:
                continue
            weight = module.get_parameter(name)
            weight.copy_(project(weight, chains[name][:count]))
            formats[name] = chains[name][count:]
    return model.evolve(
        module=module, formats={name: chain for name, chain in formats.items() if chain}, key=model.key
    )


def _leading(chain: tuple[TensorFormat, ...]) -> int:
    """How many formats at the head of a chain make floats."""
    count = 0
    while count < len(chain) and floats_alone(chain[: count + 1]):
        count += 1
    return count
