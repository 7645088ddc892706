"""How labels pass operators, in networks and by themselves."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import golden
from channel_nets import MORE_NETS
from channel_oracle import check, random_drop
from featherweight.model import Model
from featherweight.tools.channel_labels import Labels
from featherweight.tools.channels import channel_groups
from featherweight.tools.cutting import cut
from nets import CHANNEL_NETS

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")
EXPECTED = {
    "selective": {"small": "12 channel", "squeeze": "6 channel"},
    "hierarchical": {"stem": "4 channel", "inner.2": "4 channel"},
    "rotary": {
        "table": "32 channel",
        "q:head": "2 head",
        "q:head_dim": "4 head_dim",
        "v:head_dim": "8 head_dim",
    },
    "linear_attention": {"embed": "16 channel", "qkv:head": "4 head", "qkv:head_dim": "4 head_dim"},
    "lines": {"conv": "8 channel", "lstm": "10 hidden"},
    "cells": {"first": "8 hidden", "second": "6 hidden"},
    "matrices": {"first": "12 channel", "second": "5 channel"},
    "pieces": {"three": "8 channel", "three:2": "3 channel", "gated": "6 channel", "conv": "4 channel"},
}


@cache
def net(name: str) -> Model:
    if name in CHANNEL_NETS:
        return golden.model_of(*CHANNEL_NETS[name]())
    kind, example = MORE_NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return golden.model_of(kind().eval(), example())


@pytest.mark.parametrize("name", MORE_NETS)
def test_the_groups_of_every_net(name: str) -> None:
    groups = channel_groups(net(name)).groups
    assert {key: f"{group.size} {group.kind}" for key, group in groups.items()} == EXPECTED[name]


@pytest.mark.parametrize("name", MORE_NETS)
def test_the_network_without_channels_computes_what_it_did_with_them_at_zero(name: str) -> None:
    model = net(name)
    channels = channel_groups(model)
    assert check(model, channels, random_drop(channels, 0)) > 0
    for group in channels.groups:
        assert check(model, channels, {group: random_drop(channels, 1)[group] or [0]}) > 0


@pytest.mark.parametrize("name", [*MORE_NETS, *CHANNEL_NETS])
def test_random_channels_can_be_cut(name: str) -> None:
    model = net(name)
    channels = channel_groups(model)
    made = cut(model, channels, {name: gone or [0] for name, gone in random_drop(channels, 1).items()})
    assert sum(p.numel() for p in made.module.parameters()) < sum(
        p.numel() for p in model.module.parameters()
    )


# ---- labels


def test_what_is_tied_is_one_and_what_is_fixed_is_gone() -> None:
    labels = Labels()
    one, other = labels.fresh(4), labels.fresh(4)
    labels.tie(one, other)
    assert np.array_equal(labels.today(one), labels.today(other))
    labels.fix(one[:2], "it must stay")
    assert labels.today(other)[:2].tolist() == [0, 0]
    assert labels.today(other)[2:].all()
    assert labels.reason(int(other[0])) == "it must stay"


def test_an_axis_that_is_taken_apart_and_joined_again_is_itself() -> None:
    labels = Labels()
    axis = labels.fresh(12)
    outer, inner = labels.split(axis, 3, 4)
    assert (len(outer), len(inner)) == (3, 4)
    joined = labels.join(outer, inner)
    assert [labels.atoms(one) for one in joined] == [labels.atoms(one) for one in axis]
    assert len({atom for label in axis for atom in labels.atoms(label)}) == 7


def test_two_ways_to_take_an_axis_apart_leave_what_both_can_lose() -> None:
    labels = Labels()
    axis = labels.fresh(12)
    labels.split(axis, 2, 6)
    outer, inner = labels.split(axis, 6, 2)
    for label in axis:  # an index goes when its row or column goes, in both grids
        assert labels.atoms(label)
    joined = labels.join(outer, inner)
    assert [set(labels.atoms(one)) for one in joined] == [set(labels.atoms(one)) for one in axis]


def test_rows_of_different_things_lose_the_same() -> None:
    labels = Labels()
    axis = np.concatenate([labels.fresh(4), labels.fresh(4)])
    outer, inner = labels.split(axis, 2, 4)
    assert not labels.today(outer).any()
    assert np.array_equal(labels.today(axis), np.tile(labels.today(inner), 2))


def test_a_row_with_something_fixed_stays_and_so_does_its_column() -> None:
    labels = Labels()
    axis = labels.fresh(6)
    labels.fix(axis[4:5], "one stays")
    outer, inner = labels.split(axis, 2, 3)
    assert labels.today(outer).tolist()[1] == 0
    assert labels.today(inner).tolist()[1] == 0
    assert labels.today(outer)[0] and labels.today(inner)[0]


def test_channels_times_positions_is_quick() -> None:
    labels = Labels()
    channels = labels.fresh(2048)
    flat = labels.join(channels, np.zeros(49, np.int64))
    again, positions = labels.split(flat, 2048, 49)
    assert np.array_equal(labels.today(again), labels.today(channels))
    assert not positions.any()
