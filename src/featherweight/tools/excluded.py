"""What ``where`` keeps out of the cut: tensors of excluded layers, and the groups of channels on them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import get_args

from featherweight.graph import trace
from featherweight.model import Model
from featherweight.tools.channels import channel_groups
from featherweight.tools.cutting import cuttable
from featherweight.tools.groups import Channels, GroupKind
from featherweight.where import Where


def held_tensors(model: Model, where: Where) -> frozenset[str]:
    """Parameters and buffers of excluded layers; a tied one by its first name."""
    first: dict[int, str] = {}
    held = set()
    layers = dict(model.module.named_modules(remove_duplicate=False))
    for path, layer in layers.items():
        own = [*layer.named_parameters(path, recurse=False), *layer.named_buffers(path, recurse=False)]
        for name, tensor in own:
            name = first.setdefault(id(tensor), name)
            if not where.selects(path, type(layer).__name__):
                held.add(name)
    for entry in model.entries:
        for node in trace(model, entry):
            if not where.selects(node.layer, node.layer_type):
                held |= set(node.parameters.values())
    return frozenset(held)


def free_channels(model: Model, where: Where, kinds: Collection[GroupKind] = get_args(GroupKind)) -> Channels:
    """The groups of these kinds that touch no excluded layer, and that the module's code can follow."""
    held = held_tensors(model, where)
    found = channel_groups(model)
    groups = {
        name: group
        for name, group in found.groups.items()
        if group.kind in kinds and not any(member.tensor in held for member in group.members)
    }
    return cuttable(model, replace(found, groups=groups))
