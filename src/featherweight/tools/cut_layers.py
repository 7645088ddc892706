"""Settings of layers that follow when tensors are cut: sizes of torch.nn's own, and numbers of users' code.

What torch.nn's layers keep beside their tensors (``in_channels``, ``num_features``, ``hidden_size`` ...) is
read off the tensors. Users' code keeps numbers such as ``heads`` under names of its own: an integer of the
layer that owns a changed call, or of one around it, that held the old size gets the new one. That is a guess;
``cutting.py`` keeps it only if the module then computes the same as its calls with the new sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from featherweight.graph import Graph
from featherweight.model import SetAttr
from featherweight.tools.cut_literals import Call

_GATES = {"LSTM": 4, "GRU": 3}
_OWN = frozenset(vars(nn.Module()))
_ASKED = (nn.MultiheadAttention, nn.Unflatten)  # layers of torch.nn whose numbers are guessed as users' are

Calls = Mapping[str, Mapping[str, Call]]  # entry -> name in the program -> call


def settings(module: nn.Module, graphs: Mapping[str, Graph], calls: Calls) -> list[SetAttr]:
    """Edits for torch.nn's layers of a module whose tensors have been cut."""
    by_layer: dict[str, Call] = {}
    for entry, graph in graphs.items():
        for node in graph:
            if node.fx_name in calls[entry]:
                by_layer.setdefault(node.layer, calls[entry][node.fx_name])
    edits = []
    for path, layer in module.named_modules():
        for name, value in _wanted(layer, by_layer.get(path)).items():
            held = getattr(layer, name, value)
            if (list(held) if isinstance(held, tuple) else held) != value:
                edits.append(SetAttr(path, name, value))
    return edits


def _wanted(layer: nn.Module, call: Call | None) -> dict[str, Any]:
    """What a layer's settings must be, from its tensors and its call."""
    weight = getattr(layer, "weight", None)
    shape = list(weight.shape) if isinstance(weight, Tensor) else []
    if isinstance(layer, nn.Linear):
        return {"in_features": shape[1], "out_features": shape[0]}
    if isinstance(layer, _ConvNd):
        groups = layer.groups if call is None else call.get("groups", layer.groups)
        names = ("out_channels", "in_channels")[:: -1 if layer.transposed else 1]
        return {"groups": groups, names[0]: shape[0], names[1]: shape[1] * groups}
    if isinstance(layer, _NormBase):
        sizes = shape or (list(layer.running_mean.shape) if layer.running_mean is not None else [])
        return {"num_features": sizes[0]} if sizes else {}
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        own = call.get("normalized_shape") if call is not None else None
        return {"normalized_shape": list(own)} if own else {}
    if isinstance(layer, nn.GroupNorm):
        groups = layer.num_groups if call is None else call.get("num_groups")
        return {"num_groups": groups} | ({"num_channels": shape[0]} if shape else {})
    if isinstance(layer, nn.Embedding):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(layer, nn.PReLU):
        return {"num_parameters": shape[0]}
    if isinstance(layer, nn.RNNBase):
        return _recurrent(layer)
    if isinstance(layer, nn.MultiheadAttention):
        return _attention(layer)
    return {}


def _recurrent(layer: nn.RNNBase) -> dict[str, Any]:
    tensors = dict(layer.named_parameters(recurse=False))
    hidden = tensors["weight_hh_l0"].shape[0] // _GATES.get(layer.mode, 1)
    found = {"input_size": tensors["weight_ih_l0"].shape[1], "hidden_size": hidden}
    return found | ({"proj_size": tensors["weight_hr_l0"].shape[0]} if layer.proj_size else {})


def _attention(layer: nn.MultiheadAttention) -> dict[str, Any]:
    if layer.in_proj_weight is None:
        query, key, value = layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
        return {"embed_dim": query.shape[1], "kdim": key.shape[1], "vdim": value.shape[1]}
    size = layer.in_proj_weight.shape[1]
    return {"embed_dim": size, "kdim": size, "vdim": size}


def guesses(module: nn.Module, graphs: Mapping[str, Graph], calls: Calls, nearest: bool) -> list[SetAttr]:
    """Edits for numbers of users' code that held a size which changed.

    Args:
        module: As it is.
        graphs: By entry.
        calls: By entry.
        nearest: Only the innermost layer that holds such a number gets the new one.
    """
    found: dict[tuple[str, str], Any] = {}
    for path, changes in _sites(graphs, calls):
        for owner in _ancestors(path):
            layer = module.get_submodule(owner)
            if type(layer).__module__.startswith("torch.nn.") and not isinstance(layer, _ASKED):
                continue
            fitting = {
                (owner, name): new
                for name, value in vars(layer).items()
                if name not in _OWN
                and (new := _changed(found.get((owner, name), value), changes)) is not None
            }
            found |= fitting
            if fitting and nearest:
                break
    return [SetAttr(path, name, value) for (path, name), value in found.items()]


def _sites(graphs: Mapping[str, Graph], calls: Calls) -> Iterator[tuple[str, Mapping[int, int]]]:
    """Layers whose code has a size that changed: old -> new."""
    seen = set()
    for entry, graph in graphs.items():
        for node in graph:
            call = calls[entry].get(node.fx_name)
            changes = dict(call.changed) if call is not None else {}
            if changes and (key := (node.layer, tuple(sorted(changes.items())))) not in seen:
                seen.add(key)
                yield node.layer, changes


def _ancestors(path: str) -> Iterable[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:length]) for length in range(len(parts), -1, -1)]


def _changed(value: Any, changes: Mapping[int, int]) -> Any:
    """The number or list with new sizes, or None where no old one is in it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return changes.get(value)
    whole = isinstance(value, (tuple, list)) and value and all(type(one) is int for one in value)
    if not whole or not any(one in changes for one in value):
        return None
    return [changes.get(one, one) for one in value]
