"""Eight bits on the real runtimes: ours beside what each runtime brings, on the same network and data."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from common import RESULTS, Bar, Parts, Shown
from quantize_recipes import BEST, NEAREST, W8A8, Bench, Benches, recipe
from quantize_subjects import Subject
from runtime_peers import PEERS

from featherweight import api
from featherweight.engine.delivered import delivered
from featherweight.engine.paced import Entrant, measure_paced
from featherweight.engine.timing import Limits
from featherweight.errors import FeatherweightError
from featherweight.runtime import Artifact

Json = dict[str, Any]
FLOAT = "fp32"
OURS = (BEST, NEAREST)
_SLOW = frozenset({"ort-percentile-asym", "nncf-mixed"})  # one seed is enough for these variants
LEAST_AGREEMENT: Mapping[str, float] = {
    "onnxruntime": 0.98,
    "openvino": 0.96,
    "litert": 0.96,
    "executorch": 0.96,
}
LEAST_DB, MOST_LATENCY, MOST_SECONDS = 23.5, 1.05, 300.0


@dataclass(frozen=True)
class Int8Settings:
    """What the rows depend on."""

    calibration: int
    seeds: tuple[int, ...]
    seconds: float
    fit_minutes: tuple[float, ...]


class Int8:
    """The rows of one runtime.

    Args:
        subject: The network.
        runtime: Where it runs.
        settings: Of the benchmark.
        parts: Finished rows.
        benches: What is shared with other tables.
        shown: Progress.
    """

    def __init__(
        self,
        subject: Subject,
        runtime: str,
        settings: Int8Settings,
        parts: Parts,
        benches: Benches,
        shown: Shown,
    ) -> None:
        self.subject = subject
        self.runtime = runtime
        self.settings = settings
        self.shown = shown
        self._parts = parts
        self._benches = benches
        self._keep = RESULTS / "work" / "quantize" / subject.name / runtime

    def rows(self) -> list[Json]:
        """One for each method and seed; the first seed's have latencies."""
        rows: list[Json] = []
        for seed in self.settings.seeds:
            rows += self._parts.get(f"int8-{self.runtime}-{seed}", lambda seed=seed: self._seed(seed))
        for minutes in self.settings.fit_minutes if self.runtime == "onnxruntime" else ():
            rows += self._parts.get(f"int8-fit-{minutes:g}m", lambda minutes=minutes: [self._fit(minutes)])
        timed = self._parts.get(f"int8-{self.runtime}-latency", lambda: self._timed(rows))
        return [
            {**row, **(timed.get(row["method"], {}) if row["seed"] == rows[0]["seed"] else {})}
            for row in rows
        ]

    def _seed(self, seed: int) -> list[Json]:
        bench = self._benches.get(self.subject, self.runtime, seed)
        original = self._kept(bench.original, FLOAT, seed)
        rows = [self._head(FLOAT, seed) | {"bytes": original.bytes, "artifact": _told(original)}]
        for method in self._methods(seed):
            self.shown.note(f"{self.subject.name} on {self.runtime}, seed {seed}: {method}")
            rows.append(self._row(bench, method, seed))
        return rows

    def _methods(self, seed: int) -> list[str]:
        """All with the first seed; with others ours and the runtime's own, slow variants aside."""
        own = list(PEERS.get(self.runtime, {}))
        if seed == self.settings.seeds[0]:
            return [*OURS, *own]
        return [BEST, *(name for name in own if name not in _SLOW)]

    def _row(self, bench: Bench, method: str, seed: int) -> Json:
        row = self._head(method, seed)
        try:
            artifact, seconds = self._made(bench, method)
            judged = bench.judged(artifact, others=True)
            artifact = self._kept(artifact, method, seed)
            return {
                **row,
                "seconds": seconds,
                "bytes": artifact.bytes,
                "artifact": _told(artifact),
                **judged,
            }
        except FeatherweightError as error:
            return {**row, "failed": error.what}
        except Exception as error:  # a peer that fails is a row of the table
            if method in OURS:
                raise
            return {**row, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}

    def _made(self, bench: Bench, method: str) -> tuple[Artifact, float]:
        if method not in OURS:
            original = bench.original
            began = time.perf_counter()
            peer = PEERS[self.runtime][method]
            artifact = peer(bench.run, self.settings.calibration, original, bench.folder / method)
            return artifact, time.perf_counter() - began
        model, seconds = bench.model(recipe(method, W8A8, self.settings.calibration))
        artifact, more = bench.lower(model)
        return artifact, seconds + more

    def _fit(self, minutes: float) -> Json:
        """What ``fit`` makes by itself in that time, scored on all; it selects on half of the same views."""
        method, seed = f"fit, {minutes:g} minutes", self.settings.seeds[0]
        self.shown.note(f"{self.subject.name} on {self.runtime}: {method}")
        with tempfile.TemporaryDirectory() as temporary:
            began = time.perf_counter()
            result = api.fit(
                self.subject.spec,
                self.subject.data(seed),
                out=Path(temporary) / "out",
                weights=str(self.subject.weights),
                prefer="quality",
                runtime=self.runtime,
                time_limit=60 * minutes,
                seed=seed,
                progress=self.shown,
            )
            seconds = time.perf_counter() - began
            artifact = self._kept(delivered(Path(temporary) / "out").artifact, method, seed)
            bench = self._benches.get(self.subject, self.runtime, seed)
            row = self._head(method, seed) | {"recipe": result.recipe}
            row |= {"seconds": seconds, "bytes": artifact.bytes, "artifact": _told(artifact)}
            return row | bench.judged(artifact, others=True)

    def _head(self, method: str, seed: int) -> Json:
        return {
            "network": self.subject.name,
            "runtime": self.runtime,
            "method": method,
            "seed": seed,
            "calibration": self.settings.calibration,
            "scored": self.subject.words,
            "others_scored": self.subject.others_words,
        }

    def _kept(self, artifact: Artifact, method: str, seed: int) -> Artifact:
        """Copied out of the temporary store, to be timed and looked into."""
        folder = self._keep / f"{method}-{seed}".replace(" ", "").replace(",", "-")
        shutil.rmtree(folder, ignore_errors=True)
        for file in artifact.files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(artifact.folder / file, folder / file)
        return replace(artifact, folder=folder)

    def _timed(self, rows: Sequence[Json]) -> Json:
        """Latency of the first seed's artifacts, in turn, each in its own process on the same core."""
        seed = self.settings.seeds[0]
        made = [row for row in rows if row["seed"] == seed and "artifact" in row]
        self.shown.note(f"{self.subject.name} on {self.runtime}: latency")
        run = self._benches.get(self.subject, self.runtime, seed).run
        entrants = [
            Entrant(Artifact.from_json(row["artifact"], Path(row["artifact"]["folder"])), run.target)
            for row in made
        ]
        example = tuple(np.array(array[:1]) for array in run.data.example_inputs())
        limits = Limits(seconds=self.settings.seconds, precision=0.01, least_seconds=2.0)
        rounds = measure_paced(entrants, example, limits=limits, progress=self.shown, description="timing")
        names = [row["method"] for row in made]
        ours = names.index(BEST) if BEST in names else None
        found: Json = {}
        for index, name in enumerate(names):
            if index in rounds.failed:
                found[name] = {"failed": rounds.failed[index].what}
                continue
            found[name] = {
                "latency_s": asdict(rounds.summary(index)),
                "to_float": asdict(rounds.ratio(index)),
            }
            if ours is not None and ours not in rounds.failed and name not in (FLOAT, *OURS):
                found[name]["ours_to_this"] = asdict(rounds.ratio(ours, to=index))
        return found


