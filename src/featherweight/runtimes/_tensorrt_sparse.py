"""Weights with two zeros in every four inputs, which sparse tensor cores skip: they must stay zeros.

Part of ``tensorrt.py``; Mishra et al. 2021, arXiv:2104.08378.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featherweight.errors import TargetError

if TYPE_CHECKING:
    from featherweight.model import Model


def is_two_to_four(weight: np.ndarray) -> bool:
    """Whether each four neighbours along the inputs (axis 1) hold at least two zeros."""
    if weight.ndim < 2 or weight.shape[1] % 4:
        return False
    fours = np.moveaxis(weight, 1, -1).reshape(-1, 4)
    return bool(((fours == 0).sum(1) >= 2).all())


def check_sparse(model: Model, files: Sequence[Path]) -> list[str]:
    """Names of such weights.

    Raises:
        TargetError: One of them is not so any more in the files.
    """
    import onnx_ir as ir

    parameters = model.parameters
    arrays = {
        name: parameters[name].detach().float().numpy() for name in parameters if parameters[name].dim() > 1
    }
    sparse = [name for name, array in arrays.items() if np.any(array) and is_two_to_four(array)]
    for file in files:
        for name, value in ir.load(file).graph.initializers.items():
            if name not in sparse or value.const_value is None:
                continue
            stored = value.const_value.numpy().astype(np.float32)
            turned = (
                stored.shape == arrays[name].T.shape and np.count_nonzero(stored.T[arrays[name] == 0]) == 0
            )
            kept = stored.shape == arrays[name].shape and np.count_nonzero(stored[arrays[name] == 0]) == 0
            if not kept and not turned:
                raise TargetError(
                    f"zeros of '{name}' did not stay zeros", fix="exclude its layer from quantize under where"
                )
    return sparse
