"""Wall time of a ``fit`` to int8 with one trial, measuring aside, against NNCF's ``quantize``.

Each run is a fresh process; the tools take turns. The same network, samples and batch size for all. Ours
loads and traces the network, folds, quantizes, and lowers the int8 file and the float twin to ONNX. NNCF's
figure is ``nncf.quantize`` alone, and beside it what leads from the same module to such files. Importing is
shown apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
from common import HERE, RESULTS, Bar, Parts, Shown, finish, table, tell_load
from networks import NAMES, TRAINED, Network, load_network
from quantize_once import TOOLS

WORK = RESULTS / "work" / "quantize_time"
BATCH = 32
PIPELINE = ("load", "trace", "fold", "quantize", "lower float", "lower int8")
ASIDE = ("imports", "measuring", "compile")
LIMIT = 1.5


def prepare(name: str, samples: int) -> dict[str, Any]:
    """Files that every tool reads: examples as .npz, weights, the float network as ONNX."""
    WORK.mkdir(parents=True, exist_ok=True)
    network: Network = load_network(name, RESULTS / "work" / "weights", calibration=samples, scored=BATCH)
    scored = network.data.scored
    assert scored is not None
    examples = np.concatenate([batch[0] for batch in network.data.calibration()])
    arrays = {"x": scored.take(np.arange(len(scored)))[0], "x_calibration": examples}
    if scored.targets is not None:
        arrays["y"] = scored.targets
    data = WORK / f"{name}.npz"
    np.savez(data, **arrays)
    return {
        "spec": network.spec,
        "weights": str(network.weights),
        "data": str(data),
        "samples": len(examples),
        "batch": BATCH,
    }


def once(tool: str, job: dict[str, Any], cores: list[int]) -> dict[str, Any]:
    """Seconds by part of one run, or the error."""
    job_file, out = WORK / "job.json", WORK / "once.json"
    out.unlink(missing_ok=True)
    job_file.write_text(json.dumps({**job, "started": time.time()}))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "quantize_once.py"), tool, str(job_file), str(out)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        check=False,
    )
    if done.returncode == 0:
        seen: dict[str, Any] = json.loads(out.read_text())
        return seen
    last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return {"error": last[0]}


def rows_of(name: str, args: argparse.Namespace, shown: Shown) -> list[dict[str, Any]]:
    """One row for each tool, medians over the repetitions."""
    samples = args.samples or (256 if name in TRAINED else 64)
    shown.note(f"{name}: preparing")
    job = prepare(name, samples)
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
    for repetition in range(args.repeat):
        for turn in range(len(TOOLS)):
            tool = TOOLS[(turn + repetition) % len(TOOLS)]
            shown.note(f"{name}: {tool}, {repetition + 1} of {args.repeat}")
            runs[tool].append(once(tool, job, cores))
    return [_row(name, tool, seen, samples, len(cores)) for tool, seen in runs.items()]


def _row(name: str, tool: str, seen: list[dict[str, Any]], samples: int, cores: int) -> dict[str, Any]:
    row = {"network": name, "tool": tool, "samples": samples, "cores": cores, "runs": seen}
    good = [one for one in seen if "error" not in one]
    if not good:
        return {**row, "error": seen[-1]["error"]}
    names = list(dict.fromkeys(part for one in good for part in one["parts"]))
    parts = {part: statistics.median(one["parts"].get(part, 0.0) for one in good) for part in names}

    def total(chosen: list[str]) -> float:
        return statistics.median(sum(one["parts"].get(part, 0.0) for part in chosen) for one in good)

    return {
        **row,
        "parts": parts,
        "pipeline": total(list(PIPELINE)),
        "quantize": total(["quantize"]),
        "aside": total([part for part in names if part not in ASIDE]),
        "whole": statistics.median(
            one["whole"] - sum(one["parts"].get(part, 0.0) for part in ASIDE[1:]) for one in good
        ),
    }


HEADERS = (
    *("network", "tool", *PIPELINE, "sum, s"),
    *("store, report", "less measuring, imports", "with imports"),
)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    if "error" in row:
        return (row["network"], row["tool"], "failed", *[""] * (len(HEADERS) - 3))
    parts = row["parts"]
    rest = sum(parts.get(part, 0.0) for part in ("report", "rest"))
    return (
        row["network"],
        row["tool"],
        *[f"{parts[part]:.2f}" if part in parts else "" for part in PIPELINE],
        f"{row['pipeline']:.2f}",
        f"{rest:.2f}" if rest else "",
        f"{row['aside']:.2f}",
        f"{row['whole']:.2f}",
    )


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """Load to lower, against each back end's quantize alone, and against the same way to a file."""
    found = []
    for name in dict.fromkeys(row["network"] for row in rows):
        by = {row["tool"]: row for row in rows if row["network"] == name}
        ours = by["featherweight"]
        references = [(peer, "quantize", f"{peer}'s quantize alone") for peer in TOOLS[1:]]
        references.append(("nncf-onnx", "pipeline", "nncf-onnx from module to file"))
        for peer, key, words in references:
            asked = f"load to lower <= {LIMIT} x {words}"
            if "error" in ours or "error" in by[peer]:
                found.append(Bar(name, asked, "failed", None))
                continue
            mine, its = ours["pipeline"], by[peer][key]
            share = mine / its
            found.append(Bar(name, asked, f"{mine:.2f} s / {its:.2f} s = {share:.2f}", share <= LIMIT))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=["resnet20", "resnet18"])
    parser.add_argument("--samples", type=int, help="calibration examples (default 256, 64 of 224 px)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="cores that a process may use (default all)"
    )
    parser.add_argument("--quick", action="store_true", help="once each, 32 samples: numbers mean little")
    args = parser.parse_args()
    if args.quick:
        args.repeat, args.samples = 1, args.samples or 32
    shown = Shown()
    tell_load(shown)
    settings = {key: value for key, value in vars(args).items() if key != "networks"}
    parts = Parts("quantize_time", settings, shown)
    rows: list[dict[str, Any]] = []
    for name in args.networks:
        rows += parts.get(name, lambda name=name: rows_of(name, args, shown))
    print(table(HEADERS, [cells(row) for row in rows]))
    for row in rows:
        if "error" in row:
            print(f"{row['network']}, {row['tool']}: {row['error']}")
    finish("quantize_time", rows, bars(rows), settings, args.threads)
    parts.forget()


if __name__ == "__main__":
    main()
