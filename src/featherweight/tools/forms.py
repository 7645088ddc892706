"""How a layer's weight is taken apart, and what each way of it loses of the layer's output.

A linear layer is one matrix; a convolution is one too (``product``), or two stages (tools/low_rank.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from featherweight.tools.low_rank import Spectrum, Stages, spectrum, two_stages

Way = Literal["product", "spatial", "tucker"]
_TINY = 1e-30


@dataclass(frozen=True)
class Form:
    """How a layer is taken apart.

    Attributes:
        way: One of the three.
        ranks: (r,), or (r, s) of Tucker-2.
    """

    way: Way
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        words = {"product": "rank", "spatial": "vertical then horizontal, rank", "tucker": "Tucker-2, ranks"}
        return f"{words[self.way]} {' and '.join(map(str, self.ranks))}"


@dataclass(frozen=True)
class Product:
    """A layer's weight with the second moments of its columns.

    Attributes:
        weight: (outputs, inputs, *kernel), float64.
        gram: (K, K) with K inputs x taps, positive definite.
        mean: Of the columns, (K,), where the moments are about it; None: where nothing is known.
    """

    weight: Tensor
    gram: Tensor
    mean: Tensor | None = None

    def spectrum(self) -> Spectrum:
        """Of the layer as one matrix."""
        return spectrum(self.weight.flatten(1), self.gram)

    def stages(self, way: Way) -> Stages:
        """The layer as a convolution of two stages."""
        outputs, inputs, *kernel = self.weight.shape
        first = kernel[0] if way == "spatial" else 1
        ca, b = inputs * first, math.prod(kernel) // first
        return Stages(self.weight.reshape(outputs, ca, b), self.gram.reshape(ca, b, ca, b))

    def losses(self, way: Way, ranks: Sequence[int]) -> Mapping[Form, float]:
        """Share of the output's energy that forms of these ranks lose.

        Exact for ``product``; of the other ways an upper bound, which alternating solutions lower.
        """
        if way == "product":
            seen = self.spectrum()
            return {Form(way, (rank,)): seen.error(rank) / max(seen.total, _TINY) for rank in ranks}
        stages = self.stages(way)
        total = max(stages.total, _TINY)
        whole = stages.first(len(self.weight.flatten(1).mT))
        found: dict[Form, float] = {}
        fitting = [rank for rank in ranks if rank <= len(whole)]
        if not fitting:
            return found
        made = stages.kept(whole[: max(fitting)])
        for rank in fitting:
            outputs = made[: rank * stages.weight.shape[2]]  # those of a rank begin those of a larger one
            kept = float(outputs.square().sum())
            if way == "spatial":
                found[Form(way, (rank,))] = max(1 - kept / total, 0.0)
                continue
            square = outputs.mT @ outputs if len(outputs) > outputs.shape[1] else outputs @ outputs.mT
            energies = torch.linalg.eigvalsh(square).flip(0)
            for other in ranks:
                if other <= len(energies):
                    found[Form(way, (rank, other))] = max(1 - float(energies[:other].sum()) / total, 0.0)
        return found

    def factors(self, form: Form) -> tuple[Tensor, ...]:
        """The values of a form's parts, the first one first, to be reshaped."""
        if form.way == "product":
            left, right = self.spectrum().factors(form.ranks[0])
            return right, left
        if form.way == "spatial":
            return two_stages(self.stages("spatial"), form.ranks[0])
        return two_stages(self.stages("tucker"), *form.ranks)


def whole(form: Form, factors: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """The weight that factors stand for."""
    if form.way == "product":
        right, left = factors
        return (left @ right).reshape(tuple(shape))
    first, core, *rest = factors
    second = torch.einsum("os,srb->orb", rest[0], core) if rest else core
    return torch.einsum("orb,rx->oxb", second, first).reshape(tuple(shape))
