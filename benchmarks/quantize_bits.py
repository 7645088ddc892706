"""Few bits, and what each method adds: recipes on one network, one line each, beside nearest rounding.

Below eight bits nothing here runs in integers: those lines are scored through runtime ``torch``, which
simulates formats. Weights and activations alone (on 2,000 examples at most) tell where the error sits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from common import Bar, Parts, Shown
from quantize_recipes import (
    BEST,
    MIXED,
    NEAREST,
    TERNARY,
    W4A4,
    W4A8,
    W4A8_GROUPS,
    W5A8,
    W8A8,
    Bench,
    Benches,
    Bits,
    activations_alone,
    recipe,
    stored_bits,
    weights_alone,
)
from quantize_subjects import Subject, first

from featherweight.errors import FeatherweightError
from featherweight.model import Model

Json = dict[str, Any]
BLOCKS = "equalize + blocks"
_ALONE = 2000  # scored examples for weights and activations alone


@dataclass(frozen=True)
class Case:
    """Recipes that store a network in the same bits.

    Attributes:
        network: Its name.
        runtime: What scores it.
        bits: How it is stored.
        recipes: Names, see ``quantize_recipes.recipe``; the first ones are seeded once.
        judged: The recipe that the bar is about.
        agreement: The bar: least agreement with float.
        drop: The bar: most points of accuracy lost.
        alone: Whether weights and activations are scored alone, too.
        seeds: How many calibration sets at most, unless the run is thorough; None: all.
        iterations: Of adaround and blocks, unless the run is thorough; None: their default.
        more: Recipes of a thorough run.
    """

    network: str
    runtime: str
    bits: Bits
    recipes: tuple[str, ...]
    judged: str = ""
    agreement: float | None = None
    drop: float | None = None
    alone: bool = False
    seeds: int | None = None
    iterations: int | None = None
    more: tuple[str, ...] = ()


_EFF = "efficientnet_lite0"
FEW_BITS = (
    Case(_EFF, "torch", W4A8, (NEAREST, BEST, BLOCKS), BEST, agreement=0.85, seeds=1, iterations=100),
    Case(_EFF, "torch", W4A8_GROUPS, (NEAREST, BEST), BEST, agreement=0.85, seeds=1, more=(BLOCKS,)),
    Case(_EFF, "torch", W5A8, (BEST,)),
    Case(_EFF, "torch", MIXED, (BEST,), BEST, agreement=0.90, seeds=1),
    Case("resnet20", "torch", W4A8, (NEAREST, BEST), BEST, drop=0.5, more=(BLOCKS,)),
    Case("depthwise", "torch", W4A8, (NEAREST, BEST), BEST, drop=0.5, more=(BLOCKS,)),
    Case("resnet20", "torch", TERNARY, (NEAREST, BEST, BLOCKS), BLOCKS, drop=6.0),
)
_STEPS = (
    NEAREST,
    "equalize",
    "correct_bias",
    "equalize + correct_bias",
    "gptq, biases left",
    "gptq",
    BEST,
)
_LEARNED = ("adaround", "blocks", BLOCKS)
ABLATION = (
    Case(_EFF, "onnxruntime", W8A8, (*_STEPS, BLOCKS), alone=True, iterations=100, more=("adaround",)),
    Case("resnet20", "torch", W4A4, (*_STEPS, *_LEARNED), BLOCKS, drop=2.0, alone=True),
    Case("depthwise", "torch", W4A4, (*_STEPS, *_LEARNED), BLOCKS, drop=4.0, alone=True),
)


@dataclass(frozen=True)
class BitsSettings:
    """What the rows depend on."""

    calibration: int
    seeds: tuple[int, ...]
    iterations: int | None
    thorough: bool = False


def rows_of(
    case: Case, subject: Subject, settings: BitsSettings, parts: Parts, benches: Benches, shown: Shown
) -> list[Json]:
    """One row for each recipe; of every seed for the recipe that a bar is about, else of the first."""
    rows: list[Json] = []
    for seed in settings.seeds if settings.thorough else settings.seeds[: case.seeds]:
        every = (*case.recipes, *(case.more if settings.thorough else ()))
        names = every if seed == settings.seeds[0] else tuple(filter(None, [case.judged]))
        name = f"bits-{case.network}-{case.runtime}-{case.bits.name.replace(' ', '')}-{seed}"
        if names:
            work = _Work(case, subject, settings, benches, shown)
            rows += parts.get(name, lambda names=names, seed=seed, work=work: work.rows(names, seed))
    return rows


class _Work:
    def __init__(
        self, case: Case, subject: Subject, settings: BitsSettings, benches: Benches, shown: Shown
    ) -> None:
        self.case, self.subject, self.settings, self.shown = case, subject, settings, shown
        self._benches = benches
        self._alone: dict[str, Json] = {}  # activations that several recipes share

    def rows(self, names: Sequence[str], seed: int) -> list[Json]:
        bench = self._benches.get(self.subject, self.case.runtime, seed)
        found = []
        for name in names:
            self.shown.note(f"{self.case.network} {self.case.bits.name}, seed {seed}: {name}")
            found.append(self._row(bench, name, seed))
        return found

    def _row(self, bench: Bench, name: str, seed: int) -> Json:
        row: Json = {
            "network": self.case.network,
            "runtime": self.case.runtime,
            "simulated": self.case.runtime == "torch",
            "bits": self.case.bits.name,
            "method": name,
            "seed": seed,
            "calibration": self.settings.calibration,
            "scored": self.subject.words,
        }
        try:
            iterations = self.settings.iterations or (
                None if self.settings.thorough else self.case.iterations
            )
            steps = recipe(name, self.case.bits, self.settings.calibration, iterations)
            model, seconds = bench.model(steps)
            row |= {"seconds": seconds, "stored_bits": stored_bits(model)}
            row |= bench.judged(bench.lower(model)[0])
            if self.case.alone:
                few = self._few(bench) if self.subject.labelled else bench
                row["weights_alone"] = few.judged(few.lower(weights_alone(model))[0])
                row["activations_alone"] = self._activations(bench, name, model)
        except FeatherweightError as error:
            row["failed"] = error.what
        return row

    def _few(self, bench: Bench) -> Bench:
        """Where weights and activations are scored alone: simulated, on fewer examples."""
        return self._benches.get(first(self.subject, _ALONE), "torch", bench.seed)

    def _activations(self, bench: Bench, name: str, model: Model) -> Json | None:
        """Simulated; None where it is the same as without the recipe's last steps, or has no meaning."""
        before = [part for part in name.split(" + ") if part == "equalize"]
        if name not in (NEAREST, "equalize"):
            return self._alone.get(" + ".join(before) or NEAREST) if "blocks" not in name else None
        reference = bench.run.context(model).float_model(model)
        simulated = self._few(bench)
        self._alone[name] = simulated.judged(simulated.lower(activations_alone(model, reference))[0])
        return self._alone[name]


