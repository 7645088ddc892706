"""Runs converters in a process of their own, with limits: what crashes, hangs or eats memory stays there.

``convert('openvino', 'featherweight.runtimes.openvino:_convert', {...})`` calls that function with these
keyword arguments in the child and returns what it returns (JSON both ways; files travel by path). The
child is kept for the next call of the same runtime, since importing an SDK takes seconds; it has no proxies,
none of the user's settings, and an audit hook that refuses connections and installers.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight import errors
from featherweight.errors import FeatherweightError, TargetError

_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "OMP_NUM_THREADS")
_LOOK_S = 0.05
_TAIL = 600
_SOURCE = Path(__file__).parents[2]
_SECONDS, _BYTES = "FEATHERWEIGHT_CONVERTER_SECONDS", "FEATHERWEIGHT_CONVERTER_BYTES"
_INSTALLERS = frozenset({"pip", "pip3", "npm", "conda", "apt", "apt-get", "curl", "wget"})
_SHARE = 0.8  # of the memory that is free when a conversion starts


@dataclass(frozen=True)
class Limits:
    """What a conversion may take.

    Attributes:
        seconds: Until it is stopped.
        bytes: Resident memory of the child and what it starts; 0: most of what is free.
    """

    seconds: float = 900.0
    bytes: int = 0

    @classmethod
    def of_environment(cls) -> Limits:
        """The defaults, or what the user set."""
        return cls(
            float(os.environ.get(_SECONDS, cls.seconds)), int(float(os.environ.get(_BYTES, cls.bytes)))
        )


def convert(
    runtime: str, function: str, arguments: Mapping[str, Any], *, limits: Limits | None = None
) -> Any:
    """Call a function in the converter's child.

    Args:
        runtime: Name of the runtime, for messages; calls of one runtime share a child.
        function: ``module:name``, importable in the child.
        arguments: JSON data.
        limits: Of time and memory; by default those of the environment.

    Raises:
        TargetError: The converter refused, crashed, hung or took too much memory.
        FeatherweightError: What the function raised, where it is one of ours.
    """
    child = _children.get((os.getpid(), runtime))
    if child is None or not child.alive:
        child = _children[(os.getpid(), runtime)] = _Child(runtime)
    return child.call(function, arguments, limits or Limits.of_environment())


class _Child:
    """One process that converts for one runtime, call after call."""

    def __init__(self, runtime: str) -> None:
        self.runtime = runtime
        self.home = tempfile.TemporaryDirectory(prefix="featherweight-converter-", suffix=f"-{os.getpid()}")
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment |= {"HOME": self.home.name, "TMPDIR": self.home.name, "LC_ALL": "C.UTF-8"}
        self.words = Path(self.home.name) / "stderr.txt"
        paths = json.dumps([str(_SOURCE), *(path for path in sys.path if Path(path).is_absolute())])
        with self.words.open("wb") as words:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-X", "faulthandler", str(Path(__file__)), paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                cwd=self.home.name,
                env=environment,
                start_new_session=True,
            )
        atexit.register(self.end)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        """End the process and whatever it started, and drop its files."""
        atexit.unregister(self.end)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.home.cleanup()

    def call(self, function: str, arguments: Mapping[str, Any], limits: Limits) -> Any:
        said = self.words.stat().st_size
        watch = _Watch(self.process, limits)
        request = json.dumps({"function": function, "arguments": dict(arguments)}).encode() + b"\n"
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            with watch:
                self.process.stdin.write(request)
                self.process.stdin.flush()
                line = self.process.stdout.readline()
            answer = json.loads(line)
        except (OSError, ValueError) as error:
            raise self._ended(watch, limits, said) from error
        except BaseException:  # an answer that nobody waits for would be taken for that of the next call
            self.end()
            raise
        if "error" in answer:
            raise self._told(answer["error"])
        return answer["result"]

    def _told(self, told: Mapping[str, Any]) -> FeatherweightError:
        known = getattr(errors, told["type"], None)
        if isinstance(known, type) and issubclass(known, FeatherweightError):
            return known(told["what"], where=told["where"], fix=told["fix"])
        return TargetError(
            f"{self.runtime} cannot convert this model: {told['what']}",
            where=told["where"],
            fix="exclude the layers it names, or take another runtime",
        )

    def _ended(self, watch: _Watch, limits: Limits, said: int) -> TargetError:
        """Why there was no answer; the process is gone afterwards."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        code = self.process.returncode
        words = self.words.read_bytes()[said:].decode(errors="replace").strip()[-_TAIL:]
        self.end()
        where = f"its last words:\n{words}" if words else None
        if watch.reason == "time":
            return TargetError(
                f"{self.runtime}'s converter gave no answer for {limits.seconds:g} s and was stopped",
                where=where,
                fix=f"take another runtime, or set {_SECONDS} higher if the model is that large",
            )
        if watch.reason == "memory":
            return TargetError(
                f"{self.runtime}'s converter took more than {watch.bytes / 1e9:.2g} GB and was stopped",
                where=where,
                fix=f"take another runtime, free memory, or set {_BYTES} higher",
            )
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        return TargetError(
            f"{self.runtime}'s converter {how}",
            where=where,
            fix="exclude the layers that it cannot convert, or take another runtime",
        )


