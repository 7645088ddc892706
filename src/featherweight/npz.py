"""Examples in an .npz file, never unpickled: x, y, x_train, y_train, x_calibration; several as x0, x1 ..."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from featherweight.errors import DataError

ROLES = ("x", "y", "x_train", "y_train", "x_calibration")
_SAVE = "np.savez('data.npz', x=x, y=y)"


class NpzFile(NamedTuple):
    """What a file holds: role -> array, or tuple of arrays for several inputs."""

    roles: dict[str, Any]
    class_names: list[str] | None
    unused: list[str]


def read_npz(path: Path) -> NpzFile:
    """The arrays of a file by their role; ``class_names`` may stand beside them.

    Raises:
        DataError: The file is missing, damaged or no .npz, holds Python objects, or has no ``x``.
    """
    arrays = _arrays(path)
    groups: dict[str, list[str]] = {}
    unused = []
    for name in arrays:
        role = name.rstrip("0123456789")
        if role in ROLES and (name == role or role.startswith("x")):
            groups.setdefault(role, []).append(name)
        elif name != "class_names":
            unused.append(name)
    if "x" not in groups:
        raise DataError(
            f"'{path}' has no array 'x'",
            where=f"its arrays: {', '.join(arrays) or 'none'}",
            fix=f"np.savez('{path.name}', x=inputs, y=labels)",
        )
    names = arrays["class_names"].tolist() if "class_names" in arrays else None
    return NpzFile({role: _inputs(role, found, arrays) for role, found in groups.items()}, names, unused)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of the file.

    Raises:
        DataError: The file is missing, damaged, no .npz, or holds Python objects.
    """
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.ndarray):
                return {name: _array(path, name, loaded) for name in loaded.files}
    except FileNotFoundError:
        raise DataError(f"there is no file '{path}'", fix="check the path") from None
    except ValueError as exc:
        raise DataError(
            f"'{path}' is not an .npz file; if it is a pickle, it is refused, since it could run code",
            fix=f"write it with {_SAVE}",
        ) from exc
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as exc:
        raise _damaged(path, exc) from exc
    raise DataError(f"'{path}' is one array, not an .npz file", fix=f"write it with {_SAVE}")


def _array(path: Path, name: str, loaded: Mapping[str, np.ndarray]) -> np.ndarray:
    try:
        return loaded[name]
    except ValueError as exc:
        if "allow_pickle" not in str(exc):
            raise _damaged(path, exc) from exc
        raise DataError(
            f"array '{name}' of '{path}' holds Python objects, which are refused",
            fix=f"save numbers: {name}=np.array({name}, dtype='float32')",
        ) from exc


def _inputs(role: str, names: list[str], arrays: Mapping[str, np.ndarray]) -> Any:
    """The array of a role, or the tuple of its numbered arrays."""
    if names == [role]:
        return arrays[role]
    expected = [f"{role}{i}" for i in range(len(names))]
    if sorted(names) != sorted(expected):
        raise DataError(
            f"the arrays {', '.join(names)} are not numbered from 0 without a gap",
            fix=f"name them {', '.join(expected)}",
        )
    return tuple(arrays[name] for name in expected)


def _damaged(path: Path, exc: Exception) -> DataError:
    return DataError(
        f"'{path}' cannot be read, it is damaged or no .npz file: {str(exc) or type(exc).__name__}",
        fix=f"write it again with {_SAVE}",
    )
