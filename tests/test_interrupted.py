"""Killed, interrupted, without a network, on a full disk: the same answer or none, never a half one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from commands import Commands, journal, partial, prepared
from featherweight.cli import INTERRUPTED, NOT_MET, main
from featherweight.engine.evaluate import Scales, Weighed
from featherweight.model import Model

RECIPE = "version: 1\nsteps:\n  - fold: {}\n  - quantize: {}\n"
FIT = (
    *(
        "fit",
        "net.py:net",
        "--data",
        "data.npz",
        "--recipe",
        "recipe.yaml",
        "--measure-time",
        "0.2s",
        "--no-tune",
    ),
    *("--max-size", "1MB"),
)


@dataclass(frozen=True)
class Undisturbed:
    """A fit that nobody disturbed.

    Attributes:
        cache: Its store.
        out: Its folder.
        computed: Kind and key of everything in the store.
        sha256: Of its artifact.
        seconds: How long it took.
    """

    cache: Path
    out: Path
    computed: tuple[tuple[str, str], ...]
    sha256: str
    seconds: float


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("interrupted"), recipe=RECIPE, scored=32)


@pytest.fixture(scope="module")
def commands(place: Path) -> Iterator[Commands]:
    with Commands(place) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(place: Path, commands: Commands) -> Undisturbed:
    cache = place / "cache"
    seconds = commands.run(*FIT, "--out", "undisturbed", cache=cache).seconds
    assert commands.last.code == 0, commands.err
    out = place / "undisturbed"
    return Undisturbed(cache, out, tuple(journal(cache)), sha256_of(out), seconds)


def sha256_of(out: Path) -> str:
    """The digest that a fit's result tells."""
    return str(json.loads((out / "result.json").read_text())["chosen"]["sha256"])


def assert_resumed(out: Path, cache: Path, undisturbed: Undisturbed) -> None:
    assert sha256_of(out) == undisturbed.sha256
    counted = Counter(journal(cache))
    assert counted == Counter(undisturbed.computed)
    assert max(counted.values()) == 1
    assert partial(cache) == []
    assert partial(out.parent) == []


class TestKilled:
    def test_the_next_run_goes_on(
        self, place: Path, commands: Commands, undisturbed: Undisturbed, tmp_path: Path
    ) -> None:
        draw, killed = random.Random(3), 0
        for _ in range(3):
            moment = draw.uniform(0.2, 0.7) * undisturbed.seconds
            run = commands.run(*FIT, "--out", "killed", cache=tmp_path, kill_after=moment)
            killed += run.code == -signal.SIGKILL
        assert killed
        assert commands.run(*FIT, "--out", "killed", cache=tmp_path).code == 0
        assert_resumed(place / "killed", tmp_path, undisturbed)

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    @pytest.mark.parametrize("seed", range(10))
    def test_at_any_moment(
        self, place: Path, commands: Commands, undisturbed: Undisturbed, tmp_path: Path, seed: int
    ) -> None:
        moment, out = random.Random(seed).uniform(0.0, 1.0) * undisturbed.seconds, f"killed{seed}"
        run = commands.run(*FIT, "--out", out, cache=tmp_path, kill_after=moment)
        assert run.code == -signal.SIGKILL or run.seconds < moment
        assert commands.run(*FIT, "--out", out, cache=tmp_path).code == 0
        assert_resumed(place / out, tmp_path, undisturbed)


class TestRerun:
    def test_computes_nothing(self, place: Path, commands: Commands, undisturbed: Undisturbed) -> None:
        before = journal(undisturbed.cache)
        again = commands.run(*FIT, "--out", "undisturbed", cache=undisturbed.cache)
        assert again.code == 0
        elsewhere = commands.run(*FIT, "--out", "elsewhere", cache=undisturbed.cache)
        assert elsewhere.code == 0
        assert journal(undisturbed.cache) == before
        for file in undisturbed.out.iterdir():
            assert (place / "elsewhere" / file.name).read_bytes() == file.read_bytes()

    def test_takes_a_fraction(self, commands: Commands, undisturbed: Undisturbed) -> None:
        again = commands.run(*FIT, "--out", "undisturbed", cache=undisturbed.cache)
        assert (
            again.seconds < undisturbed.seconds / 3
        )  # its start-up aside; the bar of a tenth is for real ones

    def test_another_run_is_refused_and_then_replaced(
        self, place: Path, commands: Commands, undisturbed: Undisturbed
    ) -> None:
        commands.run(*FIT, "--out", "replaced", cache=undisturbed.cache)
        other = (*FIT[:-1], "2MB", "--out", "replaced")
        assert commands.run(*other, cache=undisturbed.cache).code == 2
        assert "holds another run" in commands.err
        assert json.loads((place / "replaced" / "result.json").read_text())["budget"]["bytes"] == 1_000_000
        before = journal(undisturbed.cache)
        assert commands.run(*other, "--force", cache=undisturbed.cache).code == 0
        assert json.loads((place / "replaced" / "result.json").read_text())["budget"]["bytes"] == 2_000_000
        new = journal(undisturbed.cache)[len(before) :]
        assert [kind for kind, _ in new] == ["runs"]  # another question about the same measurements


