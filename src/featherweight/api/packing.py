"""``pack``: what ``fit`` or ``lower`` wrote becomes one small file, a bundle (docs/fw-format.md)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import featherweight_loader as loader
from featherweight.api.probing import probe_of
from featherweight.api.unpacking import read_base, read_bundle, told_by_loader
from featherweight.bundles import probes
from featherweight.bundles.signing import Envelope, private_key
from featherweight.bundles.statement import statement
from featherweight.bundles.verifying import digests, parts
from featherweight.bundles.write import Member, Packed, write_bundle
from featherweight.engine.delivered import ABOUT, of_folder
from featherweight.engine.output import MARK
from featherweight.engine.store import sweep, told_as_machine_error
from featherweight.errors import BundleError, LoadError, OutputError
from featherweight.runtime import Artifact
from featherweight_loader.head import MAGIC

if TYPE_CHECKING:
    from featherweight.method import Progress

LICENSE = "LICENSE"
_DOCUMENTS = ("recipe.yaml", MARK, "model_card.md", ABOUT)
_PROGRAMS = frozenset({".py", ".cpp", ".java", ".kt", ".swift", ".mjs", ".html"})


def pack(
    folders: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    sign: str | Path | None = None,
    license: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write what ``fit`` or ``lower`` wrote into one small file.

    It is written beside its place, read back, compared byte for byte with what lies in the folders, and
    renamed. A probe is kept of each artifact: what its runtime answers to made-up inputs.

    Args:
        folders: What ``fit`` or ``lower`` wrote. Several: one for each runtime; in the bundle their files
            lie under the runtimes' names.
        out: The bundle.
        base: A bundle that whoever gets this one has already; only what is new is stored.
        sign: Private Ed25519 key in PEM.
        license: File that becomes the bundle's LICENSE; by default the LICENSE of the first folder that
            has one.
        force: Replace a bundle that is there.
        progress: Where long work says how far it is.

    Returns:
        What was written: identity, bytes, and for each file its bytes in the bundle (``packed``), those of
        them that the range coder wrote (``coded``), and what the ``entropy`` of what it coded takes.

    Raises:
        LoadError: A folder is none that ``fit`` or ``lower`` wrote.
        OutputError: There is something at ``out``.
        BundleError: The base or the key is none, or an artifact is not what was measured.
        MachineError: The file cannot be written; what was there is as it was.
    """
    place, key = Path(out), None if sign is None else private_key(sign)
    _check_place(place, force)
    if base is not None:
        read_base(base)
    given = [folders] if isinstance(folders, str | Path) else list(folders)
    members, notes = _members([Path(folder) for folder in given], license)
    if progress is not None:
        for note in notes:
            progress.note(note)
    unfinished = place.with_name(f".{place.name}.partial-{os.getpid()}")
    fresh, alone = unfinished / "whole", unfinished / "alone"
    saves = {}
    try:
        with told_as_machine_error(f"'{place}'"), told_by_loader(place):
            sweep(place.parent, f".{place.name}.partial-*")
            unfinished.mkdir()
            packed = write_bundle(
                fresh, members, base=None if base is None else Path(base), progress=progress
            )
            bundle = read_bundle(fresh, base)
            _check_written(bundle, members)
            parts(bundle)
            if base is not None:
                saves = {
                    "base": str(base),
                    "alone_bytes": write_bundle(alone, members, progress=progress).bytes,
                }
            keyid = None if key is None else _sign(fresh, bundle, key, place.name)
            size = fresh.stat().st_size
            fresh.replace(place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return {**_summary(place, packed, size, keyid), **saves}


def _sign(file: Path, bundle: loader.Bundle, key: Ed25519PrivateKey, name: str) -> str:
    """Add a signature behind a bundle; the key's number."""
    envelope = Envelope.signed(statement(name, bundle.identity, digests(bundle)), key)
    with file.open("ab") as behind:
        behind.write(envelope.to_bytes())
    return envelope.keyid


def _check_place(place: Path, force: bool) -> None:
    """Refuse a place that holds something else, before any work is done."""
    if place.is_dir():
        raise OutputError(
            f"'{place}' is a folder, and a bundle is a file", fix="name the bundle last: pack DIR model.fw"
        )
    if not place.resolve().parent.is_dir():
        raise OutputError(f"there is no folder '{place.parent}'", fix=f"mkdir -p {place.parent}")
    if not os.access(place.resolve().parent, os.W_OK | os.X_OK):
        raise OutputError(f"nothing may be written to '{place.parent}'", fix="name a place elsewhere")
    if not place.exists():
        return
    with place.open("rb") as file:
        ours = file.read(len(MAGIC)) == MAGIC
    if not ours:
        raise OutputError(f"'{place}' is no bundle, so it is never replaced", fix="name another file")
    if not force:
        raise OutputError(f"'{place}' is there already", fix="name another file, or add --force")


def _members(folders: Sequence[Path], license: str | Path | None) -> tuple[list[Member], list[str]]:
    """The files of a bundle, and what there is to say of them."""
    if not folders:
        raise LoadError("no folder was named", fix="name what featherweight fit or lower wrote: pack DIR OUT")
    found = [of_folder(folder) for folder in folders]
    names = [one.artifact.runtime for one in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise LoadError(
            f"two folders hold an artifact for {twice[0]}", fix="pack one for each runtime, or two bundles"
        )
    members: list[Member] = []
    notes: list[str] = []
    for folder, one in zip(folders, found, strict=True):
        runtime = one.artifact.runtime
        below = f"{runtime}/" if len(found) > 1 else ""
        members += [Member(f"{below}{n}", folder / n, "artifact", runtime) for n in one.artifact.files]
        members += [Member(f"{below}{n}", folder / n, "document") for n in _documents(folder, one.artifact)]
        probe = probe_of(one)
        if isinstance(probe, str):
            notes.append(f"no probe of {runtime} is kept: {probe}")
        else:
            members.append(Member(probes.place(runtime), probe.to_bytes(), "probe", runtime))
    terms = _license(folders, license)
    if terms is not None:
        members.append(Member(LICENSE, terms, "document"))
    return members, notes


def _documents(folder: Path, artifact: Artifact) -> list[str]:
    """What is told of an artifact, and programs that load it; a report is made again from result.json."""
    programs = [
        path.name for path in folder.iterdir() if path.stem.lower() == "load" and path.suffix in _PROGRAMS
    ]
    names = [*(name for name in _DOCUMENTS if (folder / name).is_file()), *sorted(programs)]
    return [name for name in names if name not in artifact.files]


def _license(folders: Sequence[Path], named: str | Path | None) -> Path | None:
    if named is not None:
        if not Path(named).is_file():
            raise LoadError(f"there is no licence '{named}'", fix="--license FILE")
        return Path(named)
    return next((folder / LICENSE for folder in folders if (folder / LICENSE).is_file()), None)


def _check_written(bundle: loader.Bundle, members: Sequence[Member]) -> None:
    """What can be read again is what was given, byte for byte.

    Raises:
        BundleError: It is not.
    """
    if set(bundle.files) != {member.path for member in members}:
        raise BundleError("the bundle lacks files after it was written", fix="report it; nothing was kept")
    for member in members:
        wanted = member.data if isinstance(member.data, bytes) else member.data.read_bytes()
        if bundle.data(member.path) != wanted:
            raise BundleError(
                f"'{member.path}' is another file when the bundle is read again",
                fix="if nobody wrote to it just now, report it; nothing was kept",
            )


def _summary(place: Path, packed: Packed, size: int, keyid: str | None) -> dict[str, Any]:
    return {
        "out": str(place),
        "identity": packed.identity,
        "bytes": size,
        "unpacked_bytes": sum(file.bytes for file in packed.files),
        "key": keyid,
        "head_bytes": packed.head,
        "documents_bytes": packed.documents,
        "files": [
            {"path": f.path, "bytes": f.bytes, "packed": f.coded, "coded": f.streams, "entropy": f.entropy}
            for f in packed.files
        ],
    }
