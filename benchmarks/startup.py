"""How long the command line takes to answer ``--help``, and a finished ``fit`` to be run again."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Bar, Shown, finish, table, tell_load
from networks import EXAMPLES

HELP_S, RERUN = 0.6, 0.10
_RECIPE = "version: 1\nsteps:\n  - fold: {}\n  - quantize: {}\n"


def seconds(command: Sequence[str], environment: dict[str, str]) -> float:
    """Wall time of a command that must succeed."""
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):  # 3: finished, the budget is not met
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


def fits(folder: Path) -> dict[str, list[str]]:
    """Commands, by what they are called in the table."""
    program = str(Path(sys.executable).with_name("featherweight"))
    model = [f"{EXAMPLES / 'nets.py'}:resnet20", "--weights", str(EXAMPLES / "resnet20.safetensors")]
    fit = [program, "fit", *model, "--data", str(EXAMPLES / "data.npz"), "--quiet"]
    recipe = folder / "recipe.yaml"
    recipe.write_text(_RECIPE)
    return {
        "fit, one trial": [*fit, "--recipe", str(recipe), "--out", str(folder / "one")],
        "fit, three trials": [*fit, "--trials", "3", "--max-drop", "0.5%", "--out", str(folder / "three")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--repeat", type=int, default=10, help="of --help (default 10); a rerun: a third of it"
    )
    parser.add_argument("--quick", action="store_true", help="three times, one trial only")
    args = parser.parse_args()
    repeat = 3 if args.quick else args.repeat
    shown = Shown()
    tell_load(shown)
    program = str(Path(sys.executable).with_name("featherweight"))
    seconds([program, "--help"], dict(os.environ))  # writes bytecode, fills the disk's cache
    helps = [
        seconds([program, "--help"], dict(os.environ)) for _ in shown.track(range(repeat), "--help", repeat)
    ]
    rows: list[dict[str, Any]] = [{"command": "--help", "seconds": statistics.median(helps), "runs": helps}]
    bars = [Bar("--help", f"<= {HELP_S} s", f"{rows[0]['seconds']:.2f} s", rows[0]["seconds"] <= HELP_S)]
    with tempfile.TemporaryDirectory() as temporary:
        environment = {**os.environ, "FEATHERWEIGHT_CACHE": f"{temporary}/cache"}
        commands = fits(Path(temporary))
        for name in list(commands)[: 1 if args.quick else None]:
            shown.note(f"{name}: first run")
            first = seconds(commands[name], environment)
            shown.note(f"{name}: again")
            again = [seconds(commands[name], environment) for _ in range(max(1, repeat // 3))]
            share = statistics.median(again) / first
            rows.append({"command": name, "seconds": first, "again": statistics.median(again), "runs": again})
            bars.append(
                Bar(name, f"run again <= {RERUN:.0%} of the first run", f"{share:.1%}", share <= RERUN)
            )
    lines = [
        (row["command"], f"{row['seconds']:.2f}", f"{row['again']:.2f}" if "again" in row else "")
        for row in rows
    ]
    print(table(("command", "seconds", "again, seconds"), lines))
    finish("startup", rows, bars, {"repeat": repeat}, threads=1)


if __name__ == "__main__":
    main()
