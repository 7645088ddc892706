"""Nodes without a layer of their own: run by ONNX Runtime inside the module, written back as they were.

A run of such nodes is a ``Program``: a small ONNX model with its subgraphs and constants. A frozen layer
holds it and calls ``featherweight::opaque``, which torch.export records as one node; the exporter turns that
node into a placeholder, and ``restore`` puts the original nodes into its place.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]
from onnx import NodeProto
from torch import Tensor, nn

from featherweight.errors import LoadError, TargetError

DOMAIN = "featherweight"
SECONDS = 15.0  # for a run while a file is imported; weights add to it
_PLACEHOLDER = "Opaque"
Shapes = tuple[tuple[int, ...], ...]

# An operator takes tensors and texts, so a program is found by its digest. The layers keep programs alive.
_PROGRAMS: WeakValueDictionary[str, Program] = WeakValueDictionary()


class EndlessError(LoadError):
    """A run that had to be ended."""


@dataclass(eq=False)
class Program:
    """Some nodes as an ONNX model.

    Attributes:
        content: The serialized model; its inputs and outputs are tensors.
        digest: SHA-256 of it.
        nodes: How many nodes it has, without those of subgraphs.
        dtypes: Of the outputs, known after the first run.
        seen: Shapes of inputs and outputs in the runs of the import.
        learning: Whether the import goes on, whose runs are remembered.
    """

    content: bytes
    digest: str
    nodes: int
    dtypes: tuple[torch.dtype, ...] = ()
    seen: list[tuple[Shapes, Shapes]] = field(default_factory=list)
    learning: bool = True
    _session: Any = None

    def __deepcopy__(self, _: Any) -> Program:
        return self  # nothing changes in it once the model is imported

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of one call.

        Args:
            inputs: One tensor per input.

        Raises:
            LoadError: ONNX Runtime cannot run it, or an output is no tensor of numbers.
        """
        from onnxruntime import RunOptions

        options = RunOptions()
        arrays = [value.detach().cpu().contiguous().numpy() for value in inputs]
        session = self._opened()
        feed = dict(zip((item.name for item in session.get_inputs()), arrays, strict=True))
        found = limited(lambda: session.run(None, feed, options), options, "it", seconds=self._seconds())
        if not all(isinstance(item, np.ndarray) and item.dtype.kind in "fiub" for item in found):
            raise LoadError("its result is no tensor of numbers", fix="export the model without it")
        device = inputs[0].device if inputs else torch.device("cpu")
        outputs = [torch.from_numpy(np.array(item)).to(device) for item in found]
        if self.learning:
            self.dtypes = tuple(item.dtype for item in outputs)
            self.seen.append((_shapes(inputs), _shapes(outputs)))
        return outputs

    def _seconds(self) -> float:
        return SECONDS + len(self.content) / 2e7 if self.learning else 3600.0

    def _opened(self) -> Any:
        if self._session is None:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            options.intra_op_num_threads = torch.get_num_threads()
            try:
                self._session = onnxruntime.InferenceSession(
                    self.content, options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # onnxruntime raises its own kinds, which have no common base
                raise LoadError(f"ONNX Runtime refuses it: {_first_line(error)}") from error
        return self._session

    def shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Shapes of the outputs for (symbolic) shapes of inputs, concluded from what was seen.

        A size that never changed is that number, one that was always the size of an axis of an input is that
        size, or a whole multiple of it plus a number; any other depends on data and gets a new symbol.
        """
        result: list[list[Any]] = []
        for index in range(len(self.dtypes)):
            ranks = {len(made[index]) for _, made in self.seen}
            if len(ranks) != 1:
                raise RuntimeError(f"output {index} of an opaque layer changes its rank with its inputs")
            result.append([self._size(index, axis, inputs) for axis in range(ranks.pop())])
        return result

    def _size(self, output: int, axis: int, inputs: Sequence[Sequence[Any]]) -> Any:
        made = [shapes[output][axis] for _, shapes in self.seen]
        if len(set(made)) == 1:
            return made[0]
        best: Any = None
        for which, shape in enumerate(inputs):
            for place, size in enumerate(shape):
                read = [shapes[which][place] for shapes, _ in self.seen]
                if read == made:
                    return size
                if best is None and (rule := _line(read, made)) is not None:
                    best = size * rule[0] + rule[1]
        return torch.library.get_ctx().new_dynamic_size() if best is None else best


def _line(read: Sequence[int], made: Sequence[int]) -> tuple[int, int] | None:
    """Whole numbers a > 0 and b with made = a * read + b, where at least three sizes say so."""
    pairs = sorted(set(zip(read, made, strict=True)))
    if len(pairs) < 3 or pairs[0][0] == pairs[1][0]:
        return None
    factor, rest = divmod(pairs[1][1] - pairs[0][1], pairs[1][0] - pairs[0][0])
    if rest or factor <= 0:
        return None
    offset = pairs[0][1] - factor * pairs[0][0]
    return (factor, offset) if all(y == factor * x + offset for x, y in pairs) else None


def _shapes(tensors: Iterable[Tensor]) -> Shapes:
    return tuple(tuple(int(size) for size in item.shape) for item in tensors)


@torch.library.custom_op("featherweight::opaque", mutates_args=())
def _opaque(inputs: list[Tensor], digest: str) -> list[Tensor]:
    """What the program of this digest makes of the inputs."""
    return _PROGRAMS[digest].run(inputs)


@_opaque.register_fake
def _(inputs: list[Tensor], digest: str) -> list[Tensor]:
    program = _PROGRAMS[digest]
    shapes = program.shapes([item.shape for item in inputs])
    device = inputs[0].device if inputs else torch.device("cpu")
    return [
        torch.empty(shape, dtype=dtype, device=device)
        for shape, dtype in zip(shapes, program.dtypes, strict=True)
    ]


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.count = len(inputs[0])


def _backward(ctx: Any, _: Any) -> Any:
    return [None] * ctx.count, None


_opaque.register_autograd(_backward, setup_context=_remember)


class Opaque(nn.Module):
    """A frozen layer that ONNX Runtime runs. No gradient passes it, and no method changes it.

    Args:
        program: Its nodes.
        operators: Their operators, for people.
    """

    def __init__(self, program: Program, operators: Sequence[str]) -> None:
        super().__init__()
        self.program = _PROGRAMS.setdefault(program.digest, program)
        self.digest = program.digest  # the model's key is of what the layer holds
        self.operators = tuple(operators)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.featherweight.opaque(list(inputs), self.digest))

    def extra_repr(self) -> str:
        return ", ".join(self.operators)


def opaque_layers(module: nn.Module) -> dict[str, Opaque]:
    """The opaque layers by path."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, Opaque)}


def make_program(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, np.dtype],
    outputs: Sequence[str],
    constants: Mapping[str, np.ndarray],
    opsets: Mapping[str, int],
    ir_version: int,
) -> Program:
    """Nodes in order as a program.

    Args:
        nodes: As they are in the file.
        inputs: Types of the values that they read, by name.
        outputs: Names of the values that others read.
        constants: Values of the constants that they read.
        opsets: Domain -> version of the file.
        ir_version: Of the file.

    Raises:
        LoadError: It is larger than protobuf allows.
    """
    graph = onnx.GraphProto(name="opaque", node=nodes)
    for name, dtype in inputs.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(array, order="C"), name) for name, array in constants.items()
    )
    used = {"" if node.domain == "ai.onnx" else node.domain for node in all_nodes(nodes)} | {""}
    imports = [onnx.helper.make_opsetid(name, opsets.get(name, 1)) for name in sorted(used)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=max(ir_version, 4))
    try:
        content = model.SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as error:
        raise LoadError(f"its constants are too large: {_first_line(error)}") from error
    return Program(content, hashlib.sha256(content).hexdigest(), len(nodes))


