"""A format of tensors whose values are a few numbers: a palette, and for each element a code into it.

With centroids c and, where it is asked for, a scale s of the tensor or of each channel::

    x ≈ s * c[code],   code = argmin_j |x / s - c_j|       dL/dc_j = sum of s * dL/dx over all with code j

Weight sharing as in Deep Compression (Han et al. 2016, arXiv:1510.00149): what training does to a centroid is
the sum of what it would do to the members of its cluster. Codes follow the weights as they move: the nearest
centroid is always taken, with a straight-through gradient for the weights themselves. No kernel here computes
with palettes, so files hold the values as floats, which pack small since there are few of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from featherweight.straight_through import straight_through

MOST_COLORS = 256
_FLOAT_BITS = 32  # of a stored centroid or scale


@dataclass(frozen=True, eq=False)
class Palette:
    """The nearest of a few values.

    Attributes:
        centroids: Float32, in any order; shape (values,), or (groups, values) where each group of channels
            has its own.
        zero: Zero is a value of every palette besides, which nothing learns: zeros stay exactly zero.
        axis: Of the channels.
        group: Channels that share a palette, where there are several; the last group may be smaller.
        scale: What values are multiplied by: shape () or (channels,), above 0; None: nothing.
        codebook: Name of the centroids that several tensors share; '': no other tensor has them.
        tensors: How many share them.
    """

    centroids: Tensor
    zero: bool = False
    axis: int = 0
    group: int = 0
    scale: Tensor | None = None
    codebook: str = ""
    tensors: int = 1

    def __post_init__(self) -> None:
        if self.centroids.dim() not in (1, 2) or not self.centroids.numel():
            raise ValueError(f"centroids of shape {tuple(self.centroids.shape)} are no palette")
        if (self.centroids.dim() == 2) != (self.group > 0):
            raise ValueError("a palette for each group of channels needs the size of a group, and one none")
        if not torch.isfinite(self.centroids).all():
            raise ValueError("centroids must be finite")
        if self.colors > MOST_COLORS:
            raise ValueError(f"a palette has at most {MOST_COLORS} values, not {self.colors}")
        if self.tensors < 1 or (self.tensors > 1 and not self.codebook):
            raise ValueError("a codebook that several tensors share has a name")
        scale = self.scale
        if scale is not None and (scale.dim() > 1 or not (torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError("a scale is finite and above 0, one for the tensor or one for each channel")

    @property
    def colors(self) -> int:
        """Values of a palette, zero included."""
        return self.centroids.shape[-1] + self.zero

    @property
    def width(self) -> int:
        """Bits of a code."""
        return max(1, math.ceil(math.log2(self.colors)))

    def levels(self) -> Tensor:
        """The values from the lowest to the highest, zero among them, (groups, colors); differentiable."""
        rows = self.centroids.reshape(-1, self.centroids.shape[-1])
        if self.zero:
            rows = torch.cat([rows, rows.new_zeros(len(rows), 1)], 1)
        return rows.sort(dim=1).values

    def codes(self, x: Tensor) -> Tensor:
        """The place of each element's value among the levels of its palette (int64)."""
        with torch.no_grad():
            return self._unrolled(self._codes(self._rows(x)), x)

    def project(self, x: Tensor) -> Tensor:
        """The nearest values; the gradient is that of ``x`` everywhere, and centroids have their own."""
        rows = self._rows(x.detach())
        levels = self.levels().to(x.device)
        chosen = levels.index_select(0, self._owners(rows)).gather(1, self._codes(rows))
        value = self._unrolled(chosen * self._scales(rows), x).to(x.dtype)
        return straight_through(value, x)

    def stored_bytes(self, elements: int) -> int:
        """Bytes of the codes, of the scales, and of this tensor's share of the centroids."""
        scales = 0 if self.scale is None else self.scale.numel()
        floats = scales + self.centroids.numel() / self.tensors
        return math.ceil((elements * self.width + floats * _FLOAT_BITS) / 8)

    def bits(self, elements: int) -> float:
        """Stored bits per element of a tensor of so many."""
        return 8 * self.stored_bytes(elements) / elements if elements else float(self.width)

    def learned(self) -> dict[str, Tensor]:
        """The centroids."""
        return {"centroids": self.centroids}

    def with_learned(self, values: Mapping[str, Tensor]) -> Palette:
        """With other centroids."""
        return replace(self, centroids=values["centroids"])

    # ---- one palette and one scale a row

    def _rows(self, x: Tensor) -> Tensor:
        """The tensor as a matrix in each of whose rows there is one palette and one scale."""
        if not self.group and (self.scale is None or not self.scale.dim()):
            return x.reshape(1, -1).float()
        return x.movedim(self.axis, 0).flatten(1).float() if x.dim() > 1 else x.reshape(-1, 1).float()

    def _unrolled(self, rows: Tensor, x: Tensor) -> Tensor:
        """Rows in the shape that the tensor has."""
        if len(rows) == 1 and not self.group:
            return rows.reshape(x.shape)
        moved = x.movedim(self.axis, 0).shape
        return rows.reshape(moved).movedim(0, self.axis)

    def _owners(self, rows: Tensor) -> Tensor:
        """The palette of each row."""
        places = torch.arange(len(rows), device=rows.device)
        owners = places // self.group if self.group else torch.zeros_like(places)
        groups = self.centroids.shape[0] if self.group else 1
        if len(rows) and int(owners[-1]) != groups - 1:
            raise ValueError(f"{groups} palettes for {self.group} channels each are not those of {len(rows)}")
        return owners

    def _scales(self, rows: Tensor) -> Tensor:
        if self.scale is None:
            return rows.new_ones(1, 1)
        return self.scale.to(rows.device).reshape(-1, 1)

    def _codes(self, rows: Tensor) -> Tensor:
        levels = self.levels().detach().to(rows.device)
        borders = (levels[:, 1:] + levels[:, :-1]) / 2
        relative = (rows / self._scales(rows)).contiguous()
        return torch.searchsorted(borders.index_select(0, self._owners(rows)), relative)


def encode_palette(fmt: Palette) -> dict[str, Any]:
    """A format as JSON data; floats keep all their bits."""
    scale = None if fmt.scale is None else fmt.scale.tolist()
    return {
        "kind": Palette.__name__,
        "centroids": fmt.centroids.tolist(),
        "zero": fmt.zero,
        "axis": fmt.axis,
        "group": fmt.group,
        "scale": scale,
        "codebook": fmt.codebook,
        "tensors": fmt.tensors,
    }


def decode_palette(data: Mapping[str, Any]) -> Palette:
    """The format that :func:`encode_palette` wrote."""
    values = {name: value for name, value in data.items() if name != "kind"}
    for name in ("centroids", "scale"):
        if values[name] is not None:
            values[name] = torch.tensor(values[name], dtype=torch.float32)
    return Palette(**values)
