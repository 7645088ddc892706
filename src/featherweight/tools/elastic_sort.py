"""The channels of every group in order of importance, so that the first ones are what a subnet keeps.

A permutation p of a group's channels moves the indices of every axis that they are on: what channel p[k] had
is then at channel k. Where all of a group's members follow, the network computes what it did before. That is
not taken on trust: what the network makes of its example inputs must not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from featherweight.model import Model
from featherweight.tools.cutting import same_outputs
from featherweight.tools.groups import ChannelGroup, Channels

_CLOSE = 1e-4  # of the largest output: sums in another order differ by less


def sorted_channels(model: Model, channels: Channels, order: Mapping[str, Sequence[int]]) -> Model:
    """The same network with its channels in another order; values change, nothing else.

    Channels that hold different numbers of indices (of maps that are cut into unequal parts) are sorted among
    their own kind. A group whose order would change what the network computes stays as it was.

    Args:
        model: Untouched.
        channels: Its groups.
        order: Group -> its channels, the most important one first; groups left out stay as they are.

    Raises:
        ValueError: An order is no permutation of a group's channels.
    """
    moves = {name: _places(channels.groups[name], best) for name, best in order.items()}
    moves = {name: places for name, places in moves.items() if places != list(range(len(places)))}
    made = _moved(model, channels, moves)
    if same_outputs(made, model, _CLOSE):
        return made
    kept: dict[str, list[int]] = {}
    for name, places in moves.items():
        if same_outputs(_moved(model, channels, {**kept, name: places}), model, _CLOSE):
            kept[name] = places
    return _moved(model, channels, kept)


def _places(group: ChannelGroup, best: Sequence[int]) -> list[int]:
    """Which channel comes to each place: the best ones first among those that hold as many indices."""
    if sorted(best) != list(range(group.size)):
        raise ValueError(f"the order of '{group.name}' is no permutation of its {group.size} channels")
    kinds = [tuple(len(member.indices[c]) for member in group.members) for c in range(group.size)]
    waiting = {kind: [c for c in best if kinds[c] == kind] for kind in set(kinds)}
    return [waiting[kind].pop(0) for kind in kinds]


def _moved(model: Model, channels: Channels, moves: Mapping[str, Sequence[int]]) -> Model:
    module = model.copy_module()
    tensors: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, places in moves.items():
            for member in channels.groups[name].members:
                held = tensors.get(member.tensor)
                if held is None:  # a tensor that only the code knows; the outputs tell whether it matters
                    continue
                source = torch.arange(held.shape[member.axis])
                for place, channel in enumerate(places):
                    source[list(member.indices[place])] = torch.tensor(list(member.indices[channel]))
                held.copy_(held.index_select(member.axis, source.to(held.device)))
    return model.evolve(module=module)
