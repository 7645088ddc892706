"""The options that commands share: each is declared here once, with what ``--help`` says of it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from featherweight.engine.timing import Limits
    from featherweight.outcome import Budget


class Preference(StrEnum):
    """What is best among artifacts within the budget."""

    BALANCED = "balanced"
    LATENCY = "latency"
    BYTES = "bytes"
    QUALITY = "quality"


class SamplerName(StrEnum):
    """What proposes the recipes of a search."""

    AUTO = "auto"
    TPE = "tpe"
    NSGA2 = "nsga2"
    RANDOM = "random"


Model = Annotated[
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
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="file.npz (x, y, x_train, y_train, x_calibration), a folder of class-named folders of images, "
        "or path.py:callable. Without it inputs are random.",
    ),
]
NeededData = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        show_default=False,
        help="file.npz (x, y, x_train, y_train), a folder of class-named folders of images, or "
        "path.py:callable.",
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
        "MODEL and is compared with it. A family of featherweight.nets, e.g. mobilenetv2:width=0.35, is "
        "built for MODEL; with auto, fit chooses family and width by the budget.",
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
Precision = Annotated[
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
Runtime = Annotated[
    str,
    typer.Option(
        "--runtime", metavar="NAME", help="What will load the artifact; see: featherweight runtimes."
    ),
]
Runtimes = Annotated[
    str,
    typer.Option(
        "--runtime",
        metavar="NAMES",
        help="What will load the artifact: one name, several with commas, or 'any': the fastest of all that "
        "are installed, found by measuring.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where it is measured: local, ssh:[user@]host[:port], ray:LABEL (with --cluster), or adb:serial "
        "(experimental).",
    ),
]
Isa = Annotated[
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
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the search into --out that was interrupted, killed or out of time; --time begins "
        "anew, and its trials count.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        min=1,
        show_default=False,
        help="Trials at a time, on a Ray that is started here (extra ray); with --cluster, on that one.",
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="ADDRESS",
        help="Trials on a Ray cluster, HOST:6379 or auto; --device ray:LABEL names the one that measures.",
    ),
]
Study = Annotated[
    str | None,
    typer.Option(
        "--study",
        metavar="URL",
        help="Database that keeps the search's study, instead of a file: postgresql://... or sqlite:///FILE.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the run that --out holds.")]
Base = Annotated[
    Path | None,
    typer.Option(
        "--base",
        metavar="OLD.fw",
        show_default=False,
        help="Write an update for those who have this bundle: only what is new is stored.",
    ),
]
UpdatedBase = Annotated[
    Path | None,
    typer.Option(
        "--base", metavar="OLD.fw", show_default=False, help="Of an update, the bundle that it is for."
    ),
]
ForceFile = Annotated[bool, typer.Option("--force", help="Replace the bundle that is there.")]
ForceFolder = Annotated[
    bool, typer.Option("--force", help="Replace a folder that fit, lower or unpack wrote.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors; the result is in --out.")]
Silent = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")]
NoBars = Annotated[bool, typer.Option("--quiet", help="No progress bars and no remarks.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, errors too.")]
Pickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Load pickled modules. This runs code that the file holds.")
]
Recipe = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE", help="Steps in YAML; what they leave open is searched."),
]
_FILLED = typer.Option(
    "--recipe", metavar="FILE", show_default=False, help="Steps in YAML that leave nothing open."
)
FilledRecipe = Annotated[str | None, _FILLED]
NeededRecipe = Annotated[str, _FILLED]
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
Prefer = Annotated[
    Preference,
    typer.Option("--prefer", help="What is best within the budget; balanced is the smallest latency x size."),
]
Sampler = Annotated[
    SamplerName,
    typer.Option(
        "--sampler",
        help="What proposes recipes: tpe learns most from few trials, nsga2 is for some hundred; auto "
        "follows their number.",
    ),
]
Confident = Annotated[
    bool,
    typer.Option(
        "--confident",
        help="The upper end of the drop's 95% interval must keep the limit, not the estimate.",
    ),
]
Trials = Annotated[
    int | None,
    typer.Option(
        "--trials",
        metavar="N",
        min=1,
        show_default=False,
        help="Artifacts to measure at most; by default 3, 8 or 16, as the effort is; 8 with a recipe "
        "that leaves something open, 1 with one that does not.",
    ),
]
Time = Annotated[
    str,
    typer.Option(
        "--time",
        metavar="TIME",
        help="Time that there is: 30s, 5m, 30m, 2h, the report included. It decides the effort (see above). "
        "No trial starts that would be ready later, and steps end with it; the first answer always comes.",
    ),
]
Tune = Annotated[
    bool, typer.Option("--tune/--no-tune", help="Measure which of the runtime's options are fastest.")
]

Robustness = Annotated[
    bool | None,
    typer.Option(
        "--robustness/--no-robustness",
        show_default="in a twentieth of the time",
        help="Also tell scores on corrupted pictures, calibration, and how well a membership attack does.",
    ),
]


def budget(drop: str | None, size: str | None, latency: str | None, memory: str | None) -> Budget:
    """What --max-drop, --max-size, --max-latency and --max-memory say."""
    from featherweight.outcome import Budget, parse_drop, parse_size, parse_time

    return Budget(
        quality_drop=None if drop is None else parse_drop(drop, "--max-drop"),
        bytes=None if size is None else parse_size(size, "--max-size"),
        latency_s=None if latency is None else parse_time(latency, "--max-latency"),
        memory_bytes=None if memory is None else parse_size(memory, "--max-memory"),
    )


def limits(measure_time: str, batch: int = 1) -> Limits:
    """What --measure-time and --batch say."""
    from featherweight.engine.timing import Limits
    from featherweight.outcome import parse_time

    return Limits(seconds=parse_time(measure_time, "--measure-time"), batch=batch)
