"""Commands that make something of a network and write it to --out: fit, apply, lower, demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from featherweight import terminal
from featherweight.cli import options
from featherweight.terminal import Bars

if TYPE_CHECKING:
    from featherweight.outcome import Result

NOT_MET = 3


def fit(
    model: options.Model,
    out: options.Out,
    data: options.Data = None,
    weights: options.Weights = None,
    metric: options.Metric = None,
    max_drop: options.MaxDrop = None,
    max_size: options.MaxSize = None,
    max_latency: options.MaxLatency = None,
    max_memory: options.MaxMemory = None,
    prefer: options.Prefer = options.Preference.BALANCED,
    confident: options.Confident = False,
    runtime: options.Runtimes = "onnxruntime",
    device: options.Device = "local",
    isa: options.Isa = "",
    recipe: options.Recipe = None,
    trials: options.Trials = None,
    time: options.Time = "10m",
    sampler: options.Sampler = options.SamplerName.AUTO,
    measure_time: options.MeasureTime = "20s",
    batch: options.Batch = 1,
    threads: options.Threads = 1,
    tune: options.Tune = True,
    robustness: options.Robustness = None,
    devices: options.Devices = 1,
    precision: options.Precision = "32",
    seed: options.Seed = 0,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    inputs: options.Inputs = None,
    student: options.Student = None,
    student_weights: options.StudentWeights = None,
    teacher: options.Teacher = None,
    teacher_weights: options.TeacherWeights = None,
    resume: options.Resume = False,
    force: options.Force = False,
    allow_pickle: options.Pickle = False,
    workers: options.Workers = None,
    cluster: options.Cluster = None,
    study: options.Study = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Find the best artifact of MODEL within a budget.

    Writes to --out: the artifact, recipe.yaml, result.json, report.html, model_card.md,
    artifact.json and programs that load it (load.py, load.cpp ...). Running again resumes; a
    finished run is read from the store. Ctrl-C hands back the best so far, and --resume goes on.

    Without --recipe, --time decides the effort, with a timed pass of the network: a large one
    gets less of it. The report says which one it was, and what more time would add.

    \b
    Effort    from     what is tried
    quick     -        fold, 8-bit quantization, bias correction
    standard  > 1m     also equalization, rounding by GPTQ and by blocks, several settings; for
                       transformers activations on the fly, and weights alone in 8 and 4 bits;
                       with examples to train on, pruned and shrunk networks, fine-tuned
    thorough  >= 15m   also mixed precision, fine-tuned integers and zeros, more iterations
                       and settings; smaller networks without training, too

    \b
    Examples:
      featherweight fit net.py:resnet20 --weights net.safetensors --data data.npz \\
        --max-drop 0.5% --max-size 350KB --out fitted
      featherweight fit model.onnx --data photos/ --image-size 224 --max-latency 5ms --out fitted
      featherweight fit net.py:net --input 3x32x32 --recipe int8.yaml --out fitted
      featherweight fit net.py:net --data data.npz --max-drop 0.5% --time 30m --out fitted
      featherweight fit net.py:net --data data.npz --runtime any --prefer latency --out fitted
      featherweight fit net.py:net --data data.npz --device ssh:pi@board --max-latency 20ms --out fitted
      featherweight fit net.py:net --data data.npz --time 30m --workers 4 --out fitted
    """
    from featherweight.outcome import parse_time

    budget = options.budget(max_drop, max_size, max_latency, max_memory)
    time_limit = parse_time(time, "--time", "5m")
    limits = options.limits(measure_time, batch)

    from featherweight import api  # what is mistyped is told before torch is imported

    with Bars(quiet) as progress:
        result = api.fit(
            model,
            data,
            out=out,
            weights=weights,
            metric=metric,
            budget=budget,
            prefer=prefer.value,
            confident=confident,
            runtime=runtime,
            device=device,
            isa=isa,
            recipe=recipe,
            trials=trials,
            time_limit=time_limit,
            sampler=sampler.value,
            limits=limits,
            threads=threads,
            tune=tune,
            robustness=robustness,
            devices=devices,
            precision=cast(Any, precision),
            seed=seed,
            image_size=image_size,
            mean=mean,
            std=std,
            inputs=inputs or (),
            student=student,
            student_weights=student_weights,
            teacher=teacher,
            teacher_weights=teacher_weights,
            resume=resume,
            force=force,
            allow_pickle=allow_pickle,
            workers=workers,
            cluster=cluster,
            study=study,
            progress=progress,
        )
    show_result(result, out, quiet, as_json)


