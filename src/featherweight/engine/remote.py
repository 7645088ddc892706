"""Stands beside a runner on another machine: unpacks its job, passes frames on, and cleans up.

Arrives as text over ssh's standard input, so it needs the standard library of Python 3.10 and nothing else.
It greets, hears of the files of a job by their digests, asks for those that its cache lacks, starts the
runner in a folder of its own and sends what that says in chunks (4 bytes of length, then the bytes; a
length of 0 ends them), then the exit code and the files that the runner left. When its standard
input ends, nobody waits any more: the runner ends with it, and only the cache stays.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import site
import struct
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

GREETING = b"\n\x02featherweight runner\x03\n"
CACHE = ".cache/featherweight-runner"
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_BUNDLES = 8  # of the toolkit's modules, one for each version that was used here
_TAIL = 1 << 16
_SPARE = 1 << 20  # bytes of the disk that stay free


def main() -> None:
    """Serve one job, from greeting to cleaning up."""
    os.umask(0o077)
    user = site.getusersitepackages()
    paths = [user] if Path(user).is_dir() else []
    _write(GREETING + _packed({"python": ".".join(map(str, sys.version_info[:3])), "paths": paths}))
    request = json.loads(_read(_length()))
    cache = Cache(Path.home() / CACHE, request["limit"])
    try:
        folder = cache.job_folder()
    except OSError as error:
        _write(_packed(_refusal(error, cache.folder)))
        return
    try:
        started = _receive(request, cache, folder, paths)
        if started is not None:
            _attend(started, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Cache:
    """Files by their digest, the toolkit's modules by the digest of their archive, and folders of jobs.

    Args:
        folder: Where all of it lies.
        limit: Bytes of files that may stay; what was not used for longest goes first.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.files = folder / "files"
        self.limit = limit

    def job_folder(self) -> Path:
        """A new folder; those of processes that run no more go."""
        self.files.mkdir(parents=True, exist_ok=True)
        jobs = self.folder / "jobs"
        jobs.mkdir(exist_ok=True)
        for left in jobs.iterdir():
            if not _runs(left.name.rpartition("-")[2]):
                shutil.rmtree(left, ignore_errors=True)
        folder = jobs / f"{time.time_ns()}-{os.getpid()}"
        (folder / "home").mkdir(parents=True)
        return folder

    def lacks(self, sizes: dict[str, int]) -> list[str]:
        """Which files are not here; those that are count as used now."""
        missing = []
        for digest, size in sizes.items():
            path = self.files / digest
            if path.is_file() and path.stat().st_size == size:
                os.utime(path)
            else:
                missing.append(digest)
        return missing

    def make_room(self, needed: int, used: set[str]) -> None:
        """Drop what was not used for longest, for the limit and for the disk.

        Raises:
            OSError: The disk has no room, even so.
        """
        old = sorted(
            (path for path in self.files.iterdir() if path.name not in used),
            key=lambda path: path.stat().st_mtime,
        )
        kept = sum(path.stat().st_size for path in self.files.iterdir())
        while old and (kept + needed > self.limit or self._free() < needed + _SPARE):
            kept -= old[0].stat().st_size
            old.pop(0).unlink(missing_ok=True)
        if self._free() < needed + _SPARE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def keep(self, digest: str, size: int) -> None:
        """Read a file from the connection; whole and as its digest says, or not at all."""
        unfinished = self.files / f"{digest}.{os.getpid()}"
        seen = hashlib.sha256()
        try:
            with unfinished.open("wb") as out:
                for part in _parts(size):
                    seen.update(part)
                    out.write(part)
            if seen.hexdigest() != digest:
                raise ValueError(f"{digest} arrived damaged")
            unfinished.chmod(0o400)
            unfinished.replace(self.files / digest)
        finally:
            unfinished.unlink(missing_ok=True)

    def modules(self, digest: str) -> Path:
        """The unpacked archive of the toolkit's modules."""
        unpacked = self.folder / "modules" / digest
        if not unpacked.is_dir():
            unfinished = unpacked.with_name(f"{digest}.{os.getpid()}")
            shutil.rmtree(unfinished, ignore_errors=True)
            with tarfile.open(self.files / digest) as archive:
                for member in archive:
                    if member.isfile() and ".." not in member.name and not member.name.startswith("/"):
                        archive.extract(member, unfinished)
            try:
                unfinished.rename(unpacked)
            except OSError:  # another job was faster
                shutil.rmtree(unfinished, ignore_errors=True)
        os.utime(unpacked)
        others = sorted(unpacked.parent.iterdir(), key=lambda path: -path.stat().st_mtime)
        for path in others[_BUNDLES:]:
            shutil.rmtree(path, ignore_errors=True)
        return unpacked


