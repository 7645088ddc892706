"""The table of operators, one file a family. An entry reads a node and answers with a layer or a function.

Only the default domain so far; a domain of its own gets a table of its own.
"""

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

OPERATORS: dict[tuple[str, str], Entry] = {
    ("", name): entry
    for family in (
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
    )
    for name, entry in family.ENTRIES.items()
}
