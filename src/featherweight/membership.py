"""How well its loss tells whether a network was trained on an example: the AUC of a loss-threshold attack.

Yeom et al. 2018, Privacy Risk in Machine Learning (arXiv:1709.01604): an example is called a member of the
training set where its loss is below a threshold. Over all thresholds that is the area under the ROC curve:
the chance that of a member's loss and another's the member's is smaller. 0.5 tells nothing, 1 tells all.

Intervals, and that of the difference of two networks on the same examples: DeLong et al. 1988, Comparing the
Areas under Two or More Correlated Receiver Operating Characteristic Curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959963984540054  # of a 95 % interval
_FEWEST = 2  # of each kind, for a variance


@dataclass(frozen=True)
class Areas:
    """AUCs of several networks on the same examples.

    Attributes:
        values: One per network (M,).
        covariance: Of their estimates (M, M).
    """

    values: np.ndarray
    covariance: np.ndarray

    def interval(self, index: int) -> tuple[float, float]:
        """The 95 % interval of one."""
        half = _Z * float(np.sqrt(max(self.covariance[index, index], 0.0)))
        value = float(self.values[index])
        return max(0.0, value - half), min(1.0, value + half)

    def change(self, before: int, after: int) -> tuple[float, tuple[float, float]]:
        """After less before, and its 95 % interval."""
        ends, found = self.covariance[[before, after]][:, [before, after]], self.values
        half = _Z * float(np.sqrt(max(ends[0, 0] + ends[1, 1] - 2 * ends[0, 1], 0.0)))
        value = float(found[after] - found[before])
        return value, (value - half, value + half)


def attack_areas(members: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> Areas:
    """AUC of the loss-threshold attack on each network.

    Args:
        members: Of each network the losses of examples that it was trained on (N,), the same ones in order.
        others: Of each network the losses of examples that it was not trained on (K,), likewise.

    Raises:
        ValueError: There are fewer than two of either.
    """
    if min(len(members[0]), len(others[0])) < _FEWEST:
        raise ValueError(f"{len(members[0])} members and {len(others[0])} others are too few: 2 of each")
    # Of each member, the share of others with a larger loss; of each other, that of members with a smaller.
    above = np.stack([1 - _share_below(own, rest) for own, rest in zip(members, others, strict=True)])
    below = np.stack([_share_below(rest, own) for own, rest in zip(members, others, strict=True)])
    spread = np.atleast_2d(np.cov(above)) / above.shape[1] + np.atleast_2d(np.cov(below)) / below.shape[1]
    return Areas(above.mean(axis=1), spread)


def _share_below(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Of each value, the share of ``among`` that is smaller; of equal ones half."""
    ordered = np.sort(among)
    smaller = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return np.asarray(smaller / (2 * len(ordered)))
