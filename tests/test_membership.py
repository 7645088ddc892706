"""The area of a loss-threshold attack against scikit-learn, and what its intervals hold."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from featherweight.membership import attack_areas


def losses(seed: int, members: int = 300, others: int = 200) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.exponential(1, members), random.exponential(1.3, others)


class TestAttack:
    @pytest.mark.parametrize("seed", range(4))
    def test_the_area_is_scikit_learns(self, seed: int) -> None:
        inside, outside = losses(seed)
        inside, outside = inside.round(1), outside.round(1)  # many are equal
        wanted = roc_auc_score(np.r_[np.ones(300), np.zeros(200)], -np.r_[inside, outside])
        assert attack_areas([inside], [outside]).values[0] == pytest.approx(wanted)

    def test_perfect_and_useless(self) -> None:
        low, high = np.linspace(0, 1, 50), np.linspace(2, 3, 50)
        areas = attack_areas([low], [high])
        assert areas.values[0] == 1
        assert areas.interval(0) == (1.0, 1.0)
        assert attack_areas([low], [low]).values[0] == pytest.approx(0.5)

    def test_the_interval_holds_the_truth_as_often_as_it_says(self) -> None:
        """A member's loss is smaller with the chance 1.3 / 2.3 for these exponentials."""
        truth, held = 1.3 / 2.3, 0
        for seed in range(300):
            low, high = attack_areas(*([one] for one in losses(seed))).interval(0)
            held += low <= truth <= high
        assert 0.92 <= held / 300 <= 0.98

    def test_the_interval_of_the_change_knows_that_examples_are_the_same(self) -> None:
        inside, outside = losses(0)
        random = np.random.default_rng(1)
        near = [one + 0.01 * random.standard_normal(len(one)) for one in (inside, outside)]
        areas = attack_areas([inside, near[0]], [outside, near[1]])
        change, (low, high) = areas.change(0, 1)
        assert low <= change <= high
        own = areas.interval(0)
        assert high - low < 0.2 * (own[1] - own[0])
        assert areas.change(0, 0) == (0.0, (0.0, 0.0))

    def test_one_example_is_too_few(self) -> None:
        with pytest.raises(ValueError, match="too few"):
            attack_areas([np.array([0.1])], [np.array([0.1, 0.2])])
