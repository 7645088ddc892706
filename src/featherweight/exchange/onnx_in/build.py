"""Builds the module node by node, running each on the example inputs, so that ranks and dtypes are facts."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from onnx import NodeProto
from torch import Tensor, nn

from featherweight.errors import LoadError
from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.aside import Aside
from featherweight.exchange.onnx_in.branch import take
from featherweight.exchange.onnx_in.module import Imported, Ref, Scope, Step, imported_class
from featherweight.exchange.onnx_in.names import Names
from featherweight.exchange.onnx_in.node import AbsurdError, Call, Node, UnsupportedError, Weight, refused
from featherweight.exchange.onnx_in.operators import OPERATORS
from featherweight.exchange.onnx_in.patterns import put_together
from featherweight.exchange.onnx_in.read import Source, array_of, reads
from featherweight.exchange.opaque import EndlessError, Opaque, Program, all_nodes

_IF = ("", "If")

# Whatever a malformed node makes torch, NumPy or onnx raise while it is built or first run.
FAILURES = (
    UnsupportedError,
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    MemoryError,
    NotImplementedError,
)


@dataclass(frozen=True)
class Built:
    """What the graph became.

    Attributes:
        module: Ordinary layers, and opaque ones where nodes have none.
        notes: What was assumed, for the user.
        decided: Inputs whose values chose a branch: they must keep them.
    """

    module: Imported
    notes: tuple[str, ...]
    decided: frozenset[str]


def build_module(source: Source, examples: Sequence[Tensor], *, traced: bool = True) -> Built:
    """The graph as a module.

    Args:
        source: What was read.
        examples: One tensor per input; each node is run on what the nodes before it made of them.
        traced: torch.export shall follow the module: a node whose axes, sizes or counts are data is opaque.

    Raises:
        LoadError: A node cannot be imported and ONNX Runtime cannot run it; names operator and node.
    """
    builder = _Builder(source, traced)
    with torch.no_grad():
        return builder.build(examples)


def _key(node: NodeProto) -> tuple[str, str]:
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


def _name(node: NodeProto) -> str:
    return node.name or next((item for item in node.output if item), node.op_type)


@dataclass(frozen=True)
class _Item:
    """A node, or a MatMul together with the Add of its bias."""

    proto: NodeProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bias_from: NodeProto | None = None

    @property
    def nodes(self) -> list[NodeProto]:
        return [self.proto] if self.bias_from is None else [self.proto, self.bias_from]


class _Builder:
    def __init__(self, source: Source, traced: bool) -> None:
        self.source = source
        self.traced = traced
        self.constants: dict[str, np.ndarray] = dict(source.constants)
        self.values: dict[str, Any] = {}
        self.names = Names(all_nodes(source.nodes))
        inputs = [item.name for item in source.inputs]
        self.module = imported_class(inputs)(inputs)
        self.steps: list[Step] = []
        self.tensors: dict[str, str] = {}  # constant -> path of its parameter or buffer
        self.shared: dict[tuple[str, str], nn.Parameter] = {}  # (constant, change) -> the tied parameter
        self.layers: dict[str, str] = {}  # signature of a layer with weights -> path: one called twice
        self.readers = Counter(value for node in source.nodes for value in reads(node))
        self.readers.update(source.outputs)
        self.declared = {item.name: item.dtype for item in source.inputs}
        self.taken = {*self.constants, *self.declared, *(o for node in source.nodes for o in node.output)}
        self.aside = Aside()
        self.opaque: dict[str, Aside] = {}
        self.decided: dict[str, str] = {}  # input -> its value
        self.by_sizes = 0  # branches that sizes of the examples chose

    def build(self, examples: Sequence[Tensor]) -> Built:
        """Make a step of every node that depends on an input, and run it."""
        self.values = {item.name: value for item, value in zip(self.source.inputs, examples, strict=True)}
        self._add(self.source.nodes)
        self._close()
        outputs = tuple(
            Ref("tensor", self._tensor_path(name)) if name in self.constants else Ref("value", name, "tensor")
            for name in self.source.outputs
        )
        missing = [ref.name for ref in outputs if ref.kind == "value" and ref.name not in self.values]
        if missing:
            raise LoadError(
                f"nothing that is supported computes the output '{missing[0]}' of '{self.source.name}'",
                fix="export without it",
            )
        self.module.complete(_forgetting(self.steps, outputs), outputs)
        return Built(self.module.eval(), tuple(self._notes()), frozenset(self.decided))

    def _add(self, nodes: Sequence[NodeProto]) -> None:
        for item in self._with_biases(put_together(self._fold_all(nodes), self.constants, self.readers)):
            if _key(item.proto) == _IF:
                if self.aside.makes(item.inputs):
                    self._close()
                if (branch := self._chosen(item.proto)) is not None:
                    self._add(branch)
                    continue
            self._add_one(item)

    def _add_one(self, item: _Item) -> None:
        """A layer or a function for a node, else it is put aside."""
        entry = OPERATORS.get(_key(item.proto))
        if entry is None:
            self.aside.add(item.nodes, "no layer computes it", None)
            return
        closed = self._close() if self.aside.makes(item.inputs) else None
        node = self._node(item)
        try:
            self._emit(node, item, entry(node))
        except AbsurdError as error:
            raise refused(node, told(error), self.source.name) from error
        except FAILURES as error:
            if closed is not None:
                self._reopen(closed)  # it was closed for a node that is of its kind
            self.aside.add(item.nodes, told(error), error)

    # --- branches -------------------------------------------------------------------------------------

    def _chosen(self, proto: NodeProto) -> tuple[NodeProto, ...] | None:
        """The nodes of the branch that the examples choose; None: data choose, anew with each call."""
        value = self.constants.get(proto.input[0]) if proto.input else None
        if value is None:
            value = self.values.get(proto.input[0]) if proto.input else None
            if value is None or np.prod(value.shape) != 1:
                return None
            if isinstance(value, np.ndarray):
                self.by_sizes += 1
            else:
                inputs = self._behind(proto.input[0])
                if inputs is None:
                    return None
                self.decided |= {name: str(self.values[name].reshape(-1).tolist()) for name in inputs}
        return self._branch(proto, bool(value.reshape(-1)[0]))

    def _branch(self, proto: NodeProto, condition: bool) -> tuple[NodeProto, ...]:
        try:
            branch = take(proto, condition, self.taken, self.source.name)
        except UnsupportedError as error:
            node = self._node(_Item(proto, tuple(proto.input), tuple(proto.output)))
            raise refused(node, told(error), self.source.name) from error
        self.readers.subtract(reads(proto))
        self.readers.update(value for node in branch.nodes for value in reads(node))
        self.constants |= {name: array_of(t, self.source.name) for name, t in branch.tensors.items()}
        return branch.nodes

    def _behind(self, name: str) -> set[str] | None:
        """The inputs whose values make a value, if each is one integer or truth value (a switch)."""
        makers = {output: step for step in self.steps for output in step.outputs if output}
        found: set[str] = set()
        waiting, seen = [name], {name}
        while waiting:
            value = waiting.pop()
            if value in self.declared:
                found.add(value)
            step = makers.get(value)
            if step is None or step.op in ("Shape", "Size"):
                continue
            before = {ref.name for ref in step.arguments if ref.kind == "value"} - seen
            seen |= before
            waiting.extend(before)
        switches = all(
            self.declared[item].kind in "iub" and np.prod(self.values[item].shape) <= 1 for item in found
        )
        return found if switches else None

    # --- nodes that ONNX Runtime runs -----------------------------------------------------------------

    def _close(self) -> Aside | None:
        """Make one opaque layer of the nodes that are aside, and run it."""
        aside, self.aside = self.aside, Aside()
        if not aside.nodes:
            return None
        first = aside.nodes[0]
        node = self._node(_Item(first, tuple(first.input), tuple(first.output)))
        try:
            program, inputs, outputs = aside.program(self.source, self.constants, self.readers, self._dtype)
            if not inputs and aside.is_fixed():
                made = program.run(())
                self.constants |= {n: host.array_of(v) for n, v in zip(outputs, made, strict=True)}
                return None
            step = self._opaque_step(aside, program, inputs, outputs)
            self.module.run(step, self.values)
        except EndlessError:
            raise
        except (LoadError, UnsupportedError) as error:
            raise self._neither(aside, node, error) from (aside.error or error)
        self.steps.append(step)
        self.opaque[aside.path] = aside
        return aside

    def _neither(self, aside: Aside, node: Node, error: BaseException) -> LoadError:
        """The error about nodes that have no layer and that ONNX Runtime cannot run alone."""
        if aside.error is not None:
            return refused(node, next(iter(aside.reasons)), self.source.name)
        known = ", ".join(sorted(name for domain, name in OPERATORS if not domain))
        return LoadError(
            f"'{self.source.name}' has operators that are not supported: {', '.join(aside.operators())}; "
            f"ONNX Runtime cannot run them either: {told(error)}",
            where=f"node '{node.name}' (operator {node.op})",
            fix=f"export without them, or give path.py:callable with --weights; supported are {known}",
        )

    def _opaque_step(
        self, aside: Aside, program: Program, inputs: Sequence[str], outputs: Sequence[str]
    ) -> Step:
        first = aside.nodes[0]
        aside.path = aside.path or self.names.layer(first)
        scope, leaf = self._scope(aside.path)
        scope.add_module(leaf, Opaque(program, aside.operators()))
        return Step(
            op=first.op_type,
            name=_name(first),
            layer=aside.path,
            function=None,
            arguments=tuple(Ref("value", name, "tensor") for name in inputs),
            outputs=tuple(outputs),
        )

    def _reopen(self, aside: Aside) -> None:
        """Take the layer just made back: more nodes follow."""
        if not self.steps or self.steps[-1].layer != aside.path:
            return
        for name in self.steps.pop().outputs:
            del self.values[name]
        self._remove(aside.path)
        del self.opaque[aside.path]
        self.aside = aside

    def _remove(self, path: str) -> None:
        scope, leaf = self._scope(path)
        delattr(scope, leaf)

    def _dtype(self, name: str) -> np.dtype:
        value = self.values[name]
        if name in self.declared:
            return self.declared[name]
        if isinstance(value, Tensor):
            return host.array_of(value).dtype
        return np.dtype(np.int64) if value.dtype == object else value.dtype

    def _notes(self) -> Iterator[str]:
        for name, value in self.decided.items():
            yield f"input '{name}' is taken as {value}: it chooses branches of the graph, and no longer does"
        if self.by_sizes:
            yield f"{self.by_sizes} branches were chosen by the sizes of the example inputs"
        for path, aside in self.opaque.items():
            yield (
                f"'{path}' is run by ONNX Runtime as it is ({', '.join(aside.operators())}; "
                f"{len(aside.nodes)} of {len(self.source.nodes)} nodes): " + "; ".join(aside.reasons)
            )

    # --- constants ------------------------------------------------------------------------------------

    def _fold_all(self, nodes: Sequence[NodeProto]) -> list[NodeProto]:
        """Compute what depends on constants alone; returns the other nodes."""
        left: list[NodeProto] = []
        queue = deque(nodes)
        while queue:
            proto = queue.popleft()
            if _key(proto) == _IF and proto.input and proto.input[0] in self.constants:
                value = self.constants[proto.input[0]]
                if value.size == 1:
                    queue.extendleft(reversed(self._branch(proto, bool(value.reshape(-1)[0]))))
                    continue
            entry = OPERATORS.get(_key(proto))
            if entry is None or not all(value in self.constants for value in reads(proto)):
                left.append(proto)
                continue
            node = self._node(_Item(proto, tuple(proto.input), self._read(proto)))
            try:
                self._fold(node, entry(node))
            except AbsurdError as error:
                raise refused(node, told(error), self.source.name) from error
            except FAILURES:
                left.append(proto)  # ONNX Runtime may run it
        return left

    def _fold(self, node: Node, call: Call) -> None:
        if isinstance(call.run, nn.Module):
            self._fill(call.run, node, call.weights, tie=False)
        arguments: list[Any] = []
        for index in call.inputs:
            value = node.constant(index)
            arguments.append(value if value is None or index in call.sizes else _tensor(value))
        if call.before is not None:
            arguments[0] = call.before(arguments[0])
        run = call.run.eval() if isinstance(call.run, nn.Module) else call.run
        result = run(*arguments)
        result = result if call.after is None else call.after(result)
        results = result if isinstance(result, tuple) else (result,)
        for name, value in zip(node.outputs, results, strict=False):
            if name:
                self.constants[name] = value if isinstance(value, np.ndarray) else host.array_of(value)

    def _with_biases(self, nodes: Sequence[NodeProto]) -> list[_Item]:
        """Waiting nodes, where the product with a constant matrix and the bias added to it are one."""
        adds = {
            value: node
            for node in nodes
            if node.op_type == "Add" and len(node.input) == 2 and not node.domain
            for value in node.input
        }
        items: list[_Item] = []
        merged: set[str] = set()
        for proto in nodes:
            if _key(proto) == ("", "Add") and proto.output[0] in merged:
                continue
            add = adds.get(proto.output[0]) if self._is_product(proto) else None
            if add is not None and (bias := self._bias_of(add, proto)):
                merged.add(add.output[0])
                items.append(_Item(proto, (*proto.input, bias), tuple(add.output), add))
            else:
                items.append(_Item(proto, tuple(proto.input), self._read(proto)))
        return items

    def _is_product(self, proto: NodeProto) -> bool:
        if _key(proto) != ("", "MatMul") or len(proto.input) != 2:
            return False
        weight = self.constants.get(proto.input[1])
        return weight is not None and weight.ndim == 2 and self.readers[proto.output[0]] == 1

    def _bias_of(self, add: NodeProto, product: NodeProto) -> str:
        """The constant that an Add adds to each row of a product; '' when it adds something else."""
        other = add.input[1] if add.input[0] == product.output[0] else add.input[0]
        bias, columns = self.constants.get(other), self.constants[product.input[1]].shape[1]
        return other if bias is not None and bias.shape == (columns,) else ""

    def _read(self, proto: NodeProto) -> tuple[str, ...]:
        """Outputs, '' for those that nobody reads."""
        return tuple(name if self.readers[name] else "" for name in proto.output)

    def _node(self, item: _Item) -> Node:
        proto = item.proto
        return Node(
            op=proto.op_type,
            name=_name(proto),
            opset=self.source.opsets.get(_key(proto)[0], 1),
            inputs=item.inputs,
            outputs=item.outputs,
            attributes={attribute.name: attribute for attribute in proto.attribute},
            constants=self.constants,
            examples=self.values,
            declared=self.declared,
        )

    def _emit(self, node: Node, item: _Item, call: Call) -> None:
        tensors, layers = dict(self.tensors), dict(self.layers)
        try:
            step = Step(
                op=node.op,
                name=node.name,
                layer=self._layer(node, item, call) if isinstance(call.run, nn.Module) else "",
                function=None if isinstance(call.run, nn.Module) else call.run,
                arguments=self._arguments(node, call),
                outputs=node.outputs,
                before=call.before,
                after=call.after,
            )
            self.module.run(step, self.values)
            missing = [name for name in node.outputs if name and name not in self.values]
            if missing:
                raise UnsupportedError(f"its output '{missing[0]}' is not computed")
        except FAILURES:
            for path in {*self.tensors.values(), *self.layers.values()} - {
                *tensors.values(),
                *layers.values(),
            }:
                self._remove(path)
            self.tensors, self.layers = tensors, layers
            raise
        self.steps.append(step)

    def _arguments(self, node: Node, call: Call) -> tuple[Ref, ...]:
        moving = [i for i in call.inputs if node.has(i) and node.constant(i) is None and i not in call.sizes]
        on_host = call.host and all(isinstance(self.values[node.inputs[i]], np.ndarray) for i in moving)
        refs = []
        for index in call.inputs:
            constant = node.constant(index)
            if not node.has(index):
                refs.append(Ref("none"))
            elif constant is not None:
                numbers = index in call.sizes or (on_host and moving)
                name = node.inputs[index]
                refs.append(
                    Ref("host", number=constant) if numbers else Ref("tensor", self._tensor_path(name))
                )
            elif index in call.sizes:
                if self.traced and isinstance(self.values[node.inputs[index]], Tensor):
                    raise UnsupportedError(f"its input {index} is axes, sizes or a count that data decide")
                refs.append(Ref("value", node.inputs[index], "sizes"))
            else:
                refs.append(Ref("value", node.inputs[index], "" if on_host else "tensor"))
        return tuple(refs)

    def _tensor_path(self, name: str) -> str:
        """The parameter (several finite floats) or buffer (anything else) that holds a constant."""
        if name in self.tensors:
            return self.tensors[name]
        value = _tensor(self.constants[name])
        path = self.names.tensor(name)
        scope, leaf = self._scope(path)
        if value.is_floating_point() and value.numel() > 1 and bool(torch.isfinite(value).all()):
            known = self.shared.setdefault((name, "as it is"), nn.Parameter(value))
            scope.register_parameter(leaf, known)
        else:
            scope.register_buffer(leaf, value)
        self.tensors[name] = path
        return path

    def _layer(self, node: Node, item: _Item, call: Call) -> str:
        """Register the layer; the same one again for the same settings and weights."""
        layer = call.run
        assert isinstance(layer, nn.Module)
        weights = [node.inputs[weight.input] for weight in call.weights]
        signature = _signature(layer, call.weights, weights)
        if weights and signature in self.layers:
            return self.layers[signature]
        self._fill(layer, node, call.weights, tie=True)
        path = self.names.layer(item.proto, weights)
        scope, leaf = self._scope(path)
        scope.add_module(leaf, layer.eval())
        self.layers[signature] = path
        return path

    def _scope(self, path: str) -> tuple[nn.Module, str]:
        *above, leaf = path.split(".")
        scope: nn.Module = self.module
        for part in above:
            if part not in scope._modules:
                scope.add_module(part, Scope())
            scope = scope.get_submodule(part)
        return scope, leaf

    def _fill(self, layer: nn.Module, node: Node, weights: Sequence[Weight], *, tie: bool) -> None:
        """Give a blank layer its tensors; those of one constant in one form are tied."""
        for weight in weights:
            array = node.fixed(weight.input, weight.name)
            owner_path, _, name = weight.name.rpartition(".")
            owner = layer.get_submodule(owner_path)
            blank = getattr(owner, name)
            changed = array if weight.apply is None else weight.apply(array)
            if tuple(changed.shape) != tuple(blank.shape):
                raise UnsupportedError(
                    f"its {weight.name} has the shape {changed.shape}, not {tuple(blank.shape)}"
                )
            key = (node.inputs[weight.input], weight.change)
            if not isinstance(blank, nn.Parameter):
                setattr(owner, name, _tensor(changed))
            elif tie and key in self.shared:
                setattr(owner, name, self.shared[key])
            else:
                parameter = nn.Parameter(_tensor(changed))
                setattr(owner, name, parameter)
                if tie:
                    self.shared[key] = parameter
        for owner in layer.modules():
            for name, buffer in list(owner.named_buffers(recurse=False)):
                if buffer.is_meta:  # a count of batches
                    setattr(owner, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
            for name, parameter in list(owner.named_parameters(recurse=False)):
                if parameter.is_meta:
                    raise UnsupportedError(f"it has no {name}")


def _signature(layer: nn.Module, weights: Sequence[Weight], names: Sequence[str]) -> str:
    changes = [(weight.name, weight.change, name) for weight, name in zip(weights, names, strict=True)]
    settings = {
        key: value
        for key, value in vars(layer).items()
        if isinstance(value, (int, float, str, tuple, type(None)))
    }
    text = repr((type(layer).__name__, sorted(settings.items(), key=lambda item: item[0]), changes))
    return hashlib.sha256(text.encode()).hexdigest()


def _tensor(array: np.ndarray) -> Tensor:
    """A copy that owns its memory (the file's may be mapped, or not writable)."""
    return host.tensor_of(array)


def _forgetting(steps: Sequence[Step], outputs: Sequence[Ref]) -> list[Step]:
    """Steps that drop each value after the last step that reads it."""
    kept = {ref.name for ref in outputs if ref.kind == "value"}
    seen = set(kept)
    result = []
    for step in reversed(steps):
        touched = [ref.name for ref in step.arguments if ref.kind == "value"]
        touched += [name for name in step.outputs if name]
        last = tuple(name for name in dict.fromkeys(touched) if name not in seen)
        seen.update(last)
        result.append(replace(step, last=last))
    return result[::-1]


def told(error: BaseException) -> str:
    """The first line of an error, with its type where that says more."""
    lines = str(error).strip().splitlines()
    text = lines[0][:300] if lines else type(error).__name__
    return text if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {text}"
