"""DS-CNN for keywords: depthwise separable convolutions over features of speech, or over a signal itself.

Zhang et al. 2017 ("Hello Edge", arXiv:1711.07128, table 6): a first convolution of 10 x 4 over 49 frames of
10 features, then separable blocks of as many channels. ``ds_cnn_1d`` has the same channels and blocks along
one axis: the features of a frame are its channels, or a waveform is one channel. Its first kernel is five
strides long as there, and one for its middle; the strides grow with the length of the signal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from featherweight.errors import RecipeError
from featherweight.nets._parts import checked, initialise, repeats, side

Size = Literal["s", "m", "l"]


@dataclass(frozen=True)
class _Setting:
    """A row of the paper's table 6."""

    channels: int
    blocks: int
    stride: tuple[int, int]  # of the first convolution
    then: tuple[int, int]  # of the first block


_SETTINGS = {
    "s": _Setting(64, 4, (2, 2), (1, 1)),
    "m": _Setting(172, 4, (2, 1), (2, 2)),
    "l": _Setting(276, 5, (2, 1), (2, 2)),
}
_KERNEL = (10, 4)
_FEW_STEPS = 32  # of the last map of a signal: less than two of these, as the paper's 25


class DSCNN(nn.Module):
    """Made by ``ds_cnn`` and ``ds_cnn_1d``."""

    def __init__(
        self, stem: nn.Module, blocks: list[nn.Module], pool: nn.Module, channels: int, classes: int
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.pool = pool
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.pool(self.blocks(self.stem(x))).flatten(1))
        return result


def ds_cnn(
    *,
    size: Size = "s",
    width: float = 1.0,
    depth: float = 1.0,
    kernel: int | None = None,
    resolution: int | tuple[int, int] = (49, 10),
    channels: int = 1,
    classes: int = 12,
) -> nn.Module:
    """The network for pictures, usually frames x features.

    Args:
        size: The paper's s, m or l.
        width: Multiplier of its channels.
        depth: Multiplier of its blocks.
        kernel: Of the depthwise convolutions; None: 3.
        resolution: Frames and features, or the side of a picture.
        channels: Of the pictures; features of speech have one.
        classes: Outputs.

    Raises:
        RecipeError: A setting is out of its range.
    """
    setting = _setting("ds-cnn", size)
    checked(
        "ds-cnn",
        width=width,
        depth=depth,
        kernel=kernel,
        channels=channels,
        classes=classes,
        smallest=side(resolution),
    )
    sides = (resolution, resolution) if isinstance(resolution, int) else resolution
    count = max(4, round(setting.channels * width))
    before, after = (
        [_padding(*axis)[end] for axis in zip(sides, _KERNEL, setting.stride, strict=True)] for end in (0, 1)
    )
    stem = nn.Sequential(
        nn.ZeroPad2d((before[1], after[1], before[0], after[0])),
        nn.Conv2d(channels, count, _KERNEL, setting.stride, bias=False),
        nn.BatchNorm2d(count),
        nn.ReLU(),
    )
    blocks: list[nn.Module] = [
        _separable(count, kernel or 3, (1, 1) if index else setting.then)
        for index in range(repeats(setting.blocks, depth))
    ]
    net = DSCNN(stem, blocks, nn.AdaptiveAvgPool2d(1), count, classes)
    initialise(net)
    return net


def ds_cnn_1d(
    *,
    size: Size = "s",
    width: float = 1.0,
    depth: float = 1.0,
    kernel: int | None = None,
    resolution: int | tuple[int] = 49,
    channels: int = 10,
    classes: int = 12,
) -> nn.Module:
    """The network for signals.

    Args:
        size: The paper's s, m or l.
        width: Multiplier of its channels.
        depth: Multiplier of its blocks.
        kernel: Of the depthwise convolutions; None: 3.
        resolution: Length of the signal; strides bring it to 32 to 64 steps, a short one to its half.
        channels: Of the signal: features of a frame, or one of a waveform.
        classes: Outputs.

    Raises:
        RecipeError: A setting is out of its range.
    """
    setting = _setting("ds-cnn-1d", size)
    length = side(resolution)
    checked(
        "ds-cnn-1d",
        width=width,
        depth=depth,
        kernel=kernel,
        channels=channels,
        classes=classes,
        smallest=length,
    )
    halvings = max(1, (length // _FEW_STEPS).bit_length() - 1)
    number = repeats(setting.blocks, depth)
    stem_stride = 2 ** max(1, halvings - number)
    left = halvings - (stem_stride.bit_length() - 1)
    count = max(4, round(setting.channels * width))
    reach = 5 * stem_stride + 1  # odd: the strides are even
    stem = nn.Sequential(
        nn.Conv1d(channels, count, reach, stem_stride, reach // 2, bias=False),
        nn.BatchNorm1d(count),
        nn.ReLU(),
    )
    blocks: list[nn.Module] = [
        _separable_1d(count, kernel or 3, 2 if index < left else 1) for index in range(number)
    ]
    net = DSCNN(stem, blocks, nn.AdaptiveAvgPool1d(1), count, classes)
    initialise(net)
    return net


def _setting(family: str, size: str) -> _Setting:
    if size not in _SETTINGS:
        raise RecipeError(f"{family}: size is '{size}'", fix="a size of s, m or l, as in the paper")
    return _SETTINGS[size]


def _padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, so that every stride starts one position: more after than before."""
    total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    return total // 2, total - total // 2


def _separable(channels: int, kernel: int, stride: tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def _separable_1d(channels: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False),
        nn.BatchNorm1d(channels),
        nn.ReLU(),
        nn.Conv1d(channels, channels, 1, bias=False),
        nn.BatchNorm1d(channels),
        nn.ReLU(),
    )
