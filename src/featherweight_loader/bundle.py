"""An opened bundle: what it holds, its files one by one, and a folder of them."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from featherweight_loader.errors import BundleError, DamagedBundle, MissingBase, MissingPart, TooLarge
from featherweight_loader.head import PREAMBLE, File, Head, Preamble, Section, parse

_SIGNATURE = 1 << 20  # bytes; one of Ed25519 takes some 700


def read(
    source: str | Path | bytes,
    *,
    base: str | Path | bytes | Bundle | None = None,
    max_bytes: int = 4 << 30,
) -> Bundle:
    """Open a bundle: its preamble, head and sizes are checked, nothing else is decoded yet.

    Args:
        source: A file, or the bytes of one.
        base: The bundle that an update was made from; only its files need it.
        max_bytes: What all files may take together, and all sections decoded.

    Raises:
        DamagedBundle: It is damaged, or no bundle.
        TooLarge: It declares more than ``max_bytes``.
        NewerBundle: It is of a later version.
        MissingBase: ``base`` is not the bundle that it was made from.
        BundleError: The file cannot be read.
    """
    place = source if isinstance(source, bytes) else Path(source)
    try:
        return _open(place, base, max_bytes)
    except MemoryError as error:
        raise TooLarge("there is not enough memory to read the bundle") from error


def _open(place: Path | bytes, base: str | Path | bytes | Bundle | None, max_bytes: int) -> Bundle:
    size = len(place) if isinstance(place, bytes) else _size(place)
    first = _at(place, 0, min(PREAMBLE, size))
    preamble = Preamble.of(first, size)
    packed = _at(place, PREAMBLE, preamble.packed)
    head = parse(preamble.head(packed), preamble.body, max_bytes)
    end = PREAMBLE + preamble.packed + preamble.body
    if size - end > _SIGNATURE:
        raise DamagedBundle(f"{size - end} bytes stand behind the body, a signature is smaller")
    identity = hashlib.sha256(first + packed).hexdigest()  # of what was parsed: the file may change
    bundle = Bundle(place, size, identity, PREAMBLE + preamble.packed, head, _at(place, end, size - end))
    if base is not None and bundle.base:
        bundle.take_base(base if isinstance(base, Bundle) else read(base, max_bytes=max_bytes))
    return bundle


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise BundleError(f"cannot read '{path}': {error.strerror or error}") from error


def _at(place: Path | bytes, offset: int, count: int) -> bytes:
    """Bytes of a bundle, which may be a file."""
    if isinstance(place, bytes):
        return place[offset : offset + count]
    try:
        with place.open("rb") as file:
            file.seek(offset)
            found = file.read(count)
    except OSError as error:
        raise BundleError(f"cannot read '{place}': {error.strerror or error}") from error
    if len(found) != count:
        raise DamagedBundle(f"the file ends {count - len(found)} bytes too early", where=str(place))
    return found


class Bundle:
    """What :func:`read` found.

    Attributes:
        bytes: Of the whole file.
        identity: SHA-256 of everything but body and signature, in hex; it stands for the body too.
        base: Identity of the bundle that an update was made from, else ''.
        signature: As it lies in the file, empty where there is none; not verified here.
        sections: In the order of the body.
        files: By path, in the order of the head.
    """

    def __init__(
        self, place: Path | bytes, size: int, identity: str, body: int, head: Head, signature: bytes
    ) -> None:
        self.bytes = size
        self.identity = identity
        self.base = head.base
        self.signature = signature
        self.sections: Sequence[Section] = tuple(head.sections)
        self.files: Mapping[str, File] = MappingProxyType({file.path: file for file in head.files})
        self._place = place
        self._body = body
        self._head = head
        self._base: Bundle | None = None
        self._index = {file.path: index for index, file in enumerate(head.files)}

    @property
    def signed(self) -> bool:
        """Whether it has a signature; who verifies it must have the key."""
        return bool(self.signature)

    def take_base(self, base: Bundle) -> None:
        """Hand over the bundle that this one was made from.

        Raises:
            MissingBase: It is another one.
        """
        if base.identity != self.base:
            raise MissingBase(
                f"the update was made from the bundle {self.base[:16]}, this is {base.identity[:16]}",
                fix="give the bundle that it was made from",
            )
        self._base = base

    def data(self, path: str) -> bytes:
        """The bytes of a file, once their digest is right.

        Raises:
            MissingPart: There is no such file.
            DamagedBundle: It is damaged.
            MissingBase: It needs a base that was not given.
        """
        if path not in self._index:
            raise MissingPart(f"the bundle holds no '{path}'", fix="see what there is: Bundle.files")
        return bytes(next(self._decoded([self._index[path]])))

    def unpack(self, folder: str | Path, *, kinds: Collection[str] | None = None) -> list[Path]:
        """Write the files into a new folder, which is there whole or not at all.

        Args:
            folder: That is not there yet, or empty.
            kinds: Of the files that are wanted, 'artifact', 'document', 'probe'; all unless told.

        Returns:
            What was written.

        Raises:
            BundleError: As :meth:`data`, or the folder is not empty or cannot be written.
        """
        wanted = [i for i, file in enumerate(self._head.files) if kinds is None or file.kind in kinds]
        try:
            place = Path(os.path.abspath(folder))  # noqa: PTH100  # a link stays one
            if place.is_symlink() or (place.exists() and not (place.is_dir() and not any(place.iterdir()))):
                raise BundleError(f"'{folder}' is there already", fix="name a new folder, or an empty one")
            place.parent.mkdir(parents=True, exist_ok=True)
            scratch = place.with_name(f".{secrets.token_hex(8)}.unpacking")
            scratch.mkdir()
            try:
                self.write([self._head.files[index].path for index in wanted], scratch)
                if place.exists():
                    place.rmdir()
                scratch.rename(place)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)
                raise
        except (OSError, ValueError) as error:
            raise BundleError(f"cannot write '{folder}': {error}") from error
        return [place / self._head.files[index].path for index in wanted]

    def write(self, paths: Sequence[str], folder: Path) -> None:
        """Write some files below a folder that is there; :meth:`unpack` writes all of them or nothing."""
        wanted = [self._index[path] for path in paths]
        for path, data in zip(paths, self._decoded(wanted), strict=True):
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("xb") as file:
                file.write(data)

    def check(self) -> None:
        """Decode everything and compare every digest.

        Raises:
            DamagedBundle: One differs.
            MissingBase: An update's base was not given.
        """
        for index in range(len(self.sections)):
            self._packed(index)
        for _ in self._decoded(list(range(len(self._head.files)))):
            pass

    def artifact_files(self) -> Iterator[bytearray]:
        """The bytes of each artifact file, in the order of the head: what an update may be packed behind."""
        return self._decoded([i for i, file in enumerate(self._head.files) if file.kind == "artifact"])

    def _decoded(self, wanted: list[int]) -> Iterator[bytearray]:
        """Files in this order; a section is decoded when it is first needed and kept until it was last."""
        from featherweight_loader.files import Maker

        maker = Maker(self._head, self._packed, self._of_base, wanted)
        for index in wanted:
            try:
                yield maker.file(index)
            except MemoryError as error:
                raise TooLarge(
                    "there is not enough memory to decode a file", where=self._head.files[index].path
                ) from error

    def _packed(self, index: int) -> bytes:
        """A section as it lies in the file, once its digest is right."""
        section = self.sections[index]
        found = _at(self._place, self._body + self._head.offsets[index], section.packed)
        if hashlib.sha256(found).hexdigest() != section.sha256:
            raise DamagedBundle(
                "a section has another digest than declared",
                where=f"section {index}",
                fix="fetch the file again",
            )
        return found

    def _of_base(self) -> Bundle:
        if self._base is None:
            raise MissingBase(
                f"the bundle is an update of the bundle {self.base[:16]}",
                fix="give the old bundle as base",
            )
        return self._base
