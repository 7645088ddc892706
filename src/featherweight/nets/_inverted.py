"""The inverted residual of MobileNetV2, as MobileNetV3 and EfficientNet-Lite have it too.

A pointwise convolution widens, a depthwise one mixes positions, gates may scale the channels, and a pointwise
one without an activation narrows again; a skip joins both ends where they have one shape (Sandler et al.
2018, arXiv:1801.04381; the gates: Hu et al. 2018, arXiv:1709.01507).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from featherweight.nets._parts import conv_norm, scaled


class InvertedResidual(nn.Module):
    """One block.

    Args:
        inputs: Channels that come in.
        hidden: Channels of the depthwise convolution; as many as come in: nothing is widened.
        outputs: Channels that go out.
        kernel: Of the depthwise convolution.
        stride: Of the depthwise convolution.
        act: Makes an activation.
        gated: Whether gates scale the hidden channels.
        eps: Of the batch norms.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        kernel: int,
        stride: int,
        act: Callable[[], nn.Module],
        *,
        gated: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        widens = hidden != inputs
        self.expand = conv_norm(inputs, hidden, act=act(), eps=eps) if widens else nn.Identity()
        self.depthwise = conv_norm(hidden, hidden, kernel, stride, groups=hidden, act=act(), eps=eps)
        self.gate = Gate(hidden) if gated else nn.Identity()
        self.project = conv_norm(hidden, outputs, eps=eps)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.gate(self.depthwise(self.expand(x))))
        result: Tensor = x + y if self.residual else y
        return result


class Gate(nn.Module):
    """Squeeze and excite: each channel times a number in 0..1 that the means of all channels decide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = scaled(channels / 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.ReLU()
        self.excite = nn.Conv2d(squeezed, channels, 1)
        self.bound = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x * self.bound(self.excite(self.act(self.reduce(self.pool(x)))))
        return result
