"""Ranges by a robust error: never worse, better with outliers, and stored in the format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from featherweight.formats import IntQuant
from featherweight.granularity import Granularity, PerChannel, PerGroup, PerTensor
from featherweight.tools.hqq import robust_range
from featherweight.tools.ranges import weight_range

SHARED: dict[str, Granularity] = {
    "tensor": PerTensor(),
    "channel": PerChannel(0),
    "columns": PerChannel(1),
    "group": PerGroup(1, 8),
    "group0": PerGroup(0, 5),
}


def weight() -> Tensor:
    made = torch.Generator().manual_seed(0)
    w = torch.randn(12, 20, generator=made)
    w[torch.rand(12, 20, generator=made) < 0.02] *= 8
    return w


def start(w: Tensor, shared: Granularity, *, symmetric: bool, width: int) -> IntQuant:
    one = torch.ones((1,) * {PerTensor: 0, PerChannel: 1, PerGroup: 2}[type(shared)])
    draft = IntQuant(-one, one, width, symmetric, shared, signed=True)
    low, high = weight_range(w, draft, "minmax", 100.0)
    return IntQuant(low, high, width, symmetric, shared, signed=True)


def error(w: Tensor, fmt: IntQuant) -> float:
    return float((fmt.project(w) - w).abs().pow(0.7).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", sorted(SHARED))
def test_the_robust_error_falls(name: str, symmetric: bool) -> None:
    w = weight()
    before = start(w, SHARED[name], symmetric=symmetric, width=4)
    after = robust_range(w, before)
    assert after.low.shape == before.low.shape
    assert after.granularity == before.granularity
    assert error(w, after) < 0.985 * error(w, before)
    stored = after.project(w)
    assert torch.equal(after.project(stored), stored)


def test_a_range_that_is_best_already_stays() -> None:
    steps = torch.arange(-7, 8).float().repeat(4, 1)
    before = start(steps, PerChannel(0), symmetric=True, width=4)
    after = robust_range(steps, before)
    assert torch.equal(after.low, before.low)
    assert torch.equal(after.high, before.high)


def test_empty_channels_keep_a_scale() -> None:
    w = weight()
    w[3] = 0
    fmt = robust_range(w, start(w, PerChannel(0), symmetric=False, width=3))
    assert torch.isfinite(fmt.low).all()
    assert torch.equal(fmt.project(w)[3], torch.zeros(20))