def all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Nodes and those of their subgraphs (the parser bounds how deep they nest)."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        for graph in subgraphs(node):
            waiting.extend(graph.node)


def subgraphs(node: NodeProto) -> list[onnx.GraphProto]:
    """The bodies and branches of a node."""
    kinds = onnx.AttributeProto
    return [
        graph
        for attribute in node.attribute
        for graph in (
            [attribute.g]
            if attribute.type == kinds.GRAPH
            else attribute.graphs
            if attribute.type == kinds.GRAPHS
            else ()
        )
    ]


# --- the way out ------------------------------------------------------------------------------------


def translation(inputs: Sequence[Any], digest: str) -> Sequence[Any]:
    """How torch.onnx writes an opaque layer: as a placeholder with the digest."""
    import onnxscript

    attributes = [ir.AttrString("digest", digest)]
    node = ir.Node(
        DOMAIN, _PLACEHOLDER, list(inputs), attributes, num_outputs=len(_PROGRAMS[digest].dtypes), version=1
    )
    onnxscript.evaluator.default().nodes.append(node)
    return node.outputs


def restore(model: ir.Model) -> dict[ir.Value, ir.Value]:
    """Put the original nodes where placeholders are; returns what each placeholder's output became.

    Raises:
        TargetError: Nodes of an older opset have no form in the opset of the model.
    """
    became: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == _PLACEHOLDER:
            became |= _restore(model, node)
    if became:
        model.opset_imports.pop(DOMAIN, None)
    return became


