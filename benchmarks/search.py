"""What the search finds in 24 measured trials, beside chance and a fixed recipe.

``python benchmarks/search.py``. The space is that of ``fit`` without training: ways through the methods and
what they leave open, on the trained examples. Each recipe is made, simulated and measured once, when a search
first asks for it; other searches and seeds are told the same figures, so that they differ in nothing but what
they ask for. What counts is the volume between the front of drop, size and latency and a reference point:
nothing beyond it counts. Two are told: the original itself, against which plain integers fill most of the
box already, and half of its size and latency. Interrupted, it goes on with what was recorded.

The cost of the search itself is what asking, telling and judging take, against the seconds that the steps and
measurements of its trials took when they were made.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from common import Bar, Parts, Shown, finish, table, tell_load
from quantize_subjects import Subject, subject

from featherweight.data import Data
from featherweight.engine import warm
from featherweight.engine.drafts import climb, draft
from featherweight.engine.evaluate import Scales
from featherweight.engine.forecast import Forecast, Forecaster
from featherweight.engine.ladder import Ladder, simulated_drop
from featherweight.engine.lanes import Lane
from featherweight.engine.run import Run
from featherweight.engine.samplers import SamplerName
from featherweight.engine.search import Candidate, Failure, Opening, Search
from featherweight.engine.store import digest
from featherweight.engine.template import Amounts, shape_of, step_holes, ways
from featherweight.engine.timing import Limits
from featherweight.engine.verdict import rejection
from featherweight.errors import FeatherweightError, RecipeError
from featherweight.holes import Choice, Hole, Range
from featherweight.method import Method
from featherweight.model import Model
from featherweight.outcome import Budget, Measurement, Preference
from featherweight.recipe import Recipe, Step

Json = dict[str, Any]
NETWORKS = ("resnet20", "depthwise")
_LIMIT = 0.05  # without training, smaller networks lose points
_PREFER: Preference = "quality"  # within the limit the whole front counts, not its best product alone
_BUDGET = Budget(quality_drop=_LIMIT)
REFERENCE = (_LIMIT, 1.0, 1.0)  # drop, size and latency against the original: what lies beyond counts nothing
HALF = (_LIMIT, 0.5, 0.5)
_LATENCIES = (0.75, 0.6)
_BEYOND_CHANCE, _OVERHEAD = 1.15, 0.05
_RUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Settings:
    """What the table of recorded trials depends on.

    Attributes:
        calibration: Examples that calibrate.
        scored: Test images; None for all.
        iterations: Of the reconstruction of blocks.
        measure_s: Of one latency measurement at most.
    """

    calibration: int = 128
    scored: int | None = None
    iterations: int = 150
    measure_s: float = 5.0


@dataclass(frozen=True)
class Stand:
    """Stands for a model that is made only when something must be found out of it.

    Attributes:
        key: Of the steps that make it.
        steps: Their methods and parameters.
    """

    key: str
    steps: tuple[tuple[str, Json], ...] = ()

    def then(self, name: str, parameters: Json) -> Stand:
        """After another step."""
        return Stand(digest(self.key, name, parameters)[:20], (*self.steps, (name, parameters)))


class Table:
    """The recorded trials of one network; looks like a run to the engine's own functions.

    Args:
        one: The network.
        settings: How trials are made.
        parts: Where records are kept.
        folder: Takes the store, if anything must be made.
        shown: Progress.
    """

    def __init__(self, one: Subject, settings: Settings, parts: Parts, folder: Path, shown: Shown) -> None:
        self._subject, self._settings, self._parts = one, settings, parts
        self._folder, self.progress = folder, shown
        self._known: Json = {}
        self._stands: dict[str, Stand] = {}
        self._lane: Lane | None = None
        self.start = Stand(one.name)
        self.hands = self  # simulations are asked of the table
        self.target = SimpleNamespace(runtime=_RUNTIME)
        self.found_s = 0.0  # since it was last set to zero: seconds in which records were made or read

    # ---- what drafts.py asks of a run

    def step(self, model: Stand, method: Method, number: int) -> Stand:
        """One step, which is only noted."""
        name = type(method).__module__.rpartition(".")[2]
        made = model.then(name, method.model_dump(mode="json", exclude_unset=True))
        self._stands[made.key] = made
        return made

    def apply(self, recipe: Recipe) -> Stand:
        """All steps of a filled recipe."""
        made = self.start
        for number, method in enumerate(recipe.methods(), 1):
            made = self.step(made, method, number)
        return made

    def simulated_drop(self, run: object, key: str, indices: Sequence[int]) -> float:
        """What the simulated network loses."""
        found = self._get(
            f"simulated-{key}",
            lambda: simulated_drop(self.lane, self.model(self._stands[key]), np.asarray(indices)),
        )
        return float(found)

    # ---- records

    def holes(self, step: Step, model: Stand) -> dict[str, Hole]:
        """What may vary of a step on the model that reaches it."""
        key = f"holes-{digest(model.key, step.method, Recipe((step,)).to_dict())[:20]}"

        def ask() -> Json:
            real = self.model(model)
            return {
                name: hole.to_data()
                for name, hole in step_holes(step, real, self.lane.run.context(real)).items()
            }

        return {name: _hole(data) for name, data in self._get(key, ask).items()}

    def starts(self, step: Step, model: Stand, holes: Mapping[str, Hole]) -> list[Json]:
        """What a sensitivity analysis proposes."""
        if not warm.analyses(step):
            return []
        key = f"starts-{digest(model.key, step.method, Recipe((step,)).to_dict())[:20]}"
        found = self._get(
            key, lambda: [dict(one) for one in warm.starts(self.lane.run, step, self.model(model), holes)]
        )
        return list(found)

    def forecast(self, model: Stand) -> Forecast:
        """What shapes, formats and prices tell."""

        def ask() -> Json:
            return vars(self._forecaster.of(self.model(model)))

        return Forecast(**self._get(f"forecast-{model.key}", ask))

    def measured(self, model: Stand) -> tuple[Measurement | Failure, float]:
        """What was seen of the artifact, and the seconds that it took to make and to weigh."""

        def measure() -> Json:
            began = time.perf_counter()
            try:
                weighed = self.lane.scales.weigh(self.model(model))
            except FeatherweightError as error:
                return {"failed": error.what, "seconds": time.perf_counter() - began}
            seen = self.lane.scales.measurement(weighed)
            return {"seen": seen.model_dump(mode="json"), "seconds": time.perf_counter() - began}

        found = self._get(f"trial-{model.key}", measure)
        if "failed" in found:
            return Failure(found["failed"]), found["seconds"]
        return Measurement.model_validate(found["seen"]), found["seconds"]

    def baseline(self) -> Measurement:
        """The original."""
        found = self._get("baseline", lambda: self.lane.scales.baseline(None).model_dump(mode="json"))
        return Measurement.model_validate(found)

    def ways(self) -> dict[str, Recipe]:
        """The space without training: what the original is decides which ways there are."""

        def ask() -> Json:
            few = Amounts(
                samples=self._settings.calibration,
                iterations=self._settings.iterations,
                limits={"latency": Choice(_LATENCIES)},
                structure=True,
            )
            found = ways("thorough", shape_of(self.lane.run.start), few)
            return {name: recipe.to_dict() for name, recipe in found.items()}

        return {name: Recipe.from_dict(data) for name, data in self._get("ways", ask).items()}

    def model(self, stand: Stand) -> Model:
        """The real one; the store has what begins alike."""
        return self.lane.run.apply(
            Recipe.from_dict({"version": 1, "steps": [{name: values} for name, values in stand.steps]})
        )

    @cached_property
    def _forecaster(self) -> Forecaster:
        return Forecaster(self.lane.run, self.lane.scales.twin.bytes, widths=True)

    @property
    def lane(self) -> Lane:
        """The real run, started when it is first needed."""
        if self._lane is None:
            run: Run = self._subject.run(_RUNTIME, 0, self._folder / self._subject.name, self.progress)
            self._lane = Lane(run, Scales(run, Limits(seconds=self._settings.measure_s)))
        return self._lane

    @property
    def data(self) -> Data:
        """What is scored, for the choice of the simulated examples."""
        return self._subject.data(0)

    def _get(self, name: str, compute: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            if name not in self._known:
                part = f"{self._subject.name}-{name}"
                self._known[name] = self._parts.get(part, lambda: _or_refused(compute))
        finally:
            self.found_s += time.perf_counter() - began
        found = self._known[name]
        if isinstance(found, dict) and "refused" in found:
            raise RecipeError(found["refused"])
        return found


def _or_refused(compute: Callable[[], Any]) -> Any:
    """What is found, or why a recipe does not suit the network: other searches ask for it as well."""
    try:
        return compute()
    except RecipeError as error:
        return {"refused": error.what}


def _hole(data: Json) -> Hole:
    if "choice" in data:
        return Choice(tuple(data["choice"]))
    low, high = data["range"]
    return Range(low, high, data.get("log", False), data.get("step"), default=data.get("default"))


# ---- one search


@dataclass
class Searched:
    """What one search asked for.

    Attributes:
        seen: Measurements in their order.
        dropped: Candidates that cheap rungs ended.
        failed: Trials without an artifact.
        search_s: Seconds of asking, telling and judging.
        work_s: Seconds that the steps and measurements of its trials took when they were made.
    """

    seen: list[Measurement] = field(default_factory=list)
    dropped: int = 0
    failed: int = 0
    search_s: float = 0.0
    work_s: float = 0.0


def searched(known: Table, sampler: SamplerName, seed: int, trials: int, *, helped: bool) -> Searched:
    """One search.

    Args:
        known: Tells what each candidate is.
        sampler: What proposes.
        seed: Of the search.
        trials: To measure.
        helped: With the ladder and the sensitivity analysis.
    """
    baseline, found = known.baseline(), Searched()
    began, known.found_s = time.perf_counter(), 0.0
    search = Search(
        Recipe(()),
        _BUDGET,
        baseline=baseline,
        prefer=_PREFER,
        seed=seed,
        trials=trials,
        ways=known.ways(),
        sampler=sampler,
    )
    ladder = _ladder(known, baseline) if helped else None
    heard: set[str] = set()

    def ask(candidate: Candidate, index: int, step: Step, model: Any) -> Mapping[str, Hole]:
        holes = known.holes(step, model)
        if helped and candidate.opening is not None and candidate.way not in heard:
            values = known.starts(step, model, holes)
            if values:
                heard.add(candidate.way)
                candidate.opening, *others = [Opening("", candidate.way, {index: one}) for one in values]
                search.open_with(others)
        return holes

    while (candidate := search.ask()) is not None:
        up = None
        try:
            made = draft(
                cast(Run, known), candidate, ask, search.accept, whole=ladder is None or not found.seen
            )
            if made is None:
                continue
            if ladder is not None:
                past = search.trials if found.seen else []
                up, reason = climb(ladder, cast(Run, known), candidate.recipe, made, past)
                if reason is not None:
                    search.drop(candidate, reason, predicted=up.seen, expected=ladder.expected(up))
                    found.dropped += 1
                    continue
        except FeatherweightError as error:  # of this recipe
            found.failed += 1
            search.tell(candidate, Failure(error.what, unfit=isinstance(error, RecipeError)))
            continue
        outcome, seconds = known.measured(known.apply(candidate.recipe))
        found.work_s += seconds
        if isinstance(outcome, Failure):
            found.failed += 1
            search.tell(candidate, outcome)
            continue
        found.seen.append(outcome)
        search.tell(candidate, outcome, rejected=rejection(outcome, baseline, _BUDGET, _PREFER))
        if ladder is not None and up is not None:
            ladder.learn(up, outcome)
    found.search_s = time.perf_counter() - began - known.found_s
    return found


def _ladder(known: Table, baseline: Measurement) -> Ladder:
    scales = SimpleNamespace(twin=SimpleNamespace(bytes=baseline.bytes))
    lane = cast(
        Lane, SimpleNamespace(name=_RUNTIME, run=known, scales=scales, handicap=SimpleNamespace(median=1.0))
    )
    teller = cast(Forecaster, SimpleNamespace(of=known.forecast))
    return Ladder([lane], baseline, None, _BUDGET, _PREFER, forecasters={_RUNTIME: teller})


def volume(
    seen: Sequence[Measurement],
    baseline: Measurement,
    reference: tuple[float, float, float] = REFERENCE,
) -> float:
    """Share of the box from nothing at all to the reference in which a measured artifact is better."""
    points = [
        (
            max(one.quality_drop or 0.0, 0.0) / reference[0],
            (one.bytes or 0) / (baseline.bytes or 1) / reference[1],
            one.latency_ratio / reference[2],
        )
        for one in seen
        if one.quality_drop is not None and one.latency_ratio is not None
    ]
    inside = sorted((point for point in points if max(point) < 1), key=lambda point: point[2])
    levels = [*(point[2] for point in inside), 1.0]
    return sum(
        _area([point[:2] for point in inside[: index + 1]]) * (levels[index + 1] - levels[index])
        for index in range(len(inside))
    )


def _area(points: Sequence[tuple[float, float]]) -> float:
    found, below = 0.0, 1.0
    for x, y in sorted(points):
        if y < below:
            found, below = found + (1 - x) * (below - y), y
    return found


# ---- the table

KINDS: Mapping[str, tuple[SamplerName, bool]] = {
    "ours": ("tpe", True),
    "ours, without rungs and analysis": ("tpe", False),
    "random": ("random", False),
}
FIXED = "fixed recipe"
VOLUMES: Mapping[str, str] = {"volume": "the original", "volume_half": "half of it"}
HEADERS = (
    "network", "search", "volume", "of random's", "to the half", "of random's", "dropped", "failed",
    "own time",
)  # fmt: skip


def rows_of(known: Table, name: str, seeds: Sequence[int], trials: int) -> list[Json]:
    """What each search found on one network."""
    baseline = known.baseline()
    rows = []
    for kind, (sampler, helped) in KINDS.items():
        for seed in seeds:
            one = searched(known, sampler, seed, trials, helped=helped)
            rows.append(
                {
                    "network": name,
                    "search": kind,
                    "seed": seed,
                    "trials": len(one.seen) + one.failed,
                    "volume": volume(one.seen, baseline),
                    "volume_half": volume(one.seen, baseline, HALF),
                    "dropped": one.dropped,
                    "failed": one.failed,
                    "search_s": one.search_s,
                    "work_s": one.work_s,
                }
            )
    fixed, _ = known.measured(known.apply(_defaults(known)))
    seen = [] if isinstance(fixed, Failure) else [fixed]
    rows.append(
        {
            "network": name,
            "search": FIXED,
            "seed": None,
            "trials": 1,
            "volume": volume(seen, baseline),
            "volume_half": volume(seen, baseline, HALF),
        }
    )
    return rows


def _defaults(known: Table) -> Recipe:
    """The way that ``fit`` tries first, with the default of every hole."""
    recipe = next(iter(known.ways().values()))
    made = known.start
    for index in range(len(recipe.steps)):
        holes = known.holes(recipe.steps[index], made)
        recipe = recipe.filled({index: {name: hole.first for name, hole in holes.items()}})
        made = known.step(made, recipe.steps[index].build(), index + 1)
    return recipe


def mean(rows: Sequence[Json], network: str, kind: str, what: str) -> float:
    """Over the seeds."""
    return statistics.mean(row[what] for row in rows if (row["network"], row["search"]) == (network, kind))


def cells(rows: Sequence[Json], networks: Sequence[str]) -> list[list[str]]:
    """The table's lines: means over the seeds."""
    found = []
    for network in networks:
        for kind in (*KINDS, FIXED):
            line = [network, kind]
            for what in VOLUMES:
                own, chance = (mean(rows, network, one, what) for one in (kind, "random"))
                line += [f"{own:.4f}", f"{own / chance:.2f}" if chance else "–"]
            if kind in KINDS:
                share = mean(rows, network, kind, "search_s") / (
                    mean(rows, network, kind, "work_s") + mean(rows, network, kind, "search_s")
                )
                more = [f"{mean(rows, network, kind, what):.1f}" for what in ("dropped", "failed")]
                line += [*more, f"{share:.2%}"]
            found.append([*line, *["–"] * (len(HEADERS) - len(line))])
    return found


