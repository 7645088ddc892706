"""The C reader of bundles, compiled once for all tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from c_reader import CLEAN, SANITIZED, SOURCES, Compile


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """``compiled(name, sources, *flags)``: a program of these sources, fw.c and libzstd."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: apt-get install gcc libc6-dev")
    folder = tmp_path_factory.mktemp("c")
    (folder / "zstd.c").write_text(
        "#include <zstd.h>\nint main(void) { return ZSTD_versionNumber() < 10400; }\n"
    )
    tried = [compiler, str(folder / "zstd.c"), "-lzstd", "-o", str(folder / "zstd")]
    if subprocess.run(tried, check=False, capture_output=True).returncode:
        pytest.skip("no zstd.h and libzstd to compile with: apt-get install libzstd-dev")

    def compile_(name: str, sources: Sequence[Path], *flags: str) -> Path:
        out = folder / name
        paths = [str(path) for path in (*sources, SOURCES / "fw.c")]
        command = [compiler, *CLEAN, *flags, f"-I{SOURCES}", *paths, "-lzstd", "-o", str(out)]
        made = subprocess.run(command, check=False, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        return out

    return compile_


@pytest.fixture(scope="session")
def fw(compiled: Compile) -> Path:
    return compiled("fw", [SOURCES / "fw_cli.c"], "-O2")


@pytest.fixture(scope="session")
def sanitized(compiled: Compile) -> Path:
    return compiled("fw-sanitized", [SOURCES / "fw_cli.c"], *SANITIZED)
