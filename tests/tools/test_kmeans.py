"""K-means of numbers, held to scikit-learn, to all partitions, and to what k-means++ should draw."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from featherweight.tools.kmeans import Init, Points, kmeans, lloyd, start

INITS: tuple[Init, ...] = ("linear", "density", "kmeans++", "optimal")


def values(count: int = 2000, seed: int = 0) -> np.ndarray:
    """Like weights: a bell with heavy tails."""
    return np.random.default_rng(seed).standard_t(4, count)


def error(x: np.ndarray, centroids: np.ndarray, zero: bool = False) -> float:
    levels = np.append(centroids, 0.0) if zero else centroids
    return float(((x[:, None] - levels) ** 2).min(1).sum())


def least(x: np.ndarray, count: int, zero: bool) -> float:
    """The error of the best of all partitions into intervals, one of them about zero where zero is pinned."""
    x, best = np.sort(x), np.inf
    for cuts in combinations_with_replacement(range(len(x) + 1), count - 1 + zero):
        parts = [x[a:b] for a, b in pairwise((0, *cuts, len(x)))]
        own = [float(((part - part.mean()) ** 2).sum()) if len(part) else 0.0 for part in parts]
        best = min(best, sum(own)) if not zero else best
        for place, part in enumerate(parts) if zero else ():
            best = min(best, sum(own) - own[place] + float((part**2).sum()))
    return best


class TestOptimal:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(-20, 20), min_size=1, max_size=9), st.integers(1, 3), st.booleans())
    def test_is_the_best_of_all_partitions(self, numbers: list[int], count: int, zero: bool) -> None:
        x = np.array(numbers) / 4
        found = kmeans(x, count, init="optimal", zero=zero)
        rest = x[x != 0] if zero else x
        assert error(rest, found, zero) == pytest.approx(least(rest, count, zero), abs=1e-9)

    @pytest.mark.parametrize("count", [2, 5, 16, 64])
    @pytest.mark.parametrize("zero", [False, True])
    def test_is_never_worse_than_any_other(self, count: int, zero: bool) -> None:
        x = values()
        best = error(x, kmeans(x, count, init="optimal", zero=zero), zero)
        for init in INITS[:3]:
            for seed in range(3):
                assert best <= error(x, kmeans(x, count, init=init, zero=zero, seed=seed), zero) * (1 + 1e-9)

    def test_of_more_values_than_the_program_sees_is_still_the_best(self) -> None:
        x = values(60_000)
        for count in (4, 32):
            best = error(x, kmeans(x, count, init="optimal"))
            others = [error(x, kmeans(x, count, init="kmeans++", seed=seed)) for seed in range(3)]
            assert best <= min(others) * 1.001


class TestLloyd:
    @pytest.mark.parametrize("init", INITS[:3])
    @pytest.mark.parametrize("count", [3, 8, 32])
    def test_ends_where_scikit_learn_ends(self, init: Init, count: int) -> None:
        x = values()
        begun = start(Points.of(x), count, init=init, zero=False, seed=1)
        ours = lloyd(Points.of(x), begun, zero=False, iterations=300)
        theirs = KMeans(count, init=begun[:, None], n_init=1, max_iter=300, tol=0.0, algorithm="lloyd")
        theirs.fit(x[:, None])
        np.testing.assert_allclose(ours, np.sort(theirs.cluster_centers_[:, 0]), rtol=1e-3, atol=1e-4)
        assert error(x, ours) == pytest.approx(theirs.inertia_, rel=1e-4)

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 1000), st.integers(1, 20), st.booleans(), st.sampled_from(INITS))
    def test_iterations_never_do_harm(self, seed: int, count: int, zero: bool, init: Init) -> None:
        x = values(200, seed)
        errors = [
            error(x, kmeans(x, count, init=init, zero=zero, iterations=iterations, seed=seed), zero)
            for iterations in (0, 1, 5, 50)
        ]
        assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))

    def test_every_centroid_is_the_mean_of_its_values(self) -> None:
        x = values()
        found = kmeans(x, 12, init="density", iterations=1000)
        owner = np.abs(x[:, None] - found).argmin(1)
        for place, centroid in enumerate(found):
            assert centroid == pytest.approx(x[owner == place].mean(), abs=1e-3)

    def test_a_cluster_without_values_goes_where_the_error_is(self) -> None:
        x = np.concatenate([np.full(50, 0.0), np.full(50, 1.0), [100.0]])
        found = lloyd(Points.of(x), np.array([0.0, 0.1, 0.2]), zero=False, iterations=50)
        np.testing.assert_allclose(found, [0.0, 1.0, 100.0])


class TestStart:
    def test_linear_is_even_between_the_ends(self) -> None:
        found = start(Points.of(values()), 5, init="linear", zero=False)
        np.testing.assert_allclose(found, np.linspace(values().min(), values().max(), 5))

    def test_linear_leaves_out_the_place_of_zero(self) -> None:
        found = start(Points.of(np.linspace(-1, 1, 100)), 4, init="linear", zero=True)
        np.testing.assert_allclose(found, [-1, -0.5, 0.5, 1])

    def test_density_has_as_many_values_between_two(self) -> None:
        x = np.sort(values())
        found = start(Points.of(x), 8, init="density", zero=False)
        inside = np.diff(np.searchsorted(x, found))
        assert (np.abs(inside - len(x) / 8) <= 1).all()

    def test_kmeans_plus_plus_draws_by_squared_distance(self) -> None:
        x = np.array([0.0, 1.0, 3.0])
        counts = dict.fromkeys(((0.0, 1.0), (0.0, 3.0), (1.0, 3.0)), 0)
        draws = 3000
        for seed in range(draws):
            found = start(Points.of(x), 2, init="kmeans++", zero=False, seed=seed)
            counts[tuple(found.tolist())] += 1  # type: ignore[index]
        wanted = {  # first any of three, then by the squared distance to it
            (0.0, 1.0): (1 / 10 + 1 / 5) / 3,
            (0.0, 3.0): (9 / 10 + 9 / 13) / 3,
            (1.0, 3.0): (4 / 5 + 4 / 13) / 3,
        }
        assert sum(wanted.values()) == pytest.approx(1)
        for pair, share in wanted.items():
            assert counts[pair] / draws == pytest.approx(share, abs=4 * np.sqrt(share / draws))

    def test_kmeans_plus_plus_counts_a_pinned_zero(self) -> None:
        drawn = [
            start(Points.of(np.array([1.0, 3.0])), 1, init="kmeans++", zero=True, seed=s) for s in range(2000)
        ]
        assert np.mean([found[0] == 3.0 for found in drawn]) == pytest.approx(0.9, abs=0.03)


class TestEnds:
    @pytest.mark.parametrize("init", INITS)
    def test_fewer_values_than_centroids_are_the_values(self, init: Init) -> None:
        x = np.array([2.0, -1.0, 2.0, 0.0])
        np.testing.assert_array_equal(kmeans(x, 5, init=init), [-1.0, 0.0, 2.0])
        np.testing.assert_array_equal(kmeans(x, 5, init=init, zero=True), [-1.0, 2.0])

    @pytest.mark.parametrize("init", INITS)
    def test_zeros_have_no_say_where_zero_is_pinned(self, init: Init) -> None:
        x = values(300)
        padded = np.concatenate([x, np.zeros(5000)])
        one, two = (kmeans(some, 6, init=init, zero=True, seed=3) for some in (x, padded))
        np.testing.assert_array_equal(one, two)

    @pytest.mark.parametrize("init", INITS)
    def test_one_centroid_is_the_mean(self, init: Init) -> None:
        x = values(100)
        assert kmeans(x, 1, init=init) == pytest.approx([x.mean()])

    def test_is_the_same_every_time(self) -> None:
        x = values()
        for init in INITS:
            one, two = (kmeans(x, 10, init=init, seed=5) for _ in range(2))
            np.testing.assert_array_equal(one, two)
        drawn = [kmeans(x, 10, init="kmeans++", seed=seed, iterations=0) for seed in (1, 2)]
        assert not np.array_equal(*drawn)

    def test_values_far_from_zero_lose_nothing(self) -> None:
        x = np.concatenate([np.full(5, 1e6), np.full(5, 1e6 + 1e-3)])
        np.testing.assert_allclose(kmeans(x, 2, init="optimal"), [1e6, 1e6 + 1e-3], rtol=1e-12)
