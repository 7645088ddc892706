"""Mixed precision: the bits of each layer's weights, so that the outputs suffer least within a budget.

Bits are worth more where the outputs feel them. How much each layer alone would make them suffer in each
format is found first (tools/sensitivity.py), as the rounding that follows will leave it (tools/foresight.py);
then an integer program takes one format for each layer (tools/assign.py; HAWQ-V3, Yao et al. 2021,
arXiv:2011.10680)::

    minimise sum of losses   subject to   mean bits, bytes, seconds   <=   what was asked

Losses of layers are taken to add up. They do so nearly, so the next best assignments (``rank``) deserve to be
measured for real.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from featherweight.errors import RecipeError, TargetError
from featherweight.formats import TensorFormat
from featherweight.method import Context, Kind, Method, Need
from featherweight.methods.quantize import LayerFormat, Quantize
from featherweight.model import Model
from featherweight.recipe import Choice, Hole
from featherweight.tools.assign import Assignment, Option, OutOfReachError, assign
from featherweight.tools.batches import single_calls
from featherweight.tools.choices import FLOAT, Choices, Group
from featherweight.tools.foresight import Changes, foreseen_changes, nearest_changes
from featherweight.tools.integers import Activations, Shared, Weights
from featherweight.tools.sensitivity import measured_losses, predicted_losses
from featherweight.tools.simulate import sqnr_db

_DIFFERENT = 10  # a next best assignment differs from a better one in one layer of so many
_NO_LOSS = 1e-12
_LOOKED_AT = 9  # values of a limit whose assignments are predicted
_WALKED = 16  # examples in a batch of the walk
_INTEGERS: tuple[Weights, ...] = ("int8", "int6", "int5", "int4", "int3")
_Losses = Mapping[str, Mapping[str, float]]  # subject -> candidate -> loss


class MixedPrecision(Method, frozen=True, extra="forbid"):
    """Give each layer's weights their own bits: the least predicted loss within a budget.

    Attributes:
        bits: Most stored bits of a weight in the mean over the layers decided on, scales included.
        bytes: Most bytes of all parameters.
        latency: Most seconds of a call, as a share of the float network's, by the profile of its layers.
        candidates: Formats to choose among, like ``layers`` of quantize, or ``float``; none given: int8,
            int6, int5, int4 and int3, and float under a latency.
        activations: Type of the activations.
        granularity: What shares a weight's scale.
        group: Weights that share a scale, for ``per_group``.
        rounding: How the weights will be rounded, which the losses anticipate.
        measure: How losses are found: gradient (second order, one backward pass an example) or output (the
            network with one layer changed, a forward pass for each candidate).
        samples: Calibration examples that losses are predicted on.
        rank: 1 is the best assignment, 2 the next best that differs in a tenth of the layers, and so on.
    """

    kind: ClassVar[Kind] = "format"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    bits: Annotated[float, Field(gt=0, le=32)] | None = None
    bytes: Annotated[int, Field(gt=0)] | None = None
    latency: Annotated[float, Field(gt=0)] | None = None
    candidates: tuple[Weights | Literal["float"] | LayerFormat, ...] = ()
    activations: Activations = "int8"
    granularity: Shared = "per_channel"
    group: Annotated[int, Field(ge=2)] = 32
    rounding: Literal["gptq", "nearest"] = "gptq"
    measure: Literal["gradient", "output"] = "gradient"
    samples: Annotated[int, Field(ge=1)] = 128
    rank: Annotated[int, Field(ge=1)] = 1

    @classmethod
    def holes(cls, model: Model, context: Context) -> dict[str, Hole]:
        return {"rank": Choice((1, 2, 3))}

    @classmethod
    def starts(
        cls, model: Model, context: Context, given: Mapping[str, Any], holes: Mapping[str, Hole]
    ) -> Sequence[Mapping[str, Any]]:
        """Limits along the predicted front of loss and cost: one between, the cheapest, the dearest."""
        limit = next((name for name in ("latency", "bytes", "bits") if name in holes), None)
        if limit is None:
            return ()
        first = {name: hole.first for name, hole in holes.items() if "/" not in name}
        methods = {
            value: cls.model_validate({**given, **first, limit: value}) for value in _spread(holes[limit])
        }
        one = next(iter(methods.values()))
        choices = Choices.of(model, one._offers(model, context))
        losses = one._losses(choices, context) if choices.groups else {}
        front: dict[tuple[int, ...], tuple[float, Any]] = {}  # assignment -> its loss, the least limit
        for value, method in methods.items():
            found = method._predicted(choices, losses, context)
            if found is not None:
                front.setdefault(found.chosen, (found.loss, value))
        points = sorted(front.values(), key=lambda point: point[0])
        if not points:
            return ()
        middle = math.sqrt(max(points[0][0], _NO_LOSS) * max(points[-1][0], _NO_LOSS))
        between = min(points, key=lambda point: abs(math.log(max(point[0], _NO_LOSS) / middle)))
        picked = dict.fromkeys(value for _, value in (between, points[-1], points[0]))
        return [{limit: value} for value in picked]

    def _predicted(self, choices: Choices, losses: _Losses, context: Context) -> Assignment | None:
        """The best assignment; None where none keeps the limits."""
        items = [
            list(self._options(choices, one, losses[name], context).values())
            for name, one in choices.groups.items()
        ]
        try:
            return assign(items, self._limits(choices, context))[0] if items else None
        except OutOfReachError:
            return None

    def apply(self, model: Model, context: Context) -> Model:
        choices = Choices.of(model, self._offers(model, context))
        if not choices.groups:
            raise RecipeError(
                f"mixed_precision found no layer to quantize for {context.target.runtime}",
                fix="check where: it excludes every layer that the runtime has integer kernels for",
            )
        limits = self._limits(choices, context)
        losses = self._losses(choices, context)
        options = [self._options(choices, one, losses[name], context) for name, one in choices.groups.items()]
        found = self._assigned([list(own.values()) for own in options], limits)
        labels = [list(own)[index] for own, index in zip(options, found.chosen, strict=True)]
        context.progress.note(f"mixed_precision: {_told(choices, labels, found.loss)}")
        pairs = zip(choices.groups.values(), labels, strict=True)
        layers = {layer: self._rule(label) for one, label in pairs for layer in one.layers}
        return self._quantize(layers=dict(sorted(layers.items()))).apply(model, context)

    # ---- candidates

    def _named(self) -> dict[str, LayerFormat | Literal["float"]]:
        """Candidates by a name that tells them apart."""
        given: tuple[str | LayerFormat, ...] = self.candidates or _INTEGERS
        if not self.candidates and self.latency is not None:
            given = (*given, FLOAT)
        found: dict[str, LayerFormat | Literal["float"]] = {}
        for one in given:
            if one == "float" or one == "none":
                found[FLOAT] = "float"
            elif isinstance(one, LayerFormat):
                found[" ".join(f"{value}" for value in one.model_dump().values())] = one
            else:
                found[one] = LayerFormat.model_validate({"weights": one})
        return found

    def _rule(self, label: str) -> Any:
        rule = self._named()[label]
        return rule.model_dump() if isinstance(rule, LayerFormat) else rule

    def _quantize(self, **more: Any) -> Quantize:
        shared = {"activations": self.activations, "granularity": self.granularity, "group": self.group}
        return Quantize.model_validate({**shared, "where": self.where, **more})

    def _offers(self, model: Model, context: Context) -> dict[str, dict[str, TensorFormat]]:
        """Candidate -> weight -> its format, where the runtime has it; float changes nothing."""
        offers: dict[str, dict[str, TensorFormat]] = {}
        refused: TargetError | None = None
        named = self._named()
        for label, one in context.progress.track(named.items(), "formats of the weights", len(named)):
            if one == "float":
                offers[label] = {}
                continue
            try:
                formats = self._quantize(**one.model_dump()).weight_formats(model, context)
            except TargetError as error:
                refused = error
                continue
            offers[label] = {name: chain[-1] for name, chain in formats.items()}
        if refused is not None and not any(offers.values()):
            raise refused
        return offers

    # ---- losses

    def _losses(self, choices: Choices, context: Context) -> _Losses:
        decisive = {"bits", "bytes", "latency", "rank"}
        parameters = self.model_dump(mode="json", exclude=decisive) | {"candidates": list(choices.offers)}
        found: Any = context.memo("mixed_precision", parameters, lambda: self._computed(choices, context))
        return {name: dict(own) for name, own in found.items()}

    def _computed(self, choices: Choices, context: Context) -> Any:
        model = choices.model
        widest = max(choices.offers, key=lambda label: len(choices.offers[label]))
        values: Mapping[str, tuple[TensorFormat, ...]] = {}
        if self.activations != "none":
            made = self._quantize(**self._rule(widest)).apply(model, context).formats
            values = {name: chain for name, chain in made.items() if name not in model.parameters}
        total: dict[str, dict[str, float]] = {name: {} for name in choices.groups}
        for entry, how in model.entries.items():
            examples = single_calls(context, self.samples, how, "mixed_precision")
            fitted, judged = (examples[0::2], examples[1::2]) if len(examples) > 1 else (examples, examples)
            subjects = choices.subjects(entry, self._changes(choices, context, fitted, entry))
            tracked = context.progress.track(judged, f"sensitivity by {self.measure}", len(judged))
            if self.measure == "gradient":
                found = predicted_losses(model, tracked, subjects, values, seed=context.seed, entry=entry)
            else:
                found = measured_losses(model, tracked, subjects, values, entry=entry)
            for name, own in found.items():
                for label, loss in own.items():
                    total[name][label] = total[name].get(label, 0.0) + loss
        return total

    def _changes(
        self, choices: Choices, context: Context, examples: list[tuple[Tensor, ...]], entry: str
    ) -> Changes:
        if self.rounding == "nearest":
            return nearest_changes(choices.model, choices.by_weight(), context.scratch)
        return foreseen_changes(
            choices.model,
            _together(examples),
            choices.by_weight(),
            scratch=context.scratch,
            progress=context.progress,
            seed=context.seed,
            entry=entry,
        )

    # ---- prices

    def _options(
        self, choices: Choices, group: Group, losses: Mapping[str, float], context: Context
    ) -> dict[str, Option]:
        options = {}
        for label in group.labels:
            size = choices.bytes(group, label)
            prices = {"bits": 8 * size / choices.elements, "bytes": float(size)}
            if self.latency is not None:  # only then are layers timed
                seconds = sum(self._seconds(context, layer, label != FLOAT) for layer in group.layers)
                prices["latency"] = seconds / (_total(context, integers=False) or 1.0)
            options[label] = Option(losses[label], prices)
        return options

    def _limits(self, choices: Choices, context: Context) -> dict[str, float]:
        """What is left of each budget for the layers decided on."""
        limits: dict[str, float] = {}
        decided = {name for one in choices.groups.values() for name in one.weights}
        if self.bits is not None:
            limits["bits"] = self.bits
        if self.bytes is not None:
            others = (tensor for name, tensor in choices.model.parameters.items() if name not in decided)
            limits["bytes"] = self.bytes - 4 * sum(tensor.numel() for tensor in others)
        if self.latency is not None:
            form = self.activations != "none"
            whole, total = _total(context, integers=False), _total(context, integers=form)
            if not whole or total is None:
                raise RecipeError(
                    f"a latency cannot be planned: {context.target.runtime} tells no times of its layers",
                    fix="leave latency out, or take runtime onnxruntime",
                )
            layers = [layer for one in choices.groups.values() for layer in one.layers]
            inside = sum(self._seconds(context, layer, True) for layer in layers)
            limits["latency"] = self.latency - (total - inside) / whole
        return limits

    def _seconds(self, context: Context, layer: str, quantized: bool) -> float:
        """Of one call of a layer; a float one among integers pays for the borders on both sides."""
        costs = context.costs
        if costs is None:
            return 0.0
        mixing = self.activations != "none"
        seconds = costs.seconds(layer, quantized and mixing) or 0.0
        return seconds + (costs.conversion(layer) or 0.0 if mixing and not quantized else 0.0)

    def _assigned(self, items: list[list[Option]], limits: Mapping[str, float]) -> Assignment:
        distance = -(-len(items) // _DIFFERENT)
        try:
            found = assign(items, limits, count=self.rank, distance=distance)
        except OutOfReachError as error:
            raise self._out_of_reach(error, limits) from error
        if len(found) < self.rank:
            raise RecipeError(
                f"there are only {len(found)} assignments of formats within the budget that differ enough",
                fix=f"rank: {len(found)}",
            )
        return found[-1]

    def _out_of_reach(self, error: OutOfReachError, limits: Mapping[str, float]) -> RecipeError:
        asked = {"bits": self.bits, "bytes": self.bytes, "latency": self.latency}[error.limit] or 0.0
        smallest = asked + error.smallest - limits[error.limit]
        shown = f"{smallest:,.0f}" if error.limit == "bytes" else f"{np.ceil(1000 * smallest) / 1000:g}"
        others = [f"{name} {asked:g}" for name, asked in self._asked().items() if name != error.limit]
        beside = f" beside {' and '.join(others)}" if others else ""
        return RecipeError(
            f"{error.limit} of {asked:,g} cannot be reached: the least{beside} is {shown} with "
            f"{', '.join(self._named())}",
            fix=f"{error.limit}: {shown.replace(',', '')}, or more candidates",
        )

    def _asked(self) -> dict[str, float]:
        limits = {"bits": self.bits, "bytes": self.bytes, "latency": self.latency}
        return {name: limit for name, limit in limits.items() if limit is not None}


PLUGIN = MixedPrecision


def _told(choices: Choices, labels: list[str], loss: float) -> str:
    """The assignment in a line."""
    pairs = list(zip(choices.groups.values(), labels, strict=True))
    size = sum(choices.bytes(one, label) for one, label in pairs)
    layers = Counter(label for one, label in pairs for _ in one.layers)
    counted = ", ".join(f"{layers[label]} in {label}" for label in choices.offers if layers[label])
    bits = 8 * size / max(choices.elements, 1)
    return f"{bits:.2f} bits a weight, {counted}; {sqnr_db(1.0, loss):.1f} dB predicted"


def _spread(hole: Hole) -> list[Any]:
    """Values of a hole from the least to the largest: all, or a few of many."""
    if isinstance(hole, Choice):
        return sorted(hole.options)
    if hole.size is not None and hole.size <= _LOOKED_AT:
        return [hole.at(index) for index in range(hole.size)]
    if hole.size is not None:
        return [hole.at(round(index)) for index in np.linspace(0, hole.size - 1, _LOOKED_AT)]
    ends = (math.log(hole.low), math.log(hole.high)) if hole.log else (hole.low, hole.high)
    values = np.linspace(*ends, _LOOKED_AT)
    return [
        min(max(float(f"{v:.6g}"), hole.low), hole.high) for v in (np.exp(values) if hole.log else values)
    ]


def _total(context: Context, integers: bool) -> float | None:
    return None if context.costs is None else context.costs.total(integers)


def _together(examples: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Calls of more examples each."""
    if any(x.shape[:1] != (1,) for call in examples for x in call):
        return examples
    parts = (examples[start : start + _WALKED] for start in range(0, len(examples), _WALKED))
    return [tuple(torch.cat(values) for values in zip(*part, strict=True)) for part in parts]
