"""What is left of a search that is stopped: by its time limit, Ctrl-C, kill -9, or the death of a machine.

``python benchmarks/stopped.py``. The command line fits ResNet-20 for Fashion-MNIST again and again, each time
with an empty cache: until the time is up; until SIGINT; until SIGKILL, and then with ``--resume``; and on a
Ray cluster of two nodes on this machine, one of which is killed in the middle. Each line tells what was
handed back, and when.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Bar, Shown, finish, table, tell_load
from networks import EXAMPLES

Json = dict[str, Any]
_COMMAND = Path(sys.executable).with_name("featherweight")
_FIT = (
    *("fit", f"{EXAMPLES / 'nets.py'}:resnet20", "--weights", str(EXAMPLES / "resnet20.safetensors")),
    *("--data", str(EXAMPLES / "data.npz"), "--max-drop", "1%"),
)
_LATE, _INTERRUPTED_S = 1.1, 30.0  # times the limit; seconds until the best so far is handed back
_GRACE_S = 600.0
_BOARD = {"num_cpus": 1, "object_store_memory": 200 * 2**20}
_SAID = "trial "
CASES = ("limits", "interrupted", "killed", "node")


@dataclass(frozen=True)
class Ran:
    """A command that ended.

    Attributes:
        code: Its exit code.
        seconds: From its start.
        after_s: From the signal; None: there was none.
        said: Standard error.
    """

    code: int
    seconds: float
    after_s: float | None
    said: str


def run(
    place: Path, *more: str, stop_at: float | None = None, how: Callable[[int], None] | None = None
) -> Ran:
    """Fit in a folder whose cache it keeps; stop it some seconds after its first trial began.

    Args:
        place: Takes the cache, what is said, and ``out``.
        more: Options.
        stop_at: Seconds after the first trial began.
        how: Is given the process group.
    """
    said, began = place / "said.txt", time.monotonic()
    environment = {**os.environ, "FEATHERWEIGHT_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    with said.open("w") as file:
        process = subprocess.Popen(
            [_COMMAND, *_FIT, "--out", "out", "--force", *more],
            cwd=place,
            stdout=subprocess.DEVNULL,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
    signalled = None
    try:
        if stop_at is not None and how is not None:
            while _SAID not in said.read_text() and process.poll() is None:
                time.sleep(0.05)
            time.sleep(stop_at)
            signalled = time.monotonic()
            how(process.pid)
        code = process.wait(_GRACE_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    now = time.monotonic()
    return Ran(code, now - began, None if signalled is None else now - signalled, said.read_text())


def row(case: str, place: Path, ran: Ran, **more: Any) -> Json:
    """One line; figures of the result, if there is one."""
    told: Json = {"case": case, "code": ran.code, "seconds": ran.seconds, "after_s": ran.after_s, **more}
    file = place / "out" / "result.json"
    told["half_written"] = sum(1 for path in place.rglob("*") if "partial" in path.name)
    told["delivered"] = file.exists()
    if file.exists():
        result = json.loads(file.read_text())
        states = [trial["state"] for trial in result["trials"]]
        chosen = result["chosen"]
        told |= {
            "trials": len(states),
            "measured": states.count("measured"),
            "resumed": result["resumed"],
            "met": result["met"],
            "drop": chosen["quality_drop"],
            "bytes": chosen["bytes"],
            "latency_ratio": chosen["latency_ratio"],
            "warnings": result["warnings"],
        }
    return told


def limited(seconds: float) -> Json:
    """Until the time is up."""
    with tempfile.TemporaryDirectory(prefix="featherweight-bench-") as folder:
        ran = run(Path(folder), "--time", f"{seconds:g}s")
        return row(f"--time {seconds:g}s", Path(folder), ran, limit_s=seconds)


def interrupted(at: float) -> Json:
    """Ctrl-C, once."""
    with tempfile.TemporaryDirectory(prefix="featherweight-bench-") as folder:
        ran = run(Path(folder), "--time", "10m", stop_at=at, how=lambda pid: os.killpg(pid, signal.SIGINT))
        return row(f"Ctrl-C {at:g} s after the first trial began", Path(folder), ran)


def killed(at: float) -> list[Json]:
    """Killed, and gone on with."""
    with tempfile.TemporaryDirectory(prefix="featherweight-bench-") as folder:
        place = Path(folder)
        first = run(place, "--time", "2m", stop_at=at, how=lambda pid: os.killpg(pid, signal.SIGKILL))
        lines = [row(f"kill -9 {at:g} s after the first trial began", place, first)]
        again = run(place, "--time", "2m", "--resume")
        return [*lines, row("the same command with --resume", place, again)]


def node_lost(at: float) -> Json:
    """One of two nodes is killed."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        head = {"resources": {"board": 1}, "include_dashboard": False}
        cluster.add_node(**_BOARD, **head, _system_config={"worker_niceness": 0})
        other = cluster.add_node(**_BOARD)
        with tempfile.TemporaryDirectory(prefix="featherweight-bench-") as folder:
            where = ("--cluster", cluster.address, "--workers", "2", "--device", "ray:board")
            ran = run(
                Path(folder),
                *where,
                *("--trials", "8", "--time", "2m"),
                stop_at=at,
                how=lambda pid: cluster.remove_node(other, allow_graceful=False),
            )
            again = [line for line in ran.said.splitlines() if "died; it is made again" in line]
            return row("one of two Ray nodes killed", Path(folder), ran, made_again=again)
    finally:
        cluster.shutdown()


