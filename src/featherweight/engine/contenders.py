"""Which runtimes of a search may still win: pure functions of its trials.

Whatever is tried first is tried on each runtime; what follows would cost as many trials again for each, so
it is tried on the best. A runtime on which the original is so slow that no gain seen on any other one would
bring it near is left out before anything is made for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from featherweight.engine.verdict import excess, score, violations
from featherweight.outcome import Budget, Measurement, Preference, Trial

_MOST, _NEAR = 2, 1.15  # runtimes that go on after the first way, and how near to the best they are
_FAR = 4.0  # relative excess over the limits from which on a runtime is behind those that are nearer
_OUTPACED = 2.0  # a runtime's gain may be so many times the largest one seen elsewhere


def contenders(
    trials: Sequence[Trial],
    runtimes: Sequence[str],
    *,
    baseline: Measurement,
    budget: Budget,
    prefer: Preference,
    confident: bool,
) -> list[str]:
    """The runtimes that did best so far, best first; none while one was not heard of.

    Limits that are broken by a few times what they are do not decide: other ways may keep them.
    """
    if set(runtimes) - {trial.runtime for trial in trials}:
        return []
    best: dict[str, tuple[bool, tuple[float, ...]]] = {}
    for trial in trials:
        if trial.state != "measured" or trial.measurement is None:
            continue
        broken = sum(map(excess, violations(budget, trial.measurement, confident)))
        order = broken > _FAR, score(trial.measurement, prefer, baseline)
        best[trial.runtime] = min(best.get(trial.runtime, order), order)
    ranked = sorted(best, key=lambda name: best[name])[:_MOST]
    near = [name for name in ranked if best[name][1][0] <= _NEAR * best[ranked[0]][1][0]]
    return near or ranked


def outpaced(
    runtime: str, trials: Sequence[Trial], handicaps: Mapping[str, float], prefer: Preference
) -> str | None:
    """Why a runtime is not tried at all; None: it is, or it was.

    Args:
        runtime: Which one.
        trials: So far.
        handicaps: Runtime -> latency of the original on it, against the original on the first one.
        prefer: What is made small; where latency has no part in it, no runtime is too slow.
    """
    if prefer not in ("balanced", "latency") or any(trial.runtime == runtime for trial in trials):
        return None
    ratios = [
        (trial.measurement.latency_ratio, trial.runtime)
        for trial in trials
        if trial.measurement is not None and trial.measurement.latency_ratio is not None
    ]
    if not ratios:
        return None
    best = min(ratios)[0]
    gain = min(ratio / handicaps[name] for ratio, name in ratios)
    if handicaps[runtime] * gain <= _OUTPACED * best:
        return None
    return (
        f"the original takes too long on this runtime: {handicaps[runtime]:.1f} x as long as on "
        f"{next(iter(handicaps))}, where an artifact of {best:.2f} x was measured"
    )
