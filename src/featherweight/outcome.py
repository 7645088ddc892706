"""What was asked, what was seen, what is handed back: the classes behind ``result.json`` (schema 1).

docs/result.md describes every field; these models validate the file.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from featherweight.errors import BudgetError

Axis = Literal["quality_drop", "bytes", "latency_s", "memory_bytes"]
Preference = Literal["balanced", "latency", "bytes", "quality"]
Rung = Literal["cost", "simulated", "recovered", "measured"]
Level = Literal["quick", "standard", "thorough"]
LEVELS: tuple[Level, ...] = ("quick", "standard", "thorough")
EVEN = 0.02  # the interval that latencies are measured to: figures so near to each other are even
AXES: tuple[Axis, ...] = ("quality_drop", "bytes", "latency_s", "memory_bytes")

_SIZES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"^\s*([+-]?[0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-zA-Z%]*)\s*$")


def _quantity(text: str, what: str, units: dict[str, float], example: str) -> float:
    match = _QUANTITY.match(text)
    known = ", ".join(units)
    if match is None:
        raise BudgetError(f"{what} '{text}' is not a number with a unit", fix=f"write for example {example}")
    number, unit = float(match[1]), match[2].lower()
    if unit not in units:
        said = f"has the unknown unit '{match[2]}'" if unit else "has no unit"
        raise BudgetError(f"{what} '{text}' {said}", fix=f"use one of {known}, for example {example}")
    if number < 0 or not math.isfinite(number):
        said = "negative" if number < 0 else "too large"
        raise BudgetError(f"{what} '{text}' is {said}", fix=f"write for example {example}")
    return number * units[unit]


def parse_size(text: str, what: str = "size") -> int:
    """Bytes of '300KB' (1000) or '300KiB' (1024)."""
    return round(_quantity(text, what, dict(_SIZES), "300KB"))


def parse_time(text: str, what: str = "time", example: str = "5ms") -> float:
    """Seconds of '5ms', '10m'."""
    return _quantity(text, what, _TIMES, example)


def parse_drop(text: str, what: str = "drop") -> float:
    """A fraction of '0.5%' (0.005) or '0.005'."""
    return _quantity(text, what, {"%": 0.01, "": 1.0}, "0.5%")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Budget(_Record):
    """Limits; None where there is none.

    Attributes:
        quality_drop: Largest drop against the original, absolute for scores in 0..1, else a
            fraction of the original's score.
        bytes: Largest sum of the files that the runtime loads.
        latency_s: Largest median latency, seconds.
        memory_bytes: Largest peak resident memory above the imported runtime's.
        drops: Of several tasks, the largest drop of each one that is named; ``quality_drop`` is that of any.
    """

    quality_drop: float | None = None
    bytes: int | None = None
    latency_s: float | None = None
    memory_bytes: int | None = None
    drops: dict[str, float] | None = None


class Flips(_Record):
    """Predictions that compression changed: right to wrong, and wrong to right."""

    lost: int
    won: int


class WorstClass(_Record):
    """The class that lost most."""

    label: str
    drop: float


class ClassChange(_Record):
    """One class before and after."""

    label: str
    examples: int
    before: float
    after: float


class TaskScore(_Record):
    """One of several tasks, on the same examples.

    Attributes:
        name: The user's.
        metric: What scores it.
        bounded: Its scores lie in 0..1, and its drop is absolute.
        quality: Its score.
        quality_drop: Against its own network's score.
        quality_drop_ci95: Paired 95 % interval.
    """

    name: str
    metric: str
    bounded: bool = True
    quality: float
    quality_drop: float
    quality_drop_ci95: tuple[float, float] | None = None


class Latency(_Record):
    """Seconds of one call."""

    median: float
    q1: float
    q3: float


class Measurement(_Record):
    """What was seen of one artifact through its runtime; None where nothing measured it."""

    quality: float | None = None
    quality_drop: float | None = None
    quality_drop_ci95: tuple[float, float] | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    flips: Flips | None = None
    worst_class: WorstClass | None = None
    bytes: int | None = None
    packed_bytes: int | None = None
    latency_s: Latency | None = None
    latency_ratio: float | None = None
    latency_ratio_ci95: tuple[float, float] | None = None
    resolved: bool | None = None
    throughput: float | None = None
    peak_rss_bytes: int | None = None
    memory_bytes: int | None = None
    energy_j: float | None = None
    macs: int | None = None
    params: int | None = None
    weight_bits: float | None = None
    tasks: list[TaskScore] = []

    def size_ratio(self, baseline: Measurement) -> float | None:
        """What is stored and what is downloaded to the original's, in equal parts (their geometric mean).

        What nothing packed counts by its bytes alone; what has no bytes has no ratio.
        """
        if self.bytes is None or not baseline.bytes:
            return None
        stored = self.bytes / baseline.bytes
        if self.packed_bytes is None or not baseline.packed_bytes:
            return stored
        return math.sqrt(stored * self.packed_bytes / baseline.packed_bytes)

    def value(self, axis: Axis) -> float | None:
        """The figure that a limit on this axis is held against."""
        if axis == "latency_s":
            return None if self.latency_s is None else self.latency_s.median
        return getattr(self, axis)  # type: ignore[no-any-return]


def score(measurement: Measurement, prefer: Preference, baseline: Measurement) -> tuple[float, ...]:
    """What a search makes small: compared from the left; a figure that is missing is infinite."""
    latency = or_infinite(measurement.latency_ratio)
    size = or_infinite(measurement.bytes) / baseline.bytes if baseline.bytes else math.inf
    drop = or_infinite(measurement.quality_drop)
    product = latency * or_infinite(measurement.size_ratio(baseline))
    orders: dict[Preference, tuple[float, ...]] = {
        "balanced": (product, drop),
        "latency": (latency, size, drop),
        "bytes": (size, latency, drop),
        "quality": (drop, product),
    }
    return orders[prefer]


def or_infinite(value: float | None) -> float:
    """A figure that is missing is worse than any other."""
    return math.inf if value is None or math.isnan(value) else float(value)


class Chosen(Measurement):
    """The measurement of what is handed back, which file it is, and with which options it was measured."""

    artifact: str
    runtime: str
    sha256: str
    options: dict[str, Any] | None = None


class Violation(_Record):
    """A limit that is not kept: by how much."""

    axis: Axis
    limit: float
    value: float | None
    reason: str


class Relaxation(_Record):
    """The cheapest single limit to move so that a measured artifact would do."""

    axis: Axis
    limit: float
    trial: int
    text: str


class Move(_Record):
    """One limit that is moved.

    Attributes:
        axis: Which one.
        limit: Where to.
        by: How much more that is than what was asked.
    """

    axis: Axis
    limit: float
    by: float


class Alternative(_Record):
    """Limits to move together so that a measured artifact would do.

    Attributes:
        moves: Each limit that is moved.
        trial: The artifact that would then do; no other measured one needs less on one axis and no more on
            the others.
        cost: Sum of the moves, each relative to its limit.
        text: The same in words.
    """

    moves: list[Move]
    trial: int
    cost: float
    text: str


class Prediction(_Record):
    """What a cheap rung of the search's ladder said of a candidate; nothing here is measured.

    Attributes:
        rung: ``cost`` (shapes and formats alone), ``simulated`` (quality without the steps that take long) or
            ``recovered`` (after a short part of them).
        quality_drop: On a few of the selecting examples.
        bytes: Of the artifact.
        latency_ratio: Against the original on the search's first runtime.
        macs: For one example.
        seconds: That it took to find out.
    """

    rung: Rung
    quality_drop: float | None = None
    bytes: int | None = None
    latency_ratio: float | None = None
    macs: int | None = None
    seconds: float = 0.0


class RungRow(_Record):
    """One rung of the search's ladder, and how its predictions compared with what was measured.

    Attributes:
        name: As in :class:`Prediction`; ``measured`` is the last one.
        candidates: That came to it.
        dropped: That went no further.
        seconds: That it took; of the last one, the rest of the steps included.
        compared: Candidates of which both a prediction and a measurement are known.
        drop_error: Median absolute error of the drop, once learned from the others; None: not known.
        bytes_error: The same of the bytes, relative.
        latency_error: The same of the latency ratio, relative.
    """

    name: Rung
    candidates: int
    dropped: int = 0
    seconds: float = 0.0
    compared: int = 0
    drop_error: float | None = None
    bytes_error: float | None = None
    latency_error: float | None = None


class Trial(_Record):
    """One recipe that was tried; a dropped one was only predicted, and has no measurement."""

    number: int
    runtime: str = ""
    way: str = ""
    recipe: dict[str, Any]
    state: Literal["measured", "rejected", "failed", "dropped"]
    measurement: Measurement | None = None
    within_budget: bool | None = None
    chosen: bool = False
    reason: str = ""
    seconds: float = 0.0
    training_s: float = 0.0
    sha256: str | None = None
    predicted: list[Prediction] = []


class Way(_Record):
    """One way through the methods that a search without a recipe tries.

    Attributes:
        name: What trials are told by.
        recipe: Its steps; what they leave open was searched.
        predicted_s: Seconds until its model is ready, as predicted before the search.
        trials: How many trials took it.
    """

    name: str
    recipe: dict[str, Any]
    predicted_s: float
    trials: int = 0


class Effort(_Record):
    """How much a search without a recipe did in the time that there was.

    Attributes:
        level: ``quick``, ``standard`` or ``thorough``; by the time, and by how long a pass takes.
        time_s: Seconds that were allowed.
        seconds: That the search took.
        example_s: Of a float forward pass of one example in torch, by which all is predicted.
        ways: In the order in which they were tried.
        longer: What a longer time would add.
    """

    level: Level
    time_s: float
    seconds: float
    example_s: float
    ways: list[Way]
    longer: str = ""


class Spread(_Record):
    """What a tensor holds, and the range that it is quantized to.

    Attributes:
        low: End of the range; None where nothing is quantized. Per channel or group: the smallest.
        high: Other end; the largest.
        seen_low: Smallest value.
        seen_high: Largest value.
        clipped: Share of the values that lie further than half a step outside of the grid.
        counts: Values in equal bins from ``seen_low`` to ``seen_high``.
    """

    low: float | None = None
    high: float | None = None
    seen_low: float
    seen_high: float
    clipped: float | None = None
    counts: list[int] = []


class LayerRow(_Record):
    """One layer before and after, for the report. Decibels, ranges and histograms are simulated.

    Attributes:
        name: Its path; a function has its traced name.
        type: Its class, or the operator.
        macs: For one example.
        params: Parameters.
        bytes_before: Of the parameters before the steps.
        bytes_after: In the artifact.
        stored: Type of the weight in the artifact.
        sqnr_db: Of its output when it alone is in its formats.
        in_place_db: Of its output inside the whole quantized network, against the float one.
        weight: What its weight holds.
        activation: What it reads.
    """

    name: str
    type: str
    macs: int
    params: int
    bytes_before: int
    bytes_after: int
    stored: str
    sqnr_db: float | None = None
    in_place_db: float | None = None
    weight: Spread | None = None
    activation: Spread | None = None


class RuntimeRow(_Record):
    """One runtime of a search: the original on it, and the best artifact for it.

    Attributes:
        runtime: Its name.
        version: Of its packages.
        reason: Why there is no figure of it.
        twin_bytes: Of the original's artifact.
        twin_ratio: The original's latency against the original's on the first runtime of the search.
        twin_ratio_ci95: Its 95 % interval.
        float_error: Largest error of the original's outputs against PyTorch, relative to the largest output.
        trial: The best one on this runtime.
        bytes: Of its artifact.
        latency_ratio: Of its artifact, against the original on the first runtime of the search.
        latency_ratio_ci95: Its 95 % interval.
        own_ratio: Of its artifact, against the original on the same runtime.
        own_ratio_ci95: Its 95 % interval.
        agreement: Of its artifact with the original.
        sqnr_db: Of its artifact against the original.
        parity_db: Of its artifact against the simulation of its formats, on the same inputs.
        chosen: It is what is handed back.
    """

    runtime: str
    version: str = ""
    reason: str = ""
    twin_bytes: int | None = None
    twin_ratio: float | None = None
    twin_ratio_ci95: tuple[float, float] | None = None
    float_error: float | None = None
    trial: int | None = None
    bytes: int | None = None
    latency_ratio: float | None = None
    latency_ratio_ci95: tuple[float, float] | None = None
    own_ratio: float | None = None
    own_ratio_ci95: tuple[float, float] | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    parity_db: float | None = None
    chosen: bool = False


class KernelRow(_Record):
    """One step that the runtime really executes for a call of the artifact; its share of the time."""

    name: str
    op: str
    dtype: str = ""
    fast: bool = True
    share: float | None = None
    note: str = ""


class StepRow(_Record):
    """What the network was after one step of the chosen recipe, and after all steps before it.

    Attributes:
        name: The method; ``student`` for another network that the steps started from.
        parameters: What the recipe says of it.
        state: ``measured`` on an artifact, ``simulated`` without one, or ``unknown``.
        measurement: Its figures; of a simulated one quality, bytes and counts only.
        examples: Scored examples that gave its quality.
        reason: Why it was not measured.
    """

    name: str
    parameters: dict[str, Any] = {}
    state: Literal["measured", "simulated", "unknown"]
    measurement: Measurement | None = None
    examples: int = 0
    reason: str = ""


class Dropped(_Record):
    """Trials of one way that were not chosen for the same reason.

    Attributes:
        way: Which of the effort's ways they took; empty where a recipe was given.
        reason: In a few words.
        trials: Their numbers.
        example: What was said of the first one; empty where the reason says it all.
    """

    way: str = ""
    reason: str
    trials: list[int]
    example: str = ""


class Importance(_Record):
    """How much one parameter that was left open decides; shares of all of them, by figure.

    Attributes:
        parameter: ``way``, ``runtime``, or a method and its parameter.
        quality_drop: Its share in reaching a small drop.
        bytes: Its share in reaching a small size.
        latency_ratio: Its share in reaching a small latency.
    """

    parameter: str
    quality_drop: float | None = None
    bytes: float | None = None
    latency_ratio: float | None = None


class Importances(_Record):
    """What mattered among all that trials differ in.

    Attributes:
        evaluator: How it was computed.
        trials: Measured trials that tell.
        best: Share of them that counts as good.
        rows: The largest first.
        reason: Why there are none.
    """

    evaluator: str = ""
    trials: int = 0
    best: float | None = None
    rows: list[Importance] = []
    reason: str = ""


class CorruptionRow(_Record):
    """Scores on pictures with one corruption of one severity.

    Attributes:
        kind: ``noise``, ``blur``, ``contrast``, ``brightness``, ``occlusion`` or ``jpeg``.
        severity: 1 to 5.
        before: The original's; None where there was no twin.
        after: The artifact's.
    """

    kind: str
    severity: int
    before: float | None = None
    after: float


class TaskRobustness(_Record):
    """What corrupted pictures cost one of several tasks; fields are those of :class:`Robustness`.

    Attributes:
        name: The user's.
        metric: What scores it.
        bounded: Its scores lie in 0..1, and its drop is absolute.
    """

    name: str
    metric: str
    bounded: bool = True
    clean_before: float | None = None
    clean_after: float
    drop_before: float | None = None
    drop_after: float
    extra_drop: float | None = None
    extra_drop_ci95: tuple[float, float] | None = None


class Robustness(_Record):
    """What corrupted pictures cost the original and the artifact, both through the runtime.

    Attributes:
        examples: Scored pictures of each corruption and severity, the same ones in all.
        pictures: How inputs hold them, and what told the range.
        constants: Whose they are: ``ImageNet-C`` or ``CIFAR-10-C``.
        clean_before: The original's score on the same pictures as they are.
        clean_after: The artifact's.
        mean_before: Mean of the original's scores over corruptions and severities.
        mean_after: The artifact's.
        drop_before: Mean drop of the original against its own score on clean pictures, as budgets count it.
        drop_after: The artifact's, against its own.
        extra_drop: How much more the artifact loses.
        extra_drop_ci95: Its 95 % interval by a paired bootstrap over pictures; None where rows of the metric
            cannot be averaged.
        error_ratio: Mean over corruptions of the artifact's error over the original's, each added up over
            severities, as mCE does; None where the metric has no error or the original none.
        rows: One for each corruption and severity.
        tasks: Each task of several by itself; their mean is what the other fields tell.
    """

    examples: int
    pictures: str
    constants: str
    clean_before: float | None = None
    clean_after: float
    mean_before: float | None = None
    mean_after: float
    drop_before: float | None = None
    drop_after: float
    extra_drop: float | None = None
    extra_drop_ci95: tuple[float, float] | None = None
    error_ratio: float | None = None
    rows: list[CorruptionRow]
    tasks: list[TaskRobustness] = []


class Confidence(_Record):
    """Whether one network is as often right as it says.

    Attributes:
        ece: Expected calibration error: 15 bins of equal width, probability of the top class.
        adaptive_ece: The same over bins of equally many examples.
        confidence: Mean probability of the predicted class.
        accuracy: Share of right predictions on the same examples.
        loss: Mean cross-entropy, nats.
    """

    ece: float
    adaptive_ece: float
    confidence: float
    accuracy: float
    loss: float


class Calibration(_Record):
    """Calibration of class probabilities before and after.

    Attributes:
        examples: Scored ones.
        outputs: What the network gives: ``scores``, of which a softmax makes probabilities, or those.
        before: The original; None where there was no twin.
        after: The artifact.
    """

    examples: int
    outputs: Literal["scores", "probabilities"]
    before: Confidence | None = None
    after: Confidence


class Attack(_Record):
    """What the loss of an example tells of whether one network was trained on it.

    Attributes:
        auc: Of a threshold on the loss; 0.5 tells nothing.
        auc_ci95: Its 95 % interval (DeLong).
        member_loss: Mean cross-entropy of training examples, nats.
        other_loss: Of the others.
    """

    auc: float
    auc_ci95: tuple[float, float]
    member_loss: float
    other_loss: float


class Privacy(_Record):
    """A loss-threshold membership-inference attack before and after.

    Attributes:
        members: Training examples.
        others: Scored examples, as many.
        before: On the original; None where there was no twin.
        after: On the artifact.
        change: AUC after less before.
        change_ci95: Its 95 % interval, of the same examples.
    """

    members: int
    others: int
    before: Attack | None = None
    after: Attack
    change: float | None = None
    change_ci95: tuple[float, float] | None = None


class StudentRow(_Record):
    """A network that ``--student auto`` looked at.

    Attributes:
        student: As ``--student`` takes it.
        params: Its parameters.
        macs: Its multiply-accumulates for one example.
        predicted_bytes: Of its int8 artifact, before it was lowered.
        bytes: Of its int8 artifact, lowered untrained; empty where it was not.
        predicted_latency_s: Of a call, before it was timed.
        latency_s: Of a call, measured.
        epochs: Of all training examples, in the short training.
        quality_drop: What it lost against the original after that, in float; empty where it was not trained.
        chosen: It is the student.
        reason: What became of it.
    """

    student: str
    params: int
    macs: int
    predicted_bytes: int | None = None
    bytes: int | None = None
    predicted_latency_s: float | None = None
    latency_s: float | None = None
    epochs: float = 0.0
    quality_drop: float | None = None
    chosen: bool = False
    reason: str = ""


class Environment(_Record):
    """Where it was measured."""

    cpu: str
    isa: str
    flags: list[str]
    cores: int
    threads: int
    memory_bytes: int
    platform: str
    python: str
    versions: dict[str, str]


class Result(_Record):
    """Everything that ``fit`` hands back; ``result.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    met: bool
    met_confident: bool
    budget: Budget
    prefer: Preference = "balanced"
    metric: str
    baseline: Measurement
    chosen: Chosen
    blocking: list[Violation] = []
    relaxation: Relaxation | None = None
    relaxations: list[Alternative] = []
    examples_needed: int | None = None
    recipe: dict[str, Any]
    trials: list[Trial]
    environment: Environment
    warnings: list[str] = []
    layers: list[LayerRow] = []
    classes: list[ClassChange] = []
    runtimes: list[RuntimeRow] = []
    kernels: list[KernelRow] = []
    steps: list[StepRow] = []
    dropped: list[Dropped] = []
    importances: Importances | None = None
    ladder: list[RungRow] = []
    robustness: Robustness | None = None
    calibration: Calibration | None = None
    privacy: Privacy | None = None
    omitted: dict[str, str] = {}
    examples: dict[str, Any] = {}
    effort: Effort | None = None
    student: str = ""
    students: list[StudentRow] = []
    teacher: str = ""
    resumed: int = 0
    run: str = ""

    def to_json(self) -> str:
        """The text of ``result.json``."""
        return self.model_dump_json(indent=2, by_alias=True) + "\n"
