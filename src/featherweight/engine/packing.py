"""What a download of an artifact takes."""

from __future__ import annotations

import zlib
from pathlib import Path

from featherweight.runtime import Artifact

_LEVEL = 6
_CHUNK = 1 << 20


def packed(artifact: Artifact) -> int:
    """Bytes of an artifact's files, each deflated (RFC 1951), as gzip over HTTP and phones' archives are."""
    return sum(_deflated(artifact.folder / name) for name in artifact.files)


def _deflated(path: Path) -> int:
    pressed, size = zlib.compressobj(_LEVEL), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(pressed.compress(chunk))
    return size + len(pressed.flush())
