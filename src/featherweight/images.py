"""Folders of class-named folders of images, decoded when they are needed.

An image becomes RGB (grey, if mean has one value), its shorter side is scaled to the size (bilinear), the
centre is cut out, and value = (byte / 255 - mean) / std, as float32 (channels, height, width).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featherweight.errors import DataError
from featherweight.examples import Examples

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
_SCORED = ("val", "validation", "test")
_LAYOUT = "DIR/class/image.jpg, or DIR/val/class/image.jpg beside DIR/train"


@dataclass(frozen=True)
class ImageSettings:
    """How a file becomes an input.

    Attributes:
        size: Height and width.
        mean: Subtracted, of values in 0..1, one per channel.
        std: Divided by, one per channel.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def parse(
        cls,
        image_size: int | str | tuple[int, int] | None,
        mean: str | float | Sequence[float] | None,
        std: str | float | Sequence[float] | None,
    ) -> ImageSettings:
        """Settings as the user wrote them: 224, '28x28'; '0.485,0.456,0.406'.

        Raises:
            DataError: Missing or no numbers, or as many as no image has channels.
        """
        if image_size is None:
            raise DataError("a folder of images needs the size of the model's input", fix="--image-size 224")
        means = (0.0, 0.0, 0.0) if mean is None else _numbers(mean, "--mean")
        stds = (1.0,) if std is None else _numbers(std, "--std")
        if len(stds) == 1:
            stds *= len(means)
        if len(means) not in (1, 3) or len(stds) != len(means):
            raise DataError(
                f"--mean has {len(means)} and --std {len(stds)} values: images have 3 channels, or 1 if grey",
                fix="--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225",
            )
        if min(stds) <= 0:
            raise DataError(f"--std {min(stds):g} is not above 0", fix="--std 1")
        return cls(_size(image_size), means, stds)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self.mean), *self.size)

    def to_json(self) -> dict[str, Any]:
        return {
            "image_size": list(self.size),
            "mean": list(self.mean),
            "std": list(self.std),
            "channels": "RGB" if len(self.mean) == 3 else "L",
            "scale": "1/255",
            "resize": "shorter side, bilinear",
            "crop": "centre",
            "layout": "NCHW",
        }

    def load(self, path: Path) -> np.ndarray:
        """One image as float32 (channels, height, width).

        Raises:
            DataError: The file is missing, damaged or no image.
        """
        height, width = self.size
        try:
            with Image.open(path) as file:
                image = file.convert("RGB" if len(self.mean) == 3 else "L")
        except (
            OSError,
            SyntaxError,
            ValueError,
            EOFError,
            struct.error,
            Image.DecompressionBombError,
        ) as exc:
            said = "no image that pillow knows" if "cannot identify" in str(exc) else str(exc)
            raise DataError(
                f"image '{path}' cannot be decoded: {said}", fix="replace or remove that file"
            ) from exc
        scale = max(height / image.height, width / image.width)
        scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        if scaled != image.size:
            image = image.resize(scaled, Image.Resampling.BILINEAR)
        left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
        image = image.crop((left, top, left + width, top + height))
        values = np.asarray(image, np.float32).reshape(height, width, -1).transpose(2, 0, 1) / np.float32(255)
        mean, std = (np.asarray(one, np.float32)[:, None, None] for one in (self.mean, self.std))
        return np.asarray((values - mean) / std, np.float32)


@dataclass(frozen=True, eq=False)
class Images:
    """Image files as a source of examples; only their bytes and settings count as content."""

    paths: tuple[Path, ...]
    settings: ImageSettings

    @property
    def shape(self) -> tuple[int, ...]:
        return self.settings.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    @cached_property
    def digests(self) -> Sequence[bytes]:
        how = repr(self.settings).encode()
        return [hashlib.blake2b(path.read_bytes() + how, digest_size=16).digest() for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: np.ndarray) -> np.ndarray:
        taken = np.empty((len(indices), *self.shape), np.float32)
        for row, index in enumerate(indices):
            taken[row] = self.settings.load(self.paths[index])
        return taken


@dataclass(frozen=True)
class Folder:
    """What a folder of images holds."""

    scored: Examples
    train: Examples | None
    calibration: Examples | None
    class_names: tuple[str, ...]
    origin: dict[str, Any]
    notes: tuple[str, ...]


