"""How much a layer suffers when its weights alone are stored in few bits. Simulated, never measured.

Weights are rounded to the nearest of symmetric integers, per output channel where the operator has
channels, over their full range; activations stay float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from featherweight.formats import IntQuant, PerChannel, PerTensor
from featherweight.graph import trace
from featherweight.model import Model
from featherweight.tools.ranges import weight_range
from featherweight.tools.simulate import simulate

_CHANNELS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear", "embedding"), 0),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), 1),
}
_SMALLEST = 2  # axes of a weight; biases and scales stay float


def layer_weights(model: Model, entry: str = "forward") -> dict[str, dict[str, int | None]]:
    """Layer (or traced name of a function) -> {weight: axis of its channels}; None: one scale for all."""
    parameters = model.parameters
    found: dict[str, dict[str, int | None]] = {}
    for node in trace(model, entry):
        for name in node.parameters.values():
            weight = parameters.get(name)
            if weight is None or weight.dim() < _SMALLEST or not weight.is_floating_point():
                continue
            owner = node.layer if "/" not in node.name else node.name
            axis = _CHANNELS.get(node.op)
            if node.op in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
                axis = 0
            if axis == 1 and node.attributes.get("groups", 1) != 1:
                axis = None
            found.setdefault(owner, {}).setdefault(name, axis)
    return found


def alone(
    model: Model, weights: Mapping[str, int | None], bits: int, entry: str = "forward"
) -> Callable[..., tuple[Tensor, ...]]:
    """The model with these weights in integers of so many bits, everything else float."""
    formats = {name: (_nearest(model.parameters[name], axis, bits),) for name, axis in weights.items()}
    return simulate(model.evolve(formats=formats), entry)


def _nearest(weight: Tensor, axis: int | None, bits: int) -> IntQuant:
    draft = IntQuant(-torch.ones(()), torch.ones(()), bits, True, PerTensor(), signed=True)
    if axis is not None:
        draft = IntQuant(-torch.ones(1), torch.ones(1), bits, True, PerChannel(axis), signed=True)
    low, high = weight_range(weight, draft, "minmax", 100.0)
    return IntQuant(low, high, bits, True, draft.granularity, signed=True)
