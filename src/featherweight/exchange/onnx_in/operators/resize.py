"""Resize and its ancestor Upsample.

Where torch's ``interpolate`` means the same, it is used, since runtimes know it; other coordinate rules are
computed axis by axis from the formula of the ONNX specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError, check_size

_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}
_ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round_prefer_floor": lambda x: torch.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: torch.floor(x + 0.5),
}


def _resize(node: Node) -> Call:
    rank = node.rank()
    if node.integers("axes") is not None and tuple(node.integers("axes") or ()) != tuple(range(2, rank)):
        raise UnsupportedError("it resizes axes other than the spatial ones")
    if node.text("keep_aspect_ratio_policy", "stretch") != "stretch" or node.integer("exclude_outside", 0):
        raise UnsupportedError("it keeps the aspect ratio, or excludes what is outside")
    if node.integer("antialias", 0):
        raise UnsupportedError("it smooths while it shrinks (antialias)")
    old = node.opset < 11  # Resize-10: only (X, scales), asymmetric and floor
    scales, sizes = (1, -1) if old else (2, 3)
    if node.has(scales) and (found := node.constant(scales)) is not None and found.size == 0:
        scales = -1  # given and empty: sizes count
    rule = "asymmetric" if old else node.text("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if old else node.text("nearest_mode", "round_prefer_floor")
    return _call(node, node.text("mode", "nearest"), rule, rounding, scales, sizes)


def _upsample(node: Node) -> Call:
    if node.opset < 9:
        raise UnsupportedError("its scales are an attribute")
    return _call(node, node.text("mode", "nearest"), "asymmetric", "floor", 1, -1)


def _call(node: Node, mode: str, rule: str, rounding: str, scales: int, sizes: int) -> Call:
    if mode not in ("nearest", "linear", "cubic") or rounding not in _ROUND:
        raise UnsupportedError(f"its mode is '{mode}' with '{rounding}'")
    resample = _resampling(node, mode, rule, rounding)
    if scales >= 0 and node.has(scales):
        factors = tuple(float(item) for item in node.fixed(scales, "scales").reshape(-1))[
            -(node.rank() - 2) :
        ]
        if len(node.fixed(scales, "scales")) == node.rank() and set(node.fixed(scales, "scales")[:2]) != {
            1.0
        }:
            raise UnsupportedError("it resizes the batch or the channels")
        return Call(partial(_by_factors, factors=factors, resample=resample))
    if sizes < 0 or not node.has(sizes):
        raise UnsupportedError("it has neither scales nor sizes")
    return Call(partial(_to_sizes, resample=resample), inputs=(0, sizes), sizes=frozenset({sizes}))


_Resample = Callable[[Tensor, list[Any], "tuple[float, ...] | None"], Tensor]


def _resampling(node: Node, mode: str, rule: str, rounding: str) -> _Resample:
    """How to resample to sizes, given the factors or (None) their quotient."""
    rank = node.rank()
    corners = rule == "align_corners"
    if mode == "nearest" and rule == "asymmetric" and rounding == "floor":
        return partial(_interpolate, mode="nearest", corners=None)
    if mode == "linear" and rule in ("half_pixel", "pytorch_half_pixel", "align_corners") and rank in _LINEAR:
        return partial(_interpolate, mode=_LINEAR[rank], corners=corners)
    if mode == "cubic":
        if rank != 4 or rule not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
            raise UnsupportedError(f"it is cubic with '{rule}' on {rank} axes")
        if not math.isclose(node.number("cubic_coeff_a", -0.75), -0.75):
            raise UnsupportedError("its cubic coefficient is not -0.75")
        return partial(_interpolate, mode="bicubic", corners=corners)
    if rule not in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"):
        raise UnsupportedError(f"its coordinates are '{rule}'")
    return partial(_by_formula, mode=mode, rule=rule, rounding=rounding)


def _by_factors(x: Tensor, factors: tuple[float, ...], resample: _Resample) -> Tensor:
    sizes = [_scaled(size, factor) for size, factor in zip(x.shape[2:], factors, strict=True)]
    check_size([*x.shape[:2], *sizes])
    return resample(x, sizes, factors)


def _scaled(size: Any, factor: float) -> Any:
    return size * int(factor) if factor == int(factor) else math.floor(size * factor)


def _to_sizes(x: Tensor, sizes: host.Host, resample: _Resample) -> Tensor:
    wanted = host.to_list(sizes)[-(x.dim() - 2) :]
    check_size([*x.shape[:2], *wanted])
    return resample(x, wanted, None)


def _interpolate(
    x: Tensor, sizes: list[Any], factors: tuple[float, ...] | None, mode: str, corners: bool | None
) -> Tensor:
    if factors is not None:  # not the sizes: a factor that does not divide decides the coordinates too
        return F.interpolate(x, scale_factor=list(factors), mode=mode, align_corners=corners)
    return F.interpolate(x, size=sizes, mode=mode, align_corners=corners)


def _by_formula(
    x: Tensor, sizes: Sequence[Any], factors: tuple[float, ...] | None, mode: str, rule: str, rounding: str
) -> Tensor:
    for axis, size in enumerate(sizes, 2):
        old = x.shape[axis]
        if type(size) is int and type(old) is int and size == old:
            continue
        factor = size / old if factors is None else factors[axis - 2]
        place = _source(torch.arange(size, dtype=torch.float32), factor, old, size, rule)
        if mode == "nearest":
            nearest = _ROUND[rounding](place).to(torch.int64).clamp(0, old - 1)
            x = torch.index_select(x, axis, nearest)
            continue
        place = place.clamp(0, old - 1)
        low = torch.floor(place).to(torch.int64)
        share = (place - low).reshape(-1, *[1] * (x.dim() - axis - 1))
        high = (low + 1).clamp_max(old - 1)
        x = torch.index_select(x, axis, low) * (1 - share) + torch.index_select(x, axis, high) * share
    return x


def _source(target: Tensor, factor: Any, old: Any, new: Any, rule: str) -> Tensor:
    """Where a target position lies in the source."""
    if new == 1 and rule in ("align_corners", "pytorch_half_pixel"):
        return torch.zeros_like(target)
    if rule == "align_corners":
        return torch.mul(target, (old - 1) / (new - 1))
    if rule == "asymmetric":
        return torch.div(target, factor)
    return torch.div(target + 0.5, factor) - 0.5


ENTRIES: dict[str, Entry] = {"Resize": _resize, "Upsample": _upsample}
