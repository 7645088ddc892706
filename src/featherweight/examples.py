"""Examples: sources of arrays that are read when they are needed, and the targets beside them.

A source knows the shape and dtype of one example and takes any examples by index, so that arrays,
memory maps, image files and casts look the same. Row digests make the content comparable: they
give the fingerprint and find examples that are both scored and trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np

from featherweight.errors import DataError

_NUMBERS = "fiub"  # numpy kinds: float, int, unsigned, bool
_ROWS = 1024  # examples that a check holds at once


@runtime_checkable
class ArraySource(Protocol):
    """One input of many examples."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example, without the batch axis."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def digests(self) -> Sequence[bytes]:
        """A digest of the content of each example."""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> np.ndarray:
        """These examples, in this order: (len(indices), *shape)."""
        ...


@dataclass(frozen=True, eq=False)
class Arrays:
    """Examples along the first axis of an array or memory map."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    @cached_property
    def digests(self) -> Sequence[bytes]:
        return [_digest(np.ascontiguousarray(row).tobytes()) for row in self.array]

    def __len__(self) -> int:
        return len(self.array)

    def take(self, indices: np.ndarray) -> np.ndarray:
        taken: np.ndarray = self.array[indices]
        return taken


@dataclass(frozen=True, eq=False)
class RandomArrays:
    """Standard normal floats; of integers 0..255 for uint8, else 0 and 1, which no embedding lacks."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    count: int
    seed: int
    stream: int = 0

    @property
    def digests(self) -> Sequence[bytes]:
        about = (self.shape, self.dtype.str, self.seed, self.stream)
        return [_digest(repr((about, i)).encode()) for i in range(self.count)]

    def __len__(self) -> int:
        return self.count

    def take(self, indices: np.ndarray) -> np.ndarray:
        taken = np.empty((len(indices), *self.shape), self.dtype)
        for row, index in enumerate(indices):
            rng = np.random.default_rng((self.seed, self.stream, int(index)))
            if self.dtype.kind == "f":
                taken[row] = rng.standard_normal(self.shape)
            else:
                taken[row] = rng.integers(0, 256 if self.dtype == np.uint8 else 2, self.shape)
        return taken


