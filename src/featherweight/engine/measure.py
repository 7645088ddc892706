"""Measures artifacts: latency beside the twin, memory alone, quality through the same session.

Every number comes out of another process (``jobs.py``, ``runner.py``); docs/measuring.md tells how.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featherweight.engine.jobs import Runner, Served, run_job
from featherweight.engine.quality import (
    Compared,
    Quality,
    Scored,
    compare_outputs,
    quality,
    score_artifact,
)
from featherweight.engine.timing import Limits
from featherweight.method import Progress, Silent
from featherweight.outcome import Latency
from featherweight.runtime import Artifact, Target

__all__ = [
    "Compared",
    "Limits",
    "Memory",
    "Quality",
    "Scored",
    "Served",
    "Timing",
    "compare_outputs",
    "measure_latency",
    "measure_memory",
    "quality",
    "score_artifact",
]


@dataclass(frozen=True)
class Timing:
    """Latency of an artifact, and of its twin in the same rounds.

    Attributes:
        artifact: Seconds of a call.
        twin: The same for the twin; None when the artifact was timed alone.
        ratio: Median artifact / twin.
        ratio_ci95: Its 95 % interval; None below six rounds.
        rounds: How many there were.
        resolved: The interval's half-width is within 5 % of the median.
        throughput: Examples per second at the batch that was asked for; None where it was refused.
        twin_throughput: The twin's.
        energy_j: Joules of a call; None where the processor's counters cannot be read.
        twin_energy_j: The twin's.
        cores: Which cores it ran on; none where the system cannot bind processes.
        notes: Why something is None, for the user.
    """

    artifact: Latency
    twin: Latency | None
    ratio: float | None
    ratio_ci95: tuple[float, float] | None
    rounds: int
    resolved: bool
    throughput: float | None
    twin_throughput: float | None
    energy_j: float | None
    twin_energy_j: float | None
    cores: tuple[int, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Memory:
    """Resident memory of one open session, medians over processes.

    Attributes:
        above_runtime: Peak less what was resident once the runtime was imported, bytes.
        peak: The whole process at its peak, bytes.
    """

    above_runtime: int
    peak: int


def measure_latency(
    artifact: Artifact,
    twin: Artifact | None,
    target: Target,
    inputs: Sequence[np.ndarray],
    *,
    limits: Limits | None = None,
    entry: str = "forward",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> Timing:
    """Time an artifact in turn with its twin, in one process; or alone, when there is no twin.

    Args:
        artifact: What is timed.
        twin: The original, lowered for the same target.
        target: Where and how; its threads are the cores that the process gets.
        inputs: Arrays of one call, with one example.
        limits: When to stop.
        entry: Which entry is called.
        options: Of 'artifact' and 'twin', where they are not the target's.
        progress: Shows a bar.

    Raises:
        RunnerError: The process crashed or hung.
        TargetError: There are fewer cores than threads, or the runtime refuses an option.
    """
    roles = {"artifact": artifact} if twin is None else {"twin": twin, "artifact": artifact}
    runner = Runner("latency", roles, target, inputs=inputs, limits=limits, entry=entry, options=options)
    result = run_job(runner, progress or Silent(), "Measuring latency")
    reasons = {said["reason"] for said in result["throughput"].values()} - {None}
    reasons |= set(result.get("notes", ()))
    interval = result.get("ratio_ci95")
    return Timing(
        artifact=Latency(**result["artifact"]),
        twin=None if twin is None else Latency(**result["twin"]),
        ratio=result.get("ratio"),
        ratio_ci95=None if interval is None else (interval[0], interval[1]),
        rounds=result["rounds"],
        resolved=result["resolved"],
        throughput=result["throughput"]["artifact"]["examples_per_s"],
        twin_throughput=None if twin is None else result["throughput"]["twin"]["examples_per_s"],
        energy_j=result["energy_j"]["artifact"],
        twin_energy_j=result["energy_j"].get("twin"),
        cores=tuple(result["cores"]),
        notes=tuple(sorted(reasons)),
    )


def measure_memory(
    artifact: Artifact,
    target: Target,
    inputs: Sequence[np.ndarray],
    *,
    limits: Limits | None = None,
    entry: str = "forward",
    progress: Progress | None = None,
) -> Memory:
    """Weigh an artifact in processes that open nothing else: the median of several.

    Raises:
        RunnerError: A process crashed or hung.
    """
    limits = limits or Limits()
    seen = [
        run_job(
            Runner("memory", {"artifact": artifact}, target, inputs=inputs, limits=limits, entry=entry),
            Silent(),
            "memory",
        )
        for _ in (progress or Silent()).track(
            range(limits.memory_repeats), "Measuring memory", total=limits.memory_repeats
        )
    ]
    return Memory(
        above_runtime=round(statistics.median(one["peak_bytes"] - one["base_bytes"] for one in seen)),
        peak=round(statistics.median(one["peak_bytes"] for one in seen)),
    )
