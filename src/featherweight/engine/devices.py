"""Where jobs run: a link to the process that works on one, here or on another machine.

``local`` is a child process; ``ssh:`` one on a machine that has Python (``ssh.py``); ``adb:`` the
runtime's own benchmark program on a phone (``adb_link.py``); ``ray:`` one on a worker of a cluster that has
this label (``workers_link.py``). Whatever it is, the engine speaks
in frames and finds what the job left in the job's folder.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, cast
from urllib.parse import parse_qsl

from featherweight.errors import DeviceError, FeatherweightError, TargetError, nearest
from featherweight.runtime import Artifact, Target

T = TypeVar("T")

PAUSES_S = (1.0, 4.0)  # before the second and the third try
OWN_OPTIONS = ("python", "tools")  # of Target.options: the device's, not the runtime's
HERE = "FEATHERWEIGHT_LABELS"  # environment variable of a worker: the labels of its machine, with commas
_KINDS = ("local", "ssh:[user@]host[:port]", "adb:serial", "ray:label")
_RUNNER = Path(__file__).with_name("runner.py")
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "FEATHERWEIGHT_NODE_MODULES")
_SCORED_HERE = ("serve", "values")  # of a phone's jobs: there is no session on it
_SSH = re.compile(
    r"(?:(?P<user>[^@\s:/]+)@)?(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\s:@/\[\]-][^\s:@/\[\]]*)(?::(?P<port>\d{1,5}))?"
)


class ConnectionLost(DeviceError):
    """The connection to a device ended before the job did; trying again may help."""


@dataclass(frozen=True)
class Address:
    """A device as ``Target.device`` names it.

    Attributes:
        kind: 'local', 'ssh', 'adb' or 'ray'.
        name: The whole of it, for messages, without its options.
        host: Of ssh; of adb the serial number, of ray the label.
        user: Of ssh; '' is what ssh decides.
        port: Of ssh; 0 is what ssh decides.
        options: What stands behind '?', and the device's part of ``Target.options``; sorted.
    """

    kind: str
    name: str
    host: str = ""
    user: str = ""
    port: int = 0
    options: tuple[tuple[str, str], ...] = ()

    @property
    def python(self) -> str:
        return dict(self.options).get("python", "python3")


def address(target: Target) -> Address:
    """Read a target's device.

    Raises:
        TargetError: It is none that jobs can be sent to.
    """
    name, _, query = target.device.partition("?")
    options = dict(parse_qsl(query))
    options |= {key: str(target.options[key]) for key in OWN_OPTIONS if key in target.options}
    if unknown := set(options) - set(OWN_OPTIONS):
        first = sorted(unknown)[0]
        raise TargetError(f"a device has no option '{first}'", where=name, fix=nearest(first, OWN_OPTIONS))
    given = tuple(sorted(options.items()))
    kind, _, rest = name.partition(":")
    if kind == "local" and not rest:
        return Address("local", name)
    if kind in ("adb", "ray") and re.fullmatch(r"[\w.:-]+", rest) and not rest.startswith("-"):
        return Address(kind, name, rest, options=given)
    found = _SSH.fullmatch(rest) if kind == "ssh" else None
    if found is None or int(found["port"] or 0) > 65535:
        raise TargetError(f"device '{name}' is not known", fix=f"a device is {', '.join(_KINDS)}")
    host, user = found["host"].strip("[]"), found["user"] or ""
    return Address("ssh", name, host, user, int(found["port"] or 0), given)


def for_runtime(target: Target) -> Target:
    """The target as the runtime sees it where it runs: local, without the device's options."""
    if target.device == "local":
        return target
    options = {key: value for key, value in target.options.items() if key not in OWN_OPTIONS}
    threads = target.threads
    if address(target).kind == "adb":  # its sessions are opened here
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = min(threads, cores)
    return replace(target, device="local", options=options, threads=threads)


