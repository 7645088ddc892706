"""The module that an ONNX graph becomes: its layers as sub-modules, its nodes run in order."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from featherweight.exchange.onnx_in import host


@dataclass(frozen=True)
class Ref:
    """Where an argument comes from.

    Attributes:
        kind: 'value' of an earlier step, 'tensor' of the module, 'host' numbers, or 'none'.
        name: Of the value, or path of the tensor.
        turn: A value that is of the other sort: 'tensor' or 'sizes' is what the step wants.
        number: The host numbers.
    """

    kind: Literal["value", "tensor", "host", "none"]
    name: str = ""
    turn: Literal["", "tensor", "sizes"] = ""
    number: np.ndarray | None = None


@dataclass(frozen=True)
class Step:
    """One node: a layer by its path, or a function.

    Attributes:
        op: ONNX operator, for messages.
        name: The node's name, for messages.
        layer: Path of the sub-module; '' when it is a function.
        function: What to call; None when it is a layer.
        arguments: In order.
        outputs: Names of the results; '' where nobody reads one.
        before: Applied to the first argument.
        after: Applied to the result.
        last: Values that no later step reads.
    """

    op: str
    name: str
    layer: str
    function: Callable[..., Any] | None
    arguments: tuple[Ref, ...]
    outputs: tuple[str, ...]
    before: Callable[[Tensor], Tensor] | None = None
    after: Callable[[Tensor], Tensor] | None = None
    last: tuple[str, ...] = ()


class Scope(nn.Module):
    """A dotted name's inner part: holds layers and tensors, is never called."""


class Imported(nn.Module):
    """An ONNX graph as ordinary layers: trainable, exportable, copied by ``copy.deepcopy``.

    Args:
        inputs: Names of the graph's inputs.
        outputs: Where its outputs come from.
    """

    def __init__(self, inputs: Sequence[str], outputs: Sequence[Ref] = ()) -> None:
        super().__init__()
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._steps: tuple[Step, ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """What forward does, in order."""
        return self._steps

    def complete(self, steps: Sequence[Step], outputs: Sequence[Ref]) -> None:
        """Set what forward does; the importer calls it once, when all layers are there."""
        self._steps, self._outputs = tuple(steps), tuple(outputs)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        values: dict[str, Any] = dict(zip(self._inputs, inputs, strict=True))
        for step in self._steps:
            self.run(step, values)
            for name in step.last:
                del values[name]
        results = tuple(self.fetch(ref, values) for ref in self._outputs)
        return results[0] if len(results) == 1 else results

    def run(self, step: Step, values: dict[str, Any]) -> None:
        """Run one step, adding its results to ``values``."""
        arguments = [self.fetch(ref, values) for ref in step.arguments]
        if step.before is not None:
            arguments[0] = step.before(arguments[0])
        called = self.get_submodule(step.layer) if step.function is None else step.function
        result = called(*arguments)
        if step.after is not None:
            result = step.after(result)
        results = result if isinstance(result, tuple) else (result,)
        for name, value in zip(step.outputs, results, strict=False):
            if name:  # NumPy makes numbers of arrays without axes
                values[name] = np.asarray(value) if isinstance(value, np.generic) else value

    def fetch(self, ref: Ref, values: Mapping[str, Any]) -> Any:
        """An argument's value."""
        if ref.kind == "none":
            return None
        if ref.kind == "host":
            return ref.number
        if ref.kind == "tensor":
            scope, _, name = ref.name.rpartition(".")
            return getattr(self.get_submodule(scope), name)
        value = values[ref.name]
        if ref.turn == "tensor" and isinstance(value, np.ndarray):
            return host.to_tensor(value)
        if ref.turn == "sizes" and isinstance(value, Tensor):
            return host.array_of(value)
        return value


def imported_class(inputs: Sequence[str]) -> type[Imported]:
    """``Imported`` whose forward has one parameter per input.

    torch.export matches dynamic shapes with the parameters of forward and cannot do so for ``*inputs``.
    """

    def forward(self: Imported, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return Imported.forward(self, *inputs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ["self", *(f"input_{index}" for index, _ in enumerate(inputs))]
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return type("Imported", (Imported,), {"forward": forward, "__module__": __name__})
