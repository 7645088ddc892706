"""A student that is named and not given: a network of one of ``featherweight.nets``, built for the original.

``--student mobilenetv2:width=0.35`` takes what the original takes (channels and size of its pictures or
signals) and gives as many outputs. Its weights are fresh, drawn by the run's seed: it learns first, and
faster than a network that was trained before.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight import nets
from featherweight.errors import LoadError, nearest
from featherweight.exchange.load import model_of_module
from featherweight.exchange.weights import fit_weights, read_tensors
from featherweight.model import Model
from featherweight.tools.distill_check import inference, tensors

AUTO = "auto"
Kind = Literal["picture", "signal"]

_SPEC = re.compile(r"[A-Za-z][\w-]*(:.*=.*)?")
_AXES: Mapping[int, Kind] = {4: "picture", 3: "signal"}  # axes of a batch
_ONE = 1e-3  # how near to 1 the sums of probabilities are
_NAMES = "name one of its families, such as mobilenetv2:width=0.35, or give path.py:callable"


@dataclass(frozen=True)
class Task:
    """What a network of a family is built for.

    Attributes:
        kind: Of the input.
        channels: Of the input.
        resolution: Its other axes.
        classes: Numbers that it gives for an example.
        probabilities: They are probabilities of classes, not their logits.
    """

    kind: Kind
    channels: int
    resolution: tuple[int, ...]
    classes: int
    probabilities: bool

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families for such inputs."""
        return tuple(name for name, family in nets.FAMILIES.items() if family.inputs == self.kind)


def names_family(text: str) -> bool:
    """Whether a text is of the form ``family`` or ``family:width=0.35``, and neither code nor a file."""
    return _SPEC.fullmatch(text) is not None and not Path(text).exists()


def task_of(original: Model) -> Task:
    """What a family's network has to take and to give to stand where the original stands.

    Raises:
        LoadError: The original takes something else than one picture or signal, or gives something else than
            a row of numbers for each.
    """
    entry = original.entries["forward"]
    inputs = entry.example_inputs
    with inference(original.module):
        outputs = tensors(getattr(original.module, entry.method)(*entry.arguments(inputs)))
    if len(inputs) != 1 or inputs[0].dim() not in _AXES or not inputs[0].is_floating_point():
        raise LoadError(
            "a student of featherweight.nets takes one picture (channels, height, width) or signal "
            f"(channels, length) of floats, and the original takes {_told(inputs)}",
            fix="give a student of your own: --student path.py:callable",
        )
    if len(outputs) != 1 or outputs[0].dim() != 2 or not outputs[0].is_floating_point():
        raise LoadError(
            "a student of featherweight.nets gives one row of numbers for an example, and the original "
            f"gives {_told(outputs)}",
            fix="give a student of your own: --student path.py:callable",
        )
    _, channels, *sizes = inputs[0].shape
    return Task(
        _AXES[inputs[0].dim()], channels, tuple(sizes), outputs[0].shape[1], _are_probabilities(outputs[0])
    )


def build_student(spec: str, original: Model, *, weights: str | None = None, seed: int = 0) -> Model:
    """A family's network for the original's input and outputs.

    Args:
        spec: ``family``, or ``family:width=0.35,depth=0.5``.
        original: Where it shall stand.
        weights: A safetensors file or a state dict; None: fresh ones.
        seed: Of fresh weights.

    Raises:
        LoadError: There is no such family, it is for other inputs, or the weights do not fit.
        RecipeError: The spec's settings are out of their range.
    """
    name = spec.partition(":")[0]
    if name not in nets.FAMILIES:
        raise LoadError(
            f"the student '{spec}' is no file, no code and no family of featherweight.nets",
            fix=f"{nearest(name, nets.FAMILIES)} {_NAMES}",
        )
    task = task_of(original)
    if name not in task.families:
        raise LoadError(
            f"{name} is for a {nets.FAMILIES[name].inputs}, and the original takes a {task.kind} "
            f"({task.channels} x {' x '.join(map(str, task.resolution))})",
            fix=f"for a {task.kind}: {', '.join(task.families) or 'none'}",
        )
    module = module_of(spec, task, seed)
    if weights is not None:
        fit_weights(module, read_tensors(Path(weights)), source=weights, model=spec)
    arrays = tuple(value.numpy() for value in original.entries["forward"].example_inputs)
    return model_of_module(module, spec, arrays)


def module_of(spec: str, task: Task, seed: int) -> nn.Module:
    """The module with fresh weights.

    Raises:
        RecipeError: The spec's settings are out of their range.
    """
    sizes = task.resolution
    resolution = sizes[0] if len(set(sizes)) == 1 else sizes  # a square, or one axis
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: nn.Module = nets.build(spec, channels=task.channels, classes=task.classes, resolution=resolution)
    if not task.probabilities:
        return net
    return nn.Sequential(OrderedDict(net=net, softmax=nn.Softmax(1)))


def lesson_of(student: Model) -> dict[str, Any]:
    """Parameters of ``finetune`` that suit fresh weights, where they are not those of trained ones."""
    norms = any(isinstance(layer, _BatchNorm) for layer in student.module.modules())
    return {"learning_rate": 0.1 if norms else 1e-3, "weight_decay": 1e-4}


def _are_probabilities(outputs: Tensor) -> bool:
    sums = outputs.sum(1)
    return bool((outputs >= 0).all()) and outputs.shape[1] > 1 and bool((sums - 1).abs().max() < _ONE)


def _told(values: tuple[Tensor, ...]) -> str:
    """Types and shapes of an example in words: 'float32 (3, 32, 32)'."""
    said = [f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape[1:])}" for value in values]
    return " and ".join(said) or "nothing"
