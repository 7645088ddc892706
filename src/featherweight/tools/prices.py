"""What the layers of a changed model cost on the target: what was measured of the original's, at widths."""

from __future__ import annotations

from featherweight.graph import trace
from featherweight.method import Context, Costs
from featherweight.model import Model

_WITH_CHANNELS = 2  # axes of a weight


class Prices:
    """Seconds of the float layers of a model, from what was measured of the original.

    Args:
        model: Whose layers have the names that they had in the original, maybe fewer channels.
        original: What was measured.
        costs: The measured prices.
        total: Seconds of the whole original.
    """

    def __init__(self, model: Model, original: Model, costs: Costs, total: float) -> None:
        self._first, self._costs = original, costs
        self._layers = {path: self._scaled(model, path) for path in _weighted(model)}
        before = sum(costs.seconds(path, integers=False) or 0.0 for path in _weighted(original))
        self.total = max(total - before, 0.0) + sum(self._layers.values())

    @classmethod
    def of(cls, model: Model, context: Context) -> Prices | None:
        """Those of a model on the context's target; None where its runtime tells no times."""
        total = None if context.costs is None else context.costs.total(integers=False)
        if context.costs is None or total is None:
            return None
        return cls(model, context.models.get("original", model), context.costs, total)

    def seconds(self, path: str) -> float:
        """Of one call of a layer; 0 where nothing is known."""
        return self._layers.get(path, 0.0)

    def _scaled(self, model: Model, path: str) -> float:
        now, then = _widths(model, path), _widths(self._first, path)
        kept = [min(1.0, a / b) for a, b in zip(now, then, strict=True)]
        if kept == [1.0, 1.0]:
            return self._costs.seconds(path, integers=False) or 0.0
        return self._costs.scaled(path, kept[1], kept[0], integers=False) or 0.0


def _weighted(model: Model) -> set[str]:
    graphs = [trace(model, entry) for entry in model.entries]
    return {node.layer for graph in graphs for node in graph if node.parameters}


def _widths(model: Model, path: str) -> tuple[int, int]:
    """Output and input channels of a layer's weight."""
    weight = dict(model.module.named_parameters(remove_duplicate=False)).get(f"{path}.weight")
    if weight is None or weight.dim() < _WITH_CHANNELS:
        return 1, 1
    return weight.shape[0], weight.shape[1]
