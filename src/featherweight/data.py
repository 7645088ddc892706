"""Data: the examples that calibrate, train and score a model, and the metric that scores it.

Scored examples are never calibrated or trained on: calibration takes its own examples, else training
examples, else random inputs with a warning.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from featherweight.checks import check_inputs, check_labels
from featherweight.errors import DataError
from featherweight.examples import ArraySource, Examples, RandomArrays, make_examples
from featherweight.images import ImageSettings, read_folder
from featherweight.metrics import Metric, Outputs, Targets, UserScore, find_metric
from featherweight.npz import ROLES, read_npz
from featherweight.streams import Stream
from featherweight.usercode import call_user, defined_at, load_callable

__all__ = [
    "ArraySource",
    "Data",
    "Examples",
    "Run",
    "check_inputs",
    "check_labels",
    "load_data",
    "random_data",
    "resolve_metric",
]

Run = Callable[..., Outputs]
CalibrationSource = Literal["calibration", "training", "random", "none"]
Given = np.ndarray | Sequence[Any] | ArraySource | tuple[Any, ...]

_RANDOM_CALIBRATION = 128  # random examples, when no number is asked for


class Data:
    """Examples and how they are scored. Make one with ``Data.of``; override ``score`` for a task of your own.

    Attributes:
        scored: Examples that measure quality.
        train: Examples that a method may train on.
        class_names: One per class, in the order of labels.
        origin: Where the data came from, as JSON: kind, file, image settings.
        batch_size: Examples of one call.
        decode: Turns outputs into strings, for text metrics.
        loss: ``loss(outputs, targets)`` -> a scalar tensor, for training.
        augment: ``augment(inputs, rng)`` -> inputs, changed copies of a batch of training inputs.
    """

    def __init__(
        self,
        *,
        scored: Examples | None = None,
        train: Examples | None = None,
        calibration: Examples | Stream | None = None,
        metric: str | Metric | UserScore | None = None,
        class_names: Sequence[str] | None = None,
        decode: Callable[[Any], Sequence[str]] | None = None,
        loss: Callable[[Any, Any], Any] | None = None,
        augment: Callable[[Any, np.random.Generator], Any] | None = None,
        batch_size: int = 32,
        origin: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        if batch_size < 1:
            raise DataError(f"a batch of {batch_size} examples is none", fix="batch_size=32")
        self.scored = scored
        self.train = train
        self.class_names = None if class_names is None else tuple(str(name) for name in class_names)
        self.decode = decode
        self.loss = loss
        self.augment = augment
        self.batch_size = batch_size
        self.origin: dict[str, Any] = dict(origin or {"kind": "arrays"})
        self._calibration = calibration
        self._notes = tuple(notes)
        self._metric = _default_metric(scored) if metric is None else find_metric(metric)
        self._check_targets()

    @classmethod
    def of(
        cls,
        x: Given | None = None,
        y: Given | None = None,
        *,
        x_train: Given | None = None,
        y_train: Given | None = None,
        calibration: Given | Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
        metric: str | Metric | UserScore | None = None,
        class_names: Sequence[str] | None = None,
        decode: Callable[[Any], Sequence[str]] | None = None,
        loss: Callable[[Any, Any], Any] | None = None,
        augment: Callable[[Any, np.random.Generator], Any] | None = None,
        batch_size: int = 32,
        origin: Mapping[str, Any] | None = None,
    ) -> Self:
        """Data of arrays, examples along the first axis; a tuple of arrays for a model of several inputs.

        Args:
            x: Scored inputs.
            y: Their targets: integer classes, values, strings, or None.
            x_train: Training inputs, not among ``x``.
            y_train: Their targets.
            calibration: Inputs as arrays, or a function without arguments that gives an iterator over
                batches (arrays or tuples of arrays, examples first); it is called anew for each pass.
            metric: A name, a ``Metric``, or ``function(outputs, targets)`` -> scores (N,). By default
                accuracy for integer targets, mse for others, agreement or sqnr without.
            class_names: One per class.
            decode: Turns outputs into a list of strings, for wer and cer.
            loss: ``loss(outputs, targets)`` for training: tensors; a tuple where there are several outputs.
            augment: ``augment(inputs, rng)`` gives changed copies of a batch of training inputs: an array,
                or a tuple of several, of the same shapes; ``rng`` is a numpy Generator.
            batch_size: Examples of one call.
            origin: JSON that says where the data came from.

        Raises:
            DataError: A shape, dtype, length or value does not fit.
        """
        if x is None and y is not None:
            raise DataError("there are targets y but no inputs x", fix="Data.of(x=..., y=...)")
        if x_train is None and y_train is not None:
            raise DataError(
                "there are targets y_train but no inputs x_train", fix="Data.of(x_train=..., ...)"
            )
        source: Examples | Stream | None = None
        if Stream.suits(calibration):
            source = Stream.of(calibration)
        elif calibration is not None:
            source = make_examples(calibration, None, "x_calibration", "")
        return cls(
            scored=None if x is None else make_examples(x, y, "x", "y"),
            train=None if x_train is None else make_examples(x_train, y_train, "x_train", "y_train"),
            calibration=source,
            metric=metric,
            class_names=class_names,
            decode=decode,
            loss=loss,
            augment=augment,
            batch_size=batch_size,
            origin=origin,
        )

    def evolve(
        self,
        *,
        scored: Examples | None = None,
        train: Examples | None = None,
        calibration: Examples | Stream | None = None,
        metric: str | Metric | UserScore | None = None,
        batch_size: int | None = None,
        origin: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> Self:
        """A changed copy, of the same class; ``notes`` are appended."""
        new = copy.copy(self)
        for cached in ("fingerprint", "notes"):
            vars(new).pop(cached, None)
        new.scored = self.scored if scored is None else scored
        new.train = self.train if train is None else train
        new._calibration = self._calibration if calibration is None else calibration
        new._metric = self._metric if metric is None else find_metric(metric)
        new.batch_size = self.batch_size if batch_size is None else batch_size
        new.origin = self.origin if origin is None else dict(origin)
        new._notes = (*self._notes, *notes)
        new._check_targets()
        return new

    @property
    def metric(self) -> Metric:
        """What scores the outputs.

        Raises:
            DataError: There are no labels and no metric was named; see ``resolve_metric``.
        """
        if self._metric is None:
            raise DataError("no metric was chosen", fix="--metric agreement, or --metric sqnr")
        return self._metric

    @property
    def has_metric(self) -> bool:
        """Whether a metric was named or follows from the targets."""
        return self._metric is not None

    @property
    def calibration_examples(self) -> Examples | Stream | None:
        """What was given for calibration alone."""
        return self._calibration

    @property
    def calibration_source(self) -> CalibrationSource:
        """Where ``calibration`` takes its inputs from."""
        if self._calibration is not None:
            return "calibration"
        if self.train is not None:
            return "training"
        return "none" if self.scored is None else "random"

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Warnings for the user, e.g. that calibration is random or that examples leak."""
        notes = list(self._notes)
        if self.calibration_source == "random":
            notes.append(
                "calibration uses random inputs, so ranges are guesses: give x_calibration or x_train, "
                "not among the scored examples"
            )
        if self.scored is not None:
            others = {"training": self.train, "calibration": self._calibration}
            for role, other in others.items():
                if not isinstance(other, Examples) or len(other.inputs) != len(self.scored.inputs):
                    continue
                known = set(self.scored.digests)
                twice = sum(row in known for row in other.digests)
                if twice:
                    notes.append(f"{twice} of the {len(other)} {role} examples are also scored: a leak")
        return tuple(notes)

    @cached_property
    def fingerprint(self) -> str:
        """Content hash (hex) of all examples and targets.

        Of a calibration function its qualified name and first 64 examples count. Batch size, metric
        and names do not.
        """
        digest = hashlib.sha256()
        if type(self) is not Data:
            digest.update(type(self).__qualname__.encode())
        roles = {"scored": self.scored, "train": self.train, "calibration": self._calibration}
        for role, examples in roles.items():
            if examples is not None:
                digest.update(role.encode() + b"\0")
                examples.hash_into(digest)
        return digest.hexdigest()

    def calibration(self, limit: int | None = None) -> Iterator[tuple[np.ndarray, ...]]:
        """Batches of inputs that set ranges and roundings, streamed, the same in each pass.

        Args:
            limit: At most so many examples; of arrays a fixed random choice, of a stream the first ones.
        """
        if isinstance(self._calibration, Stream):
            yield from self._calibration.batches(self.batch_size, limit)
            return
        examples = self._calibration or self.train
        if examples is None and self.scored is not None:
            count = _RANDOM_CALIBRATION if limit is None else limit
            sources = self.scored.inputs
            examples = Examples(
                tuple(RandomArrays(one.shape, one.dtype, count, i, 1) for i, one in enumerate(sources))
            )
        if examples is None:
            return
        picks = np.arange(len(examples))
        if limit is not None and limit < len(picks):  # sorted by class, the first ones would be one class
            picks = np.sort(np.random.default_rng(0).permutation(picks)[:limit])
        for pick in _batched(picks, self.batch_size):
            yield examples.take(pick)

    def training(
        self, seed: int, batch_size: int
    ) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray | None]]:
        """One epoch of shuffled batches: inputs, and targets if there are any.

        Raises:
            DataError: There are no training examples.
        """
        if self.train is None:
            raise DataError("there are no training examples", fix="add x_train and y_train to the data")
        order = np.random.default_rng(seed).permutation(len(self.train))
        for pick in _batched(order, batch_size):
            targets = self.train.targets
            yield self.train.take(pick), None if targets is None else targets[pick]

    def score(
        self, run: Run, indices: np.ndarray | None = None, original: Run | None = None
    ) -> Mapping[str, np.ndarray]:
        """Run the scored examples in batches and score each one.

        Args:
            run: Takes a batch of every input, gives a tuple of arrays.
            indices: Which scored examples; None for all.
            original: Gives the original's outputs, for metrics that compare with them.

        Returns:
            Metric name -> its rows (N, k), one per example. ``metric.reduce`` makes a score of rows.

        Raises:
            DataError: Outputs do not fit the metric.
        """
        examples, metric = self._scored(), self.metric
        picks = np.arange(len(examples)) if indices is None else np.asarray(indices)
        parts: list[np.ndarray] = []
        for pick in _batched(picks, self.batch_size):
            inputs = examples.take(pick)
            outputs = run(*inputs)
            if not outputs or len(np.atleast_1d(outputs[0])) != len(pick):
                raise DataError(
                    f"the model gave {outputs[0].shape if outputs else 'nothing'} for {len(pick)} examples",
                    fix="outputs need the examples on their first axis",
                )
            targets: Targets = None
            if examples.targets is not None:
                targets = examples.targets[pick]
            if original is not None and metric.compares:
                targets = metric.beside(targets, original(*inputs))
            if metric.text:
                outputs = (self._texts(outputs),)
            parts.append(metric.rows(outputs, targets))
        return {metric.name: np.concatenate(parts) if parts else np.empty((0, 1))}

    def halves(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """A seeded split of the scored indices: one half selects, the other reports.

        A single example is in both.
        """
        count = len(self._scored())
        if count < 2:
            return np.arange(count), np.arange(count)
        order = np.random.default_rng(seed).permutation(count)
        return np.sort(order[: count // 2]), np.sort(order[count // 2 :])

    def example_inputs(self) -> tuple[np.ndarray, ...]:
        """Two examples to trace the model with; not the scored ones when there are others.

        Raises:
            DataError: There are no examples at all.
        """
        examples = self.train or self.scored
        if examples is not None:
            return examples.take(np.arange(2) % len(examples))
        for batch in self.calibration(2):
            return tuple(array[np.arange(2) % len(array)] for array in batch)
        raise DataError("the data has no examples", fix="Data.of(x=...)")

    def _scored(self) -> Examples:
        if self.scored is None:
            raise DataError("the data has no examples to score", fix="add x, and y if there are labels")
        return self.scored

    def _texts(self, outputs: Outputs) -> np.ndarray:
        if self.decode is None:
            raise DataError(
                f"metric '{self.metric.name}' compares texts, and nothing turns outputs into them",
                fix="Data.of(..., decode=function) with function(outputs) -> list of strings",
            )
        given = outputs[0] if len(outputs) == 1 else outputs
        return np.asarray(call_user(self.decode, given, error=DataError))

    def _check_targets(self) -> None:
        """Refuse targets that the metric cannot use."""
        metric = self._metric
        if metric is None or not metric.needs_labels or self.scored is None:
            return
        y = self.scored.targets
        if y is None:
            raise DataError(
                f"metric '{metric.name}' needs labels, and there is no y",
                fix="add y, or use --metric agreement or sqnr",
            )
        if metric.classes and y.dtype.kind not in "iu":
            raise DataError(
                f"metric '{metric.name}' needs integer labels, but y is {y.dtype} {y.shape}",
                fix="y = y.argmax(1)" if y.ndim == 2 and y.shape[1] > 1 else "y = y.astype('int64')",
            )
        if metric.text != (y.dtype.kind == "U"):
            kind = "strings" if metric.text else "numbers"
            raise DataError(
                f"metric '{metric.name}' needs {kind}, but y is {y.dtype}", fix=f"give {kind} as y"
            )


def resolve_metric(data: Data, outputs: Outputs) -> Metric:
    """The metric of the data, now that the model's outputs are known.

    Without labels and a name: agreement for class scores (N, C >= 2), else sqnr.
    """
    if data.has_metric:
        return data.metric
    scores = outputs[0]
    return find_metric("agreement" if scores.ndim == 2 and scores.shape[1] >= 2 else "sqnr")


def load_data(
    spec: str,
    *,
    metric: str | None = None,
    image_size: int | str | tuple[int, int] | None = None,
    mean: str | float | Sequence[float] | None = None,
    std: str | float | Sequence[float] | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> Data:
    """Data of ``file.npz``, of a folder of class-named folders of images, or of ``path.py:callable``.

    Args:
        spec: What the user wrote.
        metric: Name or ``path.py:callable``; None for the default.
        image_size: For a folder of images: 224, '224' or '28x28' (height x width).
        mean: For a folder of images, one per channel or one for a single channel; of values in 0..1.
        std: Likewise.
        seed: Chooses the calibration images of a folder that has no others.
        batch_size: Examples of one call.

    Raises:
        DataError: Says what is wrong with the data and how to correct it.
        PluginError: There is no such metric.
    """
    path = Path(spec)
    chosen = None if metric is None else find_metric(metric)
    if path.is_dir():
        settings = ImageSettings.parse(image_size, mean, std)
        folder = read_folder(path, settings, seed)
        return Data(
            scored=folder.scored,
            train=folder.train,
            calibration=folder.calibration,
            metric=chosen,
            class_names=folder.class_names,
            batch_size=batch_size,
            origin=folder.origin,
            notes=folder.notes,
        )
    for value, option in ((image_size, "--image-size"), (mean, "--mean"), (std, "--std")):
        if value is not None:
            raise DataError(
                f"{option} is for a folder of images, not for '{spec}'", fix=f"leave {option} out"
            )
    if path.is_file() and path.suffix != ".py":
        return _load_npz(path, chosen, batch_size)
    if path.suffix == ".npz" or (":" not in spec and path.suffix != ".py"):
        raise DataError(
            f"there is no file or folder '{spec}'",
            fix="give file.npz, a folder of class-named folders of images, or path.py:callable",
        )
    function = load_callable(spec, DataError)
    data = call_user(function, error=DataError)
    if not isinstance(data, Data):
        raise DataError(
            f"'{spec}' returned {type(data).__name__}, not Data",
            where=defined_at(function),
            fix="return featherweight.Data.of(x=..., y=...)",
        )
    origin = {
        "kind": "callable",
        "callable": f"{Path(spec.rpartition(':')[0]).name}:{spec.rpartition(':')[2]}",
    }
    return data.evolve(metric=chosen, origin=origin if data.origin == {"kind": "arrays"} else None)


def random_data(
    inputs: Sequence[tuple[tuple[int, ...], np.dtype[Any]]],
    seed: int = 0,
    examples: int = 128,
    batch_size: int = 32,
) -> Data:
    """Data for a model that comes without any: random inputs, compared with the original's outputs.

    Args:
        inputs: Shape of one example (no batch axis) and dtype of every input.
        seed: Of the scored inputs.
        examples: How many are scored.
        batch_size: Examples of one call.
    """
    sources = tuple(
        RandomArrays(tuple(shape), np.dtype(dtype), examples, seed + i)
        for i, (shape, dtype) in enumerate(inputs)
    )
    note = "there is no data: quality is agreement with the original on random inputs"
    return Data(
        scored=Examples(sources),
        batch_size=batch_size,
        origin={"kind": "random", "seed": seed},
        notes=(note,),
    )


def _load_npz(path: Path, metric: Metric | None, batch_size: int) -> Data:
    roles, class_names, unused = read_npz(path)
    try:
        data = Data.of(
            roles["x"],
            roles.get("y"),
            x_train=roles.get("x_train"),
            y_train=roles.get("y_train"),
            calibration=roles.get("x_calibration"),
            metric=metric,
            class_names=class_names,
            batch_size=batch_size,
            origin={"kind": "npz", "file": path.name},
        )
    except DataError as exc:
        exc.where = f"{path}, {exc.where}" if exc.where else str(path)
        raise
    known = ", ".join(ROLES)
    return data.evolve(
        notes=[f"array '{name}' of {path.name} is not used; known are {known}" for name in unused]
    )


def _default_metric(scored: Examples | None) -> Metric | None:
    if scored is None or scored.targets is None:
        return None
    kinds = {"i": "accuracy", "u": "accuracy", "b": "accuracy", "U": "wer"}
    return find_metric(kinds.get(scored.targets.dtype.kind, "mse"))


def _batched(picks: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in itertools.count(0, size):
        if start >= len(picks):
            return
        yield picks[start : start + size]
