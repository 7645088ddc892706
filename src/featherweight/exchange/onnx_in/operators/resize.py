"""Resize and its ancestor Upsample.

Where torch's ``interpolate`` means the same, it is used, since runtimes know it; other coordinate rules,
kernels and axes are computed axis by axis from the formulas of the ONNX specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError, check_size

_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}
_NOISE = 1e-5  # of a place in float32
_ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "floor": torch.floor,
    "ceil": torch.ceil,
    # what is a half but for rounding is a half, as in ONNX Runtime
    "round_prefer_floor": lambda x: torch.floor(x) + (x - torch.floor(x) > 0.5 + _NOISE),
    "round_prefer_ceil": lambda x: torch.floor(x) + (x - torch.floor(x) >= 0.5 - _NOISE),
}
_HALF = ("half_pixel", "pytorch_half_pixel")
_RULES = (*_HALF, "align_corners", "asymmetric", "half_pixel_symmetric", "tf_crop_and_resize")


@dataclass(frozen=True)
class _Resize:
    """One node's settings; ``axes`` are those that its scales, sizes and region are about."""

    mode: str
    rule: str
    rounding: str
    axes: tuple[int, ...]
    policy: str = "stretch"
    cubic: float = -0.75
    inside_only: bool = False
    smooth: bool = False
    outside: float = 0.0

    def by_scales(self, x: Tensor, scales: host.Host, region: host.Host | None = None) -> Tensor:
        factors = [float(item) for item in host.to_list(scales)]
        if len(factors) != len(self.axes):
            raise UnsupportedError(f"its {len(factors)} scales do not fit {len(self.axes)} axes")
        sizes = [_scaled(x.shape[axis], factor) for axis, factor in zip(self.axes, factors, strict=True)]
        return self._run(x, sizes, factors, True, region)

    def by_sizes(self, x: Tensor, sizes: host.Host, region: host.Host | None = None) -> Tensor:
        wanted = host.to_list(sizes)
        if len(wanted) != len(self.axes):
            raise UnsupportedError(f"its {len(wanted)} sizes do not fit {len(self.axes)} axes")
        old = [x.shape[axis] for axis in self.axes]
        factors = [new / before for new, before in zip(wanted, old, strict=True)]
        if self.policy != "stretch":
            factor = min(factors) if self.policy == "not_larger" else max(factors)
            factors = [factor] * len(factors)
            wanted = [math.floor(factor * before + 0.5) for before in old]
        return self._run(x, wanted, factors, False, region)

    def _run(
        self, x: Tensor, sizes: list[Any], factors: list[Any], given: bool, region: host.Host | None
    ) -> Tensor:
        target = dict(zip(self.axes, sizes, strict=True))
        check_size([target.get(axis, size) for axis, size in enumerate(x.shape)])
        kind = self._interpolation(x, factors, sizes, given)
        if kind is None and self._is_stretched(x, factors):
            return _stretched(
                x, [int(factor) for axis, factor in zip(self.axes, factors, strict=True) if axis > 1]
            )
        if kind is None:
            return self._by_formula(x, sizes, factors, region)
        mode, corners = kind
        inner = [
            (size, factor) for axis, size, factor in zip(self.axes, sizes, factors, strict=True) if axis > 1
        ]
        if given:  # not the sizes: a factor that does not divide decides the coordinates too
            scale = [factor for _, factor in inner]
            return F.interpolate(x, scale_factor=scale, mode=mode, align_corners=corners)
        return F.interpolate(x, size=[size for size, _ in inner], mode=mode, align_corners=corners)

    def _interpolation(
        self, x: Tensor, factors: Sequence[Any], sizes: Sequence[Any], given: bool
    ) -> tuple[str, bool | None] | None:
        """What ``interpolate`` calls this, if it can do it: its mode, and whether corners are aligned."""
        rank = x.dim()
        spatial = tuple(axis for axis in self.axes if axis > 1)
        still = all(
            factor == 1 if given else statically_known_true(size == x.shape[axis])
            for axis, size, factor in zip(self.axes, sizes, factors, strict=True)
            if axis < 2
        )
        plain = not self.inside_only and not self.smooth and self.policy == "stretch"
        if not still or not plain or rank not in _LINEAR or spatial != tuple(range(2, rank)):
            return None
        if not x.is_floating_point() and self.mode != "nearest":
            return None
        if self.mode == "nearest":
            inner = [factor for axis, factor in zip(self.axes, factors, strict=True) if axis > 1]
            return ("nearest", None) if self._is_nearest(inner) else None
        one = any(type(size) is int and size == 1 for size in sizes[-len(spatial) :])
        if self.rule not in (*_HALF, "align_corners") or (self.rule != "half_pixel" and one):
            return None
        if self.mode == "linear":
            return _LINEAR[rank], self.rule == "align_corners"
        if rank != 4 or not math.isclose(self.cubic, -0.75):
            return None
        return "bicubic", self.rule == "align_corners"

    def _is_stretched(self, x: Tensor, factors: Sequence[Any]) -> bool:
        """Whether it is linear between the first corners of cells, which are so many times as wide."""
        whole = all(isinstance(f, (int, float)) and f >= 1 and f == int(f) for f in factors)
        spatial = tuple(axis for axis in self.axes if axis > 1)
        still = all(f == 1 for axis, f in zip(self.axes, factors, strict=True) if axis < 2)
        plain = self.mode == "linear" and self.rule == "asymmetric" and x.is_floating_point()
        return plain and whole and still and x.dim() in _LINEAR and spatial == tuple(range(2, x.dim()))

    def _is_nearest(self, factors: Sequence[Any]) -> bool:
        """Whether the rule picks what floor(place / factor) picks."""
        if self.rule == "asymmetric" and self.rounding == "floor":
            return True
        whole = all(isinstance(f, (int, float)) and f >= 1 and f == int(f) for f in factors)
        if self.rule in _HALF:  # the nearest centre; with whole factors there are no ties
            return whole and self.rounding.startswith("round")
        return self.rule == "asymmetric" and self.rounding == "round_prefer_floor" and set(factors) <= {1, 2}

    def _by_formula(
        self, x: Tensor, sizes: Sequence[Any], factors: Sequence[Any], region: host.Host | None
    ) -> Tensor:
        bounds = None if region is None else [float(item) for item in host.to_list(region)]
        dtype = x.dtype
        work = x if x.is_floating_point() or self.mode == "nearest" else x.float()
        for index, (axis, size, factor) in enumerate(zip(self.axes, sizes, factors, strict=True)):
            old = x.shape[axis]
            crop = (0.0, 1.0)
            if self.rule == "tf_crop_and_resize" and bounds is not None:
                crop = (bounds[index], bounds[index + len(self.axes)])
            same = type(size) is int and type(old) is int and size == old and factor == 1
            if same and crop == (0.0, 1.0):
                continue
            place = _source(size, factor, old, self.rule, crop)
            picked = self._along(work, axis, place, factor)
            if self.rule == "tf_crop_and_resize":
                wide = place.reshape(-1, *[1] * (x.dim() - axis - 1))
                picked = torch.where((wide >= 0) & (wide <= old - 1), picked, self.outside)
            work = picked
        return work if work.dtype == dtype else work.to(dtype)

    def _along(self, x: Tensor, axis: int, place: Tensor, factor: Any) -> Tensor:
        """Sample one axis at fractional places."""
        old = x.shape[axis]
        if self.mode == "nearest":
            nearest = _ROUND[self.rounding](place).to(torch.int64).clamp(0, old - 1)
            return torch.index_select(x, axis, nearest)
        low = torch.floor(place)
        ratio = place - low
        scale = min(float(factor), 1.0) if self.smooth else 1.0
        reach = 1 if self.mode == "linear" else 2
        first = math.floor(-reach / scale) + 1
        taps = range(first, 2 - first)
        kernel = _hat if self.mode == "linear" else lambda distance: _bicubic(distance, self.cubic)
        weights = [kernel((tap - ratio).abs() * scale) for tap in taps]
        places = [low.to(torch.int64) + tap for tap in taps]
        if self.inside_only:
            weights = [
                torch.where((at >= 0) & (at < old), weight, 0.0)
                for weight, at in zip(weights, places, strict=True)
            ]
        if self.inside_only or self.smooth:
            total = sum(weights[1:], weights[0])
            weights = [weight / total for weight in weights]
        terms = [
            torch.index_select(x, axis, at.clamp(0, old - 1))
            * weight.to(x.dtype).reshape(-1, *[1] * (x.dim() - axis - 1))
            for weight, at in zip(weights, places, strict=True)
        ]
        return reduce(torch.add, terms)


