"""The order of images in memory: channels last where the network can take it, for faster convolutions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

_IMAGES = 4  # axes
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def layout(net: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
    """Order a network's weights in place, and tell how its inputs are to be ordered.

    Args:
        net: Takes these inputs, gives a tuple of tensors. It stays as it is without convolutions, and when a
            call in the other order fails (a view of what is not contiguous) or gives something else.
        inputs: A few examples.

    Returns:
        Orders one input.
    """
    if not any(isinstance(layer, _CONVOLUTIONS) for layer in net.modules()):
        return _as_it_is
    net.eval()
    with torch.no_grad():
        plain = net(*inputs)
        _order(net, torch.channels_last)
        with contextlib.suppress(RuntimeError):
            changed = net(*(_channels_last(one) for one in inputs))
            if all(torch.allclose(a, b, 1e-3, 1e-3) for a, b in zip(plain, changed, strict=True)):
                return _channels_last
        _order(net, torch.contiguous_format)
    return _as_it_is


def _order(net: nn.Module, order: torch.memory_format) -> None:
    for value in (*net.parameters(), *net.buffers()):
        if value.ndim == _IMAGES:
            value.data = value.data.contiguous(memory_format=order)


def _channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == _IMAGES else value


def _as_it_is(value: Tensor) -> Tensor:
    return value
