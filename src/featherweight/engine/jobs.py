"""Jobs for the runner: a folder with what it needs, the process that works on it, and what it says.

The engine never opens an artifact itself, so a crash, a leak or the threads of a runtime cannot
touch the run. Where that process is, is the business of ``devices.py``.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from featherweight import errors
from featherweight.engine import devices, frames
from featherweight.engine.store import sweep
from featherweight.engine.timing import Limits
from featherweight.errors import DataError, DeviceError, FeatherweightError, MachineError, RunnerError
from featherweight.runtime import Artifact, Target

if TYPE_CHECKING:
    from featherweight.method import Progress

Kind = Literal["latency", "memory", "serve", "profile", "paced", "values", "kernels", "describe"]

_SOURCE = Path(__file__).parents[2]
_TAIL = 1500
_GRACE_S = 10.0
_PREFIX = "featherweight-job-"  # and behind it the process's number: what a killed one left is swept
_SPARE = 1 << 14  # bytes that a runner needs to say anything at all
_NO_MEMORY = ("bad_alloc", "MemoryError", "Cannot allocate memory", "out of memory")


class CallRefused(RunnerError):
    """A session did not take the inputs of a call."""


class Runner:
    """A runner at work in its own process group; leaving the block ends all of it.

    Args:
        kind: What it shall do.
        artifacts: By role: 'twin', 'artifact'.
        target: Whose runtime, threads and options are used.
        inputs: Arrays of one call, where the job needs them.
        limits: Travel to the runner, but for ``timeout_s``: the silence after which it is killed.
        entry: The entry that is called.
        cores: Those that it shall take; none: it looks for idle ones.
        options: Role -> options of its session, where they are not the target's.
        asked: What a job of the kind 'describe' shall tell.

    Raises:
        TargetError: The device is none that jobs can be sent to.
        DataError: An input is not made of plain numbers or text.
    """

    def __init__(
        self,
        kind: Kind,
        artifacts: Mapping[str, Artifact],
        target: Target,
        *,
        inputs: Sequence[np.ndarray] = (),
        limits: Limits | None = None,
        entry: str = "forward",
        cores: Sequence[int] = (),
        options: Mapping[str, Mapping[str, Any]] | None = None,
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        devices.address(target)
        for i, array in enumerate(inputs):
            if array.dtype.kind == "O":
                raise DataError(f"input {i} holds Python objects", fix="give numbers or text")
        self.device = target.device
        self._target = target
        self._artifacts = dict(artifacts)
        self._limits = limits or Limits()
        self._inputs = tuple(inputs)
        self._job = {
            "kind": kind,
            "source": [str(_SOURCE)],
            # Where this process found the runtime, that one finds it too.
            "paths": [path for path in sys.path if Path(path).is_absolute()],
            "target": devices.for_runtime(target).to_json(),
            "artifacts": {
                role: {**artifact.to_json(), "folder": str(artifact.folder.resolve())}
                for role, artifact in artifacts.items()
            },
            "inputs": len(inputs),
            "entry": entry,
            "cores": list(cores),
            "options": {
                role: dict(devices.for_runtime(replace(target, options=given)).options)
                for role, given in (options or {}).items()
            },
            "asked": dict(asked or {}),
            "limits": asdict(self._limits),
        }
        self._doing = f"{kind} of {', '.join(str(a.folder) for a in artifacts.values())} on {target.runtime}"
        self._silent = False

    def __enter__(self) -> Runner:
        sweep(Path(tempfile.gettempdir()), f"{_PREFIX}*-*")
        self._kept = tempfile.TemporaryDirectory(prefix=_PREFIX, suffix=f"-{os.getpid()}")
        self.folder = Path(self._kept.name)
        with disk_room(self.folder):
            for i, array in enumerate(self._inputs):
                np.save(self.folder / f"input{i}.npy", array, allow_pickle=False)
            (self.folder / "job.json").write_text(json.dumps(self._job))
        work = devices.Work(self._job, self._target, self._artifacts, self.folder, self._limits.timeout_s)
        self._silent = False
        try:
            self.link = devices.connect(work)
        except BaseException:
            self._kept.cleanup()
            raise
        self.process = self.link.process
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.link.close()
        self._kept.cleanup()

    def kill(self) -> None:
        """End the process and whatever it started."""
        self.link.kill()

    def send(self, header: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> None:
        """Hand one frame over.

        Raises:
            RunnerError: The process is gone, or does not read.
        """
        with self._watched():
            try:
                frames.send(self.link.requests, header, arrays)
            except BrokenPipeError as error:
                raise self.failure() from error

    def receive(self) -> tuple[dict[str, Any], tuple[np.ndarray, ...]] | None:
        """The next frame, None when there will be no more.

        Raises:
            RunnerError: The process ended inside a frame, or said nothing for too long.
        """
        with self._watched():
            try:
                frame = frames.receive(self.link.answers)
            except (EOFError, ValueError) as error:
                raise self.failure() from error
        if frame is None and self._silent:
            raise self.failure()
        return frame

    def result(self) -> dict[str, Any]:
        """What the finished runner left.

        Raises:
            RunnerError: It crashed, hung, or left no result.
            FeatherweightError: The error that it told, if it is one of ours.
        """
        try:
            code = self.link.wait(_GRACE_S)
            result = json.loads((self.folder / "result.json").read_text())
        except (subprocess.TimeoutExpired, OSError, ValueError) as error:
            raise self.failure() from error
        if code != 0 or not isinstance(result, dict) or "error" in result:
            raise self.failure()
        return result

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Kill the process when the block takes too long; its pipes then end, which ends the block."""
        alarm = threading.Timer(self._limits.timeout_s, self._silenced)
        alarm.daemon = True
        alarm.start()
        try:
            yield
        finally:
            alarm.cancel()

    def _silenced(self) -> None:
        self._silent = True
        self.kill()

    def failure(self) -> FeatherweightError:
        """What went wrong with the process, which is ended."""
        try:
            code: int | None = self.link.wait(_GRACE_S)
        except devices.ConnectionLost as error:
            if not self._silent:
                return error
            code = None
        except subprocess.TimeoutExpired:
            code = None
            self.kill()
        told = None if self._silent else self._told()
        words = self._last_words()
        where = self._doing + (f"; its last words:\n{words}" if words else "; it said nothing")
        if told is not None and (better := self.link.explain(told)) is not None:
            return better
        if told is not None and told["type"] != "MemoryError":
            known = getattr(errors, told["type"], None)
            if isinstance(known, type) and issubclass(known, FeatherweightError):
                return known(told["what"], where=told["where"], fix=told["fix"])
            return RunnerError(
                f"the runner failed: {told['what']}", where=where, fix="see its last words for the cause"
            )
        if self._silent or code is None:
            return RunnerError(
                f"the runner gave no answer for {self._limits.timeout_s:g} s and was stopped",
                where=where,
                fix="exclude this runtime or these layers, or allow more time if the model is that slow",
            )
        what = f"the runner ended with exit code {code} and left no result"
        if code < 0:
            what = f"the runner was ended by {signal.Signals(-code).name}"
        if self._lacked_memory(code, words):
            return RunnerError(
                f"{what}: memory ran out",
                where=where,
                fix="close other programs, or use a smaller batch or model",
            )
        free = self.link.free_bytes()
        if free is not None and free < _SPARE:
            return DeviceError(f"the disk of '{self.device}' is full", fix="free some space there")
        if shutil.disk_usage(self.folder).free < _SPARE:
            return MachineError(
                "the disk is full", where=tempfile.gettempdir(), fix="free space there, or set TMPDIR"
            )
        return RunnerError(what, where=where, fix="exclude this runtime or the layers that it cannot run")

    def _last_words(self) -> str:
        """The end of what the runner and its runtime printed."""
        try:
            return (self.folder / "stderr.txt").read_text(errors="replace").strip()[-_TAIL:]
        except OSError:  # they are with a device that is gone
            return ""

    def _told(self) -> dict[str, Any] | None:
        """The error that the runner left in words, if it got that far."""
        try:
            result = json.loads((self.folder / "result.json").read_text())
        except (OSError, ValueError):
            return None
        told = result.get("error") if isinstance(result, dict) else None
        return told if isinstance(told, dict) else None

    def _lacked_memory(self, code: int, words: str) -> bool:
        """Whether the kernel's counter moved, or the process said so before it gave up."""
        if code == -signal.SIGKILL:
            return self.link.lacked_memory()
        return any(sign in words for sign in _NO_MEMORY)


