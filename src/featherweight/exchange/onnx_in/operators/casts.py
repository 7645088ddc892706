"""Casts, also to the types of eight bits and less, which torch rounds otherwise or has not at all.

A type that torch has not is carried in the next larger one (see ``host.CARRIED``); the numbers are those of
the small type.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError

_INTEGERS = {"int4": (4, True), "uint4": (4, False), "int2": (2, True), "uint2": (2, False)}
_Cast = Callable[[Any], Any]


def numpy_type(elem_type: int) -> np.dtype:
    """The type that a number of ONNX's means."""
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
    except KeyError as error:
        raise UnsupportedError(f"it names the unknown type {elem_type}") from error
    if not host.is_number(dtype):
        raise UnsupportedError(f"it makes tensors of {dtype.name}, which torch has not")
    return dtype


def cast_to(dtype: np.dtype, *, saturate: bool = True, rounding: str = "up") -> _Cast:
    """The function that casts a tensor, or host numbers, as ONNX does.

    Args:
        dtype: What to cast to.
        saturate: Of eight-bit floats: beyond the largest one comes the largest one, not NaN.
        rounding: Of powers of two (float8_e8m0fnu): 'up', 'down' or 'nearest'.
    """
    name, kind = dtype.name, host.torch_dtype(dtype)
    if name in _INTEGERS:
        return partial(_to_small_integer, bits=_INTEGERS[name][0], signed=_INTEGERS[name][1], dtype=kind)
    if name == "float4_e2m1fn":
        return _to_float4
    if name == "float8_e8m0fnu":
        return partial(_to_power_of_two, rounding=rounding)
    if name.startswith("float8"):
        return partial(_to_float8, dtype=kind, saturate=saturate)
    return partial(_plainly, dtype=kind)


def _plainly(x: Any, dtype: torch.dtype) -> Any:
    if not isinstance(x, np.ndarray):
        return x.to(dtype)
    if dtype.is_floating_point:
        return host.each(torch.sym_float, x)
    return host.each(bool if dtype == torch.bool else torch.sym_int, x)


def _to_small_integer(x: Tensor, bits: int, signed: bool, dtype: torch.dtype) -> Tensor:
    whole = x.to(torch.int32) & ((1 << bits) - 1)
    return (torch.where(whole >= 1 << (bits - 1), whole - (1 << bits), whole) if signed else whole).to(dtype)


def _to_float4(x: Tensor) -> Tensor:
    """Of 0, 0.5, 1, 1.5, 2, 3, 4, 6 the nearest; NaN becomes zero."""
    size = torch.nan_to_num(x.float().abs(), nan=0.0).clamp(max=6.0)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.round(size / step) * step * torch.sign(torch.nan_to_num(x.float()))


def _to_float8(x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    about = torch.finfo(dtype)
    wide = x.float()
    if saturate:
        return wide.clamp(-about.max, about.max).to(dtype)
    half = about.max * about.eps / (2 - about.eps) / 2  # of the step at the largest number
    beyond = wide.abs() > about.max + half
    if dtype != torch.float8_e4m3fn:  # whose last digit is even, so that a tie rounds down
        beyond = wide.abs() >= about.max + half
    outside = wide * torch.inf if dtype == torch.float8_e5m2 else torch.full_like(wide, torch.nan)
    return torch.where(beyond, outside, wide).to(dtype)


def _to_power_of_two(x: Tensor, rounding: str) -> Tensor:
    share, exponent = torch.frexp(x.float().abs())  # share is in [0.5, 1)
    above = {"up": share > 0.5, "down": share < 0, "nearest": share >= 0.75}[rounding]
    codes = (exponent - 1 + above.to(torch.int32) + 127).clamp(0, 254)
    codes = torch.where(torch.isfinite(x), codes, torch.where(torch.isinf(x), 254, 255))
    return torch.where(x == 0, 0, codes).to(torch.uint8).view(torch.float8_e8m0fnu)


def _cast(node: Node) -> Call:
    dtype = numpy_type(node.integer("to", 0))
    cast = cast_to(
        dtype, saturate=bool(node.integer("saturate", 1)), rounding=node.text("round_mode", "up").lower()
    )
    return Call(cast, host=host.plain_type(dtype))


def _cast_like(node: Node) -> Call:
    cast = cast_to(
        node.dtype(1),
        saturate=bool(node.integer("saturate", 1)),
        rounding=node.text("round_mode", "up").lower(),
    )
    return Call(cast)


def _bit_cast(node: Node) -> Call:
    return Call(partial(_bits_as, dtype=host.torch_dtype(numpy_type(node.integer("to", 0)))))


def _bits_as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.view(dtype)


ENTRIES: dict[str, Entry] = {"Cast": _cast, "CastLike": _cast_like, "BitCast": _bit_cast}
