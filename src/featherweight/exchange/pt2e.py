"""Model + formats -> an exported program with torch's quantize and dequantize operators.

This is what torchao's PT2E ``convert`` would make, made from our formats instead of observers: each value
that has a format is followed by ``quantized_decomposed.quantize_per_tensor`` and by one ``dequantize`` for
each of its readers; weights are stored as integers behind a ``dequantize``. Runtimes that take torch's
programs (ExecuTorch, LiteRT) turn such patterns into their integer kernels.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram, export

from featherweight.errors import TargetError
from featherweight.exchange._pt2e_weights import Tensors, is_dequantized, limits, write_weight
from featherweight.formats import IntQuant, PerTensor, TensorFormat
from featherweight.graph import Graph, trace, whole_recurrences
from featherweight.model import Entry, Model
from featherweight.runtime import Role

_QD = torch.ops.quantized_decomposed
_ATEN = torch.ops.aten
_SAME = 1e-6  # relative difference of ends that are one number in float32


@dataclass(frozen=True)
class QuantizedProgram:
    """A program that computes what the formats say.

    Attributes:
        program: Flat tensors in, a flat tuple of tensors out; all its tensors are buffers whose names are
            identifiers, so that no converter stumbles over a leading digit or a dot.
        tensors: Name of a buffer -> the parameter or buffer of the module that it holds; scales and zero
            points are not listed.
        grids: Traced value -> scale and zero point of its integers.
    """

    program: ExportedProgram
    tensors: Mapping[str, str]
    grids: Mapping[str, tuple[float, int]]


def quantized_program(
    model: Model,
    entry: str = "forward",
    realise: Callable[[TensorFormat, Role], TensorFormat] = lambda fmt, role: fmt,
    *,
    batch: int | None = 1,
    one_grid: Collection[str] = (),
    dynamic: bool = False,
    rewrite: Callable[[fx.GraphModule], None] | None = None,
) -> QuantizedProgram:
    """Export one entry with its formats as quantize and dequantize operators.

    Args:
        model: A model; formats of what this entry does not read are passed by.
        entry: Which way of calling it.
        realise: The grid that will be stored for a format.
        batch: Size of every dynamic first axis, which becomes fixed with all others; None: as traced.
        one_grid: Operators (ATen names) whose integer inputs and output must share a scale; an input on
            another grid is brought to the output's in front of them.
        dynamic: Layers with integer weights that read or make floats get their input quantized anew for
            each call, as XNNPACK's kernels ask for; else their weights are dequantized.
        rewrite: Edits the graph after it was exported with fixed sizes and before it is exported for good.

    Raises:
        TargetError: A value or parameter that has a format is not in the graph.
    """
    graph = trace(model, entry)
    writer = _Writer(graph, model, realise)
    writer.drop_copies()
    writer.drop_clamps()
    writer.activations()
    writer.share_grids(frozenset(one_grid))
    writer.weights(dynamic)
    how = model.entries[entry]
    program = _export(writer.module(), how, batch)
    if rewrite is not None:
        unlifted = program.module(check_guards=False)
        rewrite(unlifted)
        unlifted.graph.lint()
        program = _export(_bare(unlifted), how, batch)
    held = {
        name: parameter for name, parameter in writer.tensors.parameters.items() if name in program.state_dict
    }
    return QuantizedProgram(program, held, writer.grids)


class _Writer:
    """Edits a copy of the traced graph, in which parameters are attributes."""

    def __init__(self, graph: Graph, model: Model, realise: Callable[[TensorFormat, Role], Any]) -> None:
        self.tensors = Tensors()
        self.grids: dict[str, tuple[float, int]] = {}
        self._realise = realise
        unlifted = graph.program.module(check_guards=False)
        self.graph: fx.Graph = unlifted.graph
        self.graph.set_codegen(fx.graph.CodeGen())  # flat tensors in and out
        self.graph.owning_module = None  # its tensors are renamed below
        end = self.graph.output_node()
        end.args = (tuple(torch.utils._pytree.tree_leaves(end.args[0])),)
        self._formats = _present(graph, model)
        self._nodes = self._find(graph)
        self._parameters = self._flatten(graph, unlifted)
        self._grid: dict[fx.Node, IntQuant] = {}  # a value -> its integers
        for name, node in self._nodes.items():
            if name in self._formats:
                self._set(node, name, self._realise(self._formats[name][-1], "activation"))

    def _set(self, node: fx.Node, name: str, fmt: TensorFormat) -> None:
        if not isinstance(fmt, IntQuant) or not isinstance(fmt.granularity, PerTensor):
            raise TargetError(
                f"'{name}' cannot be {type(fmt).__name__} in an exported program",
                fix="store activations as int8 per tensor",
            )
        scale, zero_point = fmt.grid()
        self.grids[name] = (float(scale), int(zero_point))
        self._grid.setdefault(node, fmt)

    def _find(self, graph: Graph) -> dict[str, fx.Node]:
        """Traced value -> node of the copy; both graphs hold the same calls in the same order."""
        calls = [node.name for node in graph.program.graph.nodes if node.op == "call_function"]
        copies = [node for node in self.graph.nodes if node.op == "call_function"]
        nodes = dict(zip(calls, copies, strict=True))
        holders = [node for node in self.graph.nodes if node.op == "placeholder"]
        nodes |= dict(zip(graph.program.graph_signature.user_inputs, holders, strict=True))
        return {name: nodes[value.fx_name] for name, value in graph.values.items() if value.fx_name in nodes}

    def _flatten(self, graph: Graph, unlifted: fx.GraphModule) -> dict[fx.Node, str]:
        """Give every tensor a name that is an identifier; returns the parameter that each node reads."""
        known = {
            str(spec.target): graph.parameters[spec.arg.name]
            for spec in graph.program.graph_signature.input_specs
            if spec.arg.name in graph.parameters
        }
        read: dict[fx.Node, str] = {}
        names: dict[str, str] = {}
        for node in self.graph.nodes:
            if node.op != "get_attr":
                continue
            read[node] = known.get(node.target, node.target)
            value = operator.attrgetter(node.target)(unlifted)
            if not isinstance(value, Tensor):
                self.tensors.stored[node.target] = value
                continue
            name = names.get(read[node]) or self.tensors.add(read[node], value.detach())
            names[read[node]] = node.target = name
        return read

    def weights(self, dynamic: bool) -> None:
        """Integers in the place of parameters that have formats."""
        for node, name in self._parameters.items():
            if name not in self._formats:
                continue
            fmt = self._realise(self._formats[name][-1], "weight")
            for reader in list(node.users):
                write_weight(self.graph, self.tensors, node, fmt, reader, dynamic)

    def module(self) -> fx.GraphModule:
        """What was edited; holds the tensors that are still read."""
        self.graph.eliminate_dead_code()
        read = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        self.graph.lint()
        return fx.GraphModule({name: self.tensors.stored[name] for name in read}, self.graph)

    # ---- values

    def drop_copies(self) -> None:
        """Dropout in inference is a copy; its format is that of its input."""
        for node in list(self.graph.nodes):
            if node.target is _ATEN.dropout.default and not node.args[2]:
                self._replace(node, node.args[0])

    def drop_clamps(self) -> None:
        """A clamp whose grid ends inside its limits does nothing that the rounding to the grid does not."""
        for node in list(self.graph.nodes):
            ends = limits(node)
            if ends is None or node not in self._grid:
                continue
            source = node.args[0]
            if source in self._grid or len(source.users) > 1 or source.op != "call_function":
                continue
            low, high = _ends(self._grid[node])
            slack = _SAME * (high - low)
            if low >= ends[0] - slack and high <= ends[1] + slack:
                self._replace(node, source)

    def _replace(self, node: fx.Node, source: fx.Node) -> None:
        if node in self._grid:
            self._grid.setdefault(source, self._grid.pop(node))
        node.replace_all_uses_with(source)
        self.graph.erase_node(node)

    def activations(self) -> None:
        """Integers behind each value, and real numbers again in front of each reader."""
        for node, fmt in self._grid.items():
            readers = list(node.users)
            place = node
            if node.op == "placeholder":
                place = [other for other in self.graph.nodes if other.op == "placeholder"][-1]
            with self.graph.inserting_after(place):
                integers = self.graph.call_function(_QD.quantize_per_tensor.default, (node, *_scheme(fmt)))
            self._read(integers, fmt, node, readers)

    def _read(self, integers: fx.Node, fmt: IntQuant, instead_of: fx.Node, readers: list[fx.Node]) -> None:
        for reader in readers:
            with self.graph.inserting_before(reader):
                real = self.graph.call_function(_QD.dequantize_per_tensor.default, (integers, *_scheme(fmt)))
            reader.replace_input_with(instead_of, real)

    def share_grids(self, operators: frozenset[str]) -> None:
        """Bring integers to the grid of the output where a kernel has one grid for both."""
        for node, fmt in self._grid.items():
            if node.op != "call_function" or _name(node) not in operators:
                continue
            for source in node.all_input_nodes:
                if not is_dequantized(source) or source.args[1:] == _scheme(fmt):
                    continue
                with self.graph.inserting_before(node):
                    moved = self.graph.call_function(_QD.quantize_per_tensor.default, (source, *_scheme(fmt)))
                self._read(moved, fmt, source, [node])


def _bare(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with no tensors but those that it reads."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    return fx.GraphModule({name: operator.attrgetter(name)(module) for name in read}, module.graph)


def _present(graph: Graph, model: Model) -> dict[str, tuple[TensorFormat, ...]]:
    """Formats of what this entry reads or makes; another entry's are passed by."""
    read = {name for node in graph for name in node.parameters.values()}
    return {name: chain for name, chain in model.formats.items() if name in graph.values or name in read}


