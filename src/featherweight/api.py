"""The whole story, read it first: load, ask for recipes, weigh what they make, hand the best one back.

Every function here is one command of the command line.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from pydantic import ValidationError

from featherweight import bundle
from featherweight import report as reports
from featherweight.data import Data
from featherweight.engine.catalog import doctor, methods, runtimes
from featherweight.engine.compare import compare_artifacts
from featherweight.engine.delivered import ABOUT, delivered, described
from featherweight.engine.devices import for_runtime
from featherweight.engine.effort import plan
from featherweight.engine.environment import describe_device
from featherweight.engine.files import load_examples, weigh_files
from featherweight.engine.fit import Fit, Fitted, Question
from featherweight.engine.inspect import inspect_model
from featherweight.engine.lanes import make_lanes
from featherweight.engine.output import MARK, check_other_run, check_output, write_folder
from featherweight.engine.run import Run, write_model
from featherweight.engine.sources import (
    NOTHING,
    Given,
    follow,
    load_original,
    load_sources,
    scoring_code,
    several_entries,
)
from featherweight.engine.start import start_runs, tell_notes, warn_of_idle_teacher
from featherweight.engine.store import digest, told_as_machine_error
from featherweight.engine.targets import check_cores, fit_targets, lower_target
from featherweight.engine.timing import Limits
from featherweight.engine.training_options import recipe_code, training_options
from featherweight.errors import (
    BudgetError,
    DataError,
    FeatherweightError,
    LoadError,
    OutputError,
    TargetError,
    nearest,
)
from featherweight.figures import seconds
from featherweight.method import Precision, Progress, Silent
from featherweight.outcome import Budget, Preference, Result
from featherweight.recipe import Recipe
from featherweight.runtime import Artifact, Target
from featherweight.tools.costs import totals

__all__ = [
    "apply",
    "compare",
    "demo",
    "doctor",
    "fit",
    "inspect",
    "lower",
    "measure",
    "methods",
    "report",
    "runtimes",
]

_TRIALS = 8  # of a recipe with holes and no --trials


def fit(
    model: str,
    data: str | Data | None = None,
    *,
    out: str | Path,
    weights: str | None = None,
    metric: str | None = None,
    budget: Budget | None = None,
    prefer: Preference = "balanced",
    confident: bool = False,
    runtime: str = "onnxruntime",
    device: str = "local",
    isa: str = "",
    recipe: str | Recipe | None = None,
    trials: int | None = None,
    time_limit: float = 600.0,
    limits: Limits | None = None,
    threads: int = 1,
    tune: bool = True,
    devices: int = 1,
    precision: Precision = "32",
    seed: int = 0,
    image_size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    inputs: Sequence[str] = (),
    student: str | None = None,
    student_weights: str | None = None,
    teacher: str | None = None,
    teacher_weights: str | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Find the best artifact of a model within a budget and write it to ``out``.

    Args:
        model: ``path.py:callable``, ``package.module:callable``, model.onnx or model.pt2.
        data: file.npz, a folder of class folders of images, ``path.py:callable``, or the data itself.
        out: Folder for the artifact, recipe.yaml, result.json, report.html, model_card.md and load.py.
        weights: Of the callable's module: safetensors or a state dict.
        metric: What scores outputs; by default it follows from the labels.
        budget: The limits; none by default.
        prefer: What is best among artifacts within the budget.
        confident: The upper end of the drop's 95 % interval must be within its limit.
        runtime: Which runtime will load the artifact; several with commas, or ``any``: all that are
            installed; then the fastest is found by measuring.
        device: Where it is measured: ``local``, ``ssh:[user@]host[:port]`` or ``adb:serial``.
        isa: Instruction set that decides integer ranges; '' is the device's.
        recipe: A YAML file or a recipe; with holes it is searched; None tries what suits the network and
            the time.
        trials: Artifacts to measure at most; by default 3, 8 or 16, as the effort is, 8 for a recipe with
            holes, 1 without holes.
        time_limit: Seconds that there are. Without a recipe they decide the effort (engine/effort.py). No
            trial starts that would be ready later; one always does.
        limits: How long and how well to measure.
        threads: Cores that the runtime may use.
        tune: Measure the chosen artifact with those of the runtime's options that are fastest for it.
        devices: Processes that share each batch where a step trains: on as many cores, or GPUs.
        precision: In which steps train: 32, bf16-mixed or 16-mixed.
        seed: The only source of randomness.
        image_size: For a folder of images.
        mean: For a folder of images.
        std: For a folder of images.
        inputs: ``[NAME=][DTYPE:]3x224x224`` each, where no data tells.
        student: Another network that the steps start from; the model stays what it is compared with.
        student_weights: Of the student's module.
        teacher: Another network that a step with ``teacher: teacher`` learns from.
        teacher_weights: Of the teacher's module.
        force: Replace what is in ``out``.
        allow_pickle: Load pickled modules, which runs their code.
        progress: Where long work says how far it is.

    Returns:
        What is in ``out/result.json``; ``met`` tells whether the budget is kept.

    Raises:
        UserError: The input is at fault; nothing was written to ``out``.
        MachineError: The disk is full; nothing was written to ``out``.
        RunnerError: Measuring failed.
    """
    place, shown, started = Path(out), progress or Silent(), time.monotonic()
    check_output(place)
    targets = fit_targets(runtime, threads, device, isa)
    training = training_options(devices, precision)
    question = _question(recipe, budget or Budget(), prefer, confident, trials, time_limit)
    question = replace(question, tune=tune, started=started)
    sources = load_sources(
        model,
        weights=weights,
        data=data,
        inputs=inputs,
        metric=metric,
        image_size=image_size,
        mean=mean,
        std=std,
        seed=seed,
        allow_pickle=allow_pickle,
    )
    if "forward" not in sources.model.entries:
        raise several_entries(sources.model, model, "fit scores one")
    learner, taught_by = Given(student, student_weights), Given(teacher, teacher_weights)
    runs = start_runs(
        sources, targets, learner, taught_by, seed=seed, progress=shown, allow_pickle=allow_pickle, **training
    )
    if not question.open_ended:
        warn_of_idle_teacher(taught_by, question.recipe, shown)
    if question.open_ended:
        follow(runs[0].start)
        question = _planned(question, runs, trials, shown)
    limits = limits or Limits()
    name = Path(model.rpartition(":")[2] or model).stem
    key = _run_key(runs, question, limits, [name, learner.name, taught_by.name])
    check_other_run(place, force, key)
    store = runs[0].store
    kept = store.get("runs", key)
    if kept is None:
        follow(sources.model)
        follow(runs[0].start)
        if not question.searches and len(runs) == 1:  # what is wrong shows before anything is measured
            runs[0].apply(question.recipe)
        left_out: dict[str, FeatherweightError] = {}
        lanes = make_lanes(runs, limits, failures=left_out)
        fitted = Fit(lanes, question, left_out).answer()
        told = {"run": key, "student": learner.name, "teacher": taught_by.name}
        fitted = replace(fitted, result=fitted.result.model_copy(update=told))
        if not fitted.finished:
            write_folder(place, lambda folder: _deliver(folder, fitted, name))
            return fitted.result
        kept = store.put("runs", key, lambda folder: _deliver(folder, fitted, name))
        store.trim()
    delivered = kept
    write_folder(place, lambda folder: _copy(delivered, folder))
    return Result.model_validate_json((delivered / MARK).read_text(encoding="utf-8"))


