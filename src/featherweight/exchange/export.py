"""Model -> ExportedProgram -> ONNX, without losing a name.

torch.onnx renames and rewrites what it likes. So every traced value and
parameter that must be found again is marked in the exported program by an
operator of our own, which the exporter and the optimizer pass on untouched; the
marks are read and taken out at the end. A mark that is lost is an error.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import operator
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputKind, TensorArgument

from featherweight.errors import TargetError
from featherweight.exchange import opaque
from featherweight.graph import Graph, trace, whole_recurrences
from featherweight.model import Model

OPSET = 20
_ONE_FILE = 2_000_000_000  # bytes of weights; protobuf ends at 2**31
_DOMAIN = "featherweight"
_TENSORS = [
    f"tensor({name})" for name in ("float", "double", "float16", "bfloat16", "int64", "int32", "bool")
]


@torch.library.custom_op("featherweight::mark", mutates_args=())
def _mark(x: Tensor, name: str) -> Tensor:
    """Identity that carries a name through exporters."""
    return x.clone()


@_mark.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


_ATEN = torch.ops.aten
# What torch.onnx translates as it stands; others are decomposed first, which traces the program anew.
_WHOLE = frozenset(
    {
        operator.getitem,
        torch.ops.featherweight.mark.default,
        *(_ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.mul.Tensor, _ATEN.div.Tensor),
        *(_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.linear.default, _ATEN.matmul.default),
        *(_ATEN.relu.default, _ATEN.relu6.default, _ATEN.hardtanh.default, _ATEN.clamp.default),
        *(_ATEN.sigmoid.default, _ATEN.hardswish.default, _ATEN.hardsigmoid.default, _ATEN.silu.default),
        *(_ATEN.tanh.default, _ATEN.gelu.default, _ATEN.leaky_relu.default, _ATEN.softmax.int),
        *(_ATEN._native_batch_norm_legit_no_training.default, _ATEN.layer_norm.default),
        *(_ATEN.max_pool2d.default, _ATEN.avg_pool2d.default, _ATEN.mean.dim, _ATEN.embedding.default),
        *(
            _ATEN.clone.default,
            _ATEN.cat.default,
            _ATEN.flatten.using_ints,
            _ATEN.permute.default,
            _ATEN.transpose.int,
        ),
    }
)


@dataclass(frozen=True)
class OnnxExport:
    """An ONNX graph, and where the asked names are in it.

    Attributes:
        model: To be edited further and saved.
        values: Asked name of a traced value or parameter -> the value in the graph that holds it.
        inside: Traced values that are in the graph under any name, in order; those that operators of
            ONNX swallowed are missing.
    """

    model: ir.Model
    values: dict[str, ir.Value]
    inside: dict[str, ir.Value]

    def names(self) -> dict[str, str]:
        """Traced value -> its name in the graph as it is now."""
        present = {id(value) for node in self.model.graph for value in node.outputs}
        return {
            name: value.name
            for name, value in self.inside.items()
            if value.name is not None and id(value) in present
        }


class _Program(ExportedProgram):
    """A program that is traced again (a third of an export) only where there is something to decompose."""

    def run_decompositions(self, decomp_table: Any = None, **options: Any) -> ExportedProgram:
        calls = [node.target for node in self.graph.nodes if node.op == "call_function"]
        if decomp_table is not None and all(call in _WHOLE and call not in decomp_table for call in calls):
            return self
        traced: ExportedProgram = super().run_decompositions(decomp_table, **options)
        return traced


def to_onnx(model: Model, entry: str = "forward", keep: Collection[str] = ()) -> OnnxExport:
    """Export one entry in inference mode, float, optimized, without exporter metadata.

    Args:
        model: Its formats are not applied: a runtime does that.
        entry: Which way of calling it.
        keep: Traced values and parameters that the caller will look for.

    Raises:
        TargetError: An operator has no ONNX form, or a name was lost.
    """
    graph = trace(model, entry)
    program = _marked(graph, {*keep, *_linear_weights(graph)})
    exported = _translate(program, graph, max(OPSET, model.origin.opset))
    _optimize(exported)
    values = _unmark(exported)
    lost = sorted(set(keep) - set(values))
    if lost:
        raise TargetError(
            f"the ONNX exporter lost '{lost[0]}'" + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""),
            fix="exclude its layer under where",
        )
    _fold_transposes(exported, [value for name, value in values.items() if name not in keep])
    inside = _inside(exported, graph, values)
    _name(exported, model, entry)
    _drop_zero_biases(exported)
    _strip(exported)
    restored = opaque.restore(exported)
    exported.metadata_props.update(model.origin.metadata)
    kept = {name: restored.get(values[name], values[name]) for name in keep}
    return OnnxExport(exported, kept, {name: restored.get(value, value) for name, value in inside.items()})


def write(model: ir.Model, path: Path) -> list[str]:
    """Write a file, its larger weights beside it where protobuf's 2 GB are not enough; returns the names."""
    _strip_types(model)  # also of what storing formats made
    weights = (value.const_value for value in model.graph.initializers.values())
    if sum(tensor.nbytes for tensor in weights if tensor is not None) <= _ONE_FILE:
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        return [path.name]
    beside = f"{path.name}.data"
    ir.save(model, path, external_data=beside)  # one tensor after the other
    return [path.name, beside]


