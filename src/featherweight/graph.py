"""What ``torch.export`` saw in a model, under names that survive.

The exported program is derived from the eager module, read, and thrown away. A
traced value is named by the call that makes it:

- the output of a layer: ``layer1.0.conv1#0:0`` (path # call : output),
- the output of a function: ``layer1.0/add#0:0`` (owner / operator # order in the owner : output),
  which is also how a second operator is named whose result the same call of a layer returns,
- an input: ``input:name``.

torch.export's own node names change with every edit and are used inside this
process only, to rewrite the program that they belong to.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind, OutputKind

from featherweight.errors import LoadError
from featherweight.model import Entry, Model
from featherweight.structure import bound, skeleton, structure_key

_STATE = "it writes into its inputs or buffers, which an artifact cannot keep: clone them first"


@dataclass(frozen=True)
class Node:
    """One operator call.

    Attributes:
        name: Traced name without the output, e.g. ``conv1#0`` or ``block/add#0``.
        op: ATen operator without overload: conv2d, linear, batch_norm, add, relu ...
        layer: Path of the owning layer; '' is the root.
        layer_type: Class name of the owning layer.
        inputs: Traced names of the tensors it reads that are no parameters or buffers.
        outputs: Traced names of the tensors that it makes.
        parameters: Operator argument -> name of the parameter or buffer read there.
        attributes: The other arguments by name: ints, floats, lists, None.
        fx_name: The node's name in the exported program.
    """

    name: str
    op: str
    layer: str
    layer_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: Mapping[str, str]
    attributes: Mapping[str, Any]
    fx_name: str


@dataclass(frozen=True)
class Value:
    """A traced tensor: its name, shape at the example inputs, and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fx_name: str


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order, and the program that they were read from."""

    nodes: tuple[Node, ...]
    values: Mapping[str, Value]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: Mapping[str, str]  # fx placeholder name -> parameter or buffer name
    program: ExportedProgram
    batch: int

    @cached_property
    def producer(self) -> Mapping[str, Node]:
        """Value name -> the node that makes it (inputs have none)."""
        return {output: node for node in self.nodes for output in node.outputs}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[Node, ...]]:
        """Value name -> the nodes that read it."""
        found: dict[str, list[Node]] = {name: [] for name in self.values}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found[name].append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def parameter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every parameter and buffer that is read, by its name in the module."""
        shapes: dict[str, tuple[int, ...]] = {}
        for node in self.program.graph.nodes:
            if node.name in self.parameters and isinstance(node.meta.get("val"), Tensor):
                shapes[self.parameters[node.name]] = tuple(_size(d) for d in node.meta["val"].shape)
        return shapes

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)


def trace(model: Model, entry: str = "forward") -> Graph:
    """Export one entry of a model in inference mode and name what was seen.

    Seconds of work, so the graph is kept beside the module that it was read from, and a module that differs
    from a known one in values alone takes its graph over (structure.py).

    Raises:
        LoadError: torch.export cannot follow the module.
    """
    if entry in model.traced:
        return model.traced[entry]  # type: ignore[no-any-return]
    how = model.entries[entry]
    key = structure_key(model, entry)
    known: Graph | None = model.structures.get(key)
    if known is None:
        graph = _exported(model.module, how)
        model.structures[key] = replace(graph, program=skeleton(graph.program))
    else:
        graph = replace(known, program=bound(known.program, model.module, _prefix(how)))
    model.traced[entry] = graph
    return graph


def _exported(module: nn.Module, how: Entry) -> Graph:
    """Export in inference mode, and read."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        program = _export(module, how)
    finally:
        for layer, training in modes:  # a frozen batch norm stays in its own mode
            layer.training = training
    return _read(program, module, how)


class _Call(nn.Module):
    """Calls another method than forward, for torch.export."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *inputs: Any) -> Any:
        return getattr(self.module, self.method)(*inputs)


@contextlib.contextmanager
def whole_recurrences() -> Iterator[None]:
    """Let torch see what LSTMs and GRUs return by their shapes alone.

    Its own way is to take them apart step by step, which makes a number of the length of the sequence.
    """
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    recurrent = (torch.ops.aten.lstm.input, torch.ops.aten.gru.input)
    places: list[tuple[Any, Any]] = [(target.py_kernels, key) for target in recurrent]
    places += [(torch._decomp.decomposition_table, target) for target in recurrent]
    own = [table[name] for table, name in places]
    for table, name in places:
        table[name] = partial(_recurrence, table[name])
    try:
        yield
    finally:
        for (table, name), kernel in zip(places, own, strict=True):
            table[name] = kernel


