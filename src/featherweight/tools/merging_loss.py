"""What a merged network learns: each task from its own network, and from its labels where there are some.

With the loss L_t of task t, (1 - alpha) of its labels + alpha of its network's outputs (``distillation.py``),
the whole is one of::

    equal          sum_t L_t
    uncertainty    sum_t exp(-s_t) L_t + s_t            s_t learned (Kendall et al. 2018, arXiv:1705.07115)
    pcgrad         sum_t L_t, but in shared weights g_t loses what goes against another task's gradient g_u:
                   g_t <- g_t - (g_t . g_u / |g_u|^2) g_u where g_t . g_u < 0
                   (Yu et al. 2020, arXiv:2001.06782)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.data import Data
from featherweight.errors import RecipeError
from featherweight.tasks import Columns, Task
from featherweight.tools.distill_losses import OutputKind, output_kinds, output_loss
from featherweight.tools.distill_teacher import Teacher
from featherweight.tools.objectives import Net, Objective, Outputs, TaskLoss

Balance = Literal["uncertainty", "equal", "pcgrad"]
_REAL_METRICS = frozenset({"mse", "mae", "pearson", "sqnr"})
_LEAST = 1e-12


@dataclass(frozen=True)
class Head:
    """One task of a merged network, in training.

    Attributes:
        name: The task's.
        outputs: First and last + 1 of the network's flat outputs.
        kinds: What each of them holds.
        labels: Loss of its labels; None: it has none.
        columns: Where its labels are in the matrix of all.
    """

    name: str
    outputs: tuple[int, int]
    kinds: tuple[OutputKind, ...]
    labels: Objective | None = None
    columns: Columns | None = None


def make_head(
    name: str, outputs: tuple[int, int], answers: Sequence[Tensor], task: Task | None, data: Data
) -> Head:
    """A head, by what its network answered and by the labels that there are.

    Args:
        name: The task's.
        outputs: First and last + 1 of the network's flat outputs.
        answers: All outputs of the networks side by side, on a few examples.
        task: What data says of it; None: nothing.
        data: Its training targets are those of all tasks.
    """
    about = Data() if task is None else Data(metric=task.metric)
    own = answers[slice(*outputs)]
    kinds = output_kinds(own, about)
    if not any(kind.name != "none" for kind in kinds):
        raise RecipeError(
            f"no output of '{name}' is of floating-point numbers, so nothing can be learned from it",
            fix="return scores instead of class numbers",
        )
    train = data.train
    if task is None or task.trained is None or train is None or train.targets is None:
        return Head(name, outputs, kinds)
    targets = task.trained.of(train.targets)
    real = targets.dtype.kind == "f" or task.metric.name in _REAL_METRICS
    loss = TaskLoss(
        ending="probabilities" if kinds[0].name == "probabilities" else "scores",
        real=real,
        binary=targets.dtype.kind in "fb" and bool(((targets == 0) | (targets == 1)).all()),
        highest=0 if real or not targets.size else int(targets.max()),
    )
    return Head(name, outputs, kinds, loss, task.trained)


class MergedLoss(Objective):
    """The balanced loss of all heads.

    Args:
        heads: One a task.
        teacher: The networks side by side.
        alpha: Share of a network's outputs in the loss of its head; the labels have the rest.
        temperature: Softens class scores.
        balance: See the top of this file.
    """

    def __init__(
        self, heads: Sequence[Head], teacher: Teacher, alpha: float, temperature: float, balance: Balance
    ) -> None:
        super().__init__()
        self.heads = tuple(heads)
        self.teacher = teacher
        self.alpha, self.temperature, self.balance = alpha, temperature, balance
        self.log_variance = nn.Parameter(torch.zeros(len(self.heads)), balance == "uncertainty")
        self._weights: tuple[nn.Parameter, ...] = ()

    def attach(self, net: Net) -> None:
        """Know the weights that tasks may share."""
        assert isinstance(net, nn.Module)
        self._weights = tuple(one for one in net.parameters() if one.requires_grad)

    def forward(self, outputs: Outputs, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
        """The loss of a batch; without targets the networks alone count."""
        losses = self.losses(outputs, inputs, targets)
        if self.balance == "uncertainty":
            return ((-self.log_variance).exp() * losses + self.log_variance).sum()
        if self.balance == "pcgrad" and self.training and losses.requires_grad:
            return _without_conflicts(losses, self._weights)
        return losses.sum()

    def losses(self, outputs: Outputs, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
        """The loss of each task."""
        said, _ = self.teacher(inputs)
        return torch.stack([self._of(head, outputs, said, targets) for head in self.heads])

    def _of(self, head: Head, outputs: Outputs, said: Outputs, targets: Tensor | None) -> Tensor:
        span = slice(*head.outputs)
        mine, theirs = outputs[span], said[span]
        learned = torch.stack(
            [
                output_loss(one.float(), other.float(), kind, self.temperature)
                for one, other, kind in zip(mine, theirs, head.kinds, strict=True)
                if kind.name != "none"
            ]
        ).mean()
        if head.labels is None or head.columns is None or targets is None:
            return learned
        labels: Tensor = head.labels(mine, (), _labels(head.columns, targets))
        return (1 - self.alpha) * labels + self.alpha * learned


def _labels(columns: Columns, targets: Tensor) -> Tensor:
    """A task's own of the targets of all, in the type that losses take."""
    own = targets[:, columns.start : columns.stop].reshape(len(targets), *columns.shape)
    return own.float() if "f" in columns.dtype else own.long()


def _without_conflicts(losses: Tensor, weights: Sequence[nn.Parameter]) -> Tensor:
    """A scalar with the value of the sum of losses and the gradient that PCGrad asks for.

    Only weights that all tasks share have gradients that can conflict; heads have one each.
    """
    count = len(losses)
    each = [torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) for loss in losses]
    shared = [place for place in range(len(weights)) if all(grads[place] is not None for grads in each)]
    if not shared:
        return losses.sum()
    flat = [torch.cat([_flat(grads[place]) for place in shared]) for grads in each]
    changed = torch.zeros_like(flat[0])
    for mine in range(count):
        gradient = flat[mine]
        for other in torch.randperm(count).tolist():
            against = torch.dot(gradient, flat[other])
            if other != mine and against < 0:
                gradient = gradient - against / flat[other].square().sum().clamp(min=_LEAST) * flat[other]
        changed = changed + gradient
    correction = changed - torch.stack(flat).sum(0)
    held = torch.cat([weights[place].reshape(-1) for place in shared])
    return losses.sum() + ((held - held.detach()) * correction).sum()


def _flat(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.detach().reshape(-1)
