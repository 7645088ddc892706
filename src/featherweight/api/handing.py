"""What is handed over: an artifact with the programs that open it, and all that ``fit`` tells of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from featherweight import bundle
from featherweight import report as reports
from featherweight.engine.delivered import ABOUT, described
from featherweight.engine.devices import for_runtime
from featherweight.engine.fit import Fitted
from featherweight.engine.output import MARK
from featherweight.engine.run import Run
from featherweight.recipe import Recipe
from featherweight.runtime import Artifact, Target


def deliver(folder: Path, fitted: Fitted, name: str) -> None:
    """Fill the folder that the user of ``fit`` gets; the network is called ``name`` in its texts."""
    result, artifact, run = fitted.result, fitted.weighed.artifact, fitted.lane.run
    # What travels names no device: where it was measured is in the environment.
    target = replace(for_runtime(run.target), options=result.chosen.options or {})
    about = described(artifact, run.runtime, target)
    write_artifact(folder, run, artifact, target, about, origin=result.examples.get("origin"))
    (folder / "recipe.yaml").write_text(Recipe.from_dict(result.recipe).to_yaml(), encoding="utf-8")
    (folder / "model_card.md").write_text(bundle.model_card(result, name=name), encoding="utf-8")
    (folder / "report.html").write_text(reports.render(result), encoding="utf-8")
    (folder / MARK).write_text(result.to_json(), encoding="utf-8")


def write_artifact(
    folder: Path, run: Run, artifact: Artifact, target: Target, about: Mapping[str, Any], *, origin: Any
) -> None:
    """An artifact, the programs that open it, and ``artifact.json``.

    Args:
        folder: Where to.
        run: Of which runtime and of which network.
        artifact: What it lowered.
        target: With which options it is opened.
        about: What ``artifact.json`` says.
        origin: What was done to the examples before the network saw them.
    """
    copy_files(artifact.folder, artifact.files, folder)
    entries = run.start.entries
    name = "forward" if "forward" in entries else next(iter(entries))
    programs = bundle.loaders(run.runtime, artifact, target, entries[name], origin, name=name)
    for file, text in programs.items():
        (folder / file).write_text(text, encoding="utf-8")
    calls = {one: bundle.signature(entry, one).to_json() for one, entry in entries.items()}
    told = {**about, "signatures": calls}
    (folder / ABOUT).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def copy_files(source: Path, names: Iterable[str | Path], folder: Path) -> None:
    """Files, which may lie in folders of their own, one by one: copytree would hide a full disk."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, folder / name)
