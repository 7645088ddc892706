"""Jobs on a phone, done from here: twin and artifact in short bursts of a benchmark program, A B A B.

Sessions cannot be opened there, so outputs come from this machine, through the same runtime and files.
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any, cast

import numpy as np

from featherweight.engine import frames, timing
from featherweight.engine.adb import Bench, Phone, tools_folder
from featherweight.engine.devices import ConnectionLost, Work, address
from featherweight.engine.machine import versions
from featherweight.errors import FeatherweightError, TargetError

_BURST_S = 0.25
_MOST_CALLS = 2000
_TRY_CALLS = 3


class AdbLink:
    """A job on a phone; it speaks in frames as a runner does."""

    process = None

    def __init__(self, work: Work) -> None:
        place = address(work.target)
        self._work = work
        self._tools = tools_folder(place.options)
        self._phone = Phone(place.host, place.name, work.timeout_s)
        self._lost: ConnectionLost | None = None
        self._code = 0
        (work.folder / "stderr.txt").touch()
        reading, writing = os.pipe()
        self.answers = cast(Any, os.fdopen(reading, "rb"))
        self._said = os.fdopen(writing, "wb")
        reading, writing = os.pipe()
        self._asked = os.fdopen(reading, "rb")
        self.requests = cast(Any, os.fdopen(writing, "wb"))
        self._thread = threading.Thread(target=self._work_on, daemon=True)
        self._thread.start()

    # ---- Link

    def wait(self, seconds: float) -> int:
        self._thread.join()  # each of its commands has a time limit
        if self._lost is not None:
            raise self._lost
        return self._code

    def kill(self) -> None:
        self._phone.stop()

    def close(self) -> None:
        for pipe in (self.requests, self.answers):
            with suppress(BrokenPipeError):
                pipe.close()
        self._thread.join()
        self._asked.close()

    def lacked_memory(self) -> bool:
        return False

    def free_bytes(self) -> int | None:
        return None

    def explain(self, told: Mapping[str, Any]) -> FeatherweightError | None:
        return None

    # ---- the job

    def _work_on(self) -> None:
        try:
            result = self._result()
        except ConnectionLost as error:
            self._lost = error
        except Exception as error:  # noqa: BLE001 - told in the words of a runner
            self._code = 1
            what = getattr(error, "what", f"{type(error).__name__}: {error}")
            told = {"type": type(error).__name__, "what": what}
            told |= {name: getattr(error, name, None) for name in ("where", "fix")}
            self._leave({"error": told})
        else:
            self._leave(result)
        with suppress(OSError):
            self._said.close()

    def _leave(self, result: Mapping[str, Any]) -> None:
        (self._work.folder / "result.json").write_text(json.dumps(result))

    def _result(self) -> dict[str, Any]:
        kind = self._work.job["kind"]
        if kind == "describe":
            asked = self._work.job["asked"]
            # Quality is scored here, with the packages that are here.
            return {**self._phone.describe(self._tools), "versions": versions(asked["packages"])}
        if kind not in ("latency", "memory", "paced"):
            raise TargetError(
                f"a phone cannot do a job of the kind '{kind}'",
                where=self._phone.name,
                fix="over adb, latency and memory are measured; take 'local' or 'ssh:host' for the rest",
            )
        target = self._work.target
        self._refuse_options()
        bench = Bench(self._phone, target.runtime, self._tools, target.threads)
        inputs = [np.load(path, mmap_mode="r") for path in sorted(self._work.folder.glob("input*.npy"))]
        shapes = [tuple(array.shape) for array in inputs]
        models = {
            role: bench.bring(self._work.artifacts[role], self._work.job["entry"])
            for role in ("twin", "artifact")
            if role in self._work.artifacts
        }
        works = {"latency": self._latency, "memory": _memory, "paced": self._paced}
        return {**works[kind](bench, models, shapes), "cores": bench.cores, "notes": self._notes(bench)}

    def _refuse_options(self) -> None:
        """The programs are not told options of sessions, so none must be reported as measured."""
        job = self._work.job
        given = [job["target"]["options"], *job["options"].values()]
        if names := sorted({name for options in given for name in options}):
            raise TargetError(
                f"on a phone, {self._work.target.runtime} cannot be given the option '{names[0]}'",
                where=self._phone.name,
                fix="leave it out: the benchmark program runs with its own",
            )

    def _latency(
        self, bench: Bench, models: Mapping[str, str], shapes: list[tuple[int, ...]]
    ) -> dict[str, Any]:
        """Bursts of both in turn, until the interval is narrow or the time is up."""
        limits = timing.Limits(**self._work.job["limits"])
        calls = {role: _calls(bench, model, shapes) for role, model in models.items()}
        seen: dict[str, list[float]] = {role: [] for role in models}
        order, draw = list(models), random.Random(0)
        start = time.monotonic()
        while True:
            draw.shuffle(order)
            for role in order:
                seen[role].append(bench.run(models[role], shapes, calls[role])[0])
            passed, rounds = time.monotonic() - start, len(seen["artifact"])
            narrow = timing.half_width(timing.compared(list(seen.values()))) <= limits.precision
            if passed >= limits.seconds or (rounds >= limits.rounds and narrow):
                return _figures(seen, limits)
            with suppress(BrokenPipeError):
                frames.send(self._said, {"done": min(passed / limits.seconds, 1.0)})

    def _paced(
        self, bench: Bench, models: Mapping[str, str], shapes: list[tuple[int, ...]]
    ) -> dict[str, Any]:
        """One burst for each request."""
        calls, bursts = _calls(bench, models["artifact"], shapes), 0
        frames.send(self._said, {"ready": True, "cores": bench.cores})
        while frames.receive(self._asked) is not None:
            frames.send(self._said, {"seconds": bench.run(models["artifact"], shapes, calls)[0]})
            bursts += 1
        return {"blocks": bursts, "calls": calls}

    def _notes(self, bench: Bench) -> list[str]:
        name, program = self._phone.name, bench.path.name
        told = [
            f"experimental: latency and memory are those of {program} on {name}, on inputs that it makes up",
            f"quality was scored on this machine through {self._work.target.runtime}, not on {name}",
        ]
        return told + ([bench.program.note] if bench.program.note else [])


def _calls(bench: Bench, model: str, shapes: list[tuple[int, ...]]) -> int:
    """How many calls make a burst."""
    seconds, _, _ = bench.run(model, shapes, _TRY_CALLS)
    return min(max(_TRY_CALLS, math.ceil(_BURST_S / seconds)), _MOST_CALLS)


def _figures(seen: Mapping[str, list[float]], limits: timing.Limits) -> dict[str, Any]:
    """What a runner tells of the rounds."""
    compared = timing.compared(list(seen.values()))
    low, high = timing.median_interval(compared)
    result: dict[str, Any] = {role: asdict(timing.summarize(rounds)) for role, rounds in seen.items()}
    result["rounds"] = len(seen["artifact"])
    result["resolved"] = timing.half_width(compared) <= limits.resolved
    if len(seen) == 2:
        result["ratio"] = float(np.median(compared))
        result["ratio_ci95"] = [low, high] if math.isfinite(low) else None
    refused = "a phone's benchmark program is measured at batch 1 alone"
    result["throughput"] = {
        role: {"examples_per_s": 1 / result[role]["median"], "reason": None}
        if limits.batch == 1
        else {"examples_per_s": None, "reason": f"batch {limits.batch}: {refused}"}
        for role in seen
    }
    result["energy_j"] = dict.fromkeys(seen)
    return result


def _memory(bench: Bench, models: Mapping[str, str], shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """The program's peak, and the model's part of it: all of it, where the program does not tell."""
    _, peak, above = bench.run(models["artifact"], shapes, _TRY_CALLS)
    return {"base_bytes": 0 if above is None else max(peak - above, 0), "peak_bytes": peak}
