"""Which values of a tensor stay when the others become zero: ranks, patterns, schedules and gates.

- The values of largest score stay (Han et al. 2015, arXiv:1506.02626), all told exactly as many as asked.
- In a pattern N:M, N of every M neighbours along the inputs stay (Mishra et al. 2021, arXiv:2104.08378); in
  blocks RxC, whole blocks of R outputs by C inputs do.
- The sparsity rises from zero to s with the share f of the training (Zhu and Gupta 2017, arXiv:1710.01878)::

    s_f = s (1 - (1 - f)³)

- Hard-concrete gates z of logits a are zero with a probability that can be trained (Louizos et al. 2018,
  arXiv:1712.01312), u uniform, beta = 2/3, gamma = -0.1, zeta = 1.1::

    z = clamp(sigmoid((log u - log(1 - u) + a) / beta) (zeta - gamma) + gamma, 0, 1)
    P(z > 0) = sigmoid(a - beta log(-gamma / zeta))
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1
_OPEN = 1e-6  # how near to its ends a uniform number comes
_LEAST = 2  # neighbours, and axes of a weight


@dataclass(frozen=True)
class Pattern:
    """What becomes zero together.

    Attributes:
        keep: Of each ``of`` neighbours along the inputs so many stay; 0: no such rule.
        of: How many neighbours.
        rows: Outputs of a block.
        columns: Inputs of a block.
    """

    keep: int = 0
    of: int = 0
    rows: int = 1
    columns: int = 1

    @property
    def sparsity(self) -> float | None:
        """The one that the pattern has; None: any."""
        return 1 - self.keep / self.of if self.of else None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight can have the pattern."""
        return not self.of or (len(shape) >= _LEAST and shape[1] % self.of == 0)


ANY = Pattern()


def pattern_of(text: str) -> Pattern:
    """The pattern that 'none', '2:4' or '4x1' names.

    Raises:
        ValueError: It names none.
    """
    if text == "none":
        return ANY
    some = re.fullmatch(r"(\d+):(\d+)", text)
    if some and 0 < int(some[1]) < int(some[2]):
        return Pattern(keep=int(some[1]), of=int(some[2]))
    block = re.fullmatch(r"(\d+)x(\d+)", text)
    if block and int(block[1]) * int(block[2]) > 1:
        return Pattern(rows=int(block[1]), columns=int(block[2]))
    raise ValueError(f"'{text}' is no pattern: write none, N:M as 2:4, or blocks RxC as 4x1")


def largest(scores: Tensor, sparsity: float, pattern: Pattern = ANY) -> Tensor:
    """True for the values that stay.

    Args:
        scores: What counts; any shape, a weight's for patterns.
        sparsity: Fraction that becomes zero, to the nearest value or block; of a pattern N:M the fraction of
            each group, to the nearest value.
        pattern: What becomes zero together.
    """
    if pattern.of:
        return _of_neighbours(scores, pattern, sparsity)
    if pattern.rows * pattern.columns == 1:
        return _highest(scores.flatten(), sparsity).reshape(scores.shape)
    blocks = block_sums(scores, pattern)
    kept = _highest(blocks.flatten(), sparsity).reshape(blocks.shape)
    return spread(kept, scores.shape, pattern)


def block_sums(scores: Tensor, pattern: Pattern) -> Tensor:
    """Scores of blocks: sums over R outputs by C inputs, (outputs / R, inputs / C, *kernel), rounded up."""
    outputs, inputs, *rest = scores.shape
    high, wide = -(-outputs // pattern.rows), -(-inputs // pattern.columns)
    whole = scores.new_zeros(high * pattern.rows, wide * pattern.columns, *rest)
    whole[:outputs, :inputs] = scores
    return whole.reshape(high, pattern.rows, wide, pattern.columns, *rest).sum((1, 3))


def spread(blocks: Tensor, shape: torch.Size, pattern: Pattern) -> Tensor:
    """Every value's block."""
    each = blocks.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.columns, 1)
    return each[: shape[0], : shape[1]]


def _highest(scores: Tensor, sparsity: float) -> Tensor:
    """All but the lowest; of equal ones the first go."""
    zeros = round(sparsity * scores.numel())
    kept = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.argsort(stable=True)[:zeros]] = False
    return kept


def _of_neighbours(scores: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    if not pattern.fits(tuple(scores.shape)):
        raise ValueError(f"{tuple(scores.shape)} does not hold groups of {pattern.of} inputs")
    last = scores.movedim(1, -1)
    groups = last.reshape(-1, pattern.of)
    zeros = min(round(sparsity * pattern.of), pattern.of - pattern.keep)
    kept = torch.ones_like(groups, dtype=torch.bool)
    kept.scatter_(1, groups.argsort(dim=1, stable=True)[:, :zeros], False)
    return kept.reshape(last.shape).movedim(-1, 1).contiguous()


def cubic(sparsity: float, fraction: float) -> float:
    """The sparsity at a fraction of the way."""
    left = 1 - min(max(fraction, 0.0), 1.0)
    return sparsity * (1 - left**3)


# ---- gates


def drawn_gates(logits: Tensor) -> Tensor:
    """Gates in training: random, differentiable in the logits."""
    uniform = torch.rand_like(logits).clamp(_OPEN, 1 - _OPEN)
    noise = uniform.log() - (-uniform).log1p()
    return _stretched(((noise + logits) / _BETA).sigmoid())


def mean_gates(logits: Tensor) -> Tensor:
    """Gates at inference."""
    return _stretched(logits.sigmoid())


def open_chance(logits: Tensor) -> Tensor:
    """The probability that a gate in training is not zero."""
    return (logits - _BETA * math.log(-_GAMMA / _ZETA)).sigmoid()


def _stretched(s: Tensor) -> Tensor:
    return (s * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
