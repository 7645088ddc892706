"""Quantize: integers for weights and activations, ranges from calibration examples.

Static post-training quantization (Jacob et al. 2018, arXiv:1712.05877); ranges that are found at run
time (``dynamic``); or weights alone. Which values become integers follows the target's kernels
(tools/integers.py). A range is min-max, a moving average, a percentile, or the one of least error
(tools/ranges.py). Layers may be given formats of their own (``layers``), and those that lose most can
stay float (``fallback``, ``where``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from featherweight.errors import DataError, RecipeError, TargetError
from featherweight.formats import Binary, IntQuant, Palette, TensorFormat, floats_alone
from featherweight.graph import Graph, Node, trace
from featherweight.method import Context, Kind, Method, Need
from featherweight.model import Model
from featherweight.recipe import Choice, Hole, Where
from featherweight.tools.calibration import CalibrationInputs, constant_values
from featherweight.tools.integers import (
    WEIGHTED,
    Activations,
    Integers,
    Plan,
    Shared,
    Weights,
    activation_draft,
    plan_integers,
    weight_draft,
    weights_of,
)
from featherweight.tools.output_ranges import output_ranges, readers_of_ranges
from featherweight.tools.ranges import Histogram, RangeRule, WeightRule, activation_range, weight_format
from featherweight.tools.refusals import nothing, stay_float
from featherweight.tools.simulate import Replay, layer_errors, project

MOST_UNUSED = 6  # bits of an eight-bit integer
_ERROR_EXAMPLES = 32

Formats = dict[str, tuple[TensorFormat, ...]]


class LayerFormat(BaseModel):
    """What a layer's weights and inputs become instead; what is not given is the step's.

    Attributes:
        weights: Type of the weights.
        activations: Integers that the layer reads; of several readers of a value the finest count.
        granularity: What shares a weight's scale.
        group: Weights that share a scale, for ``per_group``.
        symmetric_weights: Zero in the middle of the grid.
        headroom: Bits of each integer that the weights leave unused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Weights | None = None
    activations: Integers | None = None
    granularity: Shared | None = None
    group: Annotated[int, Field(ge=2)] | None = None
    symmetric_weights: bool | None = None
    headroom: Annotated[int, Field(ge=0, le=MOST_UNUSED)] | None = None

    @model_serializer
    def _data(self) -> dict[str, Any]:
        return {name: value for name, value in self if value is not None}


