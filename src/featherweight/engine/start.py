"""A run on each target: the original, its data, and a student and a teacher beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from featherweight.engine.run import Run
from featherweight.engine.sources import NOTHING, Given, Sources, check_examples_to_learn, load_beside
from featherweight.engine.store import Store
from featherweight.errors import LoadError
from featherweight.method import Progress
from featherweight.recipe import Choice, Recipe
from featherweight.runtime import Target


def start_runs(
    sources: Sources,
    targets: Sequence[Target],
    student: Given = NOTHING,
    teacher: Given = NOTHING,
    *,
    seed: int,
    progress: Progress,
    allow_pickle: bool,
    **training: Any,
) -> list[Run]:
    """One run for each target; they share the store and what was loaded.

    Args:
        sources: The original and its data; what is to be said of them is said.
        targets: Where each runs.
        student: What steps start from instead of the original.
        teacher: What they may learn from.
        seed: The only source of randomness.
        progress: Where long work says how far it is.
        allow_pickle: Load pickled modules, which runs their code.
        training: See ``training_options``.

    Raises:
        LoadError: A second network cannot be read, or takes other inputs.
        RecipeError: It gives other outputs.
        DataError: A student has nothing to learn from.
    """
    tell_notes(sources, progress)
    original = sources.model
    learner = load_beside(student, "student", original, seed=seed, allow_pickle=allow_pickle)
    taught_by = load_beside(teacher, "teacher", original, allow_pickle=allow_pickle)
    if learner is not None:
        check_examples_to_learn(sources.data)
    options: dict[str, Any] = {"seed": seed, "progress": progress, "student": learner, "teacher": taught_by}
    store = Store()
    return [Run(original, sources.data, target, store, **options, **training) for target in targets]


def auto_run(
    sources: Sources,
    target: Target,
    student: Given,
    teacher: Given,
    *,
    seed: int,
    progress: Progress,
    allow_pickle: bool,
    **training: Any,
) -> Run:
    """A run on which a student is chosen; see ``start_runs``.

    Raises:
        LoadError: Weights are given, and nobody knows for which network; or the original has several entries.
        DataError: A student has nothing to learn from.
    """
    original = sources.model
    if student.weights is not None:
        raise LoadError(
            "--student-weights are of one network, and --student auto has yet to choose it",
            fix="name it: --student mobilenetv2:width=0.35 --student-weights FILE",
        )
    check_examples_to_learn(sources.data)
    taught_by = load_beside(teacher, "teacher", original, allow_pickle=allow_pickle)
    return Run(
        original, sources.data, target, Store(), seed=seed, progress=progress, teacher=taught_by, **training
    )


def tell_notes(sources: Sources, progress: Progress) -> None:
    """Say what was noticed of the model and the data."""
    for note in sources.notes:
        progress.note(f"note: {note}")


def warn_of_idle_teacher(teacher: Given, recipe: Recipe, progress: Progress) -> None:
    """A teacher that no step of the user's recipe names teaches nobody."""
    named = any("teacher" in _values(step.parameters.get("teacher")) for step in recipe.steps)
    if teacher.name and not named:
        progress.note("warning: no step of the recipe learns from the teacher: write teacher: teacher")


def _values(parameter: Any) -> tuple[Any, ...]:
    return tuple(parameter.options) if isinstance(parameter, Choice) else (parameter,)
