"""Converters that misbehave, called by name in the child."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import Any

from featherweight.errors import TargetError


def add(one: int, two: int) -> dict[str, Any]:
    print("noise")  # noqa: T201 - converters print
    return {"sum": one + two, "pid": os.getpid()}


def abort() -> None:
    os.abort()


def leave() -> None:
    os._exit(3)


def hang() -> None:
    time.sleep(3600)


def hang_in_a_child() -> None:
    subprocess.run([sys.executable, "-c", "import time; time.sleep(3600)"], check=False)


def eat() -> None:
    held = []
    while True:
        held.append(bytearray(os.urandom(1 << 20) * 16))


def refuse() -> None:
    raise TargetError("layer 3 has no such kernel", where="layer 3", fix="exclude it")


def fail() -> None:
    raise ValueError("shape mismatch\nin a long story")


def connect() -> None:
    socket.create_connection(("127.0.0.1", 9), timeout=1)


def install() -> None:
    subprocess.run([sys.executable, "-m", "pip", "--version"], check=False)


def environment() -> dict[str, str]:
    return dict(os.environ)
