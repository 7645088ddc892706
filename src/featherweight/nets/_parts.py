"""What several families consist of: a convolution with its batch norm, scaled numbers, strides, values."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from featherweight.errors import RecipeError

_SMALLEST_MAP = 3  # side of the last map: below it the first strides become 1
_SMALLEST_WIDTH = 0.35  # of MobileNetV2 and V3 in the papers


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    *,
    groups: int = 1,
    act: nn.Module | None = None,
    eps: float = 1e-5,
) -> nn.Sequential:
    """A convolution without a bias, its batch norm, and an activation where there is one."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers = [conv, nn.BatchNorm2d(outputs, eps=eps), *([] if act is None else [act])]
    return nn.Sequential(*layers)


def scaled(channels: float, width: float = 1.0, *, divisor: int = 8) -> int:
    """Channels times the multiplier, as the nearest multiple of the divisor that loses at most a tenth.

    The rule of MobileNetV2 and all that follow it.
    """
    exact = channels * width
    nearest = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * exact else nearest


def last_channels(channels: int, width: float) -> int:
    """Of the layer before the classes in MobileNetV2 and V3: it grows with the width and does not shrink.

    Below the papers' smallest width it would be most of the network, so there it shrinks as the rest does.
    """
    return scaled(channels, max(1.0, width) if width >= _SMALLEST_WIDTH else width / _SMALLEST_WIDTH)


def repeats(count: int, depth: float) -> int:
    """How often a stage's block stands there: rounded up, as EfficientNet has it, and at least once."""
    return max(1, math.ceil(round(count * depth, 6)))


def side(resolution: int | tuple[int, ...]) -> int:
    """The shorter side of a picture."""
    return resolution if isinstance(resolution, int) else min(resolution)


def fitted_strides(strides: Sequence[int], resolution: int | tuple[int, ...]) -> list[int]:
    """The paper's strides, the first ones 1 where the last map would be smaller than 3 x 3.

    A picture of more than 64 pixels keeps them all when their product is 32; one of 28 or 32 ends in 4 x 4.
    """
    fitted = list(strides)
    for index in range(len(fitted)):
        if math.ceil(side(resolution) / math.prod(fitted)) >= _SMALLEST_MAP:
            break
        fitted[index] = 1
    return fitted


def checked(
    family: str, *, width: float, depth: float, kernel: int | None, channels: int, classes: int, smallest: int
) -> None:
    """Refuse settings that make no network.

    Args:
        family: What the errors call it.
        width: Multiplier of the channels.
        depth: Multiplier of the repeats.
        kernel: Side of the main kernels; None: the paper's.
        channels: Of the input.
        classes: Outputs.
        smallest: Side of the smallest input that it takes.

    Raises:
        RecipeError: One of them is out of its range.
    """
    for name, value in (("width", width), ("depth", depth)):
        if not 0 < value <= 8:
            raise RecipeError(
                f"{family}: {name} is {value:g}", fix=f"a {name} above 0 and up to 8; 1 is the paper's"
            )
    if kernel is not None and (kernel < 1 or kernel > 15 or kernel % 2 == 0):
        raise RecipeError(f"{family}: kernel is {kernel}", fix="an odd kernel from 1 to 15")
    for name, count in (("channels", channels), ("classes", classes)):
        if count < 1:
            raise RecipeError(f"{family}: {name} is {count}", fix=f"at least one of the {name}")
    if smallest < 1:
        raise RecipeError(f"{family}: the resolution is {smallest}", fix="a side of at least one element")


def initialise(module: nn.Module) -> None:
    """Values before the first step of training: He et al. 2015 (arXiv:1502.01852) for convolutions.

    The last linear layer starts small, as in the MobileNets' code; batch norms are the identity.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, 0.01)
            nn.init.zeros_(layer.bias)
