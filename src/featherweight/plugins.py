"""Finds methods and runtimes by name: files of this package and entry points, imported when asked for.

A runtime's name has hyphens where its file's name has underscores, as its package's name does.
A third-party package adds one by an entry point in the group ``featherweight.methods``
or ``featherweight.runtimes``; the entry point's name is the name in recipes.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from featherweight.errors import PluginError, nearest

if TYPE_CHECKING:
    from featherweight.method import Method
    from featherweight.runtime import Runtime


def _files(folder: str) -> dict[str, str]:
    package = importlib.import_module(f"featherweight.{folder}")
    return {
        info.name.replace("_", "-") if folder == "runtimes" else info.name: (
            f"featherweight.{folder}.{info.name}"
        )
        for info in pkgutil.iter_modules(package.__path__)
        if not info.name.startswith("_")
    }


def _points(folder: str) -> dict[str, EntryPoint]:
    return _points_on(folder, tuple(sys.path))


@cache
def _points_on(folder: str, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Entry points of what is installed; looking reads a file of every package."""
    return {point.name: point for point in entry_points(group=f"featherweight.{folder}")}


def method_names() -> list[str]:
    """Names of all methods that can be found, without importing them."""
    return sorted({*_files("methods"), *_points("methods")})


def runtime_names() -> list[str]:
    """Names of all runtimes that can be found, without importing them."""
    return sorted({*_files("runtimes"), *_points("runtimes")})


def _find(folder: str, name: str) -> type:
    """The class that a file calls ``PLUGIN``, or that an entry point names."""
    files, points = _files(folder), _points(folder)
    if name in points and name not in files:
        try:
            return points[name].load()  # type: ignore[no-any-return]
        except (ImportError, AttributeError) as error:
            raise PluginError(
                f"the {folder.removesuffix('s')} '{name}' cannot be imported: {error}",
                where=f"entry point {points[name].value}",
                fix="install the package that brings it again, or remove it",
            ) from error
    if name not in files:
        raise PluginError(
            f"no {folder.removesuffix('s')} is called '{name}'", fix=nearest(name, {*files, *points})
        )
    module = importlib.import_module(files[name])
    return module.PLUGIN  # type: ignore[no-any-return]


def find_method(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        PluginError: There is none; names the nearest one.
    """
    return _find("methods", name)


def find_runtime(name: str) -> Runtime:
    """The runtime of that name, whether or not its SDK is installed.

    Raises:
        PluginError: There is none; names the nearest one.
    """
    return _find("runtimes", name).called(name)  # type: ignore[attr-defined, no-any-return]
