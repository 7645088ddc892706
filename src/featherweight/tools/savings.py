"""Parts of a network that may go, what each saves, and which to take first.

Greedy: every part is taken away alone, what that does to the outputs is measured, and the one with the least
error for what it saves stays away; then the others are measured anew, the least costly first, as long as what
they cost before is less than what the best one costs now (lazy evaluation, Minoux 1978)::

    argmin_i  (error_i - error) / min(saved_i, still needed)

where errors are those of the outputs against the network as it began (``output_error.py``). Statistics of
batch norms are re-estimated before a part is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.model import Model
from featherweight.tools.output_error import Batches, Measure, Outputs, difference, outputs

Unit = Literal["parts", "macs", "parameters", "latency"]
_FLOOR = 1e-3  # of the error so far: smaller differences are noise


@dataclass(frozen=True)
class Saving:
    """A part that may go.

    Attributes:
        name: For the user.
        saved: What goes with it, by unit.
        make: The model without it.
    """

    name: str
    saved: dict[Unit, float]
    make: Callable[[Model], Model]


@dataclass(frozen=True)
class Taken:
    """A part that went.

    Attributes:
        name: Of the part.
        saved: How much of the unit went with it.
        error: Of the outputs from then on.
    """

    name: str
    saved: float
    error: float


@dataclass
class Greedy:
    """Takes parts until enough is saved.

    Attributes:
        offers: The parts that a model has, asked anew each time.
        refresh: Adapts a changed model to its values, e.g. statistics of batch norms.
        batches: Flat inputs.
        entry: Which way of calling the model.
        measure: Of the outputs' error.
        unit: What is saved.
        track: Yields the parts that are measured, with a bar.
        refused: Part -> why it cannot go.
    """

    offers: Callable[[Model], list[Saving]]
    refresh: Callable[[Model], Model]
    batches: Batches
    entry: str
    measure: Measure
    unit: Unit
    track: Callable[[list[Saving]], Iterator[Saving]]

    def __post_init__(self) -> None:
        self.refused: dict[str, str] = {}

    def take(self, model: Model, needed: float) -> tuple[Model, list[Taken]]:
        """The model that saves this much of the unit, or as much as is to be had, and what went."""
        wanted = outputs(model, self.batches, self.entry)
        taken: list[Taken] = []
        known: dict[str, float] = {}  # part -> what it added to the error when it was measured last
        left, error = needed, 0.0
        while left > 1e-9 * max(needed, 1.0):
            best = self._best(model, wanted, error, left, known)
            if best is None:
                break
            model, last = best
            taken.append(last)
            left, error = left - last.saved, last.error
        return model, taken

    def _best(
        self, model: Model, wanted: Outputs, error: float, left: float, known: dict[str, float]
    ) -> tuple[Model, Taken] | None:
        """The part that costs least; those that cost more when fewer were gone are not measured again."""

        def score(one: Saving, added: float) -> float:
            return max(added, _FLOOR * error) / min(one.saved[self.unit], left)

        offers = [one for one in self.offers(model) if one.saved.get(self.unit, 0.0) > 0]
        offers.sort(key=lambda one: score(one, known.get(one.name, 0.0)))
        best: tuple[float, Model, Taken] | None = None
        for one in self.track(offers):
            if one.name in self.refused:
                continue
            if best is not None and one.name in known and score(one, known[one.name]) >= best[0]:
                continue
            try:
                changed = self.refresh(one.make(model))
            except RecipeError as refusal:
                self.refused[one.name] = str(refusal.what)
                continue
            seen = difference(wanted, outputs(changed, self.batches, self.entry), self.measure)
            known[one.name] = seen - error
            own = score(one, known[one.name])
            if best is None or own < best[0]:
                best = own, changed, Taken(one.name, one.saved[self.unit], seen)
        return None if best is None else best[1:]


def with_buffers(model: Model, buffers: Mapping[str, Tensor]) -> Model:
    """The model with other values of some buffers; itself where there are none."""
    if not buffers:
        return model
    module = model.copy_module()
    for name, value in buffers.items():
        module.get_buffer(name).copy_(value)
    return model.evolve(module=module)