def _told(artifact: Artifact) -> Json:
    return {**artifact.to_json(), "folder": str(artifact.folder)}


# ---- what is printed

HEADERS = (
    "runtime", "method", "seeds", "agreement", "[ends]", "SQNR dB", "[ends]", "on others", "SQNR dB",
    "bytes / fp32", "latency / fp32 [95 %]", "ours / this", "made in",
)  # fmt: skip


def cells(rows: Sequence[Json]) -> list[tuple[str, ...]]:
    """One line for each runtime and method: means over the seeds, and their ends."""
    lines = []
    for runtime, method in dict.fromkeys((row["runtime"], row["method"]) for row in rows):
        seen = [row for row in rows if (row["runtime"], row["method"]) == (runtime, method)]
        good = [row for row in seen if "agreement" in row]
        if not good and method != FLOAT:
            failed = "failed: " + str(seen[0].get("failed", ""))[:60]
            lines.append((runtime, method, "", failed, *("" for _ in HEADERS[4:])))
            continue
        bytes_of_float = next(
            (row["bytes"] for row in rows if (row["runtime"], row["method"]) == (runtime, FLOAT)), 0
        )
        lines.append((runtime, method, *_quality_cells(good), *_cost_cells(seen, bytes_of_float)))
    return lines


def _quality_cells(rows: Sequence[Json]) -> tuple[str, ...]:
    if not rows:
        return ("",) * 7
    agreement, decibels = ([row[key] for row in rows] for key in ("agreement", "sqnr_db"))
    others = [row["others"] for row in rows if "others" in row]
    several = len(rows) > 1
    return (
        f"{len(rows)}",
        f"{mean(agreement):.1%}",
        f"[{min(agreement):.1%}, {max(agreement):.1%}]" if several else "",
        f"{mean(decibels):.2f}",
        f"[{min(decibels):.2f}, {max(decibels):.2f}]" if several else "",
        f"{mean(one['agreement'] for one in others):.1%}" if others else "",
        f"{mean(one['sqnr_db'] for one in others):.2f}" if others else "",
    )


