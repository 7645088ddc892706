"""GPTQ: integers chosen by the error of a layer's output, each later weight making up for the earlier ones.

With the columns of a layer's input in the float network (x) and in the stored one (x̂), the error of the
output is, but for what no choice of Q changes::

    E || W x - Q x̂ ||²  =  tr (T - Q) H (T - Q)ᵀ,    H = E[x̂ x̂ᵀ],    T = W + W E[(x - x̂) x̂ᵀ] H⁻¹

T are the best float weights behind what is already stored (asymmetric calibration; Li et al. 2025,
arXiv:2504.02692). Ridges, H + damping * mean(diag H), keep T near W and Q near T where examples are few; each
half of the examples tells which ridge suits the other half. Where the bias takes the mean error, all moments
are about their means. With H = L Lᵀ and e = T - Q, a row is rounded from its last weight to its first (GPTQ,
Frantar et al. 2022, arXiv:2210.17323; the nearest-plane algorithm of Babai 1986)::

    q_j = round(t_j + sum_{i > j} e_i L_ij / L_jj)

Levels may be uneven (those of a palette): the nearest one is taken. Weights whose inputs are largest come
first. Then single weights move to other levels while that lowers the error (coordinate descent).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.formats import TensorFormat, zeros_alone
from featherweight.graph import Graph, Node, trace
from featherweight.method import Progress, Scratch, Silent, in_memory
from featherweight.model import Model
from featherweight.tools.biases import own_bias
from featherweight.tools.columns import (
    Moments,
    Statistics,
    from_rows,
    is_product,
    joined,
    pieces,
    to_rows,
)
from featherweight.tools.levels import Levels, Shades, in_order, levels_of
from featherweight.tools.simulate import project, readers_of
from featherweight.tools.walk import Stop, walk

_BLOCK = 64  # weights of a row between two updates of all others
_TINY = 1e-30
_COLUMNS = 8192  # of a layer's inputs that are looked at, or
_PER_WEIGHT = 16  # this many for each weight of a row
_PLENTY = 20  # positions for each weight of a row, above which the ridge matters little
_RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 30.0)  # of T
_SILENT = Silent()


Halves = tuple[Moments, Moments]  # of the examples, every second one in each


@dataclass(frozen=True)
class Settings:
    """How gptq solves a layer.

    Attributes:
        damping: Least ridge, as a share of the mean of H's diagonal.
        follow: Whether Q is near T; else near W.
        correct_bias: Whether biases take the mean error.
        passes: Of coordinate descent.
    """

    damping: float = 0.01
    follow: bool = True
    correct_bias: bool = True
    passes: int = 4


_DEFAULTS = Settings()


def gptq(
    model: Model,
    reference: Model,
    batches: Sequence[tuple[Tensor, ...]],
    *,
    weights: Collection[str],
    settings: Settings = _DEFAULTS,
    seed: int = 0,
    entry: str = "forward",
    progress: Progress = _SILENT,
    scratch: Scratch = in_memory,
) -> dict[str, Tensor]:
    """On-grid weights, and biases that take the mean error, layer by layer.

    Args:
        model: With formats.
        reference: The same network as float.
        batches: Flat inputs.
        weights: Parameters to round. Those that something else than a product with a layer's input reads,
            and those whose format has no levels of its own, are left out.
        settings: How a layer is solved.
        seed: Of the columns that are looked at, where there are very many.
        entry: Which way of calling the module.
        progress: Where it says how far it is.
        scratch: Where values live.

    Returns:
        New values by parameter name.
    """
    graph = trace(model, entry)
    calls = _calls_of(model, graph, weights)
    several = {name for name, nodes in calls.items() if len(nodes) > 1}
    seen: dict[str, Halves] = {}
    if several:  # what later calls read is known from a walk in which each weight is the nearest
        stops = walk(model, reference, batches, scratch, entry)
        for stop in progress.track(stops, "reading shared layers", len(graph.nodes)):
            if stop.node.parameters.get("weight") in several:
                _look(stop, seen, model.formats, seed)
    found: dict[str, Tensor] = {}
    stops = walk(model, reference, batches, scratch, entry)
    for stop in progress.track(stops, "rounding weights", len(graph.nodes)):
        name = stop.node.parameters.get("weight", "")
        if name not in calls or name in found:
            continue
        if name not in several:
            _look(stop, seen, model.formats, seed)
        bias = own_bias(graph, stop.node) if settings.correct_bias else None
        if name in several and settings.correct_bias:
            bias = _shared_bias(graph, calls[name])
        found |= _solved(stop, model.formats[name], seen.pop(name), bias, settings)
    return found


def _calls_of(model: Model, graph: Graph, weights: Collection[str]) -> dict[str, list[Node]]:
    """Weight -> the calls that read it, where all of them are products in the same arrangement."""
    calls: dict[str, list[Node]] = {}
    other: set[str] = set()
    for node in graph:
        for argument, name in node.parameters.items():
            if name not in weights:
                continue
            *before, last = model.formats[name]
            plain = argument == "weight" and is_product(node) and zeros_alone(before)
            if plain and levels_of(last, model.module.get_parameter(name)) is not None:
                calls.setdefault(name, []).append(node)
            else:
                other.add(name)
    for name, nodes in calls.items():
        if len({(node.op, node.attributes.get("groups", 1)) for node in nodes}) > 1:
            other.add(name)
    return {name: nodes for name, nodes in calls.items() if name not in other}


def _shared_bias(graph: Graph, calls: Sequence[Node]) -> str | None:
    """The bias that all calls of a weight read, and nobody else."""
    names = {node.parameters.get("bias") for node in calls}
    (name,) = names if len(names) == 1 else (None,)
    readers = [node for node in graph if name is not None and name in node.parameters.values()]
    return name if len(readers) == len(calls) else None


def _look(
    stop: Stop, seen: dict[str, Halves], formats: Mapping[str, tuple[TensorFormat, ...]], seed: int
) -> None:
    """Add what a call reads, in both networks, to the moments of its weight."""
    node, twin = stop.node, stop.twin
    name = node.parameters["weight"]
    shape = tuple(stop.stored.parameter(name).shape)
    groups, outputs, size = to_rows(node, stop.stored.parameter(name).detach()).shape
    halves = seen.setdefault(name, (Moments(groups, size), Moments(groups, size)))
    value, graph = node.inputs[0], stop.stored.graph
    chain = tuple(fmt for fmt in formats.get(value, ()) if node.op in readers_of(fmt))
    examples = sum(_examples(stop.stored.value(value, batch)) for batch in range(stop.stored.count))
    each = math.prod(graph.values[node.outputs[0]].shape) / (groups * outputs) / _examples_of(graph, value)
    share = max(_COLUMNS, _PER_WEIGHT * size) / max(examples * each, 1)
    for batch in range(stop.stored.count):
        exact = stop.exact.value(twin.inputs[0], batch)
        stored = project(stop.stored.value(value, batch), chain)
        for half, moments in enumerate(halves):
            begin = (batch + half) % 2
            if begin >= _examples(stored):
                continue
            pair = (exact[begin::2], stored[begin::2]) if stored.dim() > 1 else (exact, stored)
            for columns in pieces(node, shape, *pair, share=share, seed=seed + batch):
                moments.add(*columns)


def _examples(x: Tensor) -> int:
    return x.shape[0] if x.dim() else 1


def _examples_of(graph: Graph, value: str) -> int:
    shape = graph.values[value].shape
    return shape[0] if shape else 1


def _solved(
    stop: Stop, chain: tuple[TensorFormat, ...], halves: Halves, bias: str | None, settings: Settings
) -> dict[str, Tensor]:
    """A layer's weight and bias, which the stored network goes on with."""
    node, name = stop.node, stop.node.parameters["weight"]
    weight = stop.exact.parameter(stop.twin.parameters["weight"]).detach()
    rows = to_rows(node, weight.double())
    parts = [half.statistics(centred=bias is not None) for half in halves if half.positions]
    seen = parts[0] if len(parts) == 1 else joined(parts[0], parts[1], centred=bias is not None)
    levels = levels_of(chain[-1], weight)
    assert levels is not None
    kept = project(torch.ones_like(weight), chain[:-1]) > 0  # what is to be zero has no other level
    grid = levels.masked(kept).on_rows(node)
    target = following(rows, parts, seen) if settings.follow else rows
    ridge = _ridge(target, parts, seen, grid, settings.damping)
    chosen = round_rows(target, damped(seen, ridge), grid, settings.passes)
    value = project(from_rows(node, chosen, weight.shape).float(), chain)
    found = {name: value}
    if bias is not None:
        gap = rows @ seen.float_mean[..., None] - to_rows(node, value.double()) @ seen.mean[..., None]
        start = stop.exact.parameter(stop.twin.parameters["bias"]) if "bias" in stop.twin.parameters else 0
        found[bias] = (gap.reshape(-1) + start).detach().float()
    for parameter, tensor in found.items():
        stop.stored.set_parameter(parameter, tensor)
    return found


