"""What a model will cost, from its shapes, its formats and the target's prices alone; nothing is run.

Bytes are those of its parameters in their formats and what the original's files hold beside their own.
Seconds of a layer are those of the original's layer of that name (engine/costs.py), for the share of its
channels that is left (engine/widths.py) and the share of the positions where it is evaluated; one that the
original has not costs as its multiply-accumulates::

    seconds = sum_l price(l, inputs kept, outputs kept, form) * positions kept + rest * activations kept

Where the runtime tells no prices, the multiply-accumulates have to do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from featherweight.errors import RunnerError, TargetError
from featherweight.formats import Dynamic, IntQuant
from featherweight.graph import trace
from featherweight.model import Model
from featherweight.tools.costs import LayerCost, layer_costs, totals

if TYPE_CHECKING:
    from featherweight.engine.run import Run

Form = Literal["float", "integers", "mixed"]


@dataclass(frozen=True)
class Forecast:
    """What shapes and formats tell.

    Attributes:
        bytes: Of the artifact.
        ratio: Latency against the original on the same runtime.
        macs: For one example.
        form: In what its layers compute.
        priced: Whether the table of prices told the ratio; else the multiply-accumulates did.
    """

    bytes: int
    ratio: float
    macs: int
    form: Form
    priced: bool


class Forecaster:
    """Forecasts for one run's models.

    Args:
        run: Brings the original, what steps start from, and the table of prices.
        twin_bytes: Of the original's artifact.
        prices: Whether the table may be used, which is measured when the first price is asked for.
        widths: Whether layers may be measured at several widths, which takes longer.
    """

    def __init__(self, run: Run, twin_bytes: int, *, prices: bool = True, widths: bool = False) -> None:
        self._run = run
        self._prices = prices
        self._widths = widths
        before = totals(run.original)
        self._beside = twin_bytes - before["bytes"]
        self._macs = before["macs"]
        self._rows = _rows(run.start)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in run.start.parameters.items()}

    def of(self, model: Model) -> Forecast:
        """What a model will cost."""
        seen = totals(model)
        forms = integer_layers(model)
        form: Form = "mixed" if len(set(forms.values())) > 1 else "float"
        if forms and all(forms.values()):
            form = "integers"
        ratio = self._ratio(model, forms)
        by_macs = seen["macs"] / max(self._macs, 1)
        return Forecast(
            max(self._beside + seen["bytes"], 1),
            by_macs if ratio is None else ratio,
            seen["macs"],
            form,
            ratio is not None,
        )

    def _ratio(self, model: Model, forms: Mapping[str, bool]) -> float | None:
        costs = self._run.costs
        if not self._prices or not costs.known:
            return None
        try:
            return self._priced(model, forms)
        except (RunnerError, TargetError) as error:  # the profile failed, and would again
            self._prices = False
            self._run.progress.note(f"warning: layers have no prices: {error.what}")
            return None

    def _priced(self, model: Model, forms: Mapping[str, bool]) -> float | None:
        costs = self._run.costs
        whole, mixing = costs.total(False), any(forms.values())
        own = costs.total(mixing)
        if not whole or own is None:
            return None
        rows = _rows(model)
        layers = [name for name, row in self._rows.items() if row.macs]
        inside = math.fsum(costs.seconds(name, mixing) or 0.0 for name in layers)
        seconds = max(own - inside, 0.0) * _elements(rows) / max(_elements(self._rows), 1)
        for name, row in rows.items():
            if row.macs:
                seconds += self._layer(name, row, model, forms.get(name, False))
                if mixing and not forms.get(name, False):
                    seconds += costs.conversion(name) or 0.0
        return seconds / whole

    def _layer(self, name: str, row: LayerCost, model: Model, integers: bool) -> float:
        """Seconds of one layer."""
        costs, before = self._run.costs, self._rows.get(name)
        weight = model.parameters.get(f"{name}.weight")
        shape = self._shapes.get(f"{name}.weight")
        price = costs.seconds(name, integers)
        same = weight is not None and shape is not None and weight.dim() == len(shape)
        if price is None or before is None or not before.macs or not same:
            return row.macs * self._each(integers)
        assert weight is not None and shape is not None
        outputs = weight.shape[0] / shape[0]
        alone = len(shape) > 1 and shape[1] == 1  # depthwise: its one axis of channels is the outputs'
        inputs = weight.shape[1] / shape[1] if len(shape) > 1 and not alone else outputs
        kernels = math.prod(weight.shape[2:]) / max(math.prod(shape[2:]), 1)
        channels = outputs * kernels * (1.0 if alone else inputs)
        positions = row.macs / before.macs / channels
        if not self._widths or (inputs == outputs == 1.0):
            return price * channels * positions
        scaled = costs.scaled(name, inputs, outputs, integers)
        return (price * inputs * outputs if scaled is None else scaled) * kernels * positions

    def _each(self, integers: bool) -> float:
        """Seconds of a multiply-accumulate, in the mean over the original."""
        return (self._run.costs.total(integers) or 0.0) / max(sum(row.macs for row in self._rows.values()), 1)


def integer_layers(model: Model) -> dict[str, bool]:
    """Layer or function with multiply-accumulates and weights -> whether it computes in integers."""
    found: dict[str, bool] = {}
    for entry in model.entries:
        for node in trace(model, entry):
            weights = [name for name in node.parameters.values() if name in model.parameters]
            if not any(model.parameters[name].dim() > 1 for name in weights):
                continue
            stored = any(isinstance(f, IntQuant) for name in weights for f in model.formats.get(name, ()))
            read = any(
                isinstance(f, IntQuant | Dynamic) for name in node.inputs for f in model.formats.get(name, ())
            )
            name = node.layer if "/" not in node.name else node.name
            found[name] = found.get(name, True) and stored and read
    return found


def _rows(model: Model) -> dict[str, LayerCost]:
    found: dict[str, LayerCost] = {}
    for entry in model.entries:
        found |= {row.name: row for row in layer_costs(model, entry)}
    return found


def _elements(rows: Mapping[str, LayerCost]) -> int:
    """Elements that layers with multiply-accumulates make for one example."""
    return sum(math.prod(row.shape) for row in rows.values() if row.macs)