def bars_of(rows: Sequence[Json], networks: Sequence[str]) -> list[Bar]:
    """The promises."""
    bars = []
    for network in networks:
        for what, words in VOLUMES.items():
            own, chance, fixed = (mean(rows, network, kind, what) for kind in ("ours", "random", FIXED))
            ratio = own / chance if chance else float("inf")
            told = f"volume up to {words} at least {_BEYOND_CHANCE:g} x random's"
            kept = ratio >= _BEYOND_CHANCE if own or chance else None  # nobody reached the box at all
            bars.append(Bar(network, told, f"{ratio:.3f}" if chance else f"{own:.4f} to 0", kept))
            told = f"volume up to {words} above the fixed recipe's"
            kept = own > fixed if own or fixed else None
            bars.append(Bar(network, told, f"{own:.4f} to {fixed:.4f}", kept))
        spent = mean(rows, network, "ours", "search_s")
        share = spent / (spent + mean(rows, network, "ours", "work_s"))
        bars.append(
            Bar(network, f"the search itself at most {_OVERHEAD:.0%}", f"{share:.2%}", share <= _OVERHEAD)
        )
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--trials", type=int, default=24, help="measured trials of each search (24)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the searches (0 1 2)")
    parser.add_argument("--quick", action="store_true", help="one network, few trials and examples: minutes")
    args = parser.parse_args()
    shown = Shown()
    tell_load(shown)
    settings = Settings(32, 500, 50, 2.0) if args.quick else Settings()
    networks = args.networks[:1] if args.quick else args.networks
    trials, seeds = (4, [0]) if args.quick else (args.trials, args.seeds)
    parts, rows = Parts("search", vars(settings), shown), list[Json]()
    with tempfile.TemporaryDirectory(prefix="featherweight-bench-") as folder:
        for name in networks:
            one = subject(name, Path(folder), settings.calibration, settings.scored)
            shown.note(f"{name}: {one.words}")
            rows += rows_of(Table(one, settings, parts, Path(folder), shown), name, seeds, trials)
    print(
        f"\n{trials} measured trials, seeds {', '.join(map(str, seeds))}; volume up to a drop of "
        f"{_LIMIT:.0%} and to the original's bytes and latency on {_RUNTIME}, or to half of both"
    )
    print(table(HEADERS, cells(rows, networks)))
    finish("search", rows, bars_of(rows, networks), {**vars(settings), "references": [REFERENCE, HALF]}, 1)
    if not args.quick:
        parts.forget()


if __name__ == "__main__":
    main()
