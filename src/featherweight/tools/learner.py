"""What is trained: a network with its objective.

::

    loss = objective(network(x), x, y) + penalty of the formats
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featherweight.tools.objectives import Objective
from featherweight.tools.simulated import Simulated
from featherweight.tools.training_examples import Batch


class Learner(nn.Module):
    """Network and objective as one module, whose output is the loss: what is distributed.

    Args:
        net: Gives outputs.
        objective: Compares them with targets.
    """

    def __init__(self, net: Simulated, objective: Objective) -> None:
        super().__init__()
        self.net = net
        self.objective = objective

    def forward(
        self,
        inputs: tuple[Tensor, ...],
        targets: Tensor | None,
        others: Tensor | None = None,
        share: float = 1.0,
    ) -> Tensor:
        """The loss of a batch (see ``Batch``), a scalar."""
        if others is None:
            loss = self.objective.step(self.net, inputs, targets)
        else:
            outputs = self.net(*inputs)
            loss = share * self.objective(outputs, inputs, targets)
            loss = loss + (1 - share) * self.objective(outputs, inputs, others)
        extra = self.net.penalty() if self.training else None
        return loss if extra is None else loss + extra


def leaves_some_out(learner: Learner, batch: Batch) -> bool:
    """Whether some parameters that train take no part in the loss, e.g. of a layer that is not called."""
    trained = [one for one in learner.parameters() if one.requires_grad]
    loss = learner.eval()(batch.inputs, batch.targets)
    return any(one is None for one in torch.autograd.grad(loss, trained, allow_unused=True))
