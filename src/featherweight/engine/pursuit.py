"""Where training pays: how small a network may be made when it is then trained for as long as there is time.

Ways that make a network smaller are tried with a short training first. What they lose follows a power law of
the share of multiply-accumulates that stays and of the epochs that follow::

    drop(a, e) = d (a0 / a)^b (e0 / e)^g

with d what was measured at a0 and e0. What all trials of a runtime say at (a, e) is averaged, the near ones
counting most, since no power law holds from a network that lost nothing to one that loses as much as it may.
The smallest share is chosen whose drop is predicted to keep the limit with something to spare, when all that
is left of the time has gone into its training. A network that must become smaller yet is pruned on as it was
trained, and trained again, so that its epochs add up (step by step: Han et al. 2015, arXiv:1506.02626); one
that was made too small begins anew. A second round corrects what the first one showed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from featherweight.engine.narrowing import with_headroom
from featherweight.engine.search import Opening
from featherweight.engine.store import digest
from featherweight.engine.verdict import score, within
from featherweight.outcome import Budget, Measurement, Preference, Trial
from featherweight.recipe import Recipe

ROUNDS = (0.6, 1.0)  # of the time that is left, for each round
FROM = 0.35  # of the time, after which the rounds begin
_OF_SHARE, _OF_EPOCHS = 2.0, 0.5  # b and g
_NEAR_SHARE, _NEAR_EPOCHS = 0.02, 0.5  # squared distances of logarithms from which on a trial counts less
_OF_SCORE = 1.25  # how latency x bytes falls with the share of multiply-accumulates; other preferences less
_AIM = 0.8  # of the limit
_FLOOR = 0.1  # of the limit: smaller drops are noise
_GAIN = 0.97  # of the best score so far, at most
_SURE = 0.92  # of the time that is planned with
_LONGER = 1.5  # than the short training; else it is none
_SMALLEST, _LARGEST = 0.3, 0.9  # shares, as methods take them
_EVEN = 0.97  # of the multiply-accumulates: pruning so little is not worth a step
_SMALLER = frozenset({"prune", "shrink", "factorize"})
_PRUNED_ON = frozenset({"prune", "shrink"})  # what may be pruned on

_SHARES = tuple(math.exp(math.log(0.05) * (1 - index / 300)) for index in range(301))  # up to all
Steps = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Shortly:
    """A trial that was made smaller and trained.

    Attributes:
        trial: What was measured.
        amount: Last step that made it smaller.
        training: Last step that trained it.
        share: Of multiply-accumulates that all such steps leave.
        epochs: Of all trainings.
        timed: The one of the same training that did it; others were stored in another way.
    """

    trial: Trial
    amount: int
    training: int
    share: float
    epochs: float
    timed: Trial

    @property
    def seen(self) -> Measurement:
        """What was measured."""
        assert self.trial.measurement is not None
        return self.trial.measurement

    @property
    def steps(self) -> Steps:
        """Names and parameters."""
        return _steps(self.trial)

    def epochs_in(self, seconds: float) -> float:
        """For how many there is time, beside all else that was done for this trial."""
        trial = self.timed
        last = float(self.steps[self.training][1]["epochs"])
        if not trial.training_s:  # where it trained is not known here
            return last * seconds / trial.seconds
        beside = trial.seconds - trial.training_s - math.fsum(one.seconds for one in trial.predicted)
        return last * max(seconds - beside, 0.0) / trial.training_s

    def anew(self, share: float, epochs: float) -> Opening | None:
        """The same from the start with another share and other epochs; None where the step cannot."""
        steps = self.steps
        name, parameters = steps[self.amount]
        others = self.share / parameters["macs"]
        if name == "shrink" or not _SMALLEST <= share / others <= _LARGEST:
            return None
        if any(one == "finetune" for one, _ in steps[: self.training]):
            return None
        parameters["macs"] = round(share / others, 3)
        steps[self.training][1]["epochs"] = round(epochs, 2)
        return self._opening(steps)

    def pruned_on(self, share: float, epochs: float) -> Opening | None:
        """What was trained is pruned to a share of the original's, and trained on."""
        steps, left = self.steps, share / self.share
        if steps[self.amount][0] not in _PRUNED_ON or left > 1:
            return None
        more: Steps = [("finetune", {**steps[self.training][1], "epochs": round(epochs, 2)})]
        if left <= _EVEN:
            samples = steps[self.amount][1].get("samples")
            few = {} if samples is None else {"samples": samples}
            more.insert(0, ("prune", {"macs": round(max(left, _SMALLEST), 3), **few}))
        return self._opening([*steps[: self.training + 1], *more, *steps[self.training + 1 :]])

    def _opening(self, steps: Steps) -> Opening:
        recipe = Recipe.from_dict({"version": 1, "steps": [{name: values} for name, values in steps]})
        return Opening(self.trial.runtime, self.trial.way, recipe=recipe)


