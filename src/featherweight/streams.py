"""Calibration inputs that a user's function yields: read batch by batch, never held whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from featherweight.errors import DataError
from featherweight.examples import ArraySource, as_source, cast
from featherweight.usercode import call_user, defined_at, user_code

_FINGERPRINTED = 64  # examples of a stream that count for its fingerprint
_FORM = "yield batches: an array, or a tuple of arrays, examples on the first axis"


@dataclass(frozen=True, eq=False)
class Stream:
    """Batches of inputs from a function that is called anew for each pass.

    Attributes:
        function: Takes nothing, gives an iterable of batches: an array, or a tuple of arrays for
            several inputs, examples on the first axis.
        dtypes: What inputs are cast to; None: as they come.
    """

    function: Callable[[], Iterable[Any]]
    dtypes: tuple[np.dtype[Any], ...] | None = None

    @staticmethod
    def suits(value: object) -> bool:
        """Whether a value is to be iterated, rather than being examples itself."""
        if value is None or isinstance(value, (np.ndarray, list, tuple)) or hasattr(value, "__array__"):
            return False
        return callable(value) or (hasattr(value, "__iter__") and not isinstance(value, ArraySource))

    @classmethod
    def of(cls, value: Any) -> Stream:
        """A stream of a function, or of an object that can be iterated again, such as a data loader.

        Raises:
            DataError: It is a generator, which can be read only once.
        """
        if callable(value):
            return cls(value)
        if iter(value) is value:
            raise DataError(
                f"calibration is a {type(value).__name__}, which can be read only once",
                fix="give the function that makes it, without calling it",
            )
        return cls(value.__iter__)

    def cast(self, dtypes: tuple[np.dtype[Any], ...]) -> Stream:
        """The same stream in other dtypes, one per input."""
        return replace(self, dtypes=dtypes)

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[np.ndarray, ...]]:
        """Batches of ``size`` examples (the last one less), at most ``limit`` examples.

        Raises:
            DataError: The function raises, yields nothing, or yields what is no batch of finite numbers.
        """
        held: list[tuple[np.ndarray, ...]] = []
        count = 0
        for inputs in self._limited(limit):
            held.append(inputs)
            count += len(inputs[0])
            if count >= size:
                joined, whole = _join(held), count - count % size
                for start in range(0, whole, size):
                    yield tuple(array[start : start + size] for array in joined)
                held, count = [tuple(array[whole:] for array in joined)], count - whole
        if count:
            yield _join(held)

    def hash_into(self, digest: hashlib._Hash) -> None:
        """Add the function's name and the first examples to a digest."""
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        digest.update(f"{getattr(self.function, '__module__', '')}.{name}".encode())
        for batch in self.batches(_FINGERPRINTED, _FINGERPRINTED):
            for array in batch:
                digest.update(repr((array.shape, array.dtype.str)).encode())
                digest.update(np.ascontiguousarray(array).tobytes())

    def _limited(self, limit: int | None) -> Iterator[tuple[np.ndarray, ...]]:
        """Checked batches as they come, up to ``limit`` examples."""
        first: tuple[np.ndarray, ...] | None = None
        left = limit
        for number, batch in enumerate(self._read()):
            inputs = self._checked(batch, number, first)
            first = tuple(array[:1] for array in inputs) if first is None else first
            yield inputs if left is None else tuple(array[:left] for array in inputs)
            left = None if left is None else left - len(inputs[0])
            if left is not None and left <= 0:
                return
        if first is None:
            raise DataError(
                "the calibration function yields nothing", where=defined_at(self.function), fix=_FORM
            )

    def _read(self) -> Iterator[Any]:
        """What the function yields, with its exceptions shown at the user's line."""
        iterable = call_user(self.function, error=DataError)
        if not hasattr(iterable, "__iter__"):
            raise DataError(
                f"the calibration function returned {type(iterable).__name__}, not an iterator",
                where=defined_at(self.function),
                fix=_FORM,
            )
        iterator = iter(iterable)
        while True:
            with user_code(self.function, DataError):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    def _checked(
        self, batch: Any, number: int, like: tuple[np.ndarray, ...] | None
    ) -> tuple[np.ndarray, ...]:
        given = batch if isinstance(batch, (tuple, list)) else (batch,)
        where = f"batch {number} of the calibration function"
        try:
            sources = [as_source(one, "its array") for one in given]
        except DataError as exc:
            exc.where = f"{where}, {exc.where}" if exc.where else where
            raise
        inputs = tuple(source.take(np.arange(len(source))) for source in sources)
        if len({len(array) for array in inputs}) != 1:
            lengths = ", ".join(str(array.shape) for array in inputs)
            raise DataError(
                f"its arrays differ in their number of examples: {lengths}", where=where, fix=_FORM
            )
        if self.dtypes is not None and len(self.dtypes) == len(inputs):
            inputs = tuple(cast(array, dtype) for array, dtype in zip(inputs, self.dtypes, strict=True))
        if like is not None and [a.shape[1:] for a in like] != [a.shape[1:] for a in inputs]:
            shapes = " and ".join(str(tuple(a.shape[1:] for a in one)) for one in (like, inputs))
            raise DataError(f"the shape of an example changes: {shapes}", where=where, fix=_FORM)
        return inputs


def _join(batches: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    if len(batches) == 1:
        return batches[0]
    return tuple(np.concatenate(arrays) for arrays in zip(*batches, strict=True))
