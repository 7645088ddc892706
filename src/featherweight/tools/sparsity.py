"""Which weights may become zero, how much each one matters, and how many zeros each tensor gets.

Scores: magnitude |w| (Han et al. 2015, arXiv:1506.02626), or the root of the mean squared first-order change
of the loss without a weight, (w dL/dw)² (LeCun et al. 1990; Molchanov et al. 2019, arXiv:1906.10771). Without
labels the change of the outputs y counts, with random signs v: E_v (w d(v'y)/dw)². Ranked over the whole
network, the lowest scores of all go, whichever layer they are in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from featherweight.formats import Sparse
from featherweight.graph import trace
from featherweight.masks import Pattern, block_sums
from featherweight.model import Model
from featherweight.tools.integers import RECURRENT, WEIGHTED, weights_of
from featherweight.tools.simulate import Replay, project

Loss = Callable[[tuple[Tensor, ...], Tensor], Tensor]


def prunable(model: Model, selects: Callable[[str, str], bool]) -> list[str]:
    """Weights of linear, convolutional and recurrent layers that no excluded layer reads.

    Args:
        model: With formats or without; what has formats already is left out.
        selects: Whether a layer, by path and type, may be touched.
    """
    found: dict[str, None] = {}
    held = set(model.formats)
    for entry in model.entries:
        graph = trace(model, entry)
        for node in graph:
            if not selects(node.layer, node.layer_type):
                held |= set(node.parameters.values())
            elif node.op in WEIGHTED or node.op in RECURRENT:
                found |= dict.fromkeys(weights_of(node, graph))
    known = model.parameters
    return [name for name in found if name in known and name not in held and known[name].is_floating_point()]


def sensitivities(
    model: Model,
    names: Collection[str],
    batches: Iterable[tuple[tuple[Tensor, ...], Tensor | None]],
    loss: Loss | None,
    *,
    seed: int = 0,
    entry: str = "forward",
) -> dict[str, Tensor]:
    """How much each weight matters, by gradients.

    Args:
        model: As it is.
        names: Of the weights.
        batches: Flat inputs and targets.
        loss: Outputs and targets to a scalar; None: the change of the outputs counts.
        seed: Of the random signs.
        entry: Which way of calling the module.
    """
    generator = torch.Generator().manual_seed(seed)
    leaves = {name: model.parameters[name].detach().clone().requires_grad_() for name in names}
    stored = {name: project(leaf, model.formats.get(name, ())) for name, leaf in leaves.items()}
    replay = Replay(model, entry, stored)
    total = {name: torch.zeros_like(leaf, requires_grad=False) for name, leaf in leaves.items()}
    for inputs, targets in batches:
        with torch.enable_grad():
            outputs = replay(inputs)
            if loss is not None and targets is not None:
                scalar = loss(outputs, targets)
            else:
                signed = [(y * _signs(y, generator)).sum() for y in outputs if y.is_floating_point()]
                scalar = torch.stack(signed).sum()
        slopes = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True)
        for (name, leaf), slope in zip(leaves.items(), slopes, strict=True):
            if slope is not None:
                total[name] += (leaf.detach() * slope).square()
    return {name: squares.sqrt() for name, squares in total.items()}


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).to(like.dtype) * 2 - 1


def global_sparsities(
    scores: Mapping[str, Tensor], sparsity: float, pattern: Pattern, limit: float
) -> dict[str, float]:
    """Each tensor's sparsity when the lowest scores of all tensors go.

    Args:
        scores: By name.
        sparsity: Of all tensors together.
        pattern: What becomes zero together; blocks are ranked by the mean of their scores.
        limit: Of one tensor.

    Returns:
        Such that all together have the sparsity, to a value or block, where the limit admits it.
    """
    sizes = {name: _units(torch.ones_like(score), pattern) for name, score in scores.items()}
    means = {name: _units(score, pattern) / sizes[name] for name, score in scores.items()}
    counts = {name: len(units) for name, units in means.items()}
    for name, units in means.items():
        most = math.floor(limit * counts[name] + 1e-9)
        units[units.argsort(stable=True)[most:]] = math.inf
    everything, weight = torch.cat(list(means.values())), torch.cat(list(sizes.values()))
    order = everything.argsort(stable=True)
    reached = weight[order].cumsum(0, dtype=torch.float64)
    wanted = sparsity * float(sum(score.numel() for score in scores.values()))
    count = int((reached <= round(wanted) + 0.5).sum())
    gone = order[:count]
    gone = gone[everything[gone] < math.inf]
    owner = torch.repeat_interleave(torch.tensor(list(counts.values())))
    zeros = torch.bincount(owner[gone], minlength=len(counts)).tolist()
    return {name: zeros[place] / counts[name] for place, name in enumerate(counts)}


def sparsities_below(scores: Mapping[str, Tensor], threshold: float, pattern: Pattern) -> dict[str, float]:
    """The share of each tensor's values, or means of blocks, that are below a threshold."""
    found = {}
    for name, score in scores.items():
        means = _units(score, pattern) / _units(torch.ones_like(score), pattern)
        found[name] = float((means < threshold).double().mean())
    return found


def _units(scores: Tensor, pattern: Pattern) -> Tensor:
    """Sums of what becomes zero together, in a row."""
    return (scores if pattern.rows * pattern.columns == 1 else block_sums(scores, pattern)).float().flatten()


def with_zeros(model: Model) -> Model:
    """The model as it is stored: zeros are in the weights, and their masks are formats no more."""
    if not any(isinstance(fmt, Sparse) for chain in model.formats.values() for fmt in chain):
        return model
    module = model.copy_module()
    formats = {}
    with torch.no_grad():
        for name, chain in model.formats.items():
            masks = tuple(fmt for fmt in chain if isinstance(fmt, Sparse))
            if masks:
                weight = module.get_parameter(name)
                weight.copy_(project(weight, masks))
            rest = tuple(fmt for fmt in chain if not isinstance(fmt, Sparse))
            if rest:
                formats[name] = rest
    return model.evolve(module=module, formats=formats, key=model.key)


def zeros_of(model: Model) -> dict[str, float]:
    """The share of zeros in each weight that has a mask, as it is stored."""
    found = {}
    for name, chain in model.formats.items():
        if any(isinstance(fmt, Sparse) for fmt in chain):
            stored = project(model.module.get_parameter(name).detach(), chain)
            found[name] = float((stored == 0).double().mean())
    return found
