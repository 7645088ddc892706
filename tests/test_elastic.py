"""Spaces of subnets: what they hold, how they are sampled, and the way to JSON and back."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

import golden
from featherweight.elastic import Openness, Space, Subnet, mark, space_of_supernet
from featherweight.model import decode_edit, encode_edit, make_edit

SPACE = Space(
    widths={f"group{i}": (8, 16, 24, 32) for i in range(12)},
    depths={"stage1": ("stage1.2", "stage1.1"), "stage2": ("stage2.1",)},
    kernels={"conv": (3, 5, 7)},
    inputs=(0.5, 0.75, 1.0),
)


def test_json_and_back() -> None:
    assert Space.from_json(json.loads(json.dumps(SPACE.to_json()))) == SPACE
    subnet = SPACE.sample(random.Random(1))
    assert Subnet.from_json(json.loads(json.dumps(subnet.to_json()))) == subnet
    assert subnet.key == Subnet.from_json(json.loads(subnet.key)).key


def test_ends() -> None:
    largest, smallest = SPACE.largest(), SPACE.smallest()
    assert largest == Subnet(dict.fromkeys(SPACE.widths, 32), {"stage1": 0, "stage2": 0}, {"conv": 7}, 1.0)
    assert smallest == Subnet(dict.fromkeys(SPACE.widths, 8), {"stage1": 2, "stage2": 1}, {"conv": 3}, 0.5)
    assert SPACE.count == 4**12 * 3 * 2 * 3 * 3
    assert not SPACE.is_trivial
    assert Space().is_trivial
    assert Space(widths={"one": (4,)}).is_trivial
    assert Space().largest() == Subnet()


def test_options_and_back() -> None:
    for seed in range(20):
        subnet = SPACE.sample(random.Random(seed))
        assert SPACE.contains(subnet)
        assert SPACE.chosen(SPACE.options(subnet)) == subnet


def test_samples_spread_over_all_costs() -> None:
    rng = np.random.default_rng(0)
    means = [np.mean(list(SPACE.sample(rng).widths.values())) for _ in range(400)]
    counts, _ = np.histogram(means, bins=4, range=(8, 32))
    assert min(counts) > 40, counts  # independent draws: the outer two would have next to none


def test_samples_mix_kinds() -> None:
    rng = random.Random(0)
    drawn = [SPACE.sample(rng) for _ in range(400)]
    wide_and_shallow = sum(
        np.mean(list(one.widths.values())) > 20 and sum(one.depths.values()) > 1 for one in drawn
    )
    assert wide_and_shallow > 20
    assert {one.input for one in drawn} == {0.5, 0.75, 1.0}
    assert {one.kernels["conv"] for one in drawn} == {3, 5, 7}


def test_what_is_not_open_is_whole() -> None:
    rng = random.Random(0)
    shut = Openness(widths=0, depths=0, kernels=0, inputs=0)
    assert SPACE.sample(rng, shut) == SPACE.largest() == SPACE.smallest(shut)
    half = Openness(widths=1 / 3, depths=0.5, kernels=0, inputs=0)
    smallest = SPACE.smallest(half)
    assert set(smallest.widths.values()) == {24}
    assert smallest.depths == {"stage1": 1, "stage2": 1}
    assert (smallest.kernels, smallest.input) == ({"conv": 7}, 1.0)
    drawn = [SPACE.sample(rng, half) for _ in range(50)]
    assert {width for one in drawn for width in one.widths.values()} == {24, 32}


@pytest.mark.parametrize(
    ("subnet", "why"),
    [
        (Subnet({"group0": 9}), "'group0' can have 8, 16, 24, 32, not 9"),
        (Subnet({"group": 8}), "no elastic group 'group'"),
        (Subnet(depths={"stage1": 3}), "'stage1' can lose 0 to 2 blocks, not 3"),
        (Subnet(depths={"stage": 1}), "no elastic stage 'stage'"),
        (Subnet(kernels={"conv": 1}), "'conv' can have 3, 5, 7, not 1"),
        (Subnet(input=0.3), "input can be 0.5, 0.75, 1.0, not 0.3"),
    ],
)
def test_what_there_is_not(subnet: Subnet, why: str) -> None:
    assert not SPACE.contains(subnet)
    assert why in next(SPACE.misfits(subnet))


def test_a_space_travels_with_its_supernet() -> None:
    model = golden.model("residual")
    assert space_of_supernet(model) is None
    edit = decode_edit(json.loads(json.dumps(encode_edit(mark(SPACE)))))
    supernet = model.evolve(module=make_edit(model.copy_module(), edit), edits=(edit,))
    assert space_of_supernet(supernet) == SPACE
    assert supernet.module.elastic == SPACE.to_json()
    assert space_of_supernet(supernet.evolve(edits=(mark(None),))) is None
