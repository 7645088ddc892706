"""How alike two layers of two networks see the same examples: linear centred kernel alignment.

For features X and Y of the same n examples, centred, and K = X X^T, L = Y Y^T (Kornblith et al. 2019,
arXiv:1905.00414)::

    CKA = <K, L> / (|K| |L|)        Frobenius; 1 for equal up to a rotation and a scale, 0 for unrelated

so layers of different widths compare. Maps are averaged down to at most 8 x 8 places first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.model import Model
from featherweight.side_by_side import WHOLE
from featherweight.tools.simulate import Replay

_PLACES = 8
_MAP_AXES = 4
_LEAST = 1e-12


def similarities(
    model: Model, pairs: Iterable[tuple[str, str]], batches: Sequence[tuple[Tensor, ...]]
) -> dict[tuple[str, str], float]:
    """CKA of pairs of traced values on these examples; 0 where one of them is constant.

    Args:
        model: Whose entry ``forward`` makes all of them.
        pairs: Traced names.
        batches: Flat inputs.
    """
    pairs = list(pairs)
    features = observed(model, {name for pair in pairs for name in pair}, batches)
    kernels = {name: _kernel(value) for name, value in features.items()}
    return {
        (one, other): max(float((kernels[one] * kernels[other]).sum()), 0.0)
        for one, other in pairs
        if one in kernels and other in kernels
    }


def observed(
    model: Model, names: Iterable[str], batches: Sequence[tuple[Tensor, ...]]
) -> Mapping[str, Tensor]:
    """Values of all examples, the first axis being theirs; maps averaged down."""
    wanted = set(names)
    replay = Replay(model, WHOLE)
    parts: dict[str, list[Tensor]] = {}

    def observe(name: str, value: Tensor) -> Tensor:
        if name in wanted:
            parts.setdefault(name, []).append(_smaller(value.float()))
        return value

    with torch.no_grad():
        for batch in batches:
            replay(batch, observe)
    return {name: torch.cat(values) for name, values in parts.items()}


def _smaller(value: Tensor) -> Tensor:
    if value.dim() != _MAP_AXES or max(value.shape[2:]) <= _PLACES:
        return value
    height, width = (min(side, _PLACES) for side in value.shape[2:])
    return functional.adaptive_avg_pool2d(value, (height, width))


def _kernel(features: Tensor) -> Tensor:
    """Of the centred features, of norm 1; zeros where they are constant."""
    flat = features.flatten(1).double()
    flat = flat - flat.mean(0)
    kernel = flat @ flat.T
    norm = kernel.norm()
    return kernel / norm if norm > _LEAST else torch.zeros_like(kernel)
