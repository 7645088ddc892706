"""``unpack``, ``load`` and ``verify``: a bundle's files, its session, and whether all is right."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import featherweight_loader as loader
from featherweight.engine.output import check_output, write_folder
from featherweight.errors import BundleError, OutputError

if TYPE_CHECKING:
    from featherweight.runtime import Session

_KINDS = ("artifact", "document")  # probes are for those who verify the bundle


def unpack(
    file: str | Path, folder: str | Path, *, base: str | Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Write the files of a bundle into a folder, as they were before they were packed.

    Args:
        file: The bundle.
        folder: Where to; new, or empty.
        base: The bundle that it was packed against.
        force: Replace a folder that ``fit``, ``lower`` or ``unpack`` wrote.

    Returns:
        What was written.

    Raises:
        BundleError: The bundle is damaged, or its base is missing.
        OutputError: The folder holds files; nothing was written.
    """
    place, bundle = Path(folder), read_bundle(file, base)
    files = [path for path, file in bundle.files.items() if file.kind in _KINDS]
    _check_folder(place, set(files), force)

    def write(fresh: Path) -> None:
        with told_by_loader(file):
            bundle.unpack(fresh, kinds=_KINDS)

    write_folder(place, write)
    return {"out": str(place), "files": files, "identity": bundle.identity}


def load(
    file: str | Path, *, runtime: str | None = None, threads: int = 1, base: str | Path | None = None
) -> Session:
    """Open the artifact of a bundle in its runtime, with :mod:`featherweight_loader` where that can.

    Args:
        file: The bundle.
        runtime: Which one, where the bundle holds several.
        threads: Cores that it may use.
        base: The bundle that it was packed against.

    Returns:
        A session: called with arrays, it returns arrays.

    Raises:
        BundleError: The bundle is damaged, lacks what is asked for, or its runtime is not installed.
    """
    bundle = read_bundle(file, base)
    with told_by_loader(file):
        try:
            return loader.load(bundle, runtime=runtime, threads=threads)
        except loader.MissingPart:
            session = _by_toolkit(bundle, runtime, threads)
            if session is None:
                raise
            return session


def verify(
    file: str | Path, *, key: str | Path | None = None, base: str | Path | None = None
) -> dict[str, Any]:
    """Whether a bundle is what was signed and what was measured, and still answers as it did.

    Checked are the signature, the digests of all that is stored and of every file, that the artifact is
    the one of ``result.json`` and ``artifact.json``, and what it answers to its probe, in a process of
    its own.

    Args:
        file: The bundle.
        key: Public Ed25519 key in PEM; without it nobody vouches for the bundle.
        base: The bundle that it was packed against.

    Returns:
        What was checked, in words; ``vouched`` tells whether the key's owner stands for it.

    Raises:
        BundleError: Something is wrong.
    """
    from featherweight.api.probing import parity  # what a session of `load` does not need
    from featherweight.bundles import probes, verifying

    bundle = read_bundle(file, base)
    vouched = verifying.check_signature(bundle, key)
    with told_by_loader(file):
        bundle.check()
    artifacts: dict[str, dict[str, Any]] = {}
    for part in verifying.parts(bundle):
        probe, says = probes.place(part.runtime), "no probe was kept"
        if probe in bundle.files:
            with told_by_loader(file):
                says = parity(part, probes.Probe.parse(bundle.data(probe)), bundle.unpack)
        artifacts[part.runtime] = {"sha256": part.sha256, "measured": bool(part.measured), "parity": says}
    return {
        "file": str(file),
        "identity": bundle.identity,
        "signature": vouched,
        "vouched": key is not None,
        "files": len(bundle.files),
        "artifacts": artifacts,
    }


@contextmanager
def told_by_loader(file: str | Path) -> Iterator[None]:
    """What the loader raises of a file becomes one of our errors."""
    try:
        yield
    except loader.BundleError as error:
        where = str(file) if error.where is None else f"{error.where} of {file}"
        fix = error.fix or "fetch the file again from who made it"
        raise BundleError(error.what, where=where, fix=fix) from error


def read_bundle(file: str | Path, base: str | Path | None) -> loader.Bundle:
    """A bundle, and its base where it has one.

    Raises:
        BundleError: A file is none, or damaged.
    """
    old = None if base is None else read_base(base)
    _check_file(file, "bundle")
    with told_by_loader(file):
        return loader.read(file, base=old)


def read_base(file: str | Path) -> loader.Bundle:
    """The bundle that an update is for.

    Raises:
        BundleError: It is none, or damaged.
    """
    _check_file(file, "base")
    with told_by_loader(file):
        return loader.read(file)


def _by_toolkit(bundle: loader.Bundle, runtime: str | None, threads: int) -> Session | None:
    """A session of a runtime that only the toolkit opens: torch, one for browsers, one of another package."""
    from featherweight.bundles.verifying import parts
    from featherweight.plugins import find_runtime

    for part in parts(bundle):
        opener = find_runtime(part.runtime)
        if runtime in (None, part.runtime) and not opener.unmeasured and opener.installed():
            place = Path(tempfile.mkdtemp(prefix="featherweight-"))
            try:
                bundle.unpack(place, kinds=_KINDS)
                part.check_harmless(place)
                session = opener.open(part.artifact(place), part.target(threads))
            except BaseException:
                shutil.rmtree(place, ignore_errors=True)
                raise
            weakref.finalize(session, shutil.rmtree, place, ignore_errors=True)
            return session
    return None


def _check_file(path: str | Path | None, what: str) -> None:
    if path is not None and not Path(path).is_file():
        why = "is a folder, not a file" if Path(path).is_dir() else "does not exist"
        raise BundleError(f"the {what} '{path}' {why}", fix="name a file that featherweight pack wrote")


def _check_folder(place: Path, names: set[str], force: bool) -> None:
    """Refuse a folder that is not empty; with ``force`` only one that holds anything but these files."""
    check_output(place, names)
    if not force and place.is_dir() and any(place.iterdir()):
        raise OutputError(f"'{place}' holds files", fix="name another folder, or add --force to replace it")
