"""How a tensor will be stored: pure data that knows its own arithmetic.

A format hangs beside the module, by parameter name or traced value. Methods
choose it on real ranges; ``Runtime.realise`` turns it into the grid that the
runtime stores; ``project`` gives the nearest value on that grid.

Uniform affine quantization (Jacob et al. 2018, arXiv:1712.05877)::

    q = clamp(round(x / scale) + zero_point, quant_min, quant_max)
    x ≈ scale * (q - zero_point)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from featherweight.granularity import (
    DIMENSIONS,
    SCALE_BITS,
    affine_grid,
    check_shape,
    integers,
    learned_grid,
    per_element,
)
from featherweight.granularity import Granularity as Granularity
from featherweight.granularity import PerChannel as PerChannel
from featherweight.granularity import PerGroup as PerGroup
from featherweight.granularity import PerTensor as PerTensor
from featherweight.palette import Palette as Palette
from featherweight.palette import decode_palette, encode_palette
from featherweight.signs import Binary as Binary
from featherweight.signs import Ternary as Ternary
from featherweight.sparse import Sparse as Sparse
from featherweight.sparse import decode_sparse, encode_sparse
from featherweight.sparse import zeros_alone as zeros_alone
from featherweight.straight_through import nearest, rounded, straight_through


@runtime_checkable
class TensorFormat(Protocol):
    """What every format can do."""

    @property
    def width(self) -> int:
        """Bits of an element, scales not counted."""
        ...

    def bits(self, elements: int) -> float:
        """Stored bits per element of a tensor of so many, scales and zero points included."""
        ...

    def project(self, x: Tensor) -> Tensor:
        """The nearest representable value of every element; straight-through gradient."""
        ...

    def stored_bytes(self, elements: int) -> int:
        """Bytes of a tensor of so many elements, scales and zero points included."""
        ...

    def learned(self) -> dict[str, Tensor]:
        """The tensors that fine-tuning may train."""
        ...

    def with_learned(self, values: Mapping[str, Tensor]) -> TensorFormat:
        """The same format with trained tensors."""
        ...


def _bits(fmt: TensorFormat, elements: int) -> float:
    return 8 * fmt.stored_bytes(elements) / elements if elements else float(fmt.width)


@dataclass(frozen=True, eq=False)
class IntQuant:
    """Uniform integers over a real range.

    Attributes:
        low: Smallest real value to represent; shape (), (channels,), or that of a matrix whose grouped
            axis counts groups.
        high: Largest real value to represent; same shape as ``low``.
        width: Bits of an integer.
        symmetric: Zero is the middle of the grid, so the zero point is fixed.
        granularity: What shares a scale.
        signed: Integers run from -2**(width-1), else from 0. The runtime decides.
        headroom: Bits of the integer left unused, where a kernel would saturate
            (``reduce_range`` on x86 without VNNI), or so that files pack smaller.
        readers: Operators that read the integers, where a runtime rounds at its kernels' inputs and
            everything else reads the value as it was; None: everyone reads the integers.
    """

    low: Tensor
    high: Tensor
    width: int = 8
    symmetric: bool = False
    granularity: Granularity = field(default_factory=PerTensor)
    signed: bool = False
    headroom: int = 0
    readers: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 16 or not 0 <= self.headroom <= self.width - 2:
            raise ValueError(f"integers of {self.width} bits with {self.headroom} unused are not supported")
        if self.low.shape != self.high.shape:
            raise ValueError(f"low {tuple(self.low.shape)} and high {tuple(self.high.shape)} differ in shape")
        check_shape(self.low, self.granularity, "range")
        if not (torch.isfinite(self.low).all() and torch.isfinite(self.high).all()):
            raise ValueError("a range must be finite")
        if (self.low > self.high).any():
            raise ValueError("low is above high")

    @property
    def used(self) -> int:
        """Bits of an integer in use."""
        return self.width - self.headroom

    @property
    def quant_min(self) -> int:
        """Smallest integer in use; symmetric signed grids leave out the lowest one."""
        return integers(self.used, self.symmetric, self.signed)[0]

    @property
    def quant_max(self) -> int:
        """Largest integer in use."""
        return integers(self.used, self.symmetric, self.signed)[1]

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32) per tensor, channel or group.

        The range is widened to hold zero, so that zero is exactly representable.
        """
        return affine_grid(self.low, self.high, self.quant_min, self.quant_max, self.symmetric)

    @cached_property
    def _numbers(self) -> tuple[float, int]:
        """Scale and zero point of a tensor as Python numbers, which exporters take for constants."""
        scale, zero_point = self.grid()
        return float(scale), int(zero_point)

    def grid_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point in shapes that broadcast over a tensor of this format."""
        scale, zero_point = self.grid()
        return per_element(scale, self.granularity, x), per_element(zero_point, self.granularity, x)

    def quantize(self, x: Tensor) -> Tensor:
        """The stored integers (int32)."""
        scale, zero_point = self.grid_of(x)
        q = torch.round(x.float() / scale) + zero_point
        return q.clamp(self.quant_min, self.quant_max).to(torch.int32)

    def dequantize(self, q: Tensor) -> Tensor:
        """The real values (float32) of stored integers."""
        scale, zero_point = self.grid_of(q)
        return (q - zero_point).float() * scale

    def project(self, x: Tensor) -> Tensor:
        """The nearest value of the grid; straight-through, and with gradients of ``low`` and ``high``."""
        if self.low.requires_grad or self.high.requires_grad:
            return self._learning(x)
        if isinstance(self.granularity, PerTensor):
            step, zero = self._numbers
            if torch.compiler.is_exporting():  # what is below has no form that can be exported
                steps = torch.round(x * (1 / step)) + zero
                return (steps.clamp(self.quant_min, self.quant_max) - zero) * step
            if x.dtype == torch.float32 and not x.requires_grad:
                return nearest(x, step, zero, self.quant_min, self.quant_max)
            return rounded(x, *self.grid(), self.quant_min, self.quant_max)
        scale, zero_point = self.grid_of(x)
        steps = torch.round(x.detach().float() / scale) + zero_point
        value = ((steps.clamp(self.quant_min, self.quant_max) - zero_point) * scale).to(x.dtype)
        if not x.requires_grad:
            return value
        lowest = (self.quant_min - zero_point) * scale
        highest = (self.quant_max - zero_point) * scale
        return straight_through(value.detach(), torch.minimum(torch.maximum(x, lowest), highest))

    def _learning(self, x: Tensor) -> Tensor:
        grid = learned_grid(self.low, self.high, self.quant_min, self.quant_max, self.symmetric)
        scale, zero_point = (per_element(one, self.granularity, x) for one in grid)
        return rounded(x, scale, zero_point, self.quant_min, self.quant_max)

    def stored_bytes(self, elements: int) -> int:
        zero_point = 0 if self.symmetric else self.width
        return (elements * self.width + self.low.numel() * (SCALE_BITS + zero_point) + 7) // 8

    def bits(self, elements: int) -> float:
        return _bits(self, elements)

    def learned(self) -> dict[str, Tensor]:
        return {"low": self.low, "high": self.high}

    def with_learned(self, values: Mapping[str, Tensor]) -> IntQuant:
        return replace(self, low=values["low"], high=values["high"])


@dataclass(frozen=True)
class FloatCast:
    """A shorter floating-point type: IEEE 754 half precision, or bfloat16.

    Attributes:
        dtype: 'float16' or 'bfloat16'.
    """

    dtype: Literal["float16", "bfloat16"] = "float16"

    @property
    def width(self) -> int:
        return 16

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float16 if self.dtype == "float16" else torch.bfloat16

    def project(self, x: Tensor) -> Tensor:
        """The nearest value; what is too large for half precision becomes its largest number."""
        limit = torch.finfo(self.torch_dtype).max
        cast = x.clamp(-limit, limit).to(self.torch_dtype).to(x.dtype)
        return straight_through(cast.detach(), x)

    def stored_bytes(self, elements: int) -> int:
        return 2 * elements

    def bits(self, elements: int) -> float:
        return _bits(self, elements)

    def learned(self) -> dict[str, Tensor]:
        return {}

    def with_learned(self, values: Mapping[str, Tensor]) -> FloatCast:
        return self


@dataclass(frozen=True)
class Dynamic:
    """Uniform integers over the range that the values themselves have, found when they are there.

    Attributes:
        width: Bits of an integer.
        symmetric: Zero is the middle of the grid.
        signed: Integers run from -2**(width-1), else from 0. The runtime decides.
        per: One range for the whole tensor, or for each token: each row of the last axis.
        readers: Operators that read the integers; None: everyone does.
    """

    width: int = 8
    symmetric: bool = False
    signed: bool = False
    per: Literal["tensor", "token"] = "tensor"
    readers: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 16:
            raise ValueError(f"integers of {self.width} bits are not supported")

    def project(self, x: Tensor) -> Tensor:
        """The nearest of as many values as the width has; the gradient is that of ``x`` everywhere."""
        if not torch.compiler.is_exporting() and not x.numel():
            return x
        values = x.detach().float()
        axes = [-1] if self.per == "token" and x.dim() else list(range(x.dim()))
        low, high = values.amin(axes, keepdim=True), values.amax(axes, keepdim=True)
        smallest, largest = integers(self.width, self.symmetric, self.signed)
        scale, zero_point = affine_grid(low, high, smallest, largest, self.symmetric)
        steps = (torch.round(values / scale) + zero_point).clamp(smallest, largest) - zero_point
        return straight_through((steps * scale).to(x.dtype), x)

    def stored_bytes(self, elements: int) -> int:
        """Bytes of the integers in memory; no file holds them, nor their scales."""
        return (elements * self.width + 7) // 8

    def bits(self, elements: int) -> float:
        return _bits(self, elements)

    def learned(self) -> dict[str, Tensor]:
        return {}

    def with_learned(self, values: Mapping[str, Tensor]) -> Dynamic:
        return self


def floats_alone(chain: Iterable[object]) -> bool:
    """Whether what formats make is stored as floats yet: zeros put in, or the values of a palette."""
    return all(isinstance(fmt, Sparse | Palette) for fmt in chain)


def encode(fmt: TensorFormat) -> dict[str, Any]:
    """A format as JSON data; floats keep all their bits."""
    if isinstance(fmt, Sparse):
        return encode_sparse(fmt)
    if isinstance(fmt, Palette):
        return encode_palette(fmt)
    if not isinstance(fmt, IntQuant | FloatCast | Ternary | Binary | Dynamic):
        raise TypeError(f"{type(fmt).__name__} has no JSON form")
    data: dict[str, Any] = {"kind": type(fmt).__name__}
    for one in fields(fmt):
        value = getattr(fmt, one.name)
        if isinstance(value, Tensor):
            data[one.name] = value.tolist()
        elif isinstance(value, PerTensor | PerChannel | PerGroup):
            data["axis"] = None if isinstance(value, PerTensor) else value.axis
            data["group"] = value.size if isinstance(value, PerGroup) else None
        else:
            data[one.name] = sorted(value) if isinstance(value, frozenset) else value
    return data


def decode(data: Mapping[str, Any]) -> TensorFormat:
    """The format that :func:`encode` wrote."""
    if data["kind"] == Sparse.__name__:
        return decode_sparse(data)
    if data["kind"] == Palette.__name__:
        return decode_palette(data)
    kinds: tuple[type[TensorFormat], ...] = (IntQuant, FloatCast, Ternary, Binary, Dynamic)
    named = {kind.__name__: kind for kind in kinds}
    if data["kind"] not in named:
        raise ValueError(f"unknown format '{data['kind']}'")
    values = {name: value for name, value in data.items() if name not in ("kind", "axis", "group")}
    if "axis" in data:
        shared: Granularity = PerTensor() if data["axis"] is None else PerChannel(data["axis"])
        shared = shared if data["group"] is None else PerGroup(data["axis"], data["group"])
        values["granularity"] = shared
    for name in {"low", "high", "scale", "threshold"} & set(values):
        made = torch.tensor(values[name], dtype=torch.float32)
        values[name] = made if made.numel() else made.new_zeros((0,) * DIMENSIONS[type(shared)])
    if values.get("readers") is not None:
        values["readers"] = frozenset(values["readers"])
    return named[data["kind"]](**values)
