"""A runner on a machine that is reached by ssh and has Python, numpy and the runtime, nothing of ours.

The program that attends to the runner there (``remote.py``) travels over standard input, with the modules
that the runner needs (``runner_bundle.py``) and the files of the job; what is there already, by digest, stays
where it is. Then the same connection carries the runner's frames. ``FEATHERWEIGHT_SSH`` names
another ssh, or gives it options, as ``GIT_SSH_COMMAND`` does.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from featherweight.engine import remote
from featherweight.engine.chunks import Chunks, Resumed
from featherweight.engine.devices import Address, ConnectionLost, Work, address
from featherweight.engine.runner_bundle import bundle
from featherweight.errors import DeviceError, FeatherweightError, TargetError
from featherweight.plugins import find_runtime

COMMAND = "FEATHERWEIGHT_SSH"
CACHE_LIMIT = 2**30
_OLDEST = (3, 10)
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3")
_LOADER = "import io;exec(io.FileIO(0,closefd=False).readline())"
_GREET_S = 60.0  # from the start of ssh to the first word of Python on the other side
_NOISE = 1 << 16  # what a login shell may print before that
_PART = 1 << 16
_TAIL = 500
_LOOKS = ("values", "kernels", "profile")  # some runtimes take more packages for these than for sessions
_LOST = 255  # ssh's own exit code

# What ssh says on standard error -> what is wrong, and what helps; all else may pass by itself.
_REFUSALS = (
    (
        ("name or service not known", "no address associated", "nodename nor servname"),
        "there is no machine of that name",
        "check the name, or give it an entry 'Host' in ~/.ssh/config",
    ),
    (
        ("permission denied", "too many authentication failures", "no more authentication methods"),
        "it refuses the login",
        "let it know a key that needs no passphrase or is in the agent: ssh-copy-id {login}",
    ),
    (
        ("host key verification failed", "identification has changed", "host key is known"),
        "its host key is not the one that is known, or none is known",
        "connect once by hand and compare the key: ssh {login}",
    ),
    (
        ("bad configuration option", "usage: ssh", "unknown option", "can't open user config file"),
        "ssh does not take its options",
        f"correct {COMMAND} or ~/.ssh/config",
    ),
)


class SshLink:
    """A job on another machine, over one ssh connection.

    Raises:
        ConnectionLost: The connection could not be made, or ended too early.
        DeviceError: The machine refuses, or lacks what it takes.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._address = address(work.target)
        self._words = work.folder / "ssh.txt"
        self._greeted = False
        with self._words.open("wb") as words:
            try:
                self.process = subprocess.Popen(
                    _command(self._address),
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=words,
                    env={**os.environ, "LC_ALL": "C"},
                    start_new_session=True,
                )
            except OSError as error:
                raise DeviceError(
                    f"'{_client()[0]}' cannot be started: {error.strerror}",
                    where=self._address.name,
                    fix=f"install an ssh client, or name one in {COMMAND}",
                ) from error
        self.requests = cast(BinaryIO, self.process.stdin)
        self._raw = cast(BinaryIO, self.process.stdout)
        self.over: dict[str, Any] | None = None
        try:
            self._greet()
            self._hand_over()
        except BaseException:
            self.kill()
            self.close()
            raise
        self.answers = cast(BinaryIO, io.BufferedReader(Chunks(self._raw, self._finish), _PART))

    # ---- Link

    def wait(self, seconds: float) -> int:
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.kill()

        alarm = threading.Timer(max(seconds, self._work.timeout_s), give_up)
        alarm.daemon = True
        alarm.start()
        try:
            while self.answers.read(_PART):  # behind the last frame: how it ended, and what it left
                pass
        finally:
            alarm.cancel()
        if late.is_set():
            raise subprocess.TimeoutExpired(self.process.args, seconds)
        if self.over is None:
            raise self._lost()
        return int(self.over["code"])

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.process.wait()
        for pipe in (self.requests, self._raw):
            with suppress(OSError):
                pipe.close()

    def lacked_memory(self) -> bool:
        return bool(self.over and self.over["lacked_memory"])

    def free_bytes(self) -> int | None:
        return None if self.over is None else int(self.over["free"])

    def explain(self, told: Mapping[str, Any]) -> FeatherweightError | None:
        name = self._address.name
        if told["type"] == "ModuleNotFoundError" and "'numpy'" in told["what"]:
            return self._uninstalled(f"there is no numpy on '{name}'", "numpy")
        if told["type"] == "ModuleNotFoundError" and self._work.job["kind"] in _LOOKS:
            what = f"{self._work.target.runtime} on '{name}' shows nothing of its inside: {told['what']}"
            return TargetError(what, where=f"on {name}", fix="install that package there, or look at it here")
        missing = re.search(r"No module named '([\w.]+)'", told["what"])
        if told["type"] == "ModuleNotFoundError" and missing is not None:
            what = f"{self._work.target.runtime} needs the package '{missing[1]}', which is not on '{name}'"
            return self._uninstalled(what, missing[1].partition(".")[0])
        if told["type"] == "MissingRuntime":
            runtime = find_runtime(self._work.target.runtime)
            what = f"runtime '{runtime.name}' is not installed on '{name}': no package '{runtime.module}'"
            return self._uninstalled(what, " ".join(runtime.packages))
        if told["type"] == "TargetError":
            where = ", ".join(filter(None, (told["where"], f"on {name}")))
            return TargetError(told["what"], where=where, fix=told["fix"])
        return None

    def _uninstalled(self, what: str, packages: str) -> DeviceError:
        name, python = self._address.name, self._address.python
        fix = (
            f"{python} -m pip install {packages}, on that machine; or name another Python: {name}?python=..."
        )
        return DeviceError(what, where=f"the packages of {python} there", fix=fix)

    # ---- making the connection

    def _greet(self) -> None:
        """Start the program on the other side and wait for its greeting, past what its shell prints."""
        alarm = threading.Timer(min(_GREET_S, self._work.timeout_s), self.kill)
        alarm.daemon = True
        alarm.start()
        seen = b""
        try:
            self._send(_program())
            while remote.GREETING not in seen:
                part = self._raw.read(_PART)
                if not part:
                    raise self._unstarted(seen)
                seen = (seen + part)[-_NOISE:]
        finally:
            alarm.cancel()
        self._raw = cast(BinaryIO, io.BufferedReader(Resumed(seen.partition(remote.GREETING)[2], self._raw)))
        self._greeted = True

    def _hand_over(self) -> None:
        """Send the job: what there is of it on the other side, by digest, stays there."""
        work = self._work
        self._receive()
        modules, archive = bundle(work.target.runtime)
        contents: dict[str, Path | bytes] = {modules: archive}
        tree = {}
        for role, artifact in work.artifacts.items():
            for name in artifact.files:
                digest = _digest(artifact.folder / name)
                tree[f"artifacts/{role}/{name}"] = digest
                contents[digest] = artifact.folder / name
        loose = {path.name: path.stat().st_size for path in sorted(work.folder.glob("input*.npy"))}
        request = {
            "limit": CACHE_LIMIT,
            "modules": modules,
            "tree": tree,
            "loose": loose,
            "sizes": {digest: _size(content) for digest, content in contents.items()},
            "job": self._job(),
        }
        self._send(_packed(request))
        for digest in self._receive()["lacks"]:
            self._send_content(contents[digest])
        for name in loose:
            self._send_content(work.folder / name)

    def _job(self) -> dict[str, Any]:
        work = self._work
        described = {
            role: {**artifact.to_json(), "folder": f"artifacts/{role}"}
            for role, artifact in work.artifacts.items()
        }
        return {**work.job, "artifacts": described}

    def _send_content(self, content: Path | bytes) -> None:
        if isinstance(content, bytes):
            self._send(content)
            return
        with content.open("rb") as file:
            while part := file.read(_PART):
                self._send(part)

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[self.requests.write(view) :]
        except BrokenPipeError as error:
            if not self._greeted:
                return  # what it printed tells why
            self._raw.read(4)  # as in front of the end of all chunks
            raise self._refused() from error

    def _receive(self) -> dict[str, Any]:
        """One piece of JSON from the other side's program.

        Raises:
            ConnectionLost: There is none.
            DeviceError: It tells that files cannot be kept there.
        """
        head = self._raw.read(4)
        text = self._raw.read(struct.unpack("<I", head)[0]) if len(head) == 4 else b""
        try:
            data: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise self._lost() from error
        if "error" in data:
            raise self._no_room(data)
        return data

    def _finish(self) -> None:
        """Behind the last chunk: how the runner ended, and what it left."""
        over = self._receive()
        for name, size in over["files"].items():
            with (self._work.folder / Path(name).name).open("wb") as out:
                while size:
                    part = self._raw.read(min(size, _PART))
                    if not part:
                        raise self._lost()
                    out.write(part)
                    size -= len(part)
        self.over = over

    # ---- what went wrong

    def _refused(self) -> FeatherweightError:
        """Why the other side takes no more files."""
        try:
            self._receive()
        except FeatherweightError as error:
            return error
        return self._lost()

    def _no_room(self, told: Mapping[str, Any]) -> DeviceError:
        name, folder = self._address.name, told["folder"]
        if told["errno"] in (errno.ENOSPC, errno.EDQUOT):
            return DeviceError(f"the disk of '{name}' is full", where=folder, fix="free some space there")
        return DeviceError(
            f"'{name}' cannot keep files: {told['error']}",
            where=folder,
            fix="make that folder writable there",
        )

    def _lost(self) -> ConnectionLost:
        self.kill()
        self.process.wait()
        where = self._address.name
        if words := self._said():
            where += f"; ssh said:\n{words}"
        return ConnectionLost(
            f"the connection to '{self._address.name}' ended before the job did",
            where=where,
            fix=f"check that it is on and can be reached: ssh {_login(self._address)}",
        )

    def _said(self) -> str:
        return self._words.read_text(errors="replace").strip()[-_TAIL:]

    def _unstarted(self, printed: bytes) -> DeviceError:
        """Why the program on the other side never spoke."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return self._lost()
        name, python = self._address.name, self._address.python
        words = "\n".join(filter(None, (self._said(), printed.decode(errors="replace").strip()[-_TAIL:])))
        where = f"{name}; it said:\n{words}" if words else name
        if code == _LOST or code < 0:
            for signs, what, fix in _REFUSALS:
                if any(sign in words.lower() for sign in signs):
                    fix = fix.format(login=_login(self._address))
                    return DeviceError(f"'{name}' cannot be used: {what}", where=where, fix=fix)
            return self._lost()
        oldest = ".".join(map(str, _OLDEST))
        fix = f"install Python {oldest} or later there, or name one: {name}?python=/path/to/python3"
        if code in (126, 127) or "not found" in words:
            return DeviceError(f"there is no '{python}' on '{name}'", where=where, fix=fix)
        if b"featherweight needs" in printed:
            version = printed.split()[-1].decode(errors="replace")
            what = f"'{python}' on '{name}' is Python {version}; a runner needs {oldest}"
            return DeviceError(what, where=name, fix=fix)
        return DeviceError(f"'{python}' did not start on '{name}' (exit code {code})", where=where, fix=fix)


def _client() -> list[str]:
    return shlex.split(os.environ.get(COMMAND, "")) or ["ssh"]


def _command(place: Address) -> list[str]:
    """The command line of ssh."""
    command = [*_client(), "-T"]
    for option in _OPTIONS:
        command += ["-o", option]
    if place.port:
        command += ["-p", str(place.port)]
    if place.user:
        command += ["-l", place.user]
    there = f"{shlex.quote(place.python)} -I -B -c {shlex.quote(_LOADER)}"
    return [*command, "--", place.host, there]


def _login(place: Address) -> str:
    """How a person would write it behind ssh."""
    port = f"-p {place.port} " if place.port else ""
    return port + (f"{place.user}@{place.host}" if place.user else place.host)


def _program() -> bytes:
    """The program for the other side, as one line that any Python can read as far as it needs to."""
    source = Path(remote.__file__).read_text()
    run = f"eval(compile({source!r},'remote.py','exec'),{{'__name__':'__main__'}})"
    old = "sys.stdout.write('featherweight needs a later one than '+sys.version.split()[0]),sys.exit(3)"
    return f"import sys;({run}) if sys.version_info>={_OLDEST!r} else ({old})\n".encode()


def _packed(data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data).encode()
    return struct.pack("<I", len(text)) + text


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
