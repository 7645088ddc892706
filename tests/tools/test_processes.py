"""Training in two processes: the curve of one, batch norms over both, and what is said when one dies."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from featherweight.errors import DataError, RunnerError
from featherweight.model import Model
from featherweight.tools.objectives import Outputs, TaskLoss
from featherweight.tools.processes import Seat, make_fabric, shared_statistics, together
from featherweight.tools.simulated import Simulated
from featherweight.tools.train_settings import TrainSettings
from featherweight.tools.training import train
from featherweight.tools.training_examples import training_examples
from golden import context, model_of
from training import Told, fitted, problem, small, weights

CPU = torch.device("cpu")


def sequence_norm() -> Model:
    """A batch norm over (N, C), whose last part has one example less."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(72, 12), nn.BatchNorm1d(12, affine=False), nn.Linear(12, 4)]
    return model_of(nn.Sequential(*layers), torch.randn(2, 2, 6, 6))


class TestTwoProcesses:
    @pytest.mark.parametrize(
        ("net", "settings"),
        [
            (small(norm=False), {}),
            (small(), {"learning_rate": 0.1}),
            (small(), {"batch_size": 13, "clip": 0.1}),
            (sequence_norm(), {"accumulate": 2, "batch_size": 15}),
            (small(), {"ema": 0.8, "held_back": 0.3, "patience": 2, "epochs": 6}),
            (small(), {"precision": "bf16-mixed"}),
        ],
        ids=["plain", "batch norm", "uneven", "parts", "held back", "bf16"],
    )
    def test_the_curve_of_one(self, net: Model, settings: dict[str, Any]) -> None:
        told = Told()
        one, alone = fitted(net, **settings)
        two, both = fitted(net, devices=2, told=told, **settings)
        near = 0.05 if "precision" in settings else 1e-4
        assert two.losses == pytest.approx(one.losses, rel=near)
        assert two.validation == pytest.approx(one.validation, rel=near)
        if "precision" not in settings:
            wanted = weights(alone)
            for name, value in weights(both).items():
                assert torch.allclose(value.float(), wanted[name].float(), rtol=1e-3, atol=1e-5), name
        assert told.bars == [("training in 2 processes", two.steps)]
        assert not distributed.is_initialized()

    def test_leaves_this_process_as_it_was(self) -> None:
        before, threads = dict(os.environ), torch.get_num_threads()
        fitted(devices=2, steps=2)
        assert dict(os.environ) == before
        assert torch.get_num_threads() == threads

    def test_more_than_a_batch_has(self) -> None:
        with pytest.raises(DataError, match="2 processes cannot share 1 examples"):
            fitted(devices=2, batch_size=1)


def test_a_layer_that_is_not_called() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.idle = nn.Linear(72, 4), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(1))

    net = model_of(Idle(), torch.randn(2, 2, 6, 6))
    assert fitted(net, devices=2)[0].losses == pytest.approx(fitted(net)[0].losses, rel=1e-4)


class TestFails:
    @pytest.mark.parametrize(
        ("how", "said"),
        [
            ("kill", "training process 2 of 2 ended early: killed by SIGKILL"),
            ("raise", "ValueError: no more"),
        ],
    )
    def test_a_process_that_dies(self, how: str, said: str) -> None:
        class Dies(TaskLoss):
            calls = 0

            def forward(self, outputs: Outputs, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
                Dies.calls += 1
                if Dies.calls == 3 and distributed.get_rank() == 1:
                    if how == "raise":
                        raise ValueError("no more")
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().forward(outputs, inputs, targets)

        with pytest.raises(RunnerError, match=said) as caught:
            self.train(Dies(highest=3))
        assert "checkpoint" in str(caught.value.fix)
        assert not distributed.is_initialized()
        fitted(devices=2, steps=2)  # and the next one runs

    def test_an_error_of_the_network_is_its_own(self) -> None:
        class Fails(TaskLoss):
            def forward(self, outputs: Outputs, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
                if distributed.is_initialized():
                    return torch.zeros(2) @ torch.zeros(3)
                return super().forward(outputs, inputs, targets)

        with pytest.raises(RuntimeError, match="inconsistent tensor size"):
            self.train(Fails(highest=3))
        fitted(devices=2, steps=2)

    def test_what_is_wrong_with_the_data_is_said_as_such(self) -> None:
        class Refuses(TaskLoss):
            def forward(self, outputs: Outputs, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
                if distributed.is_initialized() and distributed.get_rank() == 1:
                    raise DataError("these do not fit", where="here", fix="this")
                return super().forward(outputs, inputs, targets)

        with pytest.raises(DataError, match="these do not fit") as caught:
            self.train(Refuses(highest=3))
        assert (caught.value.where, caught.value.fix) == ("here", "this")

    @staticmethod
    def train(objective: TaskLoss) -> None:
        settings = TrainSettings(steps=6, batch_size=16, devices=2)
        examples = training_examples(problem(), taught=False)
        train(Simulated(small()), objective, examples, settings, context(small(), problem()))


def test_statistics_of_all_are_those_of_the_whole_batch() -> None:
    """Outputs, gradients and running statistics, of 7 examples in two parts."""
    torch.manual_seed(0)
    x, upstream = torch.randn(7, 3, 4, 5), torch.randn(7, 3, 4, 5)
    parts = [slice(0, 4), slice(4, 7)]

    def run(norm: nn.Module, rows: slice) -> list[Tensor]:
        given = x[rows].clone().requires_grad_()
        (norm(given) * upstream[rows]).sum().backward()
        assert given.grad is not None
        return [given.grad, *(one.grad for one in norm.parameters() if one.grad is not None)]

    norm, whole = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    wanted = run(whole, slice(0, 7))

    def work(seat: Seat) -> list[Tensor]:
        make_fabric(seat, CPU, "32")
        with shared_statistics(seat):
            found = run(norm, parts[seat.rank])
        for gradient in found[1:]:
            distributed.all_reduce(gradient)
        return found

    found = together(2, work)
    assert torch.allclose(found[0], wanted[0][parts[0]], atol=1e-5)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert torch.allclose(norm.running_mean, whole.running_mean, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(norm.running_var, whole.running_var, atol=1e-6)  # type: ignore[arg-type]