def run_job(runner: Runner, progress: Progress, description: str) -> dict[str, Any]:
    """Let a runner work to its end under a bar; its result. It starts again when its connection is lost.

    Raises:
        RunnerError: It crashed, hung, or left no result.
        DeviceError: Its device was lost, again and again.
        FeatherweightError: The error that it told, if it is one of ours.
    """

    def work() -> dict[str, Any]:
        with runner:
            for _ in progress.track(_percents(runner), description, total=100):
                pass
            return runner.result()

    return devices.retried(work, runner.device)


def _percents(runner: Runner) -> Iterator[int]:
    """One item per percent that is done."""
    shown = 0
    while (frame := runner.receive()) is not None and "done" in frame[0]:
        done = round(100 * frame[0]["done"])
        yield from range(shown, done)
        shown = max(shown, done)
    yield from range(shown, 100)


class Served:
    """An artifact that answers calls from its own process. A context manager.

    Args:
        artifact: What is opened.
        target: Whose runtime, threads and options are used.
        limits: Only ``timeout_s`` counts: the time after which a call is given up.
    """

    def __init__(self, artifact: Artifact, target: Target, limits: Limits | None = None) -> None:
        self._runner = Runner("serve", {"artifact": artifact}, target, limits=limits)
        self._opened = False

    def __enter__(self) -> Served:
        devices.retried(self._open, self._runner.device)
        return self

    def _open(self) -> None:
        self._runner.__enter__()
        try:
            if self._runner.receive() is None:
                raise self._runner.failure()
        except BaseException:
            self._runner.__exit__(None, None, None)
            raise
        self._opened = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._opened:
            self._opened = False
            self._runner.__exit__(None, None, None)

    def run(self, *inputs: np.ndarray, entry: str = "forward") -> tuple[np.ndarray, ...]:
        """Call the session, in a new process where the connection to the last one is lost.

        Raises:
            DataError: An input is not made of plain numbers or text.
            CallRefused: The session refused the inputs.
            RunnerError: The process died or hangs.
            DeviceError: Its device was lost, again and again.
        """

        def call() -> tuple[np.ndarray, ...]:
            if not self._opened:
                self._open()
            try:
                return self._call(inputs, entry)
            except devices.ConnectionLost:
                self._close()
                raise

        return devices.retried(call, self._runner.device)

    def _call(self, inputs: Sequence[np.ndarray], entry: str) -> tuple[np.ndarray, ...]:
        try:
            self._runner.send({"entry": entry}, [np.asarray(x) for x in inputs])
        except TypeError as error:
            raise DataError(str(error), fix="give numbers or text") from error
        frame = self._runner.receive()
        if frame is None:
            raise self._runner.failure()
        header, outputs = frame
        if "error" in header:
            shapes = ", ".join(f"{np.asarray(x).dtype}{list(np.shape(x))}" for x in inputs)
            raise CallRefused(
                f"the session refused a call: {header['error']}",
                where=f"entry '{entry}' with {shapes}",
                fix="check the shapes and dtypes of the data against those of the model",
            )
        return outputs


@contextmanager
def disk_room(folder: Path) -> Iterator[None]:
    """Tell a full disk as what it is.

    Raises:
        MachineError: The block ran out of space.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MachineError("the disk is full", where=str(folder), fix="free some space there") from error
