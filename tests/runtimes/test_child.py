"""Converters run elsewhere: one that aborts, hangs or eats memory costs its own runtime, nothing else."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from featherweight.errors import TargetError
from featherweight.runtimes._child import Limits, convert

LIMITS = Limits(seconds=20)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def call(name: str, limits: Limits = LIMITS, runtime: str = "bad", **arguments: Any) -> Any:
    return convert(runtime, f"bad_converters:{name}", arguments, limits=limits)


def test_calls_of_a_runtime_share_a_process_of_their_own() -> None:
    first, second, other = (
        call("add", one=1, two=2),
        call("add", one=3, two=4),
        call("add", runtime="b", one=5, two=6),
    )
    assert [one["sum"] for one in (first, second, other)] == [3, 7, 11]
    assert first["pid"] == second["pid"] != other["pid"]
    assert os.getpid() not in (first["pid"], other["pid"])


@pytest.mark.parametrize(
    ("name", "words"), [("abort", "was ended by SIGABRT"), ("leave", "ended with exit code 3")]
)
def test_a_crash_is_that_runtimes_error(name: str, words: str) -> None:
    with pytest.raises(TargetError, match=f"bad's converter {words}") as told:
        call(name)
    assert told.value.fix is not None
    assert call("add", one=1, two=1)["sum"] == 2  # the next call gets a new process


@pytest.mark.parametrize("name", ["hang", "hang_in_a_child"])
def test_a_hang_ends_at_its_time_with_all_that_it_started(name: str) -> None:
    pid = call("add", one=1, two=1)["pid"]
    started = time.monotonic()
    with pytest.raises(TargetError, match="gave no answer for 1 s and was stopped"):
        call(name, Limits(seconds=1))
    assert time.monotonic() - started < 15
    assert not psutil.pid_exists(pid)
    assert not [
        one for one in psutil.Process().children(recursive=True) if "sleep(3600)" in " ".join(one.cmdline())
    ]
    assert call("add", one=2, two=2)["sum"] == 4


def test_a_glutton_ends_at_its_memory() -> None:
    with pytest.raises(TargetError, match=r"took more than 0\.4 GB and was stopped"):
        call("eat", Limits(seconds=60, bytes=400_000_000))
    assert call("add", one=2, two=3)["sum"] == 5


def test_errors_come_back_in_words() -> None:
    with pytest.raises(TargetError, match="layer 3 has no such kernel") as told:
        call("refuse")
    assert (told.value.where, told.value.fix) == ("layer 3", "exclude it")
    with pytest.raises(
        TargetError, match="bad cannot convert this model: ValueError: shape mismatch in a long story"
    ):
        call("fail")


@pytest.mark.parametrize(
    ("name", "words"), [("connect", "open a connection"), ("install", "install something")]
)
def test_nothing_is_reached_and_nothing_installed(name: str, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        call(name)


def test_it_sees_no_proxies_and_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    seen = call("environment", runtime="fresh")
    assert "https_proxy" not in seen
    assert seen["HOME"] != os.environ.get("HOME")
    assert sys.executable  # the child is this Python: what is importable here is there
    assert "PYTHONPATH" not in seen
