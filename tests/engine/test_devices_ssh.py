"""A real sshd, another user and an empty environment: jobs travel, lost connections are tried again."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from board import USER, Board, Proxy, install_python
from featherweight.engine import ssh
from featherweight.engine.devices import Address, ConnectionLost, address, for_runtime
from featherweight.engine.environment import describe_device, installed_on, resolve
from featherweight.engine.jobs import Runner, Served, run_job
from featherweight.engine.measure import measure_latency, measure_memory
from featherweight.engine.timing import Limits
from featherweight.errors import DeviceError, FeatherweightError, RunnerError, TargetError
from featherweight.method import Silent
from featherweight.runtime import Artifact, Target, host_isa

Make = Callable[..., Artifact]
LIMITS = Limits(seconds=1.0, least_seconds=0.1, rounds=6, throughput_s=0.05, memory_repeats=1, timeout_s=20.0)
X = np.arange(6, dtype=np.float32).reshape(1, 6)


@pytest.fixture
def there(board: Board, target: Target) -> Iterator[Target]:
    """The board through the fake runtime, which its user has installed for himself."""
    site = board.home / ".local/lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    source = next(path for path in map(Path, sys.path) if (path / "fake_runtime.py").exists())
    shutil.copytree(source, site)
    yield Target("fake", "generic", 1, board.device)
    shutil.rmtree(board.home / ".local")


@pytest.fixture
def proxied(board: Board, there: Target) -> Iterator[Callable[..., tuple[Proxy, Target]]]:
    made: list[Proxy] = []

    def one(*cuts: int | None) -> tuple[Proxy, Target]:
        made.append(Proxy(board.port, list(cuts)))
        device = board.device.replace(f":{board.port}", f":{made[-1].port}")
        return made[-1], Target("fake", "generic", 1, device)

    yield one
    for proxy in made:
        proxy.close()


class TestTravel:
    def test_the_board_has_neither_torch_nor_the_toolkit(self, board: Board) -> None:
        python = str(board.python)
        assert board.run(python, "-I", "-c", "import numpy, onnxruntime") == ""
        for name in ("torch", "featherweight", "onnx"):
            assert "ModuleNotFoundError" in board.run(python, "-I", "-c", f"import {name}")

    def test_a_session_answers_as_it_does_here(self, board: Board, lowered: Any) -> None:
        artifact = lowered("onnxruntime", "residual", "int8")
        target = Target("onnxruntime", host_isa(), 1, board.device)
        x = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
        with Served(artifact, for_here(target)) as here, Served(artifact, target) as far:
            np.testing.assert_array_equal(here.run(x)[0], far.run(x)[0])
        assert board.idle()

    def test_latency_and_memory_are_measured_there(self, board: Board, lowered: Any) -> None:
        target = Target("onnxruntime", host_isa(), 1, board.device)
        twin = lowered("onnxruntime", "residual", "float")
        inputs = [np.zeros((1, 3, 16, 16), np.float32)]
        timing = measure_latency(twin, twin, target, inputs, limits=LIMITS)
        assert timing.rounds >= 6
        assert timing.ratio == pytest.approx(1.0, abs=0.5)
        assert len(timing.cores) == 1
        memory = measure_memory(twin, target, inputs, limits=LIMITS)
        assert 0 < memory.above_runtime < memory.peak

    def test_a_runner_sees_the_board_alone(self, board: Board, there: Target, make: Make) -> None:
        with Served(make("a", call="tell"), there) as served:
            seen = json.loads(served.run(X)[0].tobytes())
        modules, environment = set(seen["modules"]), seen["environment"]
        assert {"numpy", "featherweight.engine.phases", "fake_runtime"} <= modules
        assert not {"torch", "pydantic", "psutil", "featherweight.engine.jobs"} & modules
        assert len(seen["cores"]) == 1
        assert set(environment) <= {
            "PATH", "HOME", "TMPDIR", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS",
            "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS",
        }  # fmt: skip
        assert environment["HOME"].startswith(str(board.cache / "jobs"))
        assert board.idle()

    def test_only_the_cache_stays_and_nothing_is_sent_twice(
        self,
        board: Board,
        there: Target,
        make: Make,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        skeleton = {path.name for path in board.home.iterdir()}
        sent: list[int] = []
        send = ssh.SshLink._send_content

        def recorded(self: ssh.SshLink, content: Path | bytes) -> None:
            sent.append(ssh._size(content))
            send(self, content)

        monkeypatch.setattr(ssh.SshLink, "_send_content", recorded)
        twin, artifact = make("a", note="x" * 5000), make("b", note="y" * 7000)
        for roles in ({"artifact": twin}, {"twin": twin, "artifact": artifact}):
            kind = "memory" if len(roles) == 1 else "latency"
            run_job(Runner(kind, roles, there, inputs=[X], limits=LIMITS), Silent(), "")
        archive, first, example, second, again = sent
        assert archive > 10_000
        assert 5000 < first < 6000 < 7000 < second < 8000
        assert example == again < 300
        assert board.idle()
        (bundle,) = (board.cache / "modules").iterdir()
        files = {path.name for path in (board.cache / "files").iterdir()}
        assert files == {bundle.name, twin.sha256, artifact.sha256}
        assert not list((board.cache / "jobs").iterdir())
        assert {path.name for path in board.home.iterdir()} == {*skeleton, ".cache"}

    def test_files_that_a_job_leaves_come_back(self, board: Board, lowered: Any) -> None:
        target = Target("onnxruntime", host_isa(), 1, board.device)
        inputs = [np.zeros((1, 3, 16, 16), np.float32)]
        artifact = lowered("onnxruntime", "residual", "float")
        with Runner("profile", {"artifact": artifact}, target, inputs=inputs) as runner:
            while runner.receive() is not None:
                pass
            assert runner.result()["kernels"]
            assert (runner.folder / "optimized.onnx").stat().st_size > 1000

    def test_what_a_shell_prints_is_no_answer(
        self,
        board: Board,
        there: Target,
        make: Make,
        script: Callable[[str], str],
    ) -> None:
        python = script(f"echo 'Welcome to the board'; exec {board.python} \"$@\"")
        with Served(make("a"), Target("fake", "generic", 1, f"{board.address}?python={python}")) as served:
            np.testing.assert_array_equal(served.run(X)[0], X)


def for_here(target: Target) -> Target:
    return Target(target.runtime, target.isa, target.threads)


@pytest.fixture
def script(board: Board) -> Callable[[str], str]:
    """Writes a program of the board; its path."""

    def write(text: str) -> str:
        path = board.folder / "program"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return write


class TestDescription:
    def test_is_the_boards(self, board: Board) -> None:
        target = Target("onnxruntime", device=board.device, threads=2)
        seen = describe_device(target)
        assert seen.isa == host_isa() == resolve(target).isa
        assert (seen.cores, seen.threads) == (len(os.sched_getaffinity(0)), 2)
        assert {"featherweight", "torch", "numpy", "onnxruntime"} == set(seen.versions)
        assert resolve(Target("onnxruntime", "avx2", device=board.device)).isa == "avx2"
        assert installed_on(target, ["torch", "onnxruntime"]) == ["onnxruntime"]

    def test_of_this_machine_asks_nobody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FEATHERWEIGHT_SSH", "/nowhere")
        assert describe_device(Target("onnxruntime")).isa == host_isa()
        assert installed_on(Target(), ["onnxruntime"]) == ["onnxruntime"]


class TestDeath:
    """As on this machine: how a runner ended is told, with its last words."""

    @pytest.mark.parametrize(
        ("does", "kind", "match"),
        [
            ({"open": "crash"}, RunnerError, "SIGSEGV"),
            ({"open": "refuse"}, TargetError, "fake cannot store int4"),
            ({"call": "abort"}, RunnerError, "SIGABRT"),
            ({"call": "exit"}, RunnerError, "exit code 7 and left no result"),
            ({"call": "hang"}, RunnerError, "no answer for 3 s and was stopped"),
            ({"call": "bad_alloc"}, RunnerError, "memory ran out"),
        ],
        ids=str,
    )
    def test_is_told(
        self,
        board: Board,
        there: Target,
        make: Make,
        does: dict[str, Any],
        kind: type[FeatherweightError],
        match: str,
    ) -> None:
        limits = Limits(timeout_s=3.0)
        with pytest.raises(kind, match=match) as told, Served(make("a", **does), there, limits) as served:
            served.run(X)
        assert not isinstance(told.value, DeviceError)
        assert told.value.fix
        if does == {"open": "crash"}:
            assert "fake_runtime.py" in str(told.value)
        assert board.idle()
        assert not list((board.cache / "jobs").iterdir())

    def test_refused_inputs_are_told_and_the_next_call_works(self, there: Target, make: Make) -> None:
        with Served(make("a", batch=1), there) as served:
            with pytest.raises(RunnerError, match="the batch is fixed"):
                served.run(np.ones((4, 6), np.float32))
            assert len(served.run(X)) == 1

    def test_what_a_runtime_prints_is_not_an_answer(self, there: Target, make: Make) -> None:
        with Served(make("a", call="print"), there) as served:
            np.testing.assert_array_equal(served.run(X)[0], X)

    def test_children_of_the_runner_end_with_it(self, board: Board, there: Target, make: Make) -> None:
        artifact = make("a", call="fork", after=2)
        run_job(Runner("memory", {"artifact": artifact}, there, inputs=[X], limits=LIMITS), Silent(), "")
        assert board.idle()

    def test_of_the_engine_ends_the_runner(
        self,
        board: Board,
        there: Target,
        make: Make,
        tmp_path: Path,
    ) -> None:
        artifact = make("a", call="hang")
        engine = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
import numpy as np
from featherweight.engine.jobs import Served
from featherweight.runtime import Artifact, Target
artifact = Artifact("fake", Path({str(artifact.folder)!r}), ("model.json",), {{"forward": "model.json"}})
with Served(artifact, Target("fake", "generic", 1, {there.device!r})) as served:
    print("served", flush=True)
    served.run(np.ones((1, 2)))
"""
        environment = {"TMPDIR": str(tmp_path), "FEATHERWEIGHT_SSH": board.ssh, "PATH": "/usr/bin:/bin"}
        process = subprocess.Popen(
            [sys.executable, "-c", engine], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "served\n"
        time.sleep(0.2)  # the call has arrived
        process.kill()
        process.wait()
        process.stdout.close()
        assert board.idle()
        assert not list((board.cache / "jobs").iterdir())


class TestLostConnection:
    def test_in_a_call_is_made_again(self, proxied: Any, make: Make) -> None:
        proxy, target = proxied(None)
        with Served(make("a", scale=2.0), target) as served:
            np.testing.assert_array_equal(served.run(X)[0], 2 * X)
            proxy.cut()
            np.testing.assert_array_equal(served.run(X)[0], 2 * X)
            np.testing.assert_array_equal(served.run(X)[0], 2 * X)
        assert proxy.connections == 2

    def test_in_the_middle_of_an_answer(self, board: Board, proxied: Any, make: Make) -> None:
        proxy, target = proxied(200_000, None)
        x = np.random.default_rng(0).normal(size=(64, 64, 64)).astype(np.float32)  # a megabyte
        with Served(make("a"), target) as served:
            np.testing.assert_array_equal(served.run(x)[0], x)
        assert proxy.connections == 2
        assert board.idle()

    @pytest.mark.parametrize("after", [0, 300, 1_500, 2_500], ids=str)
    def test_while_it_is_made(self, proxied: Any, make: Make, after: int) -> None:
        proxy, target = proxied(after, None)
        with Served(make("a"), target) as served:
            np.testing.assert_array_equal(served.run(X)[0], X)
        assert proxy.connections == 2

    def test_during_a_measurement_starts_it_again(self, proxied: Any, make: Make) -> None:
        proxy, target = proxied(None)
        artifact = make("a", seconds=0.001)
        threading.Timer(1.5, proxy.cut).start()
        timing = measure_latency(
            artifact, artifact, target, [X], limits=Limits(seconds=3.0, least_seconds=2.5, throughput_s=0.05)
        )
        assert timing.ratio == pytest.approx(1.0, abs=0.2)
        assert proxy.connections == 2

    def test_for_good_is_an_error(self, proxied: Any, make: Make) -> None:
        proxy, target = proxied(2_500)
        artifact = make("a")
        with pytest.raises(DeviceError, match="was lost 3 times") as told, Served(artifact, target):
            pass
        assert proxy.connections == 3
        assert not isinstance(told.value, ConnectionLost)
        assert told.value.exit_code == 1
        assert f"ssh -p {proxy.port} {USER}@127.0.0.1" in str(told.value.fix)

    def test_of_a_served_call_for_good(self, proxied: Any, make: Make) -> None:
        proxy, target = proxied(None, 0)
        with Served(make("a"), target) as served:
            served.run(X)
            proxy.cut()
            with pytest.raises(DeviceError, match="was lost 3 times"):
                served.run(X)
        assert proxy.connections == 3

    def test_to_a_machine_that_is_off(self, board: Board, make: Make) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            device = board.device.replace(f":{board.port}", f":{free.getsockname()[1]}")
            with pytest.raises(DeviceError, match="was lost 3 times") as told:
                Served(make("a"), Target("fake", "generic", 1, device)).__enter__()
        assert "Connection refused" in str(told.value)


class TestLacks:
    """What a machine lacks is told in its own words, at once."""

    def told(self, target: Target, artifact: Artifact) -> DeviceError:
        started = time.monotonic()
        with pytest.raises(DeviceError) as told:
            Served(artifact, target).__enter__()
        assert time.monotonic() - started < 10
        assert told.value.fix
        assert not isinstance(told.value, ConnectionLost)
        return told.value

    def test_a_name(self, board: Board, make: Make) -> None:
        error = self.told(Target("fake", "generic", 1, "ssh:nobody.invalid"), make("a"))
        assert "there is no machine of that name" in error.what

    def test_a_login(self, board: Board, make: Make) -> None:
        device = board.device.replace(f"{USER}@", "daemon@")
        error = self.told(Target("fake", "generic", 1, device), make("a"))
        assert "refuses the login" in error.what
        assert f"ssh-copy-id -p {board.port} daemon@127.0.0.1" in str(error.fix)

    def test_a_known_host_key(self, board: Board, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FEATHERWEIGHT_SSH", f"{board.ssh} -o HostKeyAlias=other")
        error = self.told(Target("fake", "generic", 1, board.device), make("a"))
        assert "host key" in error.what

    def test_an_ssh_here(self, board: Board, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FEATHERWEIGHT_SSH", "/nowhere/ssh")
        error = self.told(Target("fake", "generic", 1, board.device), make("a"))
        assert "'/nowhere/ssh' cannot be started" in error.what

    def test_options_that_ssh_knows(self, board: Board, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FEATHERWEIGHT_SSH", f"{board.ssh} -o Fast=yes")
        error = self.told(Target("fake", "generic", 1, board.device), make("a"))
        assert "ssh does not take its options" in error.what

    def test_python(self, board: Board, make: Make) -> None:
        device = f"{board.address}?python=/opt/python3"
        error = self.told(Target("fake", "generic", 1, device), make("a"))
        assert error.what == f"there is no '/opt/python3' on '{board.address}'"

    def test_a_python_that_starts(self, board: Board, make: Make, script: Callable[[str], str]) -> None:
        device = f"{board.address}?python={script('echo it is broken >&2; exit 4')}"
        error = self.told(Target("fake", "generic", 1, device), make("a"))
        assert "did not start" in error.what
        assert "exit code 4" in error.what
        assert "it is broken" in str(error)

    def test_a_python_that_is_new_enough(
        self,
        board: Board,
        make: Make,
        script: Callable[[str], str],
    ) -> None:
        old = "import io,sys;sys.version_info=(3,8,1);sys.version='3.8.1 (old)'"
        read = "exec(io.FileIO(0,closefd=False).readline())"
        python = script(f'exec {board.python} -c "{old};{read}"')
        device = f"{board.address}?python={python}"
        error = self.told(Target("fake", "generic", 1, device), make("a"))
        assert "is Python 3.8.1; a runner needs 3.10" in error.what

    def test_numpy(self, board: Board, make: Make) -> None:
        if not (board.folder / "bare").exists():
            install_python(board.folder / "bare")
        python = board.folder / "bare" / "bin" / "python3"
        device = f"{board.address}?python={python}"
        error = self.told(Target("fake", "generic", 1, device), make("a"))
        assert error.what == f"there is no numpy on '{board.address}'"
        assert f"{python} -m pip install numpy" in str(error.fix)

    def test_the_runtime(self, board: Board, make: Make) -> None:
        artifact = make("a")
        error = self.told(Target("torch", "generic", 1, board.device), artifact)
        assert error.what == f"runtime 'torch' is not installed on '{board.address}': no package 'torch'"
        assert f"{board.python} -m pip install torch" in str(error.fix)

    def test_a_package_that_the_runtime_imports(self, there: Target, board: Board, make: Make) -> None:
        (runtime,) = board.home.glob(".local/lib/*/site-packages/fake_runtime.py")
        opened = "        told = json.loads("
        runtime.write_text(runtime.read_text().replace(opened, f"        import torch\n{opened}"))
        error = self.told(there, make("a"))
        assert error.what == f"fake needs the package 'torch', which is not on '{board.address}'"
        assert f"{board.python} -m pip install torch" in str(error.fix)

    def test_a_package_for_looking_inside(self, board: Board, lowered: Any) -> None:
        target = Target("onnxruntime", host_isa(), 1, board.device)
        inputs = [np.zeros((1, 3, 16, 16), np.float32)]
        artifact = lowered("onnxruntime", "residual", "float")
        with pytest.raises(TargetError, match=r"shows nothing of its inside: .*'onnx'"):
            run_job(Runner("kernels", {"artifact": artifact}, target, inputs=inputs), Silent(), "")

    def test_cores(self, there: Target, make: Make) -> None:
        cores = len(os.sched_getaffinity(0))
        with pytest.raises(TargetError, match=f"{cores + 1} threads are asked for") as told:
            Served(make("a"), Target("fake", "generic", cores + 1, there.device)).__enter__()
        assert told.value.where is not None
        assert f"on ssh:{USER}" in told.value.where

    def test_room_on_the_disk(self, board: Board, make: Make) -> None:
        patch = next((board.folder / "python").glob("lib/python3*/site-packages")) / "sitecustomize.py"
        patch.write_text(
            "import shutil, types\nshutil.disk_usage = lambda path: types.SimpleNamespace(free=4096)\n"
        )
        try:
            error = self.told(Target("fake", "generic", 1, board.device), make("a"))
        finally:
            patch.unlink()
        assert error.what == f"the disk of '{board.address}' is full"
        assert str(board.cache) in str(error.where)

    def test_a_folder_that_can_be_written(self, board: Board, make: Make) -> None:
        (board.home / ".cache").mkdir()  # of root, as all that is made here
        error = self.told(Target("fake", "generic", 1, board.device), make("a"))
        assert "cannot keep files: Permission denied" in error.what


class TestAddress:
    @pytest.mark.parametrize(
        ("device", "expected"),
        [
            ("local", Address("local", "local")),
            ("ssh:board", Address("ssh", "ssh:board", "board")),
            ("ssh:me@board.lan:2222", Address("ssh", "ssh:me@board.lan:2222", "board.lan", "me", 2222)),
            ("ssh:[fe80::1]:22", Address("ssh", "ssh:[fe80::1]:22", "fe80::1", "", 22)),
            (
                "ssh:b?python=/v/bin/python",
                Address("ssh", "ssh:b", "b", options=(("python", "/v/bin/python"),)),
            ),
            ("adb:emulator-5554", Address("adb", "adb:emulator-5554", "emulator-5554")),
            ("adb:10.0.0.2:5555", Address("adb", "adb:10.0.0.2:5555", "10.0.0.2:5555")),
        ],
    )
    def test_is_read(self, device: str, expected: Address) -> None:
        assert address(Target(device=device)) == expected

    @pytest.mark.parametrize(
        "device",
        [
            "phone",
            "ssh:",
            "ssh:-oProxyCommand=x",
            "ssh:a b",
            "ssh:a:99999",
            "adb:",
            "adb:-s",
            "adb:a;b",
            "local:1",
        ],
    )
    def test_that_is_none(self, device: str) -> None:
        with pytest.raises(TargetError, match="is not known"):
            address(Target(device=device))

    def test_options_are_the_devices_own(self) -> None:
        target = Target(device="ssh:b", options={"python": "/p", "graph": 1})
        assert address(target).python == "/p"
        assert for_runtime(target) == Target(options={"graph": 1})
        assert for_runtime(Target(options={"python": "/p"})) == Target(options={"python": "/p"})
        with pytest.raises(TargetError, match="no option 'pyton'") as told:
            address(Target(device="ssh:b?pyton=x"))
        assert told.value.fix == "did you mean 'python'?"
