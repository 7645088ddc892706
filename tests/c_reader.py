"""Runs the compiled C reader of bundles, and reads what it says."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import featherweight_loader

SOURCES = Path(featherweight_loader.__file__).parent / "c"
CLEAN = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror")
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover")

Compile = Callable[..., Path]


def run(program: Path, *arguments: str | Path, code: int = 0, memory: int = 0) -> str:
    """Its stdout, or its stderr where the code tells of failure; ``memory``: kilobytes of address space."""
    limited = ["bash", "-c", f'ulimit -v {memory}; exec "$0" "$@"'] if memory else []
    done = subprocess.run(
        [*limited, program, *arguments], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert (done.stderr == "") == (code == 0)
    return done.stderr if code else done.stdout


def refused(program: Path, *arguments: str | Path, memory: int = 0) -> str:
    """The one line that it says."""
    (line,) = run(program, *arguments, code=2, memory=memory).splitlines()
    assert line.startswith("fw: ")
    return line


def accepted(program: Path, bundles: Sequence[Path], *more: str | Path) -> list[bool]:
    """Which of many bundles it reads whole, all in one process; no report of a sanitizer."""
    done = subprocess.run(
        [program, "check", *bundles, *more], check=False, capture_output=True, text=True, timeout=280
    )
    assert done.returncode in (0, 2), done.stderr
    whole = {line.partition(": whole, ")[0] for line in done.stdout.splitlines()}
    told = done.stderr.splitlines()
    assert all(line.startswith("fw: ") for line in told), done.stderr
    assert len(whole) + len(told) == len(bundles)
    return [str(path) in whole for path in bundles]