def _question(
    recipe: str | Recipe | None,
    budget: Budget,
    prefer: Preference,
    confident: bool,
    trials: int | None,
    time_limit: float,
) -> Question:
    for axis, limit in budget.model_dump().items():
        if limit is not None and not limit >= 0:
            raise BudgetError(f"{axis} {limit} is no limit", fix="give a number that is not negative")
    if trials is not None and trials < 1:
        raise BudgetError(f"{trials} trials are none", fix="ask for 1 or more")
    if prefer not in get_args(Preference):
        raise BudgetError(f"nothing is preferred by '{prefer}'", fix=nearest(prefer, get_args(Preference)))
    if not time_limit >= 0:
        raise BudgetError(f"a time of {time_limit} seconds is none", fix="give seconds that are not negative")
    steps = Recipe(()) if recipe is None else recipe
    steps = steps if isinstance(steps, Recipe) else Recipe.load(steps)
    searched = recipe is None or steps.has_holes
    return Question(
        budget=budget,
        prefer=prefer,
        confident=confident,
        recipe=steps,
        open_ended=recipe is None,
        trials=(_TRIALS if trials is None else trials) if searched else 1,
        time_limit=time_limit,
    )


def _planned(question: Question, runs: Sequence[Run], trials: int | None, progress: Progress) -> Question:
    """The question with what to try: it follows from the time and from how long a pass takes here."""
    made = plan(runs[0], question.time_limit, question.budget, trials)
    progress.note(
        f"effort {made.level}: {', then '.join(made.ways)}; {made.trials} trials at most in "
        f"{seconds(question.time_limit)} ({seconds(made.example_s)} a pass of one example). {made.longer}"
    )
    return replace(question, plan=made, trials=made.trials)


