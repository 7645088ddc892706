"""The store: an entry is whole or not there, whatever happened to the process that wrote it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.engine.store import Store, default_folder, digest, machine_mark, sources_digest, sweep
from featherweight.errors import DataError, MachineError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def fill(folder: Path) -> None:
    (folder / "a.txt").write_text("a")
    (folder / "inner").mkdir()
    (folder / "inner" / "b.txt").write_text("b")


def everything(store: Store) -> list[str]:
    """What lies in the store's kinds, hidden or not."""
    return sorted(str(path.relative_to(store.folder)) for path in store.folder.glob("*/*"))


def journal(store: Store) -> list[dict[str, object]]:
    file = store.folder / "journal.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


class TestEntries:
    def test_are_read_again(self, store: Store) -> None:
        assert store.get("steps", "k") is None
        path = store.put("steps", "k", fill)
        assert path == store.folder / "steps" / "k"
        assert store.get("steps", "k") == path
        assert (path / "inner" / "b.txt").read_text() == "b"
        assert store.get("artifacts", "k") is None
        assert Store(store.folder).get("steps", "k") == path

    def test_of_one_piece_of_json(self, store: Store) -> None:
        data = {"a": [1, 2.5, None], "b": {"c": "ä"}}
        assert store.get_json("scores", "k") is None
        store.put_json("scores", "k", data)
        assert store.get_json("scores", "k") == data

    def test_are_in_the_journal_once(self, store: Store) -> None:
        store.put("steps", "a", fill)
        store.put("steps", "b", fill)
        store.get("steps", "a")
        store.put("steps", "a", fill)
        assert [(line["kind"], line["key"]) for line in journal(store)] == [("steps", "a"), ("steps", "b")]
        assert all(float(str(line["seconds"])) >= 0 for line in journal(store))

    def test_nothing_is_made_before_the_first(self, store: Store) -> None:
        store.get("steps", "k")
        store.trim()
        assert not store.folder.exists()


class TestFailure:
    @pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
    def test_leaves_nothing(self, store: Store, error: BaseException) -> None:
        def fail(folder: Path) -> None:
            fill(folder)
            raise error

        with pytest.raises(type(error)):
            store.put("steps", "k", fail)
        assert everything(store) == []
        assert journal(store) == []
        assert store.get("steps", "k") is None
        assert store.put("steps", "k", fill).is_dir()

    def test_a_killed_process_leaves_no_entry(self, store: Store) -> None:
        code = (
            "import os, signal, sys\nfrom pathlib import Path\nfrom featherweight.engine.store import Store\n"
            "def write(folder):\n"
            "    (folder / 'half').write_text('half')\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "Store(Path(sys.argv[1])).put('steps', 'k', write)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(store.folder)], check=False)
        assert done.returncode == -9
        assert len(everything(store)) == 1  # what it was about to write, under no entry's name
        assert store.get("steps", "k") is None
        store.put("steps", "k", fill)
        assert everything(store) == ["steps/k"]
        assert len(journal(store)) == 1

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_is_told(self, store: Store, number: int) -> None:
        def write(folder: Path) -> None:
            raise OSError(number, os.strerror(number), str(folder / "weights.safetensors"))

        with pytest.raises(MachineError, match="the disk is full") as told:
            store.put("steps", "k", write)
        assert told.value.exit_code == 1
        assert told.value.where is not None
        assert told.value.where.endswith("weights.safetensors")
        assert told.value.fix is not None
        assert "free some space" in told.value.fix
        assert isinstance(told.value.__cause__, OSError)
        assert everything(store) == []

    def test_a_disk_that_fills_up_while_the_journal_is_written(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Store, "_log", full)
        with pytest.raises(MachineError, match="full"):
            store.put("steps", "k", fill)
        path = store.get("steps", "k")
        assert path is None or (path / "inner" / "b.txt").is_file()

    def test_a_folder_that_cannot_be_written_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(MachineError, match="could not be written") as told:
            Store(tmp_path / "file").put("steps", "k", fill)
        assert told.value.fix == "check the folder's permissions"

    def test_an_error_of_ours_stays_what_it_is(self, store: Store) -> None:
        def write(folder: Path) -> None:
            raise DataError("NaN")

        with pytest.raises(DataError):
            store.put("steps", "k", write)