def following(rows: Tensor, parts: Sequence[Statistics], seen: Statistics) -> Tensor:
    """T with the ridge at which each half of the examples is told best by the other; W where none is."""
    if len(parts) == 1 or not seen.drift.any():
        return rows
    loss = dict.fromkeys(_RIDGES, 0.0)
    for one, other in (parts, parts[::-1]):
        for ridge in _RIDGES:
            away = rows - best_weights(rows, one, damped(one, ridge))
            loss[ridge] += float(((away @ other.second + 2 * rows @ other.drift) * away).sum())
    ridge = min(_RIDGES, key=lambda one: loss[one])
    return best_weights(rows, seen, damped(seen, ridge)) if loss[ridge] < 0 else rows


def _ridge(
    target: Tensor, parts: Sequence[Statistics], seen: Statistics, levels: Levels | Shades, least: float
) -> float:
    """The ridge for rounding: the least one, or where positions are few what the other half tells."""
    if len(parts) == 1 or seen.positions >= _PLENTY * target.shape[2]:
        return least
    choices = (least, 10 * least, 100 * least)
    loss = dict.fromkeys(choices, 0.0)
    for one, other in (parts, parts[::-1]):
        for ridge in choices:
            chosen = round_rows(target, damped(one, ridge), levels, 0)
            loss[ridge] += float(errors(target, chosen, other.second).sum())
    return min(choices, key=lambda one: loss[one])