@dataclass(frozen=True, eq=False)
class Cast:
    """Another source in another dtype."""

    source: ArraySource
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def digests(self) -> Sequence[bytes]:
        return self.source.digests

    def __len__(self) -> int:
        return len(self.source)

    def take(self, indices: np.ndarray) -> np.ndarray:
        return cast(self.source.take(indices), self.dtype)


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and targets of the same examples.

    Attributes:
        inputs: One source for each of the model's inputs.
        targets: Labels, values or strings (N, ...); None without labels.
    """

    inputs: tuple[ArraySource, ...]
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.inputs[0])

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        """Every input of these examples."""
        return tuple(source.take(indices) for source in self.inputs)

    @cached_property
    def digests(self) -> Sequence[bytes]:
        """A digest of all inputs of each example; targets do not count."""
        if len(self.inputs) == 1:
            return self.inputs[0].digests
        return [b"".join(row) for row in zip(*(source.digests for source in self.inputs), strict=True)]

    def hash_into(self, digest: hashlib._Hash) -> None:
        """Add shapes, dtypes, inputs and targets to a digest."""
        for source in self.inputs:
            digest.update(repr((source.shape, source.dtype.str, len(source))).encode())
            for row in source.digests:
                digest.update(row)
        if self.targets is not None:
            digest.update(repr((self.targets.shape, self.targets.dtype.str)).encode())
            digest.update(np.ascontiguousarray(self.targets).tobytes())


def make_examples(inputs: object, targets: object, x: str, y: str) -> Examples:
    """Checked examples of what a user gave: an array, a source, or a tuple of them for several inputs.

    Args:
        inputs: Array-like or source, or a tuple of them.
        targets: Array-like or None.
        x: What the inputs are called in errors; several are x0, x1, ...
        y: What the targets are called in errors.

    Raises:
        DataError: A dtype, a length or a value does not fit.
    """
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    names = [f"{x}{i}" for i in range(len(given))] if len(given) > 1 else [x]
    if not given:
        raise DataError(f"{x} is an empty tuple", fix="give an array for each of the model's inputs")
    sources = tuple(as_source(one, name) for one, name in zip(given, names, strict=True))
    examples = Examples(sources, None if targets is None else _checked_targets(targets, y))
    lengths = [(name, len(source)) for name, source in zip(names, sources, strict=True)]
    if examples.targets is not None:
        lengths.append((y, len(examples.targets)))
    for name, length in lengths[1:]:
        if length != lengths[0][1]:
            raise DataError(
                f"{lengths[0][0]} has {lengths[0][1]} examples and {name} has {length}",
                fix="give the same examples, in the same order, in both",
            )
    return examples


def as_source(value: object, name: str) -> ArraySource:
    """A checked source of an array-like, or the source itself.

    Raises:
        DataError: Not numbers, no examples, or a value that is not finite.
    """
    if not isinstance(value, np.ndarray) and isinstance(value, ArraySource):
        if not len(value):
            raise DataError(f"{name} has no examples", fix="give at least one")
        return value
    array = as_array(value, name)
    if array.dtype.kind not in _NUMBERS:
        raise DataError(
            f"{name} holds {_kind(array.dtype)}, not numbers", fix=f"give {name} as numbers, such as float32"
        )
    if array.ndim == 0 or not len(array):
        raise DataError(f"{name} has no examples: its shape is {array.shape}", fix="give at least one")
    check_finite(array, name)
    return Arrays(array)


def as_array(value: object, name: str) -> np.ndarray:
    """An array of an array-like, e.g. a list or a torch tensor.

    Raises:
        DataError: It cannot be one.
    """
    detach = getattr(value, "detach", None)  # a torch tensor; torch itself is not needed for it
    try:
        return np.asarray(value if detach is None else detach().cpu())
    except (TypeError, ValueError) as exc:
        raise DataError(
            f"{name} is of type {type(value).__name__} and cannot become an array: {exc}",
            fix="give a numpy array, examples first",
        ) from exc


def check_finite(array: np.ndarray, name: str) -> None:
    """Refuse NaN and infinities; integers pass.

    Raises:
        DataError: Names the array, how many there are, and the first one's index.
    """
    if array.dtype.kind != "f":
        return
    nans = infinities = 0
    first: tuple[int, ...] | None = None
    for start in range(0, len(array), _ROWS):
        part = array[start : start + _ROWS]
        bad = ~np.isfinite(part)
        if not bad.any():
            continue
        if first is None:
            at = np.unravel_index(int(bad.argmax()), bad.shape)
            first = (start + int(at[0]), *(int(i) for i in at[1:]))
        nans += int(np.isnan(part).sum())
        infinities += int(np.isinf(part).sum())
    if first is not None:
        counts = [f"{n} {what}" for n, what in ((nans, "NaN"), (infinities, "infinite")) if n]
        raise DataError(
            f"{name} has {' and '.join(counts)} value{'s' if nans + infinities > 1 else ''}",
            where=f"{name}[{', '.join(map(str, first))}]" + (" first" if nans + infinities > 1 else ""),
            fix="repair or leave out those examples",
        )


def cast(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """The array in a dtype of the same kind.

    Raises:
        DataError: An integer does not fit into it.
    """
    if dtype.kind in "iu" and array.size and array.dtype != dtype:
        limits, low, high = np.iinfo(dtype), int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            raise DataError(
                f"an input holds {low if low < limits.min else high}, which does not fit the model's {dtype}",
                fix=f"give values within {limits.min}..{limits.max}",
            )
    return array.astype(dtype, copy=False)


def _checked_targets(targets: object, name: str) -> np.ndarray:
    array = as_array(targets, name)
    if array.dtype.kind not in _NUMBERS + "U":
        raise DataError(
            f"{name} holds {_kind(array.dtype)}, not labels",
            fix=f"{name} = {name}.astype('int64') for classes, 'float32' for values, str for texts",
        )
    if array.ndim == 0:
        raise DataError(f"{name} is a single value", fix="give one target for each example")
    check_finite(array, name)
    return array


def _kind(dtype: np.dtype[Any]) -> str:
    names = {"O": "Python objects", "U": "strings", "S": "bytes", "c": "complex numbers", "M": "dates"}
    return names.get(dtype.kind, str(dtype))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