def _run_key(runs: Sequence[Run], question: Question, limits: Limits, names: Sequence[str]) -> str:
    """What makes two runs the same: model, data, question, targets, machine, code, and names in the texts."""
    run = runs[0]
    return digest(
        [None if one is None else one.key for one in (run.original, run.student, run.teacher)],
        run.data.fingerprint,
        run.data.metric.name,
        scoring_code(run.data),
        [*names, run.data.origin, run.data.class_names, run.data.notes],
        question.budget.model_dump(),
        [question.prefer, question.confident, question.trials, question.time_limit, question.open_ended],
        [question.tune, question.recipe.to_dict()],
        []
        if question.plan is None
        else [[way, steps.to_dict()] for way, steps in question.plan.ways.items()],
        [[one.target.to_json(), describe_device(one.target).model_dump(mode="json")] for one in runs],
        asdict(limits),
        run.seed,
        [run.devices, run.precision, recipe_code(question.recipe)],
        run.sources,
    )


def _deliver(folder: Path, fitted: Fitted, name: str) -> None:
    """Fill the folder that the user gets."""
    result, artifact, run = fitted.result, fitted.weighed.artifact, fitted.lane.run
    # What travels names no device: where it was measured is in the environment.
    target = replace(for_runtime(run.target), options=result.chosen.options or {})
    _copy_artifact(artifact, folder)
    (folder / "recipe.yaml").write_text(Recipe.from_dict(result.recipe).to_yaml(), encoding="utf-8")
    (folder / "model_card.md").write_text(bundle.model_card(result, name=name), encoding="utf-8")
    (folder / "report.html").write_text(reports.render(result), encoding="utf-8")
    entry = run.start.entries["forward"]
    for file, text in bundle.loaders(
        run.runtime, artifact, target, entry, result.examples.get("origin")
    ).items():
        (folder / file).write_text(text, encoding="utf-8")
    about = described(artifact, run.runtime, target)
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    (folder / MARK).write_text(result.to_json(), encoding="utf-8")


def _copy_artifact(artifact: Artifact, folder: Path) -> None:
    """Its files, which may lie in folders of their own."""
    for name in artifact.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(artifact.folder / name, folder / name)