class _Watch:
    """Kills the child's process group when it takes too long or too much; a context manager."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits) -> None:
        import psutil

        self.process = process
        self.limits = limits
        self.reason = ""
        self.bytes = limits.bytes or int(_SHARE * psutil.virtual_memory().available)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        deadline = time.monotonic() + self.limits.seconds
        while not self._done.wait(_LOOK_S):
            if time.monotonic() > deadline:
                self.reason = "time"
            elif _resident(self.process.pid) > self.bytes:
                self.reason = "memory"
            if self.reason:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                return


def _resident(pid: int) -> int:
    """Bytes in memory of a process and of all that it started."""
    import psutil

    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for one in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += one.memory_info().rss
    return total


_children: dict[tuple[int, str], _Child] = {}


# ---- the child's side


def _serve(paths: list[str]) -> None:
    """Answer calls until standard input ends; what a converter prints goes to standard error."""
    sys.path[:] = [*paths[:1], *(path for path in sys.path if path not in paths), *paths[1:]]
    sys.addaudithook(_refuse)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        try:
            module, _, name = asked["function"].partition(":")
            answer = {"result": getattr(importlib.import_module(module), name)(**asked["arguments"])}
            text = json.dumps(answer)
        except Exception as error:  # noqa: BLE001 - the caller is told, and may send another model
            import traceback

            traceback.print_exc()
            text = json.dumps({"error": _describe(error)})
        sys.stderr.flush()
        answers.write(text.encode() + b"\n")
        answers.flush()
    os._exit(0)  # a runtime that crashes while it is torn down has no say


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """No converter may reach out of the machine or install anything."""
    if event in ("socket.connect", "socket.sendto") and getattr(arguments[0], "family", None) != 1:
        raise PermissionError("a converter tried to open a connection")
    if event in ("subprocess.Popen", "os.posix_spawn", "os.exec") and _installs(arguments[1]):
        raise PermissionError("a converter tried to install something")
    if event == "os.system" and _installs(os.fsdecode(arguments[0]).split()):
        raise PermissionError("a converter tried to install something")


def _installs(command: Any) -> bool:
    words = [command] if isinstance(command, str | bytes | os.PathLike) else list(command)
    names = {Path(os.fsdecode(word)).name for word in words}
    return not names.isdisjoint(_INSTALLERS)


def _describe(error: Exception) -> dict[str, Any]:
    lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return {
        "type": type(error).__name__,
        "what": getattr(error, "what", " ".join(lines)[:500]),
        "where": getattr(error, "where", None),
        "fix": getattr(error, "fix", None),
    }


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
