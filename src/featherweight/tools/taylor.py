"""What a network loses without a channel, foretold from gradients.

Without a channel, everything that reads it sees zero: the weights theta_c that read it might as well be zero
(where something without weights reads it, those that write it). To first order a loss L changes by the sum
of gradient times weight, over all tensors of the channel together (Molchanov et al. 2019, arXiv:1906.10771)::

    score(c) = mean over batches of ( sum over theta of c of  dL/dtheta * theta )²

Without labels L has no gradient at the network itself. Then the change of the outputs y counts, with random
signs v (Hutchinson 1990), which is the Gauss-Newton form of the squared error of the outputs::

    score(c) = E_v ( sum over theta of c of  d(v'y)/dtheta * theta )² / E |y|²

It is a noise-to-signal ratio of the outputs, so channels of different groups compare as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from featherweight.model import Model
from featherweight.tools.groups import ChannelGroup, Channels, Member
from featherweight.tools.simulate import Replay

Loss = Callable[[tuple[Tensor, ...], Tensor], Tensor]


def deciding(group: ChannelGroup) -> tuple[Member, ...]:
    """The members without which the rest of the network does not see a channel."""
    if group.kind == "head_dim" or not group.of("reads"):
        return group.of("writes") or group.members
    return group.of("reads")


def output_changes(
    model: Model,
    channels: Channels,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    draws: int = 4,
    seed: int = 0,
    entry: str = "forward",
) -> dict[str, Tensor]:
    """The share (size,) of the outputs' energy that each channel of each group makes, without labels.

    Args:
        model: As it is.
        channels: Its groups.
        batches: Flat inputs.
        draws: Random signs for each batch; more of them vary less.
        seed: Of the signs.
        entry: Which way of calling the module.
    """
    signs = torch.Generator().manual_seed(seed)
    run = _Gradients(model, channels, entry)
    signal = 0.0
    for batch in batches:
        with torch.enable_grad():
            outputs = [y for y in run.replay(batch) if y.is_floating_point()]
            signal += sum(float(y.detach().double().square().sum()) for y in outputs)
            for draw in range(draws):
                weighed = torch.stack([(y * _signs(y, signs)).sum() for y in outputs]).sum()
                run.add(weighed, last=draw == draws - 1)
    return {name: total / (draws * max(signal, 1e-30)) for name, total in run.totals.items()}


def loss_changes(
    model: Model,
    channels: Channels,
    batches: Iterable[tuple[tuple[Tensor, ...], Tensor]],
    loss: Loss,
    *,
    entry: str = "forward",
) -> dict[str, Tensor]:
    """Squared first-order change (size,) of a loss without each channel of each group, mean over batches.

    Args:
        model: As it is.
        channels: Its groups.
        batches: Flat inputs and targets.
        loss: Outputs and targets to a scalar.
        entry: Which way of calling the module.
    """
    run = _Gradients(model, channels, entry)
    count = 0
    for batch, targets in batches:
        with torch.enable_grad():
            run.add(loss(run.replay(batch), targets), last=True)
        count += 1
    return {name: total / max(count, 1) for name, total in run.totals.items()}


class _Gradients:
    """Sums the squared products of gradients and weights of channels."""

    def __init__(self, model: Model, channels: Channels, entry: str) -> None:
        self._members: Mapping[str, Sequence[Member]] = {
            name: [member for member in deciding(group) if member.tensor in model.parameters]
            for name, group in channels.groups.items()
        }
        wanted = {member.tensor for own in self._members.values() for member in own}
        self._leaves = {
            name: tensor.detach().clone().requires_grad_()
            for name, tensor in model.parameters.items()
            if name in wanted
        }
        self.replay = Replay(model, entry, self._leaves)
        self.totals = {
            name: torch.zeros(group.size, dtype=torch.float64) for name, group in channels.groups.items()
        }

    def add(self, scalar: Tensor, last: bool) -> None:
        """Add the squared change of a scalar without each channel."""
        if not self._leaves or not scalar.requires_grad:
            return
        found = torch.autograd.grad(
            scalar, list(self._leaves.values()), retain_graph=not last, allow_unused=True
        )
        slopes = {name: slope for name, slope in zip(self._leaves, found, strict=True) if slope is not None}
        products = {
            name: slope.double() * self._leaves[name].detach().double() for name, slope in slopes.items()
        }
        for name, members in self._members.items():
            change = torch.zeros_like(self.totals[name])
            for member in members:
                if member.tensor in products:
                    change += _by_channel(products[member.tensor], member)
            self.totals[name] += change.square()


def _by_channel(product: Tensor, member: Member) -> Tensor:
    rows = product.movedim(member.axis, 0).flatten(1).sum(1) if product.dim() > 1 else product
    flat = torch.tensor([index for own in member.indices for index in own])
    owner = torch.tensor([channel for channel, own in enumerate(member.indices) for _ in own])
    return torch.zeros(len(member.indices), dtype=torch.float64).index_add_(0, owner, rows[flat])


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).to(like.dtype) * 2 - 1
