"""Walks a Keras graph and asks ``layers`` for the ordinary layers that stand for it.

Between layers that work on maps a value is held with its channels on axis 1 ('moved'), whatever Keras says;
it is moved where such a layer first meets it and moved back where the order of axes can be seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.exchange.keras_in.module import KerasModel, Step

Shape = tuple[int | None, ...]


class Unmapped(Exception):
    """A layer that has no ordinary layer to stand for it."""

    def __init__(self, layer: str, why: str) -> None:
        super().__init__(f"layer '{layer}': {why}")


@dataclass(frozen=True)
class Value:
    """A value of the graph.

    Attributes:
        number: Of the value when the module runs.
        shape: In Keras' order of axes, batch first; None where it is open.
        moved: The last axis of that order is on axis 1.
        integer: It holds integers.
    """

    number: int
    shape: Shape
    moved: bool = False
    integer: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)

    def axis(self, axis: int) -> int:
        """Where an axis of Keras' order is."""
        axis %= self.rank
        if not self.moved or axis == 0:
            return axis
        return 1 if axis == self.rank - 1 else axis + 1


class Builder:
    """Collects layers and steps."""

    def __init__(self) -> None:
        self.module = KerasModel()
        self._count = 0
        self._made: dict[tuple[str, tuple[int, ...], str], int] = {}
        self._paths: dict[int, str] = {}
        self._taken: set[str] = set()

    def new(self) -> int:
        """The number of a value to come."""
        self._count += 1
        return self._count - 1

    def function(self, name: str, inputs: Sequence[int], **settings: Any) -> int:
        """Add a step with a function; the same one on the same values is added once."""
        key = (name, tuple(inputs), repr(sorted(settings.items())))
        if key not in self._made:
            self._made[key] = self.new()
            self.module.steps.append(Step("", name, tuple(inputs), (self._made[key],), settings))
        return self._made[key]

    def layer(
        self, path: str, make: Callable[[], nn.Module], inputs: Sequence[int], outputs: int = 1
    ) -> list[int]:
        """Add a step with a layer, which is made unless it is there."""
        if path not in self._taken:
            self._taken.add(path)
            self._attach(path, make())
        numbers = [self.new() for _ in range(outputs)]
        self.module.steps.append(Step(path, "", tuple(inputs), tuple(numbers), {}))
        return numbers

    def _attach(self, path: str, layer: nn.Module) -> None:
        parent: nn.Module = self.module
        *folders, name = path.split(".")
        for folder in folders:
            if folder not in dict(parent.named_children()):
                parent.add_module(folder, nn.Module())
            parent = parent.get_submodule(folder)
        parent.add_module(name, layer)

    def path(self, operation: Any, prefix: str) -> str:
        """Where the layers of a Keras layer go: its own name, as an attribute may be called."""
        if id(operation) not in self._paths:
            name = re.sub(r"\W", "_", operation.name) or "layer"
            if not prefix and hasattr(KerasModel, name):
                name += "_"
            path = f"{prefix}.{name}" if prefix else name
            known = set(self._paths.values())
            while path in known:
                path += "_"
            self._paths[id(operation)] = path
        return self._paths[id(operation)]

    def moved(self, value: Value) -> Value:
        """The value with its channels on axis 1."""
        if value.moved or value.rank < 3:
            return value
        dims = (0, value.rank - 1, *range(1, value.rank - 1))
        return replace(value, number=self._permuted(value, dims), moved=True)

    def plain(self, value: Value) -> Value:
        """The value in Keras' order."""
        if not value.moved:
            return value
        dims = (0, *range(2, value.rank), 1)
        return replace(value, number=self._permuted(value, dims), moved=False)

    def _permuted(self, value: Value, dims: tuple[int, ...]) -> int:
        """A permutation, or the value that it would undo."""
        for step in self.module.steps:
            if step.function == "permute" and step.outputs == (value.number,):
                before = step.settings["dims"]
                if tuple(before[i] for i in dims) == tuple(range(len(dims))):
                    return step.inputs[0]
        return self.function("permute", (value.number,), dims=dims)

    def floating(self, value: Value) -> Value:
        if not value.integer:
            return value
        return replace(value, number=self.function("float", (value.number,)), integer=False)


@dataclass(frozen=True)
class Call:
    """One call of a Keras layer or operation, to be added to the builder.

    Attributes:
        builder: Collects it.
        layer: The Keras layer.
        path: Where its layers go.
        inputs: Its tensors.
        shapes: Of its outputs, in Keras' order.
        args: Its positional arguments, tensors as ``Value``.
        kwargs: Its keyword arguments, tensors as ``Value``.
    """

    builder: Builder
    layer: Any
    path: str
    inputs: tuple[Value, ...]
    shapes: tuple[Shape, ...]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None

    def refuse(self, why: str) -> Unmapped:
        return Unmapped(self.layer.name, f"{type(self.layer).__name__} {why}")

    def the(self, name: str, default: Any = None) -> Any:
        """A keyword argument."""
        return (self.kwargs or {}).get(name, default)

    def moved(self, index: int = 0) -> Value:
        return self.builder.moved(self.builder.floating(self.inputs[index]))

    def plain(self, index: int = 0) -> Value:
        return self.builder.plain(self.builder.floating(self.inputs[index]))

    def result(self, number: int, moved: bool = False, index: int = 0) -> Value:
        return Value(number, self.shapes[index], moved and len(self.shapes[index]) > 2)

    def apply(self, make: Callable[[], nn.Module], value: Value, suffix: str = "") -> Value:
        """A layer with one input and one output of the same order of axes."""
        (number,) = self.builder.layer(self.path + suffix, make, (value.number,))
        return self.result(number, value.moved)

    def function(self, name: str, *values: Value, **settings: Any) -> Value:
        """A function whose result has the order of axes of its first value."""
        number = self.builder.function(name, [value.number for value in values], **settings)
        return self.result(number, values[0].moved)


def array(variable: Any) -> Tensor:
    """A Keras variable (or array) as a float tensor of its own."""
    value = getattr(variable, "value", variable)
    if isinstance(value, Tensor):
        return value.detach().cpu().to(torch.float32).clone()
    return torch.as_tensor(value, dtype=torch.float32).clone()


def fill(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """The layer with these values in its parameters and buffers."""
    state = layer.state_dict()
    for name, value in tensors.items():
        if value is not None:
            if state[name].shape != value.shape:
                raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(state[name].shape)}")
            state[name].copy_(value)
    return layer
