"""What each weight of a tensor may become, for rounding that heeds the inputs (tools/gptq.py).

Even levels are step * (q - zero) with q an integer in a range; those of a palette are any values::

    nearest(w) = scale * c[argmin_j |w / scale - c_j|]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from featherweight.formats import Binary, IntQuant, Palette, TensorFormat, Ternary
from featherweight.granularity import per_element
from featherweight.graph import Node
from featherweight.tools.columns import to_rows

_TINY = 1e-30


@dataclass(frozen=True)
class Levels:
    """Even levels: step * (q - zero), with q an integer from lowest to highest."""

    step: Tensor
    zero: Tensor
    lowest: int
    highest: int

    def nearest(self, values: Tensor, at: slice | int = slice(None)) -> Tensor:
        """The levels nearest to some columns of values."""
        step, zero = self.step[..., at], self.zero[..., at]
        return (torch.round(values / step + zero).clamp_(self.lowest, self.highest) - zero) * step

    def masked(self, kept: Tensor) -> Levels:
        """With no level but zero where a weight is not kept."""
        step, zero = torch.where(kept, self.step, _TINY), torch.where(kept, self.zero, 0.0)
        return replace(self, step=step, zero=zero)

    def on_rows(self, node: Node) -> Levels:
        """As the rows of a product have their weights."""
        return replace(self, step=to_rows(node, self.step), zero=to_rows(node, self.zero))

    def in_order(self, order: Tensor) -> Levels:
        """With each group's columns in its own order."""
        return replace(self, step=in_order(self.step, order), zero=in_order(self.zero, order))


@dataclass(frozen=True)
class Shades:
    """Levels of palettes.

    Attributes:
        tables: Sorted values of each palette, (palettes, colors), float64.
        owner: The palette of each weight.
        scale: Of each weight; 0 where it has no level but zero.
    """

    tables: Tensor
    owner: Tensor
    scale: Tensor

    @cached_property
    def _line(self) -> tuple[Tensor, Tensor, float, float]:
        """All palettes on one line, each a stride behind the last: borders, values, least value, stride."""
        low, high = float(self.tables.min()), float(self.tables.max())
        stride = 2 * (high - low) + 1.0
        moved = self.tables + stride * torch.arange(len(self.tables), dtype=torch.float64)[:, None]
        line = moved.flatten()
        return (line[1:] + line[:-1]) / 2, self.tables.flatten(), low, stride

    def nearest(self, values: Tensor, at: slice | int = slice(None)) -> Tensor:
        """The levels nearest to some columns of values."""
        borders, levels, low, stride = self._line
        scale, owner = self.scale[..., at], self.owner[..., at]
        high = low + (stride - 1) / 2
        relative = torch.where(scale > 0, values / scale, 0.0).clamp_(low, high)
        return levels[torch.bucketize(relative + stride * owner, borders)] * scale

    def masked(self, kept: Tensor) -> Shades:
        """With no level but zero where a weight is not kept."""
        return replace(self, scale=torch.where(kept, self.scale, 0.0))

    def on_rows(self, node: Node) -> Shades:
        """As the rows of a product have their weights."""
        return replace(self, owner=to_rows(node, self.owner), scale=to_rows(node, self.scale))

    def in_order(self, order: Tensor) -> Shades:
        """With each group's columns in its own order."""
        return replace(self, owner=in_order(self.owner, order), scale=in_order(self.scale, order))


def levels_of(fmt: TensorFormat, weight: Tensor) -> Levels | Shades | None:
    """The levels of each element of a weight; None where a format has none of its own."""
    if isinstance(fmt, Palette):
        return _shades(fmt, weight)
    if isinstance(fmt, IntQuant):
        step, zero = fmt.grid_of(weight)
        lowest, highest = fmt.quant_min, fmt.quant_max
    elif isinstance(fmt, Ternary):
        step = per_element(fmt.scale, fmt.granularity, weight)
        zero, lowest, highest = torch.zeros_like(step), -1, 1
    elif isinstance(fmt, Binary):
        step = 2 * per_element(fmt.scale, fmt.granularity, weight)
        zero, lowest, highest = torch.full_like(step, 0.5), 0, 1
    else:
        return None
    step, zero = (item.detach().double().expand_as(weight) for item in (step.clamp(min=_TINY), zero))
    return Levels(step, zero, lowest, highest)


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """Columns (groups, rows, K), each group's in its own order."""
    return x.gather(2, order[:, None].expand(-1, x.shape[1], -1))


def _shades(fmt: Palette, weight: Tensor) -> Shades:
    shape = [1] * weight.dim()
    shape[fmt.axis] = -1
    channels = torch.arange(weight.shape[fmt.axis])
    owner = (channels // fmt.group if fmt.group else torch.zeros_like(channels)).reshape(shape)
    scale = torch.ones(()) if fmt.scale is None else fmt.scale.detach()
    scale = scale.reshape(shape) if scale.dim() else scale
    return Shades(fmt.levels().detach().double(), owner.expand_as(weight), scale.double().expand_as(weight))
