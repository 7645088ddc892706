"""Our int8 against ONNX Runtime's own static quantizer: bytes, latency, fidelity, accuracy (``make bench``).

Both quantize the same network with the same calibration examples, none of which is scored. Latency is
interleaved over all files in one process on one core. Nothing is asserted: the bars are printed, kept or not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, Bar, Parts, Shown, finish, table, tell_load
from interleaved import measure, ratio
from networks import NAMES, PACKAGED, TRAINED, Network, load_network
from peers import SETTINGS, quantize_onnxruntime

from featherweight.engine.quality import Scored, quality, score_artifact
from featherweight.engine.run import Run
from featherweight.engine.sources import load_sources
from featherweight.engine.store import Store
from featherweight.engine.timing import summarize
from featherweight.recipe import Recipe
from featherweight.runtime import Artifact, Target

METHODS = ("float", "featherweight", *SETTINGS)


@dataclass(frozen=True)
class Settings:
    """What the rows depend on; None: the default of the network at hand."""

    seconds: float
    threads: int
    calibration: int | None
    scored: int | None

    def calibrating(self, network: str) -> int:
        return self.calibration or (
            256 if network in TRAINED else 64
        )  # the peer keeps all activations in memory


def rows_of(name: str, settings: Settings, shown: Shown) -> list[dict[str, Any]]:
    """One row for each method on one network."""
    work = RESULTS / "work"
    samples = settings.calibrating(name)
    network = load_network(name, work / "weights", calibration=samples, scored=settings.scored)
    folder = work / "int8" / name
    shutil.rmtree(folder, ignore_errors=True)
    target = Target(threads=settings.threads).resolved()
    with tempfile.TemporaryDirectory() as temporary:
        shown.note(f"{name}: loading, quantizing with {samples} examples; scored: {network.examples}")
        artifacts, seconds, run = _artifacts(network, target, samples, folder, Path(temporary), shown)
        judged = _judged(artifacts, run, Path(temporary), shown)
        shown.note(f"{name}: timing, at most {settings.seconds:g} s")
        began = time.monotonic()
        assert run.data.scored is not None
        rounds = measure(
            artifacts,
            target,
            run.data.scored.inputs[0].take(np.arange(1)),
            pairs=[("featherweight", peer) for peer in SETTINGS],
            seconds=settings.seconds,
            folder=Path(temporary) / "timing",
            said=lambda done: shown.far(f"{name}: timing", done, began),
        )
    return _rows(network, artifacts, seconds, judged, rounds, samples)


def _artifacts(
    network: Network, target: Target, samples: int, folder: Path, temporary: Path, shown: Shown
) -> tuple[dict[str, Artifact], dict[str, float], Run]:
    """The float file, ours and the peers', and how long each one took to quantize."""
    sources = load_sources(network.spec, weights=network.weights and str(network.weights), data=network.data)
    run = Run(sources.model, sources.data, target, Store(temporary / "store"), progress=shown)
    artifacts, seconds = {"float": run.lower(run.original)}, {"float": 0.0}
    recipe = Recipe.from_dict({"version": 1, "steps": [{"fold": {}}, {"quantize": {"samples": samples}}]})
    started = time.perf_counter()
    artifacts["featherweight"] = run.lower(run.apply(recipe))
    seconds["featherweight"] = time.perf_counter() - started
    examples = np.concatenate([batch[0] for batch in run.data.calibration(samples)])
    for setting in SETTINGS:
        shown.note(f"{network.name}: {setting}")
        artifacts[setting], seconds[setting] = quantize_onnxruntime(
            artifacts["float"].folder / artifacts["float"].files[0],
            folder / setting,
            setting,
            examples,
            reduce_range=target.isa in ("avx2", "avx512", "generic"),
        )
    for name in ("float", "featherweight"):  # kept beside the peers', to look into
        (folder / name).mkdir(parents=True)
        for file in artifacts[name].files:
            shutil.copy2(artifacts[name].folder / file, folder / name / file)
        artifacts[name] = replace(artifacts[name], folder=folder / name)
    return artifacts, seconds, run


def _judged(artifacts: Mapping[str, Artifact], run: Run, temporary: Path, shown: Shown) -> dict[str, Any]:
    """Quality of each artifact through its own session, against the float file."""
    scored: dict[str, Scored] = {}
    for name in shown.track(METHODS, "scoring", len(METHODS)):
        scored[name] = score_artifact(
            artifacts[name],
            run.target,
            run.data,
            temporary / "scores" / name,
            original=scored.get("float"),
        )
    return {name: quality(run.data, scored["float"], one) for name, one in scored.items()}


