"""Which open parameters decided, told from the trials: PED-ANOVA, as Optuna computes it.

A parameter matters for a figure as far as its values among the good trials differ from its values among
all: the Pearson divergence of both densities (Watanabe et al., arXiv:2304.10255). A parameter that only some
trials have counts by how often they are good (Conditional PED-ANOVA, arXiv:2601.20800; from Optuna 5 on,
before it only parameters that every trial has are told).
"""

from __future__ import annotations

import inspect
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from featherweight.outcome import Importance, Importances

LEAST = 12  # trials
_GOOD, _FEWEST_GOOD = 0.25, 5  # share of the trials that are good; Optuna advises five at least
_FIGURES = ("quality_drop", "bytes", "latency_ratio")


def importances(study: optuna.Study) -> Importances:
    """Shares of the parameters in reaching small figures, over the measured trials of a study.

    Args:
        study: Its trials carry what was measured under ``trial``, and what was drawn under ``draws``.
    """
    told = {frozen.number: json.loads(frozen.user_attrs["trial"]) for frozen in _complete(study)}
    measured = {number: one for number, one in told.items() if one["sha256"] or one["state"] == "measured"}
    trials = [frozen for frozen in _complete(study) if frozen.number in measured]
    if len(trials) < LEAST:
        reason = f"{len(trials)} measured trials are too few to tell: it takes {LEAST}"
        return Importances(trials=len(trials), reason=reason)
    differing = [name for name in _names(trials) if len({str(t.params.get(name)) for t in trials}) > 1]
    if not differing:
        return Importances(trials=len(trials), reason="the trials differ in no parameter")
    good = max(_GOOD, _FEWEST_GOOD / len(trials))
    shares: dict[str, dict[str, float]] = defaultdict(dict)
    for figure in _FIGURES:
        found = _shares(trials, good, lambda t, name=figure: _figure(measured[t.number], name))  # type: ignore[misc]
        for name, share in found.items():
            label = _label(name, trials, measured)
            shares[label][figure] = shares[label].get(figure, 0.0) + share
    rows = [Importance(parameter=label, **found) for label, found in shares.items()]
    rows.sort(key=lambda row: -sum(getattr(row, figure) or 0.0 for figure in _FIGURES))
    return Importances(evaluator="PED-ANOVA", trials=len(trials), best=good, rows=rows)


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return [
        frozen
        for frozen in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if "trial" in frozen.user_attrs
    ]


def _names(trials: list[FrozenTrial]) -> list[str]:
    return list(dict.fromkeys(name for frozen in trials for name in frozen.params))


def _figure(told: dict[str, Any], name: str) -> float:
    value = (told["measurement"] or {}).get(name)
    return math.nan if value is None else float(value)


def _shares(
    trials: list[FrozenTrial], good: float, figure: Callable[[FrozenTrial], float]
) -> dict[str, float]:
    """Shares by Optuna's names of the parameters; none where trials lack the figure or are all the same."""
    values = [figure(frozen) for frozen in trials]
    if not all(map(math.isfinite, values)) or len(set(values)) == 1:
        return {}
    study = optuna.create_study(direction="minimize")
    study.add_trials(
        [
            optuna.trial.create_trial(params=one.params, distributions=one.distributions, value=value)
            for one, value in zip(trials, values, strict=True)
        ]
    )
    evaluator: Callable[..., Any] = PedAnovaImportanceEvaluator
    takes = inspect.signature(evaluator).parameters
    quantile = "target_quantile" if "target_quantile" in takes else "baseline_quantile"  # before Optuna 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental in some versions
        divergences = get_param_importances(study, evaluator=evaluator(**{quantile: good}), normalize=False)
    total = sum(divergences.values())
    return {name: value / total for name, value in divergences.items()} if total > 0 else {}


def _label(name: str, trials: list[FrozenTrial], told: dict[int, dict[str, Any]]) -> str:
    """What people call a parameter: Optuna's name is ``step/address#hole``, or ``way`` or ``runtime``."""
    place, slash, address = name.partition("/")
    if not slash or not place.isdigit():
        return name
    step = next(told[frozen.number]["recipe"]["steps"] for frozen in trials if name in frozen.params)
    methods = [next(iter(one)) for one in step]
    method = methods[int(place)]
    again = f" (step {int(place) + 1})" if methods.count(method) > 1 else ""
    return f"{method}{again}: {address.partition('#')[0]}"
