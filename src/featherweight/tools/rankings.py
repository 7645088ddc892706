"""The order in which channels go, by any of the importances of a recipe, on whatever examples there are.

``reconstruction`` where a group's readers can be solved anew (``elimination.py``); the groups that are left
get the scores of ``taylor.py``, scaled by what solving anew saves in the groups that have both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from featherweight.errors import DataError, RecipeError
from featherweight.graph import trace
from featherweight.method import Context
from featherweight.model import Model
from featherweight.tools.elimination import eliminate, readers_of, solvable
from featherweight.tools.groups import Channels
from featherweight.tools.importance import activations, has_norms, magnitudes, norm_scales
from featherweight.tools.objectives import task_objective
from featherweight.tools.selection import Ranking
from featherweight.tools.taylor import loss_changes, output_changes

Importance = Literal["l1", "l2", "batch_norm", "taylor", "activation", "reconstruction"]
DATA_FREE = frozenset({"l1", "l2", "batch_norm"})
_BATCH = 16  # examples of a gradient
_RANKED = 256  # examples that rankings are found on
Batches = Sequence[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Ranked:
    """Rankings of all groups.

    Attributes:
        rankings: By group.
        priced: Losses of different groups can be compared.
    """

    rankings: dict[str, Ranking]
    priced: bool


def rank(
    model: Model,
    channels: Channels,
    importance: Importance,
    batches: Batches,
    context: Context,
    entry: str = "forward",
) -> Ranked:
    """Rank the channels of every group.

    Args:
        model: Uncut.
        channels: Its groups.
        importance: By what.
        batches: Flat inputs; none are needed for what weights alone tell.
        context: Labels, seed, progress.
        entry: The way of calling the module that the examples are of.

    Raises:
        RecipeError: No group goes through a norm, for ``batch_norm``.
        DataError: There are no examples, or labels do not fit.
    """
    if importance not in DATA_FREE and not batches:
        raise DataError(
            f"prune found no calibration examples, which importance {importance} needs",
            fix="give x_calibration or x_train, or importance: l2",
        )
    few = _first(batches, _RANKED)
    if importance == "reconstruction":
        return Ranked(_by_reconstruction(model, channels, few, context, entry), priced=True)
    if importance == "taylor":
        return Ranked(_of_scores(_taylor(model, channels, few, context, entry)), priced=True)
    if importance == "activation":
        return Ranked(_of_scores(activations(model, channels, few, entry)), priced=False)
    if importance == "batch_norm":
        if not has_norms(model, channels):
            raise RecipeError(
                "importance batch_norm finds no norm behind the layers that may lose channels",
                fix="prune before fold, or importance: reconstruction or l2",
            )
        return Ranked(_of_scores(norm_scales(model, channels)), priced=False)
    return Ranked(_of_scores(magnitudes(model, channels, "l1" if importance == "l1" else "l2")), priced=False)


def _of_scores(scores: dict[str, Tensor]) -> dict[str, Ranking]:
    return {name: Ranking.of_scores(score.tolist()) for name, score in scores.items()}


def _first(batches: Batches, count: int) -> list[tuple[Tensor, ...]]:
    found, seen = [], 0
    for batch in batches:
        if seen >= count:
            break
        found.append(batch)
        seen += batch[0].shape[0] if batch[0].dim() else 1
    return found


def _by_reconstruction(
    model: Model, channels: Channels, batches: Batches, context: Context, entry: str
) -> dict[str, Ranking]:
    found: dict[str, Ranking] = {}
    solved = solvable(channels, trace(model, entry))
    readers = {}
    if solved:
        readers = readers_of(
            model,
            {member.tensor for members in solved.values() for member in members},
            batches,
            seed=context.seed,
            entry=entry,
            progress=context.progress,
            scratch=context.scratch,
        )
    for name in context.progress.track(list(solved), "ranking channels", len(solved)):
        own = [(member, readers[member.tensor]) for member in solved[name]]
        found[name] = eliminate(channels.groups[name], own)
    if len(found) < len(channels.groups):
        plain = _of_scores(output_changes(model, channels, _small(batches), seed=context.seed, entry=entry))
        saved = _saved(found, plain)
        for name in channels.groups:
            if name not in found:
                losses = tuple(saved * loss for loss in plain[name].losses)
                found[name] = replace(plain[name], losses=losses)
    return {name: found[name] for name in channels.groups}


def _saved(solved: dict[str, Ranking], plain: dict[str, Ranking]) -> float:
    """Loss after solving anew over loss without, at half of the channels: the median over groups."""
    shares = [
        one.losses[len(one.order) // 2] / plain[name].losses[len(one.order) // 2]
        for name, one in solved.items()
        if plain[name].losses[len(one.order) // 2] > 0
    ]
    return float(np.median(shares)) if shares else 1.0


def _small(batches: Batches) -> Iterator[tuple[Tensor, ...]]:
    """Batches of few examples each, so that gradients of different examples do not cancel."""
    for batch in batches:
        if len({x.shape[0] if x.dim() else 0 for x in batch}) > 1 or not batch[0].dim():
            yield batch
        else:
            yield from zip(*(torch.split(x, _BATCH) for x in batch), strict=True)


def _taylor(
    model: Model, channels: Channels, batches: Batches, context: Context, entry: str
) -> dict[str, Tensor]:
    data = context.data
    loss = task_objective(model, data, entry=entry)
    if loss is None or data.train is None:
        small = list(_small(batches))
        tracked = context.progress.track(small, "gradients of channels", len(small))
        return output_changes(model, channels, tracked, seed=context.seed, entry=entry)

    def labelled() -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        seen = 0
        for arrays, targets in data.training(context.seed, _BATCH):
            if seen >= _RANKED:
                return
            seen += len(arrays[0])
            inputs = tuple(torch.from_numpy(np.require(x, requirements=["C", "W"])) for x in arrays)
            yield inputs, torch.from_numpy(np.require(targets, requirements=["C", "W"]))

    total = -(-min(_RANKED, len(data.train)) // _BATCH)
    examples = context.progress.track(labelled(), "gradients of channels", total)
    return loss_changes(
        model, channels, examples, lambda outputs, wanted: loss(outputs, (), wanted), entry=entry
    )
