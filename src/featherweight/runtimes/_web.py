"""Finds onnxruntime-web and talks to the Node process that runs it. Part of ``onnxruntime_web.py``.

``_web_host.mjs`` is that process's program; it inherits the cores of the process that starts it and ends
when its standard input does. Frames go over pipes: the length of a JSON header (4 bytes, little-endian),
the header, and the raw bytes of the tensors that it describes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from featherweight.errors import RunnerError

PACKAGE = "onnxruntime-web"
DTYPES = frozenset(
    {"bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64"}
    | {"uint8", "uint16", "uint32", "uint64"}
)
_HOST = Path(__file__).with_name("_web_host.mjs")
_PLACE = "FEATHERWEIGHT_NODE_MODULES"
_PIPE_BYTES = 1 << 20  # what an unprivileged process may ask for: an image of 224 px fits
_KEPT = ("PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "LC_ALL", "SYSTEMROOT")
_END_S = 5.0


def node() -> str | None:
    """The program, if it is on PATH."""
    return shutil.which("node")


def package() -> Path | None:
    """The folder of the npm package; None where it is not installed."""
    return next(
        (place / PACKAGE for place in _places() if (place / PACKAGE / "package.json").is_file()), None
    )


def version() -> str:
    """What its package.json says."""
    place = package()
    return "" if place is None else str(json.loads((place / "package.json").read_text())["version"])


def _places() -> list[Path]:
    """Folders called node_modules, the likeliest first; the last ones are those of ``npm install -g``."""
    places = [Path(os.environ[_PLACE])] if os.environ.get(_PLACE) else []
    places += [Path(sys.prefix) / "node_modules", _home() / ".cache" / "featherweight" / "node_modules"]
    if found := node():
        places.append(Path(found).resolve().parents[1] / "lib" / "node_modules")
    return [*places, Path("/usr/local/lib/node_modules")]


def _home() -> Path:
    """The user's own home, also in a runner, whose ``HOME`` is its job's folder."""
    import pwd

    return Path(pwd.getpwuid(os.getuid()).pw_dir)


class Host:
    """A Node process with onnxruntime-web in it, ready to open files.

    Args:
        threads: Threads of the WebAssembly; with one, no worker is started.

    Raises:
        RunnerError: The process did not come up.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._process = subprocess.Popen(
            [str(node()), str(_HOST), str(package()) + "/dist", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={name: os.environ[name] for name in _KEPT if name in os.environ},
        )
        self._end = weakref.finalize(self, _end, self._process)
        self._requests, self._answers = _pipe(self._process.stdin), _pipe(self._process.stdout)
        self.node = str(self._receive()[0]["node"])

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._end()

    def ask(
        self, header: Mapping[str, Any], tensors: Sequence[np.ndarray] = ()
    ) -> tuple[dict[str, Any], tuple[np.ndarray, ...]]:
        """Hand one frame over and wait for the answer.

        Raises:
            TypeError: A tensor is of a type that JavaScript has no array for.
            ValueError: onnxruntime-web refused; its own words.
            RunnerError: The process is gone.
        """
        arrays = [np.require(tensor, requirements="C") for tensor in tensors]
        for array in arrays:
            if array.dtype.name not in DTYPES:
                raise TypeError(f"onnxruntime-web takes no tensors of {array.dtype}")
        described = [{"dtype": array.dtype.name, "shape": array.shape} for array in arrays]
        head = json.dumps({**header, "tensors": described}).encode()
        parts: list[bytes | memoryview] = [struct.pack("<I", len(head)), head]
        parts += [array.reshape(-1).view(np.uint8).data for array in arrays if array.size]
        try:
            _write(self._requests, parts)
        except BrokenPipeError as error:
            raise self._gone() from error
        return self._receive()

    def _receive(self) -> tuple[dict[str, Any], tuple[np.ndarray, ...]]:
        try:
            (size,) = struct.unpack("<I", self._exactly(4))
            header = json.loads(self._exactly(size))
            outputs = []
            for described in header.pop("tensors", ()):
                dtype, shape = np.dtype(described["dtype"]), tuple(described["shape"])
                data = self._exactly(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
                outputs.append(np.frombuffer(data, dtype).reshape(shape))
        except EOFError as error:
            raise self._gone() from error
        if "error" in header:
            raise ValueError(f"onnxruntime-web: {header['error']}")
        return header, tuple(outputs)

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            count = os.readv(self._answers, [view[filled:]])
            if not count:
                raise EOFError
            filled += count
        return data

    def _gone(self) -> RunnerError:
        self.close()
        return RunnerError(
            f"the Node process of onnxruntime-web ended with exit code {self._process.returncode}",
            fix="a smaller model or batch, if its memory ran out; WebAssembly has 4 GB",
        )


def _pipe(stream: IO[bytes] | None) -> int:
    """The descriptor of a pipe, made large where the system lets us."""
    assert stream is not None
    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return stream.fileno()


def _write(pipe: int, parts: Sequence[bytes | memoryview]) -> None:
    """All of it, in as few system calls as the pipe takes."""
    left = [memoryview(part) for part in parts]
    while left:
        done = os.writev(pipe, left)
        while left and done >= len(left[0]):
            done -= len(left.pop(0))
        if left:
            left[0] = left[0][done:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes, on which the process ends by itself; end it if it does not."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