def read_folder(root: Path, settings: ImageSettings, seed: int) -> Folder:
    """The images of ``root/class/`` or of ``root/{val|test, train, calibration}/class/``.

    Labels are the places of the class folders in alphabetical order, of training where there is any.
    Without a folder for training or calibration, a seeded fifth of the images, at most 512, calibrates
    and is not scored.

    Raises:
        DataError: No class folders, no images, or an empty file.
    """
    notes: list[str] = []
    splits = [name for name in _SCORED if _has_folders(root / name)]
    if not splits and _has_folders(root / "train"):
        raise DataError(f"'{root}' has train but neither val nor test", fix=f"lay it out as {_LAYOUT}")
    origin = {"kind": "folder", "folder": root.resolve().name, **settings.to_json()}
    if splits:
        if len(splits) > 1:
            notes.append(f"{splits[0]} is scored; {', '.join(splits[1:])} is not used")
        has_train = _has_folders(root / "train")
        parts = [root / splits[0], *([root / "train"] if has_train else [])]
        names = tuple(sorted({name for part in parts for name in _folders(part)}))
        scored = _examples(root / splits[0], names, settings)
        train = _examples(root / "train", names, settings) if has_train else None
        calibration = None
        if (root / "calibration").is_dir():
            calibration = Examples((Images(_images(root / "calibration"), settings),))
            if not len(calibration):
                raise DataError(
                    f"'{root / 'calibration'}' has no images", fix="add some, or remove the folder"
                )
        origin["scored"] = splits[0]
    else:
        names = tuple(_folders(root))
        scored, train, calibration = _examples(root, names, settings), None, None
    if train is None and calibration is None and len(scored) > 1:
        scored, calibration = _split(scored, seed)
        origin["calibration"] = {"seed": seed, "images": len(calibration)}
        notes.append(
            f"there is no train or calibration folder: {len(calibration)} of the "
            f"{len(calibration) + len(scored)} images calibrate and are not scored"
        )
    return Folder(scored, train, calibration, names, origin, tuple(notes))


def _examples(root: Path, names: Sequence[str], settings: ImageSettings) -> Examples:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = _images(root / name)
        paths += found
        labels += [label] * len(found)
    if not paths:
        said = "has no class folders" if not names else "has no images in its class folders"
        raise DataError(f"'{root}' {said}", fix=f"lay it out as {_LAYOUT}")
    return Examples((Images(tuple(paths), settings),), np.array(labels, np.int64))


def _split(examples: Examples, seed: int) -> tuple[Examples, Examples]:
    """Scored and calibrating examples, apart."""
    order = np.random.default_rng(seed).permutation(len(examples))
    count = max(1, min(512, len(examples) // 5))
    return _chosen(examples, np.sort(order[count:])), _chosen(examples, np.sort(order[:count]))


def _chosen(examples: Examples, indices: np.ndarray) -> Examples:
    (images,) = examples.inputs
    assert isinstance(images, Images)
    paths = tuple(images.paths[i] for i in indices)
    targets = None if examples.targets is None else examples.targets[indices]
    return Examples((Images(paths, images.settings),), targets)


def _folders(root: Path) -> list[str]:
    return sorted(one.name for one in root.iterdir() if one.is_dir() and not one.name.startswith("."))


def _has_folders(root: Path) -> bool:
    return root.is_dir() and bool(_folders(root))


def _images(root: Path) -> tuple[Path, ...]:
    """Image files at any depth, in the order of their names."""
    found = []
    for folder, _, files in os.walk(root, followlinks=True):
        for name in files:
            path = Path(folder, name)
            if path.suffix.lower() not in _SUFFIXES or name.startswith("."):
                continue
            if path.stat().st_size == 0:
                raise DataError(f"image '{path}' is empty", fix="replace or remove that file")
            found.append(path)
    return tuple(sorted(found))


def _size(value: int | str | tuple[int, int]) -> tuple[int, int]:
    parts = value if isinstance(value, tuple) else str(value).lower().split("x")
    try:
        sizes = [int(part) for part in parts]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise DataError(
            f"--image-size '{value}' is no size", fix="--image-size 224, or 28x28 (height x width)"
        )
    return sizes[0], sizes[-1]


def _numbers(value: str | float | Sequence[float], option: str) -> tuple[float, ...]:
    parts: Sequence[Any] = [value] if isinstance(value, (int, float)) else value
    if isinstance(value, str):
        parts = value.replace(",", " ").split()
    try:
        numbers = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or not np.isfinite(numbers).all():
        raise DataError(
            f"{option} '{value}' is no list of numbers", fix=f"{option} 0.5, or {option} 0.4,0.5,0.6"
        )
    return numbers
