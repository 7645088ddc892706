"""Which subnets of a supernet lose least for what they cost: a front, found by NSGA-II.

Deb et al. 2002, doi:10.1109/4235.996017, on two objectives: what a subnet costs on the target, told by
tables, and what its outputs lose against the original's on a few examples, with batch-norm statistics of its
own. No labels are needed. A space that is smaller than the number of evaluations is looked through whole.

It begins with what each choice loses by itself, and with the way from the largest to the smallest network on
which each step loses least for what it saves, as if losses added up: random networks of twenty choices are
hardly ever whole in most of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from featherweight.data import Data
from featherweight.elastic import Axis, Space, Subnet
from featherweight.errors import RecipeError
from featherweight.model import Model
from featherweight.tools.batch_norms import reestimate
from featherweight.tools.distill_losses import output_kinds
from featherweight.tools.distillation import outputs_loss
from featherweight.tools.elastic_cut import Extractor
from featherweight.tools.output_error import Batches, outputs
from featherweight.tools.subnet_costs import SubnetCosts
from featherweight.tools.widths import Unit
from featherweight.where import Where

_LEVELS = (1.0, 0.0, 0.5, 0.75, 0.25)  # of everything, in subnets that are looked at first
_KIND_LEVELS = (0.5, 0.0)  # of one kind of choice alone, in those that come next
_STATISTICS = 128  # examples that tell batch-norm statistics of a subnet that is judged
_GENERATIONS = 8
_FEWEST, _MOST = 10, 50  # members of a population
_SINGLE = 3  # a third of the evaluations at most, for choices by themselves
_WAY = 4  # a quarter, for the way down
_REPEATS = 5  # proposals for each evaluation; the others were known

Picks = tuple[int, ...]  # of each axis, which of its options
Track = Callable[[Iterable[int], str, int], Iterator[int]]


@dataclass(frozen=True)
class Seen:
    """A subnet that was looked at.

    Attributes:
        subnet: Which one.
        costs: What it costs, by unit.
        loss: What its outputs lose against the original's.
    """

    subnet: Subnet
    costs: Mapping[Unit, float]
    loss: float

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {"subnet": self.subnet.to_json(), "costs": dict(self.costs), "loss": self.loss}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Seen:
        """What :meth:`to_json` wrote."""
        return cls(Subnet.from_json(data["subnet"]), dict(data["costs"]), float(data["loss"]))


def front(seen: Sequence[Seen], unit: Unit) -> list[Seen]:
    """Those that nothing cheaper is as good as, the cheapest first."""
    found: list[Seen] = []
    for one in sorted(seen, key=lambda one: (one.costs[unit], one.loss)):
        if not found or one.loss < found[-1].loss:
            found.append(one)
    return found


def spread(found: Sequence[Seen], unit: Unit, count: int) -> list[Seen]:
    """So many of a front, or all of it, evenly in the logarithm of their cost; the cheapest first."""
    if not found:
        return []
    ends = math.log(found[0].costs[unit]), math.log(found[-1].costs[unit])
    left, chosen = list(found), []
    for step in range(min(count, len(found))):
        at = ends[0] + (ends[1] - ends[0]) * (step + 0.5) / count
        nearest = min(range(len(left)), key=lambda place: abs(math.log(left[place].costs[unit]) - at))
        chosen.append(left.pop(nearest))
    return sorted(chosen, key=lambda one: one.costs[unit])


class Judge:
    """What subnets lose against the original on a few examples.

    Args:
        extractor: Of the supernet.
        original: Whose outputs are wanted.
        batches: Flat inputs of the examples.
        data: What the outputs hold.
        where: Which layers' statistics may change.
        entry: Which way of calling it.
    """

    def __init__(
        self,
        extractor: Extractor,
        original: Model,
        batches: Batches,
        data: Data,
        where: Where,
        entry: str = "forward",
    ) -> None:
        self._extractor, self._batches, self._where, self._entry = extractor, batches, where, entry
        self._wanted = outputs(original, batches, entry)
        self._kinds = output_kinds(self._wanted[0], data)
        counts = list(itertools.accumulate(len(batch[0]) for batch in batches))
        enough = next((place for place, count in enumerate(counts) if count >= _STATISTICS), len(counts))
        self._first = batches[: enough + 1]

    def loss(self, subnet: Subnet) -> float:
        """Mean over the examples; infinite where outputs are not finite.

        Raises:
            RecipeError: The module's code cannot follow.
        """
        sub = self._extractor.extract(subnet)
        with torch.no_grad():
            for name, value in reestimate(sub, self._first, self._where.selects, self._entry).items():
                sub.module.get_buffer(name).copy_(value)
        made = outputs(sub, self._batches, self._entry)
        total = count = 0.0
        for found, wanted, batch in zip(made, self._wanted, self._batches, strict=True):
            total += len(batch[0]) * float(outputs_loss(found, wanted, self._kinds, 1.0))
            count += len(batch[0])
        loss = total / count
        return loss if loss == loss else float("inf")


def search(
    space: Space,
    costs: SubnetCosts,
    judge: Judge,
    extractor: Extractor,
    unit: Unit,
    *,
    evaluations: int,
    seed: int,
    track: Track,
) -> list[Seen]:
    """Look at subnets, from all over the space and then near those that did well.

    Args:
        space: What may be chosen.
        costs: Tell what one costs.
        judge: Tells what it loses.
        extractor: Tells which subnets are the same network.
        unit: The cost that is made small.
        evaluations: How many are looked at.
        seed: The only source of randomness.
        track: Shows how far it is.

    Returns:
        All that were looked at.
    """
    known: dict[str, Seen | None] = {}

    def look(subnet: Subnet) -> Seen | None:
        key = extractor.signature(subnet)
        if key not in known:
            try:
                known[key] = Seen(subnet, costs.of(subnet), judge.loss(subnet))
            except RecipeError:  # e.g. two groups that cannot both be so narrow
                known[key] = None
        return known[key]

    proposals = _all(space) if space.count <= evaluations else _bred(space, look, unit, evaluations, seed)
    several = min(space.count, evaluations)
    for _ in track(range(several), "looking for the best subnets", several):
        before = len(known)
        for _, subnet in zip(range(_REPEATS), proposals, strict=False):
            look(subnet)
            if len(known) > before:
                break
    return [one for one in known.values() if one is not None]


def _all(space: Space) -> Iterator[Subnet]:
    for options in itertools.product(*(axis.options for axis in space.axes)):
        yield space.chosen(options)


def _bred(
    space: Space, look: Callable[[Subnet], Seen | None], unit: Unit, evaluations: int, seed: int
) -> Iterator[Subnet]:
    """Proposals of NSGA-II; each is looked at before the next one is asked for."""
    import optuna  # only here: it takes a while to import

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    size = min(max(evaluations // _GENERATIONS, _FEWEST), _MOST)
    sampler = optuna.samplers.NSGAIISampler(population_size=size, seed=seed)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    axes = space.axes

    starts = _starts(space, look, unit, evaluations)
    while True:
        start = next(starts, None)
        if start is not None:
            study.enqueue_trial({_name(axis): pick for axis, pick in zip(axes, start, strict=True)})
        trial = study.ask()
        picks = [trial.suggest_int(_name(axis), 0, len(axis.options) - 1) for axis in axes]
        subnet = _picked(space, picks)
        yield subnet
        seen = look(subnet)
        if seen is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, [seen.costs[unit], seen.loss])


def _starts(
    space: Space, look: Callable[[Subnet], Seen | None], unit: Unit, evaluations: int
) -> Iterator[Picks]:
    """What is looked at first: what was trained most, levels, choices by themselves, and the way down."""
    axes = space.axes
    for known in space.among:
        yield tuple(axis.options.index(one) for axis, one in zip(axes, space.options(known), strict=True))
    for levels in _first(axes):
        yield tuple(axis.options.index(axis.at(level)) for axis, level in zip(axes, levels, strict=True))
    whole = tuple(len(axis.options) - 1 for axis in axes)
    few = evaluations // _SINGLE
    singles = [(place, pick) for place, top in enumerate(whole) for pick in reversed(range(top))]
    if len(singles) > few:
        singles = [(place, 0) for place in range(len(axes))]
    if len(singles) > few:
        return

    uncut = look(_picked(space, whole))
    alone: list[dict[int, tuple[float, float]]] = [{top: (0.0, 0.0)} for top in whole]
    for place, pick in singles:
        picks = (*whole[:place], pick, *whole[place + 1 :])
        yield picks
        cut = look(_picked(space, picks))
        if uncut is not None and cut is not None:
            alone[place][pick] = max(cut.loss - uncut.loss, 0.0), uncut.costs[unit] - cut.costs[unit]
    way = list(_way(whole, alone))
    yield from way[:: max(math.ceil(len(way) * _WAY / evaluations), 1)]


def _picked(space: Space, picks: Sequence[int]) -> Subnet:
    return space.chosen([axis.options[pick] for axis, pick in zip(space.axes, picks, strict=True)])


def _way(whole: Picks, alone: Sequence[Mapping[int, tuple[float, float]]]) -> Iterator[Picks]:
    """From the largest network down, each step the one that loses least for what it saves.

    Args:
        whole: Each axis's largest option.
        alone: Of each axis, option -> what the network loses and what it saves with that choice alone.
    """
    now = list(whole)

    def price(place: int) -> tuple[float, float]:
        pick = max(one for one in alone[place] if one < now[place])
        lost, saved = (
            after - before for before, after in zip(alone[place][now[place]], alone[place][pick], strict=True)
        )
        return (max(lost, 0.0) / saved if saved > 0 else math.inf), -saved

    while True:
        left = [place for place, pick in enumerate(now) if min(alone[place]) < pick]
        if not left:
            return
        place = min(left, key=price)
        now[place] = max(one for one in alone[place] if one < now[place])
        yield tuple(now)


def _first(axes: Sequence[Axis]) -> Iterator[list[float]]:
    """Levels of the axes: all the same, then those of one kind with all others whole."""
    yield from ([level] * len(axes) for level in _LEVELS)
    for kind in dict.fromkeys(axis.kind for axis in axes):
        for level in _KIND_LEVELS:
            yield [level if axis.kind == kind else 1.0 for axis in axes]


def _name(axis: Axis) -> str:
    return f"{axis.kind} {axis.name}"
