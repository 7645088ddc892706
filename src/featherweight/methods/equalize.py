"""Equalize: channels are rescaled between layers, so that those that share a grid use it alike.

    y = W (x)  =  (W / s) (x * s),   s_c > 0

What produces channel c is multiplied by s_c and what reads it divided (tools/scaling.py says where that
changes nothing). Factors are SmoothQuant's (Xiao et al. 2022, arXiv:2211.10438) or those of cross-layer
equalization (Nagel et al. 2019, arXiv:1906.04721); by default each group takes those with the least
rounding error on calibration examples that they were not made from, or none (tools/equalization.py).
High biases are absorbed by the next layer (same paper, section 4.1.3)::

    relu(z) = relu(z - c) + c   where z >= c,       c = max(0, mean - 3 std)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from featherweight.errors import DataError
from featherweight.graph import trace
from featherweight.method import Context, Kind, Method, Need
from featherweight.model import Model
from featherweight.recipe import Choice, Hole
from featherweight.tools.equalization import Reader, bounds, cross_layer, extents, ranges, score, smooth
from featherweight.tools.reach import Seen, Watch, absorbed, observed
from featherweight.tools.scaling import ScalingGroup, scaled, scaling_groups
from featherweight.tools.simulate import Observe, Replay

_ALPHAS = (0.25, 0.5, 0.75, 1.0)
_BETTER = 0.9  # a group changes for a tenth less error


class Equalize(Method, frozen=True, extra="forbid"):
    """Rescale channels between layers for grids of integers that come after. Outputs stay the same.

    Exact but for channels in front of a clamp (ReLU6), which stay under it by a margin in calibration.

    Attributes:
        by: ``weights``: cross-layer equalization of weight ranges, for weights with one scale per tensor;
            ``activations``: SmoothQuant; ``auto``: for each group of channels what loses least, if anything.
        alpha: How much of the activations' imbalance goes to the weights; ``auto`` tries several, and is
            0.5 for ``activations``.
        granularity: What will share a scale in the weights.
        activation_bits: Width of the activations to come.
        weight_bits: Width of the weights to come.
        limit: Largest factor of a channel beside the group's median.
        clamped: Whether channels in front of a clamp take factors: ``auto`` for weight ranges only.
        margin: How far under a clamp the largest value of a channel stays.
        absorb_bias: Move what all of a channel's values have in common behind its ReLU.
        samples: Calibration examples to read.
    """

    kind: ClassVar[Kind] = "values"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    by: Literal["auto", "weights", "activations"] = "auto"
    alpha: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = "auto"
    granularity: Literal["per_channel", "per_tensor"] = "per_channel"
    activation_bits: Annotated[int, Field(ge=2, le=16)] = 8
    weight_bits: Annotated[int, Field(ge=2, le=16)] = 8
    limit: Annotated[float, Field(ge=1)] = 16.0
    clamped: Literal["auto", "leave", "move"] = "auto"
    margin: Annotated[float, Field(ge=1)] = 2.0
    absorb_bias: bool = False
    samples: Annotated[int, Field(ge=1)] = 128

    @classmethod
    def holes(cls, model: Model, context: Context) -> dict[str, Hole]:
        return {"by": Choice(("auto", "weights", "activations"))}

    def apply(self, model: Model, context: Context) -> Model:
        groups = scaling_groups(model, self.where.selects)
        if not self._moves_clamped:
            groups = [group for group in groups if all(one.limit is None for one in group.carriers)]
        if not groups:
            return model.evolve()
        seen = self._look(model, groups, context)
        factors = self._factors(model, groups, seen)
        tensors = dict(model.parameters)
        tensors |= scaled(tensors, zip(groups, factors, strict=True))
        if self.absorb_bias:
            for group, gains, one in zip(groups, factors, seen, strict=True):
                tensors |= absorbed(tensors, group, gains, one)
        module = model.copy_module()
        with torch.no_grad():
            for name, tensor in tensors.items():
                module.get_parameter(name).copy_(tensor)
        return model.evolve(module=module)

    @property
    def _by_weights(self) -> bool:
        return self.by == "weights" or (self.by == "auto" and self.granularity == "per_tensor")

    @property
    def _moves_clamped(self) -> bool:
        return self.clamped == "move" or (self.clamped == "auto" and self._by_weights)

    # ---- what was seen

    def _look(self, model: Model, groups: list[ScalingGroup], context: Context) -> list[Seen]:
        """One pass over the calibration examples."""
        graphs = {entry: trace(model, entry) for entry in model.entries}
        batches = -(-self.samples // context.data.batch_size)
        kinds = (not self._by_weights, self.absorb_bias)
        seen = [observed(group, graphs, model.parameters, batches, *kinds) for group in groups]
        generator = torch.Generator().manual_seed(context.seed)
        for entry in model.entries:
            watched: dict[str, list[Watch]] = {}
            for one in seen:
                for watch in one.watches:
                    if watch.entry == entry:
                        watched.setdefault(watch.value, []).append(watch)
            if not watched:
                continue
            replay, count = Replay(model, entry), 0
            with torch.inference_mode():
                for batch in _calibration(context, self.samples):
                    makes = count % 2 == 0  # factors; the other half holds them against its values
                    replay(batch, _watching(watched, makes, not makes or batches == 1, generator))
                    count += 1
            if not count:
                raise DataError("equalize found no calibration examples", fix="give x_calibration or x_train")
        return seen

    # ---- factors

    def _factors(self, model: Model, groups: list[ScalingGroup], seen: list[Seen]) -> list[Tensor]:
        ends = [bounds(group, one.clamped, self.margin) for group, one in zip(groups, seen, strict=True)]
        if self._by_weights:
            return cross_layer(groups, ends, model.parameters)
        return [
            self._of_activations(model, group, one, end)
            for group, one, end in zip(groups, seen, ends, strict=True)
        ]

    def _of_activations(
        self, model: Model, group: ScalingGroup, seen: Seen, ends: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The group's factors, by rule or the best of several; ones where none is better."""
        none = torch.ones(group.channels)
        if not seen.reaches or not all(reach.count for reach in seen.reaches) or bool((ends[1] <= 1).all()):
            return none
        activations = extents(seen.reaches)
        weights = ranges(group.consumers, model.parameters, group.channels)
        if self.by == "activations":
            alpha = 0.5 if self.alpha == "auto" else self.alpha
            return _between(smooth(activations, weights, alpha, self.limit), ends)
        alphas = _ALPHAS if self.alpha == "auto" else (self.alpha,)
        tried = [none]
        for alpha in alphas:
            tried.append(_between(smooth(activations, weights, alpha, self.limit), ends))
            tried.append(_between(smooth(activations, None, alpha, self.limit), ends))
        bits, rows = (self.activation_bits, self.weight_bits), self.granularity == "per_channel"
        readers = [
            Reader(slot, model.parameters[slot.parameter].detach().float(), seen.energy(slot))
            for slot in group.consumers
        ]
        errors = [score(one, seen.reaches, readers, bits, rows) for one in tried]
        best = min(range(len(tried)), key=lambda place: errors[place])
        return tried[best] if errors[best] < _BETTER * errors[0] else none


PLUGIN = Equalize


def _watching(
    watched: Mapping[str, list[Watch]], makes: bool, holds: bool, generator: torch.Generator
) -> Observe:
    def observe(name: str, value: Tensor) -> Tensor:
        for watch in watched.get(name, ()):
            watch.update(value, makes, holds, generator)
        return value

    return observe


def _between(factors: Tensor, ends: tuple[Tensor, Tensor]) -> Tensor:
    return torch.minimum(torch.maximum(factors, ends[0]), ends[1])


def _calibration(context: Context, samples: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches of flat inputs, at most so many examples, with a progress bar."""
    batches = context.data.calibration(samples)
    total = -(-samples // context.data.batch_size)
    for arrays in context.progress.track(islice(batches, total), "equalizing", total):
        yield tuple(torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays)
