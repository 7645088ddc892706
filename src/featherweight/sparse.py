"""A format of tensors some of whose values are zero.

::

    x ≈ x * mask

A runtime stores the zeros as it stores any value, so they shrink nothing by themselves: they help a
compressed download, and kernels that skip a pattern (2:4 on sparse tensor cores).
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from featherweight.masks import cubic, drawn_gates, largest, mean_gates, open_chance, pattern_of
from featherweight.straight_through import straight_through

_STEP = 0.005  # of the training, between two masks
_GAIN = 100.0  # logits of gates per score, so that rates which suit other formats open and close them


@dataclass(frozen=True, eq=False)
class Sparse:
    """Zeros where the mask is false.

    Attributes:
        mask: True for the values that stay; bool, of the tensor's shape.
        sparsity: Fraction of zeros that training ends with.
        pattern: 'none', 'N:M' or 'RxC' (``masks.pattern_of``).
        schedule: ``cubic``: training begins dense and reaches the sparsity at ``end``.
        end: Share of the training after which the mask stays.
        by: What ranks values in training: their ``magnitude``; ``scores`` that stay as they are, or are
            learned by their gradient (``movement``, Sanh et al. 2020, arXiv:2005.07683); ``gates``.
        scores: Of the tensor's shape, where not magnitudes rank; of gates a hundredth of their logits.
        rate: Of the penalty for each gate that is open.
        final: The mask does not change any more.
        at: The share of the training that the mask is of.
        regrow: Values ranked by magnitude or by scores learn while they are zero, and may come back.
    """

    mask: Tensor
    sparsity: float
    pattern: str = "none"
    schedule: Literal["none", "cubic"] = "none"
    end: float = 0.7
    by: Literal["magnitude", "scores", "movement", "gates"] = "magnitude"
    scores: Tensor | None = None
    rate: float = 0.0
    final: bool = True
    at: float = -1.0
    regrow: bool = True

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool:
            raise ValueError(f"a mask is true or false, not {self.mask.dtype}")
        if not 0 <= self.sparsity < 1 or not 0 < self.end <= 1:
            raise ValueError("a sparsity is at least 0 and below 1, an end above 0 and at most 1")
        if self.scores is None and self.by != "magnitude" and not self.final:
            raise ValueError(f"values are ranked by {self.by}, and there are no scores")
        if self.scores is not None and self.scores.shape != self.mask.shape:
            raise ValueError(f"scores {tuple(self.scores.shape)} are no {tuple(self.mask.shape)} as the mask")
        pattern_of(self.pattern)

    @property
    def width(self) -> int:
        return 32

    def project(self, x: Tensor) -> Tensor:
        """Zeros put in. Where the mask may change yet, values that are zero may have a gradient too."""
        if x.shape != self.mask.shape:
            raise ValueError(f"a mask of {tuple(self.mask.shape)} is no mask of {tuple(x.shape)}")
        mask = self.mask.to(x.device)
        if self.by == "gates" and self.scores is not None:
            learning = self.scores.requires_grad and torch.is_grad_enabled() and not self.final
            logits = _GAIN * self.scores
            return x * (drawn_gates(logits) if learning else mean_gates(logits) * mask).to(x.dtype)
        if self.final:
            return x * mask
        if self.by == "movement":
            assert self.scores is not None
            return x * straight_through(mask.to(x.dtype), self.scores.to(x.dtype))
        return straight_through((x * mask).detach(), x) if self.regrow else x * mask

    def penalty(self) -> Tensor | None:
        """What open gates add to the loss: the rate times their expected number."""
        if self.by != "gates" or self.final:
            return None
        assert self.scores is not None
        return self.rate * open_chance(_GAIN * self.scores).sum()

    def advanced(self, value: Tensor, fraction: float) -> Sparse:
        """The format at a fraction of the training.

        Args:
            value: The tensor that it is of.
            fraction: From 0 to 1.
        """
        if self.final or (self.at >= 0 and 0 <= fraction - self.at < _STEP and fraction < self.end):
            return self
        end = 1.0 if self.by == "gates" else self.end  # gates draw as long as they learn
        share = fraction / self.end if self.schedule == "cubic" else 1.0
        scores = value.abs() if self.scores is None else self.scores.detach()
        mask = largest(scores, cubic(self.sparsity, share), pattern_of(self.pattern))
        if self.by == "gates":
            mask = mask & (mean_gates(_GAIN * scores) > 0)
        return replace(self, mask=mask, at=fraction, final=fraction >= end)

    def settled(self) -> Sparse:
        """What is stored in the end: the mask stays, and what ranked values is gone."""
        return replace(self, scores=None, final=True)

    def stored_bytes(self, elements: int) -> int:
        """Bytes of a dense tensor: no runtime leaves out zeros."""
        return 4 * elements

    def bits(self, elements: int) -> float:
        return 32.0

    def learned(self) -> dict[str, Tensor]:
        learns = self.by in ("movement", "gates") and not self.final
        return {"scores": self.scores} if learns and self.scores is not None else {}

    def with_learned(self, values: Mapping[str, Tensor]) -> Sparse:
        return replace(self, scores=values["scores"]) if values else self


def zeros_alone(chain: Iterable[object]) -> bool:
    """Whether formats only put zeros in, so that another one may follow them."""
    return all(isinstance(fmt, Sparse) for fmt in chain)


def encode_sparse(fmt: Sparse) -> dict[str, Any]:
    """A format as JSON data: a bit for each value of the mask, scores as they are in memory, in base 64."""
    data = {one.name: getattr(fmt, one.name) for one in fields(fmt) if one.name not in ("mask", "scores")}
    bits = np.packbits(fmt.mask.cpu().numpy())
    data |= {"kind": Sparse.__name__, "shape": list(fmt.mask.shape), "mask": _text(bits.tobytes())}
    scores = None if fmt.scores is None else fmt.scores.detach().cpu().numpy().astype("<f4")
    return {**data, "scores": None if scores is None else _text(scores.tobytes())}


def decode_sparse(data: Mapping[str, Any]) -> Sparse:
    """The format that :func:`encode_sparse` wrote."""
    values = {name: value for name, value in data.items() if name not in ("kind", "shape", "mask", "scores")}
    shape, count = data["shape"], math.prod(data["shape"])
    packed = np.frombuffer(base64.b64decode(data["mask"]), np.uint8)
    mask = torch.from_numpy(np.unpackbits(packed, count=count).astype(bool)).reshape(shape)
    scores = None
    if data["scores"] is not None:
        scores = np.frombuffer(base64.b64decode(data["scores"]), "<f4").astype(np.float32)
    return Sparse(mask, scores=None if scores is None else torch.from_numpy(scores).reshape(shape), **values)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
