"""Which traced calls the kernels of an optimized ONNX graph stand for.

A runtime fuses, renames and lays out anew what it is given. What survives are names of values: the exported
file names a value after the operator that makes it, and so does the optimized graph where the value still
exists. So every optimized node gets the region of the exported graph between its own value and the values of
the other nodes:

- a region's time goes to the calls in it that multiply (convolutions, products, recurrent layers), in
  proportion to their MACs; where there is none, to the call that makes the region's value,
- what else is in the region is said to be fused into those,
- a node without a region (changes of layout, casts that the runtime added) stands for nothing: 'other'.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import onnx

from featherweight.graph import Graph, Node

_MARK = re.compile(r"fw(\d+)_")
_PRODUCTS = frozenset(
    {
        "Conv",
        "ConvTranspose",
        "ConvInteger",
        "QLinearConv",
        "Gemm",
        "MatMul",
        "MatMulInteger",
        "QLinearMatMul",
    }
    | {"LSTM", "GRU", "RNN", "Einsum", "Attention", "MultiHeadAttention", "GroupQueryAttention"}
)
_NCHWC = "com.microsoft.nchwc"
_FOLDED = frozenset({"batch_norm", "dropout", "feature_dropout", "contiguous", "clone", "identity", "detach"})
_NO_WORK = _FOLDED - {"batch_norm"} | {
    "view",
    "reshape",
    "flatten",
    "squeeze",
    "unsqueeze",
    "expand",
    "alias",
}


@dataclass(frozen=True)
class Attribution:
    """What the kernels stand for.

    Attributes:
        shares: Optimized node -> {call: share of its time}; empty where it stands for none.
        fused: Call without a kernel of its own -> the calls whose kernels do its work.
    """

    shares: Mapping[str, Mapping[str, float]]
    fused: Mapping[str, tuple[str, ...]]


def write_named(source: Path, folder: Path) -> Path:
    """A copy of an ONNX file in ``folder`` whose nodes have names; external data are linked, not copied."""
    model = onnx.load(source, load_external_data=False)
    for index, node in enumerate(model.graph.node):
        node.name = f"fw{index}_"
    for tensor in model.graph.initializer:
        for item in tensor.external_data:
            if item.key == "location" and not (folder / item.value).exists():
                _link(source.parent / item.value, folder / item.value)
    path = folder / "named.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _link(source: Path, place: Path) -> None:
    with suppress(OSError):  # another file system
        os.link(source, place)
        return
    shutil.copyfile(source, place)


def attribute(
    exported: onnx.ModelProto, optimized: onnx.ModelProto, graph: Graph, macs: Mapping[str, int]
) -> Attribution:
    """Find the calls behind each optimized node.

    Args:
        exported: The file that ``write_named`` made, weights may be missing.
        optimized: What the runtime made of it.
        graph: Whose nodes are the calls.
        macs: Call -> multiply-accumulates.
    """
    regions = _Regions(exported, graph)
    ends = {node.name: regions.end(node, optimized) for node in optimized.graph.node}
    taken = {value for values in ends.values() for value in values}
    shares: dict[str, Mapping[str, float]] = {}
    covered: dict[str, tuple[str, ...]] = {}  # exported value -> calls that get its time
    for name, values in ends.items():
        inside = regions.between(values, taken)
        shares[name] = _share(inside, regions, macs)
        for index in inside:
            for output in regions.nodes[index].output:
                covered[output] = tuple(shares[name])
    timed = {call for share in shares.values() for call in share}
    fused: dict[str, tuple[str, ...]] = {}
    for node in graph.nodes:
        value = regions.exported_name(graph, node.outputs[0])
        receivers = covered.get(value, ())
        if node.name in timed or node.op in _NO_WORK:
            continue
        if not receivers and value not in regions.maker:  # its name was lost: it went into a neighbour
            receivers = _neighbours(graph, node, timed, fused)
        if receivers:
            fused[node.name] = receivers
    return Attribution(shares, fused)


def _neighbours(
    graph: Graph, node: Node, timed: set[str], fused: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    """Who does the work of a call that left no value: of padding who reads it, else who makes its input."""
    near = graph.consumers[node.outputs[0]] if node.op == "pad" else ()
    for other in (*near, *(graph.producer[name] for name in node.inputs[:1] if name in graph.producer)):
        if other.name in timed:
            return (other.name,)
        if other.name in fused:
            return fused[other.name]
    return ()


def _share(inside: list[int], regions: _Regions, macs: Mapping[str, int]) -> dict[str, float]:
    """Calls of a region and their shares; the region's last node comes first in ``inside``."""
    products = {
        call: macs.get(call, 0)
        for index in inside
        if regions.nodes[index].op_type in _PRODUCTS and (call := regions.call(index)) is not None
    }
    total = sum(products.values())
    if total:
        return {call: count / total for call, count in products.items() if count}
    owners = [call for index in inside if (call := regions.call(index)) is not None]
    return {owners[0]: 1.0} if owners else {}


