"""The exported graph replayed so that it can be trained: batch norm and dropout as the layer's mode says.

A graph is exported in inference mode, where these operators are constants of themselves. Each one asks the
layer that it came from whether it trains, as the eager module does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from featherweight.graph import Graph, Node
from featherweight.tools.simulate import Interpreter, Observe

Call = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

_BATCH_NORM = frozenset({"batch_norm", "_native_batch_norm_legit_no_training"})
_DROPOUT = frozenset({"dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"})
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
_TRAIN_AT = {"lstm": 6, "gru": 6, "rnn_tanh": 6, "rnn_relu": 6}  # place of the argument ``train``
_CHECKS = frozenset({"_assert_tensor_metadata"})  # of dtypes, which mixed precision changes


class TrainableReplay(Interpreter):
    """Runs a graph on parameters that are given at each call.

    Args:
        graph: Of the module's entry.
        module: Whose layers say whether they train.
        observe: May replace each traced value.
        at_readers: What only some operators read rounded.
        calls: By fx name, what is done instead of an operator.
    """

    def __init__(
        self,
        graph: Graph,
        module: nn.Module,
        observe: Observe,
        at_readers: Mapping[str, tuple[Any, ...]],
        calls: Mapping[str, Call],
    ) -> None:
        names = {value.fx_name: name for name, value in graph.values.items()}
        super().__init__(graph, {}, names, observe, at_readers)
        self._calls = {**live_calls(graph, module), **calls}
        self._node = ""

    def run_with(self, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Flat outputs with these parameters, buffers and constants."""
        self._tensors = tensors
        try:
            return self.outputs(inputs)
        finally:
            self._tensors = {}
            self.env.clear()

    def run_node(self, n: fx.Node) -> Any:
        self._node = n.name
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._calls.get(self._node)
        return super().call_function(target, args, kwargs) if call is None else call(target, args, kwargs)


def live_calls(graph: Graph, module: nn.Module) -> dict[str, Call]:
    """What to call instead of the operators that training changes, by fx name."""
    found: dict[str, Call] = {}
    for node in graph:
        owner = module.get_submodule(node.layer) if node.layer else module
        call = _live(node, owner)
        if call is not None:
            found[node.fx_name] = call
    for one in graph.program.graph.nodes:
        if getattr(one.target, "__name__", "").split(".")[0] in _CHECKS:
            found[one.name] = lambda target, args, kwargs: None
    return found


def _live(node: Node, owner: nn.Module) -> Call | None:
    if node.op in _BATCH_NORM:
        return _batch_norm(owner, node.op)
    if node.op in _DROPOUT:
        return lambda target, args, kwargs: target(args[0], args[1], owner.training)
    if node.op in _RECURRENT:
        place = _TRAIN_AT[node.op]
        return lambda target, args, kwargs: target(
            *args[:place], owner.training, *args[place + 1 :], **kwargs
        )
    if node.op == "scaled_dot_product_attention" and isinstance(owner, nn.MultiheadAttention):
        return _attention(owner)
    return None


def _attention(owner: nn.MultiheadAttention) -> Call:
    def call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not owner.training or not owner.dropout:
            return target(*args, **kwargs)
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        rest = {name: value for name, value in kwargs.items() if name not in ("attn_mask", "dropout_p")}
        return target(*args[:3], mask, owner.dropout, *args[5:], **rest)

    return call


def _batch_norm(owner: nn.Module, op: str) -> Call:
    """Statistics of the batch while the owner trains; they move the buffers."""

    def call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not owner.training:
            return target(*args, **kwargs)
        own = list(args)
        x, weight, bias, mean, variance = own[:5]
        momentum, eps = own[6:8] if op == "batch_norm" else own[5:7]
        if mean is None:
            return target(*args, **kwargs)
        counted = getattr(owner, "num_batches_tracked", None)
        if isinstance(counted, Tensor):
            counted.add_(1)
            if getattr(owner, "momentum", momentum) is None:
                momentum = 1.0 / float(counted)
        y = torch.nn.functional.batch_norm(x, mean, variance, weight, bias, True, momentum, eps)
        return y if op == "batch_norm" else (y, mean, variance)

    return call


def leaving(graph: Graph, path: str) -> str | None:
    """The value that a layer or block at this path hands on: its last that is read outside, or returned."""

    def within(node: Node) -> bool:
        return node.layer == path or node.layer.startswith(f"{path}.")

    last = None
    for node in graph:
        if not within(node):
            continue
        for name in node.outputs[:1]:
            if name in graph.outputs or any(not within(reader) for reader in graph.consumers[name]):
                last = name
    return last


def moved(graph: Graph, values: Mapping[str, Any], moves: Collection[str]) -> frozenset[str]:
    """Values on a grid already: an operator that only moves or chooses made them of one on the same grid."""
    return frozenset(
        node.outputs[0]
        for node in graph
        if node.op in moves
        and len(node.inputs) == 1
        and node.outputs[0] in values
        and node.inputs[0] in values
        and values[node.outputs[0]] == values[node.inputs[0]]
    )
