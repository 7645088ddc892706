"""MobileNetV2: inverted residuals with linear bottlenecks (Sandler et al. 2018, arXiv:1801.04381)."""

from __future__ import annotations

from torch import Tensor, nn

from featherweight.nets._inverted import InvertedResidual
from featherweight.nets._parts import (
    checked,
    conv_norm,
    fitted_strides,
    initialise,
    last_channels,
    repeats,
    scaled,
    side,
)

# How much a block widens, channels, blocks, stride.
_STAGES = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)
_LAST = 1280


class MobileNetV2(nn.Module):
    """Made by ``mobilenet_v2`` and ``efficientnet_lite``."""

    def __init__(
        self, stem: nn.Module, stages: list[nn.Module], last: nn.Module, head: nn.Linear, dropout: float
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.last = last
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.dropout(self.pool(self.last(self.stages(self.stem(x)))).flatten(1)))
        return result


def mobilenet_v2(
    *,
    width: float = 1.0,
    depth: float = 1.0,
    kernel: int | None = None,
    resolution: int | tuple[int, int] = 224,
    channels: int = 3,
    classes: int = 1000,
) -> nn.Module:
    """The network for pictures of a size.

    Args:
        width: Multiplier of the channels, as multiples of 8; the last convolution's 1,280 shrink below
            0.35 only.
        depth: Multiplier of the blocks of a stage.
        kernel: Of the depthwise convolutions; None: 3.
        resolution: Side, or sides, of the pictures; first strides are 1 where these are small.
        channels: Of the pictures.
        classes: Outputs.

    Raises:
        RecipeError: A setting is out of its range.
    """
    checked(
        "mobilenetv2",
        width=width,
        depth=depth,
        kernel=kernel,
        channels=channels,
        classes=classes,
        smallest=side(resolution),
    )
    strides = fitted_strides((2, *(stride for *_, stride in _STAGES)), resolution)
    before = scaled(32, width)
    stem = conv_norm(channels, before, 3, strides[0], act=nn.ReLU6())
    stages: list[nn.Module] = []
    for (widens, base, count, _), first in zip(_STAGES, strides[1:], strict=True):
        after, blocks = scaled(base, width), []
        for index in range(repeats(count, depth)):
            stride = first if index == 0 else 1
            blocks.append(InvertedResidual(before, before * widens, after, kernel or 3, stride, nn.ReLU6))
            before = after
        stages.append(nn.Sequential(*blocks))
    wide = last_channels(_LAST, width)
    last = conv_norm(before, wide, act=nn.ReLU6())
    net = MobileNetV2(stem, stages, last, nn.Linear(wide, classes), 0.2)
    initialise(net)
    return net