def _linear_weights(graph: Graph) -> set[str]:
    """Weights that the optimizer would transpose into constants without a name."""
    return {
        node.parameters["weight"] for node in graph if node.op == "linear" and "weight" in node.parameters
    }


def _marked(graph: Graph, keep: set[str]) -> ExportedProgram:
    """A copy of the program in which every kept name is marked."""
    wanted = {value.fx_name: name for name, value in graph.values.items() if name in keep}
    wanted |= {fx_name: name for fx_name, name in graph.parameters.items() if name in keep}
    rewritten = copy.deepcopy(graph.program.graph)
    for node, copied in zip(graph.program.graph.nodes, rewritten.nodes, strict=True):
        copied.name = node.name  # fx renames what is called like a builtin: the 'input' of nn.Linear
    _decompose(rewritten)
    renamed: dict[str, str] = {}
    for node in list(rewritten.nodes):
        if node.name not in wanted or not node.users:  # a tied parameter may have a second, idle name
            continue
        place = node
        if node.op == "placeholder":  # marks come after the last placeholder
            place = [other for other in rewritten.nodes if other.op == "placeholder"][-1]
        with rewritten.inserting_after(place):
            mark = rewritten.call_function(torch.ops.featherweight.mark.default, (node, wanted[node.name]))
        mark.meta = dict(node.meta)
        node.replace_all_uses_with(mark, delete_user_cb=lambda user, mark=mark: user is not mark)
        renamed[node.name] = mark.name
    program = graph.program
    signature = program.graph_signature
    outputs = [
        copy.copy(spec)
        if spec.kind is not OutputKind.USER_OUTPUT or getattr(spec.arg, "name", None) not in renamed
        else type(spec)(spec.kind, TensorArgument(renamed[spec.arg.name]), spec.target)
        for spec in signature.output_specs
    ]
    root = torch.fx.GraphModule(program.graph_module, rewritten)
    return _Program(
        root=root,
        graph=rewritten,
        graph_signature=ExportGraphSignature(list(signature.input_specs), outputs),
        state_dict=dict(program.state_dict),
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=None,  # with examples torch adds checks of them, which it cannot trace again
        constants=program.constants,
    )


def _decompose(graph: torch.fx.Graph) -> None:
    """What decomposing makes of the commonest operators that have no translation: no tracing for them."""
    for node in list(graph.nodes):
        if node.target is _ATEN.adaptive_avg_pool2d.default and list(node.args[1]) == [1, 1]:
            with graph.inserting_before(node):
                made = graph.call_function(_ATEN.mean.dim, (node.args[0], [-1, -2], True))
        elif node.target is _ATEN.dropout.default and not node.args[2]:
            with graph.inserting_before(node):
                made = graph.call_function(_ATEN.clone.default, (node.args[0],))
        elif node.target is _ATEN.batch_norm.default and not node.args[5]:
            x, weight, bias, mean, variance, _, momentum, eps, _ = node.args
            arguments = (x, weight, bias, mean, variance, momentum, eps)
            with graph.inserting_before(node):
                several = graph.call_function(_ATEN._native_batch_norm_legit_no_training.default, arguments)
                made = graph.call_function(operator.getitem, (several, 0))
            none = node.meta["val"].new_empty(0)
            several.meta = {**node.meta, "val": (node.meta["val"], none, none)}
        else:
            continue
        made.meta, name = dict(node.meta), node.name
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        made.name = name  # the signature and the marks know it


