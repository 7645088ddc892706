"""Calibration errors by hand and against torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from featherweight.calibration_error import (
    adaptive_calibration_error,
    are_probabilities,
    expected_calibration_error,
    log_probabilities,
)


def scores(count: int = 800, classes: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    logits = 1.5 * random.standard_normal((count, classes)) + 2.0 * np.eye(classes)[labels]
    return logits.astype(np.float32), labels


class TestCalibrationError:
    def test_by_hand(self) -> None:
        """Two of 15 bins hold something: 4 examples at 0.95, 2 of them right, and 1 at 0.55, which is."""
        confidence, right = np.array([0.95, 0.95, 0.95, 0.95, 0.55]), np.array([1, 1, 0, 0, 1])
        wanted = 4 / 5 * abs(0.5 - 0.95) + 1 / 5 * abs(1 - 0.55)
        assert expected_calibration_error(confidence, right) == pytest.approx(wanted)

    def test_of_what_is_always_sure_and_right_is_nothing(self) -> None:
        sure = np.ones(9)
        assert expected_calibration_error(sure, sure) == 0
        assert adaptive_calibration_error(sure, sure) == 0
        assert expected_calibration_error(sure, np.zeros(9)) == 1

    @pytest.mark.parametrize("bins", [5, 15])
    @pytest.mark.parametrize("seed", range(4))
    def test_is_that_of_torchmetrics(self, bins: int, seed: int) -> None:
        logits, labels = scores(seed=seed)
        probabilities = np.exp(log_probabilities(logits, probabilities=False))
        wanted = multiclass_calibration_error(
            torch.from_numpy(probabilities), torch.from_numpy(labels), num_classes=7, n_bins=bins, norm="l1"
        )
        right = probabilities.argmax(axis=1) == labels
        assert expected_calibration_error(probabilities.max(axis=1), right, bins) == pytest.approx(
            float(wanted), abs=1e-6
        )

    def test_adaptive_bins_hold_equally_many(self) -> None:
        confidence, right = np.array([0.1, 0.2, 0.6, 0.9]), np.array([0, 1, 1, 0])
        wanted = (abs(0.5 - 0.15) * 2 + abs(0.5 - 0.75) * 2) / 4
        assert adaptive_calibration_error(confidence[::-1], right[::-1], 2) == pytest.approx(wanted)


class TestProbabilities:
    def test_scores_go_through_a_softmax_and_probabilities_do_not(self) -> None:
        logits, _ = scores()
        wanted = torch.log_softmax(torch.from_numpy(logits).double(), dim=1).numpy()
        assert np.allclose(log_probabilities(logits, probabilities=False), wanted)
        soft = np.exp(wanted).astype(np.float32)
        assert not are_probabilities(logits)
        assert are_probabilities(soft)
        assert np.allclose(log_probabilities(soft, probabilities=True), wanted, atol=1e-4)
        assert np.allclose(log_probabilities(wanted, probabilities=False), wanted)  # logarithms stay

    def test_a_probability_of_nothing_has_a_finite_logarithm(self) -> None:
        assert np.isfinite(log_probabilities(np.array([[1.0, 0.0]]), probabilities=True)).all()

    def test_large_scores_do_not_overflow(self) -> None:
        assert np.isfinite(log_probabilities(np.array([[9e4, -9e4]]), probabilities=False)).all()
