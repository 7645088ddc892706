"""The runner: what its process may see, and how each way of dying is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featherweight.engine.jobs import Runner, Served, run_job
from featherweight.engine.timing import Limits
from featherweight.errors import DataError, FeatherweightError, RunnerError, TargetError
from featherweight.method import Silent
from featherweight.runtime import Artifact, Target

Make = Callable[..., Artifact]
X = np.arange(6, dtype=np.float32).reshape(1, 6)


def told_by(artifact: Artifact, target: Target) -> dict[str, Any]:
    with Served(artifact, target) as served:
        (answer,) = served.run(X)
    return json.loads(answer.tobytes())


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pid: int, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


class TestProcess:
    def test_is_small_bound_and_cut_off(
        self, make: Make, target: Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
        monkeypatch.setenv("PYTHONPATH", "/nowhere")
        monkeypatch.setenv("OMP_NUM_THREADS", "64")
        seen = told_by(make("a", call="tell"), target)
        heavy = {"torch", "onnx", "optuna", "pydantic", "scipy", "featherweight.model", "featherweight.api"}
        assert not heavy & set(seen["modules"])
        assert len(seen["cores"]) == 1
        assert seen["environment"]["OMP_NUM_THREADS"] == "1"
        assert not [name for name in seen["environment"] if "PROXY" in name.upper()]
        assert "PYTHONPATH" not in seen["environment"]
        assert seen["environment"]["HOME"] != os.environ.get("HOME")
        assert seen["group"] == seen["pid"] != os.getpid()
        assert seen["dont_write_bytecode"]

    def test_gets_as_many_cores_as_threads(self, make: Make, target: Target) -> None:
        cores = len(os.sched_getaffinity(0))
        wide = Target("fake", "generic", cores)
        assert len(told_by(make("a", call="tell"), wide)["cores"]) == cores
        with pytest.raises(TargetError, match=f"{cores + 1} threads are asked for") as told:
            Served(make("b"), Target("fake", "generic", cores + 1)).__enter__()
        assert told.value.fix == f"--threads {cores}"

    def test_leaves_nothing_behind(self, make: Make, target: Target) -> None:
        with Served(make("a", call="tell"), target) as served:
            (answer,) = served.run(X)
            seen = json.loads(answer.tobytes())
            assert Path(seen["environment"]["TMPDIR"]).is_dir()
        assert gone(seen["pid"])
        assert not Path(seen["environment"]["TMPDIR"]).exists()

    def test_ends_when_the_engine_is_killed(self, make: Make, target: Target, tmp_path: Path) -> None:
        artifact = make("a", seconds=0.001)
        engine = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
import numpy as np
from featherweight.engine.jobs import Runner
from featherweight.engine.timing import Limits
from featherweight.runtime import Artifact, Target
artifact = Artifact("fake", Path({str(artifact.folder)!r}), ("model.json",), {{"forward": "model.json"}})
limits = Limits(seconds=600, least_seconds=600)
inputs = [np.ones((1, 2))]
target = Target("fake", "generic", 1)
runner = Runner("latency", {{"artifact": artifact}}, target, inputs=inputs, limits=limits)
with runner:
    assert "done" in runner.receive()[0]  # it is at work
    print(runner.process.pid, flush=True)
    while runner.receive() is not None: pass
"""
        process = subprocess.Popen(
            [sys.executable, "-c", engine], stdout=subprocess.PIPE, text=True, env={"TMPDIR": str(tmp_path)}
        )
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert alive(pid)
        process.kill()
        process.wait()
        process.stdout.close()
        assert gone(pid)


class TestServed:
    def test_answers_as_the_session_does(self, make: Make, target: Target) -> None:
        with Served(make("a", scale=2.0, shift=1.0), target) as served:
            (y,) = served.run(X)
            np.testing.assert_array_equal(y, 2 * X + 1)
            assert y.dtype == np.float32
            first, second = served.run(X.astype(np.int64), entry="both")
            np.testing.assert_array_equal(first, -second)
            (empty,) = served.run(np.empty((0, 3), np.float32))
            assert empty.shape == (0, 3)
            (flipped,) = served.run(np.asfortranarray(np.arange(6.0).reshape(2, 3)).T)
            assert flipped.shape == (3, 2)
            assert flipped[1, 0] == 3.0

    def test_takes_large_arrays(self, make: Make, target: Target) -> None:
        x = np.random.default_rng(0).normal(size=(16, 512, 512)).astype(np.float32)
        with Served(make("a"), target) as served:
            np.testing.assert_array_equal(served.run(x)[0], x)

    def test_what_a_runtime_prints_is_not_an_answer(self, make: Make, target: Target) -> None:
        with Served(make("a", call="print"), target) as served:
            for _ in range(3):
                np.testing.assert_array_equal(served.run(X)[0], X)

    def test_refused_inputs_are_told_and_the_next_call_works(self, make: Make, target: Target) -> None:
        with Served(make("a", batch=1), target) as served:
            with pytest.raises(RunnerError, match="ValueError: the batch is fixed") as told:
                served.run(np.ones((4, 6), np.float32))
            assert told.value.where is not None
            assert "float32[4, 6]" in told.value.where
            assert len(served.run(X)) == 1

    def test_refuses_objects(self, make: Make, target: Target) -> None:
        with Served(make("a"), target) as served, pytest.raises(DataError, match="object"):
            served.run(np.array([{}]))
        with pytest.raises(DataError, match="input 0 holds Python objects"):
            Runner("memory", {"artifact": make("b")}, target, inputs=[np.array([{}])])

    def test_a_death_between_calls_is_told(self, make: Make, target: Target) -> None:
        with Served(make("a", call="tell"), target) as served:
            pid = json.loads(served.run(X)[0].tobytes())["pid"]
            os.kill(pid, signal.SIGTERM)
            assert gone(pid)
            with pytest.raises(RunnerError, match="SIGTERM"):
                served.run(X)


