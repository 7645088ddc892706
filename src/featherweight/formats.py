"""How a tensor will be stored: pure data that knows its own arithmetic.

A format hangs beside the module, by parameter name or traced value. Methods
choose it on real ranges; ``Runtime.realise`` turns it into the grid that the
runtime stores; ``project`` gives the nearest value on that grid.

Uniform affine quantization (Jacob et al. 2018, arXiv:1712.05877)::

    q = clamp(round(x / scale) + zero_point, quant_min, quant_max)
    x ≈ scale * (q - zero_point)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

_SMALLEST_RANGE = 1e-8  # an empty or constant channel still needs a scale above zero


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale per index of ``axis`` (0 is the output channel of conv and linear weights)."""

    axis: int = 0


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of ``size`` elements along ``axis`` of a matrix, for each index of the other.

    The last group is shorter where ``size`` does not divide the axis.
    """

    axis: int = 1
    size: int = 32

    def groups(self, elements: int) -> int:
        """How many groups so many elements along the axis make."""
        return -(-elements // self.size)

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        """One value per group as one per element of ``x``."""
        return values.repeat_interleave(self.size, self.axis).narrow(self.axis, 0, x.shape[self.axis])


Granularity = PerTensor | PerChannel | PerGroup
_DIMENSIONS: Mapping[type, int] = {PerTensor: 0, PerChannel: 1, PerGroup: 2}


@runtime_checkable
class TensorFormat(Protocol):
    """What every format can do."""

    @property
    def bits(self) -> float:
        """Stored bits per element, scales not counted (see ``stored_bytes``)."""
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
            (``reduce_range`` on x86 without VNNI).
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
        if self.low.dim() != _DIMENSIONS[type(self.granularity)]:
            raise ValueError(f"a range of shape {tuple(self.low.shape)} does not fit {self.granularity}")
        if not (torch.isfinite(self.low).all() and torch.isfinite(self.high).all()):
            raise ValueError("a range must be finite")
        if (self.low > self.high).any():
            raise ValueError("low is above high")

    @property
    def bits(self) -> float:
        return float(self.width)

    @property
    def quant_min(self) -> int:
        """Smallest integer in use; symmetric signed grids leave out the lowest one."""
        if not self.signed:
            return 1 if self.symmetric else 0
        half = 1 << (self.width - self.headroom - 1)
        return -half + 1 if self.symmetric else -half

    @property
    def quant_max(self) -> int:
        """Largest integer in use."""
        used = self.width - self.headroom
        return (1 << (used - 1)) - 1 if self.signed else (1 << used) - 1

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32) per tensor or channel.

        The range is widened to hold zero, so that zero is exactly representable.
        """
        low = torch.clamp(self.low.float(), max=0.0)
        high = torch.clamp(self.high.float(), min=0.0)
        steps = self.quant_max - self.quant_min
        if self.symmetric:
            limit = torch.maximum(-low, high).clamp(min=_SMALLEST_RANGE)
            zero = (self.quant_max + self.quant_min) // 2
            return limit / (steps / 2), torch.full_like(limit, zero, dtype=torch.int32)
        scale = (high - low).clamp(min=_SMALLEST_RANGE) / steps
        zero_point = torch.round(self.quant_min - low / scale)
        return scale, zero_point.clamp(self.quant_min, self.quant_max).to(torch.int32)

    @cached_property
    def _numbers(self) -> tuple[float, int]:
        """Scale and zero point of a tensor as Python numbers, which exporters take for constants."""
        scale, zero_point = self.grid()
        return float(scale), int(zero_point)

    def _shaped(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.grid()
        scale, zero_point = scale.to(x.device), zero_point.to(x.device)
        if isinstance(self.granularity, PerChannel):
            shape = [1] * x.dim()
            shape[self.granularity.axis] = -1
            return scale.reshape(shape), zero_point.reshape(shape)
        if isinstance(self.granularity, PerGroup):
            return self.granularity.spread(scale, x), self.granularity.spread(zero_point, x)
        return scale, zero_point

    def quantize(self, x: Tensor) -> Tensor:
        """The stored integers (int32)."""
        scale, zero_point = self._shaped(x)
        q = torch.round(x.float() / scale) + zero_point
        return q.clamp(self.quant_min, self.quant_max).to(torch.int32)

    def dequantize(self, q: Tensor) -> Tensor:
        """The real values (float32) of stored integers."""
        scale, zero_point = self._shaped(q)
        return (q - zero_point).float() * scale

    def project(self, x: Tensor) -> Tensor:
        if isinstance(self.granularity, PerTensor) and not self.low.requires_grad:
            step, zero = self._numbers
            if torch.compiler.is_exporting():  # the fused kernel below has no form that can be exported
                steps = torch.round(x * (1 / step)) + zero
                return (steps.clamp(self.quant_min, self.quant_max) - zero) * step
            # One fused kernel; its gradient is straight-through inside the range.
            return torch.fake_quantize_per_tensor_affine(x, step, zero, self.quant_min, self.quant_max)
        scale, zero_point = self._shaped(x)
        lowest = (self.quant_min - zero_point) * scale
        highest = (self.quant_max - zero_point) * scale
        inside = torch.minimum(torch.maximum(x, lowest), highest)
        return inside + (self.dequantize(self.quantize(x)).to(x.dtype) - inside).detach()

    def stored_bytes(self, elements: int) -> int:
        scales = self.low.numel()
        return (elements * self.width + 7) // 8 + scales * 5  # float32 scale, 8-bit zero point

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
    def bits(self) -> float:
        return 16.0

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float16 if self.dtype == "float16" else torch.bfloat16

    def project(self, x: Tensor) -> Tensor:
        """The nearest value; what is too large for half precision becomes its largest number."""
        limit = torch.finfo(self.torch_dtype).max
        cast = x.clamp(-limit, limit).to(self.torch_dtype).to(x.dtype)
        return x + (cast - x).detach() if x.requires_grad else cast

    def stored_bytes(self, elements: int) -> int:
        return 2 * elements

    def learned(self) -> dict[str, Tensor]:
        return {}

    def with_learned(self, values: Mapping[str, Tensor]) -> FloatCast:
        return self


def encode(fmt: TensorFormat) -> dict[str, Any]:
    """A format as JSON data; floats keep all their bits."""
    if isinstance(fmt, FloatCast):
        return {"kind": "FloatCast", "dtype": fmt.dtype}
    if not isinstance(fmt, IntQuant):
        raise TypeError(f"{type(fmt).__name__} has no JSON form")
    shared = fmt.granularity
    return {
        "kind": "IntQuant",
        "low": fmt.low.tolist(),
        "high": fmt.high.tolist(),
        "width": fmt.width,
        "symmetric": fmt.symmetric,
        "axis": None if isinstance(shared, PerTensor) else shared.axis,
        "group": shared.size if isinstance(shared, PerGroup) else None,
        "signed": fmt.signed,
        "headroom": fmt.headroom,
        "readers": None if fmt.readers is None else sorted(fmt.readers),
    }


def decode(data: Mapping[str, Any]) -> TensorFormat:
    """The format that :func:`encode` wrote."""
    if data["kind"] == "FloatCast":
        return FloatCast(data["dtype"])
    if data["kind"] != "IntQuant":
        raise ValueError(f"unknown format '{data['kind']}'")
    shared: Granularity = PerTensor() if data["axis"] is None else PerChannel(data["axis"])
    if data["group"] is not None:
        shared = PerGroup(data["axis"], data["group"])
    return IntQuant(
        low=torch.tensor(data["low"], dtype=torch.float32),
        high=torch.tensor(data["high"], dtype=torch.float32),
        width=data["width"],
        symmetric=data["symmetric"],
        granularity=shared,
        signed=data["signed"],
        headroom=data["headroom"],
        readers=None if data["readers"] is None else frozenset(data["readers"]),
    )
