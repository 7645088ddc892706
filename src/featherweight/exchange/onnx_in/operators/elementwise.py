"""Arithmetic, comparisons and logic on each element; on host numbers too, where shapes need it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError

_Function = Callable[..., Any]


def _unary(function: _Function, on_host: _Function | None = None) -> Entry:
    def run(x: Any) -> Any:
        return on_host(x) if on_host is not None and isinstance(x, np.ndarray) else function(x)

    return lambda _: Call(run, host=on_host is not None)


def _binary(function: _Function, on_host: _Function | None = None) -> Entry:
    def run(a: Any, b: Any) -> Any:
        if on_host is not None and isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            return host.plain(host.as_host(on_host(a, b)))
        return function(a, b)

    return lambda _: Call(run, inputs=(0, 1), host=on_host is not None)


def _several(function: _Function, on_host: _Function) -> Entry:
    """One input or more, folded from the left."""

    def run(*items: Any) -> Any:
        if all(isinstance(item, np.ndarray) for item in items):
            return host.plain(host.as_host(reduce(on_host, items)))
        return reduce(function, items)

    return lambda node: Call(run, inputs=tuple(range(len(node.inputs))), host=True)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def _power(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b.to(a.dtype) if a.is_floating_point() else b).to(a.dtype)


def _mod(node: Node) -> Call:
    if node.integer("fmod", 0):
        return _binary(torch.fmod, np.fmod)(node)
    return _binary(torch.remainder, np.mod)(node)


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


def _cast(node: Node) -> Call:
    return Call(partial(_cast_to, dtype=_torch_dtype(node.integer("to", 0))), host=True)


def _cast_like(_: Node) -> Call:
    return Call(lambda x, like: x.to(like.dtype), inputs=(0, 1))


def _torch_dtype(elem_type: int) -> torch.dtype:
    try:
        name = str(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
    except KeyError as error:
        raise UnsupportedError(f"it casts to the unknown type {elem_type}") from error
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UnsupportedError(f"it casts to {name}")
    return found


def _cast_to(x: Any, dtype: torch.dtype) -> Any:
    if not isinstance(x, np.ndarray):
        return x.to(dtype)
    if dtype.is_floating_point:
        return host.each(torch.sym_float, x)
    return host.each(bool if dtype == torch.bool else torch.sym_int, x)


def _is_inf(node: Node) -> Call:
    low, high = node.integer("detect_negative", 1), node.integer("detect_positive", 1)
    if low and high:
        return Call(torch.isinf)
    return Call(torch.isposinf if high else torch.isneginf if low else _never)


def _never(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.bool)


def _shift(node: Node) -> Call:
    left = node.text("direction", "LEFT") == "LEFT"
    return Call(torch.bitwise_left_shift if left else torch.bitwise_right_shift, inputs=(0, 1))


def _round_host(function: Callable[[Any], Any]) -> _Function:
    return lambda x: host.each(function, x)


ENTRIES: dict[str, Entry] = {
    "Add": _binary(torch.add, operator.add),
    "Sub": _binary(torch.sub, operator.sub),
    "Mul": _binary(torch.mul, operator.mul),
    "Div": _binary(_divide, host.quotient),
    "Pow": _binary(_power),
    "Mod": _mod,
    "Min": _several(torch.minimum, np.minimum),
    "Max": _several(torch.maximum, np.maximum),
    "Sum": _several(torch.add, operator.add),
    "Mean": _mean,
    "Equal": _binary(torch.eq, np.equal),
    "Greater": _binary(torch.gt, np.greater),
    "GreaterOrEqual": _binary(torch.ge, np.greater_equal),
    "Less": _binary(torch.lt, np.less),
    "LessOrEqual": _binary(torch.le, np.less_equal),
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
    "Cast": _cast,
    "CastLike": _cast_like,
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
