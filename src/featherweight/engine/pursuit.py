"""Where training pays: how small a network may be made when it is then trained for as long as there is time.

Ways that make a network smaller are tried with a short training first. What they lose follows a power law of
the share of multiply-accumulates that stays and of the epochs that follow::

    drop(a, e) = d (a0 / a)^b (e0 / e)^g

with d what was measured at a0 and e0. The exponents are those of the shipped networks between a half and a
quarter of the multiply-accumulates, and between 30,000 and 500,000 examples seen. The share is chosen whose
drop is predicted to keep the limit with something to spare; a second round corrects what the first one shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featherweight.engine.search import Opening
from featherweight.engine.verdict import excess, score, violations
from featherweight.outcome import Budget, Measurement, Preference, Trial

ROUNDS = (0.65, 1.0)  # of the time that is left, for each round
FROM = 0.35  # of the time, after which the rounds begin
_OF_SHARE, _OF_EPOCHS = 1.0, 0.35  # b and g
_OF_SCORE = 1.5  # how latency x bytes falls with the share of multiply-accumulates; other preferences less
_AIM = 0.8  # of the limit
_FLOOR = 0.1  # of the limit: smaller drops are noise
_GAIN = 0.97  # of the best score so far, at most
_SURE = 0.85  # of the time that is planned with
_LONGER = 1.5  # than the short training; else it is none
_SMALLEST, _LARGEST = 0.3, 0.9  # shares, as both of them take them
_SMALLER = frozenset({"prune", "factorize"})  # whose share may be any


@dataclass(frozen=True)
class Shortly:
    """A trial that was made smaller and trained for a short time.

    Attributes:
        trial: What was measured.
        amount: Step whose share of multiply-accumulates may change.
        training: Step that trains.
        share: Of multiply-accumulates that the step leaves.
        epochs: Of the training.
    """

    trial: Trial
    amount: int
    training: int
    share: float
    epochs: float

    @property
    def seen(self) -> Measurement:
        """What was measured."""
        assert self.trial.measurement is not None
        return self.trial.measurement

    def epochs_in(self, seconds: float) -> float:
        """For how many there is time, beside all else that was done for this trial."""
        trial = self.trial
        if not trial.training_s:  # where it trained is not known here
            return self.epochs * seconds / trial.seconds
        beside = trial.seconds - trial.training_s - math.fsum(one.seconds for one in trial.predicted)
        return self.epochs * max(seconds - beside, 0.0) / trial.training_s

    def opening(self, share: float, epochs: float) -> Opening:
        """The same with another share and other epochs."""
        values = {index: dict(parameters) for index, (_, parameters) in enumerate(_steps(self.trial))}
        values[self.amount]["macs"] = share
        values[self.training]["epochs"] = epochs
        return Opening(self.trial.runtime, self.trial.way, values, whole=True)


def pursue(
    trials: Sequence[Trial],
    seconds: float,
    budget: Budget,
    prefer: Preference,
    baseline: Measurement,
    *,
    confident: bool = False,
) -> Opening | None:
    """What to make in so many seconds; None: nothing that would be better than what there is.

    Args:
        trials: All so far.
        seconds: For one candidate, with all its steps and its measurement.
        budget: The limits; without one of the drop there is nothing to aim at.
        prefer: What is best within them.
        baseline: The original's figures.
        confident: Hold the upper end of the drop's interval against its limit.
    """
    limit = budget.quality_drop
    if not limit or prefer == "quality":
        return None
    best = _best_score(trials, budget, prefer, baseline, confident)
    found: list[tuple[float, Opening]] = []
    for one in _longest(trials):
        epochs = one.epochs_in(_SURE * seconds)
        if epochs < _LONGER * _first_epochs(one, trials):
            continue
        lost = max(_drop(one.seen, confident), _FLOOR * limit) * (one.epochs / epochs) ** _OF_EPOCHS
        share = round(max(one.share * (lost / (_AIM * limit)) ** (1 / _OF_SHARE), _SMALLEST), 3)
        if share > _LARGEST:
            continue
        expected = score(one.seen, prefer, baseline)[0] * (share / one.share) ** _OF_SCORE
        if expected < _GAIN * best:
            found.append((expected, one.opening(share, round(epochs, 2))))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _best_score(
    trials: Sequence[Trial], budget: Budget, prefer: Preference, baseline: Measurement, confident: bool
) -> float:
    """Of the best that keeps every limit; infinite: none does."""
    kept = [
        trial.measurement
        for trial in trials
        if trial.state == "measured"
        and trial.measurement is not None
        and not sum(map(excess, violations(budget, trial.measurement, confident)))
    ]
    return min((score(seen, prefer, baseline)[0] for seen in kept), default=float("inf"))


def _longest(trials: Sequence[Trial]) -> list[Shortly]:
    """Of each way on each runtime the trial that trained longest; the last one of equals."""
    found: dict[tuple[str, str], Shortly] = {}
    for one in filter(None, map(_shortly, trials)):
        place = one.trial.runtime, one.trial.way
        if place not in found or one.epochs >= found[place].epochs:
            found[place] = one
    return list(found.values())


def _first_epochs(one: Shortly, trials: Sequence[Trial]) -> float:
    """Of the shortest training of a trial's way."""
    same = [other for other in map(_shortly, trials) if other and other.trial.way == one.trial.way]
    return min(other.epochs for other in same)


def _shortly(trial: Trial) -> Shortly | None:
    seen = trial.measurement
    if trial.state != "measured" or seen is None or seen.quality_drop is None:
        return None
    amount = training = -1
    for index, (name, parameters) in enumerate(_steps(trial)):
        if name in _SMALLER and isinstance(parameters.get("macs"), float):
            amount = index
        elif name == "finetune" and "epochs" in parameters:
            training = index
    if amount < 0 or training < amount:
        return None
    steps = _steps(trial)
    return Shortly(trial, amount, training, steps[amount][1]["macs"], float(steps[training][1]["epochs"]))


def _steps(trial: Trial) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, parameters or {}) for step in trial.recipe["steps"] for name, parameters in step.items()]


def _drop(seen: Measurement, confident: bool) -> float:
    ends = seen.quality_drop_ci95 if confident else None
    return (seen.quality_drop or 0.0) if ends is None else ends[1]
