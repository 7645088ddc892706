"""Trials on a real Ray cluster on this machine: who makes them, who measures, who dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from featherweight import api
from featherweight.engine.deadline import OutOfTime
from featherweight.engine.environment import describe, describe_device
from featherweight.engine.hands import Hands
from featherweight.engine.run import Run
from featherweight.engine.sources import Given, load_sources
from featherweight.engine.start import start_runs
from featherweight.engine.timing import Limits
from featherweight.engine.workers import Crew, hired
from featherweight.engine.workers_bench import site
from featherweight.engine.workers_cluster import Place, import_ray, joined
from featherweight.errors import DeviceError, TargetError
from featherweight.method import Silent
from featherweight.plugins import find_method
from featherweight.recipe import Recipe
from featherweight.runtime import Target
from heard import Heard

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NET = '''"""A small network that stays in its first layer for long on workers of one machine."""
import os
import time
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent


class First(nn.Conv2d):
    def forward(self, picture):
        doomed = HERE / "doomed"  # holds the number of the process that starts workers on one machine
        if doomed.exists() and int(doomed.read_text()) == os.getppid():
            (HERE / "inside").write_text(str(os.getpid()))
            while doomed.exists():
                time.sleep(0.1)
        return super().forward(picture)


def net():
    torch.manual_seed(0)
    layers = (First(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 10))
    return nn.Sequential(*layers).eval()
'''
OPEN = Recipe.parse(
    "version: 1\nsteps:\n  - fold: {}\n  - quantize: {samples: {choice: [8, 12, 16, 20, 22, 24]}}\n"
)
LIMITS = Limits(seconds=0.3, least_seconds=0.02, rounds=3, warmup_s=0.01, throughput_s=0.01, memory_repeats=1)
SMALL = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A machine that measures, and makes one trial at a time."""
    import_ray()
    from ray.cluster_utils import Cluster

    made = Cluster()
    head = {
        **SMALL,
        **{"include_dashboard": False, "resources": {"board": 1}},
        "_system_config": {"worker_niceness": 0},  # a busy machine would take ages
    }
    patiently(made, **head)
    yield made
    made.shutdown()


def patiently(cluster: Any, **options: Any) -> Any:
    """Add a machine; Ray gives up when it is not up within half a minute, which a busy one may need."""
    for left in (2, 1, 0):
        try:
            return cluster.add_node(**options)
        except Exception:
            if not left:
                raise
    return None


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(NET)
    inputs = np.random.default_rng(0).standard_normal((64, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=inputs[:40], y=np.arange(40) % 10, x_calibration=inputs[40:])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(place: Path, heard: Heard, **more: Any):
    return api.fit(
        "net.py:net",
        "data.npz",
        out=place / "out",
        recipe=OPEN,
        limits=LIMITS,
        tune=False,
        time_limit=3000.0,
        progress=heard,
        **more,
    )


def runs(device: str) -> tuple[list[Run], Any]:
    """The runs of a search and what workers load for it."""
    given: dict[str, Any] = {
        **{"model": "net.py:net", "weights": None, "data": "data.npz", "inputs": (), "metric": None},
        **{"image_size": None, "mean": None, "std": None, "seed": 0, "allow_pickle": False},
    }
    training: dict[str, Any] = {"devices": 1, "precision": "32"}
    made = start_runs(
        load_sources(**given),
        [Target("onnxruntime", device=device)],
        seed=0,
        progress=Silent(),
        allow_pickle=False,
        **training,
    )
    return made, lambda: site(given, Given(), Given(), made, LIMITS, training)


def gone(pid: int, seconds: float = 30.0) -> bool:
    """Whether a process ends soon."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:  # nobody may ask for its end
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def appears(path: Path, seconds: float = 280.0) -> int:
    """The number that a file holds as soon as it is there."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{path.name} did not come")