class TestTwoProcesses:
    def test_the_quicker_one_wins(self, store: Store) -> None:
        def slow(folder: Path) -> None:
            (folder / "mine").write_text("")
            final = store.folder / "steps" / "k"
            final.mkdir()
            (final / "theirs").write_text("")

        path = store.put("steps", "k", slow)
        assert [file.name for file in path.iterdir()] == ["theirs"]
        assert everything(store) == ["steps/k"]
        assert journal(store) == []

    def test_also_between_the_look_and_the_leap(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        rename = Path.rename

        def late(path: Path, target: Path) -> Path:
            target.mkdir()
            (target / "theirs").write_text("")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", late)
        path = store.put("steps", "k", fill)
        assert [file.name for file in path.iterdir()] == ["theirs"]
        assert everything(store) == ["steps/k"]
        assert journal(store) == []

    def test_what_another_one_is_writing_stays(self, store: Store) -> None:
        kind = store.folder / "steps"
        kind.mkdir(parents=True)
        dead = dead_pid()
        here = machine_mark()
        alive, elsewhere = f".y.partial-{here}-{os.getppid()}", f".w.partial-00000000-{dead}"
        for name in (f".x.partial-{here}-{dead}", alive, elsewhere, ".z.partial-abc", "finished"):
            (kind / name).mkdir()
        store.put("steps", "k", fill)
        kept = [elsewhere, alive, ".z.partial-abc", "finished", "k"]
        assert everything(store) == [f"steps/{name}" for name in kept]

    def test_sweeping_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        sweep(tmp_path / "nowhere", "*")
        assert not (tmp_path / "nowhere").exists()


class TestTrim:
    @staticmethod
    def used_at(store: Store, key: str, seconds: float) -> None:
        os.utime(store.folder / "steps" / key, (seconds, seconds))

    def test_removes_what_was_not_used_for_longest(self, store: Store) -> None:
        for key in "abcd":
            store.put("steps", key, lambda folder: (folder / "f").write_bytes(bytes(1000)))
        for age, key in enumerate("dcba"):
            self.used_at(store, key, 1000.0 + age)
        store.get("steps", "d")  # the oldest one, used again
        store.limit_bytes = 2500
        store.trim()
        assert everything(store) == ["steps/a", "steps/d"]
        assert len(journal(store)) == 4

    def test_leaves_everything_within_the_limit(self, store: Store) -> None:
        store.put("steps", "a", fill)
        store.limit_bytes = 2
        store.trim()
        assert everything(store) == ["steps/a"]
        store.limit_bytes = 1
        store.trim()
        assert everything(store) == []

    def test_counts_all_kinds_and_leaves_what_is_being_written(self, store: Store) -> None:
        store.put("steps", "a", lambda folder: (folder / "f").write_bytes(bytes(1000)))
        store.put("runs", "b", lambda folder: (folder / "f").write_bytes(bytes(1000)))
        os.utime(store.folder / "runs" / "b", (1000.0, 1000.0))
        writing = store.folder / "steps" / f".c.partial-{os.getppid()}"
        writing.mkdir()
        (writing / "f").write_bytes(bytes(5000))
        store.limit_bytes = 1500
        store.trim()
        assert everything(store) == [f"steps/.c.partial-{os.getppid()}", "steps/a"]


class TestPlace:
    def test_is_the_variables_else_the_users_cache(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "own"))
        assert default_folder() == tmp_path / "own"
        monkeypatch.delenv("FEATHERWEIGHT_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert default_folder() == tmp_path / "xdg" / "featherweight"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert default_folder() == tmp_path / ".cache" / "featherweight"


class TestDigest:
    def test_is_of_the_content(self) -> None:
        assert digest("a", {"x": 1, "y": [2]}) == digest("a", {"y": [2], "x": 1})
        others = [
            digest("a", {"x": 1}),
            digest("a", {"x": 2}),
            digest("b", {"x": 1}),
            digest("a"),
            digest(["a"]),
        ]
        assert len(set(others)) == len(others)
        assert all(len(text) == 64 for text in others)

    def test_of_the_sources_is_the_same_twice(self) -> None:
        assert sources_digest() == sources_digest()
        assert len(sources_digest()) == 64
