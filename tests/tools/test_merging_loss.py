"""What a merged network learns: labels and answers of each task, balanced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from featherweight.tasks import Columns
from featherweight.tools.distill_losses import OutputKind
from featherweight.tools.merging_loss import Balance, Head, MergedLoss
from featherweight.tools.objectives import TaskLoss


class Said:
    """A teacher that always says the same."""

    def __init__(self, *answers: Tensor) -> None:
        self.answers = answers

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        return self.answers, {}


class Two(nn.Module):
    """One shared weight, and two outputs that want it to go apart."""

    def __init__(self, turn: float) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.tensor([1.0, 1.0]))
        self.turn = torch.tensor([[1.0, 0.0], [turn, 1.0]])

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple((row * self.shared).sum().reshape(1, 1) for row in self.turn)


VALUES = (OutputKind("values"),)


def loss_of(net: nn.Module, balance: Balance, *answers: float) -> MergedLoss:
    heads = [Head(str(i), (i, i + 1), VALUES) for i in range(len(answers))]
    said = Said(*(torch.tensor([[one]]) for one in answers))
    made = MergedLoss(heads, said, 1.0, 1.0, balance)  # type: ignore[arg-type]
    made.attach(net)  # type: ignore[arg-type]
    return made


def gradient(net: Two, balance: Balance, *answers: float) -> Tensor:
    loss = loss_of(net, balance, *answers)
    (found,) = torch.autograd.grad(loss(net(), (), None), [net.shared])
    return found


class TestPcgrad:
    def test_gradients_that_agree_are_added(self) -> None:
        net = Two(turn=0.5)
        assert torch.allclose(gradient(net, "pcgrad", 0.0, 0.0), gradient(net, "equal", 0.0, 0.0))

    def test_of_two_that_conflict_each_loses_what_goes_against_the_other(self) -> None:
        net = Two(turn=-0.9)
        each = [2 * (row @ net.shared - 0.0).detach() * row for row in net.turn]
        first, second = each[0], each[1]
        assert first @ second < 0
        wanted = first - (first @ second) / (second @ second) * second
        wanted = wanted + second - (first @ second) / (first @ first) * first
        assert torch.allclose(gradient(net, "pcgrad", 0.0, 0.0), wanted, atol=1e-6)
        assert not torch.allclose(gradient(net, "equal", 0.0, 0.0), wanted, atol=1e-3)

    def test_the_value_is_that_of_the_sum(self) -> None:
        net = Two(turn=-0.9)
        values = [float(loss_of(net, one, 0.0, 0.0)(net(), (), None).detach()) for one in ("pcgrad", "equal")]
        assert values[0] == pytest.approx(values[1])


class TestUncertainty:
    def test_begins_as_the_sum_and_learns_to_weigh_large_losses_less(self) -> None:
        net = Two(turn=1.0)
        loss = loss_of(net, "uncertainty", 3.0, 2.1)
        assert float(loss(net(), (), None).detach()) == pytest.approx(
            float(loss.losses(net(), (), None).sum().detach())
        )
        optimizer = torch.optim.SGD([loss.log_variance], lr=0.1)
        for _ in range(400):
            optimizer.zero_grad()
            loss(net(), (), None).backward()
            optimizer.step()
        losses = loss.losses(net(), (), None).detach()
        assert torch.allclose(loss.log_variance.detach().exp(), losses, rtol=1e-2)  # where d/ds is 0

    def test_other_balances_learn_no_weights(self) -> None:
        assert not loss_of(Two(1.0), "equal", 0.0, 0.0).log_variance.requires_grad


class TestLabels:
    def test_each_head_reads_its_own_columns(self) -> None:
        logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        value = torch.tensor([[1.0], [3.0]])
        heads = [
            Head("class", (0, 1), (OutputKind("logits", 1),), TaskLoss(highest=2), Columns(0, (), "<i8")),
            Head("value", (1, 2), VALUES, TaskLoss(real=True), Columns(1, (1,), "<f4")),
        ]
        targets = torch.tensor([[0.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        made = MergedLoss(heads, Said(logits, value), 0.0, 1.0, "equal")  # type: ignore[arg-type]
        found = made.losses((logits, value), (), targets)
        assert float(found[0].detach()) == pytest.approx(
            float(nn.functional.cross_entropy(logits, torch.tensor([0, 1])))
        )
        assert float(found[1].detach()) == pytest.approx(0.5)

    def test_without_labels_its_own_network_is_all_that_counts(self) -> None:
        net = Two(turn=0.0)
        assert float(loss_of(net, "equal", 1.0, 1.0)(net(), (), None).detach()) == pytest.approx(0.0)
