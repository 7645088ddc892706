"""``fit``: load, ask for recipes, weigh what they make, hand the best one back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from featherweight.api.handing import copy_files, deliver
from featherweight.data import Data
from featherweight.engine.effort import Plan, plan
from featherweight.engine.environment import describe_device
from featherweight.engine.fit import Fit
from featherweight.engine.journal import Journal, asked
from featherweight.engine.lanes import make_lanes
from featherweight.engine.output import MARK, check_other_run, check_output, write_folder
from featherweight.engine.question import Question
from featherweight.engine.run import Run
from featherweight.engine.samplers import SamplerName, known_sampler
from featherweight.engine.sources import (
    Given,
    TaskNetworks,
    follow,
    load_sources,
    scoring_code,
    several_entries,
)
from featherweight.engine.start import auto_run, start_runs, warn_of_idle_teacher
from featherweight.engine.store import digest
from featherweight.engine.student_choice import SHARE, choose_student
from featherweight.engine.students import lesson_of
from featherweight.engine.targets import fit_targets
from featherweight.engine.timetable import longest_measurement
from featherweight.engine.timing import Limits
from featherweight.engine.training_options import recipe_code, training_options
from featherweight.engine.workers import hired
from featherweight.engine.workers_bench import site
from featherweight.engine.workers_cluster import in_cluster, placed
from featherweight.errors import (
    BudgetError,
    FeatherweightError,
    LoadError,
    nearest,
)
from featherweight.figures import seconds
from featherweight.method import Precision, Progress, Silent
from featherweight.outcome import AXES, Budget, Preference, Result
from featherweight.recipe import Recipe
from featherweight.tasks import tasks_in

_TRIALS = 8  # of a recipe with holes and no --trials
_FEW = 3  # trials for which no ladder is worth its rungs


@in_cluster
def fit(
    model: str | TaskNetworks,
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
    sampler: SamplerName = "auto",
    tune: bool = True,
    robustness: bool | None = None,
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
    resume: bool = False,
    force: bool = False,
    allow_pickle: bool = False,
    workers: int | None = None,
    cluster: str | None = None,
    study: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Find the best artifact of a model within a budget and write it to ``out``.

    Args:
        model: ``path.py:callable``, ``package.module:callable``, model.onnx or model.pt2; or the networks of
            several tasks, as ``merge`` gives them, side by side.
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
        sampler: What proposes recipes: tpe, nsga2, random, or auto, which is tpe but for some hundred trials.
        tune: Measure the chosen artifact with those of the runtime's options that are fastest for it.
        robustness: Tell what compression did to scores on corrupted pictures, to calibration and to what a
            loss gives away of the training set (docs/robustness.md); by default in a twentieth of the time.
        devices: Processes that share each batch where a step trains: on as many cores, or GPUs.
        precision: In which steps train: 32, bf16-mixed or 16-mixed.
        seed: The only source of randomness.
        image_size: For a folder of images.
        mean: For a folder of images.
        std: For a folder of images.
        inputs: ``[NAME=][DTYPE:]3x224x224`` each, where no data tells.
        student: Another network that the steps start from; the model stays what it is compared with. One of
            ``featherweight.nets`` (``mobilenetv2:width=0.35``) is built for the model's inputs and outputs;
            ``auto`` chooses it by the budget.
        student_weights: Of the student's module.
        teacher: Another network that a step with ``teacher: teacher`` learns from.
        teacher_weights: Of the teacher's module.
        resume: Go on with the search into ``out`` that was interrupted, killed or out of time: its trials
            count among ``trials``, ``time_limit`` begins anew, and it tries what it had planned. Where there
            is none, it begins.
        force: Replace what is in ``out``.
        allow_pickle: Load pickled modules, which runs their code.
        workers: Trials at a time, carried out by Ray (extra ``ray``); None: one, by this process.
        cluster: Address of a Ray cluster that carries them out, ``host:port`` or ``auto``; the target is its
            machine with a label: ``device="ray:LABEL"``.
        study: URL of a database where the search keeps its study, instead of a file in the store.
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
    workers_at = placed(workers, cluster, device, devices)
    targets = fit_targets(runtime, threads, device, isa)
    training = training_options(devices, precision)
    question = _question(recipe, budget or Budget(), prefer, confident, trials, time_limit)
    question = replace(
        question, tune=tune, started=started, sampler=known_sampler(sampler), robustness=robustness
    )
    given = {
        "model": model, "weights": weights, "data": data, "inputs": inputs, "metric": metric,
        "image_size": image_size, "mean": mean, "std": std, "seed": seed, "allow_pickle": allow_pickle,
    }  # fmt: skip
    sources = load_sources(**given)  # type: ignore[arg-type]
    if "forward" not in sources.model.entries:
        raise several_entries(sources.model, str(model), "fit scores one")
    _check_drops(question.budget, sources.data)
    learner, taught_by = Given(student, student_weights), Given(teacher, teacher_weights)
    choice = None
    if learner.auto:
        choice = choose_student(
            auto_run(
                sources,
                targets[0],
                learner,
                taught_by,
                seed=seed,
                progress=shown,
                allow_pickle=allow_pickle,
                **training,
            ),
            question,
        )
        learner = choice.student
    runs = start_runs(
        sources, targets, learner, taught_by, seed=seed, progress=shown, allow_pickle=allow_pickle, **training
    )
    if not question.open_ended:
        warn_of_idle_teacher(taught_by, question.recipe, shown)
    limits = limits or Limits()
    journal, asked_for = Journal(runs[0].store, place), asked(runs, question, limits)
    known = journal.kept(asked_for) if resume else None
    if known is not None:
        limits = known.limits
    elif question.searches:
        limits = replace(limits, seconds=longest_measurement(limits.seconds, time_limit))
    if resume and known is None:
        shown.note("there is no search to resume: it begins")
    if question.open_ended:
        follow(runs[0].start)
        lesson = lesson_of(runs[0].start) if learner.fresh else None
        left = (1 - SHARE if choice else 1.0) * time_limit
        question = _planned(
            question, runs, trials, shown, None if known is None else known.plan, lesson, left
        )
    question = replace(question, ladder=question.trials > _FEW)
    name = Path(model.rpartition(":")[2] or model).stem if isinstance(model, str) else "-".join(model)
    key = _run_key(runs, question, limits, [name, learner.name, taught_by.name])
    check_other_run(place, force, [key, *(known.runs if known else ())])
    store = runs[0].store
    kept = store.get("runs", key)
    if kept is None:
        follow(sources.model)
        follow(runs[0].start)
        if not question.searches and len(runs) == 1:  # what is wrong shows before anything is measured
            runs[0].apply(question.recipe)
        left_out: dict[str, FeatherweightError] = {}
        lanes = make_lanes(runs, limits, failures=left_out)
        if known is None:
            journal.begin(asked_for, limits, question.plan, key)
        else:
            journal.go_on(known, key)
        question = replace(question, journal=study or journal.file, anew=study is not None and not resume)
        loaded = partial(site, given, learner, taught_by, runs, limits, training)
        with hired(workers_at, loaded, device, shown) as crew:
            fitted = Fit(lanes, question, left_out, crew).answer()
        told: dict[str, Any] = {"run": key, "student": learner.name, "teacher": taught_by.name}
        told["students"] = list(choice.rows) if choice else []
        fitted = replace(fitted, result=fitted.result.model_copy(update=told))
        if not fitted.finished:
            write_folder(place, lambda folder: deliver(folder, fitted, name))
            return fitted.result
        kept = store.put("runs", key, lambda folder: deliver(folder, fitted, name))
        store.trim()
    source = kept
    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    write_folder(place, lambda folder: copy_files(source, files, folder))
    return Result.model_validate_json((source / MARK).read_text(encoding="utf-8"))


def _question(
    recipe: str | Recipe | None,
    budget: Budget,
    prefer: Preference,
    confident: bool,
    trials: int | None,
    time_limit: float,
) -> Question:
    limits = {axis: getattr(budget, axis) for axis in AXES}
    for axis, limit in [*limits.items(), *(budget.drops or {}).items()]:
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


def _check_drops(budget: Budget, data: Data) -> None:
    """Refuse limits of tasks that there are not."""
    known = [task.name for task in tasks_in(data)]
    for name in budget.drops or {}:
        if name not in known:
            raise BudgetError(f"a drop is limited of '{name}', which is no task", fix=nearest(name, known))


def _planned(
    question: Question,
    runs: Sequence[Run],
    trials: int | None,
    progress: Progress,
    known: Plan | None,
    lesson: Mapping[str, Any] | None,
    left: float,
) -> Question:
    """The question with what to try: it follows from the time and from how long a pass takes here.

    A search that goes on tries what it had planned.
    """
    if known is None:
        made = plan(runs[0], left, question.budget, trials, lesson)
        if trials is None:  # the first way is tried on each runtime
            made = replace(made, trials=made.trials + len(runs) - 1)
    else:
        made = replace(known, time_s=left, trials=known.trials if trials is None else trials)
    progress.note(
        f"effort {made.level}: {', then '.join(made.ways)}; {made.trials} trials at most in "
        f"{seconds(left)} ({seconds(made.example_s)} a pass of one example). {made.longer}"
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
        [question.tune, question.recipe.to_dict(), question.sampler, question.robustness],
        []
        if question.plan is None
        else [[way, steps.to_dict()] for way, steps in question.plan.ways.items()],
        [[one.target.to_json(), describe_device(one.target).model_dump(mode="json")] for one in runs],
        asdict(limits),
        run.seed,
        [run.devices, run.precision, recipe_code(question.recipe)],
        run.sources,
    )


def demo(*, out: str | Path, force: bool = False, progress: Progress | None = None) -> Result:
    """Fit the shipped ResNet-20 for Fashion-MNIST to at most 0.5 % drop and 350 KB.

    Raises:
        LoadError: featherweight was installed without the repository, which holds the example.
    """
    example = Path(__file__).parents[3] / "examples" / "fashion_mnist"
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