def _recurrence(kernel: Any, x: Any, states: Any, *rest: Any) -> Any:
    """Output and last states; the arguments are those of ``aten.lstm.input`` and ``aten.gru.input``."""
    if not isinstance(x, FakeTensor):
        return kernel(x, states, *rest)
    lasts = states if isinstance(states, (list, tuple)) else [states]
    directions = 2 if rest[5] else 1
    out = x.new_empty((*x.shape[:2], directions * lasts[0].shape[2]))
    return (out, *(torch.empty_like(state) for state in lasts))


def _export(module: nn.Module, entry: Entry) -> ExportedProgram:
    dims = tuple(
        dict.fromkeys(entry.dynamic_axes.get(name, {}), Dim.AUTO) or None for name in entry.input_names
    )
    arguments = entry.arguments(entry.example_inputs)
    shapes: Any = dims if entry.tree is None else torch.utils._pytree.tree_unflatten(list(dims), entry.tree)
    called = module if entry.method == "forward" else _Call(module, entry.method)
    try:
        with warnings.catch_warnings(), torch.no_grad(), whole_recurrences():
            warnings.simplefilter("ignore")  # torch.export warns of its own internals
            return _functional(
                export(called, arguments, dynamic_shapes=_by_parameter(called, shapes), strict=False)
            )
    except Exception as error:  # whatever user code or torch.export raises is told as one error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoadError(
            f"torch.export cannot follow {type(module).__name__}.{entry.method}: {first[:300]}",
            fix="avoid branches on tensor values and numpy in the model's code; "
            "see https://docs.pytorch.org/docs/stable/export.html",
        ) from error


def _functional(program: ExportedProgram) -> ExportedProgram:
    """The same program without operators that write into their input (``inplace=True``, ``+=``).

    Such an operator becomes the one that makes a new tensor, which everyone later reads instead; a
    write through a view is left to torch's own functionalization, which splits more operators up.
    """
    graph = program.graph_module.graph
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _writes(node):
            continue
        written = node.args[0]
        if written.op == "placeholder" and written.name not in program.graph_signature.user_inputs:
            raise ValueError(_STATE)
        views = [user for user in written.users if order[user] < order[node] and _is_view(user)]
        plain = getattr(torch.ops.aten, _operator(node), None)
        overload = getattr(plain, node.target._overloadname, None)
        if views or _is_view(written) or overload is None:
            return _functional_by_torch(program)
        with graph.inserting_before(node):
            made = graph.call_function(overload, node.args, node.kwargs)
        made.meta, order[made] = dict(node.meta), order[node]
        written.replace_all_uses_with(made, delete_user_cb=lambda u, made=made: order[u] > order[made])
        node.replace_all_uses_with(made)
        name = node.name
        graph.erase_node(node)
        made.name = name  # the signature knows it
    returned = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    for spec, value in zip(program.graph_signature.output_specs, returned, strict=True):
        if isinstance(value, fx.Node):
            spec.arg = replace(spec.arg, name=value.name)
    program.graph_module.recompile()
    return program


def _functional_by_torch(program: ExportedProgram) -> ExportedProgram:
    functional: ExportedProgram = program.run_decompositions({})
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in functional.graph_signature.output_specs):
        raise ValueError(_STATE)
    return functional


