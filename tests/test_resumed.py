"""A search that was killed, interrupted or out of time goes on: nothing is measured twice, all count."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from commands import Commands, journal, partial, prepared
from featherweight.cli import NOT_MET

RECIPE = (
    "version: 1\nsteps:\n  - fold: {}\n"
    "  - quantize: {range: {choice: [minmax, mse, percentile]}, samples: {choice: [8, 16]}}\n"
)
FIT = (
    *("fit", "net.py:net", "--data", "data.npz", "--recipe", "recipe.yaml", "--trials", "5"),
    *("--measure-time", "0.2s", "--no-tune", "--max-size", "1MB"),
)

ONE = ("--trials", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("resumed"), recipe=RECIPE, scored=240)


@pytest.fixture(scope="module")
def commands(place: Path) -> Iterator[Commands]:
    with Commands(place) as started:
        yield started


def told(cache: Path) -> list[dict[str, Any]]:
    """Trials whose figures are in a search's journal."""
    files = list(cache.glob("searches/*/search.journal"))
    lines = files[0].read_bytes().split(b"\n")[:-1] if files else []
    found = (json.loads(line).get("user_attr", {}).get("trial") for line in lines)
    return [json.loads(trial) for trial in found if trial]


def in_the_middle(cache: Path, trials: int) -> Callable[[], bool]:
    """Whether so many trials were told and the next one has come far enough to be scored."""

    def met() -> bool:
        scored = cache / "scores"
        begun = list(scored.glob(".*partial*")) if scored.is_dir() else []
        return bool(begun) and len(told(cache)) >= trials

    return met


def result_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "result.json").read_text()))


def assert_measured_once(cache: Path) -> None:
    counted = Counter(journal(cache))
    assert max(counted.values()) == 1, counted.most_common(3)


def test_after_kill_9_in_the_middle_of_a_trial(place: Path, commands: Commands, tmp_path: Path) -> None:
    run = commands.run(*FIT, "--out", "killed", cache=tmp_path, kill_when=in_the_middle(tmp_path, 2))
    assert run.code == -signal.SIGKILL, commands.err
    before, known = journal(tmp_path), told(tmp_path)
    assert len(known) >= 2
    assert not (place / "killed").exists()

    assert commands.run(*FIT, "--out", "killed", "--resume", cache=tmp_path).code in (0, NOT_MET), (
        commands.err
    )
    assert f"the search goes on after {len(known)} trials" in commands.err
    result = result_of(place / "killed")
    assert result["resumed"] == len(known)
    assert [trial["number"] for trial in result["trials"]] == [0, 1, 2, 3, 4]
    for trial, one in zip(result["trials"], known, strict=False):  # the figures of before, to the last bit
        assert trial["measurement"] == one["measurement"]
        assert (trial["recipe"], trial["sha256"], trial["seconds"]) == (
            *(one["recipe"], one["sha256"], one["seconds"]),
        )
    recipes = {json.dumps(trial["recipe"]) for trial in result["trials"]}
    assert len(recipes) == 5
    assert_measured_once(tmp_path)
    assert journal(tmp_path)[: len(before)] == before
    assert partial(tmp_path) == partial(place) == []

    again = len(journal(tmp_path))  # a finished run is read from the store, also with --resume
    assert commands.run(*FIT, "--out", "killed", "--resume", cache=tmp_path).code in (0, NOT_MET)
    assert len(journal(tmp_path)) == again
    assert result_of(place / "killed") == result


def test_after_ctrl_c_and_with_more_trials(place: Path, commands: Commands, tmp_path: Path) -> None:
    run = commands.run(
        *FIT, "--out", "stopped", cache=tmp_path, with_signal=signal.SIGINT,
        kill_when=in_the_middle(tmp_path, 1),
    )  # fmt: skip
    assert run.code in (0, NOT_MET), commands.err
    first = result_of(place / "stopped")
    assert 1 <= len(first["trials"]) < 5
    assert "the same command with --resume goes on from there" in first["warnings"]
    more = (*FIT[: FIT.index("--trials")], "--trials", "6", *FIT[FIT.index("--trials") + 2 :])
    assert commands.run(*more, "--out", "stopped", "--resume", cache=tmp_path).code in (0, NOT_MET)
    last = result_of(place / "stopped")
    assert last["resumed"] == len(first["trials"])
    assert len(last["trials"]) == 6  # all that the recipe leaves open
    assert [trial["sha256"] for trial in last["trials"]][: last["resumed"]] == [
        trial["sha256"] for trial in first["trials"]
    ]
    assert_measured_once(tmp_path)


def test_out_of_time_and_resumed_with_more(place: Path, commands: Commands, tmp_path: Path) -> None:
    assert commands.run(*FIT, "--time", "0s", "--out", "late", cache=tmp_path).code in (0, NOT_MET)
    first = result_of(place / "late")
    assert len(first["trials"]) == 1
    assert commands.run(*FIT, "--time", "10m", "--out", "late", "--resume", cache=tmp_path).code in (
        0,
        NOT_MET,
    )
    last = result_of(place / "late")
    assert (last["resumed"], len(last["trials"])) == (1, 5)
    assert_measured_once(tmp_path)


def test_another_question_is_refused(place: Path, commands: Commands, tmp_path: Path) -> None:
    assert commands.run(*FIT, *ONE, "--out", "asked", cache=tmp_path).code in (0, NOT_MET)
    kept = (place / "asked" / "result.json").read_bytes()
    other = (*FIT[:-1], "2MB", *ONE, "--prefer", "bytes", "--seed", "1", "--out", "asked", "--resume")
    assert commands.run(*other, cache=tmp_path).code == 2
    assert "OutputError: the search that 'asked' was made by answers another question" in commands.err
    assert "its budget and seed differ" in commands.err
    assert "fix: ask what was asked before, or leave out --resume to begin anew" in commands.err
    assert (place / "asked" / "result.json").read_bytes() == kept
    assert commands.run(*other[:-1], "--force", cache=tmp_path).code in (0, NOT_MET)  # begins anew
    assert result_of(place / "asked")["resumed"] == 0


def test_nothing_to_resume_is_said(place: Path, commands: Commands, tmp_path: Path) -> None:
    assert commands.run(*FIT, *ONE, "--out", "new", "--resume", cache=tmp_path).code in (
        0,
        NOT_MET,
    )
    assert "there is no search to resume: it begins" in commands.err
    assert result_of(place / "new")["resumed"] == 0
