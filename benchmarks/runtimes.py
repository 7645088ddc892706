"""Runtime x network x {fp32, int8}: bytes, latency, fidelity, parity; and what ``--runtime any`` picks.

Ours and each runtime's own quantizer get the same network and the same calibration examples, none of
which is scored. On each runtime fp32, ours and its own are timed in turn, each in its own process on the same
core; then the best of all runtimes are. Nothing is asserted: the bars are printed, kept or not.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, Bar, Parts, Shown, finish, table, tell_load
from networks import EFFICIENTNET, NAMES, TRAINED, Network, load_network
from runtime_peers import PEERS

from featherweight.engine import parity
from featherweight.engine.paced import Entrant, Rounds, measure_paced
from featherweight.engine.quality import Scored, quality, score_artifact
from featherweight.engine.run import Run
from featherweight.engine.sources import load_sources
from featherweight.engine.store import Store
from featherweight.engine.targets import fit_targets
from featherweight.engine.timing import Limits
from featherweight.errors import FeatherweightError
from featherweight.recipe import Recipe
from featherweight.runtime import Artifact, Target

NETWORKS = (*NAMES, EFFICIENTNET)
FLOAT, OURS = "fp32", "int8"
_FIRST = "onnxruntime"


@dataclass(frozen=True)
class Settings:
    """What the rows depend on."""

    seconds: float
    threads: int
    calibration: int | None
    scored: int | None
    runtimes: tuple[str, ...]

    def calibrating(self, network: str) -> int:
        return self.calibration or (256 if network in TRAINED else 64)


@dataclass
class Made:
    """One artifact of one runtime."""

    runtime: str
    method: str
    artifact: Artifact
    target: Target
    seconds: float
    float_error: float | None = None
    parity_db: float | None = None
    steady_db: float | None = None


def rows_of(name: str, settings: Settings, shown: Shown) -> dict[str, Any]:
    """All rows of one network, and the comparison across runtimes."""
    network = load_network(
        name, RESULTS / "work" / "weights", calibration=settings.calibrating(name), scored=settings.scored
    )
    keep = RESULTS / "work" / "runtimes" / name
    shutil.rmtree(keep, ignore_errors=True)
    rows: list[dict[str, Any]] = []
    best: list[Made] = []
    with tempfile.TemporaryDirectory() as temporary:
        for runtime in settings.runtimes:
            shown.note(f"{name} on {runtime}")
            try:
                made, failed = _made(network, runtime, settings, Path(temporary), keep / runtime, shown)
                seen = _rows(network, made, settings, Path(temporary), shown)
            except FeatherweightError as error:
                rows.append({"network": name, "runtime": runtime, "method": OURS, "failed": error.what})
                continue
            rows += [*seen, *failed]
            best += [one for one in made if one.method == OURS]
            best += [one for one in made if one.runtime == _FIRST and one.method not in (FLOAT, OURS)]
        shown.note(f"{name}: comparing runtimes")
        across = _across(network, best, settings, shown)
    return {"rows": rows, "across": across}


def _run(network: Network, runtime: str, settings: Settings, temporary: Path, shown: Shown) -> Run:
    sources = load_sources(network.spec, weights=network.weights and str(network.weights), data=network.data)
    target = fit_targets(runtime, settings.threads, "local", "")[0]
    return Run(sources.model, sources.data, target, Store(temporary / "store"), progress=shown)


def _made(
    network: Network, runtime: str, settings: Settings, temporary: Path, keep: Path, shown: Shown
) -> tuple[list[Made], list[dict[str, Any]]]:
    """fp32, ours and the runtime's own; rows of what failed."""
    run = _run(network, runtime, settings, temporary, shown)
    batches = parity.some_batches(run.data, _example(run))
    limits = Limits()
    samples = settings.calibrating(network.name)
    steps = Recipe.from_dict({"version": 1, "steps": [{"fold": {}}, {"quantize": {"samples": samples}}]})
    original = run.lower(run.original)
    made = [Made(runtime, FLOAT, original, run.target, 0.0)]
    wanted = parity.simulated(run.original, batches)
    made[0].float_error = parity.largest_error(
        parity.outputs_of(original, run.target, batches, limits), wanted
    )
    failed: list[dict[str, Any]] = []
    started = time.perf_counter()
    try:
        model = run.apply(steps)
        ours = Made(runtime, OURS, run.lower(model), run.target, time.perf_counter() - started)
        ours.parity_db = parity.decibels(
            parity.outputs_of(ours.artifact, run.target, batches, limits), parity.simulated(model, batches)
        )
        if ours.parity_db is not None and ours.parity_db < parity.LEAST_DB:
            ours.steady_db = parity.steadiness(model, batches)
        made.append(ours)
    except FeatherweightError as error:
        failed.append({"network": network.name, "runtime": runtime, "method": OURS, "failed": error.what})
    for method, quantize in PEERS.get(runtime, {}).items():
        shown.note(f"{network.name} on {runtime}: {method}")
        started = time.perf_counter()
        try:
            artifact = quantize(run, samples, original, keep / method)
        except Exception as error:  # noqa: BLE001 - a peer that fails is a row of the table
            words = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            failed.append({"network": network.name, "runtime": runtime, "method": method, "failed": words})
            continue
        made.append(Made(runtime, method, artifact, run.target, time.perf_counter() - started))
    return [_kept(one, keep / one.method) for one in made], failed


