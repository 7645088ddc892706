"""What was tried and not chosen, in groups by way and reason: a pure function of the trials."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from featherweight.engine.verdict import UNMEASURED, UNRESOLVED, excess, figure, score, violations
from featherweight.outcome import Axis, Budget, Dropped, Measurement, Preference, Trial, Violation

BEHIND = "keeps every limit, and another one is better"
UNCONFIRMED = "not confirmed by the examples that report"

_NAMES: Mapping[Axis, str] = {
    "quality_drop": "quality drop",
    "bytes": "size",
    "latency_s": "latency",
    "memory_bytes": "memory",
}
_SCORES: Mapping[Preference, str] = {
    "balanced": "latency ratio x size ratio",
    "latency": "latency ratio",
    "bytes": "bytes ratio",
    "quality": "quality drop",
}


def dropped(
    trials: Sequence[Trial],
    chosen: int,
    *,
    baseline: Measurement,
    budget: Budget,
    prefer: Preference,
    confident: bool = False,
    unconfirmed: Collection[int] = (),
) -> list[Dropped]:
    """Groups of trials, in the order of the first trial of each.

    Args:
        trials: In any state.
        chosen: Number of the one that is handed back.
        baseline: The twin's measurement.
        budget: The limits.
        prefer: What is best within them.
        confident: The upper end of the drop's interval is held against its limit.
        unconfirmed: Numbers of those that only the selecting examples found within the limits.
    """
    best = next((trial for trial in trials if trial.number == chosen), None)
    groups: dict[tuple[str, str], list[tuple[float, Trial, str]]] = defaultdict(list)
    for trial in trials:
        if trial.number == chosen:
            continue
        order, reason, example = 0.0, "", ""
        broken = [] if trial.measurement is None else violations(budget, trial.measurement, confident)
        if trial.state == "failed":
            reason, example = f"failed: {_pattern(trial.reason)}", trial.reason
        elif trial.state in ("rejected", "dropped"):
            reason, example = _pattern(trial.reason.partition(":")[0]), trial.reason
        elif broken:
            order = sum(map(excess, broken))
            reason, example = _too_much(broken), _figures(broken)
        elif trial.number in unconfirmed:
            reason = UNCONFIRMED
        else:
            reason, example = BEHIND, _behind(trial, best, prefer, baseline)
        groups[trial.way, reason].append((order, trial, example))
    return [_group(way, reason, members) for (way, reason), members in groups.items()]


def _group(way: str, reason: str, members: Sequence[tuple[float, Trial, str]]) -> Dropped:
    """The example is that of the one which came nearest."""
    _, _, example = min(members, key=lambda member: (member[0], member[1].number))
    plain = reason.removeprefix("failed: ")
    numbers = [trial.number for _, trial, _ in members]
    return Dropped(way=way, reason=reason, trials=numbers, example="" if example == plain else example)


def _pattern(reason: str) -> str:
    """The sentence without what differs from one trial to the next: quoted names and numbers."""
    return re.sub(r"\b\d+(\.\d+)?\b", "…", re.sub(r"'[^']*'", "…", reason)).strip()


def _too_much(broken: Sequence[Violation]) -> str:
    words: dict[str, list[str]] = defaultdict(list)
    for one in broken:
        kind = one.reason if one.reason in (UNMEASURED, UNRESOLVED) else "above the limit"
        words[kind].append(_NAMES[one.axis])
    return ", ".join(f"{' and '.join(names)} {kind}" for kind, names in words.items())


def _figures(broken: Sequence[Violation]) -> str:
    return ", ".join(
        f"{_NAMES[one.axis]} {figure(one.axis, one.value)} (limit {figure(one.axis, one.limit)})"
        for one in broken
        if one.value is not None
    )


def _behind(trial: Trial, best: Trial | None, prefer: Preference, baseline: Measurement) -> str:
    if trial.measurement is None or best is None or best.measurement is None:
        return ""
    own, other = (score(one, prefer, baseline)[0] for one in (trial.measurement, best.measurement))
    write: Any = (lambda value: figure("quality_drop", value)) if prefer == "quality" else "{:.3f}".format
    return f"{_SCORES[prefer]} {write(own)}, of the chosen one {write(other)}"
