"""Pictures made worse in six ways, each in five severities: the recipe of ImageNet-C.

Hendrycks and Dietterich 2019, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations
(arXiv:1903.12261). The constants are theirs: those of ImageNet-C for large pictures, those of CIFAR-10-C for
small ones, whichever were made for the nearer size; widths of blurs grow with the picture's shorter side. A
square that hides a part of the picture is not in their set and is added.

The same seed and number of a picture give the same noise and the same place of the square in every severity,
so a higher severity is never less of it.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

KINDS = ("noise", "blur", "contrast", "brightness", "occlusion", "jpeg")
SEVERITIES = (1, 2, 3, 4, 5)

_HIDDEN = (0.2, 0.3, 0.4, 0.5, 0.6)  # side of the square over the picture's shorter side
_GREY = 0.5  # what the square is filled with
_TRUNCATE = 4.0  # standard deviations at which a blur's kernel ends, as in theirs


@dataclass(frozen=True)
class Constants:
    """How much of each corruption, by severity.

    Attributes:
        name: Of the set that they are from.
        side: Of the pictures that they were made for.
        noise: Standard deviation, of values in 0..1.
        blur: Standard deviation, in pixels at that side.
        contrast: Factor of the distance from a channel's mean.
        brightness: Added to the value of hue, saturation, value.
        jpeg: Quality.
    """

    name: str
    side: int
    noise: tuple[float, ...]
    blur: tuple[float, ...]
    contrast: tuple[float, ...]
    brightness: tuple[float, ...]
    jpeg: tuple[int, ...]


IMAGENET_C = Constants(
    "ImageNet-C",
    224,
    noise=(0.08, 0.12, 0.18, 0.26, 0.38),
    blur=(1, 2, 3, 4, 6),
    contrast=(0.4, 0.3, 0.2, 0.1, 0.05),
    brightness=(0.1, 0.2, 0.3, 0.4, 0.5),
    jpeg=(25, 18, 15, 10, 7),
)
CIFAR_10_C = Constants(
    "CIFAR-10-C",
    32,
    noise=(0.04, 0.06, 0.08, 0.09, 0.10),
    blur=(0.4, 0.6, 0.7, 0.8, 1),
    contrast=(0.75, 0.5, 0.4, 0.3, 0.15),
    brightness=(0.05, 0.1, 0.15, 0.2, 0.3),
    jpeg=(80, 65, 58, 50, 40),
)


def constants_for(height: int, width: int) -> Constants:
    """The set that was made for the size that is nearer, as a ratio."""
    side = min(height, width)
    return min((CIFAR_10_C, IMAGENET_C), key=lambda one: abs(math.log(side / one.side)))


def corrupt(
    pictures: np.ndarray, kind: str, severity: int, *, seed: int = 0, numbers: np.ndarray | None = None
) -> np.ndarray:
    """Corrupted copies of pictures.

    Args:
        pictures: Values in 0..1, float (N, height, width, channels).
        kind: One of ``KINDS``.
        severity: 1 to 5.
        seed: Of noise and places.
        numbers: Of each picture, which with the seed decide what is drawn for it; None: 0 to N - 1.

    Returns:
        The same shape, float32 in 0..1.

    Raises:
        ValueError: There is no such kind or severity.
    """
    if kind not in KINDS or severity not in SEVERITIES:
        raise ValueError(f"no corruption is called '{kind}' of severity {severity}")
    constants, at = constants_for(*pictures.shape[1:3]), severity - 1
    values = np.asarray(pictures, np.float32)
    drawn = np.arange(len(values)) if numbers is None else numbers
    if kind == "noise":
        changed = _noisy(values, constants.noise[at], seed, drawn)
    elif kind == "blur":
        changed = _blurred(values, constants.blur[at] * min(values.shape[1:3]) / constants.side)
    elif kind == "contrast":
        means = values.mean(axis=(1, 2), keepdims=True)
        changed = (values - means) * constants.contrast[at] + means
    elif kind == "brightness":
        changed = _brighter(values, constants.brightness[at])
    elif kind == "occlusion":
        changed = _hidden(values, _HIDDEN[at], seed, drawn)
    else:
        changed = np.stack([through_jpeg(one, constants.jpeg[at]) for one in values])
    return np.asarray(np.clip(changed, 0, 1), np.float32)


def through_jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    """One picture (height, width, channels) of values in 0..1, written as JPEG and read again.

    One and three channels are grey and RGB; of others each is a grey picture of its own.
    """
    if picture.shape[-1] not in (1, 3):
        channels = [through_jpeg(picture[..., i : i + 1], quality) for i in range(picture.shape[-1])]
        return np.concatenate(channels, axis=-1)
    pixels = np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if picture.shape[-1] == 1 else pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as read:
        again = np.asarray(read, np.float32) / np.float32(255)
    return again.reshape(picture.shape)


def _drawing(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng((seed, int(number)))


def _noisy(values: np.ndarray, scale: float, seed: int, numbers: np.ndarray) -> np.ndarray:
    drawn = [_drawing(seed, number).standard_normal(values.shape[1:], np.float32) for number in numbers]
    return np.asarray(values + np.float32(scale) * np.stack(drawn))


def _blurred(values: np.ndarray, sigma: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    sigmas = (0, sigma, sigma, 0)
    blurred: np.ndarray = gaussian_filter(values, sigmas, mode="nearest", truncate=_TRUNCATE)
    return blurred


def _brighter(values: np.ndarray, by: float) -> np.ndarray:
    """More value at the same hue and saturation: a pixel's channels by one factor; black becomes grey."""
    if values.shape[-1] != 3:
        return np.asarray(values + np.float32(by))
    value = values.max(axis=-1, keepdims=True)
    brighter = np.minimum(value + np.float32(by), 1)
    black = value <= 0
    return np.asarray(np.where(black, brighter, values * (brighter / np.where(black, 1, value))))


def _hidden(values: np.ndarray, share: float, seed: int, numbers: np.ndarray) -> np.ndarray:
    """A grey square at a place that is drawn so that the largest one lies within the picture.

    Smaller squares lie within larger ones.
    """
    changed = values.copy()
    height, width = values.shape[1:3]
    side, most = (max(1, round(one * min(height, width))) for one in (share, _HIDDEN[-1]))
    for picture, number in zip(changed, numbers, strict=True):
        draw = _drawing(seed, number)
        inset = (most - side) // 2
        top, left = (int(draw.integers(0, size - most + 1)) + inset for size in (height, width))
        picture[top : top + side, left : left + side] = _GREY
    return changed
