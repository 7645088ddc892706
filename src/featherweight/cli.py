"""The command line: one thin command per function of ``api.py``.

Results go to standard output, everything else (progress, warnings, errors) to
standard error. Exit codes: 0 done and within the budget; 3 done, but not within
it; 2 the input is at fault; 1 the machine or we are; 130 interrupted with nothing
to hand back. Imports nothing heavy at its top: ``--help`` answers at once.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from featherweight import terminal
from featherweight.terminal import Bars

if TYPE_CHECKING:
    from featherweight.engine.timing import Limits
    from featherweight.outcome import Budget, Result

NOT_MET = 3
INTERRUPTED = 130
_LATER_S = 0.01

# Typer raises click's usage errors, or since 0.27 those of its own copy of click.
_UsageError: type = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="featherweight",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fits a trained neural network into a budget: quality drop, bytes, latency, memory.\n\n"
    "Every number is measured on the artifact, through the runtime that will load it.\n\n"
    "\b\nExample:\n"
    "  featherweight fit net.py:resnet20 --weights net.safetensors --data data.npz \\\n"
    "    --max-drop 0.5% --max-size 350KB --out fitted",
    epilog="\b\nExit codes: 0 within the budget; 3 finished, not within it (best so far delivered);\n"
    "2 the input is at fault; 1 the machine or featherweight is; 130 interrupted.\n\n"
    "Finished work is kept in ~/.cache/featherweight, so running again resumes; the environment variable "
    "FEATHERWEIGHT_CACHE names another folder.",
)


class Prefer(StrEnum):
    """What is best among artifacts within the budget."""

    BALANCED = "balanced"
    LATENCY = "latency"
    BYTES = "bytes"
    QUALITY = "quality"


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="path.py:callable or package.module:callable that returns the module, a file (.onnx, .pt2, "
        ".keras, .h5), or a Hugging Face folder.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Weights of the callable's module: .safetensors, or a torch state dict.",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="file.npz (x, y, x_train, y_train, x_calibration), a folder of class-named folders of images, "
        "or path.py:callable. Without it inputs are random.",
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="METRIC",
        help="accuracy, top5, f1, mse, mae, pearson, perplexity, wer, cer, agreement, sqnr, "
        "or path.py:callable. By default it follows from the labels.",
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="Without data: one input, [NAME=][DTYPE:]SIZES with the batch left out, e.g. 3x224x224 or "
        "ids=int64:128. Once for each input.",
    ),
]
Student = Annotated[
    str | None,
    typer.Option(
        "--student",
        metavar="MODEL",
        help="Another network with MODEL's inputs and outputs, from which the steps start; it learns from "
        "MODEL and is compared with it.",
    ),
]
StudentWeights = Annotated[
    str | None,
    typer.Option(
        "--student-weights", metavar="FILE", help="Weights of the student's module, if it has some."
    ),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="MODEL",
        help="Another network, from which steps with 'teacher: teacher' learn; by default they learn from "
        "MODEL.",
    ),
]
TeacherWeights = Annotated[
    str | None, typer.Option("--teacher-weights", metavar="FILE", help="Weights of the teacher's module.")
]
Devices = Annotated[
    int,
    typer.Option(
        "--devices",
        metavar="N",
        min=1,
        help="Processes that share each batch where a step trains: on as many GPUs, or cores without any.",
    ),
]
PrecisionOption = Annotated[
    str,
    typer.Option("--precision", metavar="KIND", help="In which steps train: 32, bf16-mixed or 16-mixed."),
]
ImageSize = Annotated[
    str | None,
    typer.Option(
        "--image-size", metavar="SIZE", help="For a folder of images: 224, or height x width: 28x32."
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        "--mean",
        metavar="NUMBERS",
        help="For a folder of images, of values in 0..1: 0.5, or 0.485,0.456,0.406.",
    ),
]
Std = Annotated[
    str | None,
    typer.Option("--std", metavar="NUMBERS", help="For a folder of images: 0.5, or 0.229,0.224,0.225."),
]
RuntimeOption = Annotated[
    str,
    typer.Option(
        "--runtime", metavar="NAME", help="What will load the artifact; see: featherweight runtimes."
    ),
]
RuntimesOption = Annotated[
    str,
    typer.Option(
        "--runtime",
        metavar="NAMES",
        help="What will load the artifact: one name, several with commas, or 'any': the fastest of all that "
        "are installed, found by measuring.",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where it is measured: local, ssh:[user@]host[:port], or adb:serial (experimental).",
    ),
]
IsaOption = Annotated[
    str,
    typer.Option(
        "--target-isa",
        metavar="ISA",
        show_default="the device's",
        help="Instruction set that integer ranges follow from: avx2, avx512, vnni, armv8, armv8.2-dotprod, "
        "generic.",
    ),
]
Batch = Annotated[
    int, typer.Option("--batch", metavar="N", min=1, help="Examples per call of the throughput.")
]
Threads = Annotated[
    int, typer.Option("--threads", metavar="N", min=1, help="Cores that the runtime may use.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="The only source of randomness.")]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="DIR",
        show_default=False,
        help="Folder to write; one that holds another run is refused.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the run that --out holds.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors; the result is in --out.")]
NoBars = Annotated[bool, typer.Option("--quiet", help="No progress bars and no remarks.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, errors too.")]
Pickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Load pickled modules. This runs code that the file holds.")
]
RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE", help="Steps in YAML; what they leave open is searched."),
]
FilledRecipe = Annotated[
    str | None, typer.Option("--recipe", metavar="FILE", help="Steps in YAML that leave nothing open.")
]
MaxDrop = Annotated[
    str | None,
    typer.Option(
        "--max-drop",
        metavar="DROP",
        help="Largest quality drop: 0.5% or 0.005. Absolute for scores in 0..1 (accuracy 93.0% to 92.5%), "
        "else a fraction of the original's score.",
    ),
]
MaxSize = Annotated[
    str | None,
    typer.Option(
        "--max-size",
        metavar="SIZE",
        help="Largest sum of the files: 300KB (1000 bytes each), 4MiB (1024 KiB).",
    ),
]
MaxLatency = Annotated[
    str | None,
    typer.Option("--max-latency", metavar="TIME", help="Largest median latency of one example: 5ms, 800us."),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory", metavar="SIZE", help="Largest peak memory above that of the imported runtime: 50MB."
    ),
]
MeasureTime = Annotated[
    str,
    typer.Option(
        "--measure-time",
        metavar="TIME",
        help="Time limit of one latency measurement; a short one may leave it unresolved.",
    ),
]


@app.command()
def fit(
    model: ModelArgument,
    out: Out,
    data: DataOption = None,
    weights: Weights = None,
    metric: Metric = None,
    max_drop: MaxDrop = None,
    max_size: MaxSize = None,
    max_latency: MaxLatency = None,
    max_memory: MaxMemory = None,
    prefer: Annotated[
        Prefer,
        typer.Option(
            "--prefer", help="What is best within the budget; balanced is the smallest latency x bytes."
        ),
    ] = Prefer.BALANCED,
    confident: Annotated[
        bool,
        typer.Option(
            "--confident",
            help="The upper end of the drop's 95% interval must keep the limit, not the estimate.",
        ),
    ] = False,
    runtime: RuntimesOption = "onnxruntime",
    device: DeviceOption = "local",
    isa: IsaOption = "",
    recipe: RecipeOption = None,
    trials: Annotated[
        int | None,
        typer.Option(
            "--trials",
            metavar="N",
            min=1,
            show_default=False,
            help="Artifacts to measure at most; by default 3, 8 or 16, as the effort is; 8 with a recipe "
            "that leaves something open, 1 with one that does not.",
        ),
    ] = None,
    time: Annotated[
        str,
        typer.Option(
            "--time",
            metavar="TIME",
            help="Time that there is: 30s, 5m, 30m, 2h. It decides the effort (see above). No trial starts "
            "that would be ready later, and steps end with it; the first answer always comes.",
        ),
    ] = "10m",
    measure_time: MeasureTime = "20s",
    batch: Batch = 1,
    threads: Threads = 1,
    tune: Annotated[
        bool, typer.Option("--tune/--no-tune", help="Measure which of the runtime's options are fastest.")
    ] = True,
    devices: Devices = 1,
    precision: PrecisionOption = "32",
    seed: Seed = 0,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    inputs: Inputs = None,
    student: Student = None,
    student_weights: StudentWeights = None,
    teacher: Teacher = None,
    teacher_weights: TeacherWeights = None,
    force: Force = False,
    allow_pickle: Pickle = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Find the best artifact of MODEL within a budget.

    Writes to --out: the artifact, recipe.yaml, result.json, report.html, model_card.md,
    artifact.json and programs that load it (load.py, load.cpp ...). Running again resumes; a
    finished run is read from the store. Ctrl-C hands back the best so far.

    Without --recipe, --time decides the effort, with a timed pass of the network: a large one
    gets less of it. The report says which one it was, and what more time would add.

    \b
    Effort    from     what is tried
    quick     -        fold, 8-bit quantization, bias correction
    standard  > 1m     also equalization, rounding by GPTQ and by blocks, several settings; for
                       transformers activations on the fly, and weights alone in 8 and 4 bits
    thorough  >= 15m   also mixed precision, more iterations and settings

    \b
    Examples:
      featherweight fit net.py:resnet20 --weights net.safetensors --data data.npz \\
        --max-drop 0.5% --max-size 350KB --out fitted
      featherweight fit model.onnx --data photos/ --image-size 224 --max-latency 5ms --out fitted
      featherweight fit net.py:net --input 3x32x32 --recipe int8.yaml --out fitted
      featherweight fit net.py:net --data data.npz --max-drop 0.5% --time 30m --out fitted
      featherweight fit net.py:net --data data.npz --runtime any --prefer latency --out fitted
      featherweight fit net.py:net --data data.npz --device ssh:pi@board --max-latency 20ms --out fitted
    """
    from featherweight import api
    from featherweight.outcome import parse_time

    with Bars(quiet) as progress:
        result = api.fit(
            model,
            data,
            out=out,
            weights=weights,
            metric=metric,
            budget=_budget(max_drop, max_size, max_latency, max_memory),
            prefer=prefer.value,
            confident=confident,
            runtime=runtime,
            device=device,
            isa=isa,
            recipe=recipe,
            trials=trials,
            time_limit=parse_time(time, "--time", "5m"),
            limits=_limits(measure_time, batch),
            threads=threads,
            tune=tune,
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
            force=force,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    _show_result(result, out, quiet, as_json)


@app.command("apply")
def apply_(
    model: ModelArgument,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe", metavar="FILE", show_default=False, help="Steps in YAML that leave nothing open."
        ),
    ],
    out: Out,
    data: DataOption = None,
    weights: Weights = None,
    inputs: Inputs = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    runtime: RuntimeOption = "onnxruntime",
    student: Student = None,
    student_weights: StudentWeights = None,
    teacher: Teacher = None,
    teacher_weights: TeacherWeights = None,
    devices: Devices = 1,
    precision: PrecisionOption = "32",
    seed: Seed = 0,
    force: Force = False,
    allow_pickle: Pickle = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
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