def test_without_a_network(place: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode:
        pytest.skip("unshare -n is not permitted here")
    with Commands(place, prefix=("unshare", "-n")) as alone:
        assert alone.run(*FIT, "--out", "alone", cache=tmp_path).code == 0, alone.err
    assert_resumed(place / "alone", tmp_path, undisturbed)


class TestInterrupted:
    @pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
    def test_before_anything_was_measured(
        self, place: Path, commands: Commands, undisturbed: Undisturbed, tmp_path: Path, kind: signal.Signals
    ) -> None:
        moment = 0.4 * undisturbed.seconds
        run = commands.run(*FIT, "--out", "early", cache=tmp_path, kill_after=moment, with_signal=kind)
        assert run.code == INTERRUPTED, commands.err
        assert "run the same command again" in commands.err
        assert "Traceback" not in commands.err
        assert not (place / "early").exists()
        assert partial(place) == partial(tmp_path) == []

    def test_best_so_far_is_handed_back(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(place)
        weigh, calls = Scales.weigh, []

        def interrupted(scales: Scales, model: Model) -> Weighed:
            calls.append(model)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return weigh(scales, model)

        monkeypatch.setattr(Scales, "weigh", interrupted)
        search = (
            "fit",
            "net.py:net",
            "--data",
            "data.npz",
            "--trials",
            "3",
            "--measure-time",
            "0.2s",
            "--no-tune",
        )
        assert main([*search, "--max-size", "1KB", "--out", "best"]) == NOT_MET
        assert "interrupted: the best so far is handed back" in capsys.readouterr().err
        result = json.loads((place / "best" / "result.json").read_text())
        assert not result["met"]
        assert [trial["number"] for trial in result["trials"]] == [0]
        assert "the search was interrupted after 1 trials" in result["warnings"]
        assert (place / "best" / "model.onnx").exists()

    def test_in_a_callback_whose_errors_python_ignores(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(place)
        called: list[object] = []

        def callback(reference: object) -> None:
            called.append(reference)
            os.kill(os.getpid(), signal.SIGINT)
            list(range(10))  # the signal is heard before this ends

        def interrupted(scales: Scales, model: Model) -> Weighed:
            gone = threading.Event()
            reference = weakref.ref(gone, callback)
            del gone
            assert called == [reference]
            time.sleep(30)
            raise AssertionError("nobody heard of the signal")

        monkeypatch.setattr(Scales, "weigh", interrupted)
        assert main([*FIT, "--out", "called"]) == INTERRUPTED
        assert "run the same command again" in capsys.readouterr().err

    def test_while_it_chooses(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(place)
        layers, calls = Scales.layers, []

        def interrupted(scales: Scales, *rest: object, figures: bool) -> object:
            calls.append(figures)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return layers(scales, *rest, figures=figures)  # type: ignore[arg-type]

        monkeypatch.setattr(Scales, "layers", interrupted)
        assert main([*FIT, "--out", "chosen"]) == 0
        assert "interrupted" in capsys.readouterr().err
        assert calls == [True, False]  # what takes passes through the network is left out the second time
        assert (place / "chosen" / "result.json").exists()

    def test_twice_means_nothing_is_wanted(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(place)

        def interrupted(scales: Scales, *rest: object, figures: bool) -> object:
            raise KeyboardInterrupt

        monkeypatch.setattr(Scales, "layers", interrupted)
        assert main([*FIT, "--out", "unwanted", "--json"]) == INTERRUPTED
        assert json.loads(capsys.readouterr().out)["error"]["kind"] == "Interrupted"
        assert not (place / "unwanted").exists()
        assert partial(place) == []


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own that is soon full."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class TestFullDisk:
    @pytest.mark.parametrize("size", ["16k", "64k", "400k"])
    def test_under_the_store(self, place: Path, commands: Commands, tmp_path: Path, size: str) -> None:
        with small_disk(tmp_path / "disk", size) as disk:
            run = commands.run(*FIT, "--out", "full", cache=disk)
            assert run.code == 1, commands.err
            assert "the disk is full" in commands.err
            assert "fix: free some space and run the same command again: it resumes" in commands.err
            assert "Traceback" not in commands.err
            assert partial(disk) == []
        assert not (place / "full").exists()
        assert partial(place) == []

    def test_under_the_output(
        self, place: Path, commands: Commands, undisturbed: Undisturbed, tmp_path: Path
    ) -> None:
        with small_disk(tmp_path / "disk", "200k") as disk:
            run = commands.run(*FIT, "--out", str(disk / "full"), cache=undisturbed.cache)
            assert run.code == 1, commands.err
            assert "the disk is full" in commands.err
            assert list(disk.iterdir()) == []

    def test_under_temporary_files(self, place: Path, commands: Commands, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", "8k") as disk:
            environment = {"TMPDIR": str(disk)}
            run = commands.run(*FIT, "--out", "full", cache=tmp_path / "cache", environment=environment)
            assert run.code == 1, commands.err
            assert "the disk is full" in commands.err
        assert not (place / "full").exists()
