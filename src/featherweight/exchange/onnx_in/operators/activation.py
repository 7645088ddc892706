"""Activations: layers wherever torch has one, so that methods see ReLU6 and not a clamp."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import Call, Entry, Node, Weight, blank


def _layer(kind: Callable[[], nn.Module]) -> Entry:
    return lambda _: Call(kind())


def _leaky_relu(node: Node) -> Call:
    return Call(nn.LeakyReLU(node.number("alpha", 0.01)))


def _elu(node: Node) -> Call:
    return Call(nn.ELU(node.number("alpha", 1.0)))


def _celu(node: Node) -> Call:
    return Call(nn.CELU(node.number("alpha", 1.0)))


def _selu(node: Node) -> Call:
    alpha, gamma = node.number("alpha", 1.6732632), node.number("gamma", 1.0507010)
    return Call(partial(_scaled_elu, alpha=alpha, gamma=gamma))


def _scaled_elu(x: Tensor, alpha: float, gamma: float) -> Tensor:
    return gamma * (torch.clamp_min(x, 0) + torch.clamp_max(alpha * (torch.exp(x) - 1), 0))


def _thresholded_relu(node: Node) -> Call:
    return Call(nn.Threshold(node.number("alpha", 1.0), 0.0))


def _prelu(node: Node) -> Call:
    slope, rank = node.constant(1), node.rank(0)
    if slope is not None:
        wide = (1,) * (rank - slope.ndim) + slope.shape
        if slope.size == 1 or (rank > 1 and math.prod(wide) == wide[1]):
            layer = blank(nn.PReLU, slope.size)
            return Call(layer, weights=(Weight("weight", 1, "flat", lambda array: array.reshape(-1)),))
    return Call(_prelu_of, inputs=(0, 1))


def _prelu_of(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x >= 0, x, x * slope)


def _hard_sigmoid(node: Node) -> Call:
    alpha, beta = node.number("alpha", 0.2), node.number("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return Call(nn.Hardsigmoid())
    return Call(partial(_line_clamped, alpha=alpha, beta=beta))


def _line_clamped(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


def _gelu(node: Node) -> Call:
    return Call(nn.GELU(node.text("approximate", "none")))


def _swish(node: Node) -> Call:
    alpha = node.number("alpha", 1.0)
    return Call(nn.SiLU() if alpha == 1.0 else partial(_scaled_swish, alpha=alpha))


def _scaled_swish(x: Tensor, alpha: float) -> Tensor:
    return x * torch.sigmoid(alpha * x)


def _softmax(kind: type[nn.Module], function: Callable[..., Tensor]) -> Entry:
    def entry(node: Node) -> Call:
        axis, last = node.axis(1 if node.opset < 13 else -1), node.rank() - 1
        if node.opset >= 13 or axis == last:
            return Call(kind(dim=-1 if axis == last else axis))
        return Call(partial(_over_the_rest, function=function, axis=axis))

    return entry


def _over_the_rest(x: Tensor, function: Callable[..., Tensor], axis: int) -> Tensor:
    """Before opset 13 everything from the axis on was one row."""
    return function(x.flatten(axis), dim=-1).reshape(x.shape)


def _hardmax(node: Node) -> Call:
    axis = node.axis(1 if node.opset < 13 else -1)
    if node.opset < 13 and axis != node.rank() - 1:
        return Call(lambda x: _one_at_largest(x.flatten(axis), -1).reshape(x.shape))
    return Call(partial(_one_at_largest, axis=axis))


def _one_at_largest(x: Tensor, axis: int) -> Tensor:
    places = torch.argmax(x, axis, keepdim=True)
    steps = torch.arange(x.shape[axis]).reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])
    return (steps == places).to(x.dtype)


def _shrink(node: Node) -> Call:
    edge, bias = node.number("lambd", 0.5), node.number("bias", 0.0)
    if bias == edge and node.is_float():
        return Call(nn.Softshrink(edge))
    if bias == 0.0 and node.is_float():
        return Call(nn.Hardshrink(edge))
    return Call(partial(_shrunk, edge=edge, bias=bias))


def _shrunk(x: Tensor, edge: float, bias: float) -> Tensor:
    inner = torch.where(x > edge, x - bias, 0.0)
    return torch.where(x < -edge, x + bias, inner).to(x.dtype)


def _clip(node: Node) -> Call:
    if node.opset < 11:
        lowest = node.number("min", -math.inf) if "min" in node.attributes else None
        highest = node.number("max", math.inf) if "max" in node.attributes else None
    elif node.all_fixed(1, 2):
        lowest, highest = (None if (limit := node.constant(i)) is None else limit.item() for i in (1, 2))
    else:
        return Call(_clip_between, inputs=(0, 1, 2))
    if node.is_float():
        return Call(_clip_layer(_limit(lowest), _limit(highest)))
    return Call(partial(_clip_numbers, lowest=lowest, highest=highest), host=True)


def _limit(value: float | None) -> float | None:
    """A limit that can bind in float32."""
    return None if value is None or abs(value) >= float(np.finfo(np.float32).max) else float(value)


def _clip_layer(lowest: float | None, highest: float | None) -> nn.Module | Callable[..., Any]:
    if (lowest, highest) == (0.0, 6.0):
        return nn.ReLU6()
    if (lowest, highest) == (0.0, None):
        return nn.ReLU()
    if lowest is not None and highest is not None and lowest < highest:
        return nn.Hardtanh(lowest, highest)
    return partial(_clip_numbers, lowest=lowest, highest=highest)


def _clip_numbers(x: Any, lowest: float | None, highest: float | None) -> Any:
    if isinstance(x, np.ndarray):
        low = x if lowest is None else np.maximum(x, lowest)
        return host.as_host(low if highest is None else np.minimum(low, highest))
    return x if lowest is None and highest is None else torch.clamp(x, lowest, highest)


def _clip_between(x: Tensor, lowest: Tensor | None, highest: Tensor | None) -> Tensor:
    return torch.clamp(x, lowest, highest)


def _swiglu(node: Node) -> Call:
    alpha = node.number("alpha", 1.0)
    return Call(lambda gate, x: _scaled_swish(gate, alpha) * x, inputs=(0, 1))


ENTRIES: dict[str, Entry] = {
    "Relu": _layer(nn.ReLU),
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "Elu": _elu,
    "Celu": _celu,
    "Selu": _selu,
    "ThresholdedRelu": _thresholded_relu,
    "Clip": _clip,
    "Sigmoid": _layer(nn.Sigmoid),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _layer(nn.Hardswish),
    "Swish": _swish,
    "SwiGLU": _swiglu,
    "Mish": _layer(nn.Mish),
    "Tanh": _layer(nn.Tanh),
    "Softplus": _layer(nn.Softplus),
    "Softsign": _layer(nn.Softsign),
    "Gelu": _gelu,
    "Hardmax": _hardmax,
    "Shrink": _shrink,
    "Softmax": _softmax(nn.Softmax, F.softmax),
    "LogSoftmax": _softmax(nn.LogSoftmax, F.log_softmax),
}