@app.command()
def lower(
    model: ModelArgument,
    out: Out,
    recipe: FilledRecipe = None,
    data: DataOption = None,
    weights: Weights = None,
    inputs: Inputs = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    runtime: RuntimeOption = "onnxruntime",
    isa: IsaOption = "",
    threads: Threads = 1,
    seed: Seed = 0,
    force: Force = False,
    allow_pickle: Pickle = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
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


@app.command()
def compare(
    first: Annotated[
        Path,
        typer.Argument(
            metavar="A", show_default=False, help="A folder that fit or lower wrote: the reference."
        ),
    ],
    second: Annotated[
        Path, typer.Argument(metavar="B", show_default=False, help="Another one, for any runtime.")
    ],
    data: DataOption = None,
    inputs: Inputs = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    below: Annotated[
        float,
        typer.Option("--below", metavar="DB", help="Decibels under which two values count as different."),
    ] = 30.0,
    seed: Seed = 0,
    quiet: NoBars = False,
    as_json: AsJson = False,
) -> None:
    """Find the first layer at which two artifacts of one network part.

    Runs both on the first example and compares the values inside, layer by layer: the
    signal-to-noise ratio of B's against A's, in decibels, and what each layer loses of it.

    \b
    Examples:
      featherweight compare twin fitted --data data.npz
      featherweight compare onnxruntime openvino --input 3x224x224 --json
    """
    from featherweight import api

    with Bars(quiet) as progress:
        summary = api.compare(
            first,
            second,
            data=data,
            inputs=inputs or (),
            image_size=image_size,
            mean=mean,
            std=std,
            below=below,
            seed=seed,
            progress=progress,
        )
    terminal.print_comparison(summary, as_json)


@app.command()
def measure(
    artifact: Annotated[
        Path,
        typer.Argument(
            metavar="ARTIFACT",
            show_default=False,
            help="A folder that fit or lower wrote, or a file that the runtime loads.",
        ),
    ],
    twin: Annotated[
        Path | None,
        typer.Option("--twin", metavar="PATH", help="What to compare with: the original, written by lower."),
    ] = None,
    data: DataOption = None,
    metric: Metric = None,
    inputs: Inputs = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    runtime: RuntimeOption = "onnxruntime",
    device: DeviceOption = "local",
    measure_time: MeasureTime = "20s",
    batch: Batch = 1,
    threads: Threads = 1,
    seed: Seed = 0,
    quiet: NoBars = False,
    as_json: AsJson = False,
) -> None:
    """Weigh an artifact: latency, memory, quality.

    With a twin, latency is measured in turn with it; with data, so is quality.
    Latencies are in seconds of one call with one example, memory and sizes in bytes.

    \b
    Examples:
      featherweight measure fitted/model.onnx --input 3x32x32
      featherweight measure fitted/model.onnx --twin twin/model.onnx --data data.npz --json
    """
    from featherweight import api

    with Bars(quiet) as progress:
        summary = api.measure(
            artifact,
            twin=twin,
            data=data,
            metric=metric,
            inputs=inputs or (),
            image_size=image_size,
            mean=mean,
            std=std,
            runtime=runtime,
            device=device,
            limits=_limits(measure_time, batch),
            threads=threads,
            seed=seed,
            progress=progress,
        )
    terminal.print_measurement(summary, as_json)


@app.command()
def inspect(
    model: ModelArgument,
    data: DataOption = None,
    weights: Weights = None,
    metric: Metric = None,
    inputs: Inputs = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    examples: Annotated[
        int,
        typer.Option(
            "--examples", metavar="N", min=1, help="Scored examples that the sensitivity takes at most."
        ),
    ] = 256,
    threads: Threads = 1,
    static: Annotated[
        bool, typer.Option("--static", help="Measure nothing: no latency, no profile.")
    ] = False,
    seed: Seed = 0,
    allow_pickle: Pickle = False,
    quiet: NoBars = False,
    as_json: AsJson = False,
) -> None:
    """Show where the cost is, layer by layer.

    Parameters, work and memory are counted for one example; latency is each layer's share of the
    kernels' time in ONNX Runtime's profile. With --data there is the drop when that layer's weights alone
    are stored in 8 and in 4 bits, simulated.

    \b
    Examples:
      featherweight inspect net.py:net --input 3x32x32
      featherweight inspect net.py:net --weights net.safetensors --data test.npz
    """
    from featherweight import api

    with Bars(quiet) as progress:
        summary = api.inspect(
            model,
            data=data,
            weights=weights,
            metric=metric,
            inputs=inputs or (),
            image_size=image_size,
            mean=mean,
            std=std,
            examples=examples,
            threads=threads,
            static=static,
            seed=seed,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    terminal.print_inspected(summary, as_json)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", show_default=False, help="A folder that fit wrote.")
    ],
    as_json: AsJson = False,
) -> None:
    """Write DIR/report.html again from DIR/result.json.

    \b
    Example:
      featherweight report fitted
    """
    from featherweight import api

    terminal.print_summary(api.report(folder), as_json)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods that recipes may name.

    \b
    Example: a step of a recipe
      - quantize: {range: percentile, where: {exclude: [head]}}
    """
    from featherweight import api

    found = api.methods()
    if as_json:
        terminal.print_json(found)
        return
    for name, about in found.items():
        terminal.print_text(f"{name} ({about['kind']}): {about['summary']}")
        for parameter, said in about["parameters"].items():
            terminal.print_text(f"    {parameter}: {said}")


@app.command()
def runtimes(as_json: AsJson = False) -> None:
    """List the runtimes, and how to install those that are missing.

    \b
    Example: name one of them
      featherweight fit net.py:net --data data.npz --runtime onnxruntime --out fitted
    """
    from featherweight import api

    found = api.runtimes()
    if as_json:
        terminal.print_json(found)
        return
    terminal.print_table(
        ["runtime", "version", "to install", ""],
        [
            [name, about["version"] or "not installed", about["install"], about["unmeasured"]]
            for name, about in found.items()
        ],
    )


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Tell what this machine is, and which runtimes work.

    Each runtime runs a small network, which is compared with PyTorch. Exit code 1 when
    one that is installed does not work, or when none is installed.

    \b
    Example:
      featherweight doctor --json
    """
    from featherweight import api

    with Bars(quiet=True):
        found = api.doctor()
    if as_json:
        terminal.print_json(found)
    else:
        rows = [
            [key, ", ".join(value) if isinstance(value, list) else str(value)]
            for key, value in found["machine"].items()
        ]
        terminal.print_table(["this machine", ""], rows)
        states = {True: "yes", False: "no", None: "not installed"}
        terminal.print_table(
            ["runtime", "works", "says"],
            [[name, states[about["works"]], about["says"]] for name, about in found["runtimes"].items()],
        )
    if not found["healthy"]:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Out = Path("demo"),
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
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
    _show_result(result, out, quiet, as_json)


