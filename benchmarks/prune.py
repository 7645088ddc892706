"""Smaller networks: ours beside Torch-Pruning, and what the runtime makes of them (``make bench-prune``).

Both sides prune the same trained network to the same multiply-accumulates and are fine-tuned by the same loop
on the same images with the same seeds: once with labels only, once distilled from the original. Each side has
the learning rate that suits it, the best of three on one seed; Torch-Pruning has the best of nine settings,
chosen by one epoch. What is best is told by training images that nobody trains on. Latency is that of ONNX
Runtime, in turn with the original. Nothing is asserted: bars are printed, kept or not, and losing rows stay.
An interrupted run goes on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import prune_latency
from common import Bar, Parts, Shown, finish, table, tell_load
from fine_tuned import Job, grouped, mean_and_ends, options, original_accuracy, rows_of
from pruning_peers import SETTINGS, Setting

Json = dict[str, Any]
TABLES = ("accuracy", "latency")
NETWORKS = ("resnet20", "depthwise")
_AHEAD = {0.5: 0.2, 0.25: 0.5}  # points that ours is to be ahead after fine-tuning, by MACs
_RATES = (0.005, 0.02, 0.08)
_BEFORE = 70.0  # percent that ResNet-20 keeps at half the MACs without any fine-tuning


@dataclass(frozen=True)
class Settings:
    """What the parts depend on.

    Attributes:
        examples: Training images.
        epochs: Of the fine-tuning.
        seeds: Of the fine-tuning.
        macs: Fractions to keep.
        peers: Torch-Pruning's settings to choose from.
        rates: Of learning, to choose from.
    """

    examples: int
    epochs: int
    seeds: tuple[int, ...]
    macs: tuple[float, ...]
    peers: tuple[Setting, ...]
    rates: tuple[float, ...] = _RATES


def accuracy_rows(
    settings: Settings, networks: Sequence[str], parts: Parts, folder: Path, workers: int, shown: Shown
) -> list[Json]:
    """All runs of both sides; which setting suits the peer, and which rate suits each side, come first."""
    rows: list[Json] = []

    def ran(name: str, jobs: Sequence[Job]) -> list[tuple[Job, Json]]:
        found = rows_of(jobs, parts, folder, workers, shown)
        rows.extend({"table": name, **row} for row in found)
        return list(zip(jobs, found, strict=True))

    cases = [(network, macs) for network in networks for macs in settings.macs]
    tried = ran(
        "trial",
        [
            Job(network, macs, peer, False, 0, 1, settings.examples, settings.rates[len(settings.rates) // 2])
            for network, macs in cases
            for peer in settings.peers
        ],
    )
    peers = _best(tried, lambda job: (job.network, job.macs))
    rated = ran(
        "rate",
        [
            replace(best, peer=peer, teacher=teacher, epochs=settings.epochs, rate=rate)
            for best in peers
            for teacher in (False, True)
            for peer in (best.peer, None)
            for rate in settings.rates
        ],
    )
    chosen = _best(rated, lambda job: (job.network, job.macs, job.teacher, job.peer))
    for job in chosen:
        side = "ours" if job.peer is None else f"Torch-Pruning ({job.peer})"
        terms = "teacher" if job.teacher else "labels"
        shown.note(f"{job.network} at {job.macs:g} of MACs, {terms}: {side} at a rate of {job.rate:g}")
    ran("accuracy", [replace(job, seed=seed) for job in chosen for seed in settings.seeds])
    original = {
        network: parts.get(f"original-{network}", partial(original_accuracy, network)) for network in networks
    }
    return [{"original": original[row["network"]], **row} for row in rows]


def _best(pairs: Sequence[tuple[Job, Json]], case: Callable[[Job], Hashable]) -> list[Job]:
    """Of each case, the job that does best on the images held out."""
    found: dict[Hashable, tuple[Job, Json]] = {}
    for job, row in pairs:
        best = found.setdefault(case(job), (job, row))
        if row["held_out"] > best[1]["held_out"]:
            found[case(job)] = job, row
    return [job for job, _ in found.values()]


HEADERS = (
    "network",
    "pruned by",
    "MACs",
    "params",
    "terms",
    "rate",
    "before, %",
    "+ BN stats, %",
    "after, %",
    "drop",
)


def cells(rows: Sequence[Json]) -> list[list[str]]:
    """The table's rows: mean and ends over seeds."""
    shown = []
    for (network, _, peer, teacher), mine in grouped(rows, ("network", "macs", "peer", "teacher")):
        first = mine[0]
        after = [row["after"] for row in mine]
        shown.append(
            [
                network,
                "ours" if peer is None else f"Torch-Pruning ({peer})",
                f"{first['macs_left']:.3f}",
                f"{first['params_left']:.3f}",
                "teacher" if teacher else "labels",
                f"{first['rate']:g}",
                f"{first['before']:.2f}",
                f"{first['before_bn']:.2f}",
                mean_and_ends(after),
                f"{first['original'] - sum(after) / len(after):.2f}",
            ]
        )
    return shown


