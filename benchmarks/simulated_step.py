"""What training quantized costs: steps of a simulated network in turn with those of its float originals."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Bar, Shown, finish, table, tell_load
from networks import TRAINED, load_network

from featherweight.engine.run import Run
from featherweight.engine.sources import load_sources
from featherweight.engine.store import Store
from featherweight.recipe import Recipe
from featherweight.runtime import Target
from featherweight.tools.simulated import Simulated

Json = Any
_BATCH = 64
_MOST = 2.0


def step_seconds(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Forward, loss and backward."""
    started = time.perf_counter()
    torch.nn.functional.cross_entropy(net(x)[0], y).backward()
    net.zero_grad()
    return time.perf_counter() - started


def _recipe(*steps: dict[str, Json]) -> Recipe:
    return Recipe.from_dict({"version": 1, "steps": list(steps)})


def row_of(name: str, rounds: int, folder: Path, shown: Shown) -> dict[str, Json]:
    """Seconds of a step of the network as it is, folded, and at W4A4."""
    known = load_network(name, folder, calibration=256, scored=256)
    sources = load_sources(known.spec, weights=str(known.weights), data=known.data)
    run = Run(sources.model, sources.data, Target("torch"), Store(folder / "store"))
    four = {"quantize": {"weights": "int4", "activations": "int4"}}
    nets = {
        "with batch norm": Simulated(run.original),
        "folded": Simulated(run.apply(_recipe({"fold": {}}))),
        "W4A4": Simulated(run.apply(_recipe({"fold": {}}, four))),
    }
    x, y = torch.rand(_BATCH, 1, 28, 28), torch.arange(_BATCH) % 10
    seen: dict[str, list[float]] = {kind: [] for kind in nets}
    for _ in shown.track(range(rounds + 1), name, rounds + 1):
        for kind, net in nets.items():
            seen[kind].append(step_seconds(net, x, y))
    times = {kind: np.array(values[1:]) for kind, values in seen.items()}  # the first one warms up
    ratios = {f"W4A4 / {kind}": float(np.median(times["W4A4"] / times[kind])) for kind in list(nets)[:2]}
    return {"network": name, "ms": {k: 1000 * float(np.median(v)) for k, v in times.items()}, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    shown = Shown()
    tell_load(shown)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row_of(name, rounds, Path(folder), shown) for name in TRAINED]
    kinds, ratios = list(rows[0]["ms"]), [name for name in rows[0] if " / " in name]
    lines = [
        (
            row["network"],
            *(f"{row['ms'][kind]:.0f}" for kind in kinds),
            *(f"{row[one]:.2f}" for one in ratios),
        )
        for row in rows
    ]
    print(table(("network", *(f"{kind}, ms" for kind in kinds), *ratios), lines))
    bars = [
        Bar(row["network"], f"{one} < {_MOST}", f"{row[one]:.2f}", row[one] < _MOST)
        for row in rows
        for one in ratios
    ]
    finish("simulated_step", rows, bars, {"rounds": rounds, "batch": _BATCH}, threads=1)


if __name__ == "__main__":
    main()