def _copy(source: Path, folder: Path) -> None:
    for file in source.rglob("*"):  # one by one: copytree would hide what went wrong, such as a full disk
        if file.is_file():
            place = folder / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place)


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
    run = _run(
        model, data, Target(runtime=runtime).resolved(), seed, progress,
        weights=weights, inputs=inputs, image_size=image_size, mean=mean, std=std, allow_pickle=allow_pickle,
        student=Given(student, student_weights), teacher=Given(teacher, teacher_weights),
        training=training_options(devices, precision),
    )  # fmt: skip
    name = Given(student).name
    warn_of_idle_teacher(Given(teacher), steps, run.progress)
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
        **({"student": name} if name else {}),
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
    run = _run(
        model, data, target, seed, progress,
        weights=weights, inputs=inputs, image_size=image_size, mean=mean, std=std, allow_pickle=allow_pickle,
    )  # fmt: skip
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

    def write(folder: Path) -> None:
        _copy_artifact(artifact, folder)
        if steps is not None:
            (folder / "recipe.yaml").write_text(steps.to_yaml(), encoding="utf-8")
        (folder / ABOUT).write_text(json.dumps({**summary, **about}, indent=2) + "\n", encoding="utf-8")
        entries = run.original.entries
        name = "forward" if "forward" in entries else next(iter(entries))
        origin = run.data.origin if data is not None else None
        for file, text in bundle.loaders(
            run.runtime, artifact, target, entries[name], origin, name=name
        ).items():
            (folder / file).write_text(text, encoding="utf-8")

    write_folder(place, write)
    return {"out": str(place), **summary}


