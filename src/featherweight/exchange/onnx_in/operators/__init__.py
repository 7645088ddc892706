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

_FAMILIES = {
    "": (
        activation,
        attention,
        casts,
        conv,
        elementwise,
        index,
        losses,
        matmul,
        norm,
        pool,
        quantized,
        recurrent,
        reduce,
        resize,
        sampling,
        shape,
        signal,
    ),
    "com.microsoft": (microsoft, microsoft_attention),
}

OPERATORS: dict[tuple[str, str], Entry] = {
    (domain, name): entry
    for domain, families in _FAMILIES.items()
    for family in families
    for name, entry in family.ENTRIES.items()
}
# ONNX Runtime fuses this one into the default domain.
OPERATORS["", "SimplifiedLayerNormalization"] = microsoft.ENTRIES["SimplifiedLayerNormalization"]
