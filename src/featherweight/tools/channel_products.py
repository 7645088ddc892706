"""Labels through products of matrices and attention: what is contracted goes on both sides or on none."""

from __future__ import annotations

import numpy as np
from torch import fx

from featherweight.tools.channel_labels import Axis
from featherweight.tools.channel_moves import spread
from featherweight.tools.channel_walk import Axes, Made, Rule, Walk, arguments, operands


def _matmul(walk: Walk, node: fx.Node) -> Made:
    left, right = operands(node)[:2]
    return _product(walk, left, right)


def _product(walk: Walk, left: fx.Node, right: fx.Node) -> Axes:
    one, other = walk.read(left), walk.read(right)
    contracted = len(other) - 2 if len(other) > 1 else 0
    walk.labels.tie(one[-1], other[contracted])
    _roles(walk, left, one, len(one) - 1, len(one) - 2)
    _roles(walk, right, other, contracted, len(other) - 1)
    if not walk.sources(left) and not walk.sources(right):
        walk.mark("head_dim", one[-1])
        walk.mark("head_dim", other[-1])
        for axis in one[:-2]:
            walk.mark("head", axis)
    batch = broadcast(walk, [one[:-2], other[:-2]])
    rows = [one[-2]] if len(one) > 1 else []
    return [*batch, *rows, *([other[-1]] if len(other) > 1 else [])]


def _roles(walk: Walk, node: fx.Node, axes: Axes, contracted: int, kept: int) -> None:
    """A matrix of parameters reads by one axis and writes by the other."""
    if walk.sources(node):
        walk.use(node, contracted, axes[contracted], "reads")
        if kept >= 0 and kept != contracted:
            walk.use(node, kept, axes[kept], "writes")


def broadcast(walk: Walk, several: list[Axes]) -> Axes:
    """Labels of the common shape; axes of its size are tied, axes of one are taken many times and stay."""
    rank = max(map(len, several))
    shape = [
        max(len(axes[place - rank]) if len(axes) >= rank - place else 1 for axes in several)
        for place in range(rank)
    ]
    if any(len(axis) == 0 for axes in several for axis in axes):
        for axes in several:
            for axis in axes:
                walk.labels.fix(axis)
        return [np.zeros(0 if size == 1 else size, np.int64) for size in shape]
    wide = [spread(walk, axes, shape) for axes in several]
    made: Axes = []
    for place in range(rank):
        own = [
            axes[place]
            for axes, small in zip(wide, several, strict=True)
            if len(small) >= rank - place and len(small[place - rank]) == shape[place]
        ]
        for axis in own[1:]:
            walk.labels.tie(own[0], axis)
        made.append(own[0])
    return made


def _addmm(walk: Walk, node: fx.Node) -> Made:
    added, left, right = operands(node)[:3]
    made = _product(walk, left, right)
    bias = walk.read(added)
    if walk.sources(added) and len(bias) == 1 and len(bias[0]) > 1:
        walk.use(added, 0, made[-1], "writes")
        return made
    return broadcast(walk, [made, bias])


def _einsum(walk: Walk, node: fx.Node) -> Made:
    given = arguments(node)
    terms, _, result = given["equation"].replace(" ", "").partition("->")
    reads = [(item, walk.read(item)) for item in given["tensors"]]
    inputs = terms.split(",")
    if not result or "." in terms:
        return walk.unknown(node)
    found: dict[str, Axis] = {}
    for letters, (_, axes) in zip(inputs, reads, strict=True):
        for letter, axis in zip(letters, axes, strict=True):
            before = found.setdefault(letter, axis)
            if len(before) != len(axis):
                for one in (before, axis):
                    walk.labels.fix(one)
                found[letter] = before if len(before) > 1 else axis
            else:
                walk.labels.tie(before, axis)
    active = not any(walk.sources(item) for item, _ in reads)
    for letters, (item, axes) in zip(inputs, reads, strict=True):
        for letter, (place, axis) in zip(letters, enumerate(axes), strict=True):
            shared = all(letter in term for term in inputs)
            if walk.sources(item):
                walk.use(item, place, axis, "writes" if letter in result and not shared else "reads")
            elif active and len(reads) > 1:
                walk.mark("head" if shared and letter in result else "head_dim", axis)
    return [found[letter] for letter in result]


def _attention(walk: Walk, node: fx.Node) -> Made:
    """softmax(q k^T) v, heads in the axis before the last two; with grouped queries, kv heads repeated."""
    given = arguments(node)
    query, key, value = (list(walk.read(given[name])) for name in ("query", "key", "value"))
    labels = walk.labels
    labels.tie(query[-1], key[-1])
    labels.tie(key[-2], value[-2])
    if given.get("enable_gqa") and len(query) > 2:
        for axes in (key, value):
            axes[-3] = axes[-3].repeat(len(query[-3]) // len(axes[-3]))
    batch = broadcast(walk, [query[:-2], key[:-2], value[:-2]])
    mask = given.get("attn_mask")
    if isinstance(mask, fx.Node):
        broadcast(walk, [[*batch, query[-2], key[-2]], walk.read(mask)])
    for axis in batch[-1:]:
        walk.mark("head", axis)
    for axis in (query[-1], value[-1]):
        walk.mark("head_dim", axis)
    return [*batch, query[-2], value[-1]]


def _outer(walk: Walk, node: fx.Node) -> Made:
    one, other = (walk.read(item) for item in operands(node)[:2])
    return [*one, *other]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("matmul", "bmm", "mm", "mv", "dot"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("outer", "ger"), _outer),
}
