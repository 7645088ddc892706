"""One lane per runtime of a search: its scales, and how its latencies compare with those of the other lanes.

Every artifact is timed in turn with the original on its own runtime, in one process, which gives a tight
ratio. The originals of all runtimes are timed in turn with that of the first one, each in its own
process, once. The product of both ratios compares artifacts of different runtimes; those between
which the answer is chosen are then timed in turn with each other. What the original gives is found on the
first runtime: all artifacts are held against that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from featherweight.engine.evaluate import Scales, Weighed
from featherweight.engine.paced import Entrant, Ratio, measure_paced
from featherweight.engine.run import Run
from featherweight.engine.store import digest
from featherweight.engine.timing import Limits
from featherweight.errors import FeatherweightError
from featherweight.outcome import Latency, Measurement

_RESOLVED = 0.05
_EVEN = Ratio(1.0, None)


@dataclass(frozen=True)
class Lane:
    """One runtime of a search.

    Attributes:
        run: The original, its data and this runtime's target.
        scales: What weighs its artifacts.
        handicap: Latency of the original on it, against the original on the first lane's runtime.
    """

    run: Run
    scales: Scales
    handicap: Ratio = _EVEN

    @property
    def name(self) -> str:
        return str(self.run.target.runtime)

    def measurement(self, weighed: Weighed, indices: np.ndarray | None = None) -> Measurement:
        """What was seen of an artifact; its latency ratio is told against the first lane's original."""
        return scaled(self.scales.measurement(weighed, indices), self.handicap)


@dataclass(frozen=True)
class Direct:
    """An artifact timed in turn with the first lane's original and other artifacts.

    Attributes:
        ratio: To that original.
        latency: Of the artifact.
        twin: Of that original.
    """

    ratio: Ratio
    latency: Latency
    twin: Latency

    def applied(self, seen: Measurement) -> Measurement:
        """The measurement with these latencies."""
        return seen.model_copy(
            update={
                "latency_s": self.latency,
                "latency_ratio": self.ratio.median,
                "latency_ratio_ci95": self.ratio.ci95,
                "resolved": self.ratio.resolved,
            }
        )


def scaled(seen: Measurement, handicap: Ratio) -> Measurement:
    """A measurement whose ratio is multiplied; the ends of a product's interval are those of its factors'."""
    if handicap == _EVEN or seen.latency_ratio is None:
        return seen
    own = seen.latency_ratio_ci95
    interval = None
    if own is not None and handicap.ci95 is not None:
        interval = own[0] * handicap.ci95[0], own[1] * handicap.ci95[1]
    ratio = seen.latency_ratio * handicap.median
    known = interval is not None and (interval[1] - interval[0]) / 2 <= _RESOLVED * ratio
    return seen.model_copy(
        update={
            "latency_ratio": ratio,
            "latency_ratio_ci95": interval,
            "resolved": bool(seen.resolved and known),
        }
    )


def make_lanes(runs: Sequence[Run], limits: Limits, *, failures: dict[str, FeatherweightError]) -> list[Lane]:
    """A lane for each run whose runtime can take the original.

    Args:
        runs: The same original and data, one target each.
        limits: How long and how well to measure.
        failures: Takes the runtimes that cannot, and why.

    Raises:
        FeatherweightError: None of them can; why the first one cannot.
    """
    lanes: list[Lane] = []
    for run in runs:
        try:
            lanes.append(Lane(run, Scales(run, limits, lanes[0].scales if lanes else None)))
        except FeatherweightError as error:
            if len(runs) == 1:
                raise
            failures[run.target.runtime] = error
            run.progress.note(f"runtime {run.target.runtime} is left out: {error.what}")
    if not lanes:
        raise next(iter(failures.values()))
    return _with_handicaps(lanes, limits, failures)


def _with_handicaps(lanes: list[Lane], limits: Limits, failures: dict[str, FeatherweightError]) -> list[Lane]:
    """Time the originals of all lanes in turn; those that cannot be timed drop out."""
    if len(lanes) == 1:
        return lanes
    first = lanes[0]

    def compute() -> dict[str, Any]:
        entrants = [Entrant(lane.scales.twin, lane.run.target) for lane in lanes]
        rounds = measure_paced(
            entrants,
            first.scales.inputs(),
            limits=replace(limits, seconds=limits.seconds / 2, precision=_RESOLVED / 2),
            progress=first.run.progress,
            description="Comparing runtimes",
        )
        return {
            "ratios": {
                lane.name: asdict(rounds.ratio(index))
                for index, lane in enumerate(lanes)
                if index not in rounds.failed
            },
            "failed": {lanes[index].name: error.what for index, error in rounds.failed.items()},
        }

    twins = [
        [lane.scales.twin.sha256, lane.run.target.to_json(), lane.run.runtime.version()] for lane in lanes
    ]
    machine = _environment(first)
    key = digest("handicaps", twins, asdict(limits), machine, first.run.sources)
    store = first.run.store
    known = store.get_json("latency", key)
    if known is None:
        known = compute()
        store.put_json("latency", key, known)
    for name, what in known["failed"].items():
        failures[name] = FeatherweightError(what)
        first.run.progress.note(f"runtime {name} is left out: {what}")
    return [
        replace(lane, handicap=_ratio(known["ratios"][lane.name]))
        for lane in lanes
        if lane.name in known["ratios"]
    ]


def _environment(lane: Lane) -> Any:
    """Where it is measured, as data."""
    return lane.scales.environment.model_dump(mode="json")


def _ratio(told: Mapping[str, Any]) -> Ratio:
    interval = told["ci95"]
    if told["median"] == 1.0:
        return _EVEN  # the first lane itself
    return Ratio(told["median"], None if interval is None else (interval[0], interval[1]))


def time_together(
    first: Lane,
    chosen: Sequence[tuple[Lane, Weighed]],
    limits: Limits,
    twin_options: Mapping[str, Any] | None = None,
) -> list[Direct | None]:
    """Time artifacts of several lanes in turn with the first lane's original and with each other.

    Args:
        first: Whose original it is.
        chosen: The artifacts, each with the options of its session.
        limits: How long and how well to measure.
        twin_options: Of the original's session, where they are not the target's.

    Returns:
        One each; None for one that could not be timed.
    """
    where = first.run.target if twin_options is None else replace(first.run.target, options=twin_options)
    entrants = [Entrant(first.scales.twin, where)] + [
        Entrant(weighed.artifact, replace(lane.run.target, options=weighed.options))
        for lane, weighed in chosen
    ]

    def compute() -> list[Any]:
        rounds = measure_paced(
            entrants,
            first.scales.inputs(),
            limits=limits,
            progress=first.run.progress,
            description="Comparing the best",
        )
        return [
            None
            if index in rounds.failed
            else {"ratio": asdict(rounds.ratio(index)), "latency": asdict(rounds.summary(index))}
            for index in range(len(entrants))
        ]

    told = [[one.artifact.sha256, one.target.to_json()] for one in entrants]
    versions = [lane.run.runtime.version() for lane, _ in chosen]
    key = digest("together", told, versions, asdict(limits), _environment(first), first.run.sources)
    known = first.run.store.get_json("latency", key)
    if known is None:
        known = compute()
        first.run.store.put_json("latency", key, known)
    twin = Latency(**known[0]["latency"])
    return [
        None if one is None else Direct(_ratio(one["ratio"]), Latency(**one["latency"]), twin)
        for one in known[1:]
    ]
