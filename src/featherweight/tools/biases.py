"""Biases take the mean error of their layer's output, which rounding leaves behind.

For the float network's output y and the stored network's ŷ, per channel, over examples and positions
(empirical bias correction; Nagel et al. 2019, arXiv:1906.04721, section 4.2)::

    bias' = bias + E[y] - E[ŷ]

Layers are corrected in the order of execution, each behind the corrected ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from featherweight.graph import Graph, Node, trace
from featherweight.method import Progress, Scratch, Silent, in_memory
from featherweight.model import Edit, Model, SetAttr, make_edit
from featherweight.tools.columns import axes_of, is_product
from featherweight.tools.walk import Stop, walk

_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_SILENT = Silent()


def own_bias(graph: Graph, node: Node) -> str | None:
    """The bias of a layer that no other call reads."""
    name = node.parameters.get("bias") if is_product(node) else None
    readers = Counter(read for other in graph for read in other.parameters.values())
    return name if name is not None and readers[name] == 1 else None


def with_biases(model: Model, weights: Collection[str]) -> Model:
    """The model with a bias of zeros for each layer of these weights that has none."""
    edits: dict[str, Edit] = {}
    for entry in model.entries:
        for node in trace(model, entry):
            weight = node.parameters.get("weight")
            if weight not in weights or "/" in node.name or not is_product(node) or node.layer in edits:
                continue
            layer = model.module.get_submodule(node.layer)
            if isinstance(layer, _LAYERS) and layer.bias is None:
                channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
                edits[node.layer] = SetAttr(node.layer, "bias", shape=(channels,))
    if not edits:
        return model
    module = model.copy_module()
    for edit in edits.values():
        make_edit(module, edit)
    return model.evolve(module=module, edits=tuple(edits.values()))


def settled(model: Model, worked: Model) -> Model:
    """What was worked out, without the new biases that stayed zero."""
    idle = [
        edit
        for edit in worked.edits[len(model.edits) :]
        if isinstance(edit, SetAttr) and not worked.module.get_parameter(f"{edit.path}.{edit.name}").any()
    ]
    if not idle:
        return worked
    module = worked.copy_module()
    for edit in idle:
        setattr(module.get_submodule(edit.path), edit.name, None)
    kept = tuple(edit for edit in worked.edits[len(model.edits) :] if edit not in idle)
    return model.evolve(module=module, formats=worked.formats, edits=kept)


def with_values(model: Model, parameters: Mapping[str, Tensor]) -> Model:
    """The model with other values of some parameters."""
    module = model.copy_module()
    with torch.no_grad():
        for name, value in parameters.items():
            module.get_parameter(name).copy_(value)
    return model.evolve(module=module)


def corrected_biases(
    model: Model,
    reference: Model,
    batches: Sequence[tuple[Tensor, ...]],
    *,
    selects: Callable[[Node], bool],
    entry: str = "forward",
    progress: Progress = _SILENT,
    scratch: Scratch = in_memory,
) -> dict[str, Tensor]:
    """Biases with which each layer's output is that of the float network in the mean.

    Args:
        model: With formats.
        reference: The same network as float.
        batches: Flat inputs.
        selects: Whether a layer's bias may change.
        entry: Which way of calling the module.
        progress: Where it says how far it is.
        scratch: Where values live.

    Returns:
        New values by parameter name, of layers whose bias no other call reads.
    """
    found: dict[str, Tensor] = {}
    graph = trace(model, entry)
    stops = walk(model, reference, batches, scratch, entry)
    for stop in progress.track(stops, "correcting biases", len(graph.nodes)):
        name = own_bias(graph, stop.node)
        if name is None or not selects(stop.node):
            continue
        value = stop.stored.parameter(name).detach() + _mean_error(stop).float()
        stop.stored.set_parameter(name, value)
        found[name] = value
    return found


def _mean_error(stop: Stop) -> Tensor:
    """Float output less stored output, (channels,), mean over everything else."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for exact, stored in zip(stop.exact.outputs(stop.twin), stop.stored.outputs(stop.node), strict=True):
        gap = exact - stored
        channels = -1 - axes_of(stop.node)
        gap = gap.movedim(channels, 0).flatten(1)
        total, count = total + gap.sum(1, dtype=torch.float64), count + gap.shape[1]
    return total / count
