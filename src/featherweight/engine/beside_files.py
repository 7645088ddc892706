"""What artifacts that already lie on disk do beside the score, without the model that they were made of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from pydantic import BaseModel

from featherweight.data import Data
from featherweight.engine import confidence
from featherweight.engine import robustness as corrupted
from featherweight.engine.files import first_call, scorable
from featherweight.engine.jobs import Served
from featherweight.errors import DataError
from featherweight.method import Progress
from featherweight.runtime import Artifact, Target


def look_beside(
    artifact: Artifact,
    twin: Artifact | None,
    data: Data,
    target: Target,
    *,
    examples: int,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Scores on corrupted pictures, calibration and a membership attack, of an artifact and of its twin.

    Args:
        artifact: What is looked at.
        twin: What it is compared with; None: nothing.
        data: Examples that both take.
        target: Where and how.
        examples: Pictures of each corruption and severity at most.
        seed: Of every choice.
        progress: Shows bars.

    Raises:
        LoadError: The runtime cannot open a file.
        DataError: The examples are none that the artifact takes, or nothing of it applies.
        RunnerError: The runtime crashed or hangs.
    """
    example = tuple(array[:1] for array in data.example_inputs())
    data = scorable(data, first_call(artifact, target, example), alone=twin is None)
    if twin is not None:
        first_call(twin, target, example)
    scored = data.scored
    if scored is None:
        raise DataError("the data has no examples to score", fix="add x, and y if there are labels")
    everything = np.arange(len(scored))
    picks = corrupted.some_indices(len(scored), examples, seed)
    roles = {"after": artifact} if twin is None else {"before": twin, "after": artifact}
    found: dict[str, Any] = {}
    failed: dict[str, DataError] = {}
    with ExitStack() as sessions:
        runs = {role: sessions.enter_context(Served(one, target)).run for role, one in roles.items()}
        outputs = {
            role: confidence.first_outputs(run, scored, everything, data.batch_size, progress)
            for role, run in runs.items()
        }
        asked: dict[str, Callable[[], BaseModel]] = {
            "robustness": lambda: corrupted.robustness(
                runs.get("before"), runs["after"], data, picks, seed=seed, progress=progress
            ),
            "calibration": lambda: confidence.calibration(data, outputs, everything),
            "privacy": lambda: confidence.membership(
                data, outputs, lambda: runs, most=confidence.MOST_MEMBERS, seed=seed, progress=progress
            ),
        }
        for name, ask in asked.items():
            try:
                found[name] = ask().model_dump(mode="json")
            except DataError as error:
                found[name], failed[name] = None, error
    if len(failed) == len(asked):
        raise failed["robustness"]
    omitted = {name: error.what for name, error in failed.items()}
    about = {"metric": data.metric.name, "runtime": artifact.runtime, "sha256": artifact.sha256}
    return {**found, "omitted": omitted, **about}
