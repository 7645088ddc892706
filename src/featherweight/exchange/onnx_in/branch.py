"""The branch of an ``If`` that is taken, as nodes of the graph around it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import NodeProto, TensorProto

from featherweight.exchange.onnx_in.node import UnsupportedError
from featherweight.exchange.onnx_in.read import ordered, reads
from featherweight.exchange.opaque import subgraphs


@dataclass(frozen=True)
class Branch:
    """What takes the place of an ``If``.

    Attributes:
        nodes: In order; they make the outputs of the ``If``.
        tensors: Initializers, by the names that the nodes read.
    """

    nodes: tuple[NodeProto, ...]
    tensors: dict[str, TensorProto]


def take(node: NodeProto, condition: bool, taken: set[str], name: str) -> Branch:
    """The nodes of one branch.

    Args:
        node: The ``If``.
        condition: Which branch.
        taken: Names of the graph around it; those of the branch are added.
        name: The file, for messages.

    Raises:
        UnsupportedError: It has no such branch, or one of another number of outputs.
        LoadError: The branch is malformed.
    """
    wanted = "then_branch" if condition else "else_branch"
    graph = next((item.g for item in node.attribute if item.name == wanted), None)
    if graph is None or len(graph.output) != len(node.output):
        raise UnsupportedError(f"it has no {wanted} with {len(node.output)} outputs")
    made = {output for inner in graph.node for output in inner.output if output}
    finals = {
        inner.name: outer
        for inner, outer in reversed(list(zip(graph.output, node.output, strict=True)))
        if inner.name in made and outer
    }
    renamed: dict[str, str] = {}
    for value in (*(tensor.name for tensor in graph.initializer), *sorted(made)):
        renamed[value] = finals[value] if value in finals else _free(value, taken)
        taken.add(renamed[value])
    nodes = [_copied(inner, renamed) for inner in graph.node]
    for inner, outer in zip(graph.output, node.output, strict=True):
        if outer and finals.get(inner.name) != outer:
            nodes.append(
                onnx.helper.make_node(
                    "Identity", [renamed.get(inner.name, inner.name)], [outer], name=node.name
                )
            )
    tensors = {renamed[tensor.name]: tensor for tensor in graph.initializer}
    own = {value for item in nodes for value in item.output}
    outside = {value for item in nodes for value in reads(item)} - own
    outputs = [value for value in node.output if value]
    return Branch(ordered(nodes, outside, outputs, name), tensors)


def _free(value: str, taken: Iterable[str]) -> str:
    free, number = value, 2
    while free in taken:
        free, number = f"{value}_{number}", number + 1
    return free


def _copied(node: NodeProto, renamed: dict[str, str]) -> NodeProto:
    """A copy that reads and makes the renamed values, in its subgraphs too."""
    copied = NodeProto()
    copied.CopyFrom(node)
    waiting = [copied]
    while waiting:
        item = waiting.pop()
        for values in (item.input, item.output):
            for index, value in enumerate(values):
                values[index] = renamed.get(value, value)
        for graph in subgraphs(item):
            waiting.extend(graph.node)
            for output in graph.output:
                output.name = renamed.get(output.name, output.name)
    return copied
