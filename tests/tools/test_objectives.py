"""Objectives: the loss that fits targets and outputs, the user's own, and errors where nothing fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.data import Data
from featherweight.errors import DataError, RecipeError
from featherweight.tools.objectives import Objective, TaskLoss, UserLoss, UserStep, task_objective
from golden import model_of

X = np.random.default_rng(0).standard_normal((12, 6)).astype(np.float32)


def net(*last: nn.Module, outputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, outputs), *last).eval()


def loss_of(module: nn.Module, y: Any, **how: Any) -> tuple[Tensor, Tensor]:
    """What the objective that is found gives, and the network's output."""
    targets = np.asarray(y)
    data = Data.of(X[:1], targets[:1], x_train=X, y_train=targets, metric=how.pop("metric", None))
    objective = task_objective(model_of(module, torch.from_numpy(X[:2])), data, **how)
    assert objective is not None
    output = module(torch.from_numpy(X))
    given = torch.from_numpy(targets)
    given = given if given.is_floating_point() else given.long()
    return objective((output,), (torch.from_numpy(X),), given), output


CLASSES = np.arange(12) % 4


class TestTaskLoss:
    def test_cross_entropy_for_classes(self) -> None:
        loss, output = loss_of(net(), CLASSES)
        assert torch.equal(loss, F.cross_entropy(output, torch.from_numpy(CLASSES)))

    def test_label_smoothing(self) -> None:
        loss, output = loss_of(net(), CLASSES, smoothing=0.1)
        logs = output.log_softmax(1)
        own = logs.gather(1, torch.from_numpy(CLASSES)[:, None])
        assert torch.allclose(loss, -(0.9 * own + 0.1 * logs.mean(1, keepdim=True)).mean(), rtol=1e-5)

    @pytest.mark.parametrize("last", [nn.Softmax(1), nn.LogSoftmax(1)])
    def test_probabilities_count_as_what_they_are(self, last: nn.Module) -> None:
        scores, _ = loss_of(net(), CLASSES)
        likely, _ = loss_of(net(last), CLASSES)
        assert torch.allclose(scores, likely, rtol=1e-4)

    def test_classes_of_each_position(self) -> None:
        maps = torch.randn(2, 4, 3, 5)
        classes = torch.randint(4, (2, 3, 5))
        loss = TaskLoss(highest=3)
        assert torch.equal(loss((maps,), (), classes), F.cross_entropy(maps, classes))
        tokens, ids = torch.randn(2, 7, 4), torch.randint(4, (2, 7))
        assert torch.allclose(
            loss((tokens,), (), ids), F.cross_entropy(tokens.reshape(14, 4), ids.reshape(14))
        )
        square, both = torch.randn(2, 4, 4), torch.randint(4, (2, 4))  # of a sequence the last axis
        assert torch.allclose(
            loss((square,), (), both), F.cross_entropy(square.reshape(8, 4), both.reshape(8))
        )

    def test_binary_for_zeros_and_ones(self) -> None:
        y = (X[:, :4] > 0).astype(np.float32)
        loss, output = loss_of(net(), y)
        assert torch.allclose(loss, F.binary_cross_entropy_with_logits(output, torch.from_numpy(y)))
        likely, _ = loss_of(net(nn.Sigmoid()), y)
        assert torch.allclose(loss, likely, rtol=1e-4)
        one, output = loss_of(net(outputs=1), CLASSES % 2)
        wanted = F.binary_cross_entropy_with_logits(output[:, 0], torch.from_numpy(CLASSES % 2).float())
        assert torch.allclose(one, wanted)

    def test_squares_for_values(self) -> None:
        y = X[:, :4] * 2
        loss, output = loss_of(net(), y)
        assert torch.allclose(loss, (output - torch.from_numpy(y)).square().mean())
        counts, output = loss_of(net(outputs=1), CLASSES * 10, metric="mse")
        assert torch.allclose(counts, (output[:, 0] - torch.from_numpy(CLASSES * 10)).square().mean())

    def test_what_does_not_fit(self) -> None:
        with pytest.raises(DataError, match="class 7, and the network has 4 classes"):
            loss_of(net(), CLASSES + 4)
        with pytest.raises(DataError, match="no loss fits outputs of shape"):
            loss_of(net(), X[:, :3])
        with pytest.raises(DataError, match="no loss fits outputs of shape"):
            TaskLoss()((torch.randn(2, 4, 3),), (), torch.zeros(2, 5, dtype=torch.long))
        with pytest.raises(DataError, match="needs labels") as caught:
            TaskLoss()((torch.randn(2, 4),), (), None)
        assert "teacher" in str(caught.value.fix)

    def test_texts(self) -> None:
        data = Data.of(x_train=X, y_train=np.array(["a"] * 12))
        with pytest.raises(DataError, match="texts"):
            task_objective(model_of(net(), torch.from_numpy(X[:2])), data)

    def test_none_without_labels(self) -> None:
        assert task_objective(model_of(net(), torch.from_numpy(X[:2])), Data.of(x_train=X)) is None


