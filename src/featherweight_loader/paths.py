"""Which paths a bundle may hold: those that every system writes inside the folder that it is told."""

from __future__ import annotations

import re
from collections.abc import Iterable

from featherweight_loader.errors import DamagedBundle

_LONGEST = 255
_FORBIDDEN = re.compile('[\\x00-\\x1f\\x7f-\\x9f\\\\:*?"<>|]')
_DEVICE = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\.|$)", re.IGNORECASE | re.ASCII
)


def check_path(path: str) -> None:
    """Refuse a path that is not relative, or that some system reads otherwise.

    Raises:
        DamagedBundle: It names another place, or holds what a name cannot hold everywhere.
    """
    why = _refused(path)
    if why:
        raise DamagedBundle(f"a path in the bundle {why}", where=repr(path))


def _refused(path: str) -> str:
    if len(path.encode("utf-8")) > _LONGEST:
        return f"has more than {_LONGEST} bytes"
    for name in path.split("/"):
        if name in ("", ".", ".."):
            return "leaves its folder or names none"
        if name[-1] in ". ":
            return "ends a name in a dot or blank"
        if _FORBIDDEN.search(name):
            return "holds a character that names cannot hold"
        if _DEVICE.match(name):
            return "names a device"
    return ""


def check_apart(paths: Iterable[str]) -> None:
    """Refuse paths that would overwrite one another.

    Raises:
        DamagedBundle: Two are equal when the case of A to Z is ignored, or one is the folder of another.
    """
    files: set[bytes] = set()
    folders: set[bytes] = set()
    for path in paths:
        key = path.encode("utf-8").lower()  # of bytes: A to Z alone
        above = [key[: match.start()] for match in re.finditer(b"/", key)]
        if key in files or key in folders or not files.isdisjoint(above):
            raise DamagedBundle("two paths in the bundle collide", where=repr(path))
        files.add(key)
        folders.update(above)
