"""Every error that reading a bundle raises on purpose.

::

    BundleError              the file cannot be read, and says why
    ├── DamagedBundle        bytes are wrong: truncated, flipped, against the format, another digest
    ├── TooLarge             it declares more than the caller allows
    ├── NewerBundle          a version or codec that this loader does not know
    ├── MissingBase          an update whose base is not at hand, or is another one
    └── MissingPart          what was asked for is not in it: a file, an artifact, a package of its runtime
"""

from __future__ import annotations


class BundleError(Exception):
    """Base class. ``what`` is one sentence; ``where`` and ``fix`` complete it."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  at {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class DamagedBundle(BundleError):
    """Bytes are wrong: truncated, flipped, against the format, or with another digest than declared."""


class TooLarge(BundleError):
    """The bundle declares more bytes than the caller allows."""


class NewerBundle(BundleError):
    """A version or a codec that this loader does not know."""


class MissingBase(BundleError):
    """An update needs the bundle that it was made from, and that is not at hand."""


class MissingPart(BundleError):
    """What was asked for is not there: a file, an artifact, or the package of its runtime."""
