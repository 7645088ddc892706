"""What a runner does besides timing two sessions: answer in paces, show values, tell kernels.

Runs in the measuring process only, like ``phases.py``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

import numpy as np

from featherweight.engine import frames, timing
from featherweight.runtime import Artifact, Runtime, Target


def paced(
    runtime: Runtime,
    artifact: Artifact,
    target: Target,
    inputs: Sequence[np.ndarray],
    entry: str,
    limits: timing.Limits,
    requests: BinaryIO,
    answers: BinaryIO,
) -> dict[str, Any]:
    """Time one block of calls for each request, so that several processes can be timed in turn."""
    session = runtime.open(artifact, target)

    def call() -> object:
        return session(*inputs, entry=entry)

    single = timing.warm_up(call, limits, lambda done: frames.send(answers, {"warm": done}))
    calls = max(1, math.ceil(limits.block_s / single))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    frames.send(answers, {"ready": True, "cores": cores})
    blocks = 0
    while frames.receive(requests) is not None:
        call()  # brings its code and weights back into the caches; not timed
        frames.send(answers, {"seconds": timing.block(call, calls)})
        blocks += 1
    return {"blocks": blocks, "calls": calls}


def values(
    runtime: Runtime,
    artifact: Artifact,
    target: Target,
    inputs: Sequence[np.ndarray],
    entry: str,
    answers: BinaryIO,
) -> dict[str, Any]:
    """What the artifact computes inside, by traced name: one frame of names and arrays."""
    found: Mapping[str, np.ndarray] = runtime.values(artifact, target, inputs, entry=entry)
    frames.send(answers, {"names": list(found)}, [np.ascontiguousarray(array) for array in found.values()])
    return {"values": len(found)}


def kernels(
    runtime: Runtime, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], entry: str
) -> dict[str, Any]:
    """What the runtime executes for a call."""
    return {"kernels": [asdict(one) for one in runtime.kernels(artifact, target, inputs, entry=entry)]}
