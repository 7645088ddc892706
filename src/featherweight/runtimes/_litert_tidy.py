"""Rewrites of a float ``.tflite`` graph that compute the same on faster kernels.

Part of ``litert.py``. XNNPACK takes PAD but not PADV2, so what comes out of a ReLU is padded for a maximum
with zeros; it takes no RELU_0_TO_1 (of a hard sigmoid), but MINIMUM; a mean over height and width needs no
channels first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from featherweight.runtimes._litert_graph import FlatGraph

_CLAMPED = (1, 3)  # fused RELU and RELU6 in the schema
_BELOW = -1e30
_MOVES = frozenset({"RESHAPE", "TRANSPOSE", "SLICE", "MAX_POOL_2D", "CONCATENATION"})


def tidy(graph: FlatGraph, found: Mapping[str, int]) -> dict[str, int]:
    """Rewrite the graph in place; returns where the values in ``found`` are afterwards."""
    _pad_with_zeros(graph)
    _clamp_in_two(graph)
    return _mean_in_place(graph, found)


def _pad_with_zeros(graph: FlatGraph) -> None:
    producers, consumers = graph.producers(), graph.consumers()
    for operator in list(graph.operators):
        if graph.kind(operator) != "PADV2" or not graph.is_constant(int(operator.inputs[2])):
            continue
        source, paddings, value = (int(index) for index in operator.inputs)
        made = int(operator.outputs[0])
        pooled = all(graph.kind(reader) == "MAX_POOL_2D" for reader in consumers[made])
        low = float(graph.constant(value).reshape(-1)[0]) < _BELOW
        if pooled and low and made not in graph.outputs and _is_positive(graph, source, producers):
            graph.operator("PAD", [source, paddings], [made])
            graph.remove(operator)
    graph.order()


def _clamp_in_two(graph: FlatGraph) -> None:
    for operator in list(graph.operators):
        if graph.kind(operator) != "RELU_0_TO_1":
            continue
        source, made = int(operator.inputs[0]), int(operator.outputs[0])
        positive = graph.add("positive", graph.shape(source), "float32")
        graph.operator("RELU", [source], [positive])
        graph.operator("MINIMUM", [positive, graph.add_constant("one", np.array(1, np.float32))], [made])
        graph.remove(operator)
    graph.order()


def _is_positive(graph: FlatGraph, tensor: int, producers: Mapping[int, Any]) -> bool:
    """Whether nothing in a tensor is below zero."""
    producer = producers.get(tensor)
    if producer is None:
        return False
    kind = graph.kind(producer)
    if kind in ("RELU", "RELU6", "LOGISTIC"):
        return True
    if kind in _MOVES and kind != "CONCATENATION":
        return _is_positive(graph, int(producer.inputs[0]), producers)
    if kind == "CONCATENATION":
        return all(_is_positive(graph, int(source), producers) for source in producer.inputs)
    return getattr(producer.builtinOptions, "fusedActivationFunction", 0) in _CLAMPED


def _mean_in_place(graph: FlatGraph, found: Mapping[str, int]) -> dict[str, int]:
    producers = graph.producers()
    moved: dict[int, int] = {}
    for operator in graph.operators:
        turn = producers.get(int(operator.inputs[0]))
        if graph.kind(operator) != "MEAN" or turn is None or graph.kind(turn) != "TRANSPOSE":
            continue
        if not all(graph.is_constant(int(one.inputs[1])) for one in (operator, turn)):
            continue
        order = [int(axis) for axis in graph.constant(int(turn.inputs[1]))]
        axes = {int(axis) % len(order) for axis in graph.constant(int(operator.inputs[1])).reshape(-1)}
        left = [place for axis, place in enumerate(order) if axis not in axes]
        if operator.builtinOptions.keepDims or left != sorted(left):
            continue
        places = np.array(sorted(order[axis] for axis in axes), np.int32)
        moved[int(operator.inputs[0])] = int(turn.inputs[0])
        operator.inputs = [int(turn.inputs[0]), graph.add_constant("axes", places)]
    return {name: moved.get(tensor, tensor) for name, tensor in found.items()}
