"""Normalizations as layers."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError, Weight, blank, by_rank

_BATCH: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_INSTANCE: dict[int, type[nn.Module]] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def _batch_norm(node: Node) -> Call:
    if node.integer("training_mode", 0) or node.integer("spatial", 1) == 0:
        raise UnsupportedError("it is in training mode, or has statistics per position")
    names = ("weight", "bias", "running_mean", "running_var")
    weights = tuple(Weight(name, index) for index, name in enumerate(names, 1))
    node.fixed(1, "scale")
    kind = by_rank(_BATCH, node.rank())
    momentum = 1 - node.number("momentum", 0.9)
    return Call(blank(kind, node.shape(1)[0], node.number("epsilon", 1e-5), momentum), weights=weights)


def _instance_norm(node: Node) -> Call:
    node.fixed(1, "scale")
    kind = by_rank(_INSTANCE, node.rank())
    layer = blank(kind, node.shape(1)[0], node.number("epsilon", 1e-5), affine=True)
    return Call(layer, weights=(Weight("weight", 1), Weight("bias", 2)))


def _group_norm(node: Node) -> Call:
    groups, channels = node.integer("num_groups", 0), node.shape()[1]
    if groups < 1 or channels % groups:
        raise UnsupportedError(f"{groups} groups do not divide {channels} channels")
    node.fixed(1, "scale")
    per_group = node.shape(1) == (groups,) and groups != channels  # opset 18; per channel since 21

    def spread(array: np.ndarray) -> np.ndarray:
        return np.repeat(array, channels // groups) if per_group else array

    change = "per channel" if per_group else "as it is"
    layer = blank(nn.GroupNorm, groups, channels, node.number("epsilon", 1e-5))
    return Call(layer, weights=(Weight("weight", 1, change, spread), Weight("bias", 2, change, spread)))


def _layer_norm(node: Node) -> Call:
    shape = node.shape()[node.axis(-1) :]
    node.fixed(1, "scale")
    layer = blank(nn.LayerNorm, shape, node.number("epsilon", 1e-5), bias=node.has(2))
    return Call(layer, weights=_affine(node, shape))


def _rms_norm(node: Node) -> Call:
    shape = node.shape()[node.axis(-1) :]
    node.fixed(1, "scale")
    return Call(blank(nn.RMSNorm, shape, node.number("epsilon", 1e-5)), weights=_affine(node, shape)[:1])


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
    ratio = node.constant(1) if node.opset >= 12 else None
    training = node.constant(2)
    if node.has(2) and (training is None or bool(training.item())):
        raise UnsupportedError("it is in training mode")
    share = node.number("ratio", 0.5) if ratio is None else float(ratio.item())
    return Call(nn.Dropout(min(max(share, 0.0), 1.0)))


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
