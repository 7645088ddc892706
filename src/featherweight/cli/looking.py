"""Commands that look at what is there: artifacts, networks, results, this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featherweight import terminal
from featherweight.cli import options
from featherweight.terminal import Bars


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
    data: options.Data = None,
    inputs: options.Inputs = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    below: Annotated[
        float,
        typer.Option("--below", metavar="DB", help="Decibels under which two values count as different."),
    ] = 30.0,
    seed: options.Seed = 0,
    quiet: options.NoBars = False,
    as_json: options.AsJson = False,
) -> None:
    """Find the first layer at which two artifacts part.

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
    data: options.Data = None,
    metric: options.Metric = None,
    inputs: options.Inputs = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    runtime: options.Runtime = "onnxruntime",
    device: options.Device = "local",
    measure_time: options.MeasureTime = "20s",
    batch: options.Batch = 1,
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    quiet: options.NoBars = False,
    as_json: options.AsJson = False,
) -> None:
    """Weigh an artifact: latency, memory, quality.

    With a twin, latency is measured in turn with it; with data, so is quality.
    Latencies are in seconds of one call with one example, memory and sizes in bytes.

    \b
    Examples:
      featherweight measure fitted/model.onnx --input 3x32x32
      featherweight measure fitted/model.onnx --twin twin/model.onnx --data data.npz --json
    """
    limits = options.limits(measure_time, batch)

    from featherweight import api  # what is mistyped is told before torch is imported

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
            limits=limits,
            threads=threads,
            seed=seed,
            progress=progress,
        )
    terminal.print_measurement(summary, as_json)


def robustness(
    artifact: Annotated[
        Path,
        typer.Argument(
            metavar="ARTIFACT",
            show_default=False,
            help="A folder that fit or lower wrote, or a file that the runtime loads.",
        ),
    ],
    data: options.NeededData,
    twin: Annotated[
        Path | None,
        typer.Option("--twin", metavar="PATH", help="What to compare with: the original, written by lower."),
    ] = None,
    metric: options.Metric = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    examples: Annotated[
        int,
        typer.Option(
            "--examples", metavar="N", min=1, help="Pictures of each corruption and severity at most."
        ),
    ] = 500,
    runtime: options.Runtime = "onnxruntime",
    device: options.Device = "local",
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    quiet: options.NoBars = False,
    as_json: options.AsJson = False,
) -> None:
    """Show what an artifact does beside the score.

    Scores on pictures with noise, blur, less contrast, more brightness, a hidden square and JPEG, each in
    five severities; how far its confidence is from the truth; and, with x_train and y_train, how well a
    loss tells what it was trained on. With a twin, the same of that.

    \b
    Examples:
      featherweight robustness fitted --data data.npz
      featherweight robustness fitted --twin original --data data.npz --json
    """
    from featherweight import api

    with Bars(quiet) as progress:
        told = api.robustness(
            artifact,
            twin=twin,
            data=data,
            metric=metric,
            image_size=image_size,
            mean=mean,
            std=std,
            examples=examples,
            runtime=runtime,
            device=device,
            threads=threads,
            seed=seed,
            progress=progress,
        )
    terminal.print_beside(told, as_json)


def inspect(
    model: options.Model,
    data: options.Data = None,
    weights: options.Weights = None,
    metric: options.Metric = None,
    inputs: options.Inputs = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    examples: Annotated[
        int,
        typer.Option(
            "--examples", metavar="N", min=1, help="Scored examples that the sensitivity takes at most."
        ),
    ] = 256,
    threads: options.Threads = 1,
    static: Annotated[
        bool, typer.Option("--static", help="Measure nothing: no latency, no profile.")
    ] = False,
    seed: options.Seed = 0,
    allow_pickle: options.Pickle = False,
    quiet: options.NoBars = False,
    as_json: options.AsJson = False,
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


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", show_default=False, help="A folder that fit wrote.")
    ],
    as_json: options.AsJson = False,
) -> None:
    """Write DIR/report.html again from DIR/result.json.

    \b
    Example:
      featherweight report fitted
    """
    from featherweight import api

    terminal.print_summary(api.report(folder), as_json)


def methods(as_json: options.AsJson = False) -> None:
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


def runtimes(as_json: options.AsJson = False) -> None:
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


def doctor(as_json: options.AsJson = False) -> None:
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