def _receive(
    request: dict[str, Any], cache: Cache, folder: Path, paths: list[str]
) -> subprocess.Popen[bytes] | None:
    """Complete the job's folder and start the runner; None when there was no room for it."""
    sizes = request["sizes"]
    missing = cache.lacks(sizes)
    try:
        cache.make_room(sum(sizes[digest] for digest in missing) + sum(request["loose"].values()), set(sizes))
    except OSError as error:
        _write(_packed(_refusal(error, cache.folder)))
        return None
    _write(_packed({"lacks": missing}))
    try:
        for digest in missing:
            cache.keep(digest, sizes[digest])
        for name, size in request["loose"].items():
            with (folder / name).open("wb") as out:
                for part in _parts(size):
                    out.write(part)
        for name, digest in request["tree"].items():
            _place(cache.files / digest, folder / name)
        job = {**request["job"], "source": [str(cache.modules(request["modules"]))], "paths": paths}
        (folder / "job.json").write_text(json.dumps(job))
        return _start(job, folder)
    except OSError as error:
        _write(struct.pack("<I", 0) + _packed(_refusal(error, cache.folder)))
        return None


def _place(kept: Path, path: Path) -> None:
    """Show a file of the cache under its name in the job's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(kept, path)
    except OSError:  # this file system knows no hard links
        shutil.copyfile(kept, path)


def _start(job: dict[str, Any], folder: Path) -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    home = str(folder / "home")
    environment.update({"HOME": home, "TMPDIR": home, "LC_ALL": "C.UTF-8"})
    runner = Path(job["source"][0]) / "featherweight" / "engine" / "runner.py"
    with (folder / "stderr.txt").open("wb") as words:
        return subprocess.Popen(
            [sys.executable, "-I", "-B", "-X", "faulthandler", str(runner), str(folder)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            cwd=home,
            env=environment,
            start_new_session=True,
        )


def _attend(child: subprocess.Popen[bytes], folder: Path) -> None:
    """Pass frames on until the runner has ended, then tell how, and hand over what it left."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: _kill(child))
    kills = _kernel_kills()
    known = {path.name for path in folder.iterdir()} - {"stderr.txt"}
    speaker = threading.Thread(target=_pass_on, args=(child,), daemon=True)
    threading.Thread(target=_feed, args=(child,), daemon=True).start()
    speaker.start()
    code = child.wait()
    _kill(child)  # and what it started, which may hold its pipes open
    speaker.join()
    left = [path for path in folder.iterdir() if path.name not in known and path.is_file()]
    contents = {path.name: path for path in left}
    sizes = {name: path.stat().st_size for name, path in contents.items()}
    sizes["stderr.txt"] = min(sizes["stderr.txt"], _TAIL)
    over = {
        "code": code,
        "lacked_memory": _kernel_kills() != kills,
        "free": shutil.disk_usage(folder).free,
        "files": sizes,
    }
    _write(struct.pack("<I", 0) + _packed(over))
    for name, size in sizes.items():
        with contents[name].open("rb") as file:
            file.seek(-size, os.SEEK_END)
            while part := file.read(_TAIL):
                _write(part)


def _feed(child: subprocess.Popen[bytes]) -> None:
    """What comes from the engine goes to the runner; when the engine is gone, so is the runner."""
    assert child.stdin is not None
    try:
        while part := os.read(0, _TAIL):
            _write(part, child.stdin.fileno())
    except OSError:  # the runner reads no more: its end is told elsewhere
        while os.read(0, _TAIL):
            pass
    _kill(child)


def _pass_on(child: subprocess.Popen[bytes]) -> None:
    """What the runner says goes to the engine, in chunks."""
    assert child.stdout is not None
    try:
        while part := os.read(child.stdout.fileno(), _TAIL):
            _write(struct.pack("<I", len(part)) + part)
    except OSError:  # nobody listens
        _kill(child)


def _kill(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _refusal(error: OSError, folder: Path) -> dict[str, Any]:
    """A folder that takes no files, as data."""
    return {"error": os.strerror(error.errno or 0), "errno": error.errno, "folder": str(folder)}


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)  # asks only
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _kernel_kills() -> int | None:
    """How many processes the kernel has killed for want of memory since it started."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def _packed(data: dict[str, Any]) -> bytes:
    text = json.dumps(data).encode()
    return struct.pack("<I", len(text)) + text


def _length() -> int:
    return int(struct.unpack("<I", _read(4))[0])


def _read(size: int) -> bytes:
    whole = io.BytesIO()
    for part in _parts(size):
        whole.write(part)
    return whole.getvalue()


def _parts(size: int) -> Any:
    """So many bytes of the connection, as they come."""
    while size:
        part = os.read(0, min(size, _TAIL))
        if not part:
            raise EOFError("the engine is gone")
        size -= len(part)
        yield part


def _write(data: bytes, to: int = 1) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(to, view) :]


if __name__ == "__main__":
    try:
        main()
    except (EOFError, BrokenPipeError):
        os._exit(1)  # the connection is gone, and with it who could be told
    os._exit(0)  # a thread still waits for the engine
