"""Whether data fits a model: shapes and dtypes of inputs, range of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from featherweight.errors import DataError
from featherweight.examples import Cast, Examples

if TYPE_CHECKING:
    from featherweight.data import Data

    D = TypeVar("D", bound=Data)

Shape = tuple[int | str | None, ...]


def check_labels(data: Data, classes: int) -> None:
    """Refuse labels outside 0..classes-1, when the metric counts classes.

    Raises:
        DataError: Names the array, the first such label, and how many there are.
    """
    if not data.has_metric or not data.metric.classes:
        return
    for examples, name in ((data.scored, "y"), (data.train, "y_train")):
        labels = None if examples is None else examples.targets
        if labels is None or labels.dtype.kind not in "iu":
            continue
        bad = (labels < 0) | (labels >= classes)
        if not bad.any():
            continue
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        fix = f"give labels within 0..{classes - 1}, or a model with more classes"
        if labels.min() == 1 and labels.max() == classes:
            fix = f"labels start at 1: {name} = {name} - 1"
        raise DataError(
            f"label {labels[first]} is outside 0..{classes - 1}: the model has {classes} classes",
            where=f"{name}[{', '.join(map(str, first))}], and {int(bad.sum()) - 1} more",
            fix=fix,
        )


def check_inputs(data: D, inputs: Sequence[tuple[Shape, Any]]) -> D:
    """The data, in the dtypes of the model's inputs.

    Floats are cast to other floats and integers to other integers, with a note; nothing else is cast.

    Args:
        data: What was loaded.
        inputs: Shape of one example (no batch axis; None, -1 or a name where any size goes) and dtype
            of every input of the model.

    Raises:
        DataError: Number, shape or dtype of inputs differ; shows both and how to correct it.
    """
    from featherweight.streams import Stream

    wanted = [(tuple(shape), np.dtype(dtype)) for shape, dtype in inputs]
    notes: list[str] = []
    scored = None if data.scored is None else _fitted(data.scored, wanted, "x", notes)
    train = None if data.train is None else _fitted(data.train, wanted, "x_train", notes)
    calibration = data.calibration_examples
    if isinstance(calibration, Stream):
        batch = next(calibration.batches(1, 1))
        for note in _compared([(a.shape[1:], a.dtype) for a in batch], wanted, "calibration"):
            notes.append(note)
        calibration = calibration.cast(tuple(dtype for _, dtype in wanted))
    elif calibration is not None:
        calibration = _fitted(calibration, wanted, "x_calibration", notes)
    return data.evolve(scored=scored, train=train, calibration=calibration, notes=notes)


def _fitted(
    examples: Examples, wanted: list[tuple[Shape, np.dtype[Any]]], name: str, notes: list[str]
) -> Examples:
    given = [(source.shape, source.dtype) for source in examples.inputs]
    notes.extend(_compared(given, wanted, name))
    sources = tuple(
        source if source.dtype == dtype else Cast(source, dtype)
        for source, (_, dtype) in zip(examples.inputs, wanted, strict=True)
    )
    return Examples(sources, examples.targets)


def _compared(
    given: list[tuple[tuple[int, ...], np.dtype[Any]]], wanted: list[tuple[Shape, np.dtype[Any]]], name: str
) -> list[str]:
    """Notes of what will be cast.

    Raises:
        DataError: Something does not fit.
    """
    if len(given) != len(wanted):
        raise DataError(
            f"the model takes {len(wanted)} input{'s' * (len(wanted) > 1)}, and {name} gives {len(given)}",
            fix="name the arrays " + ", ".join(f"{name}{i}" for i in range(len(wanted)))
            if len(wanted) > 1
            else f"one array {name}",
        )
    notes = []
    for i, ((shape, dtype), (shape_wanted, dtype_wanted)) in enumerate(zip(given, wanted, strict=True)):
        one = name if len(given) == 1 else f"{name}{i}"
        if not _matches(shape, shape_wanted):
            raise DataError(
                f"an example of {one} has shape {_text(shape)}, and the model takes {_text(shape_wanted)}",
                fix=_reshaped(one, shape, shape_wanted),
            )
        if dtype == dtype_wanted:
            continue
        same = dtype.kind == dtype_wanted.kind or (dtype.kind in "iu" and dtype_wanted.kind in "iu")
        if not same:
            fix = f"{one} = {one}.astype('{dtype_wanted}')"
            if dtype == np.uint8 and dtype_wanted.kind == "f":
                fix += " / 255, and normalised as in training"
            raise DataError(f"{one} is {dtype}, and the model takes {dtype_wanted}", fix=fix)
        notes.append(f"{one} is {dtype} and is cast to the model's {dtype_wanted}")
    return notes


def _matches(shape: tuple[int, ...], wanted: Shape) -> bool:
    if len(shape) != len(wanted):
        return False
    return all(not isinstance(w, int) or w < 0 or s == w for s, w in zip(shape, wanted, strict=True))


def _reshaped(name: str, shape: tuple[int, ...], wanted: Shape) -> str:
    """The line that makes one shape of the other, where it is plain."""
    if len(shape) >= 2 and len(shape) == len(wanted) and _matches((shape[-1], *shape[:-1]), wanted):
        return f"channels come first: {name} = np.moveaxis({name}, -1, 1)"
    if len(wanted) == len(shape) + 1 and _matches((1, *shape), wanted):
        return f"{name} = {name}[:, None]"
    if len(shape) == len(wanted) + 1 and shape[0] == 1 and _matches(shape[1:], wanted):
        return f"{name} = {name}[:, 0]"
    sizes = [size for size in wanted if isinstance(size, int) and size >= 0]
    if len(sizes) == len(wanted) and np.prod(sizes) == np.prod(shape):
        return f"{name} = {name}.reshape(-1, {', '.join(map(str, sizes))})"
    return f"give {name} of shape (N, {_text(wanted)[1:]}".replace(", )", ",)")


def _text(shape: Sequence[object]) -> str:
    sizes = ["any" if size is None or size == -1 else str(size) for size in shape]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"
