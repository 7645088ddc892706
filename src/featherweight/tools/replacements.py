"""Costly activations replaced by cheap ones, as edits: a layer of ``torch.nn`` for a layer.

Hard-swish, GELU and SiLU are smooth or bent where ReLU is straight; fine-tuning closes most of the gap
(Howard et al. 2019, arXiv:1905.02244, use hard-swish in the deep half only, for what it costs). What the
user's code calls as a function is no layer and stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from featherweight.graph import trace
from featherweight.model import Layer, Model, Replace, make_edit

COSTLY = ("Hardswish", "GELU", "SiLU", "Mish", "ELU", "Softplus", "Tanh", "Sigmoid", "Hardsigmoid")
CHEAP = ("ReLU", "ReLU6", "LeakyReLU", "Hardswish", "Hardsigmoid", "Identity")


@dataclass(frozen=True)
class Activations:
    """Where a model has costly activations.

    Attributes:
        layers: Path -> which of ``COSTLY`` it is.
        functions: Traced name of a call in some code -> which of ``COSTLY`` it is.
    """

    layers: Mapping[str, str]
    functions: Mapping[str, str]


def activations(model: Model) -> Activations:
    """The costly activations of a model; one's own classes count by name (``NewGELUActivation``)."""
    layers: dict[str, str] = {}
    functions: dict[str, str] = {}
    operators = {kind.lower(): kind for kind in COSTLY}
    for entry in model.entries:
        for node in trace(model, entry):
            owner = model.module.get_submodule(node.layer)
            leaf = node.layer and not any(True for _ in owner.children()) and not node.parameters
            if leaf and next(owner.parameters(), None) is None:
                kind = _kind(node.layer_type) or operators.get(node.op)
                if kind is not None:
                    layers[node.layer] = kind
            elif node.op in operators:
                functions[node.name] = operators[node.op]
    return Activations(layers, functions)


def _kind(layer_type: str) -> str | None:
    name = layer_type.lower()
    exact = {kind.lower(): kind for kind in COSTLY}
    if name in exact:
        return exact[name]
    return next((kind for kind in ("GELU", "SiLU", "Mish") if kind.lower() in name), None)


def replaced(model: Model, layers: Mapping[str, str]) -> Model:
    """The model with other layers: path -> class name in ``torch.nn``."""
    module = model.copy_module()
    edits = tuple(Replace(path, Layer(kind)) for path, kind in layers.items())
    for edit in edits:
        module = make_edit(module, edit)
    return model.evolve(module=module, edits=edits)