def _restore(model: ir.Model, placeholder: ir.Node) -> dict[ir.Value, ir.Value]:
    program = _PROGRAMS[placeholder.attributes["digest"].as_string()]
    inner = ir.from_proto(_at_opset(program, model.opset_imports[""]))
    graph = inner.graph
    for domain, version in inner.opset_imports.items():
        model.opset_imports.setdefault(domain, version)
    for mine, given in zip(list(graph.inputs), placeholder.inputs, strict=True):
        if given is not None:
            ir.convenience.replace_all_uses_with(mine, given)
    outputs = list(graph.outputs)
    graph.outputs.clear()
    constants = list(graph.initializers.values())
    graph.initializers.clear()
    nodes = list(graph)
    graph.remove(nodes)
    _rename(model, nodes, constants)
    model.graph.insert_before(placeholder, nodes)
    for value in constants:
        model.graph.register_initializer(value)
    became = dict(zip(placeholder.outputs, outputs, strict=True))
    for old, new in became.items():
        new.name, new.shape, new.type = old.name, old.shape, old.type
        for index, output in enumerate(model.graph.outputs):
            if output is old:
                model.graph.outputs[index] = new
        ir.convenience.replace_all_uses_with(old, new)
        old.name = None
    model.graph.remove(placeholder, safe=True)
    return became


def _rename(model: ir.Model, nodes: Sequence[ir.Node], constants: Sequence[ir.Value]) -> None:
    """Names of the nodes' values that the model has already get a number."""
    taken = {value.name for value in model.graph.inputs} | set(model.graph.initializers)
    taken |= {value.name for node in model.graph.all_nodes() for value in node.outputs}
    values = list(constants)
    for node in nodes:
        values.extend(value for value in node.outputs if value.name)
        for graph in _inner_graphs(node):
            values += [*graph.inputs, *graph.initializers.values()]
            values.extend(value for inner in graph for value in inner.outputs if value.name)
    for value in values:
        name, number = value.name, 2
        while value.name in taken:
            value.name, number = f"{name}_{number}", number + 1
        taken.add(value.name)


def _inner_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        if attribute.type not in kinds:
            continue
        graphs = [attribute.as_graph()] if attribute.type is kinds[0] else attribute.as_graphs()
        for graph in graphs:
            yield graph
            for inner in graph:
                yield from _inner_graphs(inner)


def _at_opset(program: Program, version: int) -> onnx.ModelProto:
    """The program's model in this opset: unchanged where its operators are the same there."""
    model = onnx.ModelProto()
    model.ParseFromString(program.content)
    own = next(item.version for item in model.opset_import if item.domain == "")
    default = {node.op_type for node in all_nodes(model.graph.node) if node.domain in ("", "ai.onnx")}
    if own == version or all(_since(kind, own) == _since(kind, version) for kind in default):
        return model
    try:
        converted: onnx.ModelProto = onnx.version_converter.convert_version(model, version)
    except Exception as error:  # the converter raises RuntimeError and its own kinds
        raise TargetError(
            f"opaque nodes of opset {own} have no form in opset {version}: {_first_line(error)}",
            where=f"operators {', '.join(sorted(default))}",
            fix=f"export the model again, with opset {version} or newer",
        ) from error
    return converted


def _since(kind: str, version: int) -> int:
    try:
        return int(onnx.defs.get_schema(kind, version, "").since_version)
    except onnx.defs.SchemaError:
        return -version  # not there: never equal


def limited(
    run: Callable[[], Any], options: Any, what: str, fix: str | None = None, seconds: float = 120.0
) -> Any:
    """A run of ONNX Runtime that ends in time: a loop in a file may be endless.

    Args:
        run: The call, with these options.
        options: ``onnxruntime.RunOptions``.
        what: What messages call it.
        fix: What to do.
        seconds: Limit.

    Raises:
        LoadError: It fails, or took longer.
    """

    def stop() -> None:
        options.terminate = True

    watch = threading.Timer(seconds, stop)
    watch.daemon = True
    watch.start()
    try:
        return run()
    except Exception as error:  # onnxruntime raises its own kinds, which have no common base
        if options.terminate:
            raise EndlessError(
                f"ONNX Runtime cannot run {what}: it did not end in {seconds:.0f} s",
                fix="check the loops of the model, or give smaller examples",
            ) from error
        raise LoadError(f"ONNX Runtime cannot run {what}: {_first_line(error)}", fix=fix) from error
    finally:
        watch.cancel()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
