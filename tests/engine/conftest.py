"""The fake runtime, importable here and in runners."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from board import board as board  # fixtures: a second machine on the loopback address
from board import board_sshd as board_sshd
from featherweight.runtime import Artifact, Target

Make = Callable[..., Artifact]


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    """One core of this machine, through the fake runtime, which is installed as a package would be."""
    site = tmp_path / "site"
    about = site / "fake_runtime-1.0.dist-info"
    about.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("fake_runtime.py"), site)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-runtime\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[featherweight.runtimes]\nfake = fake_runtime:Fake\n")
    monkeypatch.syspath_prepend(str(site))
    return Target("fake", "generic", 1)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes artifacts whose sessions do what they are told."""

    def one(name: str, **told: Any) -> Artifact:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.json").write_text(json.dumps(told))
        return Artifact("fake", folder, ("model.json",), {"forward": "model.json"})

    return one
