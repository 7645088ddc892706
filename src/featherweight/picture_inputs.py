"""Which inputs are pictures: where their channels are, and which values are black and white.

A network may want 0..1, 0..255, or values less a mean over a standard deviation; what corrupts pictures takes
0..1. The range is known from the type (uint8), from the settings of a folder of images, or from values that
fill 0..1 or 0..255; else it is what was seen of each channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from featherweight.data import Data
from featherweight.errors import DataError

Layout = Literal["NCHW", "NHWC"]

_SMALLEST = 8  # pixels: what has fewer is no picture
_CHANNELS = (1, 3)
_CHUNK = 64  # pictures that are looked at at once


@dataclass(frozen=True)
class PictureInput:
    """How an input holds pictures.

    Attributes:
        layout: Where channels are.
        height: Pixels.
        width: Pixels.
        low: Black of each channel.
        high: White of each channel.
        dtype: Of the input.
        known: What told the range.
    """

    layout: Layout
    height: int
    width: int
    low: tuple[float, ...]
    high: tuple[float, ...]
    dtype: np.dtype[Any]
    known: str

    def decode(self, array: np.ndarray) -> np.ndarray:
        """Values in 0..1, float32 (N, height, width, channels); what lies outside of the range is cut off."""
        last = array.transpose(0, 2, 3, 1) if self.layout == "NCHW" else array
        low, high = np.asarray(self.low), np.asarray(self.high)
        return np.asarray(np.clip((last - low) / (high - low), 0, 1), np.float32)

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """The input that shows pictures of values in 0..1."""
        low, high = np.asarray(self.low), np.asarray(self.high)
        values = pictures * (high - low) + low
        if self.dtype.kind in "iu":
            values = np.round(values)
        first = values.transpose(0, 3, 1, 2) if self.layout == "NCHW" else values
        return np.ascontiguousarray(first, self.dtype)

    def __str__(self) -> str:
        """'28 x 28, grey, 0..1 (all values are within it)'."""
        ends = sorted(set(zip(self.low, self.high, strict=True)))
        told = ", ".join(f"{low:.4g}..{high:.4g}" for low, high in ends)
        colour = "grey" if len(self.low) == 1 else "colour"
        return f"{self.height} x {self.width}, {colour}, {told} ({self.known})"


def picture_input(data: Data, indices: np.ndarray) -> PictureInput:
    """How the scored examples hold pictures.

    Args:
        data: Brings them.
        indices: Those that a range is read from where nothing else tells it.

    Raises:
        DataError: They are no pictures, or nobody knows.
    """
    scored = data.scored
    if scored is None or data.origin.get("kind") == "random":
        raise _no_pictures("the inputs are random numbers")
    if len(scored.inputs) != 1:
        raise _no_pictures(f"the network has {len(scored.inputs)} inputs")
    (source,) = scored.inputs
    shape, dtype = source.shape, source.dtype
    if dtype.kind not in "fu" or (dtype.kind == "u" and dtype != np.uint8):
        raise _no_pictures(f"the inputs are {dtype}")
    if len(shape) != 3:
        raise _no_pictures(f"an example has the shape {shape}")
    layout: Layout
    if shape[0] in _CHANNELS and min(shape[1:]) >= _SMALLEST:
        layout, (channels, height, width) = "NCHW", shape
    elif shape[2] in _CHANNELS and min(shape[:2]) >= _SMALLEST:
        layout, (height, width, channels) = "NHWC", shape
    else:
        raise _no_pictures(f"an example has the shape {shape}")
    low, high, known = _range(data, indices, layout, channels)
    return PictureInput(layout, height, width, low, high, dtype, known)


def _range(
    data: Data, indices: np.ndarray, layout: Layout, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Black and white of each channel, and what told them."""
    assert data.scored is not None
    (source,) = data.scored.inputs
    origin = data.origin
    if source.dtype == np.uint8:
        return (0.0,) * channels, (255.0,) * channels, "bytes"
    if origin.get("kind") == "folder" and len(origin.get("mean", ())) == channels:
        settings = tuple(zip(origin["mean"], origin["std"], strict=True))
        ends = [tuple((end - mean) / std for mean, std in settings) for end in (0.0, 1.0)]
        return ends[0], ends[1], "mean and std of the folder"
    axes = (0, 2, 3) if layout == "NCHW" else (0, 1, 2)
    parts = [source.take(indices[i : i + _CHUNK]) for i in range(0, len(indices), _CHUNK)]
    lows = np.min([part.min(axis=axes) for part in parts], axis=0)
    highs = np.max([part.max(axis=axes) for part in parts], axis=0)
    for white in (1.0, 255.0):
        if lows.min() >= 0 and white / 2 < highs.max() <= white:
            return (0.0,) * channels, (white,) * channels, "all values are within it"
    if not (highs > lows).all():
        raise _no_pictures("a channel has the same value everywhere")
    said = f"seen in {len(indices)} pictures, nothing tells the range"
    return tuple(map(float, lows)), tuple(map(float, highs)), said


def _no_pictures(said: str) -> DataError:
    return DataError(
        f"corruptions are for pictures, and {said}",
        fix="score one input of 1 or 3 channels, first or last, and at least "
        f"{_SMALLEST} x {_SMALLEST} pixels",
    )
