"""What is known of workers without any: places, letters, turns, and what a search has on its way."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from featherweight.engine import workers_cluster
from featherweight.engine.devices import address, connect
from featherweight.engine.mail import Mailbox, Writing
from featherweight.engine.store import machine_mark
from featherweight.engine.workers import Crew, Needs
from featherweight.engine.workers_cluster import Place, placed
from featherweight.errors import MissingRuntime, TargetError
from featherweight.runtime import Target
from heard import Heard


class TestPlace:
    def test_nobody_asks_for_workers(self) -> None:
        assert placed(None, None, "local", 1) is None

    def test_ray_that_is_missing_is_told_with_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(MissingRuntime) as told:
            placed(2, None, "local", 1)
        assert told.value.fix == 'pip install "featherweight[ray]"'

    def test_nothing_is_reported_to_anybody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
        with pytest.raises(MissingRuntime):
            workers_cluster.import_ray()
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"

    @pytest.mark.parametrize(
        ("workers", "cluster", "device", "said"),
        [
            (0, None, "local", "0 workers are none"),
            (2, "auto", "local", "one of them has to be the target"),
            (2, None, "ray:board", "none is named"),
        ],
    )
    def test_what_cannot_be(self, workers: int, cluster: str | None, device: str, said: str) -> None:
        with pytest.raises(TargetError, match=said):
            placed(workers, cluster, device, 1)

    def test_counts_what_the_cluster_has(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(workers_cluster, "import_ray", lambda: None)
        assert placed(None, "head:6379", "ray:board", 2) == Place(0, "head:6379", 2)
        assert placed(3, None, "local", 1) == Place(3, "", 1)


class TestDevice:
    def test_is_a_label(self) -> None:
        seen = address(Target("torch", device="ray:board.7"))
        assert (seen.kind, seen.host, seen.name) == ("ray", "board.7", "ray:board.7")

    def test_is_no_empty_label(self) -> None:
        with pytest.raises(TargetError, match="is not known"):
            address(Target("torch", device="ray:"))

    def test_needs_a_cluster(self, tmp_path: Path) -> None:
        pytest.importorskip("ray")
        from featherweight.engine.devices import Work

        work = Work({"kind": "describe"}, Target("torch", device="ray:board"), {}, tmp_path, 1.0)
        with pytest.raises(TargetError, match="none was joined"):
            connect(work)


class TestLetters:
    def test_a_note_is_shown_once_with_what_it_is_about(self, tmp_path: Path) -> None:
        heard = Heard()
        with Mailbox(tmp_path / "mail") as box:
            letters = box.open("trial 3")
            letters.show(heard)
            said = Writing(letters.path)
            said.begin("on one")
            said.note("half")
            letters.show(heard)
            said.note("whole")
            letters.show(heard)
        assert heard.notes == ["trial 3: half", "trial 3: whole"]

    def test_a_second_beginning_is_a_death(self, tmp_path: Path) -> None:
        heard = Heard()
        with Mailbox(tmp_path / "mail") as box:
            letters = box.open("trial 3")
            Writing(letters.path).begin("on one")
            Writing(letters.path).begin("on two")
            letters.show(heard)
        assert heard.notes == ["trial 3: the worker on one died; it is made again by that on two"]

    def test_a_line_that_is_not_whole_waits(self, tmp_path: Path) -> None:
        heard = Heard()
        with Mailbox(tmp_path / "mail") as box:
            letters = box.open("trial 3")
            letters.path.write_bytes(b'{"note": "lo')
            letters.show(heard)
            assert heard.notes == []
            letters.path.write_bytes(b'{"note": "long"}\n')
            letters.show(heard)
        assert heard.notes == ["trial 3: long"]

    def test_nothing_is_left(self, tmp_path: Path) -> None:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        left = tmp_path / "mail" / f"{machine_mark()}-{dead.pid}"
        elsewhere = tmp_path / "mail" / f"00000000-{dead.pid}"
        left.mkdir(parents=True)
        elsewhere.mkdir()
        with Mailbox(tmp_path / "mail") as box:
            letters = box.open("trial 3")
            Writing(letters.path).begin("on one")
        Writing(letters.path).note("too late")
        assert list((tmp_path / "mail").iterdir()) == [elsewhere]


class TestTurns:
    """A crew whose tasks are done by the threads themselves."""

    def test_one_at_a_time_but_while_it_waits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        crew = idle_crew(monkeypatch, 3)
        inside, most, waiting, most_waiting = [0], [0], [0], [0]
        met = threading.Barrier(3)

        def work() -> None:
            for _ in range(3):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1
                waiting[0] += 1
                with crew.aside():
                    most_waiting[0] = max(most_waiting[0], waiting[0])
                    met.wait(30)  # all three are here at the same time
                waiting[0] -= 1

        crew.together(work)
        assert most == [1]
        assert most_waiting == [3]

    def test_an_error_ends_all_and_is_raised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        crew = idle_crew(monkeypatch, 2)
        first = [True]

        def work() -> None:
            if first:
                first.clear()
                raise RuntimeError("mine")
            crew._wait(lambda: False, lambda: float("inf"))

        with pytest.raises(RuntimeError, match="mine"):
            crew.together(work)

    def test_the_same_step_is_made_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        crew = idle_crew(monkeypatch, 2)
        seen: list[bool] = []

        def work() -> None:
            with crew.alone("step"), crew.aside():
                threading.Event().wait(0.05)
            with crew.alone("other"):
                pass

        def second() -> None:
            with crew.alone("step") as waited:
                seen.append(waited)
                with crew.aside():
                    threading.Event().wait(0.2)

        crew.together(work)
        crew.together(second)
        assert seen == [False, True]


class TestQuiet:
    @pytest.mark.parametrize(("device", "both"), [("local", False), ("ssh:board", True)])
    def test_what_goes_on_beside_a_measurement(
        self, monkeypatch: pytest.MonkeyPatch, device: str, both: bool
    ) -> None:
        """Here nothing is made while it is measured; for a device elsewhere everything is. One measures."""
        crew = idle_crew(monkeypatch, 4, device)
        now: list[str] = []
        seen: set[frozenset[str]] = set()
        never = float("inf")

        def look(kind: str) -> None:
            now.append(kind)
            seen.add(frozenset(now))
            assert now.count("measuring") <= 1
            with crew.aside():
                threading.Event().wait(0.02)
            seen.add(frozenset(now))
            now.remove(kind)

        def work() -> None:
            for _ in range(4):
                with crew._room(Needs(), lambda: never):
                    look("making")
                with crew._room(Needs(measures=True), lambda: never):
                    look("measuring")

        crew.together(work)
        assert frozenset({"making"}) in seen and frozenset({"measuring"}) in seen
        assert (frozenset({"making", "measuring"}) in seen) == both


def idle_crew(monkeypatch: pytest.MonkeyPatch, count: int, device: str = "local") -> Crew:
    """A crew that knows no cluster."""

    class NoRay:
        @staticmethod
        def remote(function: object) -> object:
            return function

        @staticmethod
        def nodes() -> list[dict[str, object]]:
            return [{"Alive": True, "Resources": {"CPU": count}}]

    return Crew(Place(count), NoRay(), {}, device, Heard())