HEADERS = (
    "case", "handed back", "exit code", "seconds", "after the signal", "trials", "known before", "drop",
    "bytes", "latency",
)  # fmt: skip


def cells(rows: Sequence[Json]) -> list[list[str]]:
    """The table's lines."""
    found = []
    for one in rows:
        after = "" if one["after_s"] is None else f"{one['after_s']:.1f} s"
        handed = "a whole folder" if one["delivered"] else "nothing"
        line = [one["case"], handed, str(one["code"]), f"{one['seconds']:.1f} s", after]
        if one["delivered"]:
            line += [f"{one['measured']} of {one['trials']}", str(one["resumed"]), f"{one['drop']:.2%}"]
            line += [f"{one['bytes']:,}", f"{one['latency_ratio']:.3f}"]
        found.append([*line, *[""] * (len(HEADERS) - len(line))])
    return found


def bars(rows: Sequence[Json]) -> list[Bar]:
    """The promises."""
    found = []
    for one in rows:
        about, whole = one["case"], one["half_written"] == 0
        found.append(Bar(about, "nothing half-written", str(one["half_written"]), whole))
        if "limit_s" in one:
            late = one["seconds"] / one["limit_s"]
            found.append(
                Bar(
                    about,
                    f"ends within {_LATE:g} x the time",
                    f"{late:.2f} x, exit code {one['code']}",
                    late <= _LATE,
                )
            )
        elif about.startswith("Ctrl-C"):
            said = f"exit code {one['code']} after {one['after_s']:.1f} s"
            kept = one["delivered"] and one["after_s"] <= _INTERRUPTED_S
            found.append(Bar(about, f"the best so far within {_INTERRUPTED_S:g} s", said, kept))
        elif "--resume" in about:
            said = f"{one.get('resumed', 0)} trials known"
            found.append(Bar(about, "goes on from the trials before", said, one.get("resumed", 0) > 0))
        elif "made_again" in one:
            lost = one["trials"] - one["measured"] if one["delivered"] else None
            said = f"{lost} trials not measured, {len(one['made_again'])} made again, exit code {one['code']}"
            found.append(Bar(about, "no trial is lost", said, lost == 0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", nargs="*", type=float, default=[30.0, 60.0, 300.0], help="limits, seconds")
    parser.add_argument("--at", type=float, default=15.0, help="seconds into the first trials to stop (15)")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases (all)")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what shells start in the background ignores it
    shown = Shown()
    tell_load(shown)
    rows: list[Json] = []
    cases: dict[str, list[Callable[[], Json | list[Json]]]] = {
        "limits": [lambda seconds=seconds: limited(seconds) for seconds in args.times],
        "interrupted": [lambda: interrupted(args.at)],
        "killed": [lambda: killed(args.at)],
        "node": [lambda: node_lost(args.at)],
    }
    for case in (case for name in CASES if name in args.only for case in cases[name]):
        made = case()
        for one in made if isinstance(made, list) else [made]:
            rows.append(one)
            shown.note(" ".join(cells([one])[0]))
    print(table(HEADERS, cells(rows)))
    finish("stopped", rows, bars(rows), {"times": args.times, "at": args.at}, 1)


if __name__ == "__main__":
    main()
