"""ShuffleNetV1: grouped pointwise convolutions, channels shuffled (Zhang et al. 2017, arXiv:1707.01083)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from featherweight.errors import RecipeError
from featherweight.nets._parts import checked, conv_norm, fitted_strides, initialise, repeats, side

# Groups -> channels of the first stage; each next stage has twice as many.
_CHANNELS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}
_BLOCKS = (4, 8, 4)
_STEM = 24


class _Unit(nn.Module):
    """Grouped pointwise, shuffle, depthwise, grouped pointwise."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, kernel: int, stride: int, groups: tuple[int, int]
    ) -> None:
        super().__init__()
        self.groups = groups[1]
        self.compress = conv_norm(inputs, hidden, groups=groups[0], act=nn.ReLU())
        self.depthwise = conv_norm(hidden, hidden, kernel, stride, groups=hidden)
        self.expand = conv_norm(hidden, outputs, groups=groups[1])
        self.act = nn.ReLU()

    def branch(self, x: Tensor) -> Tensor:
        y = self.compress(x)
        result: Tensor = self.expand(self.depthwise(shuffled(y, self.groups) if self.groups > 1 else y))
        return result


class _Added(_Unit):
    """The branch is added to what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(x + self.branch(x))
        return result


class _Joined(_Unit):
    """The branch stands beside what comes in, which is pooled where the branch has a stride."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, kernel: int, stride: int, groups: tuple[int, int]
    ) -> None:
        super().__init__(inputs, hidden, outputs - inputs, kernel, stride, groups)
        self.shortcut = nn.AvgPool2d(3, 2, 1) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(torch.cat([self.shortcut(x), self.branch(x)], 1))
        return result


class ShuffleNetV1(nn.Module):
    """Made by ``shufflenet_v1``."""

    def __init__(self, stem: nn.Module, stages: list[nn.Module], channels: int, classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.pool(self.stages(self.stem(x))).flatten(1))
        return result


def shuffled(x: Tensor, groups: int) -> Tensor:
    """The first channel of each group, then the second of each, and so on."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet_v1(
    *,
    groups: int = 3,
    width: float = 1.0,
    depth: float = 1.0,
    kernel: int | None = None,
    resolution: int | tuple[int, int] = 224,
    channels: int = 3,
    classes: int = 1000,
) -> nn.Module:
    """The network for pictures of a size.

    Args:
        groups: Of the pointwise convolutions: 1, 2, 3, 4 or 8.
        width: Multiplier of the channels; the paper has 1, 0.5 and 0.25, its table 2 and 1.5 besides.
        depth: Multiplier of the blocks of a stage.
        kernel: Of the depthwise convolutions; None: 3.
        resolution: Side, or sides, of the pictures; first strides are 1 where these are small.
        channels: Of the pictures.
        classes: Outputs.

    Raises:
        RecipeError: A setting is out of its range.
    """
    checked(
        "shufflenetv1",
        width=width,
        depth=depth,
        kernel=kernel,
        channels=channels,
        classes=classes,
        smallest=side(resolution),
    )
    if groups not in _CHANNELS:
        raise RecipeError(
            f"shufflenetv1: groups is {groups}", fix="groups of 1, 2, 3, 4 or 8, as in the paper"
        )
    strides = fitted_strides((2, 2, 2, 2, 2), resolution)
    before = 2 * _STEM if width >= 2 else max(_STEM // 2, _STEM * min(width, 1.0))
    before = groups * math.ceil(before / groups)
    pool = [nn.MaxPool2d(3, 2, 1)] if strides[1] == 2 else []
    stem = nn.Sequential(conv_norm(channels, before, 3, strides[0], act=nn.ReLU()), *pool)
    stages: list[nn.Module] = []
    unit = 4 * groups  # of channels: the bottleneck has a quarter, in whole groups
    for index, (count, stride) in enumerate(zip(_BLOCKS, strides[2:], strict=True)):
        after = max(1, round(_CHANNELS[groups] * width / unit)) * 2**index * unit
        blocks: list[nn.Module] = []
        for number in range(repeats(count, depth)):
            first = 1 if index == number == 0 else groups
            kind, step = (_Added, 1) if number else (_Joined, stride)
            blocks.append(kind(before, after // 4, after, kernel or 3, step, (first, groups)))
            before = after
        stages.append(nn.Sequential(*blocks))
    net = ShuffleNetV1(stem, stages, before, classes)
    initialise(net)
    return net