def _kept(made: Made, folder: Path) -> Made:
    """Copy an artifact out of the temporary store, to look into."""
    if made.artifact.folder != folder:
        for file in made.artifact.files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(made.artifact.folder / file, folder / file)
        made.artifact = replace(made.artifact, folder=folder)
    return made


def _example(run: Run) -> tuple[np.ndarray, ...]:
    assert run.data.scored is not None
    return tuple(array[:1] for array in run.data.example_inputs())


def _timed(network: Network, made: list[Made], settings: Settings, shown: Shown) -> Rounds:
    entrants = [Entrant(one.artifact, one.target) for one in made]
    example = tuple(array[:1] for array in network.data.example_inputs())
    limits = Limits(seconds=settings.seconds, precision=0.005, least_seconds=2.0)
    return measure_paced(entrants, example, limits=limits, progress=shown, description="timing")


def _rows(
    network: Network, made: list[Made], settings: Settings, temporary: Path, shown: Shown
) -> list[dict[str, Any]]:
    scored: dict[str, Scored] = {}
    data = load_sources(
        network.spec, weights=network.weights and str(network.weights), data=network.data
    ).data
    for one in made:
        place = temporary / "scores" / network.name / one.runtime / one.method
        scored[one.method] = score_artifact(one.artifact, one.target, data, place, original=scored.get(FLOAT))
    rounds = _timed(network, made, settings, shown)
    rows = []
    for index, one in enumerate(made):
        seen = quality(data, scored[FLOAT], scored[one.method])
        ratio = None if index in rounds.failed else rounds.ratio(index)
        ours = next((at for at, other in enumerate(made) if other.method == OURS), None)
        to_ours = None
        if ours is not None and one.method not in (FLOAT, OURS) and not {index, ours} & set(rounds.failed):
            to_ours = rounds.ratio(ours, to=index)
        rows.append(
            {
                "network": network.name,
                "runtime": one.runtime,
                "method": one.method,
                "bytes": one.artifact.bytes,
                "bytes_ratio": one.artifact.bytes / made[0].artifact.bytes,
                "latency_s": None if ratio is None else asdict(rounds.summary(index)),
                "to_float": None if ratio is None else asdict(ratio),
                "ours_to_this": None if to_ours is None else asdict(to_ours),
                "agreement": seen.agreement,
                "sqnr_db": seen.sqnr_db,
                "drop_points": 100 * seen.quality_drop if network.labelled else None,
                "float_error": one.float_error,
                "parity_db": one.parity_db,
                "steady_db": one.steady_db,
                "seconds": one.seconds,
                "scored": network.examples,
                "failed": "" if index not in rounds.failed else rounds.failed[index].what,
            }
        )
    return rows


def _across(network: Network, best: list[Made], settings: Settings, shown: Shown) -> dict[str, Any]:
    """Our int8 of each runtime and ONNX Runtime's own, in turn; what any picks, against both."""
    first = [one for one in best if one.runtime == _FIRST and one.method != OURS]
    ours = [one for one in best if one.method == OURS]
    if not first or not ours:
        return {}
    entrants = [*first, *ours]
    rounds = _timed(network, entrants, settings, shown)
    alive = [index for index in range(len(first), len(entrants)) if index not in rounds.failed]
    own = min(range(len(first)), key=lambda index: rounds.ratio(index).median)
    picked = _pick(rounds, alive)
    again = _timed(network, [entrants[index] for index in [own, *alive]], settings, shown)
    fastest = min(range(1, len(alive) + 1), key=lambda index: again.ratio(index).median)
    pick = 1 + alive.index(picked)
    return {
        "network": network.name,
        "runtimes": [entrants[index].runtime for index in alive],
        "to_own": [asdict(again.ratio(index)) for index in range(1, len(alive) + 1)],
        "own": first[own].method,
        "pick": entrants[picked].runtime,
        "pick_to_own": asdict(again.ratio(pick)),
        "fastest": entrants[alive[fastest - 1]].runtime,
        "pick_to_fastest": asdict(again.ratio(pick, to=fastest)) if pick != fastest else None,
    }


def _pick(rounds: Rounds, alive: list[int]) -> int:
    """The fastest of the first comparison, as fit picks by latency; the second one judges it."""
    return min(alive, key=lambda index: rounds.ratio(index).median)


# ---- what is printed

