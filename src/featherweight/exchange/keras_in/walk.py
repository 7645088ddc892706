"""Adds a Keras model, or one of its layers, to a builder. Models inside models are taken apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from featherweight.exchange.keras_in.build import Builder, Call, Shape, Unmapped, Value
from featherweight.exchange.keras_in.layers import LAYERS
from featherweight.exchange.keras_in.operations import OPERATIONS
from featherweight.exchange.keras_in.recurrent import bidirectional, recurrent

_RECURRENT = {"LSTM": recurrent, "GRU": recurrent, "SimpleRNN": recurrent, "Bidirectional": bidirectional}
_OURS = "keras"


def emit_model(builder: Builder, model: Any, prefix: str, inputs: Sequence[Value]) -> list[Value]:
    """Add every layer of a functional or sequential model; its outputs.

    Raises:
        Unmapped: A layer has nothing to stand for it; names the layer.
    """
    graph = functional(model)
    if graph is None:
        raise Unmapped(model.name, f"{type(model).__name__} is neither functional nor sequential")
    values = {id(tensor): value for tensor, value in zip(graph.inputs, inputs, strict=True)}
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if type(node.operation).__name__ == "InputLayer":
                continue
            made = _emit_node(builder, node, prefix, values)
            for tensor, value in zip(node.output_tensors, made, strict=True):
                values[id(tensor)] = value
    return [values[id(tensor)] for tensor in graph.outputs]


def functional(model: Any) -> Any:
    """The functional model that a model is or holds; None if it has none."""
    if hasattr(model, "_nodes_by_depth"):
        return model
    inner = getattr(model, "_functional", None)
    return inner if hasattr(inner, "_nodes_by_depth") else None


def _emit_node(builder: Builder, node: Any, prefix: str, values: dict[int, Value]) -> list[Value]:
    args = tuple(_resolved(item, values) for item in node.arguments.args)
    kwargs = {name: _resolved(item, values) for name, item in node.arguments.kwargs.items()}
    inputs = tuple(values[id(tensor)] for tensor in node.input_tensors)
    shapes = tuple(tuple(tensor.shape) for tensor in node.output_tensors)
    path = builder.path(node.operation, prefix)
    return _emit(builder, node.operation, path, inputs, shapes, args, kwargs)


def emit_layer(builder: Builder, layer: Any, path: str, inputs: Sequence[Value]) -> list[Value]:
    """Add a layer that is called inside another one."""
    shape: Any = layer.compute_output_shape(inputs[0].shape)
    several = bool(shape) and isinstance(shape[0], (tuple, list))
    shapes = tuple(tuple(one) for one in shape) if several else (tuple(shape),)
    return _emit(builder, layer, path, tuple(inputs), shapes, tuple(inputs), {})


def _emit(
    builder: Builder,
    operation: Any,
    path: str,
    inputs: tuple[Value, ...],
    shapes: tuple[Shape, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[Value]:
    if functional(operation) is not None:
        return emit_model(builder, operation, path, inputs)
    kind = type(operation).__name__
    call = Call(builder, operation, path, inputs, shapes, args, kwargs)
    if type(operation).__module__.partition(".")[0] != _OURS:
        raise call.refuse("is no layer of Keras")
    from keras import Layer

    if isinstance(operation, Layer):
        emitter: Any = LAYERS.get(kind) or _RECURRENT.get(kind)
    else:
        emitter = OPERATIONS.get(kind)
    if emitter is None:
        raise call.refuse("has no layer of torch to stand for it")
    try:
        made: Value | list[Value] = emitter(call)
    except (AttributeError, KeyError, IndexError, ValueError, RuntimeError, TypeError) as error:
        raise call.refuse(f"could not be taken over: {error}") from error  # another version of Keras
    return made if isinstance(made, list) else [made]


def _resolved(item: Any, values: dict[int, Value]) -> Any:
    """An argument with its Keras tensors as values."""
    if id(item) in values:
        return values[id(item)]
    if isinstance(item, (list, tuple)):
        return type(item)(_resolved(part, values) for part in item)
    if isinstance(item, dict):
        return {key: _resolved(part, values) for key, part in item.items()}
    return item


def layers_of(model: Any) -> Iterable[Any]:
    """Every layer, those of models inside it too."""
    for layer in getattr(model, "layers", ()):
        yield layer
        if functional(layer) is not None:
            yield from layers_of(layer)
