"""Command lines in processes that start at once: forked from one that has imported everything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, cast

import numpy as np

_SERVER = """
import json, os, sys, tempfile, warnings
warnings.simplefilter("ignore")
import featherweight.api.fitting, featherweight.cli
import featherweight.methods.fold, featherweight.methods.quantize
import featherweight.exchange.export, onnx_ir, torch.export, torch.onnx, torchmetrics.functional
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(job["folder"])
        os.environ.update(job["environment"])
        tempfile.tempdir = None  # asked for anew
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, job["out"]), (2, job["err"])):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        code = featherweight.cli.main(job["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

NET = '''"""A small residual network."""
import sys
from pathlib import Path

sys.path.append({tests!r})
from nets import NETS


def net():
    return NETS["residual"]()[0]
'''


def prepared(folder: Path, *, recipe: str, scored: int, training: int = 16) -> Path:
    """A folder in which commands find ``net.py``, ``recipe.yaml`` and ``data.npz``.

    Args:
        folder: Takes them.
        recipe: In YAML.
        scored: Examples that are scored.
        training: Others, which calibrate.
    """
    (folder / "net.py").write_text(NET.format(tests=str(Path(__file__).parent)))
    (folder / "recipe.yaml").write_text(recipe)
    count = scored + training
    x = np.random.default_rng(0).standard_normal((count, 3, 16, 16)).astype(np.float32)
    y = np.arange(count) % 10
    np.savez(folder / "data.npz", x=x[:scored], y=y[:scored], x_train=x[scored:], y_train=y[scored:])
    return folder


def journal(cache: Path) -> list[tuple[str, str]]:
    """Kind and key of everything that was computed into a store, in order."""
    file = cache / "journal.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(entry["kind"], entry["key"]) for entry in map(json.loads, lines)]


def partial(folder: Path) -> list[Path]:
    """What was left half-written."""
    return [path for path in folder.rglob("*") if "partial" in path.name]


@dataclass(frozen=True)
class Ran:
    """A command that ended: its exit code (negative: the signal that ended it), and how long it took."""

    code: int
    seconds: float


class Commands:
    """Starts ``featherweight`` again and again. A context manager.

    Args:
        folder: Where commands run; takes what they print, too.
        prefix: What the starting process is started with, e.g. ``("unshare", "-n")``.
    """

    def __init__(self, folder: Path, prefix: Sequence[str] = ()) -> None:
        self.folder = folder
        self._prefix = prefix

    def __enter__(self) -> Commands:
        self._server = subprocess.Popen(
            [*self._prefix, sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cast(IO[str], self._server.stdin).close()
        self._server.wait(60)
        cast(IO[str], self._server.stdout).close()

    def run(
        self,
        *arguments: str,
        cache: Path,
        kill_after: float | None = None,
        kill_when: Callable[[], bool] | None = None,
        with_signal: signal.Signals = signal.SIGKILL,
        environment: Mapping[str, str] | None = None,
    ) -> Ran:
        """Run one command to its end, or signal its whole process group: after some seconds, or when so."""
        job = {
            "arguments": arguments,
            "folder": str(self.folder),
            "environment": {"FEATHERWEIGHT_CACHE": str(cache), **(environment or {})},
            "out": str(self.folder / "stdout.txt"),
            "err": str(self.folder / "stderr.txt"),
        }
        pipe = cast(IO[str], self._server.stdin)
        pipe.write(json.dumps(job) + "\n")
        pipe.flush()
        pid, started = int(self._line()), time.monotonic()
        watch: threading.Thread | None = None
        if kill_after is not None:
            watch = threading.Timer(kill_after, _signal_group, (pid, with_signal))
            watch.start()
        elif kill_when is not None:
            watch = threading.Thread(target=_signal_when, args=(kill_when, pid, with_signal), daemon=True)
            watch.start()
        code = int(self._line())
        if isinstance(watch, threading.Timer):
            watch.cancel()
        self.last = Ran(code, time.monotonic() - started)
        return self.last

    @property
    def out(self) -> str:
        """What the last command wrote to standard output."""
        return (self.folder / "stdout.txt").read_text()

    @property
    def err(self) -> str:
        """What the last command wrote to standard error."""
        return (self.folder / "stderr.txt").read_text()

    def _line(self) -> str:
        return cast(IO[str], self._server.stdout).readline().strip()


def _signal_when(met: Callable[[], bool], pid: int, with_signal: signal.Signals) -> None:
    while not met():
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.01)
    _signal_group(pid, with_signal)


def _signal_group(pid: int, with_signal: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it ended by itself just before
        os.killpg(pid, with_signal)
