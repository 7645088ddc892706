"""Runs code that the user names: finds ``path.py:name`` and turns what it raises into errors with their line.

A file is run as a script would be: its own folder comes first on the import path, so that it
may import the files beside it. It is compiled afresh each time, so an edited file counts at once.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import linecache
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from featherweight.errors import FeatherweightError, UserError, nearest

T = TypeVar("T")

_PACKAGE = Path(__file__).resolve().parent


def load_callable(spec: str, error: type[UserError]) -> Callable[..., Any]:
    """The callable that ``path.py:name`` or ``package.module:name`` names.

    Args:
        spec: A file or module, a colon, and a name in it; dots reach into a class.
        error: What to raise when there is no such thing.

    Raises:
        UserError: ``error``, when the file is missing, does not parse or raises, or has no such
            callable. ``where`` is the user's own file, line and source line.
    """
    source, _, name = spec.rpartition(":")
    is_file = (source or spec).endswith(".py")
    if not source or not name:
        path = source or name
        example = f"{path}:NAME" if path.endswith(".py") else "path.py:NAME"
        raise error(f"'{spec}' names no callable", fix=f"write {example}{_offers(Path(path))}")
    module = _run_file(Path(source), error) if is_file else _import(source, error)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
            raise error(f"'{source}' has no '{part}'", where=spec, fix=nearest(part, names))
        found = getattr(found, part)
    if not callable(found):
        raise error(
            f"'{spec}' is of type {type(found).__name__} and cannot be called",
            fix="name a function or a class",
        )
    return found  # type: ignore[no-any-return]


def call_user(function: Callable[..., T], *args: Any, error: type[UserError]) -> T:
    """Call a user's function with positional arguments.

    Raises:
        UserError: ``error`` with the user's own line, when the function raises anything.
            An error of featherweight's own (a DataError from ``Data.of``) passes, with the line added.
    """
    with user_code(function, error):
        return function(*args)


@contextmanager
def user_code(function: Callable[..., Any], error: type[UserError]) -> Iterator[None]:
    """Whatever the block raises came from this function's file: raise it as ``error`` that shows the line."""
    with _blamed(f"'{_name(function)}'", function, error):
        yield


def defined_at(function: Callable[..., Any]) -> str | None:
    """Where a function begins: 'file.py:12: def data():'; None when it has no source."""
    try:
        lines, start = inspect.getsourcelines(function)
        path = inspect.getsourcefile(function)
    except (OSError, TypeError):
        return None
    return f"{path}:{start}: {lines[0].strip()}"


def _run_file(path: Path, error: type[UserError]) -> ModuleType:
    """Run a Python file as a module of its own."""
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        raise error(f"there is no file '{path}'", fix="check the path; write path.py:NAME") from None
    except OSError as exc:
        raise error(f"'{path}' cannot be read: {exc.strerror}", fix="write path.py:NAME") from exc
    full = path.resolve()
    name = f"featherweight_user_{hashlib.sha256(str(full).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, full)
    if spec is None:
        raise error(f"'{path}' cannot be imported", fix="write path.py:NAME")
    linecache.checkcache(str(full))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up there
    with _blamed(f"'{path}'", full.parent, error), _first_on_path(full.parent):
        exec(compile(source, str(full), "exec", dont_inherit=True), vars(module))
    return module


def _import(name: str, error: type[UserError]) -> ModuleType:
    """Import a module by its dotted name; the current folder counts, as with ``python -m``."""
    here = Path.cwd()
    with _blamed(f"'{name}'", here, error), _first_on_path(here):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as exc:
            if exc.name is None or not f"{name}.".startswith(f"{exc.name}."):
                raise  # a module that theirs imports
            raise error(
                f"there is no module '{name}'", fix="write path.py:NAME, or install the package that has it"
            ) from None


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    """Imports look into this folder first; later ones (inside functions) look there last."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
        if entry not in sys.path:
            sys.path.append(entry)


@contextmanager
def _blamed(called: str, origin: Path | Callable[..., Any], error: type[UserError]) -> Iterator[None]:
    """Raise what the block raises as an error with the user's file, line and source line.

    ``origin`` is the folder of the user's files, or the function whose folder it is.
    """
    try:
        yield
    except FeatherweightError as exc:
        exc.where = exc.where or _place(exc, _folder(origin))
        raise
    except (Exception, SystemExit) as exc:
        if isinstance(exc, SyntaxError) and exc.filename and Path(exc.filename).exists():
            where: str | None = f"{exc.filename}:{exc.lineno}: {(exc.text or '').strip()}"
            what = f"{called} does not parse: {exc.msg}"
        else:
            where = _place(exc, _folder(origin)) or (None if isinstance(origin, Path) else defined_at(origin))
            what = f"{called} raised {traceback.format_exception_only(exc)[-1].strip()}"
        raise error(what, where=where, fix="correct that line") from exc


def _place(exc: BaseException, folder: Path | None) -> str | None:
    """'file:line: source' of the innermost frame in the user's files; None when there is none."""
    frames = traceback.extract_tb(exc.__traceback__)
    theirs = [frame for frame in frames if _is_theirs(frame.filename, folder)]
    return f"{theirs[-1].filename}:{theirs[-1].lineno}: {theirs[-1].line}" if theirs else None


def _is_theirs(filename: str, folder: Path | None) -> bool:
    if folder is None or {"site-packages", "dist-packages"} & set(Path(filename).parts):
        return False
    return _is_within(filename, folder) and not _is_within(filename, _PACKAGE)


def _is_within(filename: str, folder: Path) -> bool:
    return Path(filename).resolve().is_relative_to(folder)


def _folder(origin: Path | Callable[..., Any]) -> Path | None:
    """A folder itself, or that of the file that defines a function, a class or a callable object."""
    if isinstance(origin, Path):
        return origin
    target = inspect.unwrap(origin)
    target = getattr(target, "func", target)  # functools.partial
    if not (inspect.isroutine(target) or inspect.isclass(target)):
        target = type(target)
    try:
        path = inspect.getsourcefile(target)
    except TypeError:
        return None
    return Path(path).resolve().parent if path else None


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _offers(path: Path) -> str:
    """'; it defines build, data': what a file has to offer, without running it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ""
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = [node.name for node in tree.body if isinstance(node, kinds) and node.name[0] != "_"]
    return f"; it defines {', '.join(names)}" if names else ""
