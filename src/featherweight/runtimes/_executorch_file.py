"""Reads a .pte file back: which kernels it calls, what XNNPACK was given, how each constant is stored.

Part of ``executorch.py``. A .pte is a flatbuffer (the program) and segments behind it: payloads of delegates,
and constants under names that are the digests of their bytes. XNNPACK's payload is a flatbuffer of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_KINDS: Mapping[str, str] = {  # XNNPACK's types -> what is stored
    "fp32": "float32",
    "fp16": "float16",
    "qint8": "int8",
    "qcint8": "int8",
    "qcint4": "int4",
    "qbint4": "int4",
    "qint32": "int32",
    "qcint32": "int32",
    "qdint8": "int8",
}


@dataclass(frozen=True)
class Step:
    """One step of a delegate.

    Attributes:
        op: XNNPACK's kind of node, e.g. 'Conv2d'.
        inputs: Values that it reads, by number in its delegate.
        output: The value that it makes.
        fields: All that is said of it.
    """

    op: str
    inputs: tuple[int, ...]
    output: int
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Delegate:
    """What XNNPACK runs at a stretch.

    Attributes:
        steps: In order.
        kinds: Value -> how it is stored ('int8', 'float32', ...).
        keys: Constant value -> digest of its bytes.
    """

    steps: tuple[Step, ...]
    kinds: Mapping[int, str]
    keys: Mapping[int, str]

    def computes(self, step: Step) -> str:
        """In what a step computes: integers where all that it reads are, a bias not counted."""
        if step.op == "Convert":
            return self.kinds[step.output]
        kinds = {self.kinds[value] for value in step.inputs if value != step.fields.get("bias_id")}
        return "int8" if kinds <= {"int8", "int4"} else "float16" if kinds == {"float16"} else "float32"


@dataclass(frozen=True)
class Program:
    """A file's only method.

    Attributes:
        chain: What is executed, in order: delegates, and names of plain kernels.
        constants: Digest of the bytes -> how they are stored and how many they are.
    """

    chain: tuple[Delegate | str, ...]
    constants: Mapping[str, tuple[str, int]]

    @property
    def delegates(self) -> Iterator[Delegate]:
        return (part for part in self.chain if isinstance(part, Delegate))


def read(path: Path) -> Program:
    """Parse a file that this runtime has written."""
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.exir.schema import DelegateCall, KernelCall

    file = deserialize_pte_binary(path.read_bytes())
    plan = file.program.execution_plan[0]
    named = {} if file.named_data is None else file.named_data.pte_data
    buffers = {key: file.named_data.buffers[entry.buffer_index] for key, entry in named.items()}
    digests = {key: hashlib.sha256(data).hexdigest() for key, data in buffers.items()}
    constants: dict[str, tuple[str, int]] = {}
    delegates = []
    for one in plan.delegates:
        graph = _graph(bytes(file.program.backend_delegate_data[one.processed.index].data))
        delegate = _delegate(graph, digests)
        delegates.append(delegate)
        sizes = {digests[key]: len(data) for key, data in buffers.items()}
        constants |= {key: (delegate.kinds[value], sizes[key]) for value, key in delegate.keys.items()}
    constants |= dict(_plain(file.program, plan))
    chain: list[Delegate | str] = []
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if isinstance(call, DelegateCall):
            chain.append(delegates[call.delegate_index])
        elif isinstance(call, KernelCall):
            operator = plan.operators[call.op_index]
            chain.append(f"{operator.name}.{operator.overload}".rstrip("."))
    return Program(tuple(chain), constants)


def _plain(program: Any, plan: Any) -> Iterator[tuple[str, tuple[str, int]]]:
    """Constants of kernels that were not delegated."""
    from executorch.exir.schema import Tensor

    for value in plan.values:
        tensor = value.val
        if not isinstance(tensor, Tensor) or not tensor.data_buffer_idx or tensor.allocation_info is not None:
            continue
        data = bytes(program.constant_buffer[tensor.data_buffer_idx].storage)
        kind = {"FLOAT": "float32", "HALF": "float16", "CHAR": "int8", "BYTE": "uint8"}.get(
            tensor.scalar_type.name, tensor.scalar_type.name.lower()
        )
        yield hashlib.sha256(data).hexdigest(), (kind, len(data))


def _graph(payload: bytes) -> Any:
    """XNNPACK's graph as JSON data."""
    import executorch.backends.xnnpack.serialization as schemas
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    end = header.flatbuffer_offset + header.flatbuffer_size
    schema = next(Path(folder) / "schema.fbs" for folder in schemas.__path__)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "graph.bin"
        binary.write_bytes(payload[header.flatbuffer_offset : end])
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        text = (Path(folder) / "graph.json").read_text()
    return json.loads(re.sub(r": ([+-]?)inf\b", r": \1Infinity", text).replace(": +Inf", ": Inf"))


def _delegate(graph: Any, digests: Mapping[str, str]) -> Delegate:
    kinds: dict[int, str] = {}
    keys: dict[int, str] = {}
    for value in graph["xvalues"]:
        union = value["xvalue_union"]
        tensor = union.get("tensor_value", union)
        number = tensor["id_out"]
        kinds[number] = _KINDS.get(tensor["datatype"].removeprefix("xnn_datatype_"), tensor["datatype"])
        if tensor["constant_buffer_idx"]:
            keys[number] = digests[graph["constant_data"][tensor["constant_buffer_idx"]]["named_key"]]
    return Delegate(tuple(_steps(graph, kinds)), kinds, keys)


def _steps(graph: Any, kinds: Mapping[int, str]) -> Iterator[Step]:
    for node in graph["xnodes"]:
        fields = node["xnode_union"]
        reads = [
            fields[name]
            for name in sorted(fields)
            if name.endswith("_id") and name != "output_id" and fields[name] in kinds
        ]
        op = node["xnode_union_type"].removeprefix("XNN").removeprefix("_XNN")
        yield Step(op, tuple(reads), fields["output_id"], fields)
