"""How to train, and how it went."""

from __future__ import annotations

from dataclasses import dataclass, field

from featherweight.method import Precision
from featherweight.tools.optimizers import OptimizerName, Schedule


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        epochs: Passes over the examples; may be a fraction.
        steps: Updates instead of epochs.
        batch_size: Examples of one update.
        accumulate: Parts of a batch that go through the network one after the other.
        optimizer: ``sgd`` with Nesterov momentum, or ``adamw``.
        learning_rate: The largest one.
        step_rate: That of what formats learn, such as step sizes.
        momentum: Of SGD; the first beta of AdamW.
        weight_decay: Of kernels and matrices.
        warmup: Share of the updates in which the rate rises.
        schedule: How it falls then.
        clip: Largest norm of the gradient; None: any.
        ema: Decay of averaged weights, which are then the result; None: no average.
        patience: Epochs without a lower loss on the examples held back that end training; None: all epochs.
        precision: Of the computation; weights stay float32.
        devices: Processes that share each batch.
        seed: Of everything random.
        settled: Share of the training after which formats stay as they are; no epoch before is the best.
        frozen: Layers, without what is below them, that run as in inference: batch norms keep theirs.
    """

    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    optimizer: OptimizerName = "sgd"
    learning_rate: float = 0.02
    step_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    schedule: Schedule = "cosine"
    clip: float | None = None
    ema: float | None = None
    patience: int | None = None
    precision: Precision = "32"
    devices: int = 1
    seed: int = 0
    settled: float = 0.0
    frozen: tuple[str, ...] = ()


@dataclass
class History:
    """How training went.

    Attributes:
        losses: Of each update, over the whole batch.
        rates: Learning rate of each update.
        validation: Loss on the examples held back, after each epoch.
        steps: Updates that were meant to be.
        stopped: Why there were less; '' where there were not.
    """

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    steps: int = 0
    stopped: str = ""
