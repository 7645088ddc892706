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

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from featherweight.formats import IntQuant
from featherweight.graph import Graph, trace
from featherweight.method import Context, Kind, Method, Need
from featherweight.model import Model
from featherweight.tools.adaround import adaround
from featherweight.tools.batches import calibration_batches
from featherweight.tools.biases import corrected_biases, settled, with_biases, with_values
from featherweight.tools.blocks import reconstruct
from featherweight.tools.gptq import Settings, gptq
from featherweight.tools.hqq import robust_range
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

    def part(self, share: float) -> Rounding | None:
        if self.how not in ("adaround", "blocks"):
            return None
        return self.model_copy(update={"iterations": max(1, round(share * self.iterations))})

    def apply(self, model: Model, context: Context) -> Model:
        weights = self._selected(model)
        if not weights:
            return model.evolve()
        batches: list[tuple[Tensor, ...]] = []
        if self.correct_bias or self.how not in ("hqq", "nearest"):
            batches = calibration_batches(context, self.samples, "rounding")
        worked = with_biases(model, weights) if self.correct_bias else model
        reference = context.float_model(model)
        if self.how == "hqq":
            worked = self._robust(worked, reference, weights)
        if self.how in ("hqq", "nearest"):
            worked = self._corrected(self._nearest(worked, reference, weights), batches, weights, context)
        else:
            if self.how != "blocks":  # which find better roundings from the nearest ones on
                worked = self._gptq(worked, reference, batches, weights, context)
            if self.how != "gptq":
                worked = self._learned(worked, batches, weights, context)
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

    def _learned(
        self,
        model: Model,
        batches: list[tuple[Tensor, ...]],
        weights: frozenset[str],
        context: Context,
    ) -> Model:
        """By gradient steps; AdaRound's begin at the weights as they are."""
        reference = context.float_model(model)
        begun = {name: tensor.detach() for name, tensor in model.parameters.items()}
        left = set(weights)
        for entry in model.entries:
            graph = trace(model, entry)
            mine = left & {name for node in graph for name in node.parameters.values()}
            shared: dict[str, Any] = {
                **{"weights": mine, "iterations": self.iterations, "seed": context.seed, "entry": entry},
                **{"progress": context.progress, "scratch": context.scratch},
            }
            if self.how == "adaround":
                start = {name: begun[name] for name in mine}
                found = adaround(model, reference, batches, start=start, **shared)
            else:
                made = reconstruct(model, reference, batches, fixed=_fixed(graph, context), **shared)
                found = {
                    name: value
                    for name, value in made.parameters.items()
                    if self.correct_bias or name in weights
                }
                model = model.evolve(formats={**model.formats, **made.formats})
            model = with_values(model, found)
            left -= set(found)
        model = self._nearest(model, reference, frozenset(left))
        return model if self.how == "blocks" else self._corrected(model, batches, weights, context)

    def _robust(self, model: Model, reference: Model, weights: frozenset[str]) -> Model:
        """Ranges by HQQ, where a format has a range."""
        known, formats = reference.parameters, dict(model.formats)
        for name in weights:
            chain = formats[name]
            if len(chain) == 1 and isinstance(chain[0], IntQuant):
                weight = known.get(name, model.module.get_parameter(name))
                formats[name] = (robust_range(weight, chain[0]),)
        return model.evolve(formats=formats)

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
        batches: list[tuple[Tensor, ...]],
        weights: frozenset[str],
        context: Context,
    ) -> Model:
        if not self.correct_bias:
            return model
        reference = context.float_model(model)
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


def _fixed(graph: Graph, context: Context) -> frozenset[str]:
    """Values whose range their operator gives on the target."""
    ranges = context.supports.fixed_ranges
    return frozenset(name for node in graph if node.op in ranges for name in node.outputs)
