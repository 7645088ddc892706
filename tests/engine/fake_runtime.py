"""A runtime of numpy alone whose sessions do as their file says: be slow, crash, hang, print, eat memory."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.errors import TargetError
from featherweight.runtime import Artifact, Role, Runtime, Stored, Target


class Fake(Runtime):
    """Found by an entry point of a package that only these tests have."""

    extra = "fake"
    packages = ("fake-runtime",)
    module = "numpy"

    def supports(self, op: str, weight: Any, activation: Any, target: Target) -> bool:
        return True

    def realise(self, fmt: Any, target: Target, role: Role) -> Any:
        return fmt

    def lower(self, model: Any, target: Target, out: Path) -> Artifact:
        raise NotImplementedError

    def stored(self, artifact: Artifact) -> Mapping[str, Stored]:
        return {}

    def open(self, artifact: Artifact, target: Target) -> Session:
        told = json.loads((artifact.folder / artifact.entries["forward"]).read_text())
        does = told.get("open")
        if does == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if does == "refuse":
            raise TargetError("fake cannot store int4", where="layer 3", fix="use int8")
        if "refused" in target.options:
            raise TargetError("fake has no option 'refused'", fix="leave it out")
        return Session({**told, "seconds": told.get("seconds", 0.0) * target.options.get("factor", 1.0)})

    def tunings(self, target: Target) -> Sequence[Mapping[str, Any]]:
        return ({"factor": 3.0}, {"factor": 0.5}, {"refused": True})


class Session:
    """y = scale * x + shift, after ``seconds`` of spinning."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.told = told
        self.calls = 0
        self.random = random.Random(1)
        self.held = np.ones(told.get("allocate", 0) // 8)

    def __call__(self, x: np.ndarray, entry: str = "forward") -> tuple[np.ndarray, ...]:
        self.calls += 1
        self.spin()
        if self.calls > self.told.get("after", 0):
            self.misbehave(self.told.get("call"))
        if self.told.get("call") == "tell":
            return (np.frombuffer(json.dumps(seen()).encode(), np.uint8),)
        if len(x) > self.told.get("batch", len(x)):
            raise ValueError("the batch is fixed")
        y = np.asarray(x, np.float32) * self.told.get("scale", 1.0) + self.told.get("shift", 0.0)
        return (y,) if entry == "forward" else (y, -y)

    def spin(self) -> None:
        factor = self.random.uniform(0.1, 10) if self.told.get("noisy") else 1.0
        end = time.thread_time() + self.told.get("seconds", 0.0) * factor
        while time.thread_time() < end:
            pass

    def misbehave(self, does: str | None) -> None:
        if does == "print":
            sys.stdout.write("noise on standard output\n")
            os.write(1, b"and under Python's feet\n")
            sys.stdout.flush()
        if does == "abort":
            os.abort()
        if does == "exit":
            os._exit(7)
        if does == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if does == "hang":
            time.sleep(3600)
        if does == "raise":
            raise ValueError("expected 3 channels")
        if does == "exhaust":
            raise MemoryError
        if does == "bad_alloc":
            os.write(2, b"terminate called after throwing 'std::bad_alloc'\n")
            os.abort()
        if does == "fork" and os.fork() == 0:
            time.sleep(3600)


def seen() -> dict[str, Any]:
    """What a process can tell of itself."""
    return {
        "modules": sorted(sys.modules),
        "cores": sorted(os.sched_getaffinity(0)),
        "environment": dict(os.environ),
        "pid": os.getpid(),
        "group": os.getpgrp(),
        "dont_write_bytecode": sys.dont_write_bytecode,
    }
