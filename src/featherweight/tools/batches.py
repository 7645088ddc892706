"""Calibration examples as the flat tensors of each call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from featherweight.errors import DataError
from featherweight.method import Context
from featherweight.model import Entry, Model


def calibration_batches(context: Context, samples: int, step: str) -> list[tuple[Tensor, ...]]:
    """Batches of at most so many calibration examples; those of arrays are read anew in each pass.

    Raises:
        DataError: There are none.
    """
    limit = -(-samples // context.data.batch_size)
    found = [
        tuple(torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays)
        for arrays in islice(context.data.calibration(samples), limit)
    ]
    if not found:
        raise DataError(f"{step} found no calibration examples", fix="give x_calibration or x_train")
    return found


def single_calls(context: Context, samples: int, entry: Entry, step: str) -> list[tuple[Tensor, ...]]:
    """Calibration examples as calls of one each; as they come where the number of examples is fixed.

    Raises:
        DataError: There are none.
    """
    free = all(0 in entry.dynamic_axes.get(name, {}) for name in entry.input_names)
    found: list[tuple[Tensor, ...]] = []
    seen = 0
    for arrays in context.data.calibration(samples):
        batch = tuple(torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays)
        found += zip(*(torch.split(x, 1) for x in batch), strict=True) if free else [batch]
        seen += len(arrays[0])
        if seen >= samples:
            break
    if not found:
        raise DataError(f"{step} found no calibration examples", fix="give x_calibration or x_train")
    return found


def entry_of(model: Model, batches: Sequence[tuple[Tensor, ...]]) -> str:
    """The first way of calling the module that takes as many inputs as the examples have."""
    inputs = len(batches[0]) if batches else 0
    fitting = [name for name, entry in model.entries.items() if len(entry.input_names) == inputs]
    return next(iter(fitting or model.entries))
