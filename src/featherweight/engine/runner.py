"""The process that opens artifacts: reads job.json in a folder and leaves result.json there.

``python -I -B runner.py FOLDER`` takes its cores before it imports anything, keeps its standard output
for frames (whatever a runtime prints goes to standard error), ends when its standard input ends, and
tells errors in result.json. It needs numpy and the runtime, neither torch nor the rest of this
package, so that a measured process is as small as the application that will ship.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

_POOLS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
_LOOK_S = 0.1


def main(folder: Path) -> int:
    """Run the job of a folder; the exit code."""
    job = json.loads((folder / "job.json").read_text())
    sys.path[:0] = job["source"]
    sys.path += [path for path in job["paths"] if path not in sys.path]
    answers, requests = _own_pipes()
    if job["kind"] not in ("serve", "paced"):
        threading.Thread(target=_end_with, args=(requests,), daemon=True).start()
    try:
        look_s = _LOOK_S if job["kind"] in ("latency", "paced") else 0.0
        describes = job["kind"] == "describe"  # all cores that there are
        cores = [] if describes else pin(job["target"]["threads"], look_s, job.get("cores") or ())
        from featherweight.engine import frames, phases  # numpy is imported once the cores are taken

        result = phases.run(job, folder, requests, answers)
        _write(folder / "result.json", {**result, "cores": cores})
        frames.send(answers, {"end": True})
    except Exception as error:  # noqa: BLE001 - the engine is told, and so is standard error
        traceback.print_exc()
        _write(folder / "result.json", {"error": _told(error)})
        return 1
    return 0


def pin(threads: int, look_s: float = 0.0, chosen: Sequence[int] = ()) -> list[int]:
    """Bind this process to as many cores as it may use, and size the usual thread pools.

    Affinity holds where a runtime ignores the number it is given. Among the cores that it may
    use, those that were idlest while it looked come first, and no two threads of
    one core before each core is used. Cores that are ``chosen`` are taken as they are.

    Raises:
        TargetError: There are fewer cores.
    """
    for name in _POOLS:
        os.environ[name] = str(threads)
    if not hasattr(os, "sched_setaffinity"):
        return []
    if len(chosen) == threads:
        os.sched_setaffinity(0, chosen)
        return list(chosen)
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        from featherweight.errors import TargetError

        raise TargetError(
            f"{threads} threads are asked for and {len(cores)} cores are there",
            fix=f"--threads {len(cores)}",
        )
    busy = _busy(look_s)
    ranked = sorted(cores, key=lambda core: (_sibling(core), busy.get(core, 0), -core))
    chosen = sorted(ranked[:threads])
    os.sched_setaffinity(0, chosen)
    return chosen


def _busy(seconds: float) -> dict[int, int]:
    """Clock ticks that each core worked while we looked."""
    if not seconds:
        return {}
    before = _ticks()
    time.sleep(seconds)
    return {core: worked - before.get(core, 0) for core, worked in _ticks().items()}


def _ticks() -> dict[int, int]:
    """Core -> ticks that were neither idle nor waiting, by /proc/stat; empty where there is none."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return {}
    ticks = {}
    for line in lines:
        name, *counts = line.split()
        if name.startswith("cpu") and name != "cpu":
            ticks[int(name[3:])] = sum(map(int, counts)) - int(counts[3]) - int(counts[4])
    return ticks


def _sibling(core: int) -> int:
    """Which hardware thread of its core this is: 0 for the first."""
    file = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        first = file.read_text().replace("-", ",").split(",")[0]
    except OSError:
        return 0
    return int(int(first) != core)


def _own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes to the engine, out of reach of anything that prints or reads."""
    answers, requests = os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(0), "rb")
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return answers, requests


def _end_with(requests: BinaryIO) -> None:
    """Leave when the engine does, however it ended: nobody waits for this result any more."""
    requests.read()
    os._exit(1)


def _told(error: Exception) -> dict[str, Any]:
    """An error as data; the parts of our own ones, one line of any other."""
    last = traceback.format_exception_only(error)[-1].strip()
    return {
        "type": type(error).__name__,
        "what": getattr(error, "what", last),
        "where": getattr(error, "where", None),
        "fix": getattr(error, "fix", None),
    }


def _write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result))
    unfinished.replace(path)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)  # the result is written: a runtime that crashes or hangs while it is torn down has no say
