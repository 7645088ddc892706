"""Pads of convolutions and pools: what a layer does itself, and the rest as a pad before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from featherweight.exchange.onnx_in.node import Node, UnsupportedError, check_size

LARGEST = 1 << 16  # of a kernel, a stride or a pad; no layer has more, a hostile file may


@dataclass(frozen=True)
class Window:
    """How a convolution or a pool moves: one number per spatial axis, pads as (begin, end)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    same: str  # '', 'SAME_UPPER' or 'SAME_LOWER': pads follow the input's size

    @property
    def symmetric(self) -> bool:
        return not self.same and all(begin == end for begin, end in self.pads)

    def padding(self) -> tuple[int, ...]:
        return tuple(begin for begin, _ in self.pads)

    def before(self, value: float = 0.0) -> Callable[[Tensor], Tensor] | None:
        """The explicit pad; None when there is nothing to add."""
        if self.same:
            return partial(_pad_same, window=self, value=value)
        if not any(begin or end for begin, end in self.pads):
            return None
        return partial(pad_spatial, pads=self.pads, value=value)


def window_of(node: Node, kernel: Sequence[int], index: int = 0) -> Window:
    """Read strides, dilations, pads and auto_pad; a static SAME becomes numbers."""
    rank = len(kernel)
    strides = node.integers("strides") or (1,) * rank
    dilations = node.integers("dilations") or (1,) * rank
    flat = node.integers("pads") or (0,) * (2 * rank)
    if not (len(strides) == len(dilations) == rank and len(flat) == 2 * rank):
        raise UnsupportedError("strides, dilations or pads do not fit its number of axes")
    if any(not 1 <= item <= LARGEST for item in (*kernel, *strides, *dilations)):
        raise UnsupportedError("a kernel, stride or dilation is below 1 or absurd")
    if any(abs(item) > LARGEST for item in flat):
        raise UnsupportedError("a pad is absurd")
    pads = tuple(zip(flat[:rank], flat[rank:], strict=True))
    shape = node.shape(index)
    grown = [size + sum(pair) for size, pair in zip(shape[2:], pads, strict=False)]
    check_size([*shape[:2], *grown])
    same = node.text("auto_pad", "NOTSET")
    if same == "VALID":
        pads, same = ((0, 0),) * rank, ""
    elif same == "NOTSET":
        same = ""
    elif same not in ("SAME_UPPER", "SAME_LOWER"):
        raise UnsupportedError(f"auto_pad is '{same}'")
    if same and all(stride == 1 for stride in strides):  # then the pad does not depend on the size
        totals = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
        pads, same = tuple(_split(total, same) for total in totals), ""
    return Window(tuple(kernel), strides, dilations, pads, same)


def pad_spatial(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Pad the last axes; the first pair belongs to the first of them."""
    flat = [amount for pair in reversed(pads) for amount in pair]
    return F.pad(x, flat, value=value)


def _split(total: int, same: str) -> tuple[int, int]:
    small, large = total // 2, total - total // 2
    return (small, large) if same == "SAME_UPPER" else (large, small)


def _pad_same(x: Tensor, window: Window, value: float) -> Tensor:
    pads = []
    for axis, (k, s, d) in enumerate(zip(window.kernel, window.strides, window.dilations, strict=True)):
        size = x.shape[2 + axis]
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        pads.append(_split(total, window.same))
    return pad_spatial(x, pads, value)
