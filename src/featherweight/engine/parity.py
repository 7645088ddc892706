"""Whether an artifact computes what it should: its outputs against PyTorch's and the simulation's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featherweight.data import Data
from featherweight.engine.jobs import Served
from featherweight.engine.timing import Limits
from featherweight.model import Model
from featherweight.runtime import Artifact, Target
from featherweight.tools.simulate import as_run, simulate, sqnr_db

EXAMPLES = 64
LEAST_DB = 30.0  # an artifact below it does something else than its formats say, or its network is unsteady
_MOVE = 1e-6

Batches = Sequence[tuple[np.ndarray, ...]]


def some_batches(data: Data, example: tuple[np.ndarray, ...]) -> Batches:
    """A few examples that calibrate, in batches; the one given where there are none."""
    found: list[tuple[np.ndarray, ...]] = []
    left = EXAMPLES
    for batch in data.calibration(EXAMPLES):
        found.append(tuple(array[:left] if array.ndim else array for array in batch))
        left -= len(batch[0]) if batch[0].ndim else 1
        if left <= 0:
            break
    return found or [example]


def outputs_of(artifact: Artifact, target: Target, batches: Batches, limits: Limits) -> list[np.ndarray]:
    """Every floating-point output of an artifact on these batches, through its session."""
    with Served(artifact, target, limits) as served:
        return _floats(served.run(*batch) for batch in batches)


def simulated(model: Model, batches: Batches) -> list[np.ndarray]:
    """The same of a model whose formats are simulated; without formats it is the model itself."""
    run = as_run(simulate(model))
    return _floats(run(*batch) for batch in batches)


def steadiness(model: Model, batches: Batches) -> float | None:
    """SQNR of the simulation against itself when every input moves by a millionth of its value, decibels.

    What is rounded differently by so little lands on another step; a network that amplifies steps gives few
    decibels here, and two correct runtimes differ on it just as much.
    """
    random = np.random.default_rng(0)
    moved = [tuple(_moved(array, random) for array in batch) for batch in batches]
    return decibels(simulated(model, moved), simulated(model, batches))


def _moved(array: np.ndarray, random: np.random.Generator) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.floating):
        return array
    return (array * (1 + _MOVE * random.standard_normal(array.shape))).astype(array.dtype)


def _floats(calls: object) -> list[np.ndarray]:
    return [
        np.asarray(output, np.float64)
        for outputs in calls  # type: ignore[attr-defined]
        for output in outputs
        if np.issubdtype(output.dtype, np.floating)
    ]


def largest_error(seen: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float | None:
    """The largest difference, relative to the largest value that was wanted; None without float outputs."""
    if not wanted:
        return None
    largest = max(float(np.abs(one).max(initial=0)) for one in wanted)
    error = max(float(np.abs(a - b).max(initial=0)) for a, b in zip(seen, wanted, strict=True))
    return error / largest if largest else error


def decibels(seen: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float | None:
    """Signal-to-noise ratio over all float outputs; None without any."""
    if not wanted:
        return None
    noise = sum(float(np.square(a - b).sum()) for a, b in zip(seen, wanted, strict=True))
    return sqnr_db(sum(float(np.square(one).sum()) for one in wanted), noise)
