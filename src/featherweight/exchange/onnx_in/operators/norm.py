"""Normalizations as layers."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError, Weight, blank, by_rank

_BATCH: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_INSTANCE: dict[int, type[nn.Module]] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def _batch_norm(node: Node) -> Call:
    if node.integer("spatial", 1) == 0:
        raise UnsupportedError("it has statistics per position")
    epsilon, momentum = node.number("epsilon", 1e-5), node.number("momentum", 0.9)
    if node.integer("training_mode", 0):
        return Call(partial(_batch_norm_of_batch, epsilon=epsilon, momentum=momentum), inputs=(0, 1, 2, 3, 4))
    if not node.all_fixed(1, 2, 3, 4) or node.rank() not in _BATCH or not node.is_float():
        return Call(partial(_batch_norm_of, epsilon=epsilon), inputs=(0, 1, 2, 3, 4))
    names = ("weight", "bias", "running_mean", "running_var")
    weights = tuple(Weight(name, index) for index, name in enumerate(names, 1))
    kind = by_rank(_BATCH, node.rank())
    return Call(blank(kind, node.shape(1)[0], epsilon, 1 - momentum), weights=weights)


def _batch_norm_of(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float
) -> Tensor:
    return F.batch_norm(x, mean, variance, scale, bias, eps=epsilon)


def _batch_norm_of_batch(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float, momentum: float
) -> tuple[Tensor, ...]:
    """With the statistics of this batch; also returns the running ones, moved towards them."""
    axes = [0, *range(2, x.dim())]
    here, spread = x.mean(axes), x.var(axes, correction=0)
    moved = [momentum * old + (1 - momentum) * new for old, new in ((mean, here), (variance, spread))]
    return F.batch_norm(x, here, spread, scale, bias, eps=epsilon), moved[0], moved[1]


def _instance_norm(node: Node) -> Call:
    epsilon = node.number("epsilon", 1e-5)
    if not node.all_fixed(1, 2) or node.rank() not in _INSTANCE:
        return Call(
            lambda x, scale, bias: F.instance_norm(x, weight=scale, bias=bias, eps=epsilon), inputs=(0, 1, 2)
        )
    layer = blank(by_rank(_INSTANCE, node.rank()), node.shape(1)[0], epsilon, affine=True)
    return Call(layer, weights=(Weight("weight", 1), Weight("bias", 2)))


def _group_norm(node: Node) -> Call:
    groups, channels = node.integer("num_groups", 0), node.shape()[1]
    if groups < 1 or channels % groups:
        raise UnsupportedError(f"{groups} groups do not divide {channels} channels")
    per_group = node.shape(1) == (groups,) and groups != channels  # opset 18; per channel since 21
    repeats, epsilon = channels // groups if per_group else 1, node.number("epsilon", 1e-5)
    if not node.all_fixed(1, 2):
        run = partial(_group_norm_of, groups=groups, epsilon=epsilon, repeats=repeats)
        return Call(run, inputs=(0, 1, 2))

    def spread(array: np.ndarray) -> np.ndarray:
        return np.repeat(array, repeats)

    change = "per channel" if per_group else "as it is"
    layer = blank(nn.GroupNorm, groups, channels, epsilon)
    return Call(layer, weights=(Weight("weight", 1, change, spread), Weight("bias", 2, change, spread)))


def _group_norm_of(
    x: Tensor, scale: Tensor, bias: Tensor, groups: int, epsilon: float, repeats: int
) -> Tensor:
    if repeats > 1:
        scale, bias = scale.repeat_interleave(repeats), bias.repeat_interleave(repeats)
    return F.group_norm(x, groups, scale, bias, epsilon)


def _layer_norm(node: Node) -> Call:
    rank, shape = node.rank(), node.shape()[node.axis(-1) :]
    epsilon = node.number("epsilon", 1e-5)
    if any(node.outputs[1:]) or not node.all_fixed(1, 2):
        run = partial(_layer_norm_of, axes=len(shape), epsilon=epsilon, statistics=any(node.outputs[1:]))
        return Call(run, inputs=(0, 1, 2))
    if not rank:
        raise UnsupportedError("it works on a number")
    layer = blank(nn.LayerNorm, shape, epsilon, bias=node.has(2))
    return Call(layer, weights=_affine(node, shape))


def _layer_norm_of(
    x: Tensor, scale: Tensor, bias: Tensor | None, axes: int, epsilon: float, statistics: bool
) -> Tensor | tuple[Tensor, ...]:
    shape = x.shape[x.dim() - axes :]
    scale = scale.expand(shape)
    result = F.layer_norm(x, shape, scale, None if bias is None else bias.expand(shape), epsilon)
    if not statistics:
        return result
    last = tuple(range(x.dim() - axes, x.dim()))
    mean, spread = x.mean(last, keepdim=True), x.var(last, correction=0, keepdim=True)
    return result, mean, torch.rsqrt(spread + epsilon)


def _rms_norm(node: Node) -> Call:
    shape, epsilon = node.shape()[node.axis(-1) :], node.number("epsilon", 1e-5)
    if not node.all_fixed(1):
        count = len(shape)
        return Call(
            lambda x, scale: F.rms_norm(x, x.shape[x.dim() - count :], eps=epsilon) * scale, inputs=(0, 1)
        )
    return Call(blank(nn.RMSNorm, shape, epsilon), weights=_affine(node, shape)[:1])


def _affine(node: Node, shape: tuple[int, ...]) -> tuple[Weight, ...]:
    """Scale and bias, broadcast to the normalized shape."""

    def spread(array: np.ndarray) -> np.ndarray:
        return np.broadcast_to(array, shape)

    change = f"as {shape}"
    scale = Weight("weight", 1, change, spread)
    return (scale, Weight("bias", 2, change, spread)) if node.has(2) else (scale,)


def _local_response(node: Node) -> Call:
    alpha, beta, bias = node.number("alpha", 1e-4), node.number("beta", 0.75), node.number("bias", 1.0)
    return Call(nn.LocalResponseNorm(node.integer("size", 1), alpha, beta, bias))


def _lp_norm(node: Node) -> Call:
    order = node.integer("p", 2)
    return Call(partial(F.normalize, p=float(order), dim=node.axis(-1)))


def _mean_variance(node: Node) -> Call:
    return Call(partial(_standardized, axes=node.integers("axes") or (0, 2, 3)))


def _standardized(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    mean = x.mean(axes, keepdim=True)
    return (x - mean) / (torch.sqrt((x * x).mean(axes, keepdim=True) - mean * mean) + 1e-9)


def _dropout(node: Node) -> Call:
    """Off, as in inference; a graph that asks for it at run time gets it only with a ratio of zero."""
    ratio = node.constant(1) if node.opset >= 12 else None
    share = node.number("ratio", 0.5) if ratio is None else float(ratio.item())
    if node.has(2):
        training = node.constant(2)
        asked = training is None or bool(training.item())
        if asked and not (ratio is None and node.has(1)) and share:
            raise UnsupportedError("it is in training mode")
        if asked:
            run = partial(_dropped, masked=len(node.outputs) > 1)
            return Call(run, inputs=(0, 1, 2), sizes=frozenset({1, 2}))
    if len(node.outputs) > 1 and node.outputs[1]:
        return Call(lambda x: (x, torch.ones_like(x, dtype=torch.bool)))
    return Call(nn.Dropout(min(max(share, 0.0), 1.0)))


def _dropped(
    x: Tensor, ratio: host.Host | None, training: host.Host | None, masked: bool
) -> Tensor | tuple[Tensor, Tensor]:
    if training is not None and bool(training) and ratio is not None and float(ratio):
        raise UnsupportedError("it is in training mode")
    return (x, torch.ones_like(x, dtype=torch.bool)) if masked else x


ENTRIES: dict[str, Entry] = {
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "LRN": _local_response,
    "LpNormalization": _lp_norm,
    "MeanVarianceNormalization": _mean_variance,
    "Dropout": _dropout,
}
