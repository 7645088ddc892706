"""Which of ncnn's tensors is which parameter, and which blob is which traced value.

pnnx renames, fuses and folds, so names are found by what is held: a stored weight is its parameter, row
by row up to the factor of a batch norm that was folded in; a blob is the value that it equals for an example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from featherweight.graph import Graph, Node
from featherweight.runtimes._ncnn_file import Layer
from featherweight.runtimes._ncnn_session import same

_PADS = ("constant_pad_nd", "pad")
_WEIGHTED = ("conv1d", "conv2d", "conv3d", "linear")


@dataclass
class Match:
    """What was found.

    Attributes:
        parameters: Layer -> role of a tensor -> parameter.
        nodes: Layer -> the call whose weight it holds.
        factors: Layer -> what each output channel of the weight was multiplied by.
        values: Traced value -> blob.
    """

    parameters: dict[str, dict[str, str]] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    factors: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)


def match(
    graph: Graph,
    layers: Sequence[Layer],
    tensors: Mapping[str, np.ndarray],
    values: Mapping[str, np.ndarray],
    blobs: Mapping[str, np.ndarray],
) -> Match:
    """Find names for tensors and blobs.

    Args:
        graph: Of the entry.
        layers: What pnnx made of it.
        tensors: Parameters and buffers by name.
        values: Traced values of one example, without the batch.
        blobs: What ncnn computes for it.
    """
    found = Match()
    taken: set[tuple[str, str]] = set()
    for layer in layers:
        named = found.parameters.setdefault(layer.name, {})
        for role, stored in layer.tensors.items():
            if role == "weight" and _weighted(found, graph, layer, tensors, values, blobs, taken):
                continue
            if role not in named and (name := _same(stored, tensors, {name for _, name in taken})):
                named[role] = name
                taken.add(("", name))
    found.values = _values(values, blobs)
    return found


def _weighted(
    found: Match,
    graph: Graph,
    layer: Layer,
    tensors: Mapping[str, np.ndarray],
    values: Mapping[str, np.ndarray],
    blobs: Mapping[str, np.ndarray],
    taken: set[tuple[str, str]],
) -> bool:
    """Find the call of a convolution or linear layer: by its weight, and by what it reads."""
    for node in graph:
        name = node.parameters.get("weight")
        if node.op not in _WEIGHTED or name is None or (node.name, name) in taken:
            continue
        read = [values[value] for value in _sources(node, graph)]
        if not layer.inputs or not any(same(blobs[layer.inputs[0]], value) for value in read):
            continue
        factor = _factor(layer.tensors["weight"], tensors[name])
        if factor is None:
            continue
        taken.add((node.name, name))
        found.parameters[layer.name]["weight"] = name
        if "bias" in node.parameters and "bias" in layer.tensors:
            found.parameters[layer.name]["bias"] = node.parameters["bias"]
            taken.add((node.name, node.parameters["bias"]))
        found.nodes[layer.name], found.factors[layer.name] = node, factor
        return True
    return False


def _sources(node: Node, graph: Graph) -> list[str]:
    """What a layer reads, also ahead of the padding that pnnx puts into it."""
    found = list(node.inputs[:1])
    pad = graph.producer.get(found[0]) if found else None
    return found + (list(pad.inputs[:1]) if pad is not None and pad.op in _PADS else [])


def _factor(stored: np.ndarray, parameter: np.ndarray) -> np.ndarray | None:
    """What each row of a parameter was multiplied by, or None if that does not make what is stored."""
    if stored.size != parameter.size:
        return None
    own = parameter.reshape(len(parameter), -1).astype(np.float64)
    rows = stored.reshape(own.shape).astype(np.float64)
    energy = (own * own).sum(1)
    factor: np.ndarray = np.where(energy > 0, (rows * own).sum(1) / np.where(energy > 0, energy, 1), 1.0)
    exact = np.abs(factor - 1) < 1e-6
    factor = np.where(exact, 1.0, factor)
    rest = np.abs(rows - factor[:, None] * own).max(1, initial=0)
    return factor if bool((rest <= 1e-5 * np.abs(rows).max(1, initial=0) + 1e-12).all()) else None


def _same(stored: np.ndarray, tensors: Mapping[str, np.ndarray], taken: set[str]) -> str | None:
    """The parameter with the same numbers, in that order or (gates, transposed kernels) in another one."""
    sizes = [name for name, tensor in tensors.items() if tensor.size == stored.size]
    sizes.sort(key=lambda name: name in taken)
    flat = stored.reshape(-1)
    for name in sizes:
        if np.array_equal(tensors[name].reshape(-1), flat):
            return name
    ordered = np.sort(flat) if sizes and stored.size > 1 else flat
    for name in sizes:
        if np.array_equal(np.sort(tensors[name].reshape(-1)), ordered):
            return name
    return None


def _values(values: Mapping[str, np.ndarray], blobs: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Each traced value that ncnn computes -> the first blob that holds it and that none before it took."""
    found: dict[str, str] = {}
    names, start = list(blobs), 0
    for value, seen in values.items():
        order = [*names[start:], *names[:start]]
        place = next((name for name in order if same(blobs[name], seen)), None)
        if place is not None:
            found[value] = place
            start = names.index(place)
    return found
