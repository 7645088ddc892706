"""Correct biases: each layer's bias takes the mean error that quantization made of its output.

For the float network's output y and the stored network's ŷ, per channel::

    bias' = bias + E[y] - E[ŷ]

over examples and positions, layers in the order of execution (Nagel et al. 2019, arXiv:1906.04721, section
4.2, the empirical form; tools/biases.py). Costs nothing at inference where layers have biases already.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from featherweight.graph import Node, trace
from featherweight.method import Context, Kind, Method, Need
from featherweight.model import Model
from featherweight.tools.batches import calibration_batches
from featherweight.tools.biases import corrected_biases, settled, with_biases, with_values


class CorrectBias(Method, frozen=True, extra="forbid"):
    """Let biases take the mean error of quantization. Without formats there is nothing to correct.

    Attributes:
        samples: Calibration examples to read.
    """

    kind: ClassVar[Kind] = "values"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    samples: Annotated[int, Field(ge=1)] = 128

    def apply(self, model: Model, context: Context) -> Model:
        if not model.formats:
            return model.evolve()
        nodes = [node for entry in model.entries for node in trace(model, entry)]
        weights = {node.parameters["weight"] for node in nodes if "weight" in node.parameters}
        held = {
            name for node in nodes if not self._selects(node) for name in node.parameters.values()
        }  # a layer elsewhere may read it too
        worked = with_biases(model, weights - held)
        batches = calibration_batches(context, self.samples, "correct_bias")
        for entry in worked.entries:
            found = corrected_biases(
                worked,
                context.float_model(model),
                batches,
                selects=lambda node: self._selects(node) and not held & {*node.parameters.values()},
                entry=entry,
                progress=context.progress,
                scratch=context.scratch,
            )
            worked = with_values(worked, found)
        return settled(model, worked)

    def _selects(self, node: Node) -> bool:
        return self.where.selects(node.layer, node.layer_type)


PLUGIN = CorrectBias
