"""What ``fit`` chooses by itself on four networks, and beside it each runtime's own quantizers.

``python benchmarks/fit.py`` (``make bench-fit``). The trained examples are given Fashion-MNIST's 60,000
training images, half a point of accuracy and 20 minutes; its full test set is scored. ResNet-18 (random
weights) and EfficientNet-Lite0 have no labels and no training data: one point of agreement, 10 minutes. On
these two every quantizer that comes with a runtime makes its own artifacts of the same calibration examples;
they are scored by the same examples and timed in turn with ours. Each fit's folder stays in results/work/fit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, Bar, Parts, Shown, finish, table, tell_load
from networks import EFFICIENTNET, EXAMPLES, TRAINED, fashion, load_network, read_idx
from quantize_recipes import Bench
from quantize_subjects import Subject, subject
from runtime_peers import PEERS

from featherweight import api
from featherweight.data import Data
from featherweight.engine.delivered import delivered
from featherweight.engine.paced import Entrant, measure_paced
from featherweight.engine.template import early, shape_of
from featherweight.engine.timing import Limits
from featherweight.outcome import Budget
from featherweight.runtime import Artifact, Target

Json = dict[str, Any]
NETWORKS = ("resnet20", "depthwise", "resnet18", EFFICIENTNET)
_CALIBRATION = 100  # examples that calibrate, where nothing trains
_VIEWS = 1000
_SYNTHETIC = 500
OURS, AGAIN, FIRST = "fit", "fit, in turn with these", "fit's first answer"
_NNCF, _AS_LONG = "nncf-performance", 1.5


@dataclass(frozen=True)
class Asked:
    """What one network is asked for.

    Attributes:
        minutes: Of the fit.
        drop: Largest quality drop.
        faster: Promised: latency of the float twin by that of the artifact; 0: nothing.
        smaller: The same for bytes.
        packed: The same for bytes behind zstd.
    """

    minutes: float
    drop: float
    faster: float = 0.0
    smaller: float = 0.0
    packed: float = 0.0


ASKED: Mapping[str, Asked] = {
    "resnet20": Asked(20, 0.005, 3.0, 8.0, 16.0),
    "depthwise": Asked(20, 0.005, 1.8, 5.0),
    "resnet18": Asked(10, 0.01),
    EFFICIENTNET: Asked(10, 0.01),
}


def trained(name: str) -> Subject:
    """A trained example with all training images."""
    scored, words = fashion(1)
    x, y = (read_idx(f"train-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    assert scored.scored is not None
    data = Data.of(
        x=scored.scored.take(np.arange(len(scored.scored)))[0],
        y=scored.scored.targets,
        x_train=x.astype(np.float32)[:, None] / 255,
        y_train=y.astype(np.int64),
    )
    spec, weights = f"{EXAMPLES / 'nets.py'}:{name}", EXAMPLES / f"{name}.safetensors"
    return Subject(name, spec, weights, lambda seed: data, labelled=True, words=words)


def subject_of(name: str, work: Path) -> Subject:
    """A network with its data."""
    if name in TRAINED:
        return trained(name)
    if name == EFFICIENTNET:
        return subject(name, work, _CALIBRATION, _VIEWS)
    known = load_network(name, work, calibration=_CALIBRATION, scored=_SYNTHETIC)
    assert known.weights is not None
    return Subject(name, known.spec, known.weights, lambda seed: known.data, False, known.examples)


# ---- the rows


def fitted(one: Subject, asked: Asked, shown: Shown) -> Json:
    """Our row; the folder stays to be looked into."""
    out = RESULTS / "work" / "fit" / one.name
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="featherweight-bench-") as cache:  # nothing is known before
        os.environ["FEATHERWEIGHT_CACHE"] = cache
        began = time.perf_counter()
        result = api.fit(
            one.spec,
            one.data(0),
            out=out,
            budget=Budget(quality_drop=asked.drop),
            weights=str(one.weights),
            runtime="any",
            time_limit=60 * asked.minutes,
            progress=shown,
        )
        seconds = time.perf_counter() - began
    artifact = delivered(out).artifact
    return {
        "network": one.name,
        "runtime": result.chosen.runtime,
        "method": OURS,
        "seconds": seconds,
        "met": result.met,
        "met_confident": result.met_confident,
        "drop": result.chosen.quality_drop,
        "drop_ci95": result.chosen.quality_drop_ci95,
        "agreement": result.chosen.agreement,
        "bytes": artifact.bytes,
        "packed": packed(artifact),
        "float_bytes": result.baseline.bytes,
        "ratio": result.chosen.latency_ratio,
        "ratio_ci95": result.chosen.latency_ratio_ci95,
        "own_ratio": next((row.own_ratio for row in result.runtimes if row.chosen), None),
        "recipe": result.recipe,
        "scored": one.words,
        "artifact": {**artifact.to_json(), "folder": str(artifact.folder)},
    }


def packed(artifact: Artifact) -> int:
    """Bytes of a download: all files behind zstd."""
    import zstandard

    coder = zstandard.ZstdCompressor(level=19)
    return sum(len(coder.compress((artifact.folder / file).read_bytes())) for file in artifact.files)


def peers(one: Subject, ours: Json, seconds: float, shown: Shown) -> list[Json]:
    """What each runtime's own quantizers make, and all of them timed in turn with ours."""
    rows: list[Json] = []
    with tempfile.TemporaryDirectory(prefix="featherweight-bench-") as temporary:
        entrants: list[tuple[Json, Entrant]] = []
        original = None
        for runtime, methods in PEERS.items():
            bench = Bench(one, runtime, 0, Path(temporary) / runtime, shown)
            if original is None:
                original = Entrant(bench.original, bench.run.target)
            first = _first_answer(bench)
            rows.append(first)
            entrants.append((first, Entrant(first.pop("made"), bench.run.target)))
            for method, peer in methods.items():
                shown.note(f"{one.name} on {runtime}: {method}")
                row: Json = {"network": one.name, "runtime": runtime, "method": method}
                rows.append(row)
                try:
                    began = time.perf_counter()
                    made = peer(bench.run, _CALIBRATION, bench.original, bench.folder / method)
                    row |= {"seconds": time.perf_counter() - began, **bench.judged(made)}
                except Exception as error:  # noqa: BLE001 a peer that fails is a row of the table
                    row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                    continue
                row |= {"drop": 1 - row["agreement"], "bytes": made.bytes, "packed": packed(made)}
                entrants.append((row, Entrant(made, bench.run.target)))
        assert original is not None
        artifact = Artifact.from_json(ours["artifact"], Path(ours["artifact"]["folder"]))
        target = Target(ours["runtime"], threads=1).resolved()
        again: Json = {
            "network": one.name,
            "runtime": ours["runtime"],
            "method": AGAIN,
        }
        everyone = [({}, original), (again, Entrant(artifact, target)), *entrants]
        example = tuple(np.array(array[:1]) for array in bench.run.data.example_inputs())
        rounds = measure_paced(
            [entrant for _, entrant in everyone],
            example,
            limits=Limits(seconds=seconds, precision=0.01, least_seconds=2.0),
            progress=shown,
            description="timing",
        )
        for index, (row, _) in enumerate(everyone[1:], 1):
            if index in rounds.failed:
                row["failed"] = rounds.failed[index].what
                continue
            told = asdict(rounds.ratio(index, to=0))
            row |= {"ratio": told["median"], "ratio_ci95": told["ci95"], "float_bytes": ours["float_bytes"]}
    again |= {key: ours[key] for key in ("drop", "agreement", "bytes", "packed")}
    return [again, *rows]


