"""Peak memory of calibrating ResNet-20 with examples from a generator: it must not grow with their number.

Each number of examples is a fresh process. What counts is the peak of the resident memory above what was
resident once everything was imported and the network was loaded, folded and traced.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, Bar, Parts, Shown, finish, table, tell_load

LIMIT = 0.05
WHOLE = ("equalize", "quantize", "rounding")
_MB = 1e6


def examples(count: int) -> Iterator[np.ndarray]:
    """Images one after the other, as a user's own reader would give them; none is kept."""
    for index in range(count):
        random = np.random.default_rng(index)
        yield random.uniform(0, 1, (1, 1, 28, 28)).astype(np.float32) ** 2


def child(count: int, steps: Sequence[str]) -> dict[str, int]:
    """Apply steps with so many examples; resident bytes before, and at the peak."""
    import gc
    import tempfile

    from networks import EXAMPLES

    from featherweight.data import Data
    from featherweight.engine.run import Run
    from featherweight.engine.sources import load_sources
    from featherweight.engine.store import Store
    from featherweight.graph import trace
    from featherweight.plugins import find_method
    from featherweight.runtime import Target

    scored = np.concatenate(list(examples(2)))
    data = Data.of(x=scored, calibration=lambda: examples(count))
    sources = load_sources(
        f"{EXAMPLES / 'nets.py'}:resnet20", weights=str(EXAMPLES / "resnet20.safetensors"), data=data
    )
    with tempfile.TemporaryDirectory(dir=RESULTS / "work") as folder:
        run = Run(sources.model, sources.data, Target(), Store(Path(folder)))
        model = run.step(run.original, find_method("fold")())
        trace(model)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = _resident("VmRSS")
        with _Watched() as watched:
            for step in steps:
                model = run.step(model, find_method(step)(samples=count))
        return {"before": before, "peak": _resident("VmHWM"), "own": watched.peak}


class _Watched:
    """The most memory that belongs to this process alone: mapped files, which the kernel may drop, aside."""

    def __init__(self) -> None:
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(0.01):
            self.peak = max(self.peak, _resident("RssAnon"))

    def __enter__(self) -> _Watched:
        self.peak = _resident("RssAnon")
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measured(count: int, repeat: int, shown: Shown, steps: Sequence[str] = ("quantize",)) -> dict[str, Any]:
    """Medians over fresh processes."""
    seen = []
    (RESULTS / "work").mkdir(parents=True, exist_ok=True)
    for turn in range(repeat):
        shown.note(f"{count} examples, {turn + 1} of {repeat}: {', '.join(steps)}")
        command = [sys.executable, "-W", "ignore", __file__, "--child", str(count), "--steps", *steps]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{count} examples: {done.stderr.strip().splitlines()[-1:]}")
        seen.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        "examples": count,
        "steps": list(steps),
        "above": statistics.median(one["peak"] - one["before"] for one in seen),
        "peak": statistics.median(one["peak"] for one in seen),
        "own": statistics.median(one["own"] for one in seen),
        "runs": seen,
    }


HEADERS = ("network", "examples", "calibration MB", "growth", "process MB", "growth", "own MB", "growth")


def cells(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line for each number of examples."""
    lines = []
    for row in rows:
        shown = [
            (f"{row[key] / _MB:.1f}", f"{row[key] / rows[0][key] - 1:+.1%}")
            for key in ("above", "peak", "own")
        ]
        lines.append(("resnet20", f"{row['examples']:,}", *(cell for pair in shown for cell in pair)))
    return lines


def bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """Memory that does not grow with the number of examples."""
    words = f"from {rows[0]['examples']:,} to {rows[-1]['examples']:,} examples"
    what = {"above": "peak of calibration", "peak": "peak of the process"}
    if rows[0]["steps"] != ["quantize"]:  # cached inputs are mapped: resident while there is room
        what = {"own": "peak of memory other than mapped files"}
    return [
        Bar(
            f"resnet20, {' -> '.join(rows[0]['steps'])}",
            f"{name} grows by < {LIMIT:.0%} {words}",
            f"{rows[-1][key] / rows[0][key] - 1:+.1%}",
            rows[-1][key] / rows[0][key] - 1 < LIMIT,
        )
        for key, name in what.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="once each")
    parser.add_argument("--steps", nargs="+", default=["quantize"], help="after fold (default quantize)")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(child(args.child, args.steps)))
        return
    repeat = 1 if args.quick else args.repeat
    shown = Shown()
    tell_load(shown)
    settings = {"examples": args.examples, "repeat": repeat, "steps": args.steps}
    parts = Parts("calibration_memory", settings, shown)
    rows = [
        parts.get(str(count), lambda count=count: measured(count, repeat, shown, args.steps))
        for count in args.examples
    ]
    print(table(HEADERS, cells(rows)))
    finish("calibration_memory", rows, bars(rows), settings, threads=1)
    parts.forget()


if __name__ == "__main__":
    main()
