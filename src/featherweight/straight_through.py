"""Gradients through rounding: straight-through for values, learned step sizes for grids.

With v = x / scale, the value on the grid and its gradients (Esser et al. 2020, arXiv:1902.08153, eq. 3;
the zero point as in Bhalgat et al. 2020, arXiv:2004.09576)::

    y = (clamp(round(v) + zero_point, quant_min, quant_max) - zero_point) * scale
    dy/dx          = 1 inside, 0 outside
    dy/dscale      = round(v) - v inside, the end of the grid (quant_min or quant_max) - zero_point outside
    dy/dzero_point = 0 inside, -scale outside

*Inside* is asked of the rounded value, so a weight on an end of the grid is still free to move.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ONE = torch.tensor(1.0)


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """``value``, to the last bit, with the gradient of ``x`` besides its own."""
    return value + (x - x.detach()) if x.requires_grad else value


def rounded(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The nearest values on a grid, differentiable in ``x``, ``scale`` and ``zero_point``.

    Args:
        x: Any shape.
        scale: Of shape (): one grid; else a shape that broadcasts over ``x``.
        zero_point: Same shape as ``scale``; whole numbers.
        quant_min: Smallest integer.
        quant_max: Largest integer.
    """
    made: Tensor = _Rounded.apply(x, scale, zero_point, quant_min, quant_max)  # type: ignore[no-untyped-call]
    return made


def nearest(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    """The nearest values on one grid, as torch's fake-quantization kernel has them bit by bit, but faster.

    Args:
        x: float32.
        scale: Of the grid.
        zero_point: Of the grid.
        quant_min: Smallest integer.
        quant_max: Largest integer.
    """
    inverse = float(_ONE / torch.tensor(scale))  # in float32
    return (x * inverse).round_().clamp_(quant_min - zero_point, quant_max - zero_point).mul_(scale)


def scaled_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """``x`` itself, whose gradient is multiplied by ``factor``."""
    made: Tensor = _Scaled.apply(x, factor)  # type: ignore[no-untyped-call]
    return made


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, least: int, most: int) -> Tensor:
        if scale.dim():
            steps = (torch.round(x.float() / scale) + zero_point).clamp_(least, most)
            value = (steps.sub_(zero_point).mul_(scale)).to(x.dtype)
        else:
            value = nearest(x.float(), float(scale), int(zero_point), least, most).to(x.dtype)
        ctx.save_for_backward(x, scale, zero_point, value)
        ctx.ends = least, most
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, value = ctx.saved_tensors
        least, most = ctx.ends
        if scale.dim():
            low, high = (least - 0.5 - zero_point) * scale, (most + 0.5 - zero_point) * scale
            inside = grad * ((x > low) & (x < high))
        else:
            step, zero = float(scale), float(zero_point)
            low, high = (least - 0.5 - zero) * step, (most + 0.5 - zero) * step
            inside = torch.ops.aten.hardtanh_backward(grad, x, low, high)
        to_scale = to_zero = None
        if ctx.needs_input_grad[1]:
            to_scale = (_products(grad, value, scale) - _products(inside, x, scale)) / scale
        if ctx.needs_input_grad[2]:
            to_zero = (inside - grad).float().sum_to_size(scale.shape) * scale
        return inside, to_scale, to_zero, None, None


def _products(one: Tensor, other: Tensor, like: Tensor) -> Tensor:
    """Sum of products, of all elements or as they share a scale."""
    if like.dim():
        return (one.float() * other.float()).sum_to_size(like.shape)
    last = other.dim() == 4 and not other.is_contiguous()  # channels, most likely; a copy would cost more
    flat = [(x.permute(0, 2, 3, 1) if last else x).reshape(-1).float() for x in (one, other)]
    return torch.dot(*flat)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grad * factor, None
