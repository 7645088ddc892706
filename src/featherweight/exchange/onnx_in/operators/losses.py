"""Losses that a training graph leaves in a file."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError


def _reduction(node: Node) -> str:
    kind = node.text("reduction", "mean")
    if kind not in ("none", "mean", "sum"):
        raise UnsupportedError(f"its reduction is '{kind}'")
    return kind


def _ignored(node: Node) -> int:
    """A class that no tensor of classes has, unless the node names one."""
    return node.integer("ignore_index", -(1 << 31))


def _negative_log_likelihood(node: Node) -> Call:
    kind, ignored = _reduction(node), _ignored(node)

    def run(scores: Tensor, classes: Tensor, weight: Tensor | None) -> Tensor:
        return F.nll_loss(scores, classes.to(torch.int64), weight, ignore_index=ignored, reduction=kind)

    return Call(run, inputs=(0, 1, 2))


def _cross_entropy(node: Node) -> Call:
    kind, ignored = _reduction(node), _ignored(node)

    def run(scores: Tensor, classes: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        logs = F.log_softmax(scores, 1)
        loss = F.nll_loss(logs, classes.to(torch.int64), weight, ignore_index=ignored, reduction=kind)
        return loss, logs

    return Call(run, inputs=(0, 1, 2))


ENTRIES: dict[str, Entry] = {
    "NegativeLogLikelihoodLoss": _negative_log_likelihood,
    "SoftmaxCrossEntropyLoss": _cross_entropy,
}
