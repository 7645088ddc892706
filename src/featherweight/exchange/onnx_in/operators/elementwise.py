"""Arithmetic, comparisons and logic on each element; on host numbers too, where shapes need it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import Call, Entry, Node

_Function = Callable[..., Any]


_UNSIGNED = frozenset({"uint16", "uint32", "uint64"})  # torch stores them and computes nothing with them


def _unary(function: _Function, on_host: _Function | None = None) -> Entry:
    def run(x: Any) -> Any:
        return on_host(x) if on_host is not None and isinstance(x, np.ndarray) else function(x)

    def entry(node: Node) -> Call:
        if node.dtype(0).name in _UNSIGNED:
            return Call(_in_int64(function, node.tensor_dtype(0)))
        return Call(run, host=on_host is not None)

    return entry


def _binary(
    function: _Function, on_host: _Function | None = None, unsigned: _Function | None = None
) -> Entry:
    """``unsigned``: what to do with the bits of uint64 in int64, where it is something else."""

    def run(a: Any, b: Any) -> Any:
        if on_host is not None and isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            return host.plain(host.as_host(on_host(a, b)))
        return function(a, b)

    def entry(node: Node) -> Call:
        kind = node.dtype(0).name
        if kind in _UNSIGNED:
            chosen = unsigned if unsigned is not None and kind == "uint64" else function
            return Call(_in_int64(chosen, node.tensor_dtype(0)), inputs=(0, 1))
        return Call(run, inputs=(0, 1), host=on_host is not None)

    return entry


def _several(function: _Function, on_host: _Function, unsigned: _Function | None = None) -> Entry:
    """One input or more, folded from the left."""

    def run(*items: Any) -> Any:
        if all(isinstance(item, np.ndarray) for item in items):
            return host.plain(host.as_host(reduce(on_host, items)))
        return reduce(function, items)

    def entry(node: Node) -> Call:
        kind, inputs = node.dtype(0).name, tuple(range(len(node.inputs)))
        if kind in _UNSIGNED:
            chosen = unsigned if unsigned is not None and kind == "uint64" else function
            wide = _in_int64(lambda *items: reduce(chosen, items), node.tensor_dtype(0))
            return Call(wide, inputs=inputs)
        return Call(run, inputs=inputs, host=True)

    return entry


def _in_int64(function: _Function, dtype: torch.dtype) -> _Function:
    """Compute with unsigned numbers as int64; those of 64 bits keep their bits."""

    def run(*items: Tensor) -> Tensor:
        result: Tensor = function(*(item.to(torch.int64) for item in items))
        return result if result.dtype == torch.bool else result.to(dtype)

    return run


def _below(a: Tensor, b: Tensor) -> Tensor:
    """a < b of numbers of 64 bits without a sign."""
    return torch.bitwise_xor(a, _TOP) < torch.bitwise_xor(b, _TOP)


_TOP = -(1 << 63)


def _unsigned_quotient(a: Tensor, b: Tensor) -> Tensor:
    """Of 64 bits without a sign (Warren, Hacker's Delight, 9-3): halve, divide, correct."""
    half = torch.bitwise_right_shift(a, 1) & ~_TOP
    found = torch.div(half, b, rounding_mode="trunc") * 2
    found = found + torch.logical_not(_below(a - found * b, b)).to(torch.int64)
    return torch.where(b < 0, torch.logical_not(_below(a, b)).to(torch.int64), found)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def _power(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b.to(a.dtype) if a.is_floating_point() else b).to(a.dtype)


def _mod(node: Node) -> Call:
    if node.integer("fmod", 0) and node.dtype(0).name not in _UNSIGNED:
        return _binary(torch.fmod, np.fmod)(node)
    return _binary(torch.remainder, np.mod, lambda a, b: a - _unsigned_quotient(a, b) * b)(node)


def _mean(node: Node) -> Call:
    count = len(node.inputs)

    def run(*items: Tensor) -> Tensor:
        return reduce(torch.add, items) / count

    return Call(run, inputs=tuple(range(count)))


def _where(_: Node) -> Call:
    return Call(_where_of, inputs=(0, 1, 2), host=True)


def _where_of(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, np.ndarray):
        return host.plain(host.as_host(np.where(condition.astype(bool), a, b)))
    return torch.where(condition, a, b)


def _not(x: Any) -> Any:
    return ~x.astype(bool) if isinstance(x, np.ndarray) else torch.logical_not(x)


def _is_inf(node: Node) -> Call:
    low, high = node.integer("detect_negative", 1), node.integer("detect_positive", 1)
    if low and high:
        return Call(torch.isinf)
    return Call(torch.isposinf if high else torch.isneginf if low else _never)


def _never(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.bool)


def _shift(node: Node) -> Call:
    left = node.text("direction", "LEFT") == "LEFT"
    kind = node.dtype(0)
    run = partial(_shifted, left=left, bits=8 * kind.itemsize, logical=kind.name == "uint64")
    return Call(_in_int64(run, node.tensor_dtype(0)), inputs=(0, 1))


def _shifted(x: Tensor, by: Tensor, left: bool, bits: int, logical: bool) -> Tensor:
    """A shift by the width or more leaves zero, or the sign."""
    far = torch.logical_or(by >= bits, by < 0)
    near = torch.where(far, 0, by)
    if left:
        return torch.where(far, 0, torch.bitwise_left_shift(x, near))
    moved = torch.bitwise_right_shift(x, near)
    if logical:
        kept = torch.bitwise_right_shift(torch.full_like(x, ~_TOP), torch.clamp_min(near - 1, 0))
        return torch.where(far, 0, torch.where(near > 0, moved & kept, x))
    return torch.where(far, torch.where(x < 0, -1, 0), moved)


def _round_host(function: Callable[[Any], Any]) -> _Function:
    return lambda x: host.each(function, x)


ENTRIES: dict[str, Entry] = {
    "Add": _binary(torch.add, operator.add),
    "Sub": _binary(torch.sub, operator.sub),
    "Mul": _binary(torch.mul, operator.mul),
    "Div": _binary(_divide, host.quotient, _unsigned_quotient),
    "Pow": _binary(_power),
    "Mod": _mod,
    "Min": _several(torch.minimum, np.minimum, lambda a, b: torch.where(_below(a, b), a, b)),
    "Max": _several(torch.maximum, np.maximum, lambda a, b: torch.where(_below(a, b), b, a)),
    "Sum": _several(torch.add, operator.add),
    "Mean": _mean,
    "Equal": _binary(torch.eq, np.equal),
    "Greater": _binary(torch.gt, np.greater, lambda a, b: _below(b, a)),
    "GreaterOrEqual": _binary(torch.ge, np.greater_equal, lambda a, b: ~_below(a, b)),
    "Less": _binary(torch.lt, np.less, _below),
    "LessOrEqual": _binary(torch.le, np.less_equal, lambda a, b: ~_below(b, a)),
    "And": _binary(torch.logical_and, np.logical_and),
    "Or": _binary(torch.logical_or, np.logical_or),
    "Xor": _binary(torch.logical_xor, np.logical_xor),
    "Not": _unary(_not, _not),
    "BitShift": _shift,
    "BitwiseAnd": _binary(torch.bitwise_and),
    "BitwiseOr": _binary(torch.bitwise_or),
    "BitwiseXor": _binary(torch.bitwise_xor),
    "BitwiseNot": _unary(torch.bitwise_not),
    "Where": _where,
    "Abs": _unary(torch.abs),
    "Neg": _unary(torch.neg, operator.neg),
    "Reciprocal": _unary(torch.reciprocal),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Sqrt": _unary(torch.sqrt),
    "Erf": _unary(torch.erf),
    "Sign": _unary(torch.sign),
    "Floor": _unary(torch.floor, _round_host(math.floor)),
    "Ceil": _unary(torch.ceil, _round_host(math.ceil)),
    "Round": _unary(torch.round),
    "IsNaN": _unary(torch.isnan),
    "IsInf": _is_inf,
    "Sin": _unary(torch.sin),
    "Cos": _unary(torch.cos),
    "Tan": _unary(torch.tan),
    "Asin": _unary(torch.asin),
    "Acos": _unary(torch.acos),
    "Atan": _unary(torch.atan),
    "Sinh": _unary(torch.sinh),
    "Cosh": _unary(torch.cosh),
    "Asinh": _unary(torch.asinh),
    "Acosh": _unary(torch.acosh),
    "Atanh": _unary(torch.atanh),
}