@dataclass(frozen=True)
class Work:
    """What a link needs to know of a job.

    Attributes:
        job: What becomes job.json.
        target: Where and how.
        artifacts: By role.
        folder: The job's folder on this machine; takes what the job leaves.
        timeout_s: Silence after which a connection that is being made counts as lost.
    """

    job: Mapping[str, Any]
    target: Target
    artifacts: Mapping[str, Artifact]
    folder: Path
    timeout_s: float


class Link(Protocol):
    """A job at work somewhere."""

    requests: BinaryIO
    answers: BinaryIO

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """On this machine: the runner, or what is connected to it; None where no single one is."""

    def wait(self, seconds: float) -> int:
        """Exit code of the runner; what it left is in the job's folder afterwards.

        Raises:
            subprocess.TimeoutExpired: It is still at work.
            ConnectionLost: Nobody knows.
        """

    def kill(self) -> None:
        """End the runner and whatever it started."""

    def close(self) -> None:
        """Give everything back, once the runner is killed."""

    def lacked_memory(self) -> bool:
        """Whether the kernel killed something there for want of memory since the start."""

    def free_bytes(self) -> int | None:
        """Room on the disk there; None where nobody told."""

    def explain(self, told: Mapping[str, Any]) -> FeatherweightError | None:
        """A better error than the one that the runner told, where it is the device that lacks something."""


def retried(action: Callable[[], T], device: str) -> T:
    """Try up to three times, for as long as only the connection fails.

    Raises:
        DeviceError: It failed each time.
    """
    for number, pause in enumerate((*PAUSES_S, 0.0), 1):
        try:
            return action()
        except ConnectionLost as error:
            lost = error
            if number <= len(PAUSES_S):
                time.sleep(pause)
    raise gone(device, lost)


def gone(device: str, last: ConnectionLost) -> DeviceError:
    """The error after the last try."""
    what = f"the connection to '{device}' was lost {len(PAUSES_S) + 1} times"
    error = DeviceError(what, where=last.where, fix=last.fix)
    error.__cause__ = last
    return error


def connect(work: Work) -> Link:
    """Start a job where its target says.

    Raises:
        TargetError: The device is none that jobs can be sent to.
        DeviceError: It cannot be reached, or lacks what it takes.
    """
    where = address(work.target)
    kind = where.kind
    if kind == "ray" and where.host not in os.environ.get(HERE, "").split(","):
        from featherweight.engine.workers_link import RayLink

        return RayLink(work)
    if kind == "ssh":
        from featherweight.engine.ssh import SshLink

        return SshLink(work)
    if kind == "adb":
        if work.job["kind"] in _SCORED_HERE:
            return LocalLink(work)
        from featherweight.engine.adb_link import AdbLink

        return AdbLink(work)
    return LocalLink(work)


class LocalLink:
    """A runner on this machine, in its own process group."""

    def __init__(self, work: Work) -> None:
        self._kills = kernel_kills()
        # No proxies, no user settings: the same environment for everyone.
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment |= {"HOME": str(work.folder), "TMPDIR": str(work.folder), "LC_ALL": "C.UTF-8"}
        with (work.folder / "stderr.txt").open("wb") as words:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-X", "faulthandler", str(_RUNNER), str(work.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                cwd=work.folder,
                env=environment,
                start_new_session=True,
            )
        self.requests = cast(BinaryIO, self.process.stdin)
        self.answers = cast(BinaryIO, self.process.stdout)

    def wait(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.process.wait()
        for pipe in (self.requests, self.answers):
            with suppress(BrokenPipeError):
                pipe.close()

    def lacked_memory(self) -> bool:
        return kernel_kills() != self._kills

    def free_bytes(self) -> int | None:
        return None

    def explain(self, told: Mapping[str, Any]) -> FeatherweightError | None:
        return None


def kernel_kills() -> int | None:
    """How many processes the kernel has killed for want of memory since it started."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
