"""``artifact.json``: what lies in a folder that was handed over, and how it is opened again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.errors import LoadError
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Runtime, Signature, Target

ABOUT = "artifact.json"


@dataclass(frozen=True)
class Delivered:
    """An artifact in a folder, how it was measured, and how its entries are called, where that is told."""

    artifact: Artifact
    target: Target
    signatures: tuple[Signature, ...] = ()


def described(artifact: Artifact, runtime: Runtime, target: Target) -> dict[str, Any]:
    """Everything that opening the artifact again takes, and what each tensor is stored as."""
    return {
        **artifact.to_json(),
        "sha256": artifact.sha256,
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
        found = of_folder(place)
    else:
        from featherweight.engine.files import as_artifact  # it imports torch

        found = Delivered(as_artifact(place, runtime), Target(runtime).resolved())
    find_runtime(found.artifact.runtime).require()
    return found


def of_folder(folder: Path) -> Delivered:
    """What lies in a folder, whether or not its runtime is installed.

    Raises:
        LoadError: There is no artifact, or its description is damaged.
    """
    if not (folder / ABOUT).is_file():
        what = f"holds no {ABOUT}" if folder.is_dir() else "is no folder"
        what = what if folder.exists() else "does not exist"
        raise LoadError(f"'{folder}' {what}", fix="name a folder that featherweight fit or lower wrote")
    try:
        told = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        artifact = Artifact.from_json(told, folder)
        target = Target(**told["target"])
        calls = told.get("signatures", {})
        signatures = tuple(Signature.from_json(calls[entry], entry) for entry in calls)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(
            f"'{folder / ABOUT}' is damaged: {error}", fix="run featherweight fit or lower again"
        ) from error
    lost = [name for name in artifact.files if not (folder / name).is_file()]
    if lost:
        raise LoadError(f"'{folder}' lacks '{lost[0]}'", fix="copy the folder whole")
    return Delivered(artifact, target, signatures)