DEATHS = [
    ({"open": "crash"}, RunnerError, "SIGSEGV"),
    ({"open": "refuse"}, TargetError, "fake cannot store int4"),
    ({"call": "abort"}, RunnerError, "SIGABRT"),
    ({"call": "exit"}, RunnerError, "exit code 7 and left no result"),
    ({"call": "kill"}, RunnerError, "SIGKILL"),
    ({"call": "hang"}, RunnerError, "no answer for 1 s and was stopped"),
    ({"call": "bad_alloc"}, RunnerError, "memory ran out"),
]
LIMITS = Limits(timeout_s=1.0)


class TestFailure:
    @pytest.mark.parametrize(("does", "kind", "match"), DEATHS, ids=str)
    def test_in_a_served_call(
        self, make: Make, target: Target, does: dict[str, Any], kind: type[FeatherweightError], match: str
    ) -> None:
        with pytest.raises(kind, match=match) as told, Served(make("a", **does), target, LIMITS) as served:
            served.run(X)
        assert told.value.fix

    @pytest.mark.parametrize(
        ("does", "kind", "match"),
        [
            *DEATHS[:2],
            ({"call": "hang"}, RunnerError, "no answer for 1 s and was stopped"),
            ({"call": "raise"}, RunnerError, "expected 3 channels"),
            ({"call": "exhaust"}, RunnerError, "ran out"),
        ],
        ids=str,
    )
    def test_in_a_job(
        self, make: Make, target: Target, does: dict[str, Any], kind: type[FeatherweightError], match: str
    ) -> None:
        artifact = make("a", **does)
        with pytest.raises(kind, match=match) as told:
            run_job(Runner("memory", {"artifact": artifact}, target, inputs=[X], limits=LIMITS), Silent(), "")
        assert told.value.where
        if kind is RunnerError:
            assert str(artifact.folder) in told.value.where

    def test_last_words_are_handed_on(self, make: Make, target: Target) -> None:
        with pytest.raises(RunnerError) as told, Served(make("a", open="crash"), target) as served:
            served.run(X)
        assert "fake_runtime.py" in str(told.value)  # the line that crashed

    def test_a_kill_of_the_kernel_is_told_as_such(
        self, make: Make, target: Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        killed = iter(range(9))
        monkeypatch.setattr("featherweight.engine.devices.kernel_kills", lambda: next(killed))
        with (
            pytest.raises(RunnerError, match="SIGKILL: memory ran out"),
            Served(make("a", call="kill"), target) as served,
        ):
            served.run(X)

    def test_children_of_the_runner_end_with_it(self, make: Make, target: Target) -> None:
        runner = Runner(
            "memory", {"artifact": make("a", call="fork", after=2)}, target, inputs=[X], limits=LIMITS
        )
        result = run_job(runner, Silent(), "")
        assert result["peak_bytes"] > 0
        group = runner.process.pid
        end = time.monotonic() + 5
        while _members(group) and time.monotonic() < end:
            time.sleep(0.02)
        assert not _members(group)

    @pytest.mark.parametrize("left", ["{", '{"error": 1}'])
    def test_a_result_that_is_none_is_told(self, make: Make, target: Target, left: str) -> None:
        with Runner("memory", {"artifact": make("a")}, target, inputs=[X]) as runner:
            while (frame := runner.receive()) is not None and "end" not in frame[0]:
                pass
            (runner.folder / "result.json").write_text(left)
            with pytest.raises(RunnerError, match="left no result"):
                runner.result()

    def test_unknown_runtime_and_device(self, make: Make, target: Target) -> None:
        with pytest.raises(FeatherweightError, match="no runtime is called 'fakee'") as told:
            Served(make("a"), Target("fakee", "generic", 1)).__enter__()
        assert told.value.fix == "did you mean 'fake'?"
        with pytest.raises(TargetError, match="device 'phone' is not known"):
            Served(make("b"), Target("fake", "generic", 1, device="phone"))


def _members(group: int) -> list[int]:
    """Processes of a group that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
