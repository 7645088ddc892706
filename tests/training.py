"""Small networks and problems that tests train on, and a context that writes down what it is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from featherweight.data import Data
from featherweight.model import Model
from featherweight.tools.objectives import TaskLoss
from featherweight.tools.simulated import Simulated
from featherweight.tools.train_settings import History, TrainSettings
from featherweight.tools.training import train
from featherweight.tools.training_examples import training_examples
from golden import context, model_of

T = TypeVar("T")


@dataclass
class Told:
    """Progress that keeps what it is told."""

    notes: list[str] = field(default_factory=list)
    bars: list[tuple[str, int | None]] = field(default_factory=list)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        self.bars.append((description, total))
        yield from items

    def note(self, message: str) -> None:
        self.notes.append(message)


@dataclass
class Kept:
    """A checkpoint in memory, as the engine's would give it back: a copy."""

    states: list[dict[str, Any]] = field(default_factory=list)
    at: int | None = None

    def load(self) -> dict[str, Any] | None:
        return None if self.at is None else copied(self.states[self.at])

    def save(self, state: Mapping[str, Any]) -> None:
        self.states.append(copied(dict(state)))


def copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied(one) for key, one in value.items()}
    return type(value)(copied(one) for one in value) if isinstance(value, list | tuple) else value


def small(norm: bool = True, seed: int = 0) -> Model:
    """A convolution, a batch norm and a linear layer: 4 classes of (2, 6, 6)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU()]
        module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
        return model_of(module, torch.randn(2, 2, 6, 6))


def problem(count: int = 64, seed: int = 0) -> Data:
    """Inputs for :func:`small` and the class of each: that of the brightest corner of the first channel."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count + 16, 2, 6, 6)).astype(np.float32)
    corners = x[:, 0].reshape(-1, 2, 3, 2, 3).mean((2, 4)).reshape(-1, 4)
    y = corners.argmax(1)
    return Data.of(x[count:], y[count:], x_train=x[:count], y_train=y[:count])


def fitted(
    net: Model | None = None,
    data: Data | None = None,
    *,
    held_back: float = 0.0,
    told: Told | None = None,
    checkpoint: Kept | None = None,
    **settings: Any,
) -> tuple[History, Simulated]:
    """Train a small network by cross entropy."""
    from dataclasses import replace

    model, data = net or small(), data or problem()
    around = replace(context(model, data), progress=told or Told(), checkpoint=checkpoint or Kept())
    simulated = Simulated(model)
    asked = TrainSettings(**{"epochs": 4.0, "batch_size": 16, **settings})
    examples = training_examples(data, taught=False, held_back=held_back, seed=asked.seed)
    return train(simulated, TaskLoss(highest=3), examples, asked, around), simulated


def weights(net: Simulated) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in net.module.state_dict().items()}


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(value, two[name]) for name, value in one.items())