def _translate(program: ExportedProgram, graph: Graph, opset: int) -> ir.Model:
    import onnxscript

    kinds = onnx.defs.OpSchema
    schema = kinds(
        "Mark",
        _DOMAIN,
        1,
        inputs=[kinds.FormalParameter("x", "T")],
        outputs=[kinds.FormalParameter("y", "T")],
        type_constraints=[("T", _TENSORS, "any tensor")],
        attributes=[kinds.Attribute("name", kinds.AttrType.STRING)],
    )
    mark = onnxscript.values.Op(onnxscript.values.Opset(_DOMAIN, 1), "Mark", schema)

    def translation(x, name: str):  # type: ignore[no-untyped-def]
        return mark(x, name=name)

    try:
        with _quiet(), whole_recurrences():
            result = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                custom_translation_table={
                    torch.ops.featherweight.mark.default: translation,
                    torch.ops.featherweight.opaque.default: opaque.translation,
                },
            )
    except torch.onnx.errors.OnnxExporterError as error:
        causes = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
        raise TargetError(
            f"an operator of the model has no ONNX form: {causes[0][:300] if causes else 'unknown'}",
            fix="write it with operators that torch.onnx exports",
        ) from error
    if result is None:
        raise TargetError(
            "torch.onnx exported nothing", fix=f"the model has {len(graph.nodes)} operators; report it"
        )
    return result.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns of its own internals; its errors still come as exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _optimize(model: ir.Model) -> None:
    """Fold constants and shape arithmetic, drop what is dead; marks stay where they are."""
    from onnxscript import optimizer

    with _quiet():
        optimizer.optimize_ir(model)
    for node in list(model.graph):
        if node.op_type == "ReduceMean":
            _global_average(model, node)
        elif node.op_type == "Clip":
            _hard_sigmoid(model, node)


def _global_average(model: ir.Model, node: ir.Node) -> None:
    """A mean over the last two of four axes that stay is a GlobalAveragePool, which has integer kernels."""
    axes = ir.convenience.get_const_tensor(node.inputs[1]) if len(node.inputs) > 1 else None  # type: ignore[arg-type]
    source = node.inputs[0]
    rank = None if source is None or source.shape is None else len(source.shape)
    kept = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
    if axes is None or rank != 4 or not kept:
        return
    if sorted(int(axis) % 4 for axis in axes.numpy().reshape(-1)) != [2, 3]:
        return
    pool = ir.node("GlobalAveragePool", [source])
    pool.outputs[0].shape, pool.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], [pool], node.outputs, pool.outputs)


def _hard_sigmoid(model: ir.Model, clip: ir.Node) -> None:
    """clip(a * x + b, 0, 1) is one operator; torch has it for one slope alone."""
    ends = [_number(value) for value in clip.inputs[1:3]]
    shift = _only_reader_of(clip.inputs[0], "Add")
    scale = None if shift is None else _only_reader_of(shift.inputs[0], "Mul")
    if ends != [0.0, 1.0] or shift is None or scale is None:
        return
    alpha, beta = _number(scale.inputs[1]), _number(shift.inputs[1])
    if alpha is None or beta is None:
        return
    made = ir.node("HardSigmoid", [scale.inputs[0]], {"alpha": alpha, "beta": beta})
    made.outputs[0].shape, made.outputs[0].type = clip.outputs[0].shape, clip.outputs[0].type
    ir.convenience.replace_nodes_and_values(
        model.graph, clip, [clip, shift, scale], [made], clip.outputs, made.outputs
    )


