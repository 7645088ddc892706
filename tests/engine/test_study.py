"""A study in a database: it outlives the process, and one process works on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.engine.search import Failure, Search
from featherweight.engine.store import machine_mark
from featherweight.engine.study import database, is_url, shown
from featherweight.errors import OutputError
from featherweight.outcome import Budget, Measurement
from featherweight.recipe import Choice, Recipe

SPACE = Recipe.parse("version: 1\nsteps:\n  - quantize: {samples: {choice: [8, 16, 24, 32, 40, 48]}}\n")
TWIN = Measurement(quality=0.9, quality_drop=0.0, bytes=1000)


def search(url: str, **more: bool) -> Search:
    return Search(SPACE, Budget(), baseline=TWIN, trials=6, storage=url, **more)


def tell(one: Search, size: int) -> None:
    candidate = one.ask()
    assert candidate is not None
    one.tell(candidate, Measurement(quality=0.9, quality_drop=0.0, bytes=size, latency_ratio=0.5))


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


class TestDatabase:
    def test_a_search_goes_on_where_it_was(self, url: str) -> None:
        first = search(url)
        tell(first, 300)
        candidate = first.ask()
        assert candidate is not None
        first.tell(candidate, Failure("no"))
        assert first.ask() is not None  # begun, and never told
        first.close()
        second = search(url)
        assert [(trial.number, trial.state) for trial in second.trials] == [(0, "measured"), (1, "failed")]
        asked = []
        while (candidate := second.ask()) is not None:
            asked.append(candidate.number)
            second.tell(candidate, Failure("no"))
        assert asked == [2, 3, 4, 5]
        recipes = [str(trial.recipe) for trial in second.trials]
        assert len(set(recipes)) == 6  # no point twice
        second.close()

    def test_begins_anew_where_it_shall(self, url: str) -> None:
        first = search(url)
        tell(first, 300)
        first.close()
        assert search(url, anew=True).trials == []

    def test_one_that_another_process_works_on_is_refused(self, url: str) -> None:
        first = search(url)
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
            holder = {"machine": machine_mark(), "process": other.pid, "since": 0}
            first._study.set_user_attr("held", holder)
            for anew in (False, True):
                with pytest.raises(OutputError, match=f"another process .{other.pid}. is searching"):
                    search(url, anew=anew)
            other.kill()
        search(url).close()  # it is dead

    def test_is_free_when_it_is_closed(self, url: str) -> None:
        first = search(url)
        assert first._study.user_attrs["held"]["process"] == os.getpid()
        first.close()
        assert first._study.user_attrs["held"] is None


class TestRefused:
    def test_no_url(self) -> None:
        with pytest.raises(OutputError, match="no address of a database") as told:
            database("study.db")
        assert "sqlite:///FILE" in str(told.value.fix)

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="unable to open database file"):
            database(f"sqlite:///{tmp_path / 'nowhere' / 'study.db'}")

    def test_the_password_is_not_told(self) -> None:
        assert shown("postgresql://me:secret@host/studies") == "postgresql://me:***@host/studies"
        with pytest.raises(OutputError) as told:
            database("postgresql://me:secret@127.0.0.1:1/studies")
        assert "secret" not in str(told.value)

    def test_what_is_a_url(self) -> None:
        assert is_url("postgresql+psycopg2://host/x") and is_url("sqlite:///x.db")
        assert not is_url("folder/x.db") and not is_url("C:/x.db")


def test_numbers_are_not_given_twice_when_several_are_on_their_way() -> None:
    template = Recipe.parse("version: 1\nsteps:\n  - quantize: {}\n")
    one = Search(template, Budget(), baseline=TWIN, trials=6)
    asked = [one.ask() for _ in range(3)]
    first, second, third = asked
    assert first and second and third
    assert [first.number, second.number, third.number] == [0, 1, 2]
    first.fill(0, {"samples": Choice((8, 16, 24))})
    assert one.accept(first)
    second.draws = list(first.draws)
    assert not one.accept(second)
    fourth, fifth = one.ask(), one.ask()
    assert fourth and fifth
    assert [fourth.number, fifth.number] == [1, 3]
