"""What a runner does: time two sessions, weigh one, or answer calls. Runs in the measuring process only.

Imports numpy, the nouns that need nothing else, and the one runtime of the job.
"""

from __future__ import annotations

import gc
import math
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from featherweight.engine import frames, looks, machine, timing
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Runtime, Session, Target

_CALLS = 3  # calls whose peak counts: arenas of runtimes have grown by the second one


@dataclass(frozen=True)
class Job:
    """What job.json asks for."""

    kind: str
    folder: Path
    target: Target
    artifacts: Mapping[str, Artifact]
    inputs: int
    entry: str
    limits: timing.Limits
    options: Mapping[str, Mapping[str, Any]]

    @classmethod
    def from_json(cls, data: Mapping[str, Any], folder: Path) -> Job:
        artifacts = {
            name: Artifact.from_json(described, folder / described["folder"])
            for name, described in data["artifacts"].items()
        }
        target, limits = Target(**data["target"]), timing.Limits(**data["limits"])
        options = data.get("options", {})
        return cls(data["kind"], folder, target, artifacts, data["inputs"], data["entry"], limits, options)

    def target_of(self, role: str) -> Target:
        """The target with the options of one artifact's session."""
        return replace(self.target, options=self.options[role]) if role in self.options else self.target

    def runtime(self) -> Runtime:
        """The runtime, with its package imported."""
        runtime = find_runtime(self.target.runtime)
        runtime.require()
        runtime.load(self.target)
        return runtime

    def arguments(self) -> tuple[np.ndarray, ...]:
        """The inputs of one call."""
        return tuple(np.load(self.folder / f"input{i}.npy", allow_pickle=False) for i in range(self.inputs))


def run(data: Mapping[str, Any], folder: Path, requests: BinaryIO, answers: BinaryIO) -> dict[str, Any]:
    """Do the job; its result."""
    job = Job.from_json(data, folder)
    if job.kind == "describe":
        asked = data["asked"]
        return {
            "machine": machine.machine(),
            "versions": machine.versions(asked["packages"]),
            "runtimes": machine.importable(asked["modules"]),
        }
    if job.kind == "latency":
        return latency(job, answers)
    if job.kind == "memory":
        return memory(job)
    if job.kind == "serve":
        return serve(job, requests, answers)
    if job.kind == "profile":
        return asdict(
            job.runtime().profile(
                job.artifacts["artifact"], job.target, job.arguments(), folder, entry=job.entry
            )
        )
    opened = job.runtime(), job.artifacts["artifact"], job.target, job.arguments(), job.entry
    if job.kind == "paced":
        return looks.paced(*opened, job.limits, requests, answers)
    if job.kind == "values":
        return looks.values(*opened, answers)
    if job.kind == "kernels":
        return looks.kernels(*opened)
    raise ValueError(f"no job is called '{job.kind}'")


def latency(job: Job, answers: BinaryIO) -> dict[str, Any]:
    """Time the twin (where there is one) and the artifact in one process, in turn."""
    runtime, inputs = job.runtime(), job.arguments()
    names = [name for name in ("twin", "artifact") if name in job.artifacts]
    sessions = {name: runtime.open(job.artifacts[name], job.target_of(name)) for name in names}
    calls = {name: _call(session, inputs, job.entry) for name, session in sessions.items()}
    seen = timing.interleave(
        list(calls.values()), job.limits, lambda done: frames.send(answers, {"done": min(done, 1.0)})
    )
    compared = timing.compared(seen)
    low, high = timing.median_interval(compared)
    known = math.isfinite(low)
    result: dict[str, Any] = {
        name: asdict(timing.summarize(rounds)) for name, rounds in zip(names, seen, strict=True)
    }
    result["rounds"] = len(seen[0])
    result["resolved"] = timing.half_width(compared) <= job.limits.resolved
    if len(seen) == 2:
        result["ratio"] = float(np.median(compared))
        result["ratio_ci95"] = [low, high] if known else None
    result["throughput"] = {
        name: _throughput(session, inputs, job, result[name]["median"]) for name, session in sessions.items()
    }
    result["energy_j"] = {name: timing.energy(call, job.limits) for name, call in calls.items()}
    return result


def _call(session: Session, inputs: tuple[np.ndarray, ...], entry: str) -> timing.Call:
    if entry == "forward":
        return lambda: session(*inputs)
    return lambda: session(*inputs, entry=entry)


def _throughput(session: Session, inputs: tuple[np.ndarray, ...], job: Job, median: float) -> dict[str, Any]:
    """Examples per second at the batch that is asked for; None, with the reason, where it is refused."""
    if job.limits.batch == 1:
        return {"examples_per_s": 1 / median, "reason": None}
    batch = tuple(np.repeat(x[:1], job.limits.batch, axis=0) if x.ndim else x for x in inputs)
    call = _call(session, batch, job.entry)
    try:
        call()
    except Exception as error:  # noqa: BLE001 - each runtime has its own; the reason is handed on
        return {"examples_per_s": None, "reason": f"batch {job.limits.batch}: {error}"}
    return {"examples_per_s": job.limits.batch / timing.steady(call, job.limits), "reason": None}


def memory(job: Job) -> dict[str, Any]:
    """Peak resident memory of one session, above what the imported runtime takes."""
    runtime, inputs = job.runtime(), job.arguments()
    gc.collect()
    _forget_peak()
    base, _ = _resident()
    session = runtime.open(job.artifacts["artifact"], job.target)
    for _ in range(_CALLS):
        session(*inputs, entry=job.entry)
    _, peak = _resident()
    return {"base_bytes": base, "peak_bytes": peak}


def _forget_peak() -> None:
    """Let the kernel count the peak from here: importing may have needed more than it kept."""
    for process in ("self", *_children("self")):
        try:
            Path(f"/proc/{process}/clear_refs").write_text("5")
        except OSError:
            return  # not this kernel, or not allowed: the peak then includes the import's


def _resident() -> tuple[int, int]:
    """Resident bytes now and at their peak, with those of the processes that a runtime started.

    Not by ``getrusage`` where /proc is there: its peak is inherited from the process that started this one.
    """
    try:
        seen = [_resident_of(process) for process in ("self", *_children("self"))]
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return peak, peak
    return sum(now for now, _ in seen), sum(peak for _, peak in seen)


def _resident_of(process: str) -> tuple[int, int]:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def _children(process: str) -> list[str]:
    """Numbers of the processes that any thread of this one started, and of those that they started."""
    lists = Path(f"/proc/{process}/task").glob("*/children")
    started = [child for file in lists for child in file.read_text().split()]
    return [*started, *(further for child in started for further in _children(child))]


def serve(job: Job, requests: BinaryIO, answers: BinaryIO) -> dict[str, Any]:
    """Answer calls until there are no more."""
    session = job.runtime().open(job.artifacts["artifact"], job.target)
    frames.send(answers, {"ready": True})
    calls = 0
    while (frame := frames.receive(requests)) is not None:
        header, inputs = frame
        try:
            outputs = session(*inputs, entry=header["entry"])
        except Exception as error:  # noqa: BLE001 - the caller is told, and may send other inputs
            frames.send(answers, {"error": f"{type(error).__name__}: {error}"})
            continue
        frames.send(answers, {}, [np.asarray(output) for output in outputs])
        calls += 1
    return {"calls": calls}
