"""Nodes put aside while a graph is built, which together become one opaque layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto

from featherweight.exchange.onnx_in.node import UnsupportedError
from featherweight.exchange.onnx_in.read import Source, reads
from featherweight.exchange.opaque import Program, make_program

_RANDOM = frozenset({"RandomNormal", "RandomUniform"})


@dataclass
class Aside:
    """A run of nodes without layers.

    Attributes:
        nodes: In order.
        reasons: Why they have none, without repetitions.
        error: What the first of them raised.
        path: Of the layer, once it has one.
    """

    nodes: list[NodeProto] = field(default_factory=list)
    reasons: dict[str, None] = field(default_factory=dict)
    error: BaseException | None = None
    path: str = ""

    def add(self, nodes: Sequence[NodeProto], reason: str, error: BaseException | None) -> None:
        """One more node, or those that were taken together."""
        self.nodes.extend(nodes)
        self.reasons[reason] = None
        self.error = self.error or error

    def makes(self, names: Sequence[str]) -> bool:
        """Whether one of these values is made here."""
        return any(name in names for node in self.nodes for name in node.output if name)

    def operators(self) -> list[str]:
        """Their operators, the most frequent first."""
        kinds = Counter(f"{node.domain}.{node.op_type}".removeprefix(".") for node in self.nodes)
        return [kind if count == 1 else f"{kind} ({count} x)" for kind, count in kinds.most_common()]

    def is_fixed(self) -> bool:
        """Whether it gives the same in every call when it reads nothing but constants."""
        return not any(node.op_type in _RANDOM for node in self.nodes)

    def program(
        self,
        source: Source,
        constants: Mapping[str, np.ndarray],
        readers: Mapping[str, int],
        dtype: Callable[[str], np.dtype],
    ) -> tuple[Program, list[str], list[str]]:
        """The nodes as a program, with the names of its inputs and outputs.

        Raises:
            UnsupportedError: A value that it reads is of a type that ONNX Runtime does not take from outside.
        """
        made = [name for node in self.nodes for name in node.output if name]
        inside = Counter(name for node in self.nodes for name in reads(node))
        read = [name for name in inside if name not in made]
        inputs = [name for name in read if name not in constants]
        outputs = [name for name in made if readers[name] > inside[name]]
        dtypes = {name: dtype(name) for name in inputs}
        odd = next((kind for kind in dtypes.values() if kind.kind not in "fiub"), None)
        if odd is not None:
            raise UnsupportedError(f"ONNX Runtime takes no {odd} from outside")
        program = make_program(
            self.nodes,
            dtypes,
            outputs,
            {name: constants[name] for name in read if name in constants},
            source.opsets,
            source.proto.ir_version,
        )
        return program, inputs, outputs