def apply(
    model: options.Model,
    recipe: options.NeededRecipe,
    out: options.Out,
    data: options.Data = None,
    weights: options.Weights = None,
    inputs: options.Inputs = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    runtime: options.Runtime = "onnxruntime",
    student: options.Student = None,
    student_weights: options.StudentWeights = None,
    teacher: options.Teacher = None,
    teacher_weights: options.TeacherWeights = None,
    devices: options.Devices = 1,
    precision: options.Precision = "32",
    seed: options.Seed = 0,
    force: options.Force = False,
    allow_pickle: options.Pickle = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Apply a recipe and write the changed model.

    Writes to --out: weights.safetensors, model.json (what changed, and how tensors will be
    stored) and recipe.yaml. No pickle. Nothing is measured.

    \b
    Example:
      featherweight apply net.py:net --weights net.safetensors --recipe int8.yaml \\
        --data data.npz --out changed
    """
    from featherweight import api

    with Bars(quiet) as progress:
        summary = api.apply(
            model,
            recipe,
            out=out,
            data=data,
            weights=weights,
            inputs=inputs or (),
            image_size=image_size,
            mean=mean,
            std=std,
            runtime=runtime,
            student=student,
            student_weights=student_weights,
            teacher=teacher,
            teacher_weights=teacher_weights,
            devices=devices,
            precision=cast(Any, precision),
            seed=seed,
            force=force,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    _show_summary(summary, quiet, as_json)


def lower(
    model: options.Model,
    out: options.Out,
    recipe: options.FilledRecipe = None,
    data: options.Data = None,
    weights: options.Weights = None,
    inputs: options.Inputs = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    runtime: options.Runtime = "onnxruntime",
    isa: options.Isa = "",
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    force: options.Force = False,
    allow_pickle: options.Pickle = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Write MODEL's artifact, as it is or after a recipe.

    Writes to --out: the files that the runtime loads, artifact.json (their digest and what is stored
    in which type), programs that load it and, where one was given, recipe.yaml. Nothing is measured.

    \b
    Example: the twin that 'featherweight measure' compares with
      featherweight lower net.py:net --weights net.safetensors --input 3x32x32 --out twin
    """
    from featherweight import api

    with Bars(quiet) as progress:
        summary = api.lower(
            model,
            out=out,
            recipe=recipe,
            data=data,
            weights=weights,
            inputs=inputs or (),
            image_size=image_size,
            mean=mean,
            std=std,
            runtime=runtime,
            isa=isa,
            threads=threads,
            seed=seed,
            force=force,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    _show_summary(summary, quiet, as_json)


def demo(
    out: options.Out = Path("demo"),
    force: options.Force = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Fit the shipped ResNet-20 into 350KB.

    At most 0.5% of its accuracy on Fashion-MNIST may be lost. Works in a clone of the repository.

    \b
    Example:
      featherweight demo --out demo
    """
    from featherweight import api

    with Bars(quiet) as progress:
        result = api.demo(out=out, force=force, progress=progress)
    show_result(result, out, quiet, as_json)


def show_result(result: Result, out: Path, quiet: bool, as_json: bool) -> None:
    """Print what a fit handed back, and end with 0, or 3 where the budget is not met."""
    if as_json or not quiet:
        terminal.print_result(result, out, as_json)
    raise typer.Exit(0 if result.met else NOT_MET)


def _show_summary(summary: dict[str, Any], quiet: bool, as_json: bool) -> None:
    if as_json or not quiet:
        terminal.print_summary(summary, as_json)
