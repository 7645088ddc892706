"""Which modules of this package a runner needs for one runtime, as an archive that is the same every time.

Followed are the imports at a module's top; those inside functions too in the engine's own part, and in a
runtime's file those of its private helpers, since it opens sessions with them. A helper that needs
torch at its top serves lowering, which never happens in a runner, and stays at home.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_ROOTS = ("featherweight.engine.runner", "featherweight.engine.phases")
_HEAVY = frozenset({"torch", "onnx", "onnx_ir", "onnxscript", "pydantic", "psutil"})


def bundle(runtime: str) -> tuple[str, bytes]:
    """The archive for a runtime, and its digest.

    A runtime of another package is not in it: that package is installed where it runs.
    """
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in _with_packages(modules(runtime)):
            source = path.read_bytes()
            entry = tarfile.TarInfo(path.relative_to(_PACKAGE.parent).as_posix())
            entry.size, entry.mode = len(source), 0o644
            archive.addfile(entry, io.BytesIO(source))
    data = out.getvalue()
    return hashlib.sha256(data).hexdigest(), data


def modules(runtime: str) -> list[str]:
    """Names of the modules, sorted."""
    found: dict[str, None] = {}
    waiting = ["featherweight", *_ROOTS, "featherweight.runtimes", _module(runtime)]
    while waiting:
        name = waiting.pop()
        if name in found or _file(name) is None:
            continue
        found[name] = None
        waiting += _needed(name)
    return sorted(found)


def _module(runtime: str) -> str:
    return f"featherweight.runtimes.{runtime.replace('-', '_')}"


def _needed(name: str) -> list[str]:
    """Modules of this package that must travel with this one."""
    needed = list(_imports(name, deep=name in _ROOTS))
    if name.startswith("featherweight.runtimes."):
        helpers = (m for m in _imports(name, deep=True) if m.startswith("featherweight.runtimes._"))
        needed += [helper for helper in helpers if _file(helper) is not None and not _is_heavy(helper)]
    return [module for module in needed if module.startswith("featherweight")]


def _is_heavy(name: str, above: frozenset[str] = frozenset()) -> bool:
    """Whether importing this module imports torch or what else only the toolkit has."""
    for module in _imports(name, deep=False):
        if module.partition(".")[0] in _HEAVY:
            return True
        ours = module not in above and _file(module) is not None
        if ours and _is_heavy(module, above | {name}):
            return True
    return False


@cache
def _tree(path: Path, stamp: int) -> ast.Module:
    return ast.parse(path.read_bytes())


def _imports(name: str, *, deep: bool) -> Iterator[str]:
    """Modules that a module imports at its top, or anywhere; never those for the type checker alone."""
    path = _file(name)
    assert path is not None
    waiting: list[ast.AST] = [_tree(path, path.stat().st_mtime_ns)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif deep or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def _with_packages(names: list[str]) -> list[Path]:
    """Their files, and those of the packages that they lie in."""
    packages = {name.rpartition(".")[0] for name in names} - {""}
    paths = [path for name in sorted({*names, *packages}) if (path := _file(name)) is not None]
    return [*paths, *sorted({beside for path in paths for beside in _named_in(path)})]


def _named_in(path: Path) -> Iterator[Path]:
    """Programs in other languages beside a runtime's module, which names them."""
    if path.parent.name == "runtimes":
        for node in ast.walk(_tree(path, path.stat().st_mtime_ns)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".mjs"):
                beside = path.with_name(Path(node.value).name)
                if beside.is_file():
                    yield beside


def _file(name: str) -> Path | None:
    """The source of a module of this package; None for what is a name in one, or not ours."""
    parts = name.split(".")[1:] if name.split(".")[0] == "featherweight" else None
    if parts is None:
        return None
    place = _PACKAGE.joinpath(*parts)
    for path in (place / "__init__.py", place.with_suffix(".py")):
        if path.is_file():
            return path
    return None
