"""The table of operators, one file a family. An entry reads a node and answers with a layer or a function."""

from __future__ import annotations

from featherweight.exchange.onnx_in.node import Entry
from featherweight.exchange.onnx_in.operators import (
    activation,
    attention,
    casts,
    conv,
    elementwise,
    index,
    losses,
    matmul,
    microsoft,
    microsoft_attention,
    norm,
    pool,
    quantized,
    recurrent,
    reduce,
    resize,
    sampling,
    shape,
    signal,
)

_FAMILIES = (
    ("", "convolutions", conv),
    ("", "products", matmul),
    ("", "activations", activation),
    ("", "norms", norm),
    ("", "pools", pool),
    ("", "attention", attention),
    ("", "recurrent", recurrent),
    ("", "element by element", elementwise),
    ("", "casts", casts),
    ("", "reductions", reduce),
    ("", "shapes", shape),
    ("", "picking", index),
    ("", "resizing", resize),
    ("", "sampling", sampling),
    ("", "signals", signal),
    ("", "integers", quantized),
    ("", "losses", losses),
    ("com.microsoft", "com.microsoft", microsoft),
    ("com.microsoft", "com.microsoft, attention", microsoft_attention),
)

OPERATORS: dict[tuple[str, str], Entry] = {
    (domain, name): entry for domain, _, family in _FAMILIES for name, entry in family.ENTRIES.items()
}
# ONNX Runtime fuses this one into the default domain.
OPERATORS["", "SimplifiedLayerNormalization"] = microsoft.ENTRIES["SimplifiedLayerNormalization"]


def families() -> list[tuple[str, str, list[str]]]:
    """Domain, title and operators of each family, for the documentation."""
    return [(domain, title, list(family.ENTRIES)) for domain, title, family in _FAMILIES]