def bars_of(rows: Sequence[Json]) -> list[Bar]:
    """Ours against the peer, terms by terms, and before any fine-tuning."""
    bars: list[Bar] = []
    chosen = [row for row in rows if row["table"] == "accuracy"]
    for (network, macs, teacher), mine in grouped(chosen, ("network", "macs", "teacher")):
        ours = [row["after"] for row in mine if row["peer"] is None]
        theirs = [row["after"] for row in mine if row["peer"] is not None]
        ahead = sum(ours) / len(ours) - sum(theirs) / len(theirs)
        least = _AHEAD.get(macs, 0.0)
        bars.append(
            Bar(
                f"{network} at {macs:g} of MACs, {'teacher' if teacher else 'labels'}",
                f"ours is at least {least:g} points above Torch-Pruning",
                f"{ahead:+.2f}",
                ahead >= least,
            )
        )
    for row in chosen:
        if row["network"] == "resnet20" and row["peer"] is None and row["macs"] == 0.5:
            seen = f"{row['before']:.1f} %"
            asked = f"before fine-tuning, from unlabelled images: at least {_BEFORE:g} %"
            bars.append(Bar("resnet20 at 0.5 of MACs", asked, seen, row["before"] >= _BEFORE))
            break
    return bars


def main() -> None:
    parser = options(__doc__, TABLES, epochs=3)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    args = parser.parse_args()
    shown = Shown()
    tell_load(shown)
    settings = Settings(args.examples, args.epochs, tuple(args.seeds), (0.5, 0.25), tuple(SETTINGS))
    if args.quick:
        settings = Settings(2000, 1, (0,), (0.5,), (SETTINGS[0], SETTINGS[3]), _RATES[1:2])
    parts, rows, bars = Parts("prune", asdict(settings), shown), list[Json](), list[Bar]()
    with tempfile.TemporaryDirectory(prefix="featherweight-bench-") as folder:
        if "latency" in args.tables:
            timed = prune_latency.rows_of(parts, Path(folder), 5.0 if args.quick else args.seconds, shown)
            print("\nlatency on ONNX Runtime, one thread, in turn with the original")
            print(table(prune_latency.HEADERS, prune_latency.cells(timed)))
            rows, bars = rows + timed, bars + prune_latency.bars_of(timed)
        if "accuracy" in args.tables:
            networks = args.networks[:1] if args.quick else args.networks
            found = accuracy_rows(settings, networks, parts, Path(folder), args.workers, shown)
            chosen = [row for row in found if row["table"] == "accuracy"]
            print(f"\nFashion-MNIST, {settings.epochs} epochs of {settings.examples} images, 10,000 tested,")
            print(
                f"seeds {', '.join(map(str, settings.seeds))}: mean and ends; accuracy in float32 by PyTorch"
            )
            print(table(HEADERS, cells(chosen)))
            rows, bars = rows + found, bars + bars_of(found)
    finish("prune", rows, bars, {**asdict(settings), "peers": list(map(str, settings.peers))}, 1)
    if set(args.tables) == set(TABLES):
        parts.forget()


if __name__ == "__main__":
    main()
