"""In CI a skipped test fails, since every runtime is installed there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = """
import pytest

@pytest.mark.skip(reason="no such runtime")
def test_marked(): ...

def test_at_run_time():
    pytest.skip("no such runtime")

@pytest.mark.network
def test_network():
    pytest.skip("offline")

@pytest.mark.xfail(strict=True, reason="known upstream")
def test_known():
    assert False

def test_works(): ...
"""
MODULE = 'import pytest\npytest.importorskip("a_runtime_that_is_not_there")\n'


@pytest.mark.parametrize(
    ("ci", "expected"),
    [
        ("", ["1 passed", "1 xfailed", "4 skipped"]),
        ("1", ["1 failed", "1 passed", "1 skipped", "1 xfailed", "2 errors"]),
    ],
)
def test_a_skip_is_a_failure_in_ci_only(tmp_path: Path, ci: str, expected: list[str]) -> None:
    (tmp_path / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "test_module.py").write_text(MODULE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  network: offline\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:anyio", str(tmp_path)]
    environment = {**os.environ, "FEATHERWEIGHT_CI": ci}
    done = subprocess.run(
        [*command, "--continue-on-collection-errors"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    last = done.stdout.strip().splitlines()[-1]
    assert sorted(part.strip(" =") for part in last.partition(" in ")[0].split(",")) == expected
    if ci:
        assert "a skip is a failure under FEATHERWEIGHT_CI: " in done.stdout
