"""What an operator's entry sees (a node) and what it answers (a call)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto
from torch import Tensor, nn

from featherweight.errors import LoadError
from featherweight.exchange.onnx_in import host
from featherweight.exchange.onnx_in.read import array_of

LARGEST = 1 << 28  # elements of a tensor that a file may ask for by numbers alone


class UnsupportedError(Exception):
    """A form of an operator that is not read; the importer adds the node to the message."""


class AbsurdError(UnsupportedError):
    """A node asks for more memory than any model needs: nothing may run it."""


@dataclass(frozen=True)
class Weight:
    """A tensor of a layer, filled from a constant input.

    Attributes:
        name: The parameter or buffer of the layer.
        input: Position of the ONNX input.
        change: 'as it is' or what ``apply`` does, by which tied weights are recognised.
        apply: ONNX's layout -> torch's.
    """

    name: str
    input: int
    change: str = "as it is"
    apply: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Call:
    """How a node is run.

    Attributes:
        run: A layer, which becomes a named sub-module, or a function.
        inputs: Positions of the ONNX inputs that are passed, in this order; an absent one is passed as None.
        weights: Constant inputs that become the layer's tensors.
        sizes: Positions of inputs that are shapes, axes or counts: given as host numbers, never as tensors.
        host: The function computes on host numbers (see ``host.py``) as well as on tensors.
        before: Applied to the first input (padding that a layer cannot do itself).
        after: Applied to the result (cropping).
    """

    run: nn.Module | Callable[..., Any]
    inputs: tuple[int, ...] = (0,)
    weights: tuple[Weight, ...] = ()
    sizes: frozenset[int] = frozenset()
    host: bool = False
    before: Callable[[Tensor], Tensor] | None = None
    after: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Node:
    """One node of the graph, with what is known about its inputs.

    Attributes:
        op: Operator type.
        name: For messages.
        opset: Version of its domain.
        inputs: Names; '' is an absent one.
        outputs: Names; '' is one that nobody reads.
        attributes: As in the file.
        constants: Values known at import, by name.
        examples: Values at the example inputs, by name: tensors or host numbers.
        declared: Types of the graph's inputs, which a tensor may only carry (int4 in int8).
    """

    op: str
    name: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, AttributeProto]
    constants: Mapping[str, np.ndarray]
    examples: Mapping[str, Any]
    declared: Mapping[str, np.dtype] = field(default_factory=dict)

    def has(self, index: int) -> bool:
        """Whether the optional input is given."""
        return index < len(self.inputs) and self.inputs[index] != ""

    def constant(self, index: int) -> np.ndarray | None:
        """The value of an input that is known at import."""
        return self.constants.get(self.inputs[index]) if self.has(index) else None

    def fixed(self, index: int, what: str) -> np.ndarray:
        """The value of an input that must be known at import."""
        value = self.constant(index)
        if value is None:
            raise UnsupportedError(
                f"its {what} is computed while it runs" if self.has(index) else f"it has no {what}"
            )
        return value

    def all_fixed(self, *indices: int) -> bool:
        """Whether these inputs are known at import, or absent."""
        return all(not self.has(i) or self.constant(i) is not None for i in indices)

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """Shape of an input at the example inputs."""
        if not self.has(index):
            raise UnsupportedError(f"it has no input {index}")
        value = self.constant(index)
        found = self.examples[self.inputs[index]] if value is None else value
        return tuple(int(size) for size in found.shape)

    def rank(self, index: int = 0) -> int:
        return len(self.shape(index))

    def is_float(self, index: int = 0) -> bool:
        """Whether an input is a tensor (not host numbers) of floating point."""
        value = self.constant(index)
        if value is not None:
            return value.dtype.kind == "f" or value.dtype.name == "bfloat16"
        example = self.examples[self.inputs[index]]
        return isinstance(example, Tensor) and example.is_floating_point()

    def dtype(self, index: int = 0) -> np.dtype:
        """Type of an input as the file has it."""
        value = self.constant(index)
        if value is None:
            name = self.inputs[index]
            if name in self.declared:
                return self.declared[name]
            value = self.examples[name]
            if isinstance(value, Tensor):
                return host.array_of(value[(0,) * value.dim()] if value.numel() else value).dtype
        return np.dtype(np.int64) if value.dtype == object else value.dtype

    def tensor_dtype(self, index: int = 0) -> torch.dtype:
        """Type of the tensor that an input arrives as."""
        return host.torch_dtype(self.dtype(index))

    def axis(self, default: int, index: int = 0) -> int:
        """The attribute 'axis', not negative."""
        axis, rank = self.integer("axis", default), self.rank(index)
        if not -rank <= axis < max(rank, 1):
            raise UnsupportedError(f"axis {axis} is outside a rank of {rank}")
        return axis % rank if rank else 0

    def integer(self, name: str, default: int) -> int:
        return int(self._get(name, AttributeProto.INT, default))

    def number(self, name: str, default: float) -> float:
        return float(self._get(name, AttributeProto.FLOAT, default))

    def text(self, name: str, default: str) -> str:
        value = self._get(name, AttributeProto.STRING, default)
        return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

    def integers(self, name: str) -> tuple[int, ...] | None:
        value = self._get(name, AttributeProto.INTS, None)
        return None if value is None else tuple(int(item) for item in value)

    def numbers(self, name: str) -> tuple[float, ...] | None:
        value = self._get(name, AttributeProto.FLOATS, None)
        return None if value is None else tuple(float(item) for item in value)

    def tensor(self, name: str) -> np.ndarray | None:
        value = self._get(name, AttributeProto.TENSOR, None)
        return None if value is None else array_of(value, self.name)

    def _get(self, name: str, kind: int, default: Any) -> Any:
        attribute = self.attributes.get(name)
        if attribute is None:
            return default
        if attribute.type != kind:
            raise UnsupportedError(f"its attribute '{name}' has another type than the operator's")
        return onnx.helper.get_attribute_value(attribute)


Entry = Callable[[Node], Call]


def check_size(shape: Sequence[Any]) -> None:
    """Refuse a shape that no model needs, before memory is taken for it."""
    if all(isinstance(size, int) for size in shape) and math.prod(shape) > LARGEST:
        raise AbsurdError(f"it makes a tensor of shape {tuple(shape)}")


def blank(kind: type[nn.Module], *args: Any, **settings: Any) -> nn.Module:
    """A layer without values; the importer fills in its weights."""
    with torch.device("meta"):
        return kind(*args, **settings)


def by_rank(kinds: Mapping[int, type[nn.Module]], rank: int) -> type[nn.Module]:
    """The layer for tensors of this rank."""
    if rank not in kinds:
        raise UnsupportedError(f"it works on {rank}-dimensional tensors")
    return kinds[rank]


def refused(node: Node, reason: str, source: str) -> LoadError:
    """The error about one node."""
    return LoadError(
        f"operator {node.op} of '{source}' cannot be imported: {reason}",
        where=f"node '{node.name}'",
        fix="export it in another way (opset, constant shapes), or give path.py:callable with --weights",
    )
