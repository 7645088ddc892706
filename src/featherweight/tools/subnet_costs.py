"""What a subnet costs, before it is cut: from the lengths of axes and the prices of layers on the target.

Multiply-accumulates, parameters and bytes are products of what is left of axes (``widths.py``), kernels'
axes among them, over the calls that are there without the blocks and pixels that the subnet lacks. Seconds
are those that were measured of the original's layers, at the shares of channels that are left, times the
shares of a kernel's taps and of the layer's positions; what is no layer with weights takes as long as it has
elements to make.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from featherweight.elastic import Space, Subnet
from featherweight.graph import trace
from featherweight.method import Costs
from featherweight.model import Model
from featherweight.tools.cut_plan import make_plan
from featherweight.tools.elastic_cut import Base, BaseKey, Extractor
from featherweight.tools.widths import Axis, Lengths, Term, Unit, terms_of

_COUNTED: tuple[Unit, ...] = ("macs", "parameters", "bytes")
_WITH_CHANNELS = 2  # axes of a weight
_PIXELS = 2  # axes of a convolution's output before its positions


@dataclass(frozen=True)
class _Layer:
    """A layer with weights, on the target.

    Attributes:
        weight: First name of its weight; '' where it has none with channels.
        shares: Of the original's outputs and inputs that it has uncut.
        positions: Share of the original's positions of its output.
        depthwise: Whether its inputs go with its outputs.
    """

    weight: str
    shares: tuple[float, float]
    positions: float
    depthwise: bool


@dataclass(frozen=True)
class _Tables:
    """What the cost of the subnets of one base follows from."""

    terms: Mapping[Unit, list[Term]]
    layers: Mapping[str, _Layer]


class SubnetCosts:
    """Costs of subnets of one supernet.

    Args:
        extractor: Of the supernet.
        space: Its subnets.
        original: Whose layers the prices are of.
        costs: Measured prices; None: seconds are not told.
    """

    def __init__(self, extractor: Extractor, space: Space, original: Model, costs: Costs | None) -> None:
        self._extractor, self._space, self._original = extractor, space, original
        self._total = None if costs is None else costs.total(integers=False)
        self._costs = costs if self._total else None
        self._tables: dict[BaseKey, _Tables] = {}
        self._whole = _layers(original, original) if self._costs is not None else {}
        self._elements = _elements(original, {}) if self._costs is not None else 1.0
        self.units: tuple[Unit, ...] = _COUNTED if self._costs is None else (*_COUNTED, "latency")

    def of(self, subnet: Subnet) -> dict[Unit, float]:
        """Multiply-accumulates of an example, parameters, their bytes and, where known, seconds of a call."""
        base = self._extractor.base(subnet)
        left = self._left(base, subnet)
        tables = self._of_base(base)
        found: dict[Unit, float] = {
            unit: sum(term.price(left) for term in terms) for unit, terms in tables.terms.items()
        }
        if self._costs is not None:
            found["latency"] = self._seconds(base, tables, left, self._costs)
        return found

    def _left(self, base: Base, subnet: Subnet) -> dict[Axis, float]:
        """The share of each axis that is left; those left out are whole."""
        plan = make_plan(base.channels, base.dropped(subnet))
        tensors = {**dict(base.model.module.named_parameters()), **dict(base.model.module.named_buffers())}
        left: dict[Axis, float] = {}
        for name, axes in plan.tensors.items():
            if name in tensors:
                left |= {
                    ("", name, axis): 1 - len(gone) / tensors[name].shape[axis] for axis, gone in axes.items()
                }
        for entry, values in plan.values.items():
            known = trace(base.model, entry).values
            for name, axes in values.items():
                shape = known[name].shape
                left |= {(entry, name, axis): 1 - len(gone) / shape[axis] for axis, gone in axes.items()}
        for weight, axis, whole, path in _taps(base.model, self._space):
            left[("", weight, axis)] = subnet.kernels.get(path, whole) / whole
        return left

    def _of_base(self, base: Base) -> _Tables:
        if base.key not in self._tables:
            taps = [("", weight, axis) for weight, axis, _, _ in _taps(base.model, self._space)]
            terms = {unit: terms_of(base.model, base.channels, unit, None, taps) for unit in _COUNTED}
            layers = _layers(base.model, self._original) if self._costs is not None else {}
            self._tables[base.key] = _Tables(terms, layers)
        return self._tables[base.key]

    def _seconds(self, base: Base, tables: _Tables, left: Lengths, costs: Costs) -> float:
        known = sum(costs.seconds(path, integers=False) or 0.0 for path in self._whole)
        seconds = 0.0
        for path, layer in tables.layers.items():
            outs, ins = (
                min(1.0, share * left.get(("", layer.weight, axis), 1.0))
                for axis, share in enumerate(layer.shares)
            )
            ins = outs if layer.depthwise else ins
            own = (
                costs.seconds(path, integers=False)
                if (outs, ins) == (1.0, 1.0)
                else costs.scaled(path, ins, outs, integers=False)
            )
            taps = math.prod(
                share
                for (entry, name, axis), share in left.items()
                if not entry and name == layer.weight and axis >= _WITH_CHANNELS
            )
            seconds += (own or 0.0) * taps * layer.positions
        rest = max((self._total or 0.0) - known, 0.0)
        return seconds + rest * _elements(base.model, left) / max(self._elements, 1.0)


def _taps(model: Model, space: Space) -> list[tuple[str, int, int, str]]:
    """Weight, axis, length and layer of every kernel axis that may become shorter."""
    layers = dict(model.module.named_modules())
    first = {id(tensor): name for name, tensor in model.module.named_parameters()}
    return [
        (first[id(weight)], axis, weight.shape[axis], path)
        for path in space.kernels
        if (weight := getattr(layers.get(path), "weight", None)) is not None
        for axis in range(_WITH_CHANNELS, weight.dim())
    ]


def _layers(model: Model, original: Model) -> dict[str, _Layer]:
    """The layers with weights that a model calls, against those of the original."""
    first = {id(tensor): name for name, tensor in model.module.named_parameters()}
    positions, before = _positions(model), _positions(original)
    found: dict[str, _Layer] = {}
    for path, count in positions.items():
        now, then = _weight(model, path), _weight(original, path)
        share = count / before.get(path, count)
        if now is None or then is None or now.dim() < _WITH_CHANNELS:
            found[path] = _Layer("", (1.0, 1.0), share, depthwise=False)
            continue
        shares = now.shape[0] / then.shape[0], now.shape[1] / then.shape[1]
        layer = model.module.get_submodule(path)
        depthwise = getattr(layer, "groups", 1) > 1 and now.shape[1] == 1
        found[path] = _Layer(first[id(now)], shares, share, depthwise)
    return found


def _weight(model: Model, path: str) -> nn.Parameter | None:
    try:
        weight = getattr(model.module.get_submodule(path), "weight", None)
    except AttributeError:  # the block that it was in is gone
        return None
    return weight if isinstance(weight, nn.Parameter) else None


def _positions(model: Model) -> dict[str, float]:
    """Layer with weights -> positions of its first output: pixels of a convolution's, else 1."""
    found: dict[str, float] = {}
    for entry in model.entries:
        graph = trace(model, entry)
        for node in graph:
            if node.parameters and node.layer:
                shape = graph.values[node.outputs[0]].shape
                pixels = node.op.startswith("conv")
                found.setdefault(node.layer, math.prod(shape[_PIXELS:]) if pixels else 1.0)
    return found


def _elements(model: Model, left: Lengths) -> float:
    """Of all that a call makes."""
    return sum(
        math.prod(size * left.get((entry, name, axis), 1.0) for axis, size in enumerate(value.shape))
        for entry in model.entries
        for name, value in trace(model, entry).values.items()
    )