def _budget(drop: str | None, size: str | None, latency: str | None, memory: str | None) -> Budget:
    from featherweight.outcome import Budget, parse_drop, parse_size, parse_time

    return Budget(
        quality_drop=None if drop is None else parse_drop(drop, "--max-drop"),
        bytes=None if size is None else parse_size(size, "--max-size"),
        latency_s=None if latency is None else parse_time(latency, "--max-latency"),
        memory_bytes=None if memory is None else parse_size(memory, "--max-memory"),
    )


def _limits(measure_time: str, batch: int = 1) -> Limits:
    from featherweight.engine.timing import Limits
    from featherweight.outcome import parse_time

    return Limits(seconds=parse_time(measure_time, "--measure-time"), batch=batch)


def _show_result(result: Result, out: Path, quiet: bool, as_json: bool) -> None:
    if as_json or not quiet:
        terminal.print_result(result, out, as_json)
    raise typer.Exit(0 if result.met else NOT_MET)


def _show_summary(summary: dict[str, Any], quiet: bool, as_json: bool) -> None:
    if as_json or not quiet:
        terminal.print_summary(summary, as_json)


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM, as ``timeout`` and ``docker stop`` send it, hands back the best so far too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _is_unheard(frame):
            threading.Timer(_LATER_S, os.kill, (os.getpid(), number)).start()
            return
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, interrupt)
    if before[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_unheard(frame: FrameType | None) -> bool:
    """Whether Python ignores what is raised here: in callbacks of weak references and in ``__del__``."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename == weakref.__file__:
            return True
        frame = frame.f_back
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; its exit code. Every error is told in words.

    Args:
        arguments: Without the program's name; None takes those of this process.
    """
    if arguments is None:
        atexit.register(
            gc.freeze
        )  # the process ends soon: collecting torch's objects then takes half a second
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    code: int | None = INTERRUPTED
    try:
        with _ended_as_by_ctrl_c():
            code = app(args=given or ["--help"], prog_name="featherweight", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last place: what is no error of ours is told as a fault
        if isinstance(error, _UsageError):
            usage = cast(typer.BadParameter, error)
            command = usage.ctx.command_path if usage.ctx else "featherweight"
            return terminal.tell_usage(usage.format_message(), f"{command} --help", as_json)
        return terminal.tell_error(error, as_json)
    if code == INTERRUPTED:
        terminal.tell_interrupted(as_json)
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
