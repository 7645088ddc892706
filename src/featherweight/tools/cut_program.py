"""The calls of a traced graph as a program of ``unrolled.py``, with the sizes that a cut needs."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from featherweight.graph import Graph, Node
from featherweight.model import Entry, Model, Unroll
from featherweight.tools.cut_literals import Call, MisfitError
from featherweight.unrolled import runs

_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
_MODULES = (
    "conv",
    "linear",
    "batchnorm",
    "instancenorm",
    "normalization",
    "dropout",
    "activation",
    "pooling",
)
_NOT_ONE_CALL = (nn.MultiheadAttention, nn.Softmax2d)
_KINDS: Mapping[type, str] = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "format"}


def unrolling(model: Model, graphs: Mapping[str, Graph], calls: Mapping[str, Mapping[str, Call]]) -> Unroll:
    """The edit that makes the model's code data.

    Args:
        model: As it is before the cut.
        graphs: Entry -> its graph.
        calls: Entry -> name in the program -> the call with other numbers.

    Raises:
        MisfitError: Something in the graph is no data.
    """
    programs: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    tensors = {name for name, _ in model.module.named_parameters(remove_duplicate=False)}
    tensors |= {name for name, _ in model.module.named_buffers(remove_duplicate=False)}
    for name, graph in graphs.items():
        entry = model.entries[name]
        if entry.method in programs:
            raise MisfitError("", "", f"two entries call the method {entry.method}")
        programs[entry.method] = _Writer(model.module, graph, entry, calls[name]).program()
        for node in graph.program.graph.nodes:
            tensor = graph.parameters.get(node.name)
            if tensor is not None and tensor not in tensors and node.users:
                value = node.meta["val"]
                constants[tensor] = [list(value.shape), str(value.dtype).removeprefix("torch.")]
    return Unroll(programs, constants)


@dataclass
class _Step:
    layer: str  # whose code it is
    call: str  # which call of that layer
    data: dict[str, Any]


class _Writer:
    def __init__(self, module: nn.Module, graph: Graph, entry: Entry, calls: Mapping[str, Call]) -> None:
        self._module, self._graph, self._entry, self._calls = module, graph, entry, calls
        self._about = {node.fx_name: node for node in graph.nodes}
        self._order = list(graph.program.graph.nodes)
        self._inside: dict[str, list[fx.Node]] = {}  # call of a layer -> its nodes
        for node in self._order:
            if node.op == "call_function" and node.target is not operator.getitem:
                self._inside.setdefault(_call_key(node), []).append(node)

    def program(self) -> dict[str, Any]:
        returned = next(node for node in reversed(self._order) if node.op == "output")
        steps = list(self._steps(self._needed(returned)))
        results = [self._encode(item) for item in returned.args[0]]
        self._add_lasts(steps, results)
        runs = [
            {"layer": layer, "steps": [step.data for step in run]}
            for (layer, _), run in groupby(steps, lambda step: (step.layer, step.call))
        ]
        return {
            "names": self._names(),
            "inputs": list(self._graph.program.graph_signature.user_inputs),
            "tree": self._tree(),
            "runs": runs,
            "outputs": results,
        }

    # ---- steps

    def _needed(self, returned: fx.Node) -> set[str]:
        """What outputs come from, and idle calls, which count in names; not what layers do inside."""
        inside = {
            one.name
            for node in self._order
            if self._whole(node) is not None
            for one in self._inside[_call_key(node)]
            if one is not node
        }
        found: set[str] = set()
        waiting = [node for node in self._order if node.name in self._about and node.name not in inside]
        waiting += returned.all_input_nodes
        while waiting:
            node = waiting.pop()
            if node.name in found:
                continue
            found.add(node.name)
            given = self._whole(node)
            waiting += node.all_input_nodes if given is None else list(_flat(given))
        return found

    def _steps(self, needed: set[str]) -> Iterator[_Step]:
        at = "", ""
        for node in self._order:
            if node.op == "get_attr" and node.name in needed:
                raise MisfitError(node.name, "", "its graph holds another graph")
            if node.op != "call_function" or node.name not in needed:
                continue
            about = self._about.get(node.name)
            given = self._whole(node)
            if about is not None and given is not None:
                at = "", ""
                data = {"name": node.name, "call": about.layer, "args": self._encode(given)}
            else:
                if about is not None:  # arithmetic of sizes goes with what is before it
                    at = about.layer, _call_key(node)
                data = self._operator(node)
            yield _Step(*at, data)

    def _operator(self, node: fx.Node) -> dict[str, Any]:
        change: Any = self._calls.get(node.name, node)
        return {
            "name": node.name,
            "target": _name(change.target, node),
            "args": self._encode(list(change.args)),
            "kwargs": {key: self._encode(item) for key, item in change.kwargs.items()},
        }

    def _whole(self, node: fx.Node) -> list[Any] | None:
        """What an ordinary layer is called with when the node is all that its call does, else None."""
        about = self._about.get(node.name)
        if about is None or not about.layer or about.name.rpartition("#")[0] != about.layer:
            return None
        layer = self._module.get_submodule(about.layer)
        if not type(layer).__module__.startswith("torch.nn.modules") or isinstance(layer, _NOT_ONE_CALL):
            return None
        inside = self._inside[_call_key(node)]
        if isinstance(layer, nn.RNNBase):
            return self._recurrent(node, about, inside)
        kind = type(layer).__module__.rpartition(".")[2]
        own = [one for one in node.all_input_nodes if one.name not in self._graph.parameters]
        if len(inside) > 1 or len(own) != 1 or not isinstance(node.meta["val"], Tensor):
            return None
        return own if kind in _MODULES or isinstance(layer, nn.Embedding) else None

    def _recurrent(self, node: fx.Node, about: Node, inside: list[fx.Node]) -> list[Any] | None:
        if about.op not in _RECURRENT or not isinstance(node.args[1], (fx.Node, list, tuple)):
            return None
        states = node.args[1]
        listed = list(states) if isinstance(states, (list, tuple)) else [states]
        others = {one.name for one in inside if one is not node and "sym_size" not in one.name}
        if others and others == {one.name for one in listed if isinstance(one, fx.Node)}:
            return [node.args[0]]
        if others or len(self._module.get_submodule(about.layer)._flat_weights) != len(about.parameters):  # type: ignore[arg-type]
            return None
        return [node.args[0], tuple(listed) if isinstance(states, (list, tuple)) else states]

    def _add_lasts(self, steps: list[_Step], results: list[Any]) -> None:
        """After which step a value is no longer needed."""
        alive = set(_values(results))
        for step in reversed(steps):
            read = dict.fromkeys(_values([step.data["args"], step.data.get("kwargs")]))
            step.data["last"] = [name for name in (*read, step.data["name"]) if name not in alive]
            step.data["last"] = list(dict.fromkeys(step.data["last"]))
            alive.update(read)

    # ---- arguments

    def _encode(self, item: Any) -> Any:
        if isinstance(item, fx.Node):
            if item.name in self._graph.parameters:
                return {"tensor": self._graph.parameters[item.name]}
            return {"value": item.name}
        if isinstance(item, (list, tuple)):
            return [self._encode(one) for one in item]
        if item is None or isinstance(item, (bool, int, float, str)):
            return item
        if isinstance(item, torch.device):
            return {"device": None}
        kind = _KINDS.get(type(item))
        if kind is None:
            raise MisfitError("", "", f"its graph holds a {type(item).__name__}")
        return {kind: str(item).removeprefix("torch.")}

    def _names(self) -> list[str]:
        """Parameters of the method that the entry fills."""
        count = len(self._entry.arguments(self._entry.example_inputs))
        signature = inspect.signature(getattr(self._module, self._entry.method)).parameters.values()
        own = [one.name for one in signature if one.kind is one.POSITIONAL_OR_KEYWORD][:count]
        return [own[i] if i < len(own) else f"input_{i}" for i in range(count)]

    def _tree(self) -> str | None:
        """How outputs are nested; None for one tensor or a tuple of several."""
        spec = self._graph.program.call_spec.out_spec
        flat = spec is None or all(child.is_leaf() for child in spec.children())
        if spec is None or spec.is_leaf() or (flat and spec.type is tuple and spec.num_leaves > 1):
            return None
        try:
            return str(pytree.treespec_dumps(spec))
        except NotImplementedError as error:
            raise MisfitError("", "", f"its outputs come in a {spec.type.__name__}") from error


def _flat(items: list[Any]) -> Iterator[fx.Node]:
    for item in items:
        if isinstance(item, fx.Node):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _flat(list(item))


def _values(item: Any) -> Iterator[str]:
    if isinstance(item, Mapping):
        if set(item) == {"value"}:
            yield item["value"]
        else:
            for one in item.values():
                yield from _values(one)
    elif isinstance(item, (list, tuple)):
        for one in item:
            yield from _values(one)


def _call_key(node: fx.Node) -> str:
    """Which call of which layer, as torch.export writes it."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack)[-1]) if stack else ""


def _name(target: Any, node: fx.Node) -> str:
    if isinstance(target, torch._ops.OpOverload) and runs(str(target)):
        return str(target)
    name = getattr(target, "__name__", "")
    for module in (operator, torch):
        full = f"{module.__name__.lstrip('_')}.{name}"
        if getattr(module, name, None) is target and runs(full):
            return full
    raise MisfitError(node.name, "", f"its graph calls {target}")
