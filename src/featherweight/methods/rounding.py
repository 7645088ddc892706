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

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from featherweight.graph import trace
from featherweight.method import Context, Kind, Method, Need
from featherweight.model import Model
from featherweight.tools.batches import calibration_batches
from featherweight.tools.biases import corrected_biases, settled, with_biases, with_values
from featherweight.tools.gptq import Settings, gptq
from featherweight.tools.simulate import project

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
        batches: list[tuple[Tensor, ...]] = []
        if self.correct_bias or self.how not in ("hqq", "nearest"):
            batches = calibration_batches(context, self.samples, "rounding")
        worked = with_biases(model, weights) if self.correct_bias else model
        reference = context.float_model(model)
        if self.how == "gptq":
            worked = self._gptq(worked, reference, batches, weights, context)
        else:
            worked = self._nearest(worked, reference, weights)
            worked = self._corrected(worked, reference, batches, weights, context)
        return settled(model, worked)

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

    def _gptq(
        self,
        model: Model,
        reference: Model,
        batches: list[tuple[Tensor, ...]],
        weights: frozenset[str],
        context: Context,
    ) -> Model:
        settings = Settings(damping=self.damping, correct_bias=self.correct_bias)
        left = set(weights)
        for entry in model.entries:
            found = gptq(
                model,
                reference,
                batches,
                weights=left,
                settings=settings,
                seed=context.seed,
                entry=entry,
                progress=context.progress,
                scratch=context.scratch,
            )
            model = with_values(model, found)
            left -= set(found)
        return self._nearest(model, reference, frozenset(left))

    def _nearest(self, model: Model, reference: Model, weights: frozenset[str]) -> Model:
        """The nearest on-grid value of each weight."""
        known = reference.parameters
        return with_values(
            model,
            {
                name: project(known.get(name, model.module.get_parameter(name)).detach(), model.formats[name])
                for name in weights
            },
        )

    def _corrected(
        self,
        model: Model,
        reference: Model,
        batches: list[tuple[Tensor, ...]],
        weights: frozenset[str],
        context: Context,
    ) -> Model:
        if not self.correct_bias:
            return model
        for entry in model.entries:
            found = corrected_biases(
                model,
                reference,
                batches,
                selects=lambda node: node.parameters.get("weight") in weights,
                entry=entry,
                progress=context.progress,
                scratch=context.scratch,
            )
            model = with_values(model, found)
        return model


PLUGIN = Rounding
