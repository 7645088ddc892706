"""Formats of weights that are a scale and a sign.

Ternary weights (Li et al. 2016, arXiv:1605.04711) and binary ones (Rastegari et al. 2016,
arXiv:1603.05279)::

    x ≈ scale * sign(x) * [|x| > threshold]        x ≈ scale * sign(x)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from featherweight.granularity import SCALE_BITS, Granularity, PerChannel, check_shape, per_element
from featherweight.straight_through import straight_through


class _Signs(ABC):
    """Small whole numbers of a common scale."""

    width: ClassVar[int]
    scale: Tensor
    granularity: Granularity

    def __post_init__(self) -> None:
        check_shape(self.scale, self.granularity, "scale")
        if not (torch.isfinite(self.scale).all() and (self.scale >= 0).all()):
            raise ValueError("a scale must be finite and at least 0")

    @abstractmethod
    def codes(self, x: Tensor) -> Tensor:
        """The whole number of each element (float)."""

    @abstractmethod
    def _scaled(self, scale: Tensor) -> Self:
        """With another scale."""

    def project(self, x: Tensor) -> Tensor:
        """The nearest value; the gradient is that of ``x`` everywhere."""
        scale = per_element(self.scale, self.granularity, x).to(x.dtype)
        return straight_through(self.codes(x.detach()) * scale, x)

    def stored_bytes(self, elements: int) -> int:
        """Bytes of a tensor of so many elements, scales included."""
        return (elements * self.width + self.scale.numel() * SCALE_BITS + 7) // 8

    def bits(self, elements: int) -> float:
        """Stored bits per element of a tensor of so many."""
        return 8 * self.stored_bytes(elements) / elements if elements else float(self.width)

    def learned(self) -> dict[str, Tensor]:
        """The scale."""
        return {"scale": self.scale}

    def with_learned(self, values: Mapping[str, Tensor]) -> Self:
        """With another scale, at least 0."""
        return self._scaled(values["scale"].clamp(min=0))


@dataclass(frozen=True, eq=False)
class Ternary(_Signs):
    """-scale, 0 and scale.

    Attributes:
        scale: At least 0; shape () per tensor, (channels,), or a matrix of groups.
        threshold: Elements of at most this size become 0; same shape, below ``scale`` unless that is 0.
            Another scale has the threshold of the same share.
        granularity: What shares a scale.
    """

    width: ClassVar[int] = 2

    scale: Tensor
    threshold: Tensor
    granularity: Granularity = field(default_factory=PerChannel)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale.shape != self.threshold.shape or not (self.threshold >= 0).all():
            raise ValueError("a threshold is at least 0, one per scale")
        if ((self.threshold >= self.scale) & (self.scale > 0)).any():
            raise ValueError("a threshold is below its scale, or what is stored would become 0")

    def codes(self, x: Tensor) -> Tensor:
        """-1, 0 or 1 for each element (float)."""
        threshold = per_element(self.threshold, self.granularity, x)
        return torch.sign(x) * (x.abs() > threshold)

    def _scaled(self, scale: Tensor) -> Ternary:
        share = torch.where(self.scale > 0, self.threshold / self.scale, 0.5).detach().clamp(max=0.999)
        return replace(self, scale=scale, threshold=share * scale.detach())


@dataclass(frozen=True, eq=False)
class Binary(_Signs):
    """-scale and scale; zero becomes scale.

    Attributes:
        scale: At least 0; shape () per tensor, (channels,), or a matrix of groups.
        granularity: What shares a scale.
    """

    width: ClassVar[int] = 1

    scale: Tensor
    granularity: Granularity = field(default_factory=PerChannel)

    def codes(self, x: Tensor) -> Tensor:
        """-1 or 1 for each element (float)."""
        return torch.where(x < 0, -1.0, 1.0).to(x.dtype)

    def _scaled(self, scale: Tensor) -> Binary:
        return replace(self, scale=scale)
