"""Every snippet of the README and the docs runs as it is written, and generated tables are up to date."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.outcome import Result
from featherweight.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "README.zh-CN.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MAKE = re.compile(r"make ([a-z-]+)")


def blocks(page: Path, language: str) -> list[str]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [match[2] for match in found if match[1] == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout; what one snippet writes, the next one finds."""
    place = tmp_path_factory.mktemp("checkout")
    (place / "examples").symlink_to(ROOT / "examples")
    (place / "src").symlink_to(ROOT / "src")
    (place / ".venv").symlink_to(sys.prefix)
    return place


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "FEATHERWEIGHT_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)[:200]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path, folder: Path) -> None:
    """All Python of a page as one script, since later blocks use names of earlier ones; then its commands."""
    known = {match[1] for match in BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert known <= {"python", "yaml", "sh", "text", "json", "console"}
    script = "\n".join(blocks(page, "python"))
    if script:
        run([sys.executable, "-W", "ignore", "-c", script], folder)
    for text in blocks(page, "yaml"):
        Recipe.parse(text)
    for text in blocks(page, "sh"):
        check_commands(text, folder)


def check_commands(text: str, folder: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in MAKE.findall(text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"there is no make {target}"
    commands = "\n".join(line for line in text.splitlines() if not line.startswith("make "))
    if commands.strip():
        run(["bash", "-euc", commands], folder)


def test_generated_tables_are_up_to_date() -> None:
    run([sys.executable, "-W", "ignore", str(ROOT / "docs" / "generate.py"), "--check"], ROOT)


def test_both_readmes_have_the_same_snippets() -> None:
    english, chinese = (
        [match[2] for match in BLOCK.finditer((ROOT / name).read_text(encoding="utf-8"))]
        for name in ("README.md", "README.zh-CN.md")
    )
    assert english == chinese


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "fits").glob("*.json")), ids=lambda file: file.stem)
def test_results_of_the_fits_can_be_read(file: Path) -> None:
    result = Result.model_validate_json(file.read_text(encoding="utf-8"))
    (chosen,) = [trial for trial in result.trials if trial.chosen]
    assert chosen.recipe == result.recipe
    told = (ROOT / "docs" / "fits.md").read_text(encoding="utf-8")
    assert f"fits/{file.name}" in told
    assert f"{100 * (result.chosen.quality_drop or 0.0):.2f}" in told
    assert f"{result.chosen.latency_ratio:.3f}" in told
