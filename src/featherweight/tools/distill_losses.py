"""How far a student is from its teacher: outputs, feature maps, attention.

Soft targets: T^2 KL(softmax(t / T) || softmax(s / T)); T^2 keeps the gradient's size when T changes
(Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531). Outputs that are no class scores: mean squared
error, or 1 - cosine for unit vectors. Features: squared error of a projection of the student's, in variances
of the teacher's (Romero et al. 2015, https://arxiv.org/abs/1412.6550). Attention of feature maps: squared
distance of the normalised maps sum_c |A_c|^2 (Zagoruyko, Komodakis 2017, https://arxiv.org/abs/1612.03928).
Attention of tokens: KL of the relations softmax(A A^T / sqrt(d)) (Wang et al. 2021, MiniLMv2,
https://arxiv.org/abs/2012.15828).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from featherweight.data import Data
from featherweight.metrics import IGNORED, Perplexity

_LEAST = 1e-12
_ONE = 1e-3  # how near to 1 the sums of probabilities and the lengths of unit vectors are


@dataclass(frozen=True)
class OutputKind:
    """What a flat output holds.

    Attributes:
        name: ``logits`` or ``probabilities`` of classes along ``axis``, ``unit`` vectors along the last axis,
            other ``values``, or ``none``: nothing to learn from, such as indices.
        axis: Of the classes.
    """

    name: Literal["logits", "probabilities", "unit", "values", "none"]
    axis: int = 1


def output_kinds(outputs: Sequence[Tensor], data: Data) -> tuple[OutputKind, ...]:
    """What each output of a network holds.

    Args:
        outputs: Of the teacher, on a few examples.
        data: Its metric tells whether the first output scores classes, and on which axis.
    """
    return tuple(_kind(output, data if index == 0 else None) for index, output in enumerate(outputs))


def _kind(output: Tensor, data: Data | None) -> OutputKind:
    if not output.is_floating_point():
        return OutputKind("none")
    axis = None if data is None else _class_axis(output, data)
    if axis is not None:
        sums = output.sum(axis)
        if bool((output >= 0).all()) and bool((sums - 1).abs().max() < _ONE):
            return OutputKind("probabilities", axis)
    if output.dim() == 2 and output.shape[1] > 1 and bool((output.norm(dim=1) - 1).abs().max() < _ONE):
        return OutputKind("unit", -1)
    return OutputKind("values") if axis is None else OutputKind("logits", axis)


def _class_axis(output: Tensor, data: Data) -> int | None:
    if not data.has_metric:
        return 1 if output.dim() == 2 and output.shape[1] > 1 else None
    if isinstance(data.metric, Perplexity):
        return -1
    return 1 if data.metric.classes and output.dim() >= 2 else None


def output_loss(
    student: Tensor, teacher: Tensor, kind: OutputKind, temperature: float, targets: Tensor | None = None
) -> Tensor:
    """Distance of one output from the teacher's, a scalar.

    Args:
        student: With its gradient.
        teacher: Of the same shape.
        kind: What both hold.
        temperature: Softens class scores.
        targets: Where they are the label that cross entropy leaves out, nothing is learned.
    """
    if kind.name == "unit":
        return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()
    if kind.name == "values":
        return F.mse_loss(student, teacher)
    if kind.name == "probabilities":
        student, teacher = student.clamp(min=_LEAST).log(), teacher.clamp(min=_LEAST).log()
    return soft_target_loss(student, teacher, temperature, kind.axis, _counted(teacher, kind.axis, targets))


def soft_target_loss(
    student: Tensor, teacher: Tensor, temperature: float, axis: int = 1, counted: Tensor | None = None
) -> Tensor:
    """T^2 KL(teacher || student) of softened class scores, mean over examples and positions.

    Args:
        student: Logits, classes along ``axis``.
        teacher: Likewise.
        temperature: T.
        axis: Of the classes.
        counted: Which positions count, of the logits' shape without the classes; None: all.
    """
    ours = F.log_softmax(student / temperature, axis)
    theirs = F.log_softmax(teacher / temperature, axis)
    # where the teacher masks a class with -inf, it asks for nothing
    apart = torch.where(theirs.isneginf(), 0.0, theirs.exp() * (theirs - ours)).sum(axis)
    mean = apart.mean() if counted is None else apart[counted].sum() / counted.sum().clamp(min=1)
    return temperature**2 * mean


def _counted(logits: Tensor, axis: int, targets: Tensor | None) -> Tensor | None:
    """Positions whose label is not the one that is left out; None where labels are not of positions."""
    if targets is None or targets.is_floating_point():
        return None
    positions = logits.movedim(axis, -1).shape[:-1]
    return targets != IGNORED if tuple(targets.shape) == tuple(positions) else None


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of features, channels last, in variances of the teacher's: their mean gives 1."""
    flat = teacher.flatten(0, -2)
    spread = flat.var(0, correction=0).mean().clamp(min=_LEAST)
    return F.mse_loss(student, teacher) / spread


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of two maps' attention, channels last: the energy of each position, normalised."""
    return (_energy(student) - _energy(teacher)).square().sum(1).mean()


def _energy(features: Tensor) -> Tensor:
    return F.normalize(features.square().mean(-1).flatten(1), dim=1)


def relation_loss(student: Tensor, teacher: Tensor, heads: int = 1) -> Tensor:
    """KL of how tokens relate in two sequences (N, T, D) whose widths may differ, mean over tokens and heads.

    Args:
        student: Queries, keys, values, or hidden states.
        teacher: Likewise.
        heads: Into how many both are split; their widths are multiples of it.
    """
    ours, theirs = (_relations(one, heads) for one in (student, teacher))
    return (theirs.exp() * (theirs - ours)).sum(-1).mean()


def _relations(tokens: Tensor, heads: int) -> Tensor:
    split = tokens.reshape(*tokens.shape[:-1], heads, -1).transpose(-3, -2)
    scale: float = split.shape[-1] ** 0.5
    return F.log_softmax(split @ split.mT / scale, -1)