@pytest.mark.timeout(1500)
def test_a_machine_that_dies_in_the_middle_of_a_trial_loses_none(cluster: Any, place: Path) -> None:
    import ray

    other = patiently(cluster, **SMALL)
    heard, killed = Heard(), []

    def kill() -> None:
        killed.append(appears(place / "inside"))
        cluster.remove_node(other, allow_graceful=False)
        (place / "doomed").unlink()

    raylet = other.all_processes["raylet"][0].process.pid
    (place / "doomed").write_text(str(raylet))
    killer = threading.Thread(target=kill)
    killer.start()
    result = fit(place, heard, trials=4, workers=2, cluster=cluster.address, device="ray:board")
    killer.join()
    assert gone(killed[0])
    assert [trial.state for trial in result.trials] == ["measured"] * 4
    assert sorted(trial.number for trial in result.trials) == [0, 1, 2, 3]
    assert len({str(trial.recipe) for trial in result.trials}) == 4
    told = [note for note in heard.notes if "died; it is made again by" in note]
    assert len(told) == 1 and f"(process {killed[0]})" in told[0]
    assert all(trial.measurement.latency_ratio for trial in result.trials)
    assert not ray.is_initialized()


class TestLabel:
    def test_a_labelled_machine_describes_itself(self, cluster: Any) -> None:
        with joined(Place(1, cluster.address)):
            seen = describe_device(Target("onnxruntime", device="ray:board"))
        assert seen.model_dump() == describe(Target("onnxruntime")).model_dump()

    def test_one_that_nobody_has_is_told(self, cluster: Any) -> None:
        heard = Heard()
        with (
            pytest.raises(DeviceError, match="no living worker is labelled 'phone'"),
            hired(Place(1, cluster.address), dict, "ray:phone", heard),
        ):
            raise AssertionError("nobody is hired")

    def test_a_cluster_that_is_not_there_is_told(self) -> None:
        with (
            pytest.raises(TargetError, match="no Ray cluster can be joined at '127"),
            joined(Place(1, "127.0.0.1:1")),
        ):
            raise AssertionError("nobody is there")


class TestStopped:
    """Workers in a step that does not end by itself."""

    def test_the_deadline_ends_them(self, cluster: Any, place: Path) -> None:
        end = [float("inf")]
        with stuck(cluster, place, lambda: end[0]) as (crew, work, begun):
            threading.Thread(target=lambda: end.__setitem__(0, begun() * 0.0)).start()
            with pytest.raises(OutOfTime):
                crew.together(work)
            assert gone(begun())

    def test_ctrl_c_ends_them(self, cluster: Any, place: Path) -> None:
        def interrupt() -> None:
            begun()
            os.kill(os.getpid(), signal.SIGINT)

        with stuck(cluster, place, lambda: float("inf")) as (crew, work, begun):
            threading.Thread(target=interrupt).start()
            with pytest.raises(KeyboardInterrupt):
                crew.together(work)
            assert gone(begun())


@contextmanager
def stuck(
    cluster: Any, place: Path, until: Callable[[], float]
) -> Iterator[tuple[Crew, Callable[[], None], Callable[[], int]]]:
    """A crew, a piece of work at which it hangs, and what waits for the number of the process that hangs."""
    with joined(Place(1, cluster.address)):
        (run,), loaded = runs("ray:board")
        (place / "doomed").write_text(str(cluster.head_node.all_processes["raylet"][0].process.pid))
        with hired(Place(1, cluster.address), loaded, "ray:board", Heard()) as crew:
            assert crew is not None
            run.hands = Hands(crew, until=until)
            method = find_method("quantize").model_validate({"samples": 8})

            def work() -> None:
                run.step(run.start, method)

            yield crew, work, lambda: appears(place / "inside")


@pytest.mark.timeout(1500)
def test_one_worker_tries_what_the_process_itself_tries(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for workers in (1, None):
        monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(place / f"cache-{workers}"))
        heard = Heard()
        result = fit(place, heard, trials=3, workers=workers, force=True)
        seen.append([(trial.number, trial.recipe, trial.state, trial.sha256) for trial in result.trials])
    assert seen[0] == seen[1]
    assert len(seen[0]) == 3
