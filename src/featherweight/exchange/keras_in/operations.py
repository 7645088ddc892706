"""Operations of ``keras.ops`` in a functional model (``x + 1``, ``keras.ops.mean(x)``) by their classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from featherweight.exchange.keras_in.build import Call, Value
from featherweight.exchange.keras_in.layers import activate, together

_BINARY = {
    "Add": "add",
    "Subtract": "subtract",
    "Multiply": "multiply",
    "Divide": "divide",
    "TrueDivide": "divide",
    "Power": "power",
    "Maximum": "maximum",
    "Minimum": "minimum",
}
_UNARY = {
    "Exp": "exp",
    "Log": "log",
    "Sqrt": "sqrt",
    "Rsqrt": "rsqrt",
    "Square": "square",
    "Absolute": "abs",
    "Abs": "abs",
    "Negative": "negative",
    "Sin": "sin",
    "Cos": "cos",
    "Erf": "erf",
}
_ACTIVATIONS = {
    "Relu": "relu",
    "Relu6": "relu6",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Silu": "silu",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "HardSigmoid": "hard_sigmoid",
    "HardSilu": "hard_silu",
    "Selu": "selu",
}
_REDUCTIONS = {"Mean": "mean", "Sum": "sum", "Max": "max", "Min": "min", "Amax": "max", "Amin": "min"}


def _binary(call: Call) -> Value:
    op = _BINARY[type(call.layer).__name__]
    operands = [*call.args, *(call.kwargs or {}).values()][:2]
    tensors = [item for item in operands if isinstance(item, Value)]
    if len(tensors) == 2:
        if len({value.rank for value in tensors}) == 1:
            return call.function("binary", *together(call, tensors), op=op)
        return call.function("binary", *(call.builder.plain(value) for value in tensors), op=op)
    other = next(item for item in operands if not isinstance(item, Value))
    if np.ndim(other):
        raise call.refuse("has an array among its operands")
    value = call.builder.floating(tensors[0])
    return call.function("binary", value, op=op, other=float(other), swapped=operands[1] is tensors[0])


def _unary(call: Call) -> Value:
    return call.function(_UNARY[type(call.layer).__name__], call.builder.floating(call.inputs[0]))


class _Named:
    """Stands for a Keras function where only its name counts."""

    def __init__(self, name: str) -> None:
        self.__name__ = name


def _activation(call: Call) -> Value:
    name = _ACTIVATIONS[type(call.layer).__name__]
    return activate(call, call.builder.floating(call.inputs[0]), _Named(name), own=True)


def _axes(axis: Any, rank: int) -> tuple[int, ...]:
    if axis is None:
        return ()
    return tuple(int(one) % rank for one in ([axis] if isinstance(axis, int) else axis))


def _reduce(call: Call) -> Value:
    value = call.plain()
    return call.function(
        "reduce",
        value,
        op=_REDUCTIONS[type(call.layer).__name__],
        axes=_axes(call.layer.axis, value.rank),
        keepdims=bool(call.layer.keepdims),
    )


def _reshape(call: Call) -> Value:
    shape = tuple(-1 if size is None else int(size) for size in call.layer.newshape)
    source = call.inputs[0].shape
    if (
        not shape
        or (source[0] is not None and shape[0] != source[0])
        or (source[0] is None and shape[0] != -1)
    ):
        raise call.refuse("changes the batch")
    return call.function("reshape", call.plain(), shape=shape[1:])


def _transpose(call: Call) -> Value:
    value = call.plain()
    axes = call.layer.axes
    dims = tuple(range(value.rank))[::-1] if axes is None else tuple(int(axis) for axis in axes)
    return call.function("permute", value, dims=dims)


def _concatenate(call: Call) -> Value:
    values = together(call, list(call.inputs))
    return call.function("concatenate", *values, axis=values[0].axis(call.layer.axis))


def _expand(call: Call) -> Value:
    value = call.plain()
    axes = _axes(call.layer.axis, value.rank + 1)
    if len(axes) != 1:
        raise call.refuse("adds several axes")
    return call.function("unsqueeze", value, axis=axes[0])


def _get_item(call: Call) -> Value:
    value = call.builder.plain(call.inputs[0])
    key = call.args[1] if len(call.args) > 1 else call.the("key")
    items: list[Any] = []
    key = tuple(key) if isinstance(key, list) else key if isinstance(key, tuple) else (key,)
    for item in key:
        if isinstance(item, slice):
            items.append((item.start, item.stop, item.step))
        elif item is Ellipsis:
            left = value.rank - sum(part is not None and part is not Ellipsis for part in key)
            items += [(None, None, None)] * left
        elif item is None or isinstance(item, (int, np.integer)):
            items.append(item if item is None else int(item))
        else:
            raise call.refuse("picks by an array")
    return replace(call.function("index", value, items=tuple(items)), integer=value.integer)


def _softmax(call: Call) -> Value:
    axis = call.layer.axis
    if axis not in (-1, call.inputs[0].rank - 1):
        raise call.refuse(f"works on axis {axis}")
    return activate(call, call.builder.floating(call.inputs[0]), _Named("softmax"), own=True)


def _gelu(call: Call) -> Value:
    if call.layer.approximate:
        raise call.refuse("is approximate")
    return activate(call, call.builder.floating(call.inputs[0]), _Named("gelu"), own=True)


def _cast(call: Call) -> Value:
    value, dtype = call.inputs[0], str(call.layer.dtype)
    made = call.function("cast", value, dtype=dtype)
    return replace(made, integer="int" in dtype or dtype == "bool")


def _clip(call: Call) -> Value:
    low, high = call.layer.x_min, call.layer.x_max
    return call.function("clip", call.builder.floating(call.inputs[0]), low=low, high=high)


def _matmul(call: Call) -> Value:
    values = [call.builder.plain(call.builder.floating(value)) for value in call.inputs]
    return call.function("matmul", *values)


OPERATIONS: Mapping[str, Callable[[Call], Value]] = {
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_ACTIVATIONS, _activation),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Concatenate": _concatenate,
    "ExpandDims": _expand,
    "GetItem": _get_item,
    "Softmax": _softmax,
    "Gelu": _gelu,
    "Cast": _cast,
    "Clip": _clip,
    "Matmul": _matmul,
}
