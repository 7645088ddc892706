"""Asks runners what they see inside an artifact: the values it computes, the kernels that it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from featherweight.engine.jobs import Runner
from featherweight.engine.timing import Limits
from featherweight.errors import TargetError
from featherweight.runtime import Artifact, Target


def inner_values(
    artifact: Artifact,
    target: Target,
    inputs: Sequence[np.ndarray],
    *,
    limits: Limits | None = None,
    entry: str = "forward",
) -> dict[str, np.ndarray]:
    """Traced value name -> what the artifact computes there for one call, in order.

    Raises:
        TargetError: The runtime shows nothing but outputs.
        RunnerError: The process crashed or hung.
    """
    runner = Runner("values", {"artifact": artifact}, target, inputs=inputs, limits=limits, entry=entry)
    with runner:
        frame = runner.receive()
        if frame is None or "names" not in frame[0]:
            runner.result()  # tells what went wrong
            raise runner.failure()
        return dict(zip(frame[0]["names"], frame[1], strict=True))


def told_kernels(
    artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, limits: Limits | None = None
) -> list[dict[str, Any]]:
    """Fields of a ``KernelRow`` for each step of a call, the costliest first; none where it does not tell."""
    try:
        with Runner("kernels", {"artifact": artifact}, target, inputs=inputs, limits=limits) as runner:
            while (frame := runner.receive()) is not None and "end" not in frame[0]:
                continue
            told: list[dict[str, Any]] = runner.result()["kernels"]
    except TargetError:
        return []
    total = sum(one["seconds"] or 0.0 for one in told)
    rows = [
        {
            **{key: one[key] for key in ("name", "op", "dtype", "fast", "note")},
            "share": one["seconds"] / total if total and one["seconds"] is not None else None,
        }
        for one in told
    ]
    return sorted(rows, key=lambda row: -(row["share"] or 0.0))
