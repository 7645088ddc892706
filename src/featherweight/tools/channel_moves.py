"""Labels through operators that move elements: views, transpositions, concatenation, slices, shuffles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import numpy as np
from torch import fx

from featherweight.tools.channel_labels import Axis
from featherweight.tools.channel_walk import Axes, Made, Rule, Walk, arguments, number, operands


def _view(walk: Walk, node: fx.Node) -> Made:
    source = operands(node)[0]
    return regroup(walk, walk.read(source), walk.shape(node))


def regroup(walk: Walk, axes: Axes, shape: Sequence[int]) -> Axes:
    """Labels after a reshape: neighbouring axes are joined, then split, in the smallest blocks that match."""
    labels = walk.labels
    if prod(shape) == 0 or prod(map(len, axes)) == 0:
        for axis in axes:
            labels.fix(axis)
        return [np.zeros(size, np.int64) for size in shape]
    ones = [axis for axis in axes if len(axis) == 1]
    there = iter(ones if len(ones) == shape.count(1) else [])
    if len(ones) != shape.count(1):
        for axis in ones:
            labels.fix(axis)
    sources = [axis for axis in axes if len(axis) > 1]
    made: Axes = []
    waiting: list[int] = []
    block: list[Axis] = []
    for size in shape:
        if size == 1:
            made.append(next(there, np.zeros(1, np.int64)))
            if waiting:
                waiting.append(len(made) - 1)
            continue
        waiting.append(len(made))
        made.append(np.zeros(size, np.int64))
        wanted = prod(shape[place] for place in waiting)
        while prod(map(len, block)) < wanted and sources:
            block.append(sources.pop(0))
        if prod(map(len, block)) == wanted:
            places = [place for place in waiting if shape[place] > 1]
            for place, one in zip(places, _apart(walk, block, [shape[p] for p in places]), strict=True):
                made[place] = one
            waiting, block = [], []
    return made


def _apart(walk: Walk, block: list[Axis], shape: list[int]) -> Axes:
    whole = block[0]
    for axis in block[1:]:
        whole = walk.labels.join(whole, axis)
    made: Axes = []
    while len(shape) > 1:
        if not whole.any():
            return made + [np.zeros(size, np.int64) for size in shape]
        first, whole = walk.labels.split(whole, shape[0], prod(shape[1:]))
        made.append(first)
        shape = shape[1:]
    return [*made, whole]


def _order(walk: Walk, node: fx.Node) -> list[int]:
    """New axis -> old axis."""
    given = arguments(node)
    rank = len(walk.shape(node))
    op = str(node.target)
    order = list(range(rank))
    if "permute" in op:
        return [number(axis) % rank for axis in given["dims"]]
    if "movedim" in op or "moveaxis" in op:
        ends = [given["source"], given["destination"]]
        source, target = ([x % rank for x in (end if isinstance(end, list) else [end])] for end in ends)
        rest = [axis for axis in order if axis not in source]
        for axis, place in sorted(zip(source, target, strict=True), key=lambda pair: pair[1]):
            rest.insert(place, axis)
        return rest
    if rank < 2:
        return order
    one, other = (given["dim0"] % rank, given["dim1"] % rank) if "dim0" in given else (rank - 2, rank - 1)
    order[one], order[other] = order[other], order[one]
    return order


def _transpose(walk: Walk, node: fx.Node) -> Made:
    axes = walk.read(operands(node)[0])
    return [axes[axis] for axis in _order(walk, node)]


def _unsqueeze(walk: Walk, node: fx.Node) -> Made:
    axes = list(walk.read(operands(node)[0]))
    axes.insert(arguments(node)["dim"] % (len(axes) + 1), np.zeros(1, np.int64))
    return axes


def _squeeze(walk: Walk, node: fx.Node) -> Made:
    axes = walk.read(operands(node)[0])
    dims = arguments(node).get("dim")
    places = range(len(axes)) if dims is None else dims if isinstance(dims, (list, tuple)) else [dims]
    gone = {place % len(axes) for place in places if len(axes[place]) == 1}
    for place in gone:
        walk.labels.fix(axes[place])
    return [axis for place, axis in enumerate(axes) if place not in gone]


def _expand(walk: Walk, node: fx.Node) -> Made:
    if prod(walk.shape(operands(node)[0])) == 1:
        return filled(walk, node)
    return spread(walk, walk.read(operands(node)[0]), walk.shape(node))


def filled(walk: Walk, node: fx.Node) -> Axes:
    """What code makes of sizes, or of one number, follows them: it has the labels of what it meets."""
    return [
        walk.labels.fresh(size) if isinstance(size, int) and size > 1 else np.zeros(number(size), np.int64)
        for size in node.meta["val"].shape
    ]


def spread(walk: Walk, axes: Axes, shape: Sequence[int]) -> Axes:
    """Labels after broadcasting; an axis of one is taken many times, so it stays."""
    made: Axes = [np.zeros(size, np.int64) for size in shape[: len(shape) - len(axes)]]
    for axis, size in zip(axes, shape[len(shape) - len(axes) :], strict=True):
        if len(axis) != size:
            walk.labels.fix(axis)
        made.append(axis if len(axis) == size else np.zeros(size, np.int64))
    return made


def _repeat(walk: Walk, node: fx.Node) -> Made:
    axes = walk.read(operands(node)[0])
    given = arguments(node)
    times = [number(one) for one in given["repeats" if "repeats" in given else "dims"]]
    rank = max(len(times), len(axes))
    times = [1] * (rank - len(times)) + times
    axes = [np.zeros(1, np.int64)] * (rank - len(axes)) + axes
    return [np.tile(axis, count) for axis, count in zip(axes, times, strict=True)]


def _repeat_interleave(walk: Walk, node: fx.Node) -> Made:
    given = arguments(node)
    axes, count, dim = list(walk.read(operands(node)[0])), given.get("repeats"), given.get("dim")
    if isinstance(count, fx.Node) or dim is None:
        return walk.unknown(node)
    axes[dim] = axes[dim].repeat(number(count))
    return axes


def _cat(walk: Walk, node: fx.Node) -> Made:
    dim = number(arguments(node).get("dim", 0))
    parts = [walk.read(item) for item in operands(node)[0] if len(walk.shape(item)) == len(walk.shape(node))]
    made = list(parts[0])
    for place in range(len(made)):
        if place == dim % len(made):
            made[place] = np.concatenate([part[place] for part in parts])
        else:
            for part in parts[1:]:
                walk.labels.tie(made[place], part[place])
    return made


def _stack(walk: Walk, node: fx.Node) -> Made:
    parts = [walk.read(item) for item in operands(node)[0]]
    made = list(parts[0])
    for part in parts[1:]:
        for one, other in zip(made, part, strict=True):
            walk.labels.tie(one, other)
    made.insert(number(arguments(node).get("dim", 0)) % (len(made) + 1), np.zeros(len(parts), np.int64))
    return made


def _split(walk: Walk, node: fx.Node) -> Made:
    """Pieces; where their number is given, or one size for all, they lose the same of each."""
    axes, given = walk.read(operands(node)[0]), arguments(node)
    dim = number(given.get("dim", 0)) % len(axes)
    lengths = [number(item.shape[dim]) for item in node.meta["val"]]
    pieces = np.split(axes[dim], list(accumulate(lengths))[:-1])
    if "split_sizes" not in given and not isinstance(given.get("split_size"), (list, tuple)):
        for piece in pieces[1:]:
            if len(piece) == len(pieces[0]):
                walk.labels.tie(pieces[0], piece)
            else:
                walk.labels.fix(axes[dim])
    return tuple([*axes[:dim], piece, *axes[dim + 1 :]] for piece in pieces)


def _unbind(walk: Walk, node: fx.Node) -> Made:
    axes = walk.read(operands(node)[0])
    dim = number(arguments(node).get("dim", 0)) % len(axes)
    walk.labels.fix(axes[dim])
    return tuple([axis for place, axis in enumerate(axes) if place != dim] for _ in node.meta["val"])


def _select(walk: Walk, node: fx.Node) -> Made:
    axes = walk.read(operands(node)[0])
    dim = number(arguments(node)["dim"]) % len(axes)
    walk.labels.fix(axes[dim])
    return [axis for place, axis in enumerate(axes) if place != dim]


def _slice(walk: Walk, node: fx.Node) -> Made:
    axes, given = list(walk.read(operands(node)[0])), arguments(node)
    dim = number(given.get("dim", 0)) % len(axes)
    if "length" in given:
        start, step = given["start"], 1
        first = number(start) % max(1, len(axes[dim]))
        last: int | None = first + number(given["length"])
    else:
        start, end, step = given.get("start"), given.get("end"), number(given.get("step", 1))
        first, last = 0 if start is None else number(start), None if end is None else number(end)
    axes[dim] = axes[dim][slice(first, last, step)]
    return axes


def _flip(walk: Walk, node: fx.Node) -> Made:
    axes = list(walk.read(operands(node)[0]))
    for dim in arguments(node)["dims"]:
        axes[dim] = axes[dim][::-1]
    return axes


def _roll(walk: Walk, node: fx.Node) -> Made:
    axes, given = list(walk.read(operands(node)[0])), arguments(node)
    if not given.get("dims"):
        return walk.unknown(node)
    for dim, shift in zip(given["dims"], given["shifts"], strict=True):
        axes[dim] = np.roll(axes[dim], number(shift))
    return axes


def _pad(walk: Walk, node: fx.Node) -> Made:
    axes, given = list(walk.read(operands(node)[0])), arguments(node)
    widths = [number(one) for one in given["pad" if "pad" in given else "padding"]]
    constant = given.get("mode", "constant") == "constant"
    for place in range(len(widths) // 2):
        before, after = widths[2 * place : 2 * place + 2]
        axis = axes[-1 - place]
        if (before or after) and not constant:
            walk.labels.fix(axis)
        axis = axis[max(0, -before) : len(axis) - max(0, -after)]
        ends = [np.zeros(max(0, width), np.int64) for width in (before, after)]
        axes[-1 - place] = np.concatenate([ends[0], axis, ends[1]])
    return axes


def _pixel_shuffle(walk: Walk, node: fx.Node) -> Made:
    """(C * r^2, H, W) -> (C, H * r, W * r): all positions of a channel go together."""
    axes = walk.read(operands(node)[0])
    block = number(arguments(node)["upscale_factor"]) ** 2
    channels, positions = walk.labels.split(axes[-3], len(axes[-3]) // block, block)
    walk.labels.fix(positions)
    shape = walk.shape(node)
    return [*axes[:-3], channels, *(np.zeros(size, np.int64) for size in shape[-2:])]


def _pixel_unshuffle(walk: Walk, node: fx.Node) -> Made:
    axes = walk.read(operands(node)[0])
    block = number(arguments(node)["downscale_factor"]) ** 2
    shape = walk.shape(node)
    return [*axes[:-3], axes[-3].repeat(block), *(np.zeros(size, np.int64) for size in shape[-2:])]


def _channel_shuffle(walk: Walk, node: fx.Node) -> Made:
    axes = list(walk.read(operands(node)[0]))
    groups = number(arguments(node)["groups"])
    outer, inner = walk.labels.split(axes[1], groups, len(axes[1]) // groups)
    axes[1] = walk.labels.join(inner, outer)
    return axes


def _unfold(walk: Walk, node: fx.Node) -> Made:
    """im2col: (N, C, H, W) -> (N, C * kernel, positions)."""
    axes, shape = walk.read(operands(node)[0]), walk.shape(node)
    kernel = shape[-2] // len(axes[-3])
    return [*axes[:-3], axes[-3].repeat(kernel), np.zeros(shape[-1], np.int64)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as"), _view),
    **dict.fromkeys(("reshape_as", "ravel"), _view),
    **dict.fromkeys(("permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("numpy_T", "mT", "matrix_H", "adjoint"), _transpose),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": _stack,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split),
    "unbind": _unbind,
    "select": _select,
    **dict.fromkeys(("slice", "narrow"), _slice),
    "flip": _flip,
    "roll": _roll,
    **dict.fromkeys(("pad", "constant_pad_nd", "zero_pad2d"), _pad),
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _channel_shuffle),
    "im2col": _unfold,
}
