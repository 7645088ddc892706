"""Which channels go: widths that kernels like, chosen so that little is lost for what is saved.

Each group ranks its channels (``rankings.py``); what is left to choose is how many of each go. Widths are
whole multiples of what the target's kernels work in; that is part of the choice, not a rounding after it::

    next step = argmin over groups g and widths w < w_g of  (loss_g(w) - loss_g(w_g)) / saved(g, w)

with what is saved (MACs, bytes, measured seconds) beside everything that went before: in a product of two
widths the second one saves less. Scores that are not comparable between groups are ranked as they are,
without a price, in one list over all groups (``global``), over groups of equal shape (``isomorphic``; Fang et
al. 2024, arXiv:2407.04616), or in each group (``layer``); every list loses the same fraction of its channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from featherweight.tools.groups import ChannelGroup, Channels
from featherweight.tools.widths import Candidate

Scope = Literal["global", "layer", "isomorphic"]
_WIDTHS = 64  # of a group that are looked at
_AHEAD = 4  # widths that a step may pass
_TINY = 1e-12


@dataclass(frozen=True)
class Ranking:
    """In which order the channels of a group go, and what that costs.

    Attributes:
        order: Channels, the first one to go first.
        losses: What the network loses without the first k of them, for k from 0 to all; never falling.
    """

    order: tuple[int, ...]
    losses: tuple[float, ...]

    @classmethod
    def of_scores(cls, scores: Sequence[float]) -> Ranking:
        """The ranking of channels whose losses add up."""
        order = sorted(range(len(scores)), key=lambda channel: (scores[channel], channel))
        losses = [0.0]
        for channel in order:
            losses.append(losses[-1] + max(float(scores[channel]), 0.0))
        return cls(tuple(order), tuple(losses))

    def between(self, more: int, fewer: int) -> float:
        """What going on from ``fewer`` removed channels to ``more`` costs."""
        return self.losses[more] - self.losses[fewer]


@dataclass(frozen=True)
class Limits:
    """How narrow groups may become.

    Attributes:
        multiple: Widths of channels and hidden units are multiples of it, where a group is wide enough.
        least: Channels that stay in each group.
        most: Largest fraction of a group that may go.
    """

    multiple: int = 8
    least: int = 1
    most: float = 1.0

    def widths(self, group: ChannelGroup) -> tuple[int, ...]:
        """How many channels of a group may stay, from all of them down."""
        step = self.multiple if group.kind in ("channel", "hidden", "head_dim") else 1
        while step > 1 and 2 * step > group.size:
            step //= 2
        floor = max(self.least, step, 1, group.size - int(self.most * group.size + 1e-9))
        found = [width for width in range(step, group.size, step) if width >= floor]
        thin = -(-len(found) // _WIDTHS)
        found = found[::-1][::thin][::-1] if thin > 1 else found
        return (group.size, *reversed(found))


def isomorphic(channels: Channels) -> list[list[str]]:
    """Groups of equal shape: the same kind, and the same roles on axes of tensors of the same number."""

    def shape(group: ChannelGroup) -> object:
        members = [
            (member.role, member.axis, len(member.indices[0]), member.tensor.rpartition(".")[2])
            for member in group.members
        ]
        return group.kind, tuple(sorted(members))

    found: dict[object, list[str]] = {}
    for name, group in channels.groups.items():
        found.setdefault(shape(group), []).append(name)
    return list(found.values())


def select(
    candidate: Candidate,
    channels: Channels,
    rankings: Mapping[str, Ranking],
    keep: float,
    limits: Limits,
    *,
    scope: Scope = "global",
    priced: bool = False,
) -> bool:
    """Remove channels of a candidate until its cost is down to a fraction of the whole.

    Args:
        candidate: Nothing removed yet; changed in place.
        channels: The groups that may lose channels.
        rankings: Of each of them.
        keep: Fraction of the cost to keep, above 0.
        limits: How narrow groups may become.
        scope: Between which groups channels are ranked.
        priced: The losses of different groups can be compared, so that what they save counts.

    Returns:
        Whether the fraction was reached; if not, nothing more can go.
    """
    budget = keep * candidate.whole * (1 + 1e-9)
    widths = {name: limits.widths(group) for name, group in channels.groups.items()}
    if scope == "global" and priced:
        _greedy(candidate, rankings, widths, budget)
    else:
        names = list(channels.groups)
        lists = [names] if scope == "global" else [[name] for name in names]
        lists = isomorphic(channels) if scope == "isomorphic" else lists
        _evenly(candidate, rankings, widths, lists, budget)
    if candidate.cost > budget:
        return False
    if scope == "global":
        _give_back(candidate, rankings, widths, budget)
    return True


def below(
    candidate: Candidate,
    channels: Channels,
    rankings: Mapping[str, Ranking],
    threshold: float,
    limits: Limits,
) -> None:
    """Remove the channels that score below a share of the mean of their group, as far as widths allow."""
    for name, group in channels.groups.items():
        ranking = rankings[name]
        limit = threshold * ranking.losses[-1] / group.size
        going = sum(ranking.between(k + 1, k) < limit for k in range(group.size))
        width = min(width for width in limits.widths(group) if width >= group.size - going)
        candidate.drop(name, ranking.order[: group.size - width])


# ---- with a price


def _greedy(
    candidate: Candidate,
    rankings: Mapping[str, Ranking],
    widths: Mapping[str, tuple[int, ...]],
    budget: float,
) -> None:
    steps: dict[
        str, list[tuple[int, float, float]]
    ] = {}  # group -> (removed, loss, saved) of its next widths
    touched = {name: candidate.touched(name) for name in widths}
    stale = set(widths)
    while candidate.cost > budget:
        for name in stale:
            steps[name] = _next(candidate, name, rankings[name], widths[name])
        over = candidate.cost - budget
        best = min(
            (
                (loss / max(min(saved, over), _TINY), name, more)
                for name, own in steps.items()
                for more, loss, saved in own
            ),
            default=None,
        )
        if best is None:
            return
        _, name, more = best
        candidate.drop(name, rankings[name].order[:more])
        stale = {other for other in widths if touched[other] & touched[name]} | {name}


def _next(
    candidate: Candidate, name: str, ranking: Ranking, widths: Sequence[int]
) -> list[tuple[int, float, float]]:
    size, gone = widths[0], len(candidate.dropped[name])
    found = []
    for width in [one for one in widths if one < size - gone][:_AHEAD]:
        more = size - width
        saved = candidate.saving(name, ranking.order[gone:more])
        if saved > 0:
            found.append((more, ranking.between(more, gone), saved))
    return found


def _give_back(
    candidate: Candidate,
    rankings: Mapping[str, Ranking],
    widths: Mapping[str, tuple[int, ...]],
    budget: float,
) -> None:
    """Put back what the last steps took more than was needed, the most important channels first."""
    while True:
        best: tuple[float, str, tuple[int, ...]] | None = None
        for name, own in widths.items():
            gone = len(candidate.dropped[name])
            wider = [width for width in own if width > own[0] - gone]
            if not wider:
                continue
            fewer, ranking = own[0] - min(wider), rankings[name]
            back = ranking.order[fewer:gone]
            candidate.restore(name, back)
            fits = candidate.cost <= budget
            candidate.drop(name, back)
            gain = ranking.between(gone, fewer)
            if fits and (best is None or gain > best[0]):
                best = gain, name, back
        if best is None:
            return
        candidate.restore(best[1], best[2])


# ---- ranked as they are


def _evenly(
    candidate: Candidate,
    rankings: Mapping[str, Ranking],
    widths: Mapping[str, tuple[int, ...]],
    lists: Sequence[Sequence[str]],
    budget: float,
) -> None:
    """The smallest fraction that, taken from every list of groups, meets the budget."""
    queues = [_queue(rankings, widths, names) for names in lists]
    totals = [sum(widths[name][0] for name in names) for names in lists]
    shares = {0.0}
    for queue, total in zip(queues, totals, strict=True):
        gone = 0
        for _, channels in queue:
            gone += len(channels)
            shares.add((gone - len(channels) / 2) / total)
    ordered = sorted(shares)
    low, high = 0, len(ordered) - 1
    while low < high:
        middle = (low + high) // 2
        _take(candidate, queues, totals, ordered[middle])
        if candidate.cost <= budget:
            high = middle
        else:
            low = middle + 1
    _take(candidate, queues, totals, ordered[low])


_Queue = list[tuple[str, tuple[int, ...]]]


def _queue(
    rankings: Mapping[str, Ranking], widths: Mapping[str, tuple[int, ...]], names: Sequence[str]
) -> _Queue:
    """Steps of groups, the least loss of a channel first; each group in its own order."""
    found: list[tuple[float, int, str, tuple[int, ...]]] = []
    for name in names:
        ranking, own = rankings[name], widths[name]
        stops = [own[0] - width for width in own]
        place = 0
        while place < len(stops) - 1:  # the lower hull of the losses, so that steps only become dearer
            start = stops[place]
            slopes = [(ranking.between(stop, start) / (stop - start), stop) for stop in stops[place + 1 :]]
            slope, stop = min(slopes, key=lambda one: (one[0], one[1]))
            for fewer, more in zip(stops[place:], stops[place + 1 :], strict=False):
                if more <= stop:
                    found.append((slope, more, name, ranking.order[fewer:more]))
            place = stops.index(stop)
    return [(name, channels) for _, _, name, channels in sorted(found, key=lambda one: (one[0], one[1]))]


def _take(candidate: Candidate, queues: Sequence[_Queue], totals: Sequence[int], share: float) -> None:
    """Remove this share of the channels of every list, to the nearest step."""
    wanted: dict[str, set[int]] = {name: set() for name in candidate.dropped}
    for queue, total in zip(queues, totals, strict=True):
        gone = 0
        for name, channels in queue:
            gone += len(channels)
            if (gone - len(channels) / 2) / total > share + _TINY:
                break
            wanted[name] |= set(channels)
    for name, going in wanted.items():
        candidate.restore(name, candidate.dropped[name] - going)
        candidate.drop(name, going - candidate.dropped[name])
