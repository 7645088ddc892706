"""EfficientNet-Lite0 to 4: EfficientNet without gates and with ReLU6, its ends not scaled.

The networks are those of Tan and Le 2019 (arXiv:1905.11946) as their authors changed them for small devices
(tensorflow/tpu, models/official/efficientnet/lite, 2020): squeeze and excite is gone, swish is ReLU6, and the
stem, the last convolution, and the depth of the first and the last stage stay as they are.
"""

from __future__ import annotations

from torch import nn

from featherweight.errors import RecipeError
from featherweight.nets._inverted import InvertedResidual
from featherweight.nets._parts import checked, conv_norm, fitted_strides, initialise, repeats, scaled, side
from featherweight.nets.mobilenet_v2 import MobileNetV2

# How much a block widens, channels, blocks, stride, kernel.
_STAGES = (
    *((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3)),
    *((6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
)
_STEM, _LAST = 32, 1280
# Width, depth, resolution and dropout of each variant.
_VARIANTS = (
    *((1.0, 1.0, 224, 0.2), (1.0, 1.1, 240, 0.2), (1.1, 1.2, 260, 0.3)),
    *((1.2, 1.4, 280, 0.3), (1.4, 1.8, 300, 0.3)),
)


def efficientnet_lite(
    variant: int = 0,
    *,
    width: float = 1.0,
    depth: float = 1.0,
    kernel: int | None = None,
    resolution: int | tuple[int, int] | None = None,
    channels: int = 3,
    classes: int = 1000,
) -> nn.Module:
    """The network for pictures of a size.

    Args:
        variant: 0 to 4.
        width: Multiplier of the channels beside the variant's own, as multiples of 8. Below 1 it scales the
            stem and the last convolution too, which would else be most of a small network.
        depth: Multiplier of the blocks of a stage beside the variant's own.
        kernel: Of the depthwise convolutions; None: the paper's 3 and 5.
        resolution: Side, or sides, of the pictures, first strides 1 where small; None: the variant's.
        channels: Of the pictures.
        classes: Outputs.

    Raises:
        RecipeError: A setting is out of its range.
    """
    if variant not in range(len(_VARIANTS)):
        raise RecipeError(f"there is no efficientnet-lite{variant}", fix="a variant from 0 to 4")
    wide, deep, usual, dropout = _VARIANTS[variant]
    resolution = usual if resolution is None else resolution
    checked(
        f"efficientnet-lite{variant}",
        width=width,
        depth=depth,
        kernel=kernel,
        channels=channels,
        classes=classes,
        smallest=side(resolution),
    )
    strides = fitted_strides((2, *(stride for _, _, _, stride, _ in _STAGES)), resolution)
    ends = min(1.0, width)
    before = scaled(_STEM, ends)
    stem = conv_norm(channels, before, 3, strides[0], act=nn.ReLU6(), eps=1e-3)
    stages: list[nn.Module] = []
    for (widens, base, count, _, usual_kernel), first in zip(_STAGES, strides[1:], strict=True):
        after, blocks = scaled(base, wide * width), []
        outer = len(stages) in (0, len(_STAGES) - 1)
        for index in range(count if outer else repeats(count, deep * depth)):
            stride = first if index == 0 else 1
            size = kernel or usual_kernel
            blocks.append(InvertedResidual(before, before * widens, after, size, stride, nn.ReLU6, eps=1e-3))
            before = after
        stages.append(nn.Sequential(*blocks))
    last = conv_norm(before, scaled(_LAST, ends), act=nn.ReLU6(), eps=1e-3)
    net = MobileNetV2(stem, stages, last, nn.Linear(scaled(_LAST, ends), classes), dropout)
    initialise(net)
    return net
