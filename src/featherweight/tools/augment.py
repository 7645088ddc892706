"""Augmentation: changed copies of images, drawn anew in every epoch.

Images are (N, C, H, W). ``shift`` moves by up to 1/14 of the size (2 of 28 pixels), ``flip`` mirrors every
second one, ``crop`` takes 3/4 to all of each side and resizes it back. Two mix examples and their losses
with a share drawn once a batch::

    mixup     x = s a + (1 - s) b,   loss = s loss(a) + (1 - s) loss(b)      s ~ Beta(0.2, 0.2)
    cutmix    a rectangle of b replaces 1 - s of a's area                    s ~ Beta(1, 1)

(Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import DataError, RecipeError
from featherweight.usercode import call_user, defined_at

Augmentation = Literal["shift", "flip", "crop", "mixup", "cutmix"]
Inputs = tuple[np.ndarray, ...]

_SHIFT = 14
_LEAST_SIDE = 0.75
_MIXUP = 0.2


@dataclass(frozen=True)
class Mix:
    """How much of a batch's loss is that of which targets.

    Attributes:
        partner: For each example the one whose targets count too.
        share: Of the example's own targets.
    """

    partner: np.ndarray
    share: float


@dataclass(frozen=True)
class Augment:
    """What happens to a batch before the network sees it.

    Attributes:
        kinds: Of this file, in this order, for images alone.
        function: The user's ``function(inputs, rng)`` -> inputs; an array, or the tuple of them where there
            are several; comes first.
    """

    kinds: tuple[Augmentation, ...] = ()
    function: Callable[[Any, np.random.Generator], Any] | None = None

    def __bool__(self) -> bool:
        return bool(self.kinds) or self.function is not None

    def __call__(self, inputs: Inputs, rng: np.random.Generator) -> tuple[Inputs, Mix | None]:
        """New inputs of the same shapes and dtypes.

        Raises:
            DataError: The user's function raises, or gives other shapes.
        """
        if self.function is not None:
            inputs = self._users(inputs, rng)
        mix: Mix | None = None
        if self.kinds:
            images = torch.from_numpy(np.ascontiguousarray(inputs[0]))
            moved = [kind for kind in self.kinds if kind in ("shift", "flip")]
            if moved:
                images = _moved(images, rng, "shift" in moved, "flip" in moved)
            if "crop" in self.kinds:
                images = _cropped(images, rng)
            mixing = [kind for kind in self.kinds if kind in ("mixup", "cutmix")]
            if mixing:
                kind = mixing[int(rng.integers(len(mixing)))]
                images, mix = (_mixed if kind == "mixup" else _patched)(images, rng)
            inputs = (images.numpy(), *inputs[1:])
        return inputs, mix

    def check(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Refuse what are no images.

        Raises:
            RecipeError: ``kinds`` are asked for and an example is not (channels, height, width).
        """
        if self.kinds and len(shapes[0]) != 3:
            raise RecipeError(
                f"augment {', '.join(self.kinds)} is for images (channels, height, width), "
                f"and an example has shape {tuple(shapes[0])}",
                fix="leave augment out, or give Data.of(..., augment=function)",
            )

    def _users(self, inputs: Inputs, rng: np.random.Generator) -> Inputs:
        function = self.function
        assert function is not None
        made = call_user(function, inputs[0] if len(inputs) == 1 else inputs, rng, error=DataError)
        given = made if isinstance(made, tuple | list) else (made,)
        arrays = tuple(np.asarray(one, dtype=like.dtype) for one, like in zip(given, inputs, strict=False))
        if [one.shape for one in arrays] != [one.shape for one in inputs]:
            raise DataError(
                f"augment made shapes {[one.shape for one in arrays]} of {[one.shape for one in inputs]}",
                where=defined_at(function),
                fix="return inputs of the same shapes",
            )
        return arrays


def _moved(images: Tensor, rng: np.random.Generator, shift: bool, flip: bool) -> Tensor:
    """Each image shifted by whole pixels, zeros coming in, and mirrored."""
    count, _, height, width = images.shape
    down, across = (-(-size // _SHIFT) if shift else 0 for size in (height, width))
    padded = functional.pad(images, (across, across, down, down))
    rows = np.arange(height) + rng.integers(0, 2 * down + 1, (count, 1))
    columns = np.arange(width) + rng.integers(0, 2 * across + 1, (count, 1))
    if flip:
        columns = np.where(rng.random((count, 1)) < 0.5, columns[:, ::-1], columns)
    which = np.arange(count)[:, None, None]
    return torch.from_numpy(
        padded.numpy()
        .transpose(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
        .transpose(0, 3, 1, 2)
    )


def _cropped(images: Tensor, rng: np.random.Generator) -> Tensor:
    """A rectangle of each image, resized back (bilinear)."""
    count = len(images)
    scale = torch.from_numpy(rng.uniform(_LEAST_SIDE, 1, (count, 2)))
    centre = torch.from_numpy(rng.uniform(-1, 1, (count, 2))) * (1 - scale)
    theta = torch.zeros(count, 2, 3, dtype=torch.float64)
    theta[:, 0, 0], theta[:, 1, 1] = scale[:, 0], scale[:, 1]
    theta[:, :, 2] = centre
    values = images if images.is_floating_point() else images.float()
    grid = functional.affine_grid(theta.to(values.dtype), list(images.shape), align_corners=False)
    cropped = functional.grid_sample(values, grid, padding_mode="border", align_corners=False)
    return cropped.round().to(images.dtype) if values is not images else cropped


def _mixed(images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Mix]:
    partner, share = rng.permutation(len(images)), float(rng.beta(_MIXUP, _MIXUP))
    mixed = share * images + (1 - share) * images[torch.from_numpy(partner)]
    return mixed.to(images.dtype), Mix(partner, share)


def _patched(images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Mix]:
    partner, share = rng.permutation(len(images)), float(rng.beta(1.0, 1.0))
    height, width = images.shape[2:]
    side = np.sqrt(1 - share)
    tall, wide = round(height * side), round(width * side)
    top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
    patched = images.clone()
    patch = (slice(None), slice(None), slice(top, top + tall), slice(left, left + wide))
    patched[patch] = images[torch.from_numpy(partner)][patch]
    return patched, Mix(partner, 1 - tall * wide / (height * width))
