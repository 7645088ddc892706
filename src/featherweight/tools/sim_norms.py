"""Temporary batch norm: behind folded layers while they train in low bits, and folded back exactly.

Networks reach quantization folded, and low-bit training suffers without normalization. Behind a layer
whose stored weight Ŵ has one scale per output channel stand, while it trains, its own statistics::

    z = gamma * (Ŵ x - mean) / sqrt(var + eps) + beta        at first gamma = sqrt(var + eps), beta = mean + b

Afterwards r = gamma / sqrt(var + eps) goes into the scale of the format, |r| times as large, the sign of r
into the stored integers, and the rest into the bias: b' = beta - r * mean (as Jacob et al. 2018,
arXiv:1712.05877, section 3.2 do with the norms of the network itself). Only symmetric grids can turn round.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.formats import Binary, IntQuant, PerChannel, PerGroup, TensorFormat, Ternary
from featherweight.granularity import per_element
from featherweight.graph import Graph, Node, trace
from featherweight.model import Model
from featherweight.tools.sim_replay import Call

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_EPS = 1e-5


class TemporaryNorm(nn.Module):
    """The norm behind one layer, which it is the identity of at first.

    Args:
        mean: Of the layer's outputs without bias, per channel.
        variance: Of the layer's outputs, per channel.
        bias: Of the layer.
        momentum: Of the running statistics.
    """

    def __init__(self, mean: Tensor, variance: Tensor, bias: Tensor, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.weight = nn.Parameter((variance + _EPS).sqrt())
        self.bias = nn.Parameter(mean + bias)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("variance", variance.clone())

    mean: Tensor
    variance: Tensor

    def forward(self, y: Tensor) -> Tensor:
        """Normalized by the batch, whose statistics move the running ones."""
        return nn.functional.batch_norm(
            y, self.mean, self.variance, self.weight, self.bias, True, self.momentum, _EPS
        )

    def gain(self) -> Tensor:
        """What each channel is multiplied by: r."""
        return self.weight / (self.variance + _EPS).sqrt()

    def folded_bias(self) -> Tensor:
        """The bias of the layer alone."""
        return self.bias - self.gain() * self.mean

    def folded_format(self, fmt: TensorFormat) -> TensorFormat:
        """The format with |r| in its scales."""
        assert isinstance(fmt, IntQuant | Ternary | Binary)
        size = self.gain().abs()
        size = size[:, None] if isinstance(fmt.granularity, PerGroup) else size
        return fmt.with_learned({name: value * size for name, value in fmt.learned().items()})

    def folded_weight(self, stored: Tensor, fmt: TensorFormat) -> Tensor:
        """The on-grid weight with r in it: the same integers, or their opposites."""
        assert isinstance(fmt, IntQuant | Ternary | Binary)
        signs = torch.where(self.gain() < 0, -1, 1).reshape(-1, *[1] * (stored.dim() - 1))
        made = self.folded_format(fmt)
        if isinstance(made, IntQuant):
            assert isinstance(fmt, IntQuant)
            zero = fmt.grid_of(stored)[1]
            return made.dequantize((fmt.quantize(stored) - zero) * signs + zero)
        assert isinstance(fmt, Ternary | Binary)
        assert isinstance(made, Ternary | Binary)
        return signs * fmt.codes(stored) * per_element(made.scale, made.granularity, stored)


class Moments:
    """Mean and variance per channel of a layer's outputs, batch by batch."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | None = None
        self._square: Tensor | None = None

    def update(self, y: Tensor) -> None:
        """Another batch of shape (N, channels, ...)."""
        rows = y.detach().double().transpose(0, 1).flatten(1)
        total, square = rows.sum(1), rows.square().sum(1)
        self._count += rows.shape[1]
        self._sum = total if self._sum is None else self._sum + total
        self._square = square if self._square is None else self._square + square

    def norm(self, bias: Tensor) -> TemporaryNorm:
        """The norm that is the identity on what was seen, of outputs that hold the bias."""
        assert self._sum is not None
        assert self._square is not None
        mean = self._sum / self._count
        variance = (self._square / self._count - mean.square()).clamp(min=0)
        return TemporaryNorm((mean - bias.double()).float(), variance.float(), bias.detach())


def normable(model: Model, graph: Graph) -> dict[str, Node]:
    """Weights behind which a norm can stand and be folded back, with the one call that reads each."""
    calls = [node for one in model.entries for node in trace(model, one)]
    reads = Counter(name for node in calls for name in node.parameters.values())
    found: dict[str, Node] = {}
    for node in graph:
        weight, bias = node.parameters.get("weight"), node.parameters.get("bias")
        if weight is None or bias is None or reads[weight] != 1 or reads[bias] != 1:
            continue
        value = graph.values[node.outputs[0]]
        matrix = node.op == "linear" and len(value.shape) == 2
        plain = (node.op in _CONVOLUTIONS or matrix) and bias not in model.formats
        normed = any(reader.op == "batch_norm" for reader in graph.consumers[value.name])
        chain = model.formats.get(weight, ())
        if plain and not normed and value.name not in graph.outputs and len(chain) == 1 and _scales(chain[0]):
            found[weight] = node
    return found


def _scales(fmt: TensorFormat) -> bool:
    """Whether a factor per output channel can go into the format."""
    if not isinstance(fmt, IntQuant | Ternary | Binary) or (isinstance(fmt, IntQuant) and not fmt.symmetric):
        return False
    return fmt.granularity == PerChannel(0) or (
        isinstance(fmt.granularity, PerGroup) and fmt.granularity.axis == 1
    )


def normalized(norm: TemporaryNorm) -> Call:
    """The layer's call without its bias, and the norm behind it."""

    def call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not norm.training:
            return target(*args, **kwargs)
        rest = {name: value for name, value in kwargs.items() if name != "bias"}
        return norm(target(*args[:2], None, *args[3:], **rest))

    return call


def observed(moments: Moments) -> Call:
    """The layer's call, whose outputs are counted."""

    def call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = target(*args, **kwargs)
        moments.update(y)
        return y

    return call
