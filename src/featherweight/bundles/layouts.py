"""Where arrays lie in an artifact's files, as far as their formats tell."""

from __future__ import annotations

from featherweight.bundles.spans import Span


def named(data: bytes, path: str, runtime: str) -> list[Span]:
    """Arrays that the format of a file names; empty where the format is unknown or says nothing.

    Args:
        data: The file.
        path: Its name, whose ending tells the format.
        runtime: Whose artifact it is.
    """
    return []
