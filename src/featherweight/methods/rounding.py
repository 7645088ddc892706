"""Rounding: which integer next to each weight is stored, chosen by what the layer makes of its inputs.

Rounding each weight to the nearest integer is best for the weight, not for the layer. For a layer with
float weights W that reads X in the float network and X̂ in the stored one, the integers Q minimise::

    || W X + b - Q X̂ - b' ||²

Ways: GPTQ (Frantar et al. 2022, arXiv:2210.17323; tools/gptq.py), AdaRound per layer (Nagel et al. 2020,
arXiv:2004.10568; tools/adaround.py), reconstruction of blocks (Li et al. 2021, arXiv:2102.05426; Wei et al.
2022, arXiv:2203.05740; tools/blocks.py), HQQ without data (Badri & Shaji 2023; tools/hqq.py), the nearest.
Results are on-grid floats, so every runtime stores the same integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from featherweight.errors import DataError
from featherweight.formats import TensorFormat
from featherweight.graph import trace
from featherweight.method import Context, Kind, Method, Need
from featherweight.model import Model

Way = Literal["gptq", "adaround", "blocks", "hqq", "nearest"]


class Rounding(Method, frozen=True, extra="forbid"):
    """Choose the stored integers by the output that they give. Without formats there is nothing to round.

    Attributes:
        how: gptq (seconds), adaround and blocks (gradient steps, minutes), hqq (no data), nearest.
        correct_bias: Biases take the mean error that is left (see correct_bias).
        samples: Calibration examples to read.
        damping: Ridge towards the float weights, as a share of the mean squared input, for gptq.
        iterations: Gradient steps per layer or block, for adaround and blocks.
    """

    kind: ClassVar[Kind] = "values"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    how: Way = "gptq"
    correct_bias: bool = True
    samples: Annotated[int, Field(ge=1)] = 128
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    iterations: Annotated[int, Field(ge=1)] = 1000

    def apply(self, model: Model, context: Context) -> Model:
        weights = self._selected(model)
        if not weights:
            return model.evolve()
        parameters, formats = self._rounded(model, context, weights)
        return _with(model, parameters, formats)

    def _selected(self, model: Model) -> frozenset[str]:
        """Weights with formats that no excluded layer reads."""
        nodes = [node for entry in model.entries for node in trace(model, entry)]
        read = {name for node in nodes for name in node.parameters.values() if name in model.formats}
        held = {
            name
            for node in nodes
            if not self.where.selects(node.layer, node.layer_type)
            for name in node.parameters.values()
        }
        return frozenset(read - held)

    def _rounded(
        self, model: Model, context: Context, weights: frozenset[str]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, tuple[TensorFormat, ...]]]:
        """New values by parameter, and the formats that changed."""
        nearest = {
            name: model.formats[name][-1].project(model.module.get_parameter(name).detach())
            for name in weights
        }
        return nearest, {}

    def _batches(self, context: Context) -> list[tuple[Tensor, ...]]:
        found: list[tuple[Tensor, ...]] = []
        seen = 0
        for arrays in context.data.calibration(self.samples):
            found.append(
                tuple(torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays)
            )
            seen += len(arrays[0])
            if seen >= self.samples:
                break
        if not found:
            raise DataError(
                f"rounding by {self.how} found no calibration examples",
                fix="give x_calibration or x_train, or how: hqq",
            )
        return found


PLUGIN = Rounding


def _with(
    model: Model, parameters: Mapping[str, Tensor], formats: Mapping[str, tuple[TensorFormat, ...]]
) -> Model:
    """The model with other values; the input is untouched."""
    module = model.copy_module()
    with torch.no_grad():
        for name, value in parameters.items():
            module.get_parameter(name).copy_(value)
    return model.evolve(module=module, formats={**model.formats, **formats})
