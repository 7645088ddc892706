"""MobileNetV1: depthwise and pointwise convolutions in a chain (Howard et al. 2017, arXiv:1704.04861)."""

from __future__ import annotations

from torch import Tensor, nn

from featherweight.nets._parts import checked, conv_norm, fitted_strides, initialise, repeats, side

_STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))  # channels, blocks, stride


class MobileNetV1(nn.Module):
    """Made by ``mobilenet_v1``."""

    def __init__(self, stem: nn.Module, stages: list[nn.Module], channels: int, classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.pool(self.stages(self.stem(x))).flatten(1))
        return result


def mobilenet_v1(
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
        width: Multiplier of the channels, at least 8 of them; the paper has 1, 0.75, 0.5 and 0.25.
        depth: Multiplier of the blocks of a stage.
        kernel: Of the depthwise convolutions; None: 3.
        resolution: Side, or sides, of the pictures; first strides are 1 where these are small.
        channels: Of the pictures.
        classes: Outputs.

    Raises:
        RecipeError: A setting is out of its range.
    """
    checked(
        "mobilenetv1",
        width=width,
        depth=depth,
        kernel=kernel,
        channels=channels,
        classes=classes,
        smallest=side(resolution),
    )
    strides = fitted_strides((2, *(stride for _, _, stride in _STAGES)), resolution)
    before = max(8, int(32 * width))
    stem = conv_norm(channels, before, 3, strides[0], act=nn.ReLU())
    stages: list[nn.Module] = []
    for (base, count, _), first in zip(_STAGES, strides[1:], strict=True):
        after, blocks = max(8, int(base * width)), []
        for index in range(repeats(count, depth)):
            blocks.append(_separable(before, after, kernel or 3, first if index == 0 else 1))
            before = after
        stages.append(nn.Sequential(*blocks))
    net = MobileNetV1(stem, stages, before, classes)
    initialise(net)
    return net


def _separable(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        conv_norm(inputs, inputs, kernel, stride, groups=inputs, act=nn.ReLU()),
        conv_norm(inputs, outputs, act=nn.ReLU()),
    )
