"""The examples that training sees: their order in each epoch, augmented, and those held back to judge it.

The order follows from the seed and the epoch, what augmentation draws from the seed and the step, so that a
run which goes on in the middle of an epoch sees what it would have seen. Rows are read when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from featherweight.data import Data
from featherweight.errors import DataError
from featherweight.examples import Arrays, Examples
from featherweight.streams import Stream
from featherweight.tools.augment import Augment

_STREAMED = 4096  # examples of a calibration function that are trained on
_ORDER, _DRAWS, _HELD = range(3)  # streams of random numbers


@dataclass(frozen=True)
class Batch:
    """Examples of one step, or a process's part of them.

    Attributes:
        inputs: Flat tensors, examples first.
        targets: None without labels.
        others: Targets of the examples that were mixed in.
        share: Of ``targets`` in the loss; the rest is that of ``others``.
        weight: Of this part in the batch: its examples times the number of parts over all examples.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor | None
    others: Tensor | None = None
    share: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True)
class TrainingExamples:
    """What a training run sees.

    Attributes:
        source: Inputs and targets.
        picks: Indices that are trained on.
        held: Indices that are held back.
        augment: What is done to those that are trained on.
        seed: Of order and augmentation.
    """

    source: Examples
    picks: np.ndarray
    held: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    augment: Augment = field(default_factory=Augment)
    seed: int = 0
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.picks)

    def steps(self, batch_size: int) -> int:
        """Batches of an epoch: the last one, when it would be smaller, is left out."""
        return max(len(self) // batch_size, 1)

    def few(self, count: int = 2) -> Batch:
        """The first examples, not augmented."""
        pick = self.picks[:count]
        return self._made(pick, weight=len(pick))

    def batch(self, step: int, batch_size: int, parts: int = 1, part: int = 0) -> Batch:
        """What one step sees, counted over all epochs; one of several equal parts of it."""
        epoch, place = divmod(step, self.steps(batch_size))
        chosen = self._order(epoch)[place * batch_size : (place + 1) * batch_size]
        own = np.array_split(np.arange(len(chosen)), parts)[part]
        if not self.augment:
            return self._made(chosen[own], weight=len(own) * parts / len(chosen))
        rng = np.random.default_rng((self.seed, _DRAWS, step))
        inputs, mix = self.augment(self.source.take(chosen), rng)
        tensors = tuple(_tensor(array[own] if parts > 1 else array) for array in inputs)
        return Batch(
            tensors,
            self._targets(chosen[own]),
            None if mix is None else self._targets(chosen[mix.partner[own]]),
            1.0 if mix is None else mix.share,
            len(own) * parts / len(chosen),
        )

    def held_back(self, batch_size: int, parts: int = 1, part: int = 0) -> Iterator[Batch]:
        """Those held back, as they are; a part's weight is its number of examples."""
        own = np.array_split(self.held, parts)[part]
        for start in range(0, len(own), batch_size):
            pick = own[start : start + batch_size]
            yield self._made(pick, weight=len(pick))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = np.random.default_rng((self.seed, _ORDER, epoch)).permutation(self.picks)
        return self._orders[epoch]

    def _made(self, pick: np.ndarray, weight: float) -> Batch:
        inputs = tuple(_tensor(array) for array in self.source.take(pick))
        return Batch(inputs, self._targets(pick), weight=weight)

    def _targets(self, pick: np.ndarray) -> Tensor | None:
        targets = self.source.targets
        if targets is None or targets.dtype.kind == "U":
            return None
        rows = _tensor(targets[pick])
        return rows if rows.is_floating_point() else rows.long()


def training_examples(
    data: Data, *, taught: bool, held_back: float = 0.0, augment: Augment | None = None, seed: int = 0
) -> TrainingExamples:
    """The training examples; with a teacher those for calibration, where there are no others.

    Args:
        data: Scored examples are never among them.
        taught: Whether a teacher makes labels unnecessary.
        held_back: Share that judges the epochs.
        augment: Of those that are trained on.
        seed: Of everything random.

    Raises:
        DataError: There are none, or too few to hold some back.
    """
    source = data.train
    if source is None and taught:
        kept = data.calibration_examples
        source = _read(kept) if isinstance(kept, Stream) else kept
    if source is None:
        raise DataError(
            "there are no training examples",
            fix="add x_train and y_train to the data, or "
            + ("calibration examples" if taught else "teacher: original, which learns from x_calibration"),
        )
    picks = np.arange(len(source))
    held = picks[:0]
    if held_back > 0:
        count = max(round(held_back * len(picks)), 1)
        if count >= len(picks):
            raise DataError(
                f"of {len(picks)} training examples none can be held back", fix="validation: 0, or more data"
            )
        order = np.random.default_rng((seed, _HELD)).permutation(len(picks))
        picks, held = np.sort(order[count:]), np.sort(order[:count])
    chosen = augment or Augment()
    chosen.check([one.shape for one in source.inputs])
    return TrainingExamples(source, picks, held, chosen, seed)


def _read(stream: Stream) -> Examples:
    batches = list(stream.batches(256, _STREAMED))
    columns = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return Examples(tuple(Arrays(array) for array in columns))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
