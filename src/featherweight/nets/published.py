"""What papers print of their networks: the settings at which a builder is held against its paper.

Papers count in different ways, and round or cut off. So a row says how its paper counts, and ``agrees``
compares to the printed digits. Where a figure cannot be met its row says why; no network is bent to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# All parameters; or those of batch norms left out, which fold away.
Parameters = Literal["all", "no norms"]
# All multiply-accumulates; without the last layer's; with three for each output of a batch norm; or
# operations: two for each, and one for a bias.
Macs = Literal["all", "no classes", "with norms", "operations"]


@dataclass(frozen=True)
class Published:
    """One row.

    Attributes:
        spec: As ``build`` reads it.
        resolution: Of the input.
        params: Parameters as printed, as 3.4M; '' where there are none.
        macs: Multiply-accumulates, or operations, as printed; '' where there are none.
        exact: Parameters of models of it that were published; None: not known.
        params_of: What the printed parameters count.
        macs_of: What the printed multiply-accumulates count.
        differs: ``macs`` cannot be met.
        note: Where the figures are from if not from the paper, and why one differs.
        channels: Of the input.
        classes: Outputs.
    """

    spec: str
    resolution: int | tuple[int, int]
    params: str
    macs: str
    exact: int | None = None
    params_of: Parameters = "all"
    macs_of: Macs = "all"
    differs: bool = False
    note: str = ""
    channels: int = 3
    classes: int = 1000


_README = "figures of the authors' README"
_NO_NORMS = f"{_README}; batch norms not counted"
_NO_CLASSES = "the last layer not counted"
_SHUFFLE = (
    "the paper's operations are about 1 % more than those of the layers in its table 5; "
    "the parameters are those of the published models"
)
_LITE = "the authors count batch norms, too: as three for each of their outputs, the figures are within 0.5 %"
_MEMORY = (
    "operations: two for each multiply-accumulate, one for a bias; the paper's {} are the weights in 8 bits, "
    "batch norms folded, and the two largest maps"
)


def _hello(size: str, operations: str, memory: str) -> Published:
    return Published(
        f"ds-cnn:size={size}",
        (49, 10),
        "",
        operations,
        macs_of="operations",
        note=_MEMORY.format(memory),
        channels=1,
        classes=12,
    )


PUBLISHED = (
    Published("mobilenetv1", 224, "4.2M", "569M", 4_231_976),
    Published("mobilenetv1:width=0.75", 224, "2.6M", "325M", 2_585_560),
    Published("mobilenetv1:width=0.5", 224, "1.3M", "149M", 1_331_592),
    Published("mobilenetv1:width=0.25", 224, "0.5M", "41M", 470_072),
    Published("mobilenetv1", 192, "4.2M", "418M", 4_231_976),
    Published("mobilenetv1", 128, "4.2M", "186M", 4_231_976),
    Published("mobilenetv2", 224, "3.4M", "300M", 3_504_872, "no norms", note="batch norms not counted"),
    Published("mobilenetv2:width=0.75", 224, "2.61M", "209M", params_of="no norms", note=_NO_NORMS),
    Published("mobilenetv2:width=0.5", 224, "1.95M", "97M", params_of="no norms", note=_NO_NORMS),
    Published("mobilenetv2:width=0.35", 224, "1.66M", "59M", params_of="no norms", note=_NO_NORMS),
    Published("mobilenetv2:width=1.3", 224, "5.34M", "509M", params_of="no norms", note=_NO_NORMS),
    Published(
        "mobilenetv2:width=1.4",
        224,
        "6.06M",
        "582M",
        params_of="no norms",
        note=f"{_NO_NORMS}; the paper prints 6.9M and 585M, which its authors' models do not have",
    ),
    Published(
        "mobilenetv3-large", 224, "5.4M", "217M", 5_483_032, note=f"{_README}; the paper prints 5.4M and 219M"
    ),
    Published("mobilenetv3-large:width=0.75", 224, "4.0M", "155M", note=_README),
    Published(
        "mobilenetv3-small",
        224,
        "2.5M",
        "56M",
        2_542_856,
        note="1,024 channels before the classes; the paper's first version has 1,280 and prints 2.9M and 66M",
    ),
    Published("shufflenetv1:groups=1", 224, "", "143M", macs_of="no classes", note=_NO_CLASSES),
    Published("shufflenetv1:groups=2", 224, "", "140M", macs_of="no classes", note=_NO_CLASSES),
    Published("shufflenetv1:groups=3", 224, "1.9M", "137M", macs_of="no classes", note=_NO_CLASSES),
    Published("shufflenetv1:groups=4", 224, "", "133M", macs_of="no classes", note=_NO_CLASSES),
    Published("shufflenetv1:groups=8", 224, "2.4M", "137M", macs_of="no classes", note=_NO_CLASSES),
    Published("shufflenetv1:groups=3,width=0.5", 224, "0.7M", "38M", note=_README),
    Published("shufflenetv1:groups=3,width=1.5", 224, "3.4M", "292M", note=_README),
    Published("shufflenetv1:groups=3,width=2", 224, "5.4M", "524M", note=_README),
    Published("shufflenetv1:groups=8,width=2", 224, "6.5M", "522M", note=_README),
    Published(
        "shufflenetv1:groups=3,width=0.25",
        224,
        "",
        "13M",
        note="the paper does not say how wide its stem is; 12 channels meet its figure",
    ),
    Published("shufflenetv2:width=0.5", 224, "1.4M", "41M", 1_366_792, differs=True, note=_SHUFFLE),
    Published("shufflenetv2", 224, "2.3M", "146M", 2_278_604, differs=True, note=_SHUFFLE),
    Published("shufflenetv2:width=1.5", 224, "3.5M", "299M", 3_503_624, differs=True, note=_SHUFFLE),
    Published("shufflenetv2:width=2", 224, "7.4M", "591M", 7_393_996, differs=True, note=_SHUFFLE),
    Published(
        "efficientnet-lite0",
        224,
        "4.7M",
        "407M",
        4_652_008,
        macs_of="with norms",
        differs=True,
        note=_LITE,
    ),
    Published(
        "efficientnet-lite1",
        240,
        "5.4M",
        "631M",
        5_416_680,
        macs_of="with norms",
        differs=True,
        note=_LITE,
    ),
    Published(
        "efficientnet-lite2",
        260,
        "6.1M",
        "899M",
        6_092_072,
        macs_of="with norms",
        differs=True,
        note=_LITE,
    ),
    Published(
        "efficientnet-lite3",
        280,
        "8.2M",
        "1.44G",
        8_197_096,
        macs_of="with norms",
        differs=True,
        note=_LITE,
    ),
    Published(
        "efficientnet-lite4",
        300,
        "13.0M",
        "2.64G",
        13_006_568,
        macs_of="with norms",
        differs=True,
        note=_LITE,
    ),
    _hello("s", "5.4M", "38.6 KB"),
    _hello("m", "19.8M", "189.2 KB"),
    _hello("l", "56.9M", "497.6 KB"),
    Published("vit", 224, "5M", "", 5_717_416, note="ViT-Ti/16 of DeiT, which prints no operations"),
    Published("vit:width=2", 224, "22M", "", 22_050_664, note="ViT-S/16 of DeiT, which prints no operations"),
)


def agrees(printed: str, count: float) -> bool:
    """Whether a count is the printed one when it is rounded, or cut off, at the last printed digit."""
    digits, unit = printed[:-1], {"K": 1e3, "M": 1e6, "G": 1e9}[printed[-1]]
    places = len(digits.partition(".")[2])
    scaled = count / unit * 10**places
    return round(float(digits) * 10**places) in (math.floor(scaled), math.floor(scaled + 0.5))
