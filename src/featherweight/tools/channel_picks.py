"""Labels through operators that pick or place elements by numbers: gather, scatter, index, sort, masks."""

from __future__ import annotations

import numpy as np
from torch import fx

from featherweight.tools.channel_products import broadcast
from featherweight.tools.channel_walk import Axes, Made, Rule, Walk, arguments, number, operands, operator_of


def _where_is(walk: Walk, node: fx.Node) -> Made:
    """argmax and the like: positions along an axis mean something, so it stays."""
    axes, given = list(walk.read(operands(node)[0])), arguments(node)
    dim, shape = given.get("dim"), walk.shape(node)
    if dim is None:
        for axis in axes:
            walk.labels.fix(axis)
        return [np.zeros(size, np.int64) for size in shape]
    place = number(dim) % len(axes)
    walk.labels.fix(axes[place])
    if len(shape) < len(axes):
        return axes[:place] + axes[place + 1 :]
    axes[place] = np.zeros(shape[place], np.int64)
    return axes


def _sort(walk: Walk, node: fx.Node) -> Made:
    """Values and where they were; the sorted axis stays."""
    axes, given = list(walk.read(operands(node)[0])), arguments(node)
    place = number(given.get("dim", -1)) % max(1, len(axes))
    walk.labels.fix(axes[place])
    seen = node.meta["val"]
    several = isinstance(seen, (tuple, list))
    axes[place] = axes[place][: number((seen[0] if several else seen).shape[place])]
    return tuple(axes for _ in seen) if several else axes


def _index(walk: Walk, node: fx.Node) -> Made:
    """x[:, indices]: what is chosen from stays; the other axes pass."""
    axes, given = walk.read(operands(node)[0]), arguments(node)["indices"]
    chosen = [place for place, item in enumerate(given) if isinstance(item, fx.Node)]
    for place in chosen:
        walk.labels.fix(axes[place])
    reads = [walk.read(given[place]) for place in chosen]
    made = broadcast(walk, reads)
    if len(walk.shape(node)) != len(axes) - len(chosen) + len(made):
        return walk.unknown(node)  # a mask takes several axes
    rest = [axis for place, axis in enumerate(axes) if place not in chosen]
    adjacent = chosen == list(range(chosen[0], chosen[0] + len(chosen)))
    first = chosen[0] if adjacent else 0
    return [*rest[:first], *made, *rest[first:]]


def _index_select(walk: Walk, node: fx.Node) -> Made:
    axes, given = list(walk.read(operands(node)[0])), arguments(node)
    place = number(given["dim"]) % max(1, len(axes))
    walk.labels.fix(axes[place])
    axes[place] = walk.read(given["index"])[0]
    return axes


def _gather(walk: Walk, node: fx.Node) -> Made:
    """out[i][j] = x[i][index[i][j]]: as many of the other axes as the index has."""
    given = arguments(node)
    axes, index = walk.read(operands(node)[0]), list(walk.read(given["index"]))
    place = number(given["dim"]) % max(1, len(axes))
    walk.labels.fix(axes[place])
    _tie_others(walk, axes, index, place)
    return index


def _tie_others(walk: Walk, axes: Axes, others: Axes, place: int) -> None:
    for other, (one, two) in enumerate(zip(axes, others, strict=True)):
        if other != place and len(one) == len(two):
            walk.labels.tie(one, two)
        elif other != place:
            walk.labels.fix(one)
            walk.labels.fix(two)


def _scatter(walk: Walk, node: fx.Node) -> Made:
    given = arguments(node)
    axes = walk.read(operands(node)[0])
    place = number(given["dim"]) % max(1, len(axes))
    walk.labels.fix(axes[place])
    for name in ("index", "src"):
        if isinstance(given.get(name), fx.Node):
            other = walk.read(given[name])
            walk.labels.fix(other[place])
            _tie_others(walk, axes, other, place)
    return axes


def _slice_scatter(walk: Walk, node: fx.Node) -> Made:
    """A part of the first tensor is written over by the second."""
    given = arguments(node)
    axes, source = walk.read(operands(node)[0]), list(walk.read(operands(node)[1]))
    place = number(given.get("dim", 0)) % len(axes)
    if operator_of(node) == "select_scatter":
        walk.labels.fix(axes[place])
        source.insert(place, np.zeros(len(axes[place]), np.int64))
        part = axes[place]
    else:
        ends = (None if given.get(name) is None else number(given[name]) for name in ("start", "end", "step"))
        part = axes[place][slice(*ends)]
    for other, axis in enumerate(source):
        walk.labels.tie(part if other == place else axes[other], axis)
    return axes


def _one_hot(walk: Walk, node: fx.Node) -> Made:
    return [*walk.read(operands(node)[0]), np.zeros(walk.shape(node)[-1], np.int64)]


def _grid_sample(walk: Walk, node: fx.Node) -> Made:
    """(N, C, H, W) read at points: channels pass, positions and the grid stay."""
    axes, shape = walk.read(operands(node)[0]), walk.shape(node)
    for axis in [*axes[2:], *walk.read(operands(node)[1])]:
        walk.labels.fix(axis)
    return [*axes[:2], *(np.zeros(size, np.int64) for size in shape[2:])]


def _triangle(walk: Walk, node: fx.Node) -> Made:
    """A triangle of a matrix depends on where an element is, so both axes stay."""
    axes = walk.read(operands(node)[0])
    for axis in axes[-2:]:
        walk.labels.fix(axis)
    return axes


RULES: dict[str, Rule] = {
    **dict.fromkeys(("argmax", "argmin"), _where_is),
    **dict.fromkeys(("sort", "argsort", "topk", "kthvalue", "msort"), _sort),
    "index": _index,
    "index_select": _index_select,
    **dict.fromkeys(("gather", "take_along_dim"), _gather),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), _scatter),
    **dict.fromkeys(("slice_scatter", "select_scatter"), _slice_scatter),
    "one_hot": _one_hot,
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), _grid_sample),
    **dict.fromkeys(("tril", "triu"), _triangle),
}
