"""Reads ``.fw`` bundles with numpy, constriction and zstandard alone, and opens them in their runtime.

::

    bundle = featherweight_loader.read("model.fw")
    bundle.unpack("model")
    session = featherweight_loader.load("model.fw")
    (scores,) = session(image)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from featherweight_loader.bundle import Bundle, read
from featherweight_loader.errors import (
    BundleError,
    DamagedBundle,
    MissingBase,
    MissingPart,
    NewerBundle,
    TooLarge,
)
from featherweight_loader.head import File, Section
from featherweight_loader.sessions import Session, open_session

if TYPE_CHECKING:
    from pathlib import Path

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "BundleError",
    "DamagedBundle",
    "File",
    "MissingBase",
    "MissingPart",
    "NewerBundle",
    "Section",
    "Session",
    "TooLarge",
    "load",
    "read",
]


def load(
    source: str | Path | bytes | Bundle,
    *,
    runtime: str | None = None,
    threads: int = 1,
    base: str | Path | bytes | Bundle | None = None,
    max_bytes: int = 4 << 30,
) -> Session:
    """Open the artifact in a bundle in its runtime.

    Args:
        source: A file, the bytes of one, or what :func:`read` gave.
        runtime: Whose artifact, where the bundle holds several; else the first whose package is installed.
        threads: Of the runtime.
        base: The bundle that an update was made from.
        max_bytes: As in :func:`read`.

    Returns:
        A session: ``session(*arrays, entry="forward")`` gives a tuple of arrays of the original's types.

    Raises:
        BundleError: As :func:`read`; :class:`MissingPart` where there is no such artifact or no package.
    """
    bundle = source if isinstance(source, Bundle) else read(source, base=base, max_bytes=max_bytes)
    return open_session(bundle, runtime, threads)
