"""MobileNetV3: gates and hard-swish in the blocks of MobileNetV2 (Howard et al. 2019, arXiv:1905.02244)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

Size = Literal["small", "large"]


@dataclass(frozen=True)
class _Row:
    """A block of the paper's tables 1 and 2."""

    kernel: int
    hidden: int
    outputs: int
    gated: bool
    hard: bool  # hard-swish, else ReLU
    stride: int


_LARGE = (
    ((3, 16, 16, False, False, 1),),
    ((3, 64, 24, False, False, 2), (3, 72, 24, False, False, 1)),
    ((5, 72, 40, True, False, 2), (5, 120, 40, True, False, 1), (5, 120, 40, True, False, 1)),
    (
        *((3, 240, 80, False, True, 2), (3, 200, 80, False, True, 1)),
        *((3, 184, 80, False, True, 1), (3, 184, 80, False, True, 1)),
    ),
    ((3, 480, 112, True, True, 1), (3, 672, 112, True, True, 1)),
    ((5, 672, 160, True, True, 2), (5, 960, 160, True, True, 1), (5, 960, 160, True, True, 1)),
)
_SMALL = (
    ((3, 16, 16, True, False, 2),),
    ((3, 72, 24, False, False, 2), (3, 88, 24, False, False, 1)),
    ((5, 96, 40, True, True, 2), (5, 240, 40, True, True, 1), (5, 240, 40, True, True, 1)),
    ((5, 120, 48, True, True, 1), (5, 144, 48, True, True, 1)),
    ((5, 288, 96, True, True, 2), (5, 576, 96, True, True, 1), (5, 576, 96, True, True, 1)),
)
_STEM = 16
_WIDE = {"large": 1280, "small": 1024}  # of the layer after the pool


class MobileNetV3(nn.Module):
    """Made by ``mobilenet_v3``."""

    def __init__(
        self, stem: nn.Module, stages: list[nn.Module], last: nn.Module, widths: tuple[int, int], classes: int
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.last = last
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.wide = nn.Linear(*widths)
        self.act = nn.Hardswish()
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(widths[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.last(self.stages(self.stem(x)))).flatten(1)
        result: Tensor = self.head(self.dropout(self.act(self.wide(y))))
        return result


def mobilenet_v3(
    size: Size,
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
        size: Which of the paper's two.
        width: Multiplier of the channels, as multiples of 8; those of the layer after the pool shrink
            below 0.35 only.
        depth: Multiplier of the blocks of a stage; more of them repeat the stage's last one.
        kernel: Of the depthwise convolutions; None: the paper's 3 and 5.
        resolution: Side, or sides, of the pictures; first strides are 1 where these are small.
        channels: Of the pictures.
        classes: Outputs.

    Raises:
        RecipeError: A setting is out of its range.
    """
    checked(
        f"mobilenetv3-{size}",
        width=width,
        depth=depth,
        kernel=kernel,
        channels=channels,
        classes=classes,
        smallest=side(resolution),
    )
    table = [[_Row(*row) for row in stage] for stage in (_LARGE if size == "large" else _SMALL)]
    strides = fitted_strides((2, *(stage[0].stride for stage in table)), resolution)
    before, usual = scaled(_STEM, width), _STEM
    stem = conv_norm(channels, before, 3, strides[0], act=nn.Hardswish(), eps=1e-3)
    stages: list[nn.Module] = []
    for rows, first in zip(table, strides[1:], strict=True):
        blocks: list[nn.Module] = []
        for index in range(repeats(len(rows), depth)):
            row = rows[min(index, len(rows) - 1)]
            after = scaled(row.outputs, width)
            hidden = scaled(before * row.hidden / usual)
            blocks.append(
                InvertedResidual(
                    before,
                    hidden,
                    after,
                    kernel or row.kernel,
                    first if index == 0 else 1,
                    nn.Hardswish if row.hard else nn.ReLU,
                    gated=row.gated,
                    eps=1e-3,
                )
            )
            before, usual = after, row.outputs
        stages.append(nn.Sequential(*blocks))
    after = 6 * before
    last = conv_norm(before, after, act=nn.Hardswish(), eps=1e-3)
    net = MobileNetV3(stem, stages, last, (after, last_channels(_WIDE[size], width)), classes)
    initialise(net)
    return net