def _first_answer(bench: Bench) -> Json:
    """What fit tries first where others would be done long before its strongest way."""
    model, seconds = bench.model(early(shape_of(bench.run.start)))
    made, more = bench.lower(model)
    judged = bench.judged(made)
    row = {"network": bench.subject.name, "runtime": bench.runtime, "method": FIRST, "made": made}
    row |= {"seconds": seconds + more, **judged, "drop": 1 - judged["agreement"]}
    return row | {"bytes": made.bytes, "packed": packed(made)}


# ---- what is printed

HEADERS = (
    "network", "made by", "runtime", "drop", "bytes / fp32", "zstd / fp32", "latency / fp32 [95 %]",
    "product", "made in",
)  # fmt: skip


def cells(rows: Sequence[Json]) -> list[list[str]]:
    """One line for each artifact; latencies and sizes against the float file on ONNX Runtime."""
    found = []
    for row in rows:
        line = [row["network"], row["method"], row["runtime"]]
        if "failed" in row or "ratio" not in row:
            found.append([*line, "failed: " + str(row.get("failed", ""))[:60], *[""] * 5])
            continue
        size = row["bytes"] / row["float_bytes"]
        ends = row["ratio_ci95"]
        found.append(
            [
                *line,
                f"{row['drop']:.2%}",
                f"{size:.3f}",
                f"{row['packed'] / row['float_bytes']:.3f}",
                f"{row['ratio']:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""),
                f"{row['ratio'] * size:.4f}",
                f"{row['seconds']:.0f} s" if "seconds" in row else "",
            ]
        )
    return found