def _stretched(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Linear at d / factor: corners aligned on an input with one border more, whose end is cut off."""
    sides = [amount for _ in factors for amount in (0, 1)]
    wide = F.pad(x, sides, mode="replicate")
    sizes = [size * factor + 1 for size, factor in zip(x.shape[2:], factors, strict=True)]
    result = F.interpolate(wide, size=sizes, mode=_LINEAR[x.dim()], align_corners=True)
    for axis, (size, factor) in enumerate(zip(x.shape[2:], factors, strict=True), 2):
        result = result.narrow(axis, 0, size * factor)
    return result


def _hat(distance: Tensor) -> Tensor:
    return (1 - distance).clamp(min=0.0)


def _bicubic(x: Tensor, a: float) -> Tensor:
    """Keys' kernel (IEEE Trans. ASSP 29, 1981), of distances."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


def _scaled(size: Any, factor: float) -> Any:
    return size * int(factor) if factor == int(factor) else math.floor(size * factor)


def _source(size: Any, factor: Any, old: Any, rule: str, crop: tuple[float, float]) -> Tensor:
    """Where each target position lies in the source, in float32 as ONNX Runtime computes it.

    Sizes that are numbers are worked out here, to the last bit: a place at a border decides what is picked.
    """
    if type(size) is int and type(old) is int:
        steps: Any = np.arange(size, dtype=np.float32)
        place = _place(steps, np.float32(factor), np.float32(old), np.float32(size), rule, crop, size == 1)
        return torch.from_numpy(np.asarray(place, np.float32))
    found = _place(torch.arange(size, dtype=torch.float32), factor, old, size, rule, crop, False)
    assert isinstance(found, Tensor)
    return found


def _place(
    target: Any, factor: Any, old: Any, new: Any, rule: str, crop: tuple[float, float], one: bool
) -> Any:
    half = np.float32(0.5) if isinstance(target, np.ndarray) else 0.5
    if rule == "tf_crop_and_resize":
        start, end = (np.float32(side) for side in crop) if isinstance(target, np.ndarray) else crop
        if one:
            return target * 0 + half * (start + end) * (old - 1)
        return start * (old - 1) + (target * (end - start) * (old - 1)) / (new - 1)
    if one and rule in ("align_corners", "pytorch_half_pixel"):
        return target * 0
    if rule == "align_corners":
        return target * (old - 1) / (new - 1)
    if rule == "asymmetric":
        return target / factor
    if rule == "half_pixel_symmetric":
        return old / 2 * (1 - new / (factor * old)) + (target + half) / factor - half
    return (target + half) / factor - half


def _resize(node: Node) -> Call:
    rank, old = node.rank(), node.opset < 11  # Resize-10: only (X, scales), asymmetric and floor
    scales, sizes = (1, -1) if old else (2, 3)
    if node.has(scales) and node.shape(scales) == (0,):
        scales = -1  # given and empty: sizes count
    settings = _Resize(
        mode=node.text("mode", "nearest"),
        rule="asymmetric" if old else node.text("coordinate_transformation_mode", "half_pixel"),
        rounding="floor" if old else node.text("nearest_mode", "round_prefer_floor"),
        axes=tuple(axis % rank for axis in node.integers("axes") or range(rank)),
        policy=node.text("keep_aspect_ratio_policy", "stretch"),
        cubic=node.number("cubic_coeff_a", -0.75),
        inside_only=bool(node.integer("exclude_outside", 0)),
        smooth=bool(node.integer("antialias", 0)),
        outside=node.number("extrapolation_value", 0.0),
    )
    return _call(node, settings, scales, sizes, region=1 if not old else -1)


def _upsample(node: Node) -> Call:
    mode = node.text("mode", "nearest")
    settings = _Resize(
        "linear" if mode == "bilinear" else mode, "asymmetric", "floor", tuple(range(node.rank()))
    )
    if node.opset < 9:
        factors = host.sizes(list(node.numbers("scales") or ()))
        return Call(lambda x: settings.by_scales(x, factors))
    return _call(node, settings, 1, -1, region=-1)


def _call(node: Node, settings: _Resize, scales: int, sizes: int, region: int) -> Call:
    if settings.mode not in ("nearest", "linear", "cubic") or settings.rounding not in _ROUND:
        raise UnsupportedError(f"its mode is '{settings.mode}' with '{settings.rounding}'")
    if settings.rule not in _RULES:
        raise UnsupportedError(f"its coordinates are '{settings.rule}'")
    where = region if settings.rule == "tf_crop_and_resize" and node.has(region) else -1
    if scales >= 0 and node.has(scales):
        index = scales
    elif sizes >= 0 and node.has(sizes):
        index = sizes
    else:
        raise UnsupportedError("it has neither scales nor sizes")
    run = settings.by_scales if index == scales else settings.by_sizes
    inputs = (0, index) if where < 0 else (0, index, where)
    return Call(run, inputs=inputs, sizes=frozenset(inputs[1:]))


ENTRIES: dict[str, Entry] = {"Resize": _resize, "Upsample": _upsample}
