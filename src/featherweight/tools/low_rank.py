"""A weight as a product of smaller ones, with the least error of the output that its inputs leave.

A layer makes ``y = W x`` of columns with second moments ``G = E[x xᵀ]``. Of all matrices M of rank r, the
output error ``E ||W x - M x||² = tr (W - M) G (W - M)ᵀ`` is least for (Eckart and Young 1936, of W chol(G);
principal components of the output, Zhang et al. 2016, arXiv:1505.06798; whitening, SVD-LLM, Wang et al.
2024, arXiv:2403.07378)::

    M = U_r U_rᵀ W,      W G Wᵀ = U diag(energies) Uᵀ

and the error is the sum of the energies left out. ``G = 1`` gives the plain truncated SVD.

A convolution in two stages reads its columns as (c a, b): the first stage mixes channels and the taps a, the
second one what that makes at the taps b (spatial: a vertical, b horizontal, Jaderberg et al. 2014,
arXiv:1405.3866; Tucker-2: a nothing, b all taps, and the second stage of low rank itself, Kim et al. 2016,
arXiv:1511.06530)::

    W[o, ca, b] ≈ sum_r H[o, r, b] V[r, ca]

H is solved exactly for a V, V by conjugate gradients for an H; each step lowers the error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-30
_GRADIENTS = 5  # steps of conjugate gradients between two exact solutions of the other stage
_FURTHER = 1.5  # times as far as the last step that was good
_WORTHWHILE = 2e-3  # of the error, that a round takes off
_SMALL = 1e-12  # of a matrix' largest eigenvalue, below which there is nothing


@dataclass(frozen=True)
class Spectrum:
    """The output's principal components.

    Attributes:
        energies: Of the components, the largest first.
        left: Columns that span the outputs, (outputs, components).
        right: Rows that make the components of the inputs, (components, inputs); left @ right is W.
    """

    energies: Tensor
    left: Tensor
    right: Tensor

    @property
    def total(self) -> float:
        """E ||W x||²."""
        return float(self.energies.sum())

    def error(self, rank: int) -> float:
        """E ||W x - M x||² of the best M of that rank."""
        return float(self.energies[rank:].sum())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best product of that rank: (outputs, rank) and (rank, inputs), scaled alike."""
        return balanced(self.left[:, :rank], self.right[:rank])


