"""The public surface: complete, sorted, documented, and light to import."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import featherweight

ROOT = Path(featherweight.__file__).parent


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_all_is_sorted_and_complete() -> None:
    assert list(featherweight.__all__) == sorted(set(featherweight.__all__))
    tree = ast.parse((ROOT / "__init__.py").read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    typed = [name.asname for node in checked.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert sorted(typed, key=str) == featherweight.__all__  # what a type checker sees
    assert set(dir(featherweight)) == {*featherweight.__all__, "__version__"}


@pytest.mark.parametrize("name", featherweight.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    thing = getattr(featherweight, name)
    assert inspect.getdoc(thing)
    home = importlib.import_module(thing.__module__)
    assert getattr(home, name) is thing


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compress'"):
        featherweight.compress  # noqa: B018


def test_star_import_gives_all_of_it() -> None:
    code = (
        "from featherweight import *\nimport featherweight\nassert set(featherweight.__all__) <= set(dir())"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module",
    ["featherweight", "featherweight.errors", "featherweight.runtime", "featherweight.outcome",
     "featherweight.plugins", "featherweight.cli", "featherweight.runtimes.onnxruntime",
     "featherweight.runtimes.torch", "featherweight.engine.runner"],
)  # fmt: skip
def test_importing_it_imports_nothing_heavy(module: str) -> None:
    heavy = "{'torch', 'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'optuna', 'altair', 'torchmetrics'}"
    done = run(f"import sys, {module}\nheavy = {heavy} & set(sys.modules)\nassert not heavy, heavy")
    assert done.returncode == 0, done.stderr


def test_the_version_is_that_of_the_distribution() -> None:
    assert importlib.metadata.version("featherweight") == featherweight.__version__


def test_types_are_published() -> None:
    assert (ROOT / "py.typed").is_file()


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_opens_with_what_it_is_for(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert docstring.partition("\n\n")[0].rstrip().endswith((".", "?", "!", "::")), path
