"""What equalization costs and gains: rounding errors of a group of channels for given factors.

Activations x_c * s_c share a grid, and W[:, c] / s_c shares one per row (or per tensor). For consumers k of
the group, with rounding errors that are independent between channels, the error of their outputs beside
their energy is::

    J(s) = sum_k 1 / E|y_k|^2 * ( sum_v sum_c |W_k[:, c]|^2 * E(round(x_vc * s_c) / s_c - x_vc)^2
                                  + sum_o step_o(s)^2 / 12 * sum_c s_c^2 * E x_c^2 )

over the values v that hold the channels, where the first expectation is taken over samples of calibration
examples that the factors were not made from, and a clamp cuts x_c * s_c off where it does in the network.

Factors: SmoothQuant (Xiao et al. 2022, arXiv:2211.10438, equation 4) ``s_c = w_c^(1-alpha) / x_c^alpha``, or
of activations alone, ``s_c = x_c^-alpha``; cross-layer equalization (Nagel et al. 2019, arXiv:1906.04721,
equation 11) ``s_c = sqrt(r2_c / r1_c)`` of the ranges that produce and read a channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.tools.reach import Reach
from featherweight.tools.scaling import ScalingGroup, Slot, by_channel, spread

_TINY = 1e-12
_SWEEPS = 50


@dataclass(frozen=True)
class Reader:
    """One consumer's weight: its slot, its elements, and what its outputs have of energy at one place."""

    slot: Slot
    weight: Tensor
    energy: float


def score(
    factors: Tensor, reaches: Sequence[Reach], readers: Sequence[Reader], bits: tuple[int, int], rows: bool
) -> float:
    """J of the module's docstring: error of the consumers' outputs beside their energy.

    Args:
        factors: One per channel.
        reaches: Of the counted carriers, with samples.
        readers: The consumers.
        bits: Of activations and of weights.
        rows: Weights have a scale per output channel, not one for all.
    """
    columns = sum(
        (by_channel(r.weight.square(), r.slot.index, len(factors)) / r.energy for r in readers),
        torch.zeros(len(factors)),
    )
    total = sum(float((columns * reach.errors(factors, bits[0])).sum()) for reach in reaches)
    power = torch.stack([reach.squares for reach in reaches]).amax(0).float()
    for reader in readers:
        spreaded = spread(factors, reader.slot.index)
        scaled = (reader.weight / spreaded).abs()
        largest = scaled.flatten(1).amax(1) if rows else scaled.amax().expand(scaled.shape[0])
        steps = (largest / (2 ** (bits[1] - 1) - 1)).square() / 12
        noise = spread(power * factors.square(), reader.slot.index) * (reader.slot.index >= 0)
        per_row = noise.expand(scaled.shape).flatten(1).sum(1)
        total += float((per_row * steps).sum()) / reader.energy
    return total


def ranges(slots: Sequence[Slot], tensors: Mapping[str, Tensor], channels: int) -> Tensor | None:
    """Largest magnitude of each channel in these weights, beside each weight's own; None without a weight."""
    found = []
    for slot in slots:
        weight = tensors[slot.parameter].detach()
        if weight.dim() > 1:
            largest = by_channel(weight.abs(), slot.index, channels, "amax")
            found.append(largest / largest.max().clamp(min=_TINY))
    return torch.stack(found).amax(0) if found else None


def extents(reaches: Sequence[Reach]) -> Tensor:
    """Largest magnitude of each channel over carriers, each beside its own largest channel."""
    each = [reach.extent() for reach in reaches]
    return torch.stack([one / one.max().clamp(min=_TINY) for one in each]).amax(0)


def smooth(activations: Tensor, weights: Tensor | None, alpha: float, limit: float) -> Tensor:
    """SmoothQuant's factors, centred, none beyond ``limit`` times the median or below its inverse.

    Args:
        activations: Extent of each channel.
        weights: Range of each channel where it is read; None: of activations alone.
        alpha: How much of the difference goes to the weights.
        limit: 1 or more.
    """
    factors = -alpha * activations.clamp(min=_TINY).log()
    if weights is not None:
        factors = factors + (1 - alpha) * weights.clamp(min=_TINY).log()
    return _limited(factors, limit)


def _limited(logarithms: Tensor, limit: float) -> Tensor:
    bound = float(torch.tensor(limit).log())
    return (logarithms - logarithms.median()).clamp(-bound, bound).exp()


def bounds(group: ScalingGroup, limits: Sequence[Reach], margin: float) -> tuple[Tensor, Tensor]:
    """Smallest and largest factor of each channel that leave its clamps where they were.

    A channel whose largest value, times a margin, is under the clamp may be moved up to it; one that
    reaches the clamp, or that never got above zero, stays.

    Args:
        group: Any group.
        limits: What was seen in front of its clamps.
        margin: 1 or more.
    """
    low, high = torch.zeros(group.channels), torch.full((group.channels,), torch.inf)
    for reach in limits:
        ceiling = float(reach.carrier.limit or torch.inf)
        free = (reach.seen_high > 0) & (reach.seen_high * margin < ceiling)
        room = ceiling / (reach.seen_high * margin).clamp(min=_TINY)
        low = torch.where(free, low, torch.ones(()))
        high = torch.minimum(high, torch.where(free, room, torch.ones(())))
    return low, high


def cross_layer(
    groups: Sequence[ScalingGroup], ends: Sequence[tuple[Tensor, Tensor]], tensors: Mapping[str, Tensor]
) -> list[Tensor]:
    """Cross-layer equalization's factors of all groups, in turns until they stand still.

    Args:
        groups: Which share weights: a depthwise convolution reads one and produces another.
        ends: Smallest and largest factor of each channel of each group.
        tensors: Every parameter by name.
    """
    now = {name: tensor.detach().float().clone() for name, tensor in tensors.items()}
    factors = [torch.ones(group.channels) for group in groups]
    for _ in range(_SWEEPS):
        moved = 0.0
        for place, (group, (low, high)) in enumerate(zip(groups, ends, strict=True)):
            read = ranges(group.consumers, now, group.channels)
            made = ranges(group.producers, now, group.channels)
            if read is None:
                continue
            ratio = read if made is None else (read / made.clamp(min=_TINY))
            # A channel of zeros on one side has no range to share.
            ratio = torch.where((read > _TINY) & (made is None or made > _TINY), ratio, torch.ones(()))
            wanted = factors[place] * (ratio if made is None else ratio.sqrt())
            step = torch.minimum(torch.maximum(wanted, low), high) / factors[place]
            for slot in group.slots:
                now[slot.parameter] *= spread(step, slot.index) ** slot.sign
            factors[place] = factors[place] * step
            moved = max(moved, float(step.log().abs().max()))
        if moved < 1e-3:
            break
    return factors