def spectrum(rows: Tensor, gram: Tensor) -> Spectrum:
    """Principal components of what a matrix makes.

    Args:
        rows: W, (outputs, inputs), float64.
        gram: G, (inputs, inputs), positive semidefinite; definite where outputs are more than inputs.
    """
    if rows.shape[0] <= rows.shape[1]:
        energies, basis = torch.linalg.eigh(rows @ gram @ rows.mT)
        left = basis.flip(1)
        return Spectrum(energies.flip(0).clamp(min=0), left, left.mT @ rows)
    factor = torch.linalg.cholesky(gram)
    whitened = rows @ factor
    energies, basis = torch.linalg.eigh(whitened.mT @ whitened)
    right = basis.flip(1).mT
    undone = torch.linalg.solve_triangular(factor, right, upper=False, left=False)
    return Spectrum(energies.flip(0).clamp(min=0), whitened @ right.mT, undone)


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with a column of the left as long as its row of the right."""
    long, wide = left.norm(dim=0), right.norm(dim=1)
    gain = torch.where((long > 0) & (wide > 0), (long / wide.clamp(min=_TINY)).sqrt(), 1.0)
    gain = torch.where(gain > 0, gain, 1.0)
    return left / gain, right * gain[:, None]


@dataclass(frozen=True)
class Stages:
    """A convolution whose columns are read in two stages.

    Attributes:
        weight: W, (outputs, ca, b), float64.
        gram: G, (ca, b, ca, b), positive definite.
    """

    weight: Tensor
    gram: Tensor

    @property
    def total(self) -> float:
        """E ||W x||²."""
        return float((self._crossed * self.weight).sum())

    @property
    def _crossed(self) -> Tensor:
        """W G, (outputs, ca, b)."""
        outputs, first, second = self.weight.shape
        flat = self.gram.reshape(first * second, -1)
        return (self.weight.flatten(1) @ flat).reshape(outputs, first, second)

    def first(self, rank: int) -> Tensor:
        """V to begin with, (rank, ca): the best one where the taps b do not know of each other."""
        rows = self.weight.transpose(1, 2).flatten(0, 1)
        moments = torch.diagonal(self.gram, dim1=1, dim2=3).mean(-1)
        return spectrum(rows, moments).right[:rank]

    def second(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """The best H for a V, (outputs, rank b), and the moments of what it reads, (rank b, rank b)."""
        crossed, moments = self._read(first)
        return solved(moments, crossed), moments

    def _read(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """W E[x zᵀ], (outputs, rank b), and E[z zᵀ] of what z a V makes, (rank b, rank b)."""
        rank, taps = len(first), self.weight.shape[2]
        half = torch.einsum("rx,xbyc->rbyc", first, self.gram)
        moments = torch.einsum("rbyc,sy->rbsc", half, first).reshape(rank * taps, rank * taps)
        crossed = torch.einsum("oyc,rbyc->orb", self.weight, half).flatten(1)
        return crossed, (moments + moments.mT) / 2

    def kept(self, first: Tensor) -> Tensor:
        """Z (rank b, outputs): that of the best H for the first r rows of a V are its first r b rows.

        The moments of what H reads are L Lᵀ, so what the best H makes has the moments Zᵀ Z.
        """
        crossed, moments = self._read(first)
        factor = torch.linalg.cholesky(_positive(moments))
        found: Tensor = torch.linalg.solve_triangular(factor, crossed.mT, upper=False)
        return found

    def better_first(self, first: Tensor, second: Tensor) -> Tensor:
        """A V of less error for an H (outputs, rank, b)."""
        inner = torch.einsum("orb,osc->rbsc", second, second)
        usual = torch.diagonal(self.gram, dim1=1, dim2=3).mean(-1)
        channels = torch.einsum("rbsb->rs", inner)

        def curvature(v: Tensor) -> Tensor:
            seen = torch.einsum("sy,xbyc->xbsc", v, self.gram)
            return torch.einsum("rbsc,xbsc->rx", inner, seen)

        def nearly_solved(v: Tensor) -> Tensor:  # exactly so where the taps b do not know of each other
            return solved(usual, solved(channels, v.mT).mT)

        target = torch.einsum("orb,oxb->rx", second, self._crossed)
        return _conjugate_gradients(curvature, nearly_solved, target, first)

    def error(self, first: Tensor, second: Tensor) -> float:
        """E ||W x - M x||² of stages V (rank, ca) and H (outputs, rank, b)."""
        gap = self.weight - torch.einsum("orb,rx->oxb", second, first)
        return max(float((Stages(gap, self.gram)._crossed * gap).sum()), 0.0)


def solved(moments: Tensor, crossed: Tensor) -> Tensor:
    """The least-squares solution X of X moments = crossed, of least norm where there are several."""
    scale = moments.diagonal().mean() + _TINY
    factor, failed = torch.linalg.cholesky_ex(
        moments + 1e-13 * scale * torch.eye(len(moments), dtype=torch.float64)
    )
    if not failed:
        found: Tensor = torch.cholesky_solve(crossed.mT, factor).mT
        return found
    values, basis = torch.linalg.eigh(moments)
    inverse = torch.where(values > _SMALL * values[-1].clamp(min=_TINY), 1 / values.clamp(min=_TINY), 0.0)
    least: Tensor = crossed @ basis @ (inverse[:, None] * basis.mT)
    return least


def two_stages(
    stages: Stages, rank: int, second_rank: int | None = None, rounds: int = 12
) -> tuple[Tensor, ...]:
    """The factors of a convolution, by alternating solutions.

    Args:
        stages: Weight and moments.
        rank: Channels between the first stage and the second.
        second_rank: Rank of the second stage, for Tucker-2; None: any.
        rounds: How often the first stage is solved again at most.

    Returns:
        V (rank, ca) and H (outputs, rank, b); with ``second_rank`` V, the core (second_rank, rank, b) and
        U (outputs, second_rank).
    """
    first, reach = stages.first(rank), 1.0
    best = _rest(stages, first, second_rank)
    least = stages.error(first, _joined(best))
    for _ in range(rounds):
        before, begun = first, least
        tried = stages.better_first(first, _joined(best))
        for one in (tried, tried + reach * (tried - before)):  # further along the way: alternating is slow
            rest = _rest(stages, one, second_rank)
            error = stages.error(one, _joined(rest))
            reach = reach * _FURTHER if error < least else max(reach / 2, 0.5)
            if error < least:
                first, best, least = one, rest, error
        if least > begun * (1 - _WORTHWHILE):
            break
    core, back = best
    flat, first = balanced(core.transpose(0, 1).flatten(1).mT, first)
    core = flat.mT.reshape(core.shape[1], core.shape[0], core.shape[2]).transpose(0, 1)
    if back is None:
        return first, core
    back, flat = balanced(back, core.flatten(1))
    return first, flat.reshape(core.shape), back


def _rest(stages: Stages, first: Tensor, second_rank: int | None) -> tuple[Tensor, Tensor | None]:
    """The best second stage: (outputs, rank, b) and None, or its core (s, rank, b) and U (outputs, s)."""
    second, moments = stages.second(first)
    shape = (-1, len(first), stages.weight.shape[2])
    if second_rank is None:
        return second.reshape(shape), None
    left, right = spectrum(second, _positive(moments)).factors(second_rank)
    return right.reshape(shape), left


def _joined(rest: tuple[Tensor, Tensor | None]) -> Tensor:
    core, back = rest
    return core if back is None else torch.einsum("os,srb->orb", back, core)


def _positive(moments: Tensor) -> Tensor:
    """Moments with a ridge that is too small to matter, so that they have a Cholesky factor."""
    ridge = 1e-9 * moments.diagonal().mean() + _TINY
    return moments + ridge * torch.eye(len(moments), dtype=moments.dtype)


def _conjugate_gradients(
    curvature: Callable[[Tensor], Tensor],
    nearly_solved: Callable[[Tensor], Tensor],
    target: Tensor,
    start: Tensor,
) -> Tensor:
    """Steps towards the solution of curvature(x) = target, which is symmetric and positive semidefinite.

    Args:
        curvature: The linear map.
        nearly_solved: A symmetric map near to its inverse.
        target: Right side.
        start: Where to begin.
    """
    x = start.clone()
    rest = target - curvature(x)
    way = nearly_solved(rest)
    size = begun = float((rest * way).sum())
    for _ in range(_GRADIENTS):
        along = curvature(way)
        bend = float((way * along).sum())
        if size <= _SMALL * begun or bend <= 0:
            break
        x, rest = x + size / bend * way, rest - size / bend * along
        turned = nearly_solved(rest)
        new = float((rest * turned).sum())
        way, size = turned + new / size * way, new
    return x