def compare(
    first: str | Path,
    second: str | Path,
    *,
    data: str | Data | None = None,
    inputs: Sequence[str] = (),
    image_size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    below: float = 30.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Where two artifacts of one network part: values inside both on the same inputs, layer by layer.

    Args:
        first: A folder that :func:`fit` or :func:`lower` wrote; it is the reference.
        second: Another one, for any runtime.
        data: Examples; without it ``inputs`` says what the artifacts take.
        inputs: ``[NAME=][DTYPE:]3x224x224`` each, where no data tells.
        image_size: For a folder of images.
        mean: For a folder of images.
        std: For a folder of images.
        below: Decibels under which two values count as different.
        seed: Of random inputs.
        progress: Where long work says how far it is.

    Returns:
        The values that both show, in order, with their signal-to-noise ratio, and the first one below.

    Raises:
        UserError: The input is at fault, or a runtime shows nothing of its inside.
    """
    examples = load_examples(
        data, metric=None, inputs=inputs, image_size=image_size, mean=mean, std=std, seed=seed
    )
    return compare_artifacts(
        delivered(first), delivered(second), examples, below=below, progress=progress or Silent()
    )


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


def _run(
    model: str,
    data: str | Data | None,
    target: Target,
    seed: int,
    progress: Progress | None,
    student: Given = NOTHING,
    teacher: Given = NOTHING,
    training: Mapping[str, Any] = MappingProxyType({}),
    **given: Any,
) -> Run:
    sources = load_sources(model, data=data, seed=seed, **given)
    shown, allow_pickle = progress or Silent(), given["allow_pickle"]
    (run,) = start_runs(
        sources, [target], student, teacher, seed=seed, progress=shown, allow_pickle=allow_pickle, **training
    )
    follow(run.start)
    return run


def measure(
    artifact: str | Path,
    *,
    twin: str | Path | None = None,
    data: str | Data | None = None,
    metric: str | None = None,
    inputs: Sequence[str] = (),
    image_size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    runtime: str = "onnxruntime",
    device: str = "local",
    threads: int = 1,
    limits: Limits | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Weigh what a runtime loads: latency in turn with its twin, memory, quality when data is given.

    Args:
        artifact: A folder that :func:`fit` or :func:`lower` wrote, or a file.
        twin: What to compare with, usually the original lowered by :func:`lower`.
        data: Examples; without it ``inputs`` says what the file takes, and quality is not measured.
        metric: What scores outputs.
        inputs: ``[NAME=][DTYPE:]3x224x224`` each, where no data tells.
        image_size: For a folder of images.
        mean: For a folder of images.
        std: For a folder of images.
        runtime: Which runtime loads a file; a folder says so itself.
        device: Where it is measured.
        threads: Cores that the runtime may use.
        limits: How long and how well to measure.
        seed: Of random inputs and of the bootstrap.
        progress: Where long work says how far it is.

    Returns:
        The fields of a measurement, ``metric`` and ``sha256``; ``baseline`` beside them where there is a
        twin.

    Raises:
        UserError: The input is at fault.
        RunnerError: The runtime crashed or hangs.
    """
    given = [delivered(path, runtime) for path in (artifact, twin) if path is not None]
    target = fit_targets(given[0].artifact.runtime, threads, device, given[0].target.isa)[0]
    target = replace(target, options=given[0].target.options)
    weighed, other = given[0].artifact, given[1].artifact if len(given) > 1 else None
    if other is not None and other.runtime != weighed.runtime:
        raise TargetError(
            f"'{artifact}' is for {weighed.runtime} and '{twin}' for {other.runtime}",
            fix=f"lower the twin for {weighed.runtime}",
        )
    return weigh_files(
        weighed,
        other,
        load_examples(
            data, metric=metric, inputs=inputs, image_size=image_size, mean=mean, std=std, seed=seed
        ),
        target,
        scored=data is not None,
        limits=limits or Limits(),
        seed=seed,
        progress=progress or Silent(),
    )


def inspect(
    model: str,
    *,
    data: str | Data | None = None,
    weights: str | None = None,
    metric: str | None = None,
    inputs: Sequence[str] = (),
    image_size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    examples: int = 256,
    threads: int = 1,
    static: bool = False,
    seed: int = 0,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Where the cost is, layer by layer: size, work, memory, measured time, and sensitivity with data.

    Args are those of :func:`fit`, and:
        examples: Scored examples that the sensitivity takes at most.
        static: Measure nothing.

    Returns:
        Totals and rows, described in docs/inspect.md.

    Raises:
        UserError: The input is at fault.
        RunnerError: ONNX Runtime crashed.
    """
    shown = progress or Silent()
    if examples < 1:
        raise DataError(f"{examples} examples are none", fix="--examples 256")
    given = None
    if data is None and (image_size, mean, std) == (None, None, None):
        original = load_original(model, weights=weights, inputs=inputs, allow_pickle=allow_pickle)
    else:
        sources = load_sources(
            model,
            data=data,
            weights=weights,
            metric=metric,
            inputs=inputs,
            image_size=image_size,
            mean=mean,
            std=std,
            seed=seed,
            allow_pickle=allow_pickle,
        )
        original, given = sources.model, sources.data
        tell_notes(sources, shown)
    follow(original)
    if not static:
        check_cores(threads)
    return inspect_model(
        original, given, examples=examples, threads=threads, static=static, seed=seed, progress=shown
    )


def report(folder: str | Path) -> dict[str, Any]:
    """Write ``report.html`` again from ``result.json`` of a folder that :func:`fit` wrote.

    Raises:
        OutputError: There is no such file, or it is no result.
    """
    place = Path(folder)
    if not (place / MARK).is_file():
        raise OutputError(f"'{place}' holds no {MARK}", fix="name a folder that featherweight fit wrote")
    try:
        result = Result.model_validate_json((place / MARK).read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputError(
            f"'{place / MARK}' is no result of this version: {_first_finding(error)}",
            fix="run featherweight fit again with --force",
        ) from error
    with told_as_machine_error("the report"):
        unfinished = place / ".report.html.partial"
        unfinished.write_text(reports.render(result), encoding="utf-8")
        unfinished.replace(place / "report.html")
    return {"report": str(place / "report.html"), "met": result.met}


def _first_finding(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg'].lower()}"


def demo(*, out: str | Path, force: bool = False, progress: Progress | None = None) -> Result:
    """Fit the shipped ResNet-20 for Fashion-MNIST to at most 0.5 % drop and 350 KB.

    Raises:
        LoadError: featherweight was installed without the repository, which holds the example.
    """
    example = Path(__file__).parents[2] / "examples" / "fashion_mnist"
    if not example.is_dir():
        raise LoadError(
            "the example is part of the repository, which is not here", fix="git clone, make demo"
        )
    return fit(
        f"{example / 'nets.py'}:resnet20",
        str(example / "data.npz"),
        weights=str(example / "resnet20.safetensors"),
        budget=Budget(quality_drop=0.005, bytes=350_000),
        trials=2,
        out=out,
        force=force,
        progress=progress,
    )
