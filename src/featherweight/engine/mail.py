"""What workers say on the way: lines of JSON in a file of the store's folder, which all machines share.

A worker appends, this process reads. The file of a task outlives the worker, so a second start is seen as
one: that is how a worker's death is told, which Ray mends without a word.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from featherweight.engine.store import machine_mark, mine, sweep, told_as_machine_error
from featherweight.method import Progress

T = TypeVar("T")


class Mailbox:
    """A folder for the letters of one search. A context manager: leaving the block removes it.

    Args:
        folder: Where it is made.
    """

    def __init__(self, folder: Path) -> None:
        self._parent = folder
        self._folder = folder / mine()
        self._count = itertools.count()

    def __enter__(self) -> Mailbox:
        with told_as_machine_error("the letters of workers"):
            self._parent.mkdir(parents=True, exist_ok=True)
            sweep(self._parent, f"{machine_mark()}-*")
            self._folder.mkdir(exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, name: str) -> Letters:
        """Letters about one task, which remarks call by this name."""
        return Letters(self._folder / f"{next(self._count)}.jsonl", name)


class Letters:
    """What is said of one task.

    Attributes:
        path: Where its worker appends.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self._name = name
        self._read = 0
        self._on = ""

    def show(self, progress: Progress) -> None:
        """Show what came since the last time; a line that is not whole yet waits."""
        for letter in self._new():
            if "note" in letter:
                progress.note(f"{self._name}: {letter['note']}")
            elif "begins" in letter:
                if self._on:
                    again = f"it is made again by that {letter['begins']}"
                    progress.note(f"{self._name}: the worker {self._on} died; {again}")
                self._on = letter["begins"]

    def _new(self) -> Iterator[Mapping[str, Any]]:
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                content = file.read()
        except FileNotFoundError:  # no worker has begun
            return
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            yield json.loads(line)

    def close(self) -> None:
        """Nobody reads on."""
        self.path.unlink(missing_ok=True)


class Writing:
    """Progress of a worker, told by letters.

    Args:
        path: Of the letters.
        left_s: Seconds after which what is tracked is not worth going on with; None: there is no end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, place: str) -> None:
        """Say who is at work."""
        self._append({"begins": place})

    def note(self, message: str) -> None:
        """One line for the user."""
        self._append({"note": message})

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield the items; bars are for whoever sits before them."""
        yield from items

    def _append(self, letter: Mapping[str, Any]) -> None:
        if not self._path.parent.is_dir():  # the search is over
            return
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, json.dumps(letter).encode() + b"\n")
        finally:
            os.close(file)
