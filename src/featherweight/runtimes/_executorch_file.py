"""Reads a .pte file back: which kernels it calls, what XNNPACK was given, how each constant is stored.

Part of ``executorch.py``. A .pte is a flatbuffer (the program) and segments behind it: payloads of delegates,
and constants under names that are the digests of their bytes. XNNPACK's payload is a flatbuffer of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
import struct
import subprocess
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
_PLAIN_KINDS: Mapping[str, tuple[str, int]] = {  # types of plain kernels -> what is stored, bytes of each
    "FLOAT": ("float32", 4),
    "HALF": ("float16", 2),
    "DOUBLE": ("float64", 8),
    "LONG": ("int64", 8),
    "INT": ("int32", 4),
    "CHAR": ("int8", 1),
    "BYTE": ("uint8", 1),
    "BOOL": ("bool", 1),
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
    """Parse a file that this runtime has written; the exporter is not imported for it."""
    file = _File(path.read_bytes())
    plan = file.program["execution_plan"][0]
    named = {one["key"]: file.segment(one["segment_index"]) for one in file.program["named_data"]}
    digests = {key: hashlib.sha256(data).hexdigest() for key, data in named.items()}
    sizes = {digests[key]: len(data) for key, data in named.items()}
    delegates = [_delegate(_xnnpack_graph(file.payload(one)), digests) for one in plan["delegates"]]
    constants = {
        key: (delegate.kinds[value], sizes[key])
        for delegate in delegates
        for value, key in delegate.keys.items()
    }
    constants |= dict(_plain(file, plan))
    chain: list[Delegate | str] = []
    for instruction in plan["chains"][0]["instructions"]:
        call = instruction["instr_args"]
        if instruction["instr_args_type"] == "DelegateCall":
            chain.append(delegates[call["delegate_index"]])
        elif instruction["instr_args_type"] == "KernelCall":
            operator = plan["operators"][call["op_index"]]
            chain.append(f"{operator['name']}.{operator['overload']}".rstrip("."))
    return Program(tuple(chain), constants)


class _File:
    """The flatbuffer and the segments behind it.

    Behind the flatbuffer's own eight bytes stand ``eh00``, the length of this header, the size of the
    flatbuffer and where segments begin.
    """

    def __init__(self, data: bytes) -> None:
        magic, _, size, self._base = struct.unpack_from("<4sIQQ", data, 8)
        if magic != b"eh00":
            raise ValueError("this is no .pte file of ExecuTorch")
        self._data = data
        self.program = _json(data[:size], _package() / "schema" / "program.fbs")

    def segment(self, index: int) -> bytes:
        place = self.program["segments"][index]
        start = self._base + place["offset"]
        return self._data[start : start + place["size"]]

    def payload(self, delegate: Any) -> bytes:
        place = delegate["processed"]
        if place["location"] == "SEGMENT":
            return self.segment(place["index"])
        return bytes(self.program["backend_delegate_data"][place["index"]]["data"])


def _plain(file: _File, plan: Any) -> Iterator[tuple[str, tuple[str, int]]]:
    """Constants of kernels that were not delegated."""
    segment = file.program["constant_segment"]
    for value in plan["values"]:
        tensor = value.get("val", {})
        if (
            value.get("val_type") != "Tensor"
            or not tensor["data_buffer_idx"]
            or tensor.get("allocation_info")
        ):
            continue
        kind, width = _PLAIN_KINDS.get(tensor["scalar_type"], (tensor["scalar_type"].lower(), 1))
        size = math.prod(tensor.get("sizes", ())) * width
        start = segment["offsets"][tensor["data_buffer_idx"]]
        data = file.segment(segment["segment_index"])[start : start + size]
        yield hashlib.sha256(data).hexdigest(), (kind, size)


def _package() -> Path:
    """Where ExecuTorch is installed."""
    spec = importlib.util.find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("executorch")
    return Path(next(iter(spec.submodule_search_locations)))


def _json(binary: bytes, schema: Path) -> Any:
    """A flatbuffer as JSON data, by the compiler that comes with the package."""
    compiler = _package() / "data" / "bin" / "flatc"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file.bin"
        file.write_bytes(binary)
        options = ["--json", "--strict-json", "--defaults-json", "--raw-binary", "-o", folder]
        subprocess.run([compiler, *options, schema, "--", file], check=True, capture_output=True)
        text = file.with_suffix(".json").read_text()
    return json.loads(re.sub(r": [+]?(-?)inf\b", r": \1Infinity", text))


def _xnnpack_graph(payload: bytes) -> Any:
    """XNNPACK's graph as JSON data; four bytes in stand ``XH00``, a length, where it begins, its size."""
    magic, _, start, size = struct.unpack_from("<4sHII", payload, 4)
    if magic != b"XH00":
        raise ValueError("a delegate's payload is none of XNNPACK's")
    schema = _package() / "backends" / "xnnpack" / "serialization" / "schema.fbs"
    return _json(payload[start : start + size], schema)


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
