"""A supernet as ``subnet`` and ``supernet`` see it: what may be cut of it, what that costs, what it loses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featherweight.elastic import Space, Subnet, space_of_supernet
from featherweight.errors import RecipeError
from featherweight.method import Context
from featherweight.model import Model
from featherweight.tools.batches import calibration_batches, entry_of
from featherweight.tools.elastic_cut import Extractor
from featherweight.tools.elastic_space import space_channels, without_excluded
from featherweight.tools.groups import Channels
from featherweight.tools.subnet_costs import SubnetCosts
from featherweight.tools.subnet_search import Judge, Seen, search
from featherweight.tools.widths import Unit
from featherweight.where import Where


@dataclass(frozen=True)
class Held:
    """A supernet and the part of its space that may be cut.

    Attributes:
        model: The supernet.
        space: What may be chosen of it.
        channels: Its groups.
        extractor: Cuts.
        costs: Tells what a subnet costs.
        where: What may be cut.
    """

    model: Model
    space: Space
    channels: Channels
    extractor: Extractor
    costs: SubnetCosts
    where: Where

    def share(self, subnet: Subnet, unit: Unit) -> float:
        """Of the whole network's cost."""
        return self.costs.of(subnet)[unit] / self.costs.of(self.space.largest())[unit]

    def seen(self, unit: Unit, context: Context, *, evaluations: int, samples: int) -> list[Seen]:
        """What a search looked at; it is the same for all amounts of a unit, so it is remembered.

        Args:
            unit: The cost that is made small.
            context: As the step has it.
            evaluations: Networks that are looked at.
            samples: Calibration examples, half of which tell networks apart.
        """
        said: dict[str, Any] = {"unit": unit, "evaluations": evaluations, "samples": samples}
        said["where"] = self.where.model_dump()

        def compute() -> Any:
            batches = calibration_batches(context, max(1, samples // 2), "subnet")
            original = context.models.get("original", self.model)
            entry = entry_of(self.model, batches)
            judge = Judge(self.extractor, original, batches, context.data, self.where, entry)
            found = search(
                self.space,
                self.costs,
                judge,
                self.extractor,
                unit,
                evaluations=evaluations,
                seed=context.seed,
                track=context.progress.track,
            )
            return [one.to_json() for one in found]

        known: Any = context.memo("subnet", said, compute)
        return [Seen.from_json(one) for one in known]


def held(model: Model, context: Context, where: Where, unit: Unit) -> Held:
    """What a supernet holds.

    Args:
        model: Maybe a supernet.
        context: As the step has it.
        where: What may be cut.
        unit: What is counted; layers are timed for ``latency`` alone.

    Raises:
        RecipeError: It is none.
    """
    whole = space_of_supernet(model)
    if whole is None:
        raise RecipeError(
            "subnet takes a network out of a supernet, and this model is none",
            fix="put supernet before subnet in the recipe; prune and shrink cut networks that are none",
        )
    channels = space_channels(model, whole)
    space = without_excluded(whole, channels, model, where)
    extractor = Extractor(model, space, channels)
    first = context.models.get("student", context.models.get("original", model))
    prices = context.costs if unit == "latency" else None
    return Held(model, space, channels, extractor, SubnetCosts(extractor, space, first, prices), where)
