"""What is odd about calibration examples is told, with figures; what is not odd is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.errors import DataError
from featherweight.graph import trace
from featherweight.tools.calibration import CalibrationInputs, constant_values
from featherweight.tools.ranges import Histogram
from golden import model_of

GRAPH = trace(model_of(nn.Linear(3, 2), torch.randn(2, 3)))


def normal(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3)).astype(np.float32)


def notes(calibration: np.ndarray, train: np.ndarray | None = None) -> list[str]:
    data = Data.of(calibration=calibration, x_train=train)
    seen = CalibrationInputs(GRAPH)
    for batch in data.calibration():
        seen.update(tuple(map(torch.from_numpy, batch)))
    return seen.notes(data, 0)


def test_ordinary_examples_are_no_news() -> None:
    assert notes(normal(64)) == []
    assert notes(normal(64), normal(640, 1)) == []


@pytest.mark.parametrize(("count", "told"), [(1, True), (15, True), (16, False)])
def test_few_examples_are_counted(count: int, told: bool) -> None:
    found = [note for note in notes(normal(count)) if f"from {count} calibration examples" in note]
    assert bool(found) == told


def test_a_constant_input_is_named_with_its_value() -> None:
    (note,) = notes(np.full((40, 3), 0.5, np.float32))
    assert note.startswith("'input:x' is 0.5 in all 40 calibration examples")


def test_one_example_over_and_over_is_seen() -> None:
    assert notes(np.repeat(normal(1), 50, 0)) == ["all 50 calibration examples are the same one"]
    assert notes(np.concatenate([np.repeat(normal(1), 49, 0), normal(1, 1)])) == []


def test_inputs_prepared_otherwise_than_those_of_training_are_told_with_both_ranges() -> None:
    train = np.random.default_rng(1).uniform(0, 1, (200, 3)).astype(np.float32)
    (note,) = notes(train[:50] * 255, train[50:])
    assert "lies outside of what training shows" in note
    assert "in training 0." in note
    share = float(note.split(" %")[0])
    outside = 100 * float((train[:50] * 255 > 1.1).mean())
    assert share == pytest.approx(outside, abs=0.5)


def test_training_beyond_calibration_will_be_clipped() -> None:
    (note,) = notes(normal(64) * 0.2, normal(64, 1))
    assert "lies outside of what calibration shows" in note
    assert "clipped" in note


def test_integer_inputs_have_no_range() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(x)

    seen = CalibrationInputs(trace(model_of(Table(), torch.zeros(2, 5, dtype=torch.long))))
    ids = np.random.default_rng(0).integers(0, 9, (32, 5))
    seen.update((torch.from_numpy(ids),))
    assert seen.count == 32
    assert seen.notes(Data.of(calibration=ids), 0) == []


def test_nan_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="'input:x' is NaN or infinite"):
        CalibrationInputs(GRAPH).update((torch.tensor([[1.0, torch.nan, 0.0]]),))


def test_constant_values_inside_are_named() -> None:
    seen = {name: Histogram() for name in ("input:x", "a#0:0", "b#0:0", "c#0:0")}
    seen["input:x"].update(torch.zeros(3), "x")
    for name, value in (("a#0:0", [0.0, 0.0]), ("b#0:0", [1.0, 2.0]), ("c#0:0", [3.0, 3.0])):
        seen[name].update(torch.tensor(value), name)
    (note,) = constant_values(seen)
    assert note.startswith("'a#0:0' is 0 on every calibration example and 1 more: 'c#0:0'")
    assert constant_values({"b#0:0": seen["b#0:0"]}) == []
