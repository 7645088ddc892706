"""Objectives: what training makes small, found from the targets unless the user names a loss of their own.

Cross entropy for integer classes, with label smoothing e (Szegedy et al. 2016, arXiv:1512.00567)::

    loss = -(1 - e) log p[target] - e / C * sum over classes of log p

binary cross entropy for targets of zeros and ones, the mean squared error for other real ones. What a
network gives may be scores, or probabilities where it ends with a softmax or a sigmoid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from featherweight.data import Data
from featherweight.errors import DataError, RecipeError, UserError
from featherweight.graph import trace
from featherweight.model import Model
from featherweight.usercode import call_user, defined_at, load_callable

Outputs = tuple[Tensor, ...]
Ending = Literal["scores", "probabilities", "log_probabilities"]
_ENDINGS: dict[str, Ending] = {
    "softmax": "probabilities",
    "sigmoid": "probabilities",
    "log_softmax": "log_probabilities",
}
_SMALLEST = 1e-7  # a probability whose logarithm is taken
_IMAGE_DIMS = 4  # maps of scores hold the classes on axis 1, sequences on the last one
_REAL_METRICS = frozenset({"mse", "mae", "pearson", "sqnr"})


class Net(Protocol):
    """What an objective may ask of the network in training (tools/simulated.py)."""

    seen: dict[str, Tensor]

    def __call__(self, *inputs: Tensor) -> Outputs: ...

    def watch(self, layers: Any) -> None:
        """Keep these layers' outputs of the last call in ``seen``."""
        ...


