"""Fold: batch norm into the convolution or linear layer before it; layers that do nothing are removed.

At inference a batch norm is ``y = (x - mean) / sqrt(var + eps) * gamma + beta``, which
the layer before it can do itself::

    weight' = weight * gamma / sqrt(var + eps)      (per output channel)
    bias'   = (bias - mean) * gamma / sqrt(var + eps) + beta

(Jacob et al. 2018, arXiv:1712.05877, section 3.2). Dropout is removed with it: what
follows in a recipe prepares inference.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import torch
from torch import Tensor, nn

from featherweight.graph import Graph, trace
from featherweight.method import Context, Kind, Method
from featherweight.model import Edit, Model, Remove, SetAttr, make_edit

_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NOTHING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Fold(Method, frozen=True, extra="forbid"):
    """Fold batch norms and remove layers that do nothing at inference. Outputs stay the same.

    A batch norm is folded when ``where`` selects both it and the layer before it, since both change.
    """

    kind: ClassVar[Kind] = "structure"

    def apply(self, model: Model, context: Context) -> Model:
        pairs = [pair for pair in _pairs(model) if all(self._selects(model, path) for path in pair)]
        called = {node.layer for entry in model.entries for node in trace(model, entry)}
        idle = [
            path
            for path, layer in model.module.named_modules()
            if path in called  # one that is not called may hold the rate of a function
            and isinstance(layer, _NOTHING)
            and self._selects(model, path)
        ]
        module = model.copy_module()
        edits: list[Edit] = []
        for layer, norm in pairs:
            edits += _fold(module, layer, norm)
        for path in idle:
            edits.append(Remove(path))
            make_edit(module, edits[-1])
        return model.evolve(module=module, edits=tuple(edits))

    def _selects(self, model: Model, path: str) -> bool:
        return self.where.selects(path, type(model.module.get_submodule(path)).__name__)


PLUGIN = Fold


def _pairs(model: Model) -> list[tuple[str, str]]:
    """(layer, batch norm) pairs where the norm alone reads the layer, in every entry."""
    layers = dict(model.module.named_modules(remove_duplicate=False))
    aliases = Counter(id(layer) for layer in layers.values())
    graphs = [trace(model, entry) for entry in model.entries]
    calls = Counter(node.layer for graph in graphs for node in graph)
    reads = Counter(name for graph in graphs for node in graph for name in node.parameters.values())
    found: list[tuple[str, str]] = []
    for graph in graphs:
        for node in graph:
            before = graph.producer.get(node.inputs[0]) if node.op == "batch_norm" else None
            if before is None or not _alone(graph, node.inputs[0]):
                continue
            layer, norm = layers[before.layer], layers[node.layer]
            plain = isinstance(layer, _FOLDABLE) and isinstance(norm, _NORMS)
            once = calls[before.layer] == calls[node.layer] == 1 and aliases[id(layer)] == 1
            if (
                plain
                and once
                and norm.running_mean is not None
                and _owns_its_tensors(layer, before.layer, reads)
                and _owns_its_tensors(norm, node.layer, reads)
                and _channels_last_axis(layer, graph, node.inputs[0])
            ):
                found.append((before.layer, node.layer))
    return found


def _owns_its_tensors(layer: nn.Module, path: str, reads: Counter[str]) -> bool:
    """Whether no one else reads the layer's parameters, and its weight is one (not computed from others)."""
    own = dict(layer.named_parameters(recurse=False))
    computed = layer.weight is not None and "weight" not in own
    return not computed and all(reads[f"{path}.{name}"] == 1 for name in own)


def _channels_last_axis(layer: nn.Module, graph: Graph, value: str) -> bool:
    """A linear layer's outputs are the batch norm's channels only when there is no length axis."""
    return not isinstance(layer, nn.Linear) or len(graph.values[value].shape) == 2


def _alone(graph: Graph, value: str) -> bool:
    return len(graph.consumers[value]) == 1 and value not in graph.outputs


def _fold(module: nn.Module, layer_path: str, norm_path: str) -> list[Edit]:
    """Fold one pair in place; returns what was done."""
    layer, norm = module.get_submodule(layer_path), module.get_submodule(norm_path)
    edits: list[Edit] = []
    mean, variance = _tensor(norm.running_mean), _tensor(norm.running_var)
    gain = torch.rsqrt(variance.double() + float(norm.eps))  # type: ignore[arg-type]
    shift = -mean.double() * gain
    if norm.weight is not None:
        gain = gain * _tensor(norm.weight).double()
        shift = shift * _tensor(norm.weight).double() + _tensor(norm.bias).double()
    if layer.bias is None:
        edits.append(SetAttr(layer_path, "bias", shape=tuple(mean.shape)))
        make_edit(module, edits[-1])
    weight, bias = _tensor(layer.weight), _tensor(layer.bias)
    with torch.no_grad():
        bias.copy_(bias.double() * gain + shift)
        weight.copy_(weight.double() * _per_output(layer, weight, gain))
    edits.append(Remove(norm_path))
    make_edit(module, edits[-1])
    return edits


def _per_output(layer: nn.Module, weight: Tensor, gain: Tensor) -> Tensor:
    """The gain in the shape that multiplies a weight per output channel."""
    if not isinstance(layer, _TRANSPOSED):
        return gain.reshape(-1, *[1] * (weight.dim() - 1))
    grouped = gain.reshape(layer.groups, 1, -1)  # transposed weights are (inputs, outputs / groups, ...)
    rows = grouped.expand(-1, weight.shape[0] // layer.groups, -1)
    return rows.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.dim() - 2))


def _tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"a tensor was expected, not {type(value).__name__}")
    return value
