"""What rounding will do to a layer's weights in each of several formats, before one is chosen.

Rounding that heeds the inputs (tools/gptq.py) lowers the error of few bits a lot, and unevenly: a layer whose
inputs are alike gains more than one whose inputs are not. So the change of each candidate is that of the
rounding which will follow, on the columns X that the layer reads, with the bias taking the mean error::

    dW = Q - W,  Q = argmin tr (W - Q) H (W - Q)ᵀ,  H = cov(X);    db = - dW mean(X)

These examples must not be those on which losses are predicted: Q is fitted to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from featherweight.formats import TensorFormat
from featherweight.graph import Graph, Node, trace
from featherweight.method import Progress, Scratch, in_memory
from featherweight.model import Model
from featherweight.tools.columns import (
    Moments,
    Statistics,
    from_rows,
    is_product,
    pieces,
    to_rows,
)
from featherweight.tools.gptq import damped, round_rows
from featherweight.tools.levels import levels_of
from featherweight.tools.walk import walk

_COLUMNS = 32768  # that the moments of a layer are taken from
_DAMPING = 0.01
_DEPTH = 4  # columns for each of a row's weights below which moments say little

Changes = dict[str, dict[str, dict[str, Tensor]]]  # weight -> candidate -> parameter -> change


def nearest_changes(
    model: Model, formats: Mapping[str, Mapping[str, TensorFormat]], scratch: Scratch = in_memory
) -> Changes:
    """What rounding to the nearest does: weight -> candidate -> {weight: change}."""
    weights = {name: model.parameters[name].detach() for name in formats}
    return {
        name: {
            label: {name: scratch(fmt.project(weights[name]) - weights[name])}
            for label, fmt in candidates.items()
        }
        for name, candidates in formats.items()
    }


def foreseen_changes(
    model: Model,
    batches: Sequence[tuple[Tensor, ...]],
    formats: Mapping[str, Mapping[str, TensorFormat]],
    *,
    scratch: Scratch,
    progress: Progress,
    seed: int = 0,
    entry: str = "forward",
) -> Changes:
    """What rounding by GPTQ and the correction of biases will do to weights.

    Args:
        model: The float network.
        batches: Flat inputs.
        formats: Weight -> candidate -> its format there.
        scratch: Where changes live.
        progress: Shows a bar.
        seed: Of the columns that are picked.
        entry: Which way of calling it.

    Returns:
        Weight -> candidate -> parameter -> what is added to it, the layer's bias among them. A weight that
        is read otherwise than in one product is rounded to the nearest.
    """
    parameters = model.parameters
    readers: dict[str, list[Node]] = {}
    graph = trace(model, entry)
    for node in graph:
        for name in node.parameters.values():
            readers.setdefault(name, []).append(node)
    products = {
        nodes[0].name: name
        for name, nodes in readers.items()
        if name in formats
        and len(nodes) == 1
        and is_product(nodes[0])
        and nodes[0].parameters["weight"] == name
    }
    left = {name: formats[name] for name in formats if name not in products.values()}
    found = nearest_changes(model, left, scratch)
    plain = model.evolve(formats={})
    stops = (stop for stop in walk(plain, plain, batches, scratch, entry) if stop.node.name in products)
    for stop in progress.track(stops, "foreseeing the rounding", len(products)):
        node, name = stop.node, products[stop.node.name]
        inputs = [stop.exact.value(node.inputs[0], batch) for batch in range(len(batches))]
        seen = _moments(graph, node, parameters[name].detach(), inputs, seed)
        bias = node.parameters.get("bias")
        alone = bias is not None and bias in parameters and len(readers[bias]) == 1
        weight = parameters[name].detach()
        found[name] = {
            label: {
                key: scratch(change)
                for key, change in _change(node, name, bias if alone else None, weight, fmt, seen).items()
            }
            for label, fmt in formats[name].items()
        }
    return found


def _moments(graph: Graph, node: Node, weight: Tensor, inputs: Sequence[Tensor], seed: int) -> Statistics:
    groups, outputs, size = to_rows(node, weight).shape
    shown = graph.values[node.outputs[0]].shape, graph.values[node.inputs[0]].shape
    each = math.prod(shown[0]) / (groups * outputs) / math.prod(shown[1])  # columns for an element of input
    total = each * sum(x.numel() for x in inputs)
    share = min(1.0, max(_COLUMNS, _DEPTH * size) / max(total, 1.0))
    moments = Moments(groups, size)
    for x in inputs:
        for (columns,) in pieces(node, weight.shape, x, share=share, seed=seed):
            moments.add(columns, columns)
    return moments.statistics(centred=True)


def _change(
    node: Node, name: str, bias: str | None, weight: Tensor, fmt: TensorFormat, seen: Statistics
) -> dict[str, Tensor]:
    levels = levels_of(fmt, weight)
    if levels is None:
        return {name: fmt.project(weight) - weight}
    rows = to_rows(node, weight).double()
    change = round_rows(rows, damped(seen, _DAMPING), levels.on_rows(node), passes=1) - rows
    changes = {name: from_rows(node, change, weight.shape).to(weight.dtype)}
    if bias is not None:
        changes[bias] = -(change @ seen.mean[:, :, None]).reshape(-1).to(weight.dtype)
    return changes
