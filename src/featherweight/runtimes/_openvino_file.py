"""Reads an IR's XML without OpenVINO, and what Linux tells of the processor's cores.

Part of ``openvino.py``.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from featherweight.runtime import Stored

_DTYPES = {"f": "float", "i": "int", "u": "uint", "bf": "bfloat"}


def constants(path: Path) -> dict[str, Stored]:
    """Every constant of a file by name: its type and bytes."""
    found: dict[str, Stored] = {}
    for layer in ElementTree.parse(path).getroot().iter("layer"):
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None:
            name, kind = str(layer.get("name")), str(data.get("element_type"))
            letters = kind.rstrip("0123456789")
            dtype = _DTYPES.get(letters, letters) + kind.removeprefix(letters)
            found[name] = Stored(name, dtype, int(str(data.get("size"))))
    return found


def has_efficiency_cores() -> bool:
    """Whether this machine has cores of two kinds, as Linux names them."""
    return Path("/sys/devices/cpu_atom").exists()