def _writes(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _is_view(node: fx.Node) -> bool:
    """Whether the result may share memory with an input of the operator, which is not written to."""
    target = node.target
    if target is operator.getitem:
        return _is_view(node.args[0])  # type: ignore[arg-type]
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return any(result.alias_info is not None for result in target._schema.returns)


def _by_parameter(called: nn.Module, shapes: Any) -> tuple[Any, ...]:
    """One item per parameter of forward, as torch.export wants it: those of ``*inputs`` are one tuple."""
    parameters = inspect.signature(called.forward).parameters.values()
    rest = next((i for i, one in enumerate(parameters) if one.kind is one.VAR_POSITIONAL), None)
    return tuple(shapes) if rest is None else (*shapes[:rest], tuple(shapes[rest:]))


def _size(dimension: Any) -> int:
    """An int, or the example's value of a symbolic size."""
    if isinstance(dimension, int):
        return dimension
    hint = dimension.node.hint
    return int(hint) if hint is not None else 1


def _operator(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1].rstrip("_")
    return getattr(target, "__name__", str(target))


def _owner(node: fx.Node, prefix: str) -> tuple[str, int]:
    """Path of the owning layer and which call of it this is."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "", 0
    key, (path, _) = list(stack.items())[-1]
    if not isinstance(path, str) or not key.startswith("L__self__"):
        return "", 0
    call = int(key.rpartition("@")[2]) if "@" in key else 0
    return (path[len(prefix) :] if path.startswith(prefix) else path.removeprefix(prefix.rstrip("."))), call


def _bind(node: fx.Node) -> dict[str, Any]:
    """Arguments by the operator's own argument names."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        names = [argument.name for argument in target._schema.arguments]
    else:
        names = [f"arg{index}" for index in range(len(node.args))]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _first_names(module: nn.Module) -> dict[str, str]:
    """Every name of a tied parameter -> its first one."""
    names: dict[int, str] = {}
    return {
        name: names.setdefault(id(parameter), name)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


def _lifted(bound: Mapping[str, Any]) -> Iterator[tuple[str, fx.Node]]:
    """Arguments that are nodes, those inside lists by ``name[index]``."""
    for key, arg in bound.items():
        if isinstance(arg, fx.Node):
            yield key, arg
        elif isinstance(arg, (list, tuple)):
            yield from ((f"{key}[{i}]", item) for i, item in enumerate(arg) if isinstance(item, fx.Node))


def _is_leaf(layer: nn.Module) -> bool:
    return not any(True for _ in layer.children())


def _prefix(entry: Entry) -> str:
    """What names of the program have before those of the module."""
    return "" if entry.method == "forward" else "module."


def _read(program: ExportedProgram, module: nn.Module, entry: Entry) -> Graph:
    prefix = _prefix(entry)
    first = _first_names(module)
    parameters = {
        spec.arg.name: first.get(name := str(spec.target).removeprefix(prefix), name)
        for spec in program.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        and spec.target is not None
    }
    user_inputs = list(program.graph_signature.user_inputs)
    names: dict[str, str] = {}  # fx node -> traced value
    values: dict[str, Value] = {}
    nodes: list[Node] = []
    order: Counter[tuple[str, str]] = Counter()
    returned_by: set[tuple[str, int]] = set()  # calls of layers whose output has its name

    def add_value(node: fx.Node, name: str) -> None:
        seen = node.meta["val"]
        names[node.name] = name
        values[name] = Value(name, tuple(_size(d) for d in seen.shape), seen.dtype, node.name)

    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name not in parameters and node.name in user_inputs:
            add_value(node, f"input:{entry.input_names[user_inputs.index(node.name)]}")
        if node.op != "call_function":
            continue
        seen = node.meta.get("val")
        if node.target is operator.getitem and node.args[0].name in names:
            if isinstance(seen, Tensor):
                add_value(node, f"{names[node.args[0].name].rpartition(':')[0]}:{node.args[1]}")
            continue
        several = isinstance(seen, (tuple, list)) and any(isinstance(item, Tensor) for item in seen)
        if not isinstance(seen, Tensor) and not several:
            continue  # shape arithmetic
        path, call = _owner(node, prefix)
        op = _operator(node)
        owner = module.get_submodule(path) if path else module
        result_of_layer = _is_leaf(owner) and path and _leaves(node, path, call, prefix)
        if result_of_layer and (path, call) not in returned_by:
            name = f"{path}#{call}"
            returned_by.add((path, call))
        else:
            name = f"{path}/{op}#{order[path, op]}"
            order[path, op] += 1
        bound = _bind(node)
        reads = list(node.all_input_nodes)
        if several:
            names[node.name] = f"{name}:0"  # replaced by the names of its items, which getitem takes
            outputs = tuple(f"{name}:{i}" for i, item in enumerate(seen) if isinstance(item, Tensor))
        else:
            add_value(node, f"{name}:0")
            outputs = (f"{name}:0",)
        nodes.append(
            Node(
                name=name,
                op=op,
                layer=path,
                layer_type=type(owner).__name__,
                inputs=tuple(names[read.name] for read in reads if read.name in names),
                outputs=outputs,
                parameters={
                    key: parameters[arg.name] for key, arg in _lifted(bound) if arg.name in parameters
                },
                attributes={
                    key: arg
                    for key, arg in bound.items()
                    if not isinstance(arg, fx.Node)
                    and not (isinstance(arg, (list, tuple)) and any(isinstance(i, fx.Node) for i in arg))
                },
                fx_name=node.name,
            )
        )
    returned = [spec.arg.name for spec in program.graph_signature.output_specs if hasattr(spec.arg, "name")]
    return Graph(
        nodes=tuple(nodes),
        values=values,
        inputs=tuple(names[name] for name in user_inputs if name in names),
        outputs=tuple(names[name] for name in returned if name in names),
        parameters=parameters,
        program=program,
        batch=_batch(entry),
    )


def _leaves(node: fx.Node, path: str, call: int, prefix: str) -> bool:
    """Whether the node makes what the layer's call returns: someone outside the call reads it."""
    for user in node.users:
        if user.op == "output" or _owner(user, prefix) != (path, call):
            return True
        if user.target is operator.getitem and _leaves(user, path, call, prefix):
            return True
    return False


def _batch(entry: Entry) -> int:
    first = entry.example_inputs[0]
    return int(first.shape[0]) if first.dim() else 1
