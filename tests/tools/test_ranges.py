"""Ranges: a histogram of a stream against numpy, and the three rules against brute force."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.errors import DataError
from featherweight.formats import Binary, IntQuant, PerChannel, PerGroup, PerTensor, Ternary
from featherweight.tools.ranges import (
    Histogram,
    RangeRule,
    WeightRule,
    activation_range,
    weight_format,
    weight_range,
)

BINS = 4096
RULES = ("minmax", "moving_average", "percentile", "kl", "l1", "mse")
WEIGHT_RULES = ("minmax", "percentile", "l1", "mse", "gain")
floats = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
batches = st.lists(st.lists(floats, min_size=1, max_size=20), min_size=1, max_size=6)


def seen(*parts: Tensor) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.update(part, "x")
    return histogram


def grid(symmetric: bool = False, signed: bool = False, width: int = 8) -> IntQuant:
    return IntQuant(torch.tensor(-1.0), torch.tensor(1.0), width, symmetric, signed=signed)


def error(x: Tensor, fmt: IntQuant, low: float, high: float, power: int = 2) -> float:
    """Mean squared (or absolute) error of storing x over a range."""
    ranged = replace(fmt, low=torch.tensor(low), high=torch.tensor(high))
    return float((ranged.project(x) - x).double().abs().pow(power).mean())


class TestHistogram:
    @given(batches)
    @settings(max_examples=60)
    def test_holds_what_numpy_counts_over_its_bound(self, parts: list[list[float]]) -> None:
        tensors = [torch.tensor(part, dtype=torch.float32) for part in parts]
        histogram = seen(*tensors)
        everything = torch.cat(tensors).numpy()
        assert histogram.counts.sum() == everything.size
        assert histogram.low == everything.min()
        assert histogram.high == everything.max()
        if not histogram.bound:
            assert not everything.any()
            return
        assert np.log2(histogram.bound) % 1 == 0
        assert histogram.bound >= np.abs(everything).max() > histogram.bound / 2
        counts, edges = np.histogram(everything.astype(np.float64), BINS, (-histogram.bound, histogram.bound))
        # float32 may put a value that lies on an edge into either neighbour
        shift = np.abs(np.cumsum(histogram.counts.numpy()) - np.cumsum(counts))
        width = 2 * histogram.bound / BINS
        near = np.array([(np.abs(everything - edge) < width * 1e-2).sum() for edge in edges[1:]])
        assert (shift <= near).all()

    @given(batches, st.randoms(use_true_random=False))
    @settings(max_examples=30)
    def test_the_order_of_batches_does_not_matter(self, parts: list[list[float]], random: object) -> None:
        shuffled = list(parts)
        random.shuffle(shuffled)  # type: ignore[attr-defined]
        one, two = (seen(*map(torch.tensor, some)) for some in (parts, shuffled))
        assert (one.low, one.high, one.bound) == (two.low, two.high, two.bound)
        assert one.counts.sum() == two.counts.sum()
        assert (one.counts.cumsum(0) - two.counts.cumsum(0)).abs().max() <= 2

    def test_doubling_merges_pairs_around_zero(self) -> None:
        first = torch.linspace(-0.99, 0.99, 1000)
        grown = seen(first, torch.tensor([7.5]))
        assert grown.bound == 8.0
        at_once = seen(torch.cat([first, torch.tensor([7.5])]))
        assert torch.equal(grown.counts, at_once.counts)
        middle = grown.counts[BINS // 2 - BINS // 16 : BINS // 2 + BINS // 16]
        assert middle.sum() == 1000

    def test_zeros_before_the_first_value_are_not_lost(self) -> None:
        histogram = seen(torch.zeros(100), torch.tensor([1.0, -1.0]))
        assert histogram.counts.sum() == 102

    def test_memory_does_not_grow(self) -> None:
        histogram = seen(torch.randn(1000))
        size = histogram.counts.numel()
        for scale in range(1, 40):
            histogram.update(torch.randn(1000) * scale, "x")
        assert histogram.counts.numel() == size == BINS
        assert {type(value) for value in vars(histogram).values()} == {float, Tensor}

    def test_counts_beyond_float32(self) -> None:
        """2**24 is where adding one to a float32 stops."""
        count = 2**24 + 1000
        histogram = seen(torch.full((1,), 1.0).expand(count))
        assert histogram.counts.sum() == count

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_is_told(self, bad: float) -> None:
        with pytest.raises(DataError, match="'conv1#0:0' is NaN or infinite") as told:
            Histogram().update(torch.tensor([1.0, bad]), "conv1#0:0")
        assert told.value.fix is not None

    def test_tiny_and_huge_values(self) -> None:
        for value in (1e-30, 1e-10, 1e30):
            histogram = seen(torch.tensor([value, -value / 2]))
            assert histogram.counts.sum() == 2
        least = torch.finfo(torch.float32).min
        assert seen(torch.tensor([least, 0.0, 1.0])).counts.sum() == 3
        grown = seen(torch.tensor([1e-30]), torch.tensor([1e30]))
        assert grown.counts.sum() == 2

    @pytest.mark.parametrize("fraction", [0.9, 0.99, 0.999])
    def test_quantiles_are_numpys_within_a_bin(self, fraction: float) -> None:
        x = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * 3 + 1
        histogram = seen(*x.split(777))
        tail = (1 - fraction) / 2
        wanted = np.quantile(x.numpy(), [tail, 1 - tail])
        width = 2 * histogram.bound / BINS
        assert histogram.quantiles(fraction) == pytest.approx(wanted, abs=1.01 * width + 1e-3)


def divergence(kept: list[tuple[float, float]], fmt: IntQuant, low: float, high: float) -> float:
    inside = [(c, n) for c, n in kept if low <= c <= high]
    below = sum(n for c, n in kept if c < low)
    above = sum(n for c, n in kept if c > high)
    p = [n for _, n in inside]
    p[0] += below
    p[-1] += above
    ranged = replace(fmt, low=torch.tensor(low), high=torch.tensor(high))
    levels = ranged.quantize(torch.tensor([c for c, _ in inside], dtype=torch.float64)).tolist()
    q = []
    for level in levels:
        mine = [n for (_, n), other in zip(inside, levels, strict=True) if other == level]
        q.append(sum(mine) / len(mine))
    return sum(a / sum(p) * np.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))


class TestActivationRange:
    X = torch.cat([torch.randn(5000, generator=torch.Generator().manual_seed(1)), torch.tensor([9.0, -6.0])])

    def test_minmax_is_what_was_seen(self) -> None:
        low, high = activation_range(seen(self.X[:2500], self.X[2500:]), grid(), "minmax", 99)
        assert (low, high) == (-6.0, 9.0)

    def test_percentile_leaves_the_tails_out(self) -> None:
        low, high = activation_range(seen(self.X), grid(), "percentile", 99.0)
        wanted = np.quantile(self.X.numpy(), [0.005, 0.995])
        assert (low, high) == pytest.approx(tuple(wanted), abs=0.02)
        whole = activation_range(seen(self.X), grid(), "percentile", 100.0)
        assert whole == pytest.approx((-6.0, 9.0), abs=0.01)

    @pytest.mark.parametrize(("rule", "power"), [("mse", 2), ("l1", 1)])
    @pytest.mark.parametrize("width", [2, 3, 4, 8])
    def test_least_error_is_near_the_best_of_all_ranges(
        self, width: int, rule: RangeRule, power: int
    ) -> None:
        fmt = grid(width=width)
        low, high = activation_range(seen(self.X), fmt, rule, 99)
        fractions = np.linspace(0.04, 1, 49)
        best = min(error(self.X, fmt, -6.0 * a, 9.0 * b, power) for a in fractions for b in fractions)
        assert error(self.X, fmt, low, high, power) <= 1.1 * best
        assert error(self.X, fmt, low, high, power) <= error(self.X, fmt, -6.0, 9.0, power)

    def test_l1_and_mse_differ_where_tails_are_long(self) -> None:
        x = torch.distributions.StudentT(2.0).sample((20000,)).clamp(-300, 300)
        widths = [
            np.ptp(activation_range(seen(x), grid(width=4), rule, 99))
            for rule in ("l1", "mse")  # type: ignore[arg-type]
        ]
        assert widths[0] < widths[1]

    def test_a_moving_average_is_the_mean_at_first_and_forgets_later(self) -> None:
        histogram = Histogram(momentum=0.75)
        lows, highs = [], []
        wanted = None
        for index in range(1, 12):
            low, high = -float(index), float(index) ** 2
            histogram.update(torch.tensor([low, 0.0, high]), "x")
            lows.append(low)
            highs.append(high)
            if index <= 4:
                wanted = np.array([np.mean(lows), np.mean(highs)])
            else:
                wanted = 0.75 * wanted + 0.25 * np.array([low, high])  # type: ignore[operator]
            assert activation_range(histogram, grid(), "moving_average", 99) == pytest.approx(tuple(wanted))
        assert (histogram.low, histogram.high) == (-11.0, 121.0)

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("width", [4, 8])
    def test_kl_is_the_least_divergence_of_all_fractions(self, width: int, symmetric: bool) -> None:
        """Oracle: the divergence bin by bin, as its definition reads."""
        x = torch.cat([self.X * 0.2, torch.tensor([12.0])])
        histogram = seen(x)
        fmt = grid(symmetric=symmetric, signed=symmetric, width=width)
        low, high = activation_range(histogram, fmt, "kl", 99)
        full = (-12.0, 12.0) if symmetric else (float(x.min()), 12.0)
        counts = histogram.counts.tolist()
        middle = len(counts) // 2  # exact zeros cost nothing: their bin counts as its neighbours do
        counts[middle] = max(counts[middle - 1], counts[middle + 1])
        kept = [(c, n) for c, n in zip(histogram.centers.tolist(), counts, strict=True) if n]
        least = min(
            (divergence(kept, fmt, full[0] * f, full[1] * f), -f)
            for f in np.linspace(0.1 if width == 4 else 0.2, 1, 91 if width == 4 else 81)
        )
        assert divergence(kept, fmt, low if not symmetric else -high, high) == pytest.approx(
            least[0], rel=1e-3
        )
        assert high < 12.0

    def test_kl_does_not_clip_for_the_many_zeros_behind_relu(self) -> None:
        x = torch.cat([torch.zeros(50000), torch.rand(50000, generator=torch.Generator().manual_seed(0)) * 6])
        low, high = activation_range(seen(x), grid(), "kl", 99)
        assert low == 0
        assert high > 5.8

    @pytest.mark.parametrize("signed", [True, False])
    def test_least_squares_on_a_symmetric_grid_is_the_best_limit(self, signed: bool) -> None:
        fmt = grid(symmetric=True, signed=signed, width=4)
        low, high = activation_range(seen(self.X), fmt, "mse", 99)
        best = min(error(self.X, fmt, -limit, limit) for limit in np.linspace(0.5, 9, 200))
        assert error(self.X, fmt, low, high) <= 1.02 * best

    def test_behind_relu_it_begins_at_zero(self) -> None:
        low, high = activation_range(seen(self.X.relu()), grid(), "mse", 99)
        assert low == 0
        assert 2 < high <= 9

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
    def test_a_constant_is_kept(self, rule: RangeRule, value: float) -> None:
        x = torch.full((100,), value)
        low, high = activation_range(seen(x), grid(), rule, 99.9)
        assert np.isfinite([low, high]).all()
        assert error(x, grid(), low, high) < 1e-4

    @given(st.lists(floats, min_size=2, max_size=200), st.sampled_from(RULES))
    @settings(max_examples=60)
    def test_stays_inside_what_was_seen_and_makes_a_format(self, xs: list[float], rule: RangeRule) -> None:
        x = torch.tensor(xs, dtype=torch.float32)
        low, high = activation_range(seen(x), grid(), rule, 99.0)
        assert min(float(x.min()), 0) <= low <= high <= max(float(x.max()), 0)
        replace(grid(), low=torch.tensor(low), high=torch.tensor(high))


class TestWeightRange:
    W = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(2)) * torch.arange(1, 7).reshape(
        6, 1, 1, 1
    )

    @staticmethod
    def fmt(axis: int | None, symmetric: bool = True, width: int = 4) -> IntQuant:
        shape = () if axis is None else (1,)
        granularity = PerTensor() if axis is None else PerChannel(axis)
        return IntQuant(-torch.ones(shape), torch.ones(shape), width, symmetric, granularity, signed=True)

    @pytest.mark.parametrize("axis", [0, 1])
    def test_minmax(self, axis: int) -> None:
        low, high = weight_range(self.W, self.fmt(axis), "minmax", 99)
        rows = self.W.movedim(axis, 0).flatten(1)
        assert torch.equal(low, rows.amin(1))
        assert torch.equal(high, rows.amax(1))
        low, high = weight_range(self.W, self.fmt(None), "minmax", 99)
        assert (low, high) == (self.W.min(), self.W.max())
        assert low.shape == ()

    def test_percentile_is_numpys(self) -> None:
        low, high = weight_range(self.W, self.fmt(0), "percentile", 90.0)
        wanted = np.quantile(self.W.flatten(1).numpy(), [0.05, 0.95], axis=1)
        assert np.allclose(low, wanted[0], atol=1e-5)
        assert np.allclose(high, wanted[1], atol=1e-5)

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("axis", [None, 0, 1])
    @pytest.mark.parametrize(("rule", "power"), [("mse", 2), ("l1", 1)])
    def test_least_error_is_the_best_fraction_of_each_channel(
        self, axis: int | None, symmetric: bool, rule: WeightRule, power: int
    ) -> None:
        fmt = self.fmt(axis, symmetric)
        low, high = weight_range(self.W, fmt, rule, 99)
        rows = self.W.reshape(1, -1) if axis is None else self.W.movedim(axis, 0).flatten(1)
        one = replace(fmt, low=torch.tensor(-1.0), high=torch.tensor(1.0), granularity=PerTensor())
        for row, first, last in zip(rows, low.reshape(-1), high.reshape(-1), strict=True):
            ends = float(row.min()), float(row.max())
            fractions = np.linspace(0.1, 1.0, 91)
            best = min(error(row, one, ends[0] * f, ends[1] * f, power) for f in fractions)
            assert error(row, one, float(first), float(last), power) == pytest.approx(best, rel=1e-3)

    @pytest.mark.parametrize("rule", WEIGHT_RULES)
    def test_empty_and_constant_channels(self, rule: WeightRule) -> None:
        weight = torch.stack([torch.zeros(9), torch.full((9,), 0.5), torch.full((9,), -0.5), torch.randn(9)])
        fmt = self.fmt(0, width=8)
        low, high = weight_range(weight, fmt, rule, 99.9)
        projected = replace(fmt, low=low, high=high).project(weight)
        assert torch.allclose(projected[:3], weight[:3], atol=1e-3)
        assert (low <= 0).all()
        assert (high >= 0).all()

    def test_one_weight_a_channel(self) -> None:
        weight = torch.tensor([[0.1], [-0.2], [0.0]])
        for rule in WEIGHT_RULES:
            low, high = weight_range(weight, self.fmt(0, width=8), rule, 99.0)  # type: ignore[arg-type]
            assert torch.allclose(torch.maximum(-low, high), weight.abs().flatten())

    def test_percentile_of_a_large_tensor(self) -> None:
        """torch.quantile refuses more than 2**24 elements; a VGG head has 100 million."""
        weight = torch.linspace(-1, 1, 2**24 + 2).reshape(2, -1)
        low, high = weight_range(weight, self.fmt(None), "percentile", 98.0)
        assert (float(low), float(high)) == pytest.approx((-0.98, 0.98), abs=1e-3)

    @pytest.mark.parametrize("rule", WEIGHT_RULES)
    @pytest.mark.parametrize("shape", [(3, 0), (0, 3)])
    def test_no_weights_at_all(self, rule: WeightRule, shape: tuple[int, int]) -> None:
        weight = torch.zeros(shape)
        for granularity, wanted in (
            (PerChannel(0), shape[:1]),
            (PerGroup(1, 2), (shape[0], -(-shape[1] // 2))),
        ):
            one = torch.ones((1,) * len(wanted))
            low, high = weight_range(weight, IntQuant(-one, one, 4, True, granularity), rule, 99.0)
            assert low.shape == high.shape == wanted


class TestGain:
    """What is stored keeps the size of the weights, on top of the least error."""

    W = torch.randn(8, 9, generator=torch.Generator().manual_seed(3))

    @staticmethod
    def cost(row: Tensor, stored: Tensor) -> float:
        off, row = (stored - row).double(), row.double()
        return float(off @ off + 30 * (off @ row) ** 2 / (row @ row))

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("width", [2, 3, 4, 6])
    def test_integers_have_the_least_of_all_fractions(self, width: int, symmetric: bool) -> None:
        fmt = TestWeightRange.fmt(0, symmetric, width)
        low, high = weight_range(self.W, fmt, "gain", 99)
        one = replace(fmt, low=torch.tensor(-1.0), high=torch.tensor(1.0), granularity=PerTensor())
        for row, first, last in zip(self.W, low, high, strict=True):
            costs = []
            for fraction in np.linspace(0.05, 1.2, 116):
                ends = float(row.min()) * fraction, float(row.max()) * fraction
                ranged = replace(one, low=torch.tensor(ends[0]), high=torch.tensor(ends[1]))
                costs.append(self.cost(row, ranged.project(row)))
            made = replace(one, low=first, high=last).project(row)
            assert self.cost(row, made) <= min(costs) * 1.02 + 1e-6

    @pytest.mark.parametrize("kind", ["ternary", "binary"])
    def test_scales_have_the_least_of_all(self, kind: str) -> None:
        one = torch.ones(1)
        draft = Ternary(one, one / 2, PerChannel(0)) if kind == "ternary" else Binary(one, PerChannel(0))
        fmt = weight_format(self.W, draft, "gain", 99)
        for row, made in zip(self.W, fmt.project(self.W), strict=True):
            costs = []
            for scale in np.linspace(0.01, 4, 800):
                whole = torch.tensor(scale, dtype=torch.float32)
                other = (
                    Ternary(whole, whole / 2, PerTensor())
                    if kind == "ternary"
                    else Binary(whole, PerTensor())
                )
                costs.append(self.cost(row, other.project(row)))
            assert self.cost(row, made) <= min(costs) * 1.001

    def test_more_bits_lose_none_that_counts(self) -> None:
        fmt = TestWeightRange.fmt(0, True, 8)
        for one, two in zip(
            weight_range(self.W, fmt, "gain", 99), weight_range(self.W, fmt, "mse", 99), strict=True
        ):
            assert torch.equal(one, two)

    def test_it_loses_less_gain_than_least_squares(self) -> None:
        weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(4))
        fmt = TestWeightRange.fmt(0, True, 3)
        kept = []
        for rule in ("mse", "gain"):
            stored = weight_format(weight, fmt, rule, 99).project(weight)  # type: ignore[arg-type]
            kept.append(float((stored * weight).sum() / weight.square().sum()))
        assert kept[0] < 0.98 < 0.99 < kept[1] < 1.01
