"""Holds a bundle against its signature and against itself: is it what was signed, and what was measured?

Everything here works on bytes that the loader has read and hashed. What the artifacts answer is asked
elsewhere, in a process of its own (``probes.py`` says what).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from featherweight.bundles.signing import Envelope, keyid, public_key
from featherweight.bundles.statement import check_statement
from featherweight.errors import BundleError, LoadError, RecipeError
from featherweight.outcome import Result
from featherweight.runtime import Artifact, Target, digest_of
from featherweight.yaml_lines import read_yaml
from featherweight_loader import Bundle

ABOUT, RESULT, RECIPE = "artifact.json", "result.json", "recipe.yaml"
_AGAIN = "run featherweight fit or lower again, and pack what it wrote"


@dataclass(frozen=True)
class Part:
    """One artifact of a bundle, with what is told of it.

    Attributes:
        runtime: Who loads it.
        folder: Of the bundle that it lies in; '' where it is the only one.
        about: Its ``artifact.json``.
        sha256: Digest of its files, as they are in the bundle.
        measured: Digest that ``result.json`` names; '' where nothing was measured.
    """

    runtime: str
    folder: str
    about: Mapping[str, Any]
    sha256: str
    measured: str = ""

    def path(self, name: str) -> str:
        """Of one of its files in the bundle."""
        return f"{self.folder}/{name}" if self.folder else name

    def artifact(self, folder: Path) -> Artifact:
        """It, in a folder that the bundle was unpacked into."""
        return Artifact.from_json(self.about, folder / self.folder)

    def target(self, threads: int = 1) -> Target:
        """How it is opened here: without the options that it was measured with, which may name files."""
        return Target(self.runtime, isa=str(self.about["target"].get("isa", "")), threads=threads)

    def check_harmless(self, folder: Path) -> None:
        """Refuse files that could run code when they are opened; only torch's can.

        Raises:
            BundleError: One could.
        """
        if self.runtime != "torch":
            return
        from featherweight.exchange.pt2 import check_archive

        try:
            for name in self.about["files"]:
                check_archive(folder / self.folder / name)
        except LoadError as error:
            raise BundleError(
                f"the artifact is not opened: {error.what}", fix="do not use this bundle, or unpack it"
            ) from error


def check_signature(bundle: Bundle, key: str | Path | None) -> str:
    """Whether who owns the key signed this bundle; a sentence that says who vouches for it.

    Raises:
        BundleError: The signature is damaged, wrong or missing, or that of another key or bundle.
    """
    if not bundle.signature:
        if key is not None:
            raise BundleError(
                "the bundle is not signed, and a key was named",
                fix="leave --key out to check hashes alone, or ask for a signed bundle",
            )
        return "not signed: nobody vouches for it"
    envelope = Envelope.parse(bundle.signature)
    if key is None:
        check_statement(envelope.payload, bundle.identity, digests(bundle))
        return (
            f"signed with key {envelope.keyid[:16]}..., which was not checked: nobody vouches for it without "
            "--key key.pub"
        )
    public = public_key(key)
    envelope.check(public)
    name = check_statement(envelope.payload, bundle.identity, digests(bundle))
    return f"signed as '{name}' with key {keyid(public)}"


def parts(bundle: Bundle) -> list[Part]:
    """The artifacts of a bundle, each of which is what its description and its measurements say.

    Raises:
        BundleError: One is not, or a file belongs to none.
    """
    folders = sorted(
        path.removesuffix(ABOUT).rstrip("/")
        for path in bundle.files
        if path == ABOUT or (path.count("/") == 1 and path.endswith(f"/{ABOUT}"))
    )
    if not folders:
        raise BundleError(f"the bundle holds no {ABOUT}, so nobody knows what it is", fix=_AGAIN)
    found = [_part(bundle, folder) for folder in folders]
    known = {one.path(name) for one in found for name in one.about["files"]}
    for path, file in bundle.files.items():
        if file.kind == "artifact" and path not in known:
            raise BundleError(f"'{path}' in the bundle belongs to no artifact", fix=_AGAIN)
    return found


def _part(bundle: Bundle, folder: str) -> Part:
    def path(name: str) -> str:
        return f"{folder}/{name}" if folder else name

    try:
        about = json.loads(bundle.data(path(ABOUT)).decode("utf-8"))
        names = [str(name) for name in about["files"]]
        runtime, told = str(about["runtime"]), str(about.get("sha256", ""))
        Artifact.from_json(about, Path())
        Target(**about["target"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"'{path(ABOUT)}' in the bundle is damaged: {error}", fix=_AGAIN) from error
    lost = [name for name in names if path(name) not in bundle.files]
    if lost or not names:
        raise BundleError(f"the bundle lacks '{path(lost[0] if lost else 'model')}'", fix=_AGAIN)
    sha256 = digest_of({name: bytes.fromhex(bundle.files[path(name)].sha256) for name in names})
    if told and told != sha256:
        raise BundleError(f"'{path(names[0])}' is not the artifact that {ABOUT} tells of", fix=_AGAIN)
    measured = _measured(bundle, path(RESULT), path(RECIPE), names[0], sha256)
    return Part(runtime, folder, about, sha256, measured)


def _measured(bundle: Bundle, result: str, recipe: str, name: str, sha256: str) -> str:
    """The digest that the measurements name, which is that of the artifact; '' without measurements."""
    if result not in bundle.files:
        return ""
    try:
        told = Result.model_validate_json(bundle.data(result))
        steps = read_yaml(bundle.data(recipe).decode("utf-8"), recipe)[0] if recipe in bundle.files else None
    except (ValidationError, RecipeError, UnicodeDecodeError) as error:
        what = error.what if isinstance(error, RecipeError) else str(error).split("\n")[0]
        raise BundleError(f"'{result}' or '{recipe}' in the bundle is damaged: {what}", fix=_AGAIN) from error
    if told.chosen.sha256 != sha256:
        raise BundleError(f"'{name}' is not the artifact that {result} tells the figures of", fix=_AGAIN)
    if steps is not None and steps != told.recipe:
        raise BundleError(f"'{recipe}' is not the recipe that {result} tells of", fix=_AGAIN)
    return sha256


def digests(bundle: Bundle) -> dict[str, str]:
    """Path of every file -> its SHA-256 in hexadecimal."""
    return {path: file.sha256 for path, file in bundle.files.items()}
