"""Builds the module node by node, running each on the example inputs, so that ranks and dtypes are facts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from onnx import NodeProto
from torch import Tensor, nn

from featherweight.errors import LoadError
from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.module import Imported, Ref, Scope, Step, imported_class
from featherweight.exchange.onnx_in.names import Names
from featherweight.exchange.onnx_in.node import Call, Node, UnsupportedError, Weight, refused
from featherweight.exchange.onnx_in.operators import OPERATORS
from featherweight.exchange.onnx_in.read import Source

# Whatever a malformed node makes torch, NumPy or onnx raise while it is built or first run.
_FAILURES = (
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


def check_operators(source: Source) -> None:
    """Refuse a graph with operators that the table has not.

    Raises:
        LoadError: Names each, with the node of the first, and what the table has.
    """
    unknown = [node for node in source.nodes if _key(node) not in OPERATORS]
    if not unknown:
        return
    kinds = Counter(f"{node.domain}.{node.op_type}".removeprefix(".") for node in unknown)
    counted = ", ".join(f"{kind} ({count} x)" for kind, count in kinds.most_common(8))
    known = ", ".join(sorted(name for domain, name in OPERATORS if not domain))
    first = unknown[0]
    raise LoadError(
        f"'{source.name}' has operators that are not supported: {counted}",
        where=f"node '{_name(first)}' (operator {first.op_type}, domain '{first.domain or 'ai.onnx'}')",
        fix=f"export without them, or give path.py:callable with --weights; supported are {known}",
    )


def build_module(source: Source, examples: Sequence[Tensor]) -> Imported:
    """The graph as a module.

    Args:
        source: What was read.
        examples: One tensor per input; each node is run on what the nodes before it made of them.

    Raises:
        LoadError: A node cannot be imported; names operator and node.
    """
    check_operators(source)
    builder = _Builder(source)
    with torch.no_grad():
        builder.fold()
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


class _Builder:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.constants: dict[str, np.ndarray] = dict(source.constants)
        self.values: dict[str, Any] = {}
        self.names = Names(source.nodes)
        inputs = [item.name for item in source.inputs]
        self.module = imported_class(inputs)(inputs)
        self.steps: list[Step] = []
        self.tensors: dict[str, str] = {}  # constant -> path of its parameter or buffer
        self.shared: dict[tuple[str, str], nn.Parameter] = {}  # (constant, change) -> the tied parameter
        self.layers: dict[str, str] = {}  # signature of a layer with weights -> path: one called twice
        self.waiting: list[NodeProto] = []
        readers = Counter(value for node in source.nodes for value in node.input)
        readers.update(source.outputs)
        self.readers = readers

    def fold(self) -> None:
        """Compute what depends on constants alone; other nodes wait."""
        for proto in self.source.nodes:
            inputs = [value for value in proto.input if value]
            if not all(value in self.constants for value in inputs):
                self.waiting.append(proto)
                continue
            node = self._node(_Item(proto, tuple(proto.input), self._read(proto)))
            try:
                self._fold(node, OPERATORS[_key(proto)](node))
            except _FAILURES as error:
                raise refused(node, _reason(error), self.source.name) from error

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
                self.constants[name] = value if isinstance(value, np.ndarray) else value.detach().numpy()

    def build(self, examples: Sequence[Tensor]) -> Imported:
        """Make a step of every node that waits, and run it."""
        self.values = {item.name: value for item, value in zip(self.source.inputs, examples, strict=True)}
        for item in self._with_biases():
            node = self._node(item)
            try:
                self._emit(node, item, OPERATORS[_key(item.proto)](node))
            except _FAILURES as error:
                raise refused(node, _reason(error), self.source.name) from error
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
        return self.module.eval()

    def _with_biases(self) -> list[_Item]:
        """Waiting nodes, where the product with a constant matrix and the bias added to it are one."""
        adds = {
            value: node
            for node in self.waiting
            if node.op_type == "Add" and len(node.input) == 2 and not node.domain
            for value in node.input
        }
        items: list[_Item] = []
        merged: set[str] = set()
        for proto in self.waiting:
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
        )

    def _emit(self, node: Node, item: _Item, call: Call) -> None:
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
    if array.dtype == object:
        return host.to_tensor(array)
    return torch.from_numpy(np.array(array, order="C"))


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


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0][:300] if lines else type(error).__name__
    return text if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {text}"