def _cost_cells(rows: Sequence[Json], bytes_of_float: int) -> tuple[str, ...]:
    row = rows[0]
    return (
        f"{row['bytes'] / bytes_of_float:.3f}" if bytes_of_float and "bytes" in row else "",
        ratio_told(row["to_float"]) if "to_float" in row else "",
        ratio_told(row["ours_to_this"]) if "ours_to_this" in row else "",
        f"{max(one['seconds'] for one in rows):.1f} s" if "seconds" in row else "",
    )


def ratio_told(ratio: Mapping[str, Any]) -> str:
    """A median, and its interval where there is one."""
    if ratio["ci95"] is None:
        return f"{ratio['median']:.3f}"
    return f"{ratio['median']:.3f} [{ratio['ci95'][0]:.3f}, {ratio['ci95'][1]:.3f}]"


def bars(rows: Sequence[Json]) -> list[Bar]:
    """The promises, of the worst seed."""
    found: list[Bar] = []
    for runtime in dict.fromkeys(row["runtime"] for row in rows):
        own = [row for row in rows if row["runtime"] == runtime]
        about = f"{own[0]['network']} W8A8 on {runtime}"
        ours = [row for row in own if row["method"] == BEST and "agreement" in row]
        least = LEAST_AGREEMENT.get(runtime)
        if not ours:
            found.append(Bar(about, "agreement", "no artifact", None))
            continue
        worst = min(row["agreement"] for row in ours)
        peers = [row for row in own if row["method"] in PEERS.get(runtime, {}) and "agreement" in row]
        words = ", ".join(
            f"{row['method']} {row['agreement']:.1%}" for row in peers if row["seed"] == ours[0]["seed"]
        )
        if least is not None:
            found.append(Bar(about, f"agreement >= {least:.0%}", f"{worst:.1%} ({words})", worst >= least))
        if runtime == "onnxruntime":
            found += _first_bars(about, ours)
        ratios = [row["ours_to_this"] for row in peers if "ours_to_this" in row]
        if ratios:
            slowest = max(ratios, key=lambda ratio: ratio["median"])
            kept = slowest["median"] <= MOST_LATENCY
            found.append(Bar(about, f"latency <= {MOST_LATENCY} x its own", ratio_told(slowest), kept))
    return found


def _first_bars(about: str, ours: Sequence[Json]) -> list[Bar]:
    decibels, seconds = min(row["sqnr_db"] for row in ours), max(row["seconds"] for row in ours)
    return [
        Bar(about, f"SQNR >= {LEAST_DB} dB", f"{decibels:.2f} dB", decibels >= LEAST_DB),
        Bar(about, "quantized within 5 minutes", f"{seconds:.0f} s", seconds <= MOST_SECONDS),
    ]
