"""Opens .keras and .h5 files through Keras 3 on its torch back end, and lets no file run code.

A file's configuration is read first, by itself. What would run code when it is loaded is refused there:
Lambda layers, pickled modules of other frameworks, and classes that are none of Keras' own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featherweight.errors import LoadError, MissingRuntime

_LARGEST_CONFIG = 256 << 20
_RUNS_CODE = frozenset({"Lambda", "__lambda__", "TorchModuleWrapper", "FlaxLayer", "JaxLayer", "TFSMLayer"})
_HOUSES = ("keras", "builtins")
_AWAY = (
    "where the code is at hand, load it in Keras, put ordinary layers in its place, and save it again; or "
    "model.export('model.onnx', format='onnx')"
)


def load_keras(path: Path) -> Any:
    """The Keras model of a file, not compiled.

    Raises:
        LoadError: It is no such file, would run code, or Keras cannot read it.
        MissingRuntime: Keras, or h5py, is not installed.
    """
    require_keras()
    config = _config(path)
    _refuse_code(config, path)
    keras = import_keras_package()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = keras.saving.load_model(str(path), compile=False, safe_mode=True)
    except Exception as error:  # Keras raises what it likes
        said = [line for line in str(error).strip().splitlines() if line.strip()]
        raise LoadError(
            f"Keras cannot read '{path}': {said[0][:300] if said else type(error).__name__}",
            fix="save it again with Keras 3: model.save('model.keras')",
        ) from error
    if not hasattr(model, "layers"):
        raise LoadError(f"'{path}' holds a {type(model).__name__}, not a model", fix="save the whole model")
    return model


def require_keras() -> None:
    """Raise the error that tells how to install Keras, unless it is there.

    Raises:
        MissingRuntime: It cannot be imported.
    """
    for package in ("keras", "h5py"):
        if importlib.util.find_spec(package) is None:
            raise MissingRuntime(
                f"Keras files are read through Keras 3, and there is no package '{package}'",
                fix='pip install "featherweight[keras]"',
            )


def import_keras_package() -> Any:
    """Keras on its torch back end; the environment and the user's settings stay as they were.

    Raises:
        LoadError: This process has imported Keras with another back end.
    """
    with tempfile.TemporaryDirectory(prefix="featherweight-") as home, _environment(home):
        import keras
    if keras.backend.backend() != "torch":
        raise LoadError(
            f"this process has imported Keras on {keras.backend.backend()}, and torch is needed",
            fix="start Python anew, or set KERAS_BACKEND=torch before Keras is imported",
        )
    return keras


@contextmanager
def _environment(home: str) -> Iterator[None]:
    """Keras reads its settings from here while it is imported, and writes them if there are none."""
    before = dict(os.environ)
    os.environ.update(KERAS_BACKEND="torch", KERAS_HOME=home)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _config(path: Path) -> Any:
    """What the file says of its layers."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.getinfo("config.json").file_size > _LARGEST_CONFIG:
                    raise LoadError(f"the configuration in '{path}' is absurdly large", fix="save it again")
                return json.loads(archive.read("config.json"))
        import h5py

        with h5py.File(path, "r") as file:
            text = file.attrs.get("model_config")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, EOFError, RecursionError) as error:
        raise LoadError(
            f"'{path}' is no Keras file, or a damaged one: {str(error)[:200]}",
            fix="save it again with Keras: model.save('model.keras')",
        ) from error
    if text is None:
        raise LoadError(
            f"'{path}' holds weights without a model", fix="save the whole model: model.save('model.keras')"
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"the configuration in '{path}' is damaged", fix="save it again") from error


def _refuse_code(config: Any, path: Path) -> None:
    """Refuse what runs code of the file's or of a module that the file names."""
    waiting = [config]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(item)
        if not isinstance(item, dict):
            continue
        waiting.extend(item.values())
        kind = item.get("class_name")
        if not isinstance(kind, str):
            continue
        inner = item.get("config")
        name = inner.get("name", kind) if isinstance(inner, dict) else kind
        if kind.rpartition(">")[2] in _RUNS_CODE:
            raise LoadError(
                f"layer '{name}' of '{path}' is a {kind}, which holds code; loading it would run that code",
                fix=_AWAY,
            )
        module = item.get("module")
        if isinstance(module, str) and module.partition(".")[0] not in _HOUSES:
            raise LoadError(
                f"'{name}' of '{path}' is a {module}.{kind}, none of Keras' own; its code is not run",
                fix=_AWAY,
            )
        if ">" in f"{item.get('registered_name')}{kind}" and f"{item.get('registered_name')}" != kind:
            raise LoadError(f"'{name}' of '{path}' is a custom {kind}; its code is not run", fix=_AWAY)