class Quantize(Method, frozen=True, extra="forbid"):
    """Integers, static or dynamic; or weights alone. Defaults are the strongest setting without a search.

    Attributes:
        weights: Type of the weights.
        activations: Type of the activations; ``dynamic`` finds their ranges at run time; ``none`` stores
            only weights as integers.
        granularity: What shares a weight's scale.
        group: Weights that share a scale, for ``per_group``.
        symmetric_weights: Zero in the middle of the weights' grid.
        headroom: Bits of each integer that the weights leave unused: the kernels and the size on the device
            stay as they are, and the download shrinks (2 of int8: about a fifth of it).
        symmetric_activations: Zero in the middle of the activations' grid.
        range: How activation ranges are chosen: minmax, moving_average, percentile, kl, l1, mse, or by
            the error of the output of the layers that read them.
        weight_range: How weight ranges are chosen: minmax, percentile, l1, mse, or mse with the loss of gain
            counted more (gain).
        percentile: Share of values inside the range, in percent, for ``percentile``.
        momentum: Of the batches' ends, for ``moving_average``.
        samples: Calibration examples to read.
        fallback: So many layers, those that lose most in the simulation, stay float.
        layers: Layer (glob or type) -> formats of its own, or ``float``; the last rule that matches wins.
    """

    kind: ClassVar[Kind] = "format"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    weights: Weights = "int8"
    activations: Activations = "int8"
    granularity: Shared = "per_channel"
    group: Annotated[int, Field(ge=2)] = 32
    symmetric_weights: bool = True
    headroom: Annotated[int, Field(ge=0, le=MOST_UNUSED)] = 0
    symmetric_activations: bool = False
    range: RangeRule | Literal["output"] = "mse"
    weight_range: WeightRule = "gain"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    samples: Annotated[int, Field(ge=1)] = 256
    fallback: Annotated[int, Field(ge=0)] = 0
    layers: dict[str, LayerFormat | Literal["float"]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _static_inputs(self) -> Quantize:
        own = [one for one in self.layers.values() if isinstance(one, LayerFormat) and one.activations]
        if own and self.activations in ("dynamic", "none"):
            raise ValueError(
                f"layers asks for {own[0].activations} inputs, and activations is {self.activations}: "
                "give activations: int8 or fewer bits"
            )
        return self

    @model_validator(mode="after")
    def _enough_bits(self) -> Quantize:
        own = [one for one in self.layers.values() if isinstance(one, LayerFormat)]
        for one in (LayerFormat(), *own):
            kind = one.weights or self.weights
            unused = self.headroom if one.headroom is None else one.headroom
            if unused and (not kind.startswith("int") or unused > int(kind.removeprefix("int")) - 2):
                raise ValueError(
                    f"headroom leaves {unused} bits of {kind} weights unused, and two at least are needed: "
                    "give integers of more bits, or headroom: 0"
                )
        return self

    @classmethod
    def holes(cls, model: Model, context: Context) -> dict[str, Hole]:
        layers = sum(node.op in WEIGHTED for entry in model.entries for node in trace(model, entry))
        return {
            "range": Choice(("mse", "percentile", "minmax")),
            "fallback": Choice(tuple(n for n in (0, 1, 2, 4) if n < max(layers, 1))),
            "activations": Choice(("int8", "none")),
        }

    def apply(self, model: Model, context: Context) -> Model:
        notes: dict[str, None] = {}
        plans = self._plans(model, context)
        done = self._formats(model, plans, context, notes)
        if self.fallback:
            spared = self._worst(model.evolve(formats=done), context)
            plans = self._plans(model, context, spared)
            done = self._formats(model, plans, context, notes)
        refused = {layer: op for plan in plans.values() for layer, op in plan.refused.items()}
        if not done or (refused and not set(done) & set(model.parameters)):
            graphs = [trace(model, entry) for entry in model.entries]
            raise nothing(graphs, refused, context.supports, context.target.runtime, self._asked())
        for note in (*notes, *self._notes(model, refused, context)):
            context.progress.note(f"warning: {note}")
        return model.evolve(formats={**model.formats, **done})

    def weight_formats(self, model: Model, context: Context) -> Formats:
        """What :meth:`apply` gives to parameters, without calibration; what stays float is not in it."""
        formats: Formats = {}
        for plan in self._plans(model, context).values():
            formats |= self._stored(model, plan, context)
        return formats

    # ---- what becomes integers

    def _plans(self, model: Model, context: Context, spared: frozenset[str] = frozenset()) -> dict[str, Plan]:
        """By entry; ``spared`` layers stay float."""
        graphs = {entry: trace(model, entry) for entry in model.entries}
        nodes = [node for graph in graphs.values() for node in graph]
        own = {node.name: self._own(node) for node in nodes}
        out = {node.layer for node in nodes if not self.where.selects(node.layer, node.layer_type)} | spared
        out |= {node.layer for node in nodes if own[node.name] == "float"}
        held = {name for node in nodes if node.layer in out for name in node.parameters.values()}
        held |= {name for name, chain in model.formats.items() if not floats_alone(chain)}

        def weight(node: Node) -> TensorFormat | None:
            return self._draft(own[node.name])

        def activation(node: Node) -> TensorFormat | None:
            return activation_draft(self._width(node) or self.activations, self.symmetric_activations)

        return {
            entry: plan_integers(graph, context.supports, weight, activation, out, held)
            for entry, graph in graphs.items()
        }

    def _own(self, node: Node) -> LayerFormat | Literal["float"]:
        """What ``layers`` says of a layer."""
        found: LayerFormat | Literal["float"] = LayerFormat()
        for pattern, asked in self.layers.items():
            if Where.model_validate({"include": [pattern]}).selects(node.layer, node.layer_type):
                found = asked
        return found

    def _draft(self, own: LayerFormat | Literal["float"]) -> TensorFormat | None:
        """The format asked for a layer's weights, with a range yet to be found."""
        asked = LayerFormat() if own == "float" else own
        symmetric = self.symmetric_weights if asked.symmetric_weights is None else asked.symmetric_weights
        return weight_draft(
            asked.weights or self.weights,
            symmetric,
            asked.granularity or self.granularity,
            asked.group or self.group,
            self.headroom if asked.headroom is None else asked.headroom,
        )

    # ---- ranges

    def _formats(
        self, model: Model, plans: Mapping[str, Plan], context: Context, notes: dict[str, None]
    ) -> Formats:
        formats: Formats = {}
        for entry, plan in plans.items():
            formats |= self._stored(model, plan, context)
            for value, chain in plan.dynamic.items():
                formats[value] = tuple(_realised(fmt, "activation", context, value) for fmt in chain)
            if plan.values:
                seen = self._seen(model, entry, plan, context, notes)
                widths = self._widths(trace(model, entry), plan)
                formats |= self._activations(seen, plan, widths, context)
                if self.range == "output":
                    formats |= self._by_output(model, entry, formats, seen, plan, context)
        return formats

    def _stored(self, model: Model, plan: Plan, context: Context) -> Formats:
        formats: Formats = {}
        for name, draft in plan.weights.items():
            before = model.formats.get(name, ())  # zeros and palettes, which the ranges are of
            weight = project(model.module.get_parameter(name).detach(), before)
            if not torch.isfinite(weight).all():
                raise DataError(
                    f"'{name}' holds NaN or infinite weights", fix="train or load the model again"
                )
            grid = _realised(draft, "weight", context, name)
            self._check_beside(before, grid, name)
            formats[name] = (*before, weight_format(weight, grid, self.weight_range, self.percentile))
        return formats

    def _check_beside(self, before: tuple[TensorFormat, ...], grid: TensorFormat, name: str) -> None:
        """Weights with zeros or palettes take no format that would undo them."""
        palette = any(isinstance(fmt, Palette) for fmt in before)
        if palette and not isinstance(grid, IntQuant):
            raise RecipeError(
                f"{type(grid).__name__.lower()} weights are a palette of their own, and '{name}' has one",
                fix="take integers behind cluster, or exclude its layer under where",
            )
        if before and isinstance(grid, Binary):
            raise RecipeError(
                f"binary weights have no zero, and '{name}' is sparse",
                fix="take ternary weights, or exclude its layer under where",
            )

    def _seen(
        self, model: Model, entry: str, plan: Plan, context: Context, notes: dict[str, None]
    ) -> dict[str, Histogram]:
        """What calibration shows, by the value that names a grid."""
        grids = {source: plan.grids.get(source, source) for source in plan.values.values()}
        histograms = {name: Histogram(self.momentum) for name in grids.values()}
        replay = Replay(model, entry)

        def observe(name: str, value: torch.Tensor) -> torch.Tensor:
            if name in grids:
                histograms[grids[name]].update(value, name)
            return value

        inputs = CalibrationInputs(replay.graph)
        with torch.inference_mode():
            for batch in _calibration(context, self.samples):
                inputs.update(batch)
                replay(batch, observe)
        if not inputs.count:
            raise DataError(
                "quantize found no calibration examples",
                fix="give x_calibration or x_train, or activations: none",
            )
        odd = (*inputs.notes(context.data, context.seed), *constant_values(histograms))
        notes |= dict.fromkeys(odd)
        return histograms

    def _width(self, node: Node) -> Integers | None:
        """The integers that ``layers`` asks for what a layer reads."""
        own = self._own(node)
        return None if own == "float" else own.activations

    def _widths(self, graph: Graph, plan: Plan) -> dict[str, str]:
        """The finest integers that ``layers`` asks for, by the value that names a grid."""
        read: dict[str, str] = {}
        made: dict[str, str] = {}
        for value, nodes in plan.asking.items():
            source = plan.values[value]
            grid = plan.grids.get(source, source)
            found = read if nodes[0] in graph.consumers[value] else made
            found[grid] = max(found.get(grid, ""), *(self._width(node) or "" for node in nodes))
        return {grid: width for grid, width in (made | read).items() if width}

    def _activations(
        self, seen: Mapping[str, Histogram], plan: Plan, widths: Mapping[str, str], context: Context
    ) -> Formats:
        """One format per source of values; what is only moved shares it."""
        formats: Formats = {}
        for name, histogram in seen.items():
            kind = widths.get(name, self.activations)
            formats[name] = (self._activation(histogram, name, kind, plan.fixed.get(name), context),)
        return {value: formats[plan.grids.get(source, source)] for value, source in plan.values.items()}

    def _by_output(
        self,
        model: Model,
        entry: str,
        formats: Formats,
        seen: Mapping[str, Histogram],
        plan: Plan,
        context: Context,
    ) -> Formats:
        """The same formats over the ranges that suit the layers which read them."""
        readers = readers_of_ranges(trace(model, entry), plan.values, plan.grids, set(WEIGHTED))
        readers = {name: one for name, one in readers.items() if name not in plan.fixed}
        limits = {name: (seen[name].low, seen[name].high) for name in readers}
        batches = list(_calibration(context, min(self.samples, _ERROR_EXAMPLES)))
        whole = model.evolve(formats={**model.formats, **formats})
        reference = context.float_model(model)
        found = output_ranges(
            whole, reference, batches, readers, limits, context.scratch, context.progress, entry
        )
        better: Formats = {}
        for name, (low, high) in found.items():
            (fmt,) = formats[name]
            assert isinstance(fmt, IntQuant)
            better[name] = (replace(fmt, low=torch.tensor(low), high=torch.tensor(high)),)
        return {value: better[source] for value, source in plan.values.items() if source in better}

    def _activation(
        self, seen: Histogram, name: str, kind: str, fixed: tuple[float, float] | None, context: Context
    ) -> TensorFormat:
        low, high = (torch.tensor(end) for end in fixed or (seen.low, seen.high))
        if not torch.isfinite(high - low):
            raise DataError(
                f"the range of '{name}' is infinite in float32: {seen.low:g} to {seen.high:g} on calibration",
                fix="exclude the layers that make and read it under where",
            )
        draft = activation_draft(kind, self.symmetric_activations)
        assert isinstance(draft, IntQuant)
        grid = _realised(replace(draft, low=low, high=high), "activation", context, name)
        if fixed or not isinstance(grid, IntQuant):
            return grid
        rule = "mse" if self.range == "output" else self.range
        low_end, high_end = activation_range(seen, grid, rule, self.percentile)
        return replace(grid, low=torch.tensor(low_end), high=torch.tensor(high_end))

    # ---- what stays float

    def _worst(self, model: Model, context: Context) -> frozenset[str]:
        """The layers whose output suffers most from their own formats, simulated one at a time."""
        errors: dict[str, float] = {}
        for entry in model.entries:
            graph = trace(model, entry)
            stored = [node for node in graph if set(weights_of(node, graph)) & set(model.formats)]
            layers = {node.name: node.layer for node in stored}
            errors |= {layer: np.inf for layer in layers.values() if layer not in errors}
            batches = _calibration(context, min(self.samples, _ERROR_EXAMPLES))
            for name, decibels in layer_errors(model, batches, entry).items():
                if name in layers:
                    errors[layers[name]] = min(decibels, errors[layers[name]])
        return frozenset(sorted(errors, key=lambda layer: errors[layer])[: self.fallback])

    def _asked(self) -> str:
        shared = f"per {self.granularity.removeprefix('per_')}"
        some = ", or what layers says" if self.layers else ""
        return f"weights {self.weights} {shared} with activations {self.activations}{some}"

    def _notes(self, model: Model, refused: Mapping[str, str], context: Context) -> list[str]:
        """Which layers the runtime has nothing for, and which rules mean no layer."""
        notes = [stay_float(refused, context.target.runtime, self._asked())] if refused else []
        layers = {path: type(layer).__name__ for path, layer in model.module.named_modules() if path}
        unmatched = (one for one in self.layers if Where.model_validate({"include": [one]}).unmatched(layers))
        notes += [
            f"layers of quantize names '{one}', which is no layer or type of the model" for one in unmatched
        ]
        return notes


PLUGIN = Quantize


def _realised(
    draft: TensorFormat, role: Literal["weight", "activation"], context: Context, name: str
) -> TensorFormat:
    try:
        return context.supports.realise(draft, role)
    except TargetError as error:
        raise TargetError(error.what, where=f"'{name}', asked for by quantize", fix=error.fix) from error


def _calibration(context: Context, samples: int) -> Iterable[tuple[torch.Tensor, ...]]:
    """Batches of flat inputs, at most so many examples, with a progress bar."""
    batches = context.data.calibration(samples)
    total = -(-samples // context.data.batch_size)
    for arrays in context.progress.track(islice(batches, total), "calibrating", total):
        yield tuple(torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays)
