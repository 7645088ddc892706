"""Plug-ins: files of the package and entry points, found by name and imported when asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.errors import PluginError
from featherweight.method import Method
from featherweight.plugins import find_method, find_runtime, method_names, runtime_names
from featherweight.runtime import Runtime

FOLDER = Path(__file__).parents[1] / "src" / "featherweight"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A third-party package with a method of its own and one that calls itself ``fold``."""
    about = tmp_path / "lighter-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lighter\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[featherweight.methods]\nnothing = lighter:Nothing\nfold = lighter:Nothing\nbroken = lighter:Gone\n"
        "[featherweight.runtimes]\nabacus = lighter:Abacus\n"
    )
    (tmp_path / "lighter.py").write_text(
        "from typing import ClassVar\n"
        "from featherweight.method import Kind, Method\n"
        "from featherweight.runtimes.torch import Torch\n"
        "class Nothing(Method, frozen=True, extra='forbid'):\n"
        "    kind: ClassVar[Kind] = 'values'\n"
        "    def apply(self, model, context):\n"
        "        return model\n"
        "class Abacus(Torch):\n"
        "    module = 'abacus_that_is_not_installed'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("folder", "names"), [("methods", method_names), ("runtimes", runtime_names)])
def test_every_file_is_a_plug_in_of_its_name(folder: str, names: object) -> None:
    files = {path.stem for path in (FOLDER / folder).glob("*.py") if not path.stem.startswith("_")}
    if folder == "runtimes":
        files = {file.replace("_", "-") for file in files}
    assert files <= set(names())  # type: ignore[operator]
    assert "_" not in "".join(runtime_names())
    assert list(names()) == sorted(names())  # type: ignore[operator]


def test_methods_are_classes_and_runtimes_instances() -> None:
    assert all(issubclass(find_method(name), Method) for name in method_names())
    found = [find_runtime(name) for name in runtime_names()]
    assert all(isinstance(runtime, Runtime) for runtime in found)
    assert [runtime.name for runtime in found] == runtime_names()


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(PluginError, match="no method is called 'quantise'") as told:
        find_method("quantise")
    assert told.value.fix == "did you mean 'quantize'?"
    with pytest.raises(PluginError, match="no runtime is called 'onnx-runtime'") as told:
        find_runtime("onnx-runtime")
    assert told.value.fix == "did you mean 'onnxruntime'?"
    with pytest.raises(PluginError) as told:
        find_runtime("zzz")
    assert told.value.fix is not None
    assert {"onnxruntime", "torch"} <= set(told.value.fix.removeprefix("known: ").split(", "))


def test_an_entry_point_adds_a_method(installed: Path) -> None:
    assert "nothing" in method_names()
    assert find_method("nothing").__module__ == "lighter"
    assert "abacus" in runtime_names()


def test_an_entry_point_does_not_replace_a_file(installed: Path) -> None:
    assert method_names().count("fold") == 1
    assert find_method("fold").__module__ == "featherweight.methods.fold"


def test_a_runtime_is_found_without_its_package_and_says_how_to_get_it(installed: Path) -> None:
    runtime = find_runtime("abacus")
    assert not runtime.installed()


def test_a_broken_entry_point_is_told(installed: Path) -> None:
    with pytest.raises(PluginError, match="'broken'") as told:
        find_method("broken")
    assert told.value.__cause__ is not None


def test_names_are_found_without_importing_a_plug_in() -> None:
    code = (
        "import sys\n"
        "from featherweight.plugins import method_names, runtime_names\n"
        "assert method_names() and runtime_names()\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', "
        "'featherweight.methods.fold', 'featherweight.runtimes.torch'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("installed")
def test_a_runtime_is_called_as_it_is_found() -> None:
    """A package's file may be named otherwise than the entry point by which users ask for it."""
    assert find_runtime("abacus").name == "abacus"