HEADERS = (
    "network", "runtime", "method", "bytes", "/ fp32", "latency ms", "/ fp32 [95 %]", "ours / this",
    "agreement", "SQNR dB", "to simulation dB", "fp32 error", "made in",
)  # fmt: skip


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    head = (row["network"], row["runtime"], row["method"])
    if row.get("failed"):
        return (*head, "failed: " + row["failed"][:60], *("" for _ in HEADERS[4:]))
    own = row["method"] == FLOAT
    return (
        *head,
        f"{row['bytes']:,}",
        f"{row['bytes_ratio']:.3f}",
        f"{1e3 * row['latency_s']['median']:.3f}",
        _told(row["to_float"]),
        "" if row["ours_to_this"] is None else _told(row["ours_to_this"]),
        "" if own or row["agreement"] is None else f"{row['agreement']:.2%}",
        "" if own else f"{row['sqnr_db']:.2f}",
        "" if row["parity_db"] is None else f"{row['parity_db']:.1f}",
        "" if row["float_error"] is None else f"{row['float_error']:.1e}",
        "" if own else f"{row['seconds']:.1f} s",
    )


def _told(ratio: Mapping[str, Any]) -> str:
    low, high = ratio["ci95"] or (math.nan, math.nan)
    return f"{ratio['median']:.3f} [{low:.3f}, {high:.3f}]"


def bars(parts: list[Mapping[str, Any]]) -> list[Bar]:
    """The promises, network by network and runtime by runtime."""
    found: list[Bar] = []
    gains = []
    for part in parts:
        rows = [row for row in part["rows"] if not row.get("failed")]
        for row in rows:
            about = f"{row['network']} on {row['runtime']}"
            if row["method"] == FLOAT:
                error = row["float_error"]
                found.append(Bar(about, "fp32 error <= 1e-4", f"{error:.1e}", error <= 1e-4))
            elif row["method"] == OURS:
                found.append(_parity_bar(about, row))
        for runtime in PEERS:
            found += _against_own(runtime, [row for row in rows if row["runtime"] == runtime])
        across = part["across"]
        if across:
            gains.append(1 / across["pick_to_own"]["median"])
            rest = across["pick_to_fastest"]
            overlaps = rest is None or (rest["ci95"] is not None and rest["ci95"][0] <= 1)
            words = f"{across['pick']}, fastest {across['fastest']}" + (
                "" if rest is None else f" {_told(rest)}"
            )
            found.append(Bar(across["network"], "any overlaps the best runtime", words, overlaps))
    if gains:
        mean = math.exp(sum(map(math.log, gains)) / len(gains))
        found.append(
            Bar(
                "all", "any >= 1.15 x ONNX Runtime's own int8 (geometric mean)", f"{mean:.2f} x", mean >= 1.15
            )
        )
    return found


def _parity_bar(about: str, row: Mapping[str, Any]) -> Bar:
    """30 dB, or the reason: a network whose simulation is no nearer to itself."""
    seen, steady = row["parity_db"], row["steady_db"]
    words = f"{seen:.1f} dB"
    if steady is not None:
        words += f" (the simulation from itself, inputs moved by a millionth: {steady:.1f} dB)"
    kept = seen >= parity.LEAST_DB or (steady is not None and steady < parity.LEAST_DB)
    return Bar(about, "int8 parity >= 30 dB, or the reason", words, kept)


def _against_own(runtime: str, rows: list[Mapping[str, Any]]) -> list[Bar]:
    peers = [row for row in rows if row["method"] not in (FLOAT, OURS)]
    ours = next((row for row in rows if row["method"] == OURS), None)
    if ours is None or not peers:
        return []
    about = f"{ours['network']} on {runtime}"
    fastest = min(peers, key=lambda row: row["to_float"]["median"])
    best = max(peers, key=lambda row: row["sqnr_db"])
    ratio = fastest["ours_to_this"]
    return [
        Bar(
            about,
            "latency <= 1.05 x its own",
            f"{_told(ratio)} x {fastest['method']}",
            ratio["median"] <= 1.05,
        ),
        Bar(
            about,
            "SQNR >= its own",
            f"{ours['sqnr_db']:.2f} dB, {best['method']} {best['sqnr_db']:.2f} dB",
            ours["sqnr_db"] >= best["sqnr_db"],
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--runtimes", nargs="+", help="default: all that are installed")
    parser.add_argument("--seconds", type=float, default=15.0, help="longest timing of a group (default 15)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calibration", type=int, help="examples (default 256 for the examples, else 64)")
    parser.add_argument("--scored", type=int, help="examples (default all of the examples, 128 of 224 px)")
    args = parser.parse_args()
    names = args.runtimes or [target.runtime for target in fit_targets("any", args.threads, "local", "")]
    settings = Settings(args.seconds, args.threads, args.calibration, args.scored, tuple(names))
    shown = Shown()
    tell_load(shown)
    parts = Parts("runtimes", vars(settings), shown)
    found = [parts.get(name, lambda name=name: rows_of(name, settings, shown)) for name in args.networks]
    rows = [row for part in found for row in part["rows"]]
    print(table(HEADERS, [cells(row) for row in rows]))
    for part in found:
        across = part["across"]
        if across:
            told = ", ".join(
                f"{name} {_told(ratio)}"
                for name, ratio in zip(across["runtimes"], across["to_own"], strict=True)
            )
            print(f"{across['network']}: our int8 / ONNX Runtime's own ({across['own']}): {told}")
    finish("runtimes", found, bars(found), {**vars(settings), "cpus": os.cpu_count()}, args.threads)
    parts.forget()


if __name__ == "__main__":
    main()