def bars(rows: Sequence[Json]) -> list[Bar]:
    """The promises of the trained examples; beside peers that ours is the best within the limit."""
    found = []
    for row in (row for row in rows if row["method"] == OURS):
        name, asked = row["network"], ASKED[row["network"]]
        kept = row["met"] and row["seconds"] <= 66 * asked.minutes
        said = f"drop {row['drop']:.2%} in {row['seconds'] / 60:.1f} min"
        found.append(
            Bar(name, f"drop at most {asked.drop:.1%} in {asked.minutes:g} minutes and a tenth", said, kept)
        )
        size = row["float_bytes"]
        seen = {
            "times faster": (asked.faster, 1 / row["ratio"]),
            "times smaller": (asked.smaller, size / row["bytes"]),
            "times smaller behind zstd": (asked.packed, size / row["packed"]),
        }
        found += [
            Bar(name, f"at least {least:g} {words}", f"{value:.2f}", value >= least)
            for words, (least, value) in seen.items()
            if least
        ]
        found += _first_bars(name, rows)
        others = [one for one in rows if one["network"] == name and one["method"] != OURS and "ratio" in one]
        ours = next((one for one in others if one["method"] == AGAIN), None)
        within = [one for one in others if not one["method"].startswith(OURS) and one["drop"] <= asked.drop]
        if ours is not None and within:
            best = min(within, key=_product)
            words = f"{_product(ours):.4f} to {_product(best):.4f} of {best['method']} on {best['runtime']}"
            found.append(
                Bar(name, "latency x bytes below each peer's", words, _product(ours) < _product(best))
            )
    return found


def _first_bars(name: str, rows: Sequence[Json]) -> list[Bar]:
    """How soon integers stand, beside NNCF, which makes nothing else."""
    made = {
        row["method"]: row["seconds"]
        for row in rows
        if row["network"] == name and row["runtime"] == "openvino" and "seconds" in row
    }
    if FIRST not in made or _NNCF not in made:
        return []
    said = f"{made[FIRST]:.1f} s to {made[_NNCF]:.1f} s"
    kept = made[FIRST] <= _AS_LONG * made[_NNCF]
    return [Bar(name, f"first integers within {_AS_LONG:g} x NNCF's time on OpenVINO", said, kept)]


def _product(row: Json) -> float:
    return float(row["ratio"] * row["bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--minutes", type=float, help="of every fit, instead of 20 and 10")
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="of the timing beside peers, at most (40)"
    )
    args = parser.parse_args()
    shown = Shown()
    tell_load(shown)
    parts, rows = Parts("fit", {"minutes": args.minutes, "seconds": args.seconds}, shown), list[Json]()
    for name in args.networks:
        one = subject_of(name, RESULTS / "work")
        asked = ASKED[name] if args.minutes is None else Asked(args.minutes, ASKED[name].drop)
        ours = parts.get(f"{name}-fit", lambda one=one, asked=asked: fitted(one, asked, shown))
        rows.append(ours)
        if name not in TRAINED:
            rows += parts.get(
                f"{name}-peers", lambda one=one, ours=ours: peers(one, ours, args.seconds, shown)
            )
    print(table(HEADERS, cells(rows)))
    for row in rows:
        if row["method"] == OURS:
            print(f"\n{row['network']} ({row['scored']}): {json.dumps(row['recipe']['steps'])}")
    finish("fit", rows, bars(rows), {"minutes": args.minutes, "seconds": args.seconds}, 1)


if __name__ == "__main__":
    main()
