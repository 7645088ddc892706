"""Every error that featherweight raises on purpose.

Each one says what is wrong, where, and what to do about it; the command line
prints it without a traceback and leaves with its ``exit_code``.

::

    FeatherweightError
    ├── UserError            exit 2: the input can be corrected
    │   ├── LoadError        a model or its weights cannot be read, or differ after import
    │   ├── DataError        examples, labels or a metric do not fit
    │   ├── RecipeError      a recipe is not valid, or a step does not fit the model
    │   ├── BudgetError      a limit has no meaning (unit, sign)
    │   ├── PluginError      no method, runtime or metric of that name
    │   ├── TargetError      a runtime cannot store or run what is asked
    │   ├── MissingRuntime   a runtime's package is not installed
    │   ├── BundleError      a bundle or a key is damaged, lacks a part, or is not what it says
    │   └── OutputError      the output folder cannot be used
    ├── MachineError         exit 1: the disk is full, a file cannot be written
    └── RunnerError          exit 1: a measuring process crashed, hung or answered nonsense
        └── DeviceError      another machine cannot be reached, or lacks what a runner needs
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class FeatherweightError(Exception):
    """Base class. ``what`` is one sentence; ``where`` and ``fix`` complete it.

    Args:
        what: What is wrong, naming the thing as the user wrote it.
        where: The file, line, layer or step at fault.
        fix: What the user can do.
    """

    exit_code: ClassVar[int] = 1

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


class UserError(FeatherweightError):
    """The input is at fault and can be corrected."""

    exit_code = 2


class LoadError(UserError):
    """A model or its weights cannot be read, or the import differs from its source."""


class DataError(UserError):
    """Examples, labels or a metric do not fit the model."""


class RecipeError(UserError):
    """A recipe is not valid, or one of its steps does not fit the model."""


class BudgetError(UserError):
    """A limit has no meaning: unknown unit, negative, not a number."""


class PluginError(UserError):
    """No method, runtime or metric has that name."""


class TargetError(UserError):
    """A runtime cannot store or run what is asked of it."""


class MissingRuntime(UserError):
    """A runtime's package is not installed; the fix names the pip line."""


class BundleError(UserError):
    """A bundle or a key is damaged, lacks a part, or is not what it says."""


class OutputError(UserError):
    """The output folder cannot be used as it is."""


class MachineError(FeatherweightError):
    """The machine failed: a full disk, a file that cannot be written."""


class RunnerError(FeatherweightError):
    """A measuring process crashed, hung, or answered something that is no result."""


class DeviceError(RunnerError):
    """The device of a target cannot be reached, or lacks what a runner needs there."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that helps after an unknown name: the nearest one, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}" if names else "none is known"
