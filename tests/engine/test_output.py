"""The output folder appears whole or not at all, and nothing of the user's is ever replaced."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.engine.output import check_other_run, check_output, held_run, write_folder
from featherweight.errors import MachineError, OutputError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_one(folder: Path) -> None:
    (folder / "result.json").write_text('{"run": "abc"}')


class TestCheck:
    @pytest.mark.parametrize("mark", ["result.json", "model.json", "artifact.json"])
    def test_what_a_command_wrote_may_be_replaced(self, tmp_path: Path, mark: str) -> None:
        (tmp_path / mark).write_text("{}")
        check_output(tmp_path)
        with pytest.raises(OutputError, match="holds another run"):
            check_other_run(tmp_path, force=False)
        check_other_run(tmp_path, force=True)

    def test_the_same_run_may_come_again(self, tmp_path: Path) -> None:
        write_one(tmp_path)
        assert held_run(tmp_path) == "abc"
        check_other_run(tmp_path, force=False, keys=["abc"])
        with pytest.raises(OutputError):
            check_other_run(tmp_path, force=False, keys=["abd"])

    def test_new_and_empty_folders_are_fine(self, tmp_path: Path) -> None:
        for out in (tmp_path, tmp_path / "new"):
            check_output(out)
            check_other_run(out, force=False)
        assert held_run(tmp_path) is None

    def test_other_files_are_never_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(OutputError, match="did not write"):
            check_output(tmp_path)

    def test_files_that_are_known_by_their_paths_are_ours(self, tmp_path: Path) -> None:
        (tmp_path / "litert").mkdir()
        (tmp_path / "litert" / "model.tflite").write_text("ours")
        check_output(tmp_path, {"litert/model.tflite", "LICENSE"})
        for known in ((), {"model.tflite"}):
            with pytest.raises(OutputError, match="did not write"):
                check_output(tmp_path, known)

    def test_the_current_folder_and_those_above(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a" / "b").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "a" / "b")
        for out in (Path(), Path(".."), Path("../.."), Path("/")):
            with pytest.raises(OutputError, match="current folder"):
                check_output(out)
        check_output(Path("../c"))


class TestWrite:
    def test_replaces_a_folder_as_a_whole(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "old").write_text("old")
        write_folder(out, write_one)
        assert names(out) == {"result.json"}
        assert names(tmp_path) == {"out"}

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
    def test_leaves_the_old_one_when_it_fails(self, tmp_path: Path, error: BaseException) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "old").write_text("old")

        def fail(folder: Path) -> None:
            (folder / "half").write_text("half")
            raise error

        with pytest.raises((MachineError, KeyboardInterrupt)):
            write_folder(out, fail)
        assert names(out) == {"old"}
        assert names(tmp_path) == {"out"}

    def test_sweeps_what_killed_processes_left(self, tmp_path: Path) -> None:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        for pid in (dead.pid, os.getppid()):
            (tmp_path / f".out.partial-{pid}").mkdir()
        (tmp_path / f".out.old.partial-{dead.pid}").mkdir()
        write_folder(tmp_path / "out", write_one)
        assert names(tmp_path) == {"out", f".out.partial-{os.getppid()}"}

    def test_puts_back_what_a_killed_process_had_set_aside(self, tmp_path: Path) -> None:
        """Killed between its two renames, a process leaves the old folder under another name alone."""
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        aside = tmp_path / f".out.old.partial-{dead.pid}"
        aside.mkdir()
        (aside / "old").write_text("old")

        def fail(folder: Path) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_folder(tmp_path / "out", fail)
        assert names(tmp_path) == {"out"}
        assert names(tmp_path / "out") == {"old"}
