"""What a runtime makes of fewer multiply-accumulates: the artifact's latency in turn with the original's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Bar, Parts, Shown
from fine_tuned import accuracy, run_of
from interleaved import against_original
from networks import TRAINED, load_network
from pruning_peers import Setting, torch_pruning

from featherweight.engine.run import Run
from featherweight.engine.sources import load_sources
from featherweight.engine.store import Store
from featherweight.engine.targets import fit_targets
from featherweight.method import Silent
from featherweight.model import Model
from featherweight.recipe import Recipe, Step
from featherweight.tools.costs import totals

Json = dict[str, Any]
_CALIBRATION = 48  # images of 224 px
_LATENCIES: Mapping[tuple[str, str, float], float] = {  # network, method, MACs -> asked latency ratio
    ("resnet20", "prune", 0.5): 0.80,
    ("resnet20", "prune", 0.25): 0.65,
    ("resnet20", "shrink, prune", 0.5): 0.60,
    ("resnet20", "shrink, prune", 0.25): 0.40,
    ("resnet18", "prune", 0.5): 0.60,
    ("resnet18", "prune", 0.25): 0.35,
}
_PEER = Setting("magnitude", "local")


@dataclass(frozen=True)
class Case:
    """One network at a fraction of its MACs.

    Attributes:
        network: Which one.
        method: How it got smaller, in words.
        macs: Fraction to keep.
        shrink: What goes before channels do, as parameters of ``shrink``; None: nothing.
        peer: Torch-Pruning's, not ours.
        round_to: Of the peer.
    """

    network: str
    method: str
    macs: float
    shrink: Mapping[str, Any] | None = None
    peer: bool = False
    round_to: int | None = None


def _cases() -> list[Case]:
    cases = []
    for network in ("resnet20", "resnet18"):
        for macs in (0.5, 0.25):
            cases.append(Case(network, "prune", macs))
            if network == "resnet20":  # blocks and kernels take most of the way, channels the rest
                smaller = {"macs": min(1.2 * macs, 0.7)}
                cases.append(Case(network, "shrink, prune", macs, smaller))
            cases.append(Case(network, "Torch-Pruning", macs, peer=True))
            cases.append(Case(network, "Torch-Pruning, rounded to 8", macs, peer=True, round_to=8))
    return cases


def _run(network: str, folder: Path) -> Run:
    if network in TRAINED:
        return run_of(network, 2000, folder)
    found = load_network(network, RESULTS / "work" / "weights", calibration=_CALIBRATION)
    sources = load_sources(found.spec, weights=str(found.weights), data=found.data)
    target = fit_targets("onnxruntime", 1, "local", "")[0]
    return Run(sources.model, sources.data, target, Store(folder), progress=Silent())


def _made(case: Case, run: Run) -> Model:
    if not case.peer:
        shrink = () if case.shrink is None else (Step("shrink", dict(case.shrink)),)
        left = totals(run.apply(Recipe(shrink)))["macs"] / totals(run.original)["macs"]
        amount: Json = {"macs": case.macs / left}
        if case.network not in TRAINED:  # its weights are random: widths count, not which channels go
            amount |= {"importance": "l2", "scope": "layer", "reconstruct": False}
        prune = () if left <= case.macs else (Step("prune", amount),)
        return run.apply(Recipe((*shrink, *prune)))
    shape = run.original.entries["forward"].example_inputs[0].shape
    images = torch.randn(2, *shape[1:]), torch.zeros(2, dtype=torch.long)
    pruned = torch_pruning(run.original, _PEER, case.macs, images, case.round_to)
    key = f"{run.original.key}-{case.method}-{case.macs}"
    return pruned.evolve(key=key)


def _row(case: Case, folder: Path, seconds: float, shown: Shown) -> Json:
    run = _run(case.network, folder / "store")
    model = _made(case, run)
    scored = accuracy(model.module, run.data) if case.network in TRAINED else None
    timed = against_original(run, model, seconds, folder / f"{case.network}-{case.method}-{case.macs}")
    seen, whole, left = timed.ratio, totals(run.original), totals(model)
    shown.note(f"{case.network}, {case.method} at {case.macs:g} of MACs: {seen.median:.3f} of the latency")
    return {
        "table": "latency",
        "network": case.network,
        "method": case.method,
        "asked_macs": case.macs,
        "macs": left["macs"] / whole["macs"],
        "params": left["params"] / whole["params"],
        "accuracy": scored,
        "ratio": seen.median,
        "ci95": seen.ci95,
        "original_ms": 1000 * timed.original_s,
    }


def rows_of(parts: Parts, folder: Path, seconds: float, shown: Shown) -> list[Json]:
    """All cases, one after the other: nothing else may run."""
    return [
        parts.get(
            f"latency-{case.network}-{case.method.replace(', ', '-')}-{case.macs}",
            partial(_row, case, folder, seconds, shown),
        )
        for case in _cases()
    ]


HEADERS = (
    "network",
    "made smaller by",
    "MACs",
    "params",
    "latency ratio",
    "95 %",
    "original, ms",
    "%, untuned",
)


def cells(rows: Sequence[Json]) -> list[list[str]]:
    """The table's rows."""
    return [
        [
            row["network"],
            row["method"],
            f"{row['macs']:.3f}",
            f"{row['params']:.3f}",
            f"{row['ratio']:.3f}",
            "" if row["ci95"] is None else f"[{row['ci95'][0]:.3f}, {row['ci95'][1]:.3f}]",
            f"{row['original_ms']:.2f}",
            "" if row["accuracy"] is None else f"{row['accuracy']:.2f}",
        ]
        for row in rows
    ]


def bars_of(rows: Sequence[Json]) -> list[Bar]:
    """The latencies that were asked for."""
    found = {(row["network"], row["method"], row["asked_macs"]): row["ratio"] for row in rows}
    return [
        Bar(f"{network}, {method} at {macs:g} of MACs", f"latency <= {most:g}", f"{seen:.3f}", seen <= most)
        for (network, method, macs), most in _LATENCIES.items()
        if (seen := found.get((network, method, macs))) is not None
    ]
