"""The output folder: written beside its place under another name, then renamed; never half there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from featherweight.engine.store import left_by_killed, sweep, told_as_machine_error
from featherweight.errors import OutputError

MARK = "result.json"
# One of these lies in every folder that a command wrote: fit, apply, lower.
_MARKS = (MARK, "model.json", "artifact.json")


def check_output(out: Path, known: Collection[str] = ()) -> None:
    """Refuse a place that cannot be used, before any work is done.

    Only what featherweight wrote is ever replaced, also with --force: a folder of the user's own
    files never is. One that holds only files that are ``known``, by their paths in it, counts as ours.

    Raises:
        OutputError: It is no place for a folder, or holds files that are not ours.
    """
    place = out.resolve()
    if out.exists() and not out.is_dir():
        raise OutputError(f"'{out}' is a file", fix="name a folder: --out DIR")
    for held, kind in (
        (Path.cwd().is_relative_to(place), "the current folder or one that it lies in"),
        (os.path.ismount(place), "a mount point, which cannot be replaced"),
    ):
        if held:
            raise OutputError(f"'{out}' is {kind}", fix=f"name a folder in it: --out {out / 'fitted'}")
    parent = place.parent
    if not parent.is_dir():
        raise OutputError(f"there is no folder '{out.parent}'", fix=f"mkdir -p {out.parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"nothing may be written to '{out.parent}'", fix="name a folder elsewhere")
    if out.is_dir() and any(out.iterdir()) and held_run(out) is None and not _holds_only(out, known):
        raise OutputError(
            f"'{out}' holds files that featherweight did not write, so it is never replaced",
            fix="name another folder",
        )


def _holds_only(out: Path, known: Collection[str]) -> bool:
    held = (path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir())
    return bool(known) and all(name in known for name in held)


def held_run(out: Path) -> str | None:
    """Key of the run that a folder holds; '' of one that has none, None where there is no run."""
    try:
        return str(json.loads((out / MARK).read_text()).get("run", ""))
    except (OSError, ValueError, AttributeError):
        return "" if any((out / mark).exists() for mark in _MARKS) else None


def check_other_run(out: Path, force: bool, keys: Collection[str] = ()) -> None:
    """Refuse a folder that holds another run than one of these keys.

    Raises:
        OutputError: It does, and nobody said --force.
    """
    held = held_run(out)
    if held is not None and held not in keys and not force:
        raise OutputError(
            f"'{out}' holds another run", fix="name another folder, or add --force to replace it"
        )


def _recover(place: Path) -> None:
    """Put back what a process had set aside when it was killed before its own result was in place."""
    if not place.exists():
        for old in left_by_killed(place.parent, f".{place.name}.old.partial-*"):
            old.rename(place)
            return


def write_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder beside ``out`` and put it in its place, with the old one kept until then.

    Raises:
        MachineError: The disk is full or the folder cannot be written; ``out`` is as it was.
    """
    place = out.resolve()
    fresh = place.with_name(f".{place.name}.partial-{os.getpid()}")
    old = place.with_name(f".{place.name}.old.partial-{os.getpid()}")
    with told_as_machine_error(f"'{out}'"):
        _recover(place)
        sweep(place.parent, f".{place.name}.*partial-*")
        shutil.rmtree(fresh, ignore_errors=True)  # of a killed process that had this one's number
        fresh.mkdir()
        try:
            write(fresh)
            if place.exists():
                place.rename(old)
            fresh.rename(place)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            if old.exists() and not place.exists():
                old.rename(place)
            raise
        shutil.rmtree(old, ignore_errors=True)