def _only_reader_of(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node of that operator that makes a value which one node reads."""
    node = None if value is None else value.producer()
    if node is None or value is None or node.op_type != operator or len(value.uses()) != 1:
        return None
    return None if value.is_graph_output() else node


def _number(value: ir.Value | None) -> float | None:
    """A constant of one element."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size != 1 else float(tensor.numpy().reshape(-1)[0])


def _unmark(model: ir.Model) -> dict[str, ir.Value]:
    """Take the marks out; returns where each name is."""
    found: dict[str, ir.Value] = {}
    for node in list(model.graph):
        if (node.domain, node.op_type) != (_DOMAIN, "Mark"):
            continue
        source, marked = node.inputs[0], node.outputs[0]
        if source is None:
            continue
        for index, output in enumerate(model.graph.outputs):
            if output is marked:
                model.graph.outputs[index] = source
        ir.convenience.replace_all_uses_with(marked, source)
        found[node.attributes["name"].as_string()] = source
        model.graph.remove(node, safe=True)
    model.opset_imports.pop(_DOMAIN, None)
    return found


def _inside(exported: ir.Model, graph: Graph, marked: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
    """Traced values by the names that torch.onnx gives them: those of the program's nodes."""
    by_name = {value.name: value for node in exported.graph for value in node.outputs}
    found = {}
    for name, value in graph.values.items():
        here = marked.get(name, by_name.get(value.fx_name))
        if here is not None and here.producer() is not None:
            found[name] = here
    found |= {name: exported.graph.outputs[index] for index, name in enumerate(graph.outputs)}
    return {name: found[name] for name in graph.values if name in found}


def _fold_transposes(exported: ir.Model, constants: list[ir.Value]) -> None:
    """Turn what is only read transposed around for good, under its own name."""
    for value in constants:
        readers = [use.node for use in value.uses()]
        orders = {
            tuple(node.attributes["perm"].as_ints()) if node.op_type == "Transpose" else None
            for node in readers
        }
        order = orders.pop() if len(orders) == 1 else None
        if order is None or value.const_value is None:
            continue
        turned = np.ascontiguousarray(value.const_value.numpy().transpose(order))
        value.const_value = ir.tensor(turned, name=value.name)
        for node in readers:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            exported.graph.remove(node, safe=True)


def _name(exported: ir.Model, model: Model, entry: str) -> None:
    """The entry's names for inputs, outputs and dynamic axes."""
    how = model.entries[entry]
    taken = {*how.input_names, *how.output_names}
    inner = [*exported.graph.initializers.values(), *(v for node in exported.graph for v in node.outputs)]
    for value in inner:
        if value.name in taken:
            value.name = f"{value.name}.inner"
    symbols: dict[str, str] = {}  # the exporter's own -> the entry's
    for value, name in zip(exported.graph.inputs, how.input_names, strict=True):
        value.name = name
        axes = how.dynamic_axes.get(name, {})
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and axis in axes:
                symbols.setdefault(str(size), axes[axis])
    for value in (*exported.graph.inputs, *exported.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(
                [size if isinstance(size, int) else symbols.get(str(size), size) for size in value.shape]
            )
    given: set[int] = set()
    for index, (value, name) in enumerate(zip(list(exported.graph.outputs), how.output_names, strict=True)):
        if value.producer() is None or id(value) in given:  # an input handed on, or the same value twice
            identity = ir.node("Identity", [value])
            exported.graph.append(identity)
            identity.outputs[0].shape, identity.outputs[0].type = value.shape, value.type
            exported.graph.outputs[index] = value = identity.outputs[0]
        given.add(id(value))
        value.name = f"{name}.out" if name in how.input_names else name


def _drop_zero_biases(exported: ir.Model) -> None:
    """The exporter gives every convolution a bias; one of zeros costs bytes and time for nothing."""
    for node in exported.graph:
        if node.op_type not in ("Conv", "ConvTranspose") or len(node.inputs) < 3:
            continue
        bias = node.inputs[2]
        tensor = None if bias is None else ir.convenience.get_const_tensor(bias)
        if tensor is not None and not np.any(tensor.numpy()):
            node.resize_inputs(2)
    for name, value in list(exported.graph.initializers.items()):
        if not value.uses() and value not in exported.graph.outputs:
            del exported.graph.initializers[name]


def _strip(model: ir.Model) -> None:
    """Remove what exporters leave and no runtime reads (some 55 KB in a file of 1.2 MB)."""
    model.metadata_props.clear()
    model.doc_string = None
    model.producer_name, model.producer_version = "featherweight", None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        node.name = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in model.graph.outputs:
                value.type, value.shape = None, None
    _strip_types(model)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None


def _strip_types(model: ir.Model) -> None:
    """No types and shapes of initializers, for their tensors say both."""
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.type, value.shape = None, None