def damped(seen: Statistics, damping: float) -> Tensor:
    """H and its ridge, (groups, K, K)."""
    diagonal = seen.second.diagonal(dim1=1, dim2=2)
    ridge = damping * diagonal.mean(1) + _TINY
    return seen.second + ridge[:, None, None] * torch.eye(diagonal.shape[1], dtype=torch.float64)


def best_weights(rows: Tensor, seen: Statistics, hessian: Tensor) -> Tensor:
    """T: the float weights that make the float network's output from the stored network's input."""
    change: Tensor = torch.linalg.solve(hessian, (rows @ seen.drift).mT)
    return rows + change.mT


def errors(rows: Tensor, chosen: Tensor, hessian: Tensor) -> Tensor:
    """tr (T - Q) H (T - Q)ᵀ of each row, (groups, rows)."""
    gap = rows - chosen
    return ((gap @ hessian) * gap).sum(2)


def round_rows(rows: Tensor, hessian: Tensor, levels: Levels | Shades, passes: int = 4) -> Tensor:
    """Levels for rows that make little error of the output; never more than the nearest levels make.

    Args:
        rows: T, (groups, rows, K), float64.
        hessian: H, (groups, K, K), positive definite, float64.
        levels: Of each weight, in the shape of ``rows``.
        passes: Of coordinate descent.

    Returns:
        Values on the levels, in the shape of ``rows``.
    """
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1)  # the last one is rounded first
    back = order.argsort(dim=1)
    t, sorted_levels = in_order(rows, order), levels.in_order(order)
    h = in_order(in_order(hessian, order).mT, order).mT
    chosen = _nearest_plane(t, torch.linalg.cholesky(h), sorted_levels)
    plain = sorted_levels.nearest(t)
    worse = errors(t, chosen, h) > errors(t, plain, h)
    chosen = torch.where(worse[:, :, None], plain, chosen)
    chosen = _descend(t, chosen, h, sorted_levels, passes)
    return in_order(chosen, back)


def _nearest_plane(t: Tensor, factor: Tensor, levels: Levels | Shades) -> Tensor:
    shares = factor / factor.diagonal(dim1=1, dim2=2)[:, None]
    chosen, error = torch.empty_like(t), torch.zeros_like(t)
    for end in range(t.shape[2], 0, -_BLOCK):
        start = max(0, end - _BLOCK)
        wanted = t[..., start:end] + error[..., end:] @ shares[:, end:, start:end]
        inner = shares[:, start:end, start:end]
        for j in range(end - 1, start - 1, -1):
            k = j - start
            value = wanted[..., k] + (error[..., j + 1 : end] @ inner[:, k + 1 :, k, None])[..., 0]
            chosen[..., j] = levels.nearest(value, j)
            error[..., j] = t[..., j] - chosen[..., j]
    return chosen


def _descend(t: Tensor, chosen: Tensor, h: Tensor, levels: Levels | Shades, passes: int) -> Tensor:
    """Coordinate descent: each weight to its best level, the others held."""
    chosen = chosen.clone()
    slope = (t - chosen) @ h
    curve = h.diagonal(dim1=1, dim2=2)
    for _ in range(passes):
        moved = False
        for start in range(0, t.shape[2], _BLOCK):
            end = min(start + _BLOCK, t.shape[2])
            before = chosen[..., start:end].clone()
            local = slope[..., start:end].clone()
            for j in range(start, end):
                best = chosen[..., j] + local[..., j - start] / curve[:, j, None]
                value = levels.nearest(best, j)
                local -= (value - chosen[..., j])[..., None] * h[:, j, None, start:end]
                chosen[..., j] = value
            change = chosen[..., start:end] - before
            if change.any():
                slope -= change @ h[:, start:end]
                moved = True
        if not moved:
            break
    return chosen