def _name(node: fx.Node) -> str:
    return str(node.target._schema.name).split("::")[-1] if hasattr(node.target, "_schema") else ""


def _ends(fmt: IntQuant) -> tuple[float, float]:
    """Smallest and largest real number on a grid."""
    scale, zero_point = (float(x) for x in fmt.grid())
    return (fmt.quant_min - zero_point) * scale, (fmt.quant_max - zero_point) * scale


def _scheme(fmt: IntQuant) -> tuple[Any, ...]:
    """Arguments of quantize_per_tensor and dequantize_per_tensor."""
    scale, zero_point = fmt.grid()
    kind = torch.int8 if fmt.signed else torch.uint8
    return float(scale), int(zero_point), fmt.quant_min, fmt.quant_max, kind


def _export(module: fx.GraphModule, entry: Entry, batch: int | None) -> ExportedProgram:
    """Trace what was edited, with its sizes fixed or as free as they were."""
    axes = [entry.dynamic_axes.get(name, {}) for name in entry.input_names]
    examples = tuple(
        x if batch is None or 0 not in free else _resized(x, batch)
        for x, free in zip(entry.example_inputs, axes, strict=True)
    )
    shapes = tuple(dict.fromkeys(free, Dim.AUTO) or None for free in axes) if batch is None else None
    with warnings.catch_warnings(), torch.no_grad(), whole_recurrences():
        warnings.simplefilter("ignore")  # torch.export warns of its own internals
        return export(module, examples, dynamic_shapes=shapes, strict=False)


def _resized(x: Tensor, batch: int) -> Tensor:
    """So many examples, repeated where there are fewer."""
    return torch.zeros_like(x[:1]).expand(batch, *x.shape[1:]).contiguous()
