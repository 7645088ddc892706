"""Times several artifacts in one process, in turn; ``python -I -B interleaved.py FOLDER`` reads job.json.

Every round calls each artifact for a block, in a drawn order, so what disturbs the machine for longer than a
round disturbs all of them. Ratios are taken within rounds; their interval is that of featherweight's own
measuring (``featherweight.engine.timing``).
"""

from __future__ import annotations

import gc
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.engine import timing
from featherweight.engine.runner import pin
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Target

if TYPE_CHECKING:  # the timed process imports nothing of torch
    from featherweight.engine.run import Run
    from featherweight.model import Model

Rounds = Mapping[str, Sequence[float]]  # name -> seconds of a call in each round
_SAY_S = 0.2


@dataclass(frozen=True)
class Ratio:
    """Median of the rounds' ratios and its 95 % interval (None below six rounds)."""

    median: float
    ci95: tuple[float, float] | None


def ratio(rounds: Rounds, first: str, second: str) -> Ratio:
    """How long ``first`` takes, in units of ``second``."""
    values = _compared(rounds, first, second)
    low, high = timing.median_interval(values)
    return Ratio(float(np.median(values)), (low, high) if math.isfinite(low) else None)


def measure(
    artifacts: Mapping[str, Artifact],
    target: Target,
    inputs: np.ndarray,
    *,
    pairs: Sequence[tuple[str, str]],
    seconds: float,
    folder: Path,
    said: Callable[[float], None],
) -> dict[str, list[float]]:
    """Run the job in a child process that is bound to as many cores as the target has threads.

    Args:
        artifacts: By name.
        target: Whose runtime, threads and options are used.
        inputs: Of one call.
        pairs: The rounds go on until the interval of each of these ratios is within 2 % ...
        seconds: ... or this time is over.
        folder: Takes the job.
        said: Told which fraction of the time is over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "input.npy", inputs)
    described = {
        name: {**one.to_json(), "folder": str(one.folder.resolve())} for name, one in artifacts.items()
    }
    job = {"artifacts": described, "target": target.to_json(), "pairs": list(pairs), "seconds": seconds}
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-I", "-B", str(Path(__file__).resolve()), str(folder.resolve())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("done "):
                said(float(line.split()[1]))
    if child.returncode:
        raise SystemExit(f"timing ended with exit code {child.returncode}")
    rounds: dict[str, list[float]] = json.loads((folder / "rounds.json").read_text())
    return rounds


@dataclass(frozen=True)
class Timed:
    """A model's artifact against the original's: the ratio, and the original's median seconds."""

    ratio: Ratio
    original_s: float


def against_original(run: Run, model: Model, seconds: float, folder: Path) -> Timed:
    """Lower a model and the run's original, and time calls with one example in turn."""
    rounds = measure(
        {"original": run.lower(run.original), "smaller": run.lower(model)},
        run.target,
        run.original.entries["forward"].example_inputs[0][:1].numpy(),
        pairs=[("smaller", "original")],
        seconds=seconds,
        folder=folder,
        said=lambda fraction: None,
    )
    return Timed(ratio(rounds, "smaller", "original"), float(np.median(rounds["original"])))


def _compared(rounds: Rounds, first: str, second: str) -> list[float]:
    return timing.grouped([a / b for a, b in zip(rounds[first], rounds[second], strict=True)])


def _main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    target = Target(**job["target"])
    pin(target.threads, look_s=0.1)
    runtime, inputs = find_runtime(target.runtime), np.load(folder / "input.npy")
    calls: dict[str, timing.Call] = {}
    for name, described in job["artifacts"].items():
        session = runtime.open(Artifact.from_json(described, Path(described["folder"])), target)
        calls[name] = lambda session=session: session(inputs)
    rounds = _rounds(calls, job["pairs"], timing.Limits(seconds=job["seconds"], least_seconds=5.0))
    (folder / "rounds.json").write_text(json.dumps(rounds))


def _rounds(calls: Mapping[str, timing.Call], pairs: Any, limits: timing.Limits) -> dict[str, list[float]]:
    """Rounds of a block of each, until every pair's interval is narrow or the time is up."""
    blocks = {name: math.ceil(limits.block_s / timing.warm_up(call, limits)) for name, call in calls.items()}
    seen: dict[str, list[float]] = {name: [] for name in calls}
    order, draw = list(calls), random.Random(0)
    start = spoke = time.perf_counter()
    gc.collect()
    gc.disable()
    while True:
        draw.shuffle(order)
        for name in order:
            calls[name]()  # brings its weights back into the caches; not timed
            seen[name].append(timing.block(calls[name], blocks[name]))
        now, count = time.perf_counter(), len(seen[order[0]])
        if now - start >= limits.seconds:
            return seen
        # Looking after every round would stop at the first lucky streak.
        if (
            count >= limits.rounds
            and count % 5 == 0
            and now - start >= min(limits.least_seconds, limits.seconds / 2)
        ):
            widths = [timing.half_width(_compared(seen, first, second)) for first, second in pairs]
            if max(widths) <= limits.precision:
                return seen
        if now - spoke > _SAY_S:
            spoke = now
            print(f"done {(now - start) / limits.seconds:.3f}", flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