# ---- what is printed

HEADERS = (
    "network", "bits", "method", "seeds", "stored", "agreement", "[ends]", "SQNR dB", "drop, points",
    "[ends]", "weights alone", "activations alone", "made in",
)  # fmt: skip


def cells(rows: Sequence[Json]) -> list[tuple[str, ...]]:
    """One line for each network, bits and recipe: means over the seeds, and their ends."""
    lines = []
    keys = ("network", "bits", "method")
    for head in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        seen = [row for row in rows if tuple(row[key] for key in keys) == head]
        good = [row for row in seen if "failed" not in row]
        network, bits, method = head
        bits += " (simulated)" if seen[0]["simulated"] else ""
        if not good:
            lines.append(
                (network, bits, method, "", "failed: " + seen[0]["failed"][:60], *("" for _ in HEADERS[5:]))
            )
            continue
        lines.append((network, bits, method, *_cells(good)))
    return lines


def _cells(rows: Sequence[Json]) -> tuple[str, ...]:
    agreement = [row["agreement"] for row in rows]
    drops = [row["drop_points"] for row in rows if row["drop_points"] is not None]
    several = len(rows) > 1
    return (
        f"{len(rows)}",
        f"{mean(row['stored_bits'] for row in rows):.2f}",
        f"{mean(agreement):.2%}",
        f"[{min(agreement):.2%}, {max(agreement):.2%}]" if several else "",
        f"{mean(row['sqnr_db'] for row in rows):.2f}",
        f"{mean(drops):+.2f}" if drops else "",
        f"[{min(drops):+.2f}, {max(drops):+.2f}]" if drops and several else "",
        _alone(rows[0].get("weights_alone")),
        _alone(rows[0].get("activations_alone")),
        f"{max(row['seconds'] for row in rows):.1f} s",
    )


def _alone(seen: Json | None) -> str:
    return "" if seen is None else f"{seen['sqnr_db']:.2f} dB, {seen['agreement']:.1%}"


def bars(cases: Sequence[Case], rows: Sequence[Json]) -> list[Bar]:
    """The promises, of the worst seed."""
    found = []
    for case in cases:
        if case.agreement is None and case.drop is None:
            continue
        same = [row for row in rows if (row["network"], row["bits"]) == (case.network, case.bits.name)]
        judged = [row for row in same if row["method"] == case.judged and "failed" not in row]
        about = f"{case.network} {case.bits.name} by {case.judged} (simulated)"
        if not same:
            continue
        if case.agreement is not None:
            asked = f"agreement >= {case.agreement:.0%}"
            worst = min((row["agreement"] for row in judged), default=None)
            kept = None if worst is None else worst >= case.agreement
            found.append(Bar(about, asked, "failed" if worst is None else f"{worst:.2%}", kept))
        if case.drop is not None:
            asked = f"drop <= {case.drop} points"
            most = max((row["drop_points"] for row in judged), default=None)
            kept = None if most is None else most <= case.drop
            found.append(Bar(about, asked, "failed" if most is None else f"{most:+.2f}", kept))
    return found
