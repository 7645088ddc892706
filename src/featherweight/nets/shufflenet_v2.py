"""ShuffleNetV2: half of the channels pass by, then all are shuffled (Ma et al. 2018, arXiv:1807.11164)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from featherweight.nets._parts import checked, conv_norm, fitted_strides, initialise, repeats, side
from featherweight.nets.shufflenet_v1 import shuffled

# Width -> channels of the first stage (each next one has twice as many), as in the paper's table 5.
_CHANNELS = ((0.0, 0.0), (0.5, 48.0), (1.0, 116.0), (1.5, 176.0), (2.0, 244.0))
_BLOCKS = (4, 8, 4)
_STEM, _LAST = 24, 1024


class _Unit(nn.Module):
    """One half passes by, the other one goes through the branch."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = _branch(half, half, kernel, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        return shuffled(torch.cat([kept, self.branch(changed)], 1), 2)


class _First(nn.Module):
    """The first unit of a stage: both halves come from all that comes in."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.shortcut = nn.Sequential(
            conv_norm(inputs, inputs, kernel, stride, groups=inputs), conv_norm(inputs, half, act=nn.ReLU())
        )
        self.branch = _branch(inputs, half, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        return shuffled(torch.cat([self.shortcut(x), self.branch(x)], 1), 2)


def _branch(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        conv_norm(inputs, outputs, act=nn.ReLU()),
        conv_norm(outputs, outputs, kernel, stride, groups=outputs),
        conv_norm(outputs, outputs, act=nn.ReLU()),
    )


class ShuffleNetV2(nn.Module):
    """Made by ``shufflenet_v2``."""

    def __init__(
        self, stem: nn.Module, stages: list[nn.Module], last: nn.Module, channels: int, classes: int
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.last = last
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.pool(self.last(self.stages(self.stem(x)))).flatten(1))
        return result


def shufflenet_v2(
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
        width: Multiplier of the channels; between the paper's 0.5, 1, 1.5 and 2 they grow evenly.
        depth: Multiplier of the blocks of a stage.
        kernel: Of the depthwise convolutions; None: 3.
        resolution: Side, or sides, of the pictures; first strides are 1 where these are small.
        channels: Of the pictures.
        classes: Outputs.

    Raises:
        RecipeError: A setting is out of its range.
    """
    checked(
        "shufflenetv2",
        width=width,
        depth=depth,
        kernel=kernel,
        channels=channels,
        classes=classes,
        smallest=side(resolution),
    )
    strides = fitted_strides((2, 2, 2, 2, 2), resolution)
    before = max(4, round(_STEM * min(1.0, 2 * width)))
    pool = [nn.MaxPool2d(3, 2, 1)] if strides[1] == 2 else []
    stem = nn.Sequential(conv_norm(channels, before, 3, strides[0], act=nn.ReLU()), *pool)
    stages: list[nn.Module] = []
    for index, (count, stride) in enumerate(zip(_BLOCKS, strides[2:], strict=True)):
        after = _first_channels(width) * 2**index
        blocks: list[nn.Module] = [_First(before, after, kernel or 3, stride)]
        blocks += [_Unit(after, kernel or 3) for _ in range(repeats(count, depth) - 1)]
        stages.append(nn.Sequential(*blocks))
        before = after
    wide = 2 * _LAST if width >= 2 else _LAST if width >= 0.5 else max(8, round(2 * width * _LAST))
    last = conv_norm(before, wide, act=nn.ReLU())
    net = ShuffleNetV2(stem, stages, last, wide, classes)
    initialise(net)
    return net


def _first_channels(width: float) -> int:
    """Along the lines between the paper's points, and the last of them beyond; a multiple of four."""
    for (low, few), (high, many) in pairwise(_CHANNELS):
        if width <= high or high == _CHANNELS[-1][0]:
            return max(4, 4 * round((few + (many - few) * (width - low) / (high - low)) / 4))
    raise AssertionError