def _rows(
    network: Network,
    artifacts: Mapping[str, Artifact],
    seconds: Mapping[str, float],
    judged: Mapping[str, Any],
    rounds: Mapping[str, list[float]],
    samples: int,
) -> list[dict[str, Any]]:
    faster = min(SETTINGS, key=lambda name: ratio(rounds, name, "float").median)
    rows = []
    for name in METHODS:
        latency, to_float, to_peer = (
            summarize(rounds[name]),
            ratio(rounds, name, "float"),
            ratio(rounds, name, faster),
        )
        seen = judged[name]
        rows.append(
            {
                "network": network.name,
                "method": name,
                "bytes": artifacts[name].bytes,
                "bytes_ratio": artifacts[name].bytes / artifacts["float"].bytes,
                "latency_s": {"median": latency.median, "q1": latency.q1, "q3": latency.q3},
                "rounds": len(rounds[name]),
                "to_float": to_float.median,
                "to_float_ci95": to_float.ci95,
                "faster_peer": faster,
                "to_peer": to_peer.median,
                "to_peer_ci95": to_peer.ci95,
                "sqnr_db": seen.sqnr_db,
                "agreement": seen.agreement,
                "accuracy": seen.quality if network.labelled else None,
                "drop_points": 100 * seen.quality_drop if network.labelled else None,
                "drop_points_ci95": [100 * end for end in seen.quality_drop_ci95]
                if network.labelled
                else None,
                "seconds": seconds[name],
                "calibration": samples,
                "scored": network.examples,
            }
        )
    return rows


# ---- what is printed

HEADERS = (
    "network", "method", "bytes", "/ fp32", "latency ms", "[q1, q3]", "/ fp32", "/ ORT's faster [95 %]",
    "SQNR dB", "agreement", "score", "drop, points", "quantized in",
)  # fmt: skip


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    latency, is_float = row["latency_s"], row["method"] == "float"
    interval = row["to_peer_ci95"] or (float("nan"), float("nan"))
    peer = f"{row['to_peer']:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
    return (
        row["network"],
        row["method"],
        f"{row['bytes']:,}",
        f"{row['bytes_ratio']:.3f}",
        f"{1e3 * latency['median']:.3f}",
        f"[{1e3 * latency['q1']:.3f}, {1e3 * latency['q3']:.3f}]",
        f"{row['to_float']:.3f}",
        "1" if row["method"] == row["faster_peer"] else peer,
        "" if is_float else f"{row['sqnr_db']:.2f}",
        "" if is_float or row["agreement"] is None else f"{row['agreement']:.2%}",
        "" if row["accuracy"] is None else f"{row['accuracy']:.2%}",
        "" if row["drop_points"] is None or is_float else f"{row['drop_points']:+.2f}",
        "" if is_float else f"{row['seconds']:.1f} s",
    )


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """The promises, network by network."""
    found = []
    for name in dict.fromkeys(row["network"] for row in rows):
        by = {row["method"]: row for row in rows if row["network"] == name}
        ours, peers = by["featherweight"], [by[setting] for setting in SETTINGS]
        interval = ours["to_peer_ci95"]
        words = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
        found.append(
            Bar(
                name,
                "latency <= 1.05 x ONNX Runtime's own faster setting",
                f"{ours['to_peer']:.3f}{words} x {ours['faster_peer']}",
                ours["to_peer"] <= 1.05,
            )
        )
        best = max(peers, key=lambda row: row["sqnr_db"])
        found.append(
            Bar(
                name,
                "SQNR >= ONNX Runtime's own better setting",
                f"{ours['sqnr_db']:.2f} dB, {best['method']} {best['sqnr_db']:.2f} dB",
                ours["sqnr_db"] >= best["sqnr_db"],
            )
        )
        if name == "resnet20":
            found += _resnet20(ours)
    return found


def _resnet20(ours: Mapping[str, Any]) -> list[Bar]:
    return [
        Bar("resnet20", "latency < 0.85 x fp32", f"{ours['to_float']:.3f}", ours["to_float"] < 0.85),
        Bar("resnet20", "bytes <= 0.30 x fp32", f"{ours['bytes_ratio']:.3f}", ours["bytes_ratio"] <= 0.30),
        Bar(
            "resnet20",
            "drop <= 0.3 points",
            f"{ours['drop_points']:+.2f} on {ours['scored']}",
            ours["drop_points"] <= 0.3,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=[*NAMES, *PACKAGED], default=list(NAMES))
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="longest timing of a network (default 40)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calibration", type=int, help="examples (default 256 for the examples, else 64)")
    parser.add_argument("--scored", type=int, help="examples (default all of the examples, 128 of 224 px)")
    parser.add_argument("--quick", action="store_true", help="few examples, little time: numbers mean little")
    args = parser.parse_args()
    settings = Settings(args.seconds, args.threads, args.calibration, args.scored)
    if args.quick:
        settings = Settings(4.0, args.threads, args.calibration or 32, args.scored or 64)
    shown = Shown()
    tell_load(shown)
    described = vars(settings)
    parts = Parts("int8", described, shown)
    rows: list[dict[str, Any]] = []
    for name in args.networks:
        rows += parts.get(name, lambda name=name: rows_of(name, settings, shown))
    print(table(HEADERS, [cells(row) for row in rows]))
    for words in dict.fromkeys(f"{row['network']}: scored on {row['scored']}" for row in rows):
        print(words)
    finish("int8", rows, bars(rows), {**described, "cpus": os.cpu_count()}, args.threads)
    parts.forget()


if __name__ == "__main__":
    main()