USERS = """
import torch
def l1(output, y): return (output - y).abs().mean()
def each(output, y): return (output - y).abs().mean(1)
def number(output, y): return 3.0
def fixed(output, y): return torch.zeros(())
def raises(output, y): return output.no_such_thing
def step(module, batch):
    x, y = batch
    return module(x).abs().mean() + module(x * 2).abs().mean() + (0 if y is None else y.mean())
"""


class TestUsers:
    @staticmethod
    def make(tmp_path: Path, loss: str | None = None, **how: Any) -> Objective:
        file = tmp_path / "own.py"
        file.write_text(USERS)
        data = Data.of(x_train=X, y_train=X[:, :4])
        if loss is not None:
            how["loss"] = f"{file}:{loss}"
        if "training_step" in how:
            how["training_step"] = f"{file}:{how['training_step']}"
        made = task_objective(model_of(net(), torch.from_numpy(X[:2])), data, **how)
        assert made is not None
        return made

    def test_a_loss(self, tmp_path: Path) -> None:
        objective = self.make(tmp_path, "l1")
        output, y = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
        assert torch.equal(objective((output,), (), y), (output - y).abs().mean())
        with pytest.raises(DataError, match="needs labels"):
            objective((output,), (), None)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("each", r"the loss has shape \(3,\), and one number is needed"),
            ("number", "the loss is of type float, not a tensor"),
            ("fixed", "does not depend on the network's outputs"),
            ("raises", "AttributeError"),
        ],
    )
    def test_a_loss_that_is_none(self, name: str, said: str, tmp_path: Path) -> None:
        objective = self.make(tmp_path, name)
        with pytest.raises(RecipeError, match=said) as caught:
            objective((torch.randn(3, 4, requires_grad=True),), (), torch.randn(3, 4))
        assert "own.py" in str(caught.value.where)

    def test_that_of_the_data(self) -> None:
        def loss(outputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            assert isinstance(outputs, tuple)
            return outputs[1].mean() * y.mean()

        objective = UserLoss(loss)
        pair = (torch.ones(3), torch.full((3,), 2.0, requires_grad=True))
        assert objective(pair, (), torch.full((3,), 5.0)).item() == 10

    def test_a_training_step(self, tmp_path: Path) -> None:
        objective = self.make(tmp_path, training_step="step")
        assert isinstance(objective, UserStep)
        module = net()

        class Called:
            seen: dict[str, Tensor] = {}  # noqa: RUF012

            def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
                return (module(*inputs),)

            def watch(self, layers: Any) -> None:
                raise AssertionError

        x = torch.from_numpy(X)
        loss = objective.step(Called(), (x,), None)
        assert torch.allclose(loss, module(x).abs().mean() + module(2 * x).abs().mean())

    def test_no_such_file(self) -> None:
        with pytest.raises(RecipeError, match=r"there is no file 'nowhere\.py'"):
            task_objective(
                model_of(net(), torch.from_numpy(X[:2])),
                Data.of(x_train=X, y_train=X),
                loss="nowhere.py:loss",
            )
