"""Optimizers, learning rates over time and averaged weights for the one training loop.

Nesterov momentum, AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), and a learning rate that rises
linearly over the first steps and then follows half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983)::

    rate(t) = peak * (t + 1) / warm                                       t < warm
    rate(t) = peak * (1 + cos(pi * (t - warm) / (steps - warm))) / 2      t >= warm

Weight decay is for matrices and kernels: not for biases, nor for the gains of normalisations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

OptimizerName = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "linear", "constant"]

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.modules.instancenorm._InstanceNorm,
)


def rate_factor(step: int, steps: int, warmup: float, schedule: Schedule) -> float:
    """Share of the peak learning rate at a step.

    Args:
        step: Counted from 0.
        steps: Of the whole training.
        warmup: Share of the steps in which the rate rises.
        schedule: What follows.
    """
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(steps - warm, 1)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if schedule == "linear" else 1.0


def parameter_groups(
    module: nn.Module, decay: float, slow: Iterable[nn.Parameter] = (), slow_rate: float = 0.0
) -> list[dict[str, Any]]:
    """The parameters that train, in groups: those with weight decay, those without, and slow ones.

    Without decay are norms, biases and whatever else has one axis or none.
    """
    apart = {id(one): one for one in slow if one.requires_grad}
    norms = {id(one) for layer in module.modules() if isinstance(layer, _NORMS) for one in layer.parameters()}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad and id(parameter) not in apart:
            (others if parameter.ndim < 2 or id(parameter) in norms else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
        {"params": list(apart.values()), "weight_decay": 0.0, "lr": slow_rate},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    module: nn.Module,
    name: OptimizerName,
    rate: float,
    *,
    momentum: float,
    decay: float,
    slow: Iterable[nn.Parameter] = (),
    slow_rate: float = 0.0,
) -> torch.optim.Optimizer:
    """An optimizer over the parameters of a module that train.

    Args:
        module: Holds at least one.
        name: ``sgd`` (with Nesterov momentum) or ``adamw``.
        rate: Peak learning rate.
        momentum: For ``sgd``; for ``adamw`` the first beta.
        decay: Weight decay.
        slow: Parameters with a rate of their own and without decay, such as step sizes.
        slow_rate: Their peak rate.
    """
    groups = parameter_groups(module, decay, slow, slow_rate)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=momentum > 0)
    return torch.optim.AdamW(groups, lr=rate, betas=(momentum, 0.999))


class Average:
    """Exponential moving average of what a module's state holds, after ``steps`` updates::

        average <- d * average + (1 - d) * value,   d = min(decay, (1 + steps) / (10 + steps))

    so that the first weights count less and less (as in Polyak & Juditsky 1992 for the tail). Whole numbers
    and buffers are taken as they are.

    Args:
        module: What is averaged.
        decay: Of the average.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._module = module
        self.steps = 0
        self.values = {name: one.detach().clone() for name, one in self._trained()}

    def _trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        return ((name, one) for name, one in self._module.named_parameters() if one.requires_grad)

    @torch.no_grad()
    def update(self) -> None:
        """Take one step's values in."""
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        values = dict(self._trained())
        torch._foreach_lerp_(
            [self.values[name] for name in values], [one.detach() for one in values.values()], 1 - decay
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"steps": self.steps, "values": self.values}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.steps = state["steps"]
        with torch.no_grad():
            for name, value in state["values"].items():
                self.values[name].copy_(value)

    def into(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A module's state with averaged parameters."""
        return {name: self.values.get(name, value) for name, value in state.items()}
