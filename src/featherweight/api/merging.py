"""``merge``: several networks of the same inputs become one, held against all of them side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featherweight.api.fitting import fit
from featherweight.data import Data
from featherweight.engine.timing import Limits
from featherweight.errors import DataError, LoadError, RecipeError, nearest
from featherweight.method import Precision, Progress
from featherweight.outcome import Budget, Preference, Result
from featherweight.recipe import Recipe, Step

_FEWEST = 2


def merge(
    models: Mapping[str, str],
    data: Mapping[str, str | Data] | None = None,
    *,
    out: str | Path,
    weights: Mapping[str, str] | None = None,
    metrics: Mapping[str, str] | None = None,
    budget: Budget | None = None,
    max_drop: Mapping[str, float] | None = None,
    prefer: Preference = "balanced",
    confident: bool = False,
    recipe: str | Recipe | None = None,
    trials: int | None = None,
    time_limit: float = 600.0,
    runtime: str = "onnxruntime",
    device: str = "local",
    limits: Limits | None = None,
    threads: int = 1,
    tune: bool = True,
    robustness: bool | None = None,
    devices: int = 1,
    precision: Precision = "32",
    seed: int = 0,
    inputs: Sequence[str] = (),
    resume: bool = False,
    force: bool = False,
    allow_pickle: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Make one network with a trunk and a head for each task, and write its artifact to ``out``.

    Everything is compared with the networks side by side: sizes and latencies with their sums, each task's
    score with its own network's.

    Args:
        models: By the task's name, each as ``fit`` takes it: two or more, of the same inputs.
        data: By the task's name: the same examples in the same order, each with its own targets. A task that
            is left out is compared with its own network, on the examples of the others.
        out: As of ``fit``.
        weights: By the task's name, of a callable's module.
        metrics: By the task's name; by default they follow from the labels.
        budget: The limits; ``quality_drop`` is that of every task.
        max_drop: The largest drop of single tasks, by name.
        prefer: As of ``fit``.
        confident: As of ``fit``.
        recipe: Holds the step ``merge``, and others before or behind it; None: merge with its defaults.
        trials: As of ``fit``, where the recipe has holes.
        time_limit: Likewise.
        runtime: Which runtime will load the artifact.
        device: Where it is measured.
        limits: How long and how well to measure.
        threads: Cores that the runtime may use.
        tune: As of ``fit``.
        robustness: As of ``fit``.
        devices: Processes that share each batch in training.
        precision: Of training.
        seed: The only source of randomness.
        inputs: Where no data tells.
        resume: As of ``fit``.
        force: Replace what is in ``out``.
        allow_pickle: Load pickled modules, which runs their code.
        workers: As of ``fit``.
        progress: Where long work says how far it is.

    Returns:
        What is in ``out/result.json``; ``chosen.tasks`` has a row a task.

    Raises:
        UserError: The input is at fault; nothing was written to ``out``.
        RunnerError: Measuring failed.
    """
    networks = _networks(models, data or {}, weights or {}, metrics or {})
    return fit(
        networks,
        out=out,
        budget=_budget(budget or Budget(), max_drop or {}, tuple(models)),
        prefer=prefer,
        confident=confident,
        runtime=runtime,
        device=device,
        recipe=_recipe(recipe),
        trials=trials,
        time_limit=time_limit,
        limits=limits,
        threads=threads,
        tune=tune,
        robustness=robustness,
        devices=devices,
        precision=precision,
        seed=seed,
        inputs=inputs,
        resume=resume,
        force=force,
        allow_pickle=allow_pickle,
        workers=workers,
        progress=progress,
    )


def _networks(
    models: Mapping[str, str],
    data: Mapping[str, str | Data],
    weights: Mapping[str, str],
    metrics: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    if len(models) < _FEWEST:
        raise LoadError(
            f"{len(models)} model is nothing to merge" if models else "there is no model to merge",
            fix="give two models or more, NAME=MODEL each",
        )
    given: dict[str, Mapping[str, Any]] = {"data": data, "weights": weights, "metrics": metrics}
    for what, table in given.items():
        for name in table:
            if name not in models:
                raise DataError(
                    f"{what} are given for '{name}', which is no model", fix=nearest(name, models)
                )
    return {
        name: {
            "model": model,
            "weights": weights.get(name),
            "data": data.get(name),
            "metric": metrics.get(name),
        }
        for name, model in models.items()
    }


def _budget(budget: Budget, drops: Mapping[str, float], tasks: tuple[str, ...]) -> Budget:
    """The limits with those of single tasks; ``quality_drop`` is the largest, if every task has one."""
    if not drops:
        return budget
    each = {name: drops.get(name, budget.quality_drop) for name in (*tasks, *drops)}
    known = {name: limit for name, limit in each.items() if limit is not None}
    largest = max(known.values()) if len(known) == len(each) else None
    return budget.model_copy(update={"drops": known, "quality_drop": largest})


def _recipe(recipe: str | Recipe | None) -> Recipe:
    if recipe is None:
        return Recipe((Step("merge", {}),))
    steps = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if all(step.method != "merge" for step in steps.steps):
        raise RecipeError("the recipe has no step merge", fix="steps: [merge: {}, ...]")
    return steps
