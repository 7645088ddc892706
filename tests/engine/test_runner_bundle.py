"""What travels to a machine that has nothing of ours, and how little Python it asks for there."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from featherweight.engine import remote, runner_bundle
from featherweight.engine.runner_bundle import bundle, modules
from featherweight.plugins import find_runtime, runtime_names

MEASURED = [name for name in runtime_names() if not find_runtime(name).unmeasured]
# Names of the standard library that Python 3.10 does not have.
NEWER = {
    "Self",
    "StrEnum",
    "tomllib",
    "ExceptionGroup",
    "file_digest",
    "assert_never",
    "override",
    "TaskGroup",
}


def test_holds_the_engines_part_and_one_runtime() -> None:
    found = modules("onnxruntime")
    assert {"featherweight.engine.runner", "featherweight.runtimes.onnxruntime"} <= set(found)
    assert {"featherweight.runtimes._ort_look", "featherweight.runtimes._ort_profile"} <= set(found)
    assert not [name for name in found if name.startswith(("featherweight.tools", "featherweight.exchange"))]
    assert not {"featherweight.api", "featherweight.engine.jobs", "featherweight.runtimes.torch"} & set(found)


def test_is_the_same_every_time() -> None:
    assert bundle("onnxruntime") == bundle("onnxruntime")
    assert bundle("onnxruntime")[0] != bundle("torch")[0]


def test_of_a_runtime_of_another_package_holds_none() -> None:
    assert not [name for name in modules("fake") if name.startswith("featherweight.runtimes.")]


@pytest.mark.parametrize("runtime", MEASURED)
def test_is_enough_to_find_the_runtime(runtime: str, tmp_path: Path) -> None:
    """In a process that sees the archive and numpy alone: no import fails, none is heavy."""
    import numpy as np

    with tarfile.open(fileobj=io.BytesIO(bundle(runtime)[1])) as archive:
        archive.extractall(tmp_path, filter="data")
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}]
sys.path.append({str(Path(np.__file__).parents[1])!r})
for name in ("torch", "onnx", "pydantic"):
    sys.modules[name] = None  # importing it fails
from featherweight.engine import phases, runner
import featherweight
assert featherweight.__file__.startswith({str(tmp_path)!r}), featherweight.__file__
from featherweight.plugins import find_runtime
assert find_runtime({runtime!r}).name == {runtime!r}
"""
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


@pytest.mark.parametrize("runtime", MEASURED)
def test_asks_for_no_newer_python_than_the_docs_say(runtime: str) -> None:
    paths = [Path(remote.__file__)]
    paths += [path for name in modules(runtime) if (path := runner_bundle._file(name)) is not None]
    for path in paths:
        tree = ast.parse(path.read_text(), feature_version=(3, 10))
        checked = {
            id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in checked:  # not for the type checker alone
                assert not NEWER & {alias.name for alias in node.names}, path
            if isinstance(node, ast.Attribute):
                assert node.attr not in NEWER, path


class TestCache:
    """The cache on the other machine, whose size has a limit."""

    @pytest.fixture
    def cache(self, tmp_path: Path) -> remote.Cache:
        cache = remote.Cache(tmp_path / "cache", limit=1000)
        cache.job_folder()
        for age, name in enumerate(("new", "old", "oldest")):
            path = cache.files / name
            path.write_bytes(b"x" * 300)
            os.utime(path, (1_000_000 - age, 1_000_000 - age))
        return cache

    def kept(self, cache: remote.Cache) -> set[str]:
        return {path.name for path in cache.files.iterdir()}

    def test_drops_what_was_not_used_for_longest(self, cache: remote.Cache) -> None:
        cache.make_room(100, set())
        assert self.kept(cache) == {"new", "old", "oldest"}
        cache.make_room(350, set())
        assert self.kept(cache) == {"new", "old"}

    def test_spares_what_the_job_needs(self, cache: remote.Cache) -> None:
        assert cache.lacks({"oldest": 300, "other": 5}) == ["other"]
        cache.make_room(350, {"oldest"})
        assert self.kept(cache) == {"new", "oldest"}

    def test_takes_no_file_of_another_size(self, cache: remote.Cache) -> None:
        assert cache.lacks({"new": 299}) == ["new"]

    def test_sweeps_folders_of_jobs_that_are_dead(self, cache: remote.Cache) -> None:
        done = subprocess.Popen([sys.executable, "-c", ""])
        done.wait()
        left = cache.folder / "jobs" / f"1-{done.pid}"
        left.mkdir()
        folder = cache.job_folder()
        assert folder.is_dir()
        assert not left.exists()
