"""Which of ONNX Runtime's ways of computing takes which formats of a model. Part of ``onnxruntime.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featherweight.runtime import Role
from featherweight.runtimes._ort_blocks import blocks, store_blocks
from featherweight.runtimes._ort_dynamic import store_dynamic
from featherweight.runtimes._ort_recurrent import store_recurrent
from featherweight.runtimes._qdq import Dialect, store_formats

if TYPE_CHECKING:
    from featherweight.exchange.export import OnnxExport
    from featherweight.formats import Dynamic, TensorFormat
    from featherweight.graph import Graph, Node

_RECURRENT = ("lstm", "gru")


@dataclass(frozen=True)
class Kinds:
    """The formats of one entry; the last of a chain is stored.

    Attributes:
        blocks: Matrices in blocks, and tables.
        products: Matrices of linear layers whose inputs are rounded at each call.
        inputs: Values that such layers read.
        recurrent: Weights of recurrent layers.
        rounding: Those of ``recurrent`` whose layers round what they read at each call.
        rest: What becomes Q/DQ pairs.
    """

    blocks: Mapping[str, TensorFormat]
    products: Mapping[str, TensorFormat]
    inputs: Mapping[str, Dynamic]
    recurrent: Mapping[str, TensorFormat]
    rounding: frozenset[str]
    rest: Mapping[str, tuple[TensorFormat, ...]]

    @classmethod
    def of(cls, graph: Graph, formats: Mapping[str, tuple[TensorFormat, ...]]) -> Kinds:
        from featherweight.formats import Dynamic, IntQuant, PerGroup

        readers: dict[str, list[Node]] = {}
        for node in graph:
            for name in node.parameters.values():
                readers.setdefault(name, []).append(node)
        blocked: dict[str, TensorFormat] = {}
        products: dict[str, TensorFormat] = {}
        inputs: dict[str, Dynamic] = {}
        recurrent: dict[str, TensorFormat] = {}
        rounding: set[str] = set()
        rest: dict[str, tuple[TensorFormat, ...]] = {}
        for name, chain in formats.items():  # an entry may leave layers of others alone
            fmt, mine = chain[-1], readers.get(name, [])
            read = {node.op: _read_by(node, formats) for node in mine}
            if name in graph.values:
                static = tuple(one for one in chain if not isinstance(one, Dynamic))
                rest |= {name: static} if static else {}
            elif not mine:
                continue
            elif not isinstance(fmt, IntQuant):
                rest[name] = chain
            elif isinstance(fmt.granularity, PerGroup) or fmt.width < 8 or "embedding" in read:
                blocked[name] = fmt
            elif any(op in _RECURRENT for op in read):
                recurrent[name] = fmt
                rounding |= {name} if all(read.values()) else set()
            elif any(found is not None for found in read.values()):
                products[name] = fmt
                inputs |= {node.inputs[0]: found for node in mine if (found := _read_by(node, formats))}
            else:
                rest[name] = chain
        return cls(blocked, products, inputs, recurrent, frozenset(rounding), rest)

    @property
    def names(self) -> set[str]:
        """Parameters and values that must be found in the exported graph."""
        return {*self.blocks, *self.products, *self.inputs, *self.recurrent, *self.rest}

    def store(
        self, export: OnnxExport, realise: Callable[[TensorFormat, Role], TensorFormat], runtime: str
    ) -> None:
        """Write every format into an exported graph, in place."""

        def grids(formats: Mapping[str, TensorFormat]) -> dict[str, Any]:
            return {name: realise(fmt, "weight") for name, fmt in formats.items()}

        inputs: dict[str, Any] = {name: realise(fmt, "activation") for name, fmt in self.inputs.items()}
        store_blocks(
            export, {name: blocks(fmt, runtime) for name, fmt in grids(self.blocks).items()}, runtime
        )
        store_recurrent(export, grids(self.recurrent), self.rounding, runtime)
        store_dynamic(export, grids(self.products), inputs, runtime)
        store_formats(export, self.rest, realise, Dialect(runtime=runtime))


def _read_by(node: Node, formats: Mapping[str, tuple[TensorFormat, ...]]) -> Dynamic | None:
    """How an operator rounds its first input at each call."""
    from featherweight.formats import Dynamic

    chain = formats.get(node.inputs[0], ()) if node.inputs else ()
    found = [
        one for one in chain if isinstance(one, Dynamic) and (one.readers is None or node.op in one.readers)
    ]
    return found[-1] if found else None
