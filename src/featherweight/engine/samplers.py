"""What proposes the next candidate: TPE, NSGA-II or chance, each with limits as constraints.

TPE, the tree-structured Parzen estimator for several objectives (arXiv:2304.11127, with constraints
arXiv:2606.09889), learns most from few trials. NSGA-II (Deb et al. 2002, doi:10.1109/4235.996017) breeds
candidates from the best ones, and is for searches of some hundred trials. Both meet holes that only some
candidates have, since holes are asked of the models that reach the steps.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from featherweight.errors import BudgetError, nearest

SamplerName = Literal["auto", "tpe", "nsga2", "random"]
_MANY = 300  # trials from which on a population has generations enough
_LEAST, _MOST = 10, 50  # members of a population
_GENERATIONS = 8
_CROSSED = 0.9  # share of the children that have two parents


def known_sampler(name: str) -> SamplerName:
    """The same name, if it is one.

    Raises:
        BudgetError: It is not; names the nearest one.
    """
    for known in get_args(SamplerName):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise BudgetError(f"no sampler is called '{name}'", fix=nearest(name, get_args(SamplerName)))


def chosen_sampler(name: SamplerName, trials: int) -> SamplerName:
    """Which one ``auto`` is for so many trials."""
    if name != "auto":
        return name
    return "nsga2" if trials >= _MANY else "tpe"


def make_sampler(name: SamplerName, seed: int, trials: int, constrained: bool) -> optuna.samplers.BaseSampler:
    """Optuna's sampler.

    Args:
        name: Not auto.
        seed: Its only source of randomness.
        trials: Largest number of trials.
        constrained: Whether there are limits that are no objectives.
    """
    constraints = _constraints if constrained else None
    with warnings.catch_warnings():
        # Experimental before Optuna 5 and superseded in it, the function is what 4.2 to 5 have in common.
        warnings.simplefilter("ignore")
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if name == "nsga2":
            size = min(max(trials // _GENERATIONS, _LEAST), _MOST)
            return Genetic(size, seed, constraints)
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=min(10, max(4, trials // 4)),
            multivariate=True,
            warn_independent_sampling=False,  # holes that only some candidates have are drawn by themselves
            constraints_func=constraints,
        )


class Genetic(optuna.samplers.NSGAIISampler):
    """NSGA-II whose children also inherit the holes that only some candidates have.

    Optuna's own crosses the holes that all trials have, and draws the others by chance. Here a child takes
    its first parent's values, and for about half of the holes that the second one has too, the second one's;
    each is drawn anew with a chance of one in their number.

    Args:
        size: Of the population.
        seed: Its only source of randomness.
        constraints: Trial -> excesses, of which none may be above zero.
    """

    def __init__(self, size: int, seed: int, constraints: Any) -> None:
        self._random = random.Random(seed)
        super().__init__(
            population_size=size,
            seed=seed,
            constraints_func=constraints,
            child_generation_strategy=self._child,
        )

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Every hole that a measured trial had; its name tells its distribution, so each has one."""
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return {
            name: distribution
            for one in done
            for name, distribution in one.distributions.items()
            if not distribution.single()
        }

    def _child(
        self, study: optuna.Study, space: dict[str, BaseDistribution], parents: Sequence[FrozenTrial]
    ) -> dict[str, Any]:
        first, second = (self._random.choice(parents) for _ in range(2))
        genes = {name: value for name, value in first.params.items() if name in space}
        if self._random.random() < _CROSSED:
            shared = [name for name in genes if name in second.params]
            genes |= {name: second.params[name] for name in shared if self._random.random() < 0.5}
        kept = 1 - 1 / max(len(genes), 1)
        return {name: value for name, value in genes.items() if self._random.random() < kept}


def _constraints(trial: FrozenTrial) -> list[float]:
    return list(trial.user_attrs["excess"])
