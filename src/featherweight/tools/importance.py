"""How much a network needs each channel of its groups: scores from weights and from what channels carry.

A channel is on several tensors (a filter, the norm behind it, the columns that read it). Each of these
members scores it; scores of one member are divided by their mean, since a member of many small weights would
else not count beside one of few large ones, and then averaged over the members. So the mean score of a group
is 1, and groups of different layers can stand in one list (compare the normalisers of Torch-Pruning, Fang et
al. 2023, arXiv:2301.12900)::

    score(c) = mean over members m of  s_m(c) / mean over c' of s_m(c')

with s_m the sum of absolute weights (``l1``; Li et al. 2016, arXiv:1608.08710), their norm (``l2``), the
scale of a norm (``batch_norm``; Liu et al. 2017, arXiv:1708.06519), or the mean square of the values
(``activation``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from featherweight.graph import Graph, trace
from featherweight.model import Model
from featherweight.tools.groups import ChannelGroup, Channels, Indices, Place
from featherweight.tools.simulate import Replay

Norm = Literal["l1", "l2"]
_MATRIX = 2  # axes of a weight


def magnitudes(model: Model, channels: Channels, norm: Norm) -> dict[str, Tensor]:
    """Scores (size,) of every group by the size of its weights; vectors count where there is nothing else."""
    tensors = model.parameters
    scores: dict[str, Tensor] = {}
    for name, group in channels.groups.items():
        members = [member for member in group.members if member.tensor in tensors]
        wide = [member for member in members if tensors[member.tensor].dim() >= _MATRIX] or members
        scores[name] = _mean(
            (_sizes(tensors[member.tensor].detach(), member.axis, member.indices, norm) for member in wide),
            group.size,
        )
    return scores


def norm_scales(model: Model, channels: Channels) -> dict[str, Tensor]:
    """Scores (size,) by the scales of the norms that channels go through; by ``l2`` where there is none."""
    scores = magnitudes(model, channels, "l2")
    tensors = model.parameters
    norms = _norm_weights(model)
    for name, group in channels.groups.items():
        own = [member for member in group.of("carries") if member.tensor in norms]
        if own:
            scores[name] = _mean(
                (
                    _sizes(tensors[member.tensor].detach(), member.axis, member.indices, "l1")
                    for member in own
                ),
                group.size,
            )
    return scores


def has_norms(model: Model, channels: Channels) -> bool:
    """Whether any group goes through a norm with a scale."""
    norms = _norm_weights(model)
    return any(member.tensor in norms for group in channels.groups.values() for member in group.of("carries"))


def activations(
    model: Model, channels: Channels, batches: Iterable[tuple[Tensor, ...]], entry: str = "forward"
) -> dict[str, Tensor]:
    """Scores (size,) by the mean square of what readers of a channel see; all examples count alike."""
    replay = Replay(model, entry)
    places = {name: seen_by_readers(group, replay.graph, entry) for name, group in channels.groups.items()}
    wanted: dict[str, set[int]] = {}
    for own in places.values():
        for place in own:
            wanted.setdefault(place.value, set()).add(place.axis)
    sums: dict[tuple[str, int], Tensor] = {}

    def observe(name: str, value: Tensor) -> Tensor:
        for axis in wanted.get(name, ()):
            rest = [one for one in range(value.dim()) if one != axis]
            square = value.detach().double().square()
            sums[name, axis] = sums.get((name, axis), torch.zeros(())) + (
                square.sum(rest) if rest else square
            )
        return value

    with torch.no_grad():
        for batch in batches:
            replay(batch, observe)
    return {
        name: _mean(
            (_gathered(sums[place.value, place.axis], place.indices) for place in own),
            channels.groups[name].size,
        )
        for name, own in places.items()
    }


def seen_by_readers(group: ChannelGroup, graph: Graph, entry: str) -> list[Place]:
    """The values with a group's channels that its readers read; else those that its writers make."""
    places = {place.value: place for place in group.places.get(entry, ())}
    reads = {member.tensor for member in group.of("reads")}
    writes = {member.tensor for member in group.of("writes")}
    nodes = list(graph)
    read = [name for node in nodes if reads & set(node.parameters.values()) for name in node.inputs]
    made = [name for node in nodes if writes & set(node.parameters.values()) for name in node.outputs]
    for names in (read, made, list(places)):
        found = [places[name] for name in dict.fromkeys(names) if name in places]
        if found:
            return found
    return []


def _sizes(tensor: Tensor, axis: int, indices: Indices, norm: Norm) -> Tensor:
    rows = tensor.double().movedim(axis, 0).flatten(1) if tensor.dim() > 1 else tensor.double()[:, None]
    if norm == "l1":
        return _gathered(rows.abs().sum(1), indices)
    return _gathered(rows.square().sum(1), indices).sqrt()


def _gathered(values: Tensor, indices: Indices) -> Tensor:
    """Sums over the indices of each channel."""
    flat = torch.tensor([index for own in indices for index in own])
    owner = torch.tensor([channel for channel, own in enumerate(indices) for _ in own])
    found = torch.zeros(len(indices), dtype=torch.float64)
    return found.index_add_(0, owner, values.double()[flat])


def _mean(scores: Iterable[Tensor], size: int) -> Tensor:
    """Each divided by its mean, then their mean; ones where nothing tells channels apart."""
    normed = [score / score.mean() for score in scores if float(score.mean()) > 0]
    return torch.stack(normed).mean(0) if normed else torch.ones(size, dtype=torch.float64)


def _norm_weights(model: Model) -> Mapping[str, str]:
    """Scales of norms -> the operator that reads them."""
    known = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
    return {
        node.parameters["weight"]: node.op
        for entry in model.entries
        for node in trace(model, entry)
        if node.op in known and "weight" in node.parameters
    }
