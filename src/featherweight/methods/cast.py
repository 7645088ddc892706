"""Cast: weights stored as 16-bit floats, half the bytes; in what is computed is the runtime's affair."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch

from featherweight.errors import RecipeError
from featherweight.formats import FloatCast, floats_alone
from featherweight.graph import trace
from featherweight.method import Context, Kind, Method
from featherweight.model import Model


class Cast(Method, frozen=True, extra="forbid"):
    """Matrices and kernels as 16-bit floats; biases and norms stay float32.

    Attributes:
        weights: Type of the weights.
    """

    kind: ClassVar[Kind] = "format"

    weights: Literal["float16", "bfloat16"] = "float16"

    def apply(self, model: Model, context: Context) -> Model:
        fmt = FloatCast(self.weights)
        chosen: dict[str, None] = {}
        held = {name for name, chain in model.formats.items() if not floats_alone(chain)}
        for entry in model.entries:
            graph = trace(model, entry)
            for node in graph:  # what a layer that stays as it is reads stays as it is for every reader
                read = [name for name in node.parameters.values() if len(graph.parameter_shapes[name]) > 1]
                if not self.where.selects(node.layer, node.layer_type):
                    held |= set(read)
                elif context.supports(node.op, fmt, None):
                    chosen |= dict.fromkeys(read)
        parameters = dict(model.module.named_parameters())
        formats = {
            name: (*model.formats.get(name, ()), context.supports.realise(fmt, "weight"))
            for name in chosen
            if name in parameters and name not in held and parameters[name].dtype == torch.float32
        }
        if not formats:
            raise RecipeError(
                f"cast found no weight that {context.target.runtime} stores as {self.weights}",
                fix=self._instead(model, context),
            )
        return model.evolve(formats={**model.formats, **formats})

    def _instead(self, model: Model, context: Context) -> str:
        """What the runtime does store."""
        operators = sorted(
            {node.op for entry in model.entries for node in trace(model, entry) if node.parameters}
        )
        for kind in get_args(Cast.model_fields["weights"].annotation):
            fmt = FloatCast(kind)
            if kind != self.weights and any(context.supports(op, fmt, None) for op in operators):
                return f"use weights: {kind}, which {context.target.runtime} stores"
        return "check where, or take another runtime"


PLUGIN = Cast