@dataclass(frozen=True)
class Law:
    """What networks lose, from all that were made smaller and trained for one runtime.

    Attributes:
        seen: They.
        limit: Of the drop.
        confident: The upper end of a drop's interval counts.
    """

    seen: Sequence[Shortly]
    limit: float
    confident: bool

    def drop(self, share: float, epochs: float) -> float:
        """Expected of a network of this share after so many epochs."""
        told = weights = 0.0
        for one in self.seen:
            smaller, longer = math.log(one.share / share), math.log(epochs / one.epochs)
            lost = math.log(max(_drop(one.seen, self.confident), _FLOOR * self.limit))
            weight = 1 / ((_NEAR_SHARE + smaller**2) ** 2 * (_NEAR_EPOCHS + longer**2))
            told += weight * (lost + _OF_SHARE * smaller - _OF_EPOCHS * longer)
            weights += weight
        return math.exp(told / weights)

    def share(self, epochs: float) -> float:
        """The smallest that keeps the limit, with something to spare, after so many epochs."""
        return next((one for one in _SHARES if self.drop(one, epochs) <= _AIM * self.limit), math.inf)


def pursue(
    trials: Sequence[Trial],
    seconds: float,
    budget: Budget,
    prefer: Preference,
    baseline: Measurement,
    *,
    confident: bool = False,
    later_s: float = 0.0,
) -> Opening | None:
    """What to make in so many seconds; None: nothing that would be better than what there is.

    Args:
        trials: All so far.
        seconds: For one candidate, with all its steps and its measurement.
        budget: The limits; without one of the drop there is nothing to aim at.
        prefer: What is best within them.
        baseline: The original's figures.
        confident: Hold the upper end of the drop's interval against its limit.
        later_s: Seconds in which it will be trained on afterwards.
    """
    limit = budget.quality_drop
    if not limit or prefer == "quality":
        return None
    kept = [one.measurement for one in within(trials, budget, confident) if one.measurement is not None]
    best = min((score(seen, prefer, baseline)[0] for seen in kept), default=math.inf)
    found: list[tuple[float, Opening]] = []
    everyone = _stored_best(list(filter(None, map(_shortly, trials))), limit, prefer, baseline, confident)
    for one in _longest(everyone):
        epochs, later = one.epochs_in(_SURE * seconds), one.epochs_in(_SURE * later_s) if later_s else 0.0
        if epochs < _LONGER * _first_epochs(one, everyone):
            continue
        law = Law([other for other in everyone if other.trial.runtime == one.trial.runtime], limit, confident)
        alone, on = law.share(epochs + later), law.share(epochs + later + one.epochs)
        if one.share < on and law.drop(one.share, epochs + later + one.epochs) <= limit:
            on = one.share  # there is less to spare, and it was trained already
        for share, opening in ((on, one.pruned_on(on, epochs)), (alone, one.anew(alone, epochs))):
            expected = score(one.seen, prefer, baseline)[0] * (share / one.share) ** _OF_SCORE
            if opening is not None and expected < _GAIN * best:
                found.append((expected, opening))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _stored_best(
    everyone: Sequence[Shortly], limit: float, prefer: Preference, baseline: Measurement, confident: bool
) -> list[Shortly]:
    """Of those that differ in unused bits alone the best that keeps the limit, else the nearest to it."""

    def order(one: Shortly) -> tuple[float, ...]:
        return max(_drop(one.seen, confident) - limit, 0.0), *score(one.seen, prefer, baseline)

    groups: dict[str, list[Shortly]] = {}
    for one in everyone:
        recipe = with_headroom(one.trial.recipe, 0)
        groups.setdefault(digest(one.trial.runtime, one.trial.way, recipe), []).append(one)
    return [
        replace(min(group, key=order), timed=max(group, key=lambda one: one.trial.training_s).trial)
        for group in groups.values()
    ]


def _longest(everyone: Sequence[Shortly]) -> list[Shortly]:
    """Of each way on each runtime the trial that trained longest; the last one of equals."""
    found: dict[tuple[str, str], Shortly] = {}
    for one in everyone:
        place = one.trial.runtime, one.trial.way
        if place not in found or one.epochs >= found[place].epochs:
            found[place] = one
    return list(found.values())


def _first_epochs(one: Shortly, everyone: Sequence[Shortly]) -> float:
    """Of the shortest training of a trial's way."""
    return min(other.epochs for other in everyone if other.trial.way == one.trial.way)


def _shortly(trial: Trial) -> Shortly | None:
    seen = trial.measurement
    if trial.state != "measured" or seen is None or seen.quality_drop is None:
        return None
    amount, training, share, epochs = -1, -1, 1.0, 0.0
    for index, (name, parameters) in enumerate(_steps(trial)):
        if name in _SMALLER and isinstance(parameters.get("macs"), float):
            amount, share = index, share * parameters["macs"]
        elif name == "finetune" and "epochs" in parameters:
            training, epochs = index, epochs + float(parameters["epochs"])
    if amount < 0 or training < amount:
        return None
    return Shortly(trial, amount, training, share, epochs, trial)


def _steps(trial: Trial) -> Steps:
    return [(name, dict(values or {})) for step in trial.recipe["steps"] for name, values in step.items()]


def _drop(seen: Measurement, confident: bool) -> float:
    ends = seen.quality_drop_ci95 if confident else None
    return (seen.quality_drop or 0.0) if ends is None else ends[1]
