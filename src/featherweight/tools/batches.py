"""Calibration examples as the flat tensors of each call."""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
from torch import Tensor

from featherweight.errors import DataError
from featherweight.method import Context


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
