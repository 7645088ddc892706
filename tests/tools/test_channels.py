"""Channel groups: what goes together in every shape of network, and that nothing else has to."""

from __future__ import annotations

import pytest

import golden
import language_nets
from channel_oracle import check, random_drop
from featherweight.model import Model
from featherweight.tools.channels import channel_groups
from nets import CHANNEL_NETS, NETS


def net(name: str) -> Model:
    if name == "encoder":
        return language_nets.encoder()
    if name in NETS:
        return golden.model(name)
    module, example = CHANNEL_NETS[name]()
    return golden.model_of(module, example)


ALL = (*NETS, *CHANNEL_NETS, "encoder")


@pytest.mark.parametrize("name", ALL)
def test_random_channels_of_all_groups_go_and_every_value_has_the_shape_that_was_told(name: str) -> None:
    model = net(name)
    channels = channel_groups(model)
    assert channels.groups
    for seed in range(3):
        assert check(model, channels, random_drop(channels, seed)) > 0


@pytest.mark.parametrize("name", ALL)
def test_the_network_without_channels_computes_what_it_did_with_them_at_zero(name: str) -> None:
    model = net(name)
    channels = channel_groups(model)
    for group in channels.groups:
        drop = random_drop(channels, 1)[group] or [0]
        assert check(model, channels, {group: drop}) > 0