class Objective(nn.Module):
    """A loss; may own parameters, which are then trained with the network."""

    def attach(self, net: Net) -> None:
        """Called once before training, e.g. to watch layers."""

    def advance(self, share: float) -> None:
        """Called before each update with how far training is, from 0 to 1."""

    def forward(self, outputs: Outputs, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
        """The loss of a batch, a scalar: the mean over its examples."""
        raise NotImplementedError

    def step(self, net: Net, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
        """Run the network on a batch and give the loss."""
        loss: Tensor = self(net(*inputs), inputs, targets)
        return loss


class TaskLoss(Objective):
    """The loss that fits the targets; see the top of this file.

    Args:
        smoothing: Share of the target that is spread over all classes.
        ending: What the network's outputs are.
        real: Targets are values, not classes, whatever their type.
        binary: Real targets are zeros and ones.
        highest: Largest class among the targets.
    """

    def __init__(
        self,
        smoothing: float = 0.0,
        ending: Ending = "scores",
        *,
        real: bool = False,
        binary: bool = False,
        highest: int = 0,
    ) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.ending = ending
        self.real = real
        self.binary = binary
        self.highest = highest

    def forward(self, outputs: Outputs, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
        """Of the first output.

        Raises:
            DataError: There are no targets, or they do not fit the output.
        """
        if targets is None:
            raise no_labels()
        output = outputs[0]
        if self.real or targets.is_floating_point():
            return self._of_values(output, targets.to(output.dtype))
        if output.ndim == targets.ndim + 1 and output.shape[1] > 1:
            return self._of_classes(*_classes_first(output, targets), targets)
        if output.numel() == targets.numel() and self.highest <= 1:
            return self._binary(output.reshape(targets.shape), targets.to(output.dtype))
        raise _misfit(output, targets)

    def _of_classes(self, output: Tensor, classes: Tensor, given: Tensor) -> Tensor:
        if self.highest >= output.shape[1]:
            raise DataError(
                f"the targets hold class {self.highest}, and the network has {output.shape[1]} classes",
                fix="number the classes from 0, in the order of the network's outputs",
            )
        scores = output
        if self.ending == "probabilities":  # the softmax of their logarithms is what they are
            scores = output.clamp(min=_SMALLEST).log()
        return functional.cross_entropy(scores.float(), classes, label_smoothing=self.smoothing)

    def _of_values(self, output: Tensor, targets: Tensor) -> Tensor:
        if output.numel() != targets.numel() or output.shape[0] != targets.shape[0]:
            raise _misfit(output, targets)
        output = output.reshape(targets.shape)
        return self._binary(output, targets) if self.binary else functional.mse_loss(output, targets)

    def _binary(self, output: Tensor, targets: Tensor) -> Tensor:
        smooth = targets.float() * (1 - self.smoothing) + self.smoothing / 2
        if self.ending == "scores":
            return functional.binary_cross_entropy_with_logits(output.float(), smooth)
        likely = output.float().exp() if self.ending == "log_probabilities" else output.float()
        likely = likely.clamp(_SMALLEST, 1 - _SMALLEST)
        return -(smooth * likely.log() + (1 - smooth) * (1 - likely).log()).mean()


class UserLoss(Objective):
    """A user's ``loss(outputs, targets)``: the output, or the tuple of them where there are several."""

    def __init__(self, function: Callable[..., Any], error: type[UserError] = RecipeError) -> None:
        super().__init__()
        self._function, self._error = function, error

    def forward(self, outputs: Outputs, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
        """What the function gives.

        Raises:
            DataError: There are no targets.
            UserError: The function raises, or gives no scalar.
        """
        if targets is None:
            raise no_labels()
        given = outputs[0] if len(outputs) == 1 else outputs
        return _scalar(call_user(self._function, given, targets, error=self._error), self._function)


class UserStep(Objective):
    """A user's ``training_step(module, batch)`` with ``batch = (inputs, targets)``.

    The module is called with inputs and gives its output; both are a tensor, or a tuple of several.
    Targets are None where there are no labels.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, outputs: Outputs, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
        """The loss on a network that gives these outputs whatever it is called with."""
        return self._call(lambda *_: outputs, inputs, targets)

    def step(self, net: Net, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
        """What the function gives.

        Raises:
            RecipeError: It raises, or gives no scalar.
        """
        return self._call(net, inputs, targets)

    def _call(
        self, net: Callable[..., Outputs], inputs: tuple[Tensor, ...], targets: Tensor | None
    ) -> Tensor:
        def module(*given: Tensor) -> Tensor | Outputs:
            outputs = net(*given)
            return outputs[0] if len(outputs) == 1 else outputs

        batch = (inputs[0] if len(inputs) == 1 else inputs, targets)
        return _scalar(call_user(self._function, module, batch, error=RecipeError), self._function)


def task_objective(
    model: Model,
    data: Data,
    *,
    loss: str | None = None,
    training_step: str | None = None,
    smoothing: float = 0.0,
    entry: str = "forward",
) -> Objective | None:
    """The objective of the labels; None where there are none.

    Args:
        model: Whose outputs are compared with the targets.
        data: Its training targets and metric tell which loss fits, unless ``Data.loss`` is one.
        loss: ``path.py:callable`` of the user's.
        training_step: Likewise; takes the place of any loss.
        smoothing: Of labels.
        entry: Which way of calling the model.

    Raises:
        RecipeError: The user's file has no such callable.
        DataError: Targets are texts, which no loss here takes.
    """
    if training_step is not None:
        return UserStep(load_callable(training_step, RecipeError))
    if data.train is None or data.train.targets is None:
        return None
    if loss is not None:
        return UserLoss(load_callable(loss, RecipeError))
    if data.loss is not None:
        return UserLoss(data.loss, DataError)
    targets = data.train.targets
    if targets.dtype.kind == "U":
        raise DataError(
            "the training targets are texts, and no loss compares outputs with texts",
            fix="loss: path.py:callable with integer targets, or a teacher",
        )
    real = targets.dtype.kind == "f" or (data.has_metric and data.metric.name in _REAL_METRICS)
    return TaskLoss(
        smoothing,
        _ending(model, entry),
        real=real,
        binary=targets.dtype.kind in "fb" and bool(np.isin(targets, (0, 1)).all()),
        highest=0 if real or not targets.size else int(targets.max()),
    )


def no_labels() -> DataError:
    """What is said where a loss has no labels to compare with."""
    return DataError(
        "training needs labels, and the training examples have none",
        fix="add y_train to the data, or learn from a teacher: teacher: original",
    )


def _ending(model: Model, entry: str) -> Ending:
    """Whether the first output is made by a softmax or a sigmoid."""
    graph = trace(model, entry)
    last = graph.producer.get(graph.outputs[0]) if graph.outputs else None
    return _ENDINGS.get("" if last is None else last.op, "scores")


def _classes_first(output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Scores with the classes on axis 1, as cross entropy reads them, and the targets."""
    first = output.shape[:1] + output.shape[2:] == targets.shape
    last = output.shape[:-1] == targets.shape
    if first and (not last or output.ndim == 2 or output.ndim >= _IMAGE_DIMS):
        return output, targets
    if last:
        return output.flatten(0, -2), targets.flatten()
    raise _misfit(output, targets)


def _misfit(output: Tensor, targets: Tensor) -> DataError:
    return DataError(
        f"no loss fits outputs of shape {tuple(output.shape)} and {targets.dtype} targets of shape "
        f"{tuple(targets.shape)}",
        fix="give targets (N,) of classes for outputs (N, classes), values of the outputs' shape, "
        "or loss: path.py:callable",
    )


def _scalar(loss: Any, function: Callable[..., Any]) -> Tensor:
    """A user's loss, checked."""
    where, fix = defined_at(function), "return a tensor of one number, such as errors.mean()"
    if not isinstance(loss, Tensor):
        raise RecipeError(f"the loss is of type {type(loss).__name__}, not a tensor", where=where, fix=fix)
    if loss.numel() != 1:
        raise RecipeError(
            f"the loss has shape {tuple(loss.shape)}, and one number is needed", where=where, fix=fix
        )
    if not loss.is_floating_point() or (torch.is_grad_enabled() and not loss.requires_grad):
        raise RecipeError(
            "the loss does not depend on the network's outputs", where=where, fix="compute it with torch"
        )
    return loss.reshape(())
