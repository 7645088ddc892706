"""Sorted channels: another order of values, and the same network."""

from __future__ import annotations

import random

import pytest
import torch

import elastic_nets
import golden
from featherweight.tools.channels import channel_groups
from featherweight.tools.cutting import cut, cuttable, why_not
from featherweight.tools.elastic_sort import sorted_channels


def _shuffled(size: int, seed: int) -> list[int]:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return order


@pytest.mark.parametrize("name", elastic_nets.ALL)
@pytest.mark.parametrize("seed", range(2))
def test_any_order_computes_the_same(name: str, seed: int) -> None:
    model = elastic_nets.model(name)
    channels = cuttable(model, channel_groups(model))
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    order = {key: _shuffled(group.size, seed) for key, group in channels.groups.items()}
    done = sorted_channels(model, channels, order)
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())
    assert done.edits == model.edits
    x = tuple(torch.cat([one, one.flip(0)]) for one in elastic_nets.inputs(model))
    for one, other in zip(elastic_nets.outputs(done, *x), elastic_nets.outputs(model, *x), strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", elastic_nets.ALL)
def test_most_groups_follow(name: str) -> None:
    """Cutting the channels that came last is cutting those that the order put there."""
    model = elastic_nets.model(name)
    channels = cuttable(model, channel_groups(model))
    moved = []
    for key, group in channels.groups.items():
        kinds = [tuple(len(member.indices[c]) for member in group.members) for c in range(group.size)]
        if len(set(kinds)) > 1:
            continue
        order = _shuffled(group.size, 3)
        done = sorted_channels(model, channels, {key: order})
        changed = {
            name
            for name, tensor in done.module.state_dict().items()
            if not torch.equal(tensor, model.module.state_dict()[name])
        }
        if not changed:
            continue
        moved.append(key)
        width = max(1, group.size // 2)
        drop = {key: order[width:]}
        if why_not(model, channels, drop) is not None:  # e.g. groups of a convolution lose as many each
            continue
        wanted = cut(model, channels, drop)
        x = elastic_nets.inputs(model)
        found = cut(done, channels, {key: range(width, group.size)})
        for one, other in zip(elastic_nets.outputs(found, *x), elastic_nets.outputs(wanted, *x), strict=True):
            assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)
    assert moved


def test_an_order_is_a_permutation() -> None:
    model = golden.model("residual")
    channels = channel_groups(model)
    with pytest.raises(ValueError, match=r"order of 'layer1.conv1' is no permutation of its 8 channels"):
        sorted_channels(model, channels, {"layer1.conv1": [0, 0, 1, 2, 3, 4, 5, 6]})
