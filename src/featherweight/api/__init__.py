"""The whole story, one function for each command of the command line.

Read ``fitting.fit`` first: load, ask for recipes, weigh what they make, hand the best one back.
Functions are imported when they are used: ``report`` and ``runtimes`` do without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featherweight.api.fitting import demo as demo
    from featherweight.api.fitting import fit as fit
    from featherweight.api.looking import compare as compare
    from featherweight.api.looking import inspect as inspect
    from featherweight.api.looking import measure as measure
    from featherweight.api.looking import robustness as robustness
    from featherweight.api.making import apply as apply
    from featherweight.api.making import lower as lower
    from featherweight.api.merging import merge as merge
    from featherweight.api.packing import pack as pack
    from featherweight.api.reporting import report as report
    from featherweight.api.unpacking import load as load
    from featherweight.api.unpacking import unpack as unpack
    from featherweight.api.unpacking import verify as verify
    from featherweight.engine.catalog import doctor as doctor
    from featherweight.engine.catalog import methods as methods
    from featherweight.engine.catalog import runtimes as runtimes

_HOMES = {
    **dict.fromkeys(("demo", "fit"), "api.fitting"),
    **dict.fromkeys(("compare", "inspect", "measure", "robustness"), "api.looking"),
    **dict.fromkeys(("apply", "lower"), "api.making"),
    "merge": "api.merging",
    "pack": "api.packing",
    "report": "api.reporting",
    **dict.fromkeys(("load", "unpack", "verify"), "api.unpacking"),
    **dict.fromkeys(("doctor", "methods", "runtimes"), "engine.catalog"),
}

__all__ = sorted(_HOMES)  # noqa: PLE0605 - one list, from the table above


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featherweight.api' has no attribute '{name}'")
    return getattr(importlib.import_module(f"featherweight.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
