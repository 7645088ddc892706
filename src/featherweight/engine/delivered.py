"""``artifact.json``: what lies in a folder that was handed over, and how it is opened again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.engine.files import as_artifact
from featherweight.errors import LoadError
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Runtime, Target

ABOUT = "artifact.json"


@dataclass(frozen=True)
class Delivered:
    """An artifact in a folder, and how it was measured there."""

    artifact: Artifact
    target: Target


def described(artifact: Artifact, runtime: Runtime, target: Target) -> dict[str, Any]:
    """Everything that opening the artifact again takes, and what each tensor is stored as."""
    return {
        **artifact.to_json(),
        "target": target.to_json(),
        "versions": runtime.version(),
        "stored": {name: [one.dtype, one.bytes] for name, one in runtime.stored(artifact).items()},
    }


def delivered(path: str | Path, runtime: str = "onnxruntime") -> Delivered:
    """What :func:`described` told, read again; a lone file is for the runtime that is named.

    Raises:
        LoadError: There is no artifact, or its description is damaged.
        MissingRuntime: Its runtime is not installed.
    """
    place = Path(path)
    if (place / ABOUT).is_file():
        found = _of_folder(place)
    else:
        found = Delivered(as_artifact(place, runtime), Target(runtime).resolved())
    find_runtime(found.artifact.runtime).require()
    return found


def _of_folder(folder: Path) -> Delivered:
    if not folder.is_dir():
        raise LoadError(
            f"'{folder}' does not exist", fix="name a folder that featherweight fit or lower wrote"
        )
    try:
        told = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        artifact = Artifact.from_json(told, folder)
        target = Target(**told["target"])
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"'{folder / ABOUT}' is damaged: {error}", fix="run featherweight fit or lower again"
        ) from error
    lost = [name for name in artifact.files if not (folder / name).is_file()]
    if lost:
        raise LoadError(f"'{folder}' lacks '{lost[0]}'", fix="copy the folder whole")
    return Delivered(artifact, target)
