"""``apply`` and ``lower``: a changed model, or the artifact of one, with nothing measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featherweight.api.handing import write_artifact
from featherweight.data import Data
from featherweight.engine.delivered import described
from featherweight.engine.output import check_other_run, check_output, write_folder
from featherweight.engine.run import write_model
from featherweight.engine.sources import (
    Given,
    follow,
    load_sources,
)
from featherweight.engine.start import start_runs, warn_of_idle_teacher
from featherweight.engine.targets import lower_target
from featherweight.engine.training_options import training_options
from featherweight.method import Precision, Progress, Silent
from featherweight.recipe import Recipe
from featherweight.runtime import Target
from featherweight.tools.costs import totals


def apply(
    model: str,
    recipe: str | Recipe,
    *,
    out: str | Path,
    data: str | Data | None = None,
    weights: str | None = None,
    inputs: Sequence[str] = (),
    image_size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    runtime: str = "onnxruntime",
    student: str | None = None,
    student_weights: str | None = None,
    teacher: str | None = None,
    teacher_weights: str | None = None,
    devices: int = 1,
    precision: Precision = "32",
    seed: int = 0,
    force: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Apply a filled recipe and write the changed model to ``out``: no pickle, nothing measured.

    Args are those of :func:`fit`.

    Returns:
        What was written, with static costs before and after.

    Raises:
        UserError: The input is at fault; nothing was written.
    """
    place = Path(out)
    check_output(place)
    check_other_run(place, force)
    steps = _filled(recipe)
    target, training = Target(runtime=runtime).resolved(), training_options(devices, precision)
    sources = load_sources(
        model, weights=weights, data=data, inputs=inputs, image_size=image_size, mean=mean, std=std,
        seed=seed, allow_pickle=allow_pickle,
    )  # fmt: skip
    learner, taught_by = Given(student, student_weights), Given(teacher, teacher_weights)
    shown = progress or Silent()
    (run,) = start_runs(
        sources,
        [target],
        learner,
        taught_by,
        seed=seed,
        progress=shown,
        allow_pickle=allow_pickle,
        **training,
    )
    follow(run.start)
    warn_of_idle_teacher(taught_by, steps, shown)
    changed = run.apply(steps)

    def write(folder: Path) -> None:
        write_model(folder, changed)
        (folder / "recipe.yaml").write_text(steps.to_yaml(), encoding="utf-8")

    write_folder(place, write)
    before, after = totals(run.original), totals(changed)
    return {
        "out": str(place),
        "edits": len(changed.edits),
        "formats": len(changed.formats),
        **({"student": learner.name} if learner.name else {}),
        "before": dict(before),
        "after": dict(after),
    }


def lower(
    model: str,
    *,
    out: str | Path,
    recipe: str | Recipe | None = None,
    data: str | Data | None = None,
    weights: str | None = None,
    inputs: Sequence[str] = (),
    image_size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    runtime: str = "onnxruntime",
    isa: str = "",
    threads: int = 1,
    seed: int = 0,
    force: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a model's artifact for a runtime, after a recipe if one is given. Nothing is measured.

    Args are those of :func:`fit`.

    Returns:
        What was written: files, bytes, digest, and how many tensors are stored in which type.

    Raises:
        UserError: The input is at fault; nothing was written.
    """
    place = Path(out)
    check_output(place)
    check_other_run(place, force)
    target = lower_target(runtime, threads, isa)
    steps = None if recipe is None else _filled(recipe)
    sources = load_sources(
        model, weights=weights, data=data, inputs=inputs, image_size=image_size, mean=mean, std=std,
        seed=seed, allow_pickle=allow_pickle,
    )  # fmt: skip
    (run,) = start_runs(
        sources, [target], seed=seed, progress=progress or Silent(), allow_pickle=allow_pickle
    )
    follow(run.start)
    artifact = run.lower(run.original if steps is None else run.apply(steps))
    about = described(artifact, run.runtime, target)
    stored: dict[str, int] = {}
    for dtype, size in about["stored"].values():
        stored[dtype] = stored.get(dtype, 0) + size
    summary = {
        "runtime": runtime,
        "files": list(artifact.files),
        "bytes": artifact.bytes,
        "sha256": artifact.sha256,
        "bytes_by_type": stored,
        "unmeasured": run.runtime.unmeasured,
    }
    origin = run.data.origin if data is not None else None

    def write(folder: Path) -> None:
        write_artifact(folder, run, artifact, target, {**summary, **about}, origin=origin)
        if steps is not None:
            (folder / "recipe.yaml").write_text(steps.to_yaml(), encoding="utf-8")

    write_folder(place, write)
    return {"out": str(place), **summary}


def _filled(recipe: str | Recipe) -> Recipe:
    steps = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if steps.has_holes:
        index, holes = next(iter(steps.holes().items()))
        name, step = next(iter(holes)), steps.steps[index]
        raise step.error(
            f"'{name}' of {step.method} is left open, and only fit fills what is open",
            (name,),
            fix=f"write one value for {name}, or use featherweight fit",
        )
    return steps
