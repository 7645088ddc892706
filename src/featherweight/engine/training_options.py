"""How steps that train do so, as the user said it: the devices, the precision, the user's code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import torch

from featherweight.engine.environment import describe
from featherweight.errors import RecipeError, TargetError, nearest
from featherweight.method import Precision
from featherweight.recipe import Recipe
from featherweight.runtime import Target


def training_options(devices: int, precision: str) -> dict[str, Any]:
    """Arguments of ``Run``.

    Args:
        devices: Processes that share each batch: on as many GPUs, or cores where there is none.
        precision: One of ``Precision``.

    Raises:
        TargetError: There are fewer cores or GPUs.
        RecipeError: There is no such precision.
    """
    if precision not in get_args(Precision):
        raise RecipeError(
            f"there is no precision '{precision}' to train in", fix=nearest(precision, get_args(Precision))
        )
    there = torch.cuda.device_count() or describe(Target()).cores
    if not 1 <= devices <= there:
        raise TargetError(
            f"{devices} devices are asked for, and this machine has {there} to train on",
            fix=f"--devices {there}",
        )
    return {"devices": devices, "precision": precision}


def recipe_code(recipe: Recipe) -> str:
    """Digest of the user's files that a recipe names; '' without any. Edited, they must be run again."""
    found = set()
    for step in recipe.steps:
        for text in _texts(dict(step.parameters)):
            with suppress(OSError):
                if ".py:" in text:
                    found.add(hashlib.sha256(Path(text.rpartition(":")[0]).read_bytes()).hexdigest())
    return ",".join(sorted(found))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)
