"""The command that makes one network of several: merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from featherweight.cli import options
from featherweight.cli.making import show_result
from featherweight.errors import DataError, LoadError
from featherweight.terminal import Bars

T = TypeVar("T")

Networks = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME=MODEL[@WEIGHTS]",
        show_default=False,
        help="Two networks or more of the same inputs, each with the name of its task: "
        "path.py:callable@FILE, or a model file.",
    ),
]
TaskData = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="NAME=DATA",
        help="A task's data, as fit takes it: the same examples in the same order for all tasks. Once for "
        "each; a task without is compared with its own network.",
    ),
]
TaskMetric = Annotated[
    list[str] | None, typer.Option("--metric", metavar="NAME=METRIC", help="What scores a task, as in fit.")
]
TaskDrop = Annotated[
    list[str] | None,
    typer.Option(
        "--max-drop",
        metavar="[NAME=]DROP",
        help="Largest drop of every task, e.g. 0.5%; with a name that of one. May be repeated.",
    ),
]


def merge(
    models: Networks,
    out: options.Out,
    data: TaskData = None,
    metric: TaskMetric = None,
    max_drop: TaskDrop = None,
    max_size: options.MaxSize = None,
    max_latency: options.MaxLatency = None,
    max_memory: options.MaxMemory = None,
    prefer: options.Prefer = options.Preference.BALANCED,
    confident: options.Confident = False,
    runtime: options.Runtimes = "onnxruntime",
    device: options.Device = "local",
    recipe: options.Recipe = None,
    trials: options.Trials = None,
    time: options.Time = "10m",
    measure_time: options.MeasureTime = "20s",
    batch: options.Batch = 1,
    threads: options.Threads = 1,
    tune: options.Tune = True,
    robustness: options.Robustness = None,
    devices: options.Devices = 1,
    precision: options.Precision = "32",
    seed: options.Seed = 0,
    inputs: options.Inputs = None,
    resume: options.Resume = False,
    force: options.Force = False,
    allow_pickle: options.Pickle = False,
    workers: options.Workers = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Make one network of several: a trunk, a head for each task.

    The networks take the same inputs. Where they part follows from how alike their layers are;
    trunk and heads learn from the networks themselves, and from labels where there are some. Sizes
    and latencies are compared with those of the networks one after the other, each task's score with
    its own network's.

    Writes to --out what fit writes. The artifact's outputs have the tasks' names.

    \b
    Example:
      featherweight merge digits=nets.py:digits@digits.safetensors ink=nets.py:ink@ink.safetensors \\
        --data digits=digits.npz --data ink=ink.npz --max-drop 0.5% --out merged
    """
    from featherweight.outcome import parse_drop, parse_time

    named = _named(models, "a model", lambda text: text)
    drops = [text.rpartition("=") for text in max_drop or ()]
    whole = [drop for name, _, drop in drops if not name]
    budget = options.budget(whole[-1] if whole else None, max_size, max_latency, max_memory)
    time_limit = parse_time(time, "--time", "5m")
    limits = options.limits(measure_time, batch)
    tables = {
        "data": _named(data or (), "--data", lambda text: text),
        "metrics": _named(metric or (), "--metric", lambda text: text),
    }
    each = {name: parse_drop(drop, "--max-drop") for name, _, drop in drops if name}

    from typing import Any, cast

    from featherweight import api

    apart = {name: _model_and_weights(text) for name, text in named.items()}
    with Bars(quiet) as progress:
        result = api.merge(
            {name: model for name, (model, _) in apart.items()},
            cast(Any, tables["data"]),
            out=out,
            weights={name: weights for name, (_, weights) in apart.items() if weights is not None},
            metrics=tables["metrics"],
            budget=budget,
            max_drop=each,
            prefer=prefer.value,
            confident=confident,
            runtime=runtime,
            device=device,
            recipe=recipe,
            trials=trials,
            time_limit=time_limit,
            limits=limits,
            threads=threads,
            tune=tune,
            robustness=robustness,
            devices=devices,
            precision=cast(Any, precision),
            seed=seed,
            inputs=inputs or (),
            resume=resume,
            force=force,
            allow_pickle=allow_pickle,
            workers=workers,
            progress=progress,
        )
    show_result(result, out, quiet, as_json)


def _named(texts: Sequence[str], what: str, read: Callable[[str], T]) -> dict[str, T]:
    """NAME=VALUE each, as a table.

    Raises:
        LoadError: One has no name, or two have the same.
    """
    found: dict[str, T] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            kind = LoadError if what == "a model" else DataError
            raise kind(f"{what} '{text}' names no task", fix=f"NAME={text}")
        if name in found:
            raise LoadError(f"{what} is given twice for '{name}'", fix="give each task its own name")
        found[name] = read(value)
    return found


def _model_and_weights(text: str) -> tuple[str, str | None]:
    """A model and the file of its weights behind '@', if there is one; a folder may have '@' in its name."""
    model, at, weights = text.rpartition("@")
    if not at or Path(text).exists():
        return text, None
    return model, weights
