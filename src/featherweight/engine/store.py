"""A content-addressed store: what was computed once is read the next time, also after kill -9.

An entry is a folder, written under a temporary name and renamed when it is
complete, so a name that exists is whole. The journal has one line for each entry
that was ever computed here.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from featherweight.errors import FeatherweightError, MachineError

_DEFAULT_LIMIT = 4 * 2**30
# How libraries in Rust and C++ tell a full disk: the second one is PyTorch's writer of archives.
_NO_SPACE = ("No space left on device", "unexpected pos", "PytorchStreamWriter failed writing")


def default_folder() -> Path:
    """``$FEATHERWEIGHT_CACHE``, else ``featherweight`` in the user's cache folder."""
    if os.environ.get("FEATHERWEIGHT_CACHE"):
        return Path(os.environ["FEATHERWEIGHT_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "featherweight"


def digest(*parts: Any) -> str:
    """SHA-256 over JSON data, in hexadecimal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def sources_digest() -> str:
    """Digest of this package's own code: a changed method computes anew."""
    folder = Path(__file__).parents[1]
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def code_digest(functions: Iterable[Any]) -> str:
    """Digest of the files that define a user's functions; '' without any. Edited, they must be run again."""
    found = set()
    for function in functions:
        with suppress(TypeError, OSError):  # None, a built-in, or a class whose file is gone
            found.add(
                hashlib.sha256(Path(inspect.getfile(inspect.unwrap(function))).read_bytes()).hexdigest()
            )
    return ",".join(sorted(found))


def tells_full_disk(error: BaseException) -> bool:
    """Whether an error says that there is no room, by its number or in words."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in _NO_SPACE)


@contextmanager
def told_as_machine_error(what: str) -> Iterator[None]:
    """A full disk or an unwritable folder becomes a :class:`MachineError`."""
    try:
        yield
    except FeatherweightError:
        raise
    except Exception as error:
        full = tells_full_disk(error)
        if not full and not isinstance(error, OSError):
            raise
        said = "the disk is full" if full else (getattr(error, "strerror", None) or str(error))
        place = getattr(error, "filename", None)
        raise MachineError(
            f"{what} could not be written: {said}",
            where=None if place is None else str(place),
            fix="free some space and run the same command again: it resumes"
            if full
            else "check the folder's permissions",
        ) from error


class Store:
    """Entries by kind and key under one folder.

    Args:
        folder: Created when the first entry is written.
        limit_bytes: Entries that were not used for longest go when the sum is larger.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int = _DEFAULT_LIMIT) -> None:
        self.folder = folder or default_folder()
        self.limit_bytes = limit_bytes

    def get(self, kind: str, key: str) -> Path | None:
        """The entry's folder, or None; marks it as used."""
        path = self.folder / kind / key
        if not path.is_dir():
            return None
        with told_as_machine_error("the store"):
            os.utime(path)
        return path

    def put(self, kind: str, key: str, write: Callable[[Path], None]) -> Path:
        """Compute an entry: ``write`` fills a temporary folder, which then gets its name.

        Raises:
            MachineError: The disk is full or the folder cannot be written; nothing is left behind.
        """
        started = time.monotonic()
        final = self.folder / kind / key
        temporary = final.with_name(f".{key}.partial-{mine()}")
        with told_as_machine_error("the store"):
            sweep(final.parent, f".*.partial-{machine_mark()}-*")
            temporary.mkdir(parents=True)
            try:
                write(temporary)
                if _named(temporary, final):
                    self._log(kind, key, time.monotonic() - started)
                else:  # another process was quicker
                    shutil.rmtree(temporary)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        return final

    def get_json(self, kind: str, key: str) -> Any | None:
        """The data of an entry that :meth:`put_json` wrote, or None."""
        path = self.get(kind, key)
        return None if path is None else json.loads((path / "data.json").read_text())

    def put_json(self, kind: str, key: str, data: Any) -> None:
        """Write an entry that is one piece of JSON data."""
        self.put(kind, key, lambda folder: _write_json(folder / "data.json", data))

    def _log(self, kind: str, key: str, seconds: float) -> None:
        line = json.dumps({"kind": kind, "key": key, "seconds": round(seconds, 3)})
        with (self.folder / "journal.jsonl").open("a") as journal:
            journal.write(line + "\n")

    def trim(self) -> None:
        """Remove the entries that were not used for longest until the sum is within the limit."""
        entries = [
            path for path in self.folder.glob("*/*") if path.is_dir() and not path.name.startswith(".")
        ]
        sized = [(path.stat().st_mtime, _size(path), path) for path in entries]
        excess = sum(size for _, size, _ in sized) - self.limit_bytes
        for _, size, path in sorted(sized):
            if excess <= 0:
                return
            doomed = path.with_name(f".{path.name}.partial-{mine()}")
            path.rename(doomed)
            shutil.rmtree(doomed)
            excess -= size


def _named(temporary: Path, final: Path) -> bool:
    """Give a finished folder its name; False when another one has it already."""
    try:
        if not final.exists():
            temporary.rename(final)
            return True
    except OSError:
        if not final.is_dir():
            raise
    return False


@cache
def machine_mark() -> str:
    """A name for this machine, or container: numbers of processes have no meaning outside of it."""
    try:
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:  # no Linux
        space = 0
    return digest(platform.node(), space)[:8]


def mine() -> str:
    """Ends the name of what this process has half-written, in a folder that several machines may share."""
    return f"{machine_mark()}-{os.getpid()}"


def sweep(folder: Path, pattern: str) -> None:
    """Remove what killed processes left half-written."""
    for path in left_by_killed(folder, pattern):
        shutil.rmtree(path, ignore_errors=True)


def left_by_killed(folder: Path, pattern: str) -> list[Path]:
    """What lies in a folder from processes that run no more; names end in ``-pid``."""
    found = [(path, path.name.rpartition("-")[2]) for path in folder.glob(pattern)]
    return [path for path, pid in found if pid.isdigit() and not _runs(int(pid))]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # asks only
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))
