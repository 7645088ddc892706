"""A second machine on the loopback address: its own sshd, its own user, a Python with numpy and one runtime.

``from board import board, board_sshd`` gives a test module both fixtures; ``board.device`` is the device.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path

import pytest

USER = f"fwboard{os.getpid()}"  # several runs of the tests may share this machine
PACKAGES = ("numpy", "onnxruntime")
_SSHD = "/usr/sbin/sshd"


@dataclass(frozen=True)
class Board:
    """The machine.

    Attributes:
        folder: Everything of it.
        port: Where its sshd listens.
    """

    folder: Path
    port: int

    @property
    def address(self) -> str:
        return f"ssh:{USER}@127.0.0.1:{self.port}"

    @property
    def python(self) -> Path:
        """The Python that has numpy and the runtime."""
        return self.folder / "python" / "bin" / "python3"

    @property
    def device(self) -> str:
        """For ``Target.device``."""
        return f"{self.address}?python={self.python}"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def cache(self) -> Path:
        return self.home / ".cache" / "featherweight-runner"

    @property
    def ssh(self) -> str:
        """The command that knows its key and nothing of the user's."""
        return f"ssh -F {self.folder / 'ssh_config'}"

    def run(self, *command: str) -> str:
        """What a command prints for the board's user, in an empty environment."""
        done = subprocess.run(
            command,
            user=USER,
            group=USER,
            extra_groups=[],
            env={},
            cwd=self.home,
            text=True,
            capture_output=True,
            check=False,
        )
        return (done.stdout + done.stderr).strip()

    def processes(self) -> list[str]:
        """Command lines of what its user runs."""
        uid, found = pwd.getpwnam(USER).pw_uid, []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if folder.stat().st_uid == uid:
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def idle(self, seconds: float = 5.0) -> bool:
        """Whether all processes of its user end soon."""
        end = time.monotonic() + seconds
        while self.processes() and time.monotonic() < end:
            time.sleep(0.02)
        return not self.processes()


class Proxy:
    """Stands between ssh and sshd and cuts connections: each one after so many bytes from the sshd."""

    def __init__(self, port: int, cuts: Sequence[int | None] = (None,)) -> None:
        self._to, self._cuts = port, iter(cuts)
        self._last: int | None = cuts[-1]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self.down = False
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self.down:
                client.close()
                continue
            pair = client, socket.create_connection(("127.0.0.1", self._to))
            self.pairs.append(pair)
            threading.Thread(target=self._copy, args=(*pair, None), daemon=True).start()
            limit = next(self._cuts, self._last)
            threading.Thread(target=self._copy, args=(*pair[::-1], limit), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while (limit is None or passed < limit) and (part := source.recv(4096)):
                target.sendall(part)
                passed += len(part)
        self._cut(source, target)

    def _cut(self, *both: socket.socket) -> None:
        for end in both:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """All connections that there are."""
        for pair in self.pairs:
            self._cut(*pair)

    def switch(self, *, off: bool) -> None:
        """Cut everything and refuse what comes, or let it pass again."""
        self.down = off
        if off:
            self.cut()

    def close(self) -> None:
        self._listener.close()
        self.cut()
        for pair in self.pairs:
            for end in pair:
                end.close()


@pytest.fixture(scope="session")
def board_sshd() -> Iterator[Board]:
    """The machine, switched on for the whole run of the tests."""
    if os.geteuid() != 0 or not Path(_SSHD).exists():
        pytest.skip("a second user needs root, and the board an sshd")
    folder = Path(tempfile.mkdtemp(prefix="featherweight-board-"))
    folder.chmod(0o755)
    home = folder / "home"
    _remove_user()  # of a run that was killed, whose process had the same number
    _call("useradd", "--system", "--user-group", "-m", "-d", str(home), "-s", "/bin/sh", "-p", "*", USER)
    try:
        install_python(folder / "python", PACKAGES)
        with _sshd(folder) as port:
            yield Board(folder, port)
    finally:
        _remove_user()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def board(board_sshd: Board, monkeypatch: pytest.MonkeyPatch) -> Board:
    """The machine, as ssh finds it in this test; nothing is in its cache."""
    from featherweight.engine import devices, environment

    monkeypatch.setenv("FEATHERWEIGHT_SSH", board_sshd.ssh)
    monkeypatch.setattr(devices, "PAUSES_S", (0.05, 0.1))
    environment._asked.cache_clear()
    shutil.rmtree(board_sshd.home / ".cache", ignore_errors=True)
    return board_sshd


def install_python(place: Path, packages: Sequence[str] = ()) -> Path:
    """This Python's standard library and interpreter, with these packages and nothing else."""
    library = Path(sysconfig.get_path("stdlib"))
    there = place / "lib" / library.name
    unwanted = shutil.ignore_patterns("site-packages", "dist-packages", "test", "__pycache__", "ensurepip")
    shutil.copytree(library, there, ignore=unwanted, copy_function=_link, symlinks=True)
    (place / "bin").mkdir()
    interpreter, python = place / "bin" / "python", place / "bin" / "python3"
    shutil.copy(Path(sys.executable).resolve(), interpreter)
    # Where this Python's own library lies, the board's user may have no access.
    python.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={place / "lib"} exec {interpreter} "$@"\n')
    python.chmod(0o755)
    for shared in Path(sysconfig.get_config_var("LIBDIR")).glob("libpython3*.so*"):
        _link(str(shared), str(place / "lib" / shared.name))
    asked = [str(python), "-I", "-c", "import site; print(site.getsitepackages()[0])"]
    site = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    site.mkdir(parents=True, exist_ok=True)
    for name in packages:
        for file in files(name) or ():
            source, target = Path(str(file.locate())), site / file
            if ".." in file.parts or "__pycache__" in file.parts:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(str(source), str(target))
    return site


def _link(source: str, target: str) -> str:
    """A second name for a file, where the disk is the same."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


@contextlib.contextmanager
def _sshd(folder: Path) -> Iterator[int]:
    """Its port, while it runs; with its own host key, and one key that may log in."""
    for name in ("host", "login"):
        _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(folder / name))
    (folder / "authorized").write_text((folder / "login.pub").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "known").write_text(f"board {(folder / 'host.pub').read_text()}")
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder / 'host'}\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {folder / 'authorized'}\nStrictModes no\nAllowUsers {USER}\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nMaxStartups 100\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\n IdentityFile {folder / 'login'}\n IdentitiesOnly yes\n IdentityAgent none\n"
        f" UserKnownHostsFile {folder / 'known'}\n GlobalKnownHostsFile /dev/null\n"
        " StrictHostKeyChecking yes\n HostKeyAlias board\n"
    )
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen([_SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        _wait_for(port, process, folder / "sshd.log")
        yield port
    finally:
        process.terminate()
        process.wait()


def _remove_user() -> None:
    # Also while a process of it is ending.
    subprocess.run(["userdel", "--force", USER], capture_output=True, check=False)


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"sshd did not start: {log.read_text()}")


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
