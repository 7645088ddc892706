"""Operators of quantized graphs as they are written: integers in, integers out.

``onnx_in.quantized`` takes most of them away before a graph is built; what stays is a pair that is not whole,
as at a graph's integer inputs and outputs. Jacob et al. 2018, arXiv:1712.05877.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError
from featherweight.exchange.onnx_in.operators.casts import cast_to, numpy_type
from featherweight.exchange.onnx_in.operators.conv import convolved

_WIDTHS = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16}


def integer_range(dtype: np.dtype) -> tuple[int, int]:
    """Smallest and largest integer of a quantized type.

    Raises:
        UnsupportedError: It is none.
    """
    if dtype.name not in _WIDTHS:
        raise UnsupportedError(f"it quantizes to {dtype.name}")
    width = _WIDTHS[dtype.name]
    if dtype.name.startswith("u"):
        return 0, (1 << width) - 1
    return -(1 << (width - 1)), (1 << (width - 1)) - 1


def spread(number: Tensor, shape: tuple[int, ...], axis: int, block: int) -> Tensor:
    """A scale or zero point, broadcast: per tensor, per channel of ``axis``, or per block of it."""
    if number.numel() == 1:
        return number.reshape(())
    if block:
        return number.repeat_interleave(block, axis).narrow(axis, 0, shape[axis])
    if number.dim() == 1:
        return number.reshape([-1 if index == axis % len(shape) else 1 for index in range(len(shape))])
    return number


def quantized(
    x: Tensor, scale: Tensor, zero: Tensor | None, *, axis: int, block: int, dtype: np.dtype, saturate: bool
) -> Tensor:
    """``round(x / scale) + zero``, held in the type's range."""
    steps = x / spread(scale, tuple(x.shape), axis, block).to(x.dtype)
    if dtype.name.startswith("float"):
        return cast_to(dtype, saturate=saturate)(steps)  # type: ignore[no-any-return]
    low, high = integer_range(dtype)
    whole = torch.round(steps.float())
    if zero is not None:
        whole = whole + spread(zero.float(), tuple(x.shape), axis, block)
    return whole.clamp(low, high).to(torch.int32).to(host.torch_dtype(dtype))


def dequantized(x: Tensor, scale: Tensor, zero: Tensor | None, *, axis: int, block: int) -> Tensor:
    """``(x - zero) * scale``."""
    shape = tuple(x.shape)
    values = x.float()
    if zero is not None:
        values = values - spread(zero.float(), shape, axis, block)
    return values.to(scale.dtype) * spread(scale, shape, axis, block)


def _quantize(node: Node) -> Call:
    if node.has(2):
        dtype = node.dtype(2)
    else:
        named = node.integer("output_dtype", 0)
        dtype = numpy_type(named) if named else np.dtype(np.uint8)
    run = partial(
        quantized,
        axis=node.integer("axis", 1),
        block=node.integer("block_size", 0),
        dtype=dtype,
        saturate=bool(node.integer("saturate", 1)),
    )
    return Call(run, inputs=(0, 1, 2))


def _dequantize(node: Node) -> Call:
    run = partial(dequantized, axis=node.integer("axis", 1), block=node.integer("block_size", 0))
    named = node.integer("output_dtype", 0)
    if not named:
        return Call(run, inputs=(0, 1, 2))
    kind = host.torch_dtype(numpy_type(named))
    return Call(lambda x, scale, zero: run(x, scale, zero).to(kind), inputs=(0, 1, 2))


def dynamic_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (uint8) of a tensor whose range is widened to hold zero."""
    low, high = torch.clamp(x.min(), max=0.0), torch.clamp(x.max(), min=0.0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, torch.round(-low / scale).clamp(0, 255).to(torch.uint8)


def _dynamic_quantize(_: Node) -> Call:
    return Call(_dynamically)


def _dynamically(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero = dynamic_range(x)
    return (torch.round(x / scale) + zero.float()).clamp(0, 255).to(torch.uint8), scale, zero


def _centred(x: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    """Integers less their zero point in float64, which adds them up exactly; runtimes have float32."""
    kind = torch.float32 if torch.compiler.is_exporting() else torch.float64
    wide = x.to(kind)
    return wide if zero is None else wide - spread(zero.to(kind), tuple(x.shape), axis, 0)


def _matmul_integer(_: Node) -> Call:
    def run(a: Tensor, b: Tensor, a_zero: Tensor | None, b_zero: Tensor | None) -> Tensor:
        return torch.round(torch.matmul(_centred(a, a_zero, -2), _centred(b, b_zero, -1))).to(torch.int32)

    return Call(run, inputs=(0, 1, 2, 3))


def _conv_integer(node: Node) -> Call:
    conv = convolved(node, 0, 1)

    def run(x: Tensor, weight: Tensor, x_zero: Tensor | None, weight_zero: Tensor | None) -> Tensor:
        total = conv(_centred(x, x_zero, 0), _centred(weight, weight_zero, 0), None)
        return torch.round(total).to(torch.int32)

    return Call(run, inputs=(0, 1, 2, 3))


def _qlinear_matmul(node: Node) -> Call:
    stored = node.dtype(7)

    def run(*given: Tensor) -> Tensor:
        a, a_scale, a_zero, b, b_scale, b_zero, scale, zero = given
        product = torch.matmul(_centred(a, a_zero, -2), _centred(b, b_zero, -1))
        kind = product.dtype
        factor = spread(a_scale.to(kind), tuple(product.shape), -2, 0)
        factor = factor * spread(b_scale.to(kind), tuple(product.shape), -1, 0)
        return quantized(
            (product * factor / scale.to(kind)).float(),
            torch.ones(()),
            zero,
            axis=-1,
            block=0,
            dtype=stored,
            saturate=True,
        )

    return Call(run, inputs=tuple(range(8)))


def _qlinear_conv(node: Node) -> Call:
    conv, kind = convolved(node, 0, 3), node.dtype(7)

    def run(*given: Tensor) -> Tensor:
        x, x_scale, x_zero, weight, w_scale, w_zero, scale, zero = given[:8]
        values, kernel = _centred(x, x_zero, 0), _centred(weight, w_zero, 0)
        total = conv(values, kernel, None if given[8] is None else given[8].to(values.dtype))
        factor = x_scale.to(total.dtype) * spread(w_scale.to(total.dtype), tuple(total.shape), 1, 0)
        steps = (total * factor / scale.to(total.dtype)).float()
        return quantized(steps, torch.ones(()), zero, axis=1, block=0, dtype=kind, saturate=True)

    return Call(run, inputs=tuple(range(9)))


ENTRIES: dict[str, Entry] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "ConvInteger": _conv_integer,
    "QLinearMatMul": _qlinear_matmul,
    "QLinearConv": _qlinear_conv,
}
