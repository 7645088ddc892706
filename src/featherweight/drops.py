"""How much worse a score became, and how sure that is: drops and their paired bootstrap.

Efron and Tibshirani 1993, An Introduction to the Bootstrap; Poisson weights instead of draws with
replacement: Hanley and MacGibbon 2006.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from featherweight.metrics import Metric

_CHUNK = 1 << 22  # weights that are held at once
_DIGITS = 12  # 1 - 0.99 is 0.01, which a limit of 1 % admits; in binary it is a little more


def drop(metric: Metric, baseline: float, value: float) -> float:
    """How much worse ``value`` is: positive is worse.

    Absolute for a bounded metric (0.5 points of accuracy are 0.005), else a fraction of the baseline.
    """
    return float(_drops(metric, np.asarray(baseline, np.float64), np.asarray(value, np.float64)))


def drop_of_rows(metric: Metric, rows_before: np.ndarray, rows_after: np.ndarray) -> float:
    """How much worse the second rows are; of several tasks' rows, that of the task that loses most."""
    pairs = zip(metric.parts(rows_before), metric.parts(rows_after), strict=True)
    of_tasks = [drop_of_rows(own, before, after) for (own, before), (_, after) in pairs]
    return max(of_tasks) if of_tasks else drop(metric, metric.reduce(rows_before), metric.reduce(rows_after))


def examples_needed(
    drop: float | None, interval: tuple[float, float] | None, limit: float | None, examples: int
) -> int | None:
    """Examples from which on the interval would leave the limit out, if the drop stayed as it is.

    The interval's width falls with the square root of the number of examples.

    Args:
        drop: Seen on so many examples.
        interval: Its 95 % interval.
        limit: Of the drop.
        examples: How many were scored.

    Returns:
        None where the interval leaves the limit out already, where no number would do since the drop is the
        limit itself, and where one of them is not known.
    """
    if drop is None or interval is None or limit is None or not examples:
        return None
    low, high = interval
    gap = limit - drop
    if gap == 0 or not low <= limit < high or not all(map(math.isfinite, (low, high, gap))):
        return None
    end = high if gap > 0 else low
    return math.ceil(examples * ((end - drop) / gap) ** 2)


def paired_bootstrap(
    metric: Metric, rows_before: np.ndarray, rows_after: np.ndarray, seed: int, resamples: int = 1000
) -> tuple[float, float]:
    """The 95 % percentile interval of the drop, both sides resampled with the same examples.

    An additive metric weighs the examples with Poisson(1) counts. f1 and pearson, which must
    reduce every resample anew, take at most 200 resamples with replacement.

    Args:
        metric: What reduces rows.
        rows_before: The original's rows (N, k).
        rows_after: The artifact's rows for the same examples, in the same order.
        seed: Of the resampling.
        resamples: How many.

    Returns:
        The lower and upper end, positive is worse. Of several tasks: of the drop of the one that loses most
        in each resample.
    """
    if rows_before.shape != rows_after.shape or not len(rows_before):
        raise ValueError(f"rows of the same examples are needed: {rows_before.shape} and {rows_after.shape}")
    drops = _resampled(metric, rows_before, rows_after, seed, resamples)
    low, high = np.quantile(drops, [0.025, 0.975], method="inverted_cdf")  # never between inf and inf
    pairs = list(zip(metric.parts(rows_before), metric.parts(rows_after), strict=True))
    if not pairs:
        return _with_unseen(metric, rows_before, rows_after, float(low), float(high))
    each = [paired_bootstrap(own, before, after, seed, resamples) for (own, before), (_, after) in pairs]
    return max(one for one, _ in each), max(float(high), *(one for _, one in each))


def _resampled(
    metric: Metric, before: np.ndarray, after: np.ndarray, seed: int, resamples: int
) -> np.ndarray:
    """Drops of resamples, both sides with the same examples; of tasks the largest of each resample."""
    pairs = list(zip(metric.parts(before), metric.parts(after), strict=True))
    if pairs:  # one seed draws the same examples for all
        each = [_resampled(own, one, other, seed, resamples) for (own, one), (_, other) in pairs]
        count = min(map(len, each))
        return np.max([drops[:count] for drops in each], axis=0)  # type: ignore[no-any-return]
    rng = np.random.default_rng(seed)
    if metric.additive:
        one, other = _additive_scores(metric, before, after, rng, resamples)
    else:
        picks = rng.integers(0, len(before), (min(resamples, 200), len(before)))
        one = np.array([metric.reduce(before[pick]) for pick in picks])
        other = np.array([metric.reduce(after[pick]) for pick in picks])
    return _drops(metric, one, other)


def _with_unseen(
    metric: Metric, before: np.ndarray, after: np.ndarray, low: float, high: float
) -> tuple[float, float]:
    """The interval, widened by what no example showed where each one is right or wrong.

    No resample holds what was never seen. An outcome that none of N examples has is, with 97.5 % confidence,
    no more probable than 1 - 0.025^(1/N) (Clopper and Pearson 1934).
    """
    both = np.concatenate([before, after], axis=1)
    if not metric.bounded or both.shape[1] != 2 or not np.isin(both, (0, 1)).all():
        return low, high
    change = (after - before)[:, 0] * (1 if metric.higher_is_better else -1)
    lost, won = float((change < 0).mean()), float((change > 0).mean())
    unseen = 1 - 0.025 ** (1 / len(both))
    if not lost:
        high = max(high, unseen - won)
    if not won:
        low = min(low, lost - unseen)
    return low, high


def _additive_scores(
    metric: Metric, before: np.ndarray, after: np.ndarray, rng: np.random.Generator, resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of Poisson-weighted resamples, before and after."""
    table = _poisson_table()
    both = np.concatenate([before, after], axis=1)
    infinite = ~np.isfinite(both)
    values = np.where(infinite, 0.0, both)
    scale = np.abs(values).max(axis=0) + np.finfo(np.float64).tiny  # keeps float32 sums away from overflow
    columns = np.concatenate([values / scale, infinite, np.ones((len(both), 1))], axis=1).astype(np.float32)
    step = max(1, _CHUNK // len(both))
    sums = np.concatenate(
        [
            table[rng.integers(0, len(table), (min(step, resamples - i), len(both)), np.uint16)] @ columns
            for i in range(0, resamples, step)
        ]
    ).astype(np.float64)
    sums = sums[sums[:, -1] > 0]  # a resample of very few examples may be empty
    width = both.shape[1]
    means = sums[:, :width] * scale / sums[:, -1:]
    means[sums[:, width : 2 * width] > 0] = np.inf
    return metric.of_means(means[:, : before.shape[1]]), metric.of_means(means[:, before.shape[1] :])


def _poisson_table() -> np.ndarray:
    """Counts with Poisson(1) shares over 65,535 equal chances: a draw is one look-up."""
    count = np.arange(12)
    shares = np.cumsum(np.exp(-1.0) / np.concatenate([[1.0], np.cumprod(count[1:], dtype=np.float64)]))
    chances = (np.arange(65535) + 0.5) / 65535
    return np.searchsorted(shares, chances).astype(np.float32)


def _drops(metric: Metric, baseline: np.ndarray, value: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        lost = baseline - value if metric.higher_is_better else value - baseline
        if not metric.bounded:
            lost = np.where(lost == 0, 0.0, lost / np.abs(baseline))
    return np.asarray(np.round(lost, _DIGITS))
