"""Whether a network is as often right as it says: class probabilities and their calibration error.

Guo et al. 2017, On Calibration of Modern Neural Networks (arXiv:1706.04599)::

    ECE = sum over bins b of  n_b / n * |share right in b - mean confidence in b|

over 15 bins of equal width, of the probability of the top class. With equally many examples in each bin it is
the adaptive error (Nguyen and O'Connor 2015, arXiv:1508.05154).
"""

from __future__ import annotations

import numpy as np

BINS = 15
_SUM = 1e-3  # by which probabilities of float networks may miss 1
_LEAST = 1e-12  # the smallest probability whose logarithm is taken


def are_probabilities(outputs: np.ndarray) -> bool:
    """Whether class scores (N, C) are probabilities already: none negative, and their sum is 1."""
    sums = np.asarray(outputs, np.float64).sum(axis=1)
    return bool((outputs >= 0).all() and (np.abs(sums - 1) <= _SUM).all())


def log_probabilities(outputs: np.ndarray, probabilities: bool) -> np.ndarray:
    """Logarithms of class probabilities (N, C), float64.

    Args:
        outputs: Class scores (N, C), finite.
        probabilities: They are probabilities, which a softmax would flatten; their sum is made 1.
    """
    values = np.asarray(outputs, np.float64)
    if probabilities:
        kept = np.maximum(values, _LEAST)
        return np.asarray(np.log(kept / kept.sum(axis=1, keepdims=True)))
    shifted = values - values.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Mean distance of confidence and share right over bins of equal width, weighted by their examples.

    Args:
        confidence: Probability of the predicted class (N,), in 0..1; a bin holds its upper end.
        right: Whether that class is the label (N,).
        bins: How many.
    """
    places = np.clip(np.ceil(np.asarray(confidence, np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.asarray(right, np.float64) - confidence
    return float(np.abs(np.bincount(places, gaps, bins)).sum() / len(gaps))


def adaptive_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """The same over bins of equally many examples, in the order of their confidence."""
    order = np.argsort(confidence, kind="stable")
    gaps = (np.asarray(right, np.float64) - confidence)[order]
    return float(sum(abs(part.sum()) for part in np.array_split(gaps, bins)) / len(gaps))