class _Regions:
    """The exported graph: who makes which value, and which call each node belongs to."""

    def __init__(self, exported: onnx.ModelProto, graph: Graph) -> None:
        self.nodes = list(exported.graph.node)
        self.maker = {output: i for i, node in enumerate(self.nodes) for output in node.output if output}
        self.readers: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for value in node.input:
                self.readers.setdefault(value, []).append(index)
        self._graph = graph
        self._by_name = {node.name: node for node in graph.nodes}
        self._outputs: list[str] = [value.name for value in exported.graph.output]
        calls = {output: node.name for node in graph.nodes for output in node.outputs}
        self._called = {value.fx_name: calls.get(name) for name, value in graph.values.items()}
        self._traced = {value.fx_name: name for name, value in graph.values.items()}
        for name, value in zip(self._outputs, graph.outputs, strict=False):
            self._called[name] = calls.get(value)
            self._traced[name] = value
        given = zip((value.name for value in exported.graph.input), graph.inputs, strict=False)
        self._traced.update(given)
        self._by_parameter: dict[str, list[str]] = {}
        for node in graph.nodes:
            for parameter in dict.fromkeys(node.parameters.values()):
                self._by_parameter.setdefault(parameter, []).append(node.name)
        self._calls: dict[int, str | None] = {}

    def exported_name(self, graph: Graph, value: str) -> str:
        """What a traced value is called in the file."""
        fx_name = graph.values[value].fx_name
        if fx_name in self.maker or value not in graph.outputs:
            return fx_name
        return str(self._outputs[graph.outputs.index(value)])

    def call(self, index: int) -> str | None:
        """The call that a node is part of: that of its weight, its value, or the next value that has one.

        torch's exporter splits one operator up into several nodes, the last of which carries its name.
        """
        if index in self._calls:
            return self._calls[index]
        seen, waiting, found = {index}, [index], None
        if self.nodes[index].op_type in _PRODUCTS:
            found = self._reads(index)
        if found is None and not any(output in self._called for output in self.nodes[index].output):
            found = self._unnamed(index)
        while waiting and found is None:
            current = self.nodes[waiting.pop(0)]
            for output in current.output:
                found = found or self._called.get(output)
                later = [reader for reader in self.readers.get(output, ()) if reader not in seen]
                seen.update(later)
                waiting.extend(later)
        self._calls[index] = found
        return found

    def _unnamed(self, index: int) -> str | None:
        """The call of a node whose value lost its name: the next call without a value behind what it reads.

        torch traces a program again where something must be decomposed, and names those values anew.
        """
        kind, inner = self.nodes[index].op_type, None
        for value in self.nodes[index].input:
            start = self._traced.get(value)
            if start is None and value in self.maker:
                before = self.call(self.maker[value])
                if before is None:
                    continue
                start = self._by_name[before].outputs[0]
                inner = before if self.nodes[self.maker[value]].op_type not in _PRODUCTS else inner
            waiting = [] if start is None else [start]
            while waiting:
                for reader in self._graph.consumers[waiting.pop(0)]:
                    if any(self.exported_name(self._graph, name) in self.maker for name in reader.outputs):
                        continue
                    if reader.op in _FOLDED and kind != "BatchNormalization":
                        waiting.extend(reader.outputs)
                    else:
                        return reader.name
        return inner

    def _reads(self, index: int) -> str | None:
        """The call that reads a product's weight; of several calls the one that is as far down the list."""
        for name in self.nodes[index].input[1:2]:
            calls, readers = self._by_parameter.get(name, []), self.readers[name]
            if calls and len(readers) == len(calls):
                return calls[readers.index(index)]
            if len(calls) == 1:
                return calls[0]
        return None

    def end(self, node: onnx.NodeProto, optimized: onnx.ModelProto) -> tuple[str, ...]:
        """The exported values that an optimized node computes; none if it only moves data for the runtime."""
        if node.op_type in ("ReorderInput", "ReorderOutput"):
            return ()
        values = tuple(output for output in node.output if output in self.maker)
        if values:
            return values
        later = [
            other.output[0]
            for other in optimized.graph.node
            if other.op_type == "ReorderOutput" and other.input[0] in node.output
        ]
        if later and later[0] in self.maker:
            return (later[0],)
        name = re.sub(r"_nchwc(_token_\d+)?$", "", node.name)
        if name in self.maker:
            return (self._behind(name, node),)
        marks = [int(number) for number in _MARK.findall(node.name)]
        if marks and marks[-1] < len(self.nodes):
            return (self._behind(self.nodes[marks[-1]].output[0], node),)
        return ()

    def _behind(self, value: str, node: onnx.NodeProto) -> str:
        """The value behind an addition and a clamp that an NCHWc convolution does at its end."""
        if node.domain != _NCHWC or node.op_type != "Conv":
            return value
        wanted: list[tuple[str, ...]] = [("Add", "Sum")] if len(node.input) > 3 and node.input[3] else []
        activation = next((item.s.decode() for item in node.attribute if item.name == "activation"), None)
        if activation is not None:
            wanted.append((activation,))
        for kinds in wanted:
            readers = self.readers.get(value, [])
            if len(readers) == 1 and self.nodes[readers[0]].op_type in kinds:
                value = self.nodes[readers[0]].output[0]
        return value

    def between(self, values: Iterable[str], taken: set[str]) -> list[int]:
        """Nodes from these values back to the values of others, nearest first."""
        found: dict[int, None] = {}
        waiting = [self.maker[value] for value in values]
        while waiting:
            index = waiting.pop(0)
            if index in found:
                continue
            found[index] = None
            waiting.extend(
                self.maker[name]
                for name in self.nodes[index].input
                if name in self.maker and name not in taken
            )
        return list(found)
