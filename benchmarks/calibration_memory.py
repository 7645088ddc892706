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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import Bar, Parts, Shown, finish, table, tell_load

LIMIT = 0.05
_MB = 1e6


def examples(count: int) -> Iterator[np.ndarray]:
    """Images one after the other, as a user's own reader would give them; none is kept."""
    for index in range(count):
        random = np.random.default_rng(index)
        yield random.uniform(0, 1, (1, 1, 28, 28)).astype(np.float32) ** 2


def child(count: int) -> dict[str, int]:
    """Quantize with so many examples; resident bytes before, and at the peak."""
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
    with tempfile.TemporaryDirectory() as folder:
        run = Run(sources.model, sources.data, Target(), Store(Path(folder)))
        model = find_method("fold")().apply(sources.model, run.context())
        trace(model)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = _resident("VmRSS")
        find_method("quantize")(samples=count).apply(model, run.context())
        return {"before": before, "peak": _resident("VmHWM")}


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measured(count: int, repeat: int, shown: Shown) -> dict[str, Any]:
    """Medians over fresh processes."""
    seen = []
    for turn in range(repeat):
        shown.note(f"{count} examples, {turn + 1} of {repeat}")
        command = [sys.executable, "-W", "ignore", __file__, "--child", str(count)]
        seen.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return {
        "examples": count,
        "above": statistics.median(one["peak"] - one["before"] for one in seen),
        "peak": statistics.median(one["peak"] for one in seen),
        "runs": seen,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="once each")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(child(args.child)))
        return
    repeat = 1 if args.quick else args.repeat
    shown = Shown()
    tell_load(shown)
    settings = {"examples": args.examples, "repeat": repeat}
    parts = Parts("calibration_memory", settings, shown)
    rows = [
        parts.get(str(count), lambda count=count: measured(count, repeat, shown)) for count in args.examples
    ]
    least, first = rows[0]["above"], rows[0]["peak"]
    lines = [
        (
            "resnet20",
            f"{row['examples']:,}",
            f"{row['above'] / _MB:.1f}",
            f"{row['above'] / least - 1:+.1%}",
            f"{row['peak'] / _MB:.1f}",
            f"{row['peak'] / first - 1:+.1%}",
        )
        for row in rows
    ]
    print(table(("network", "examples", "calibration MB", "growth", "process MB", "growth"), lines))
    words = f"from {args.examples[0]:,} to {args.examples[-1]:,} examples"
    bars = [
        Bar(
            "resnet20",
            f"{what} grows by < {LIMIT:.0%} {words}",
            f"{rows[-1][key] / start - 1:+.1%}",
            rows[-1][key] / start - 1 < LIMIT,
        )
        for what, key, start in (
            ("peak of calibration", "above", least),
            ("peak of the process", "peak", first),
        )
    ]
    finish("calibration_memory", rows, bars, settings, threads=1)
    parts.forget()


if __name__ == "__main__":
    main()
