"""Weighs models: lowered, scored and timed beside the original; every part is kept in the store.

The original, lowered for the same target, is the twin of every artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from featherweight.engine import parity
from featherweight.engine.asked import told_kernels
from featherweight.engine.costs import example_call
from featherweight.engine.devices import for_runtime
from featherweight.engine.environment import describe_device
from featherweight.engine.jobs import CallRefused
from featherweight.engine.measure import (
    Limits,
    Memory,
    Quality,
    Scored,
    Timing,
    measure_latency,
    measure_memory,
    quality,
    score_artifact,
)
from featherweight.engine.packing import packed
from featherweight.engine.quality import task_scores
from featherweight.engine.run import Run
from featherweight.engine.sources import scoring_code
from featherweight.engine.store import digest
from featherweight.engine.tune import LONGEST_S, tune
from featherweight.errors import DataError
from featherweight.model import Model
from featherweight.outcome import KernelRow, Latency, LayerRow, Measurement
from featherweight.runtime import Artifact
from featherweight.tools.costs import LayerCost, layer_costs
from featherweight.tools.layer_report import LayerFigures, by_layer, layer_figures

Options = Mapping[str, Any]
_LAYER_EXAMPLES = 32  # the figures are a guide, the artifact's score is what counts


@dataclass(frozen=True)
class Weighed:
    """One model's artifact and what was seen of it; the measurement depends on which examples count.

    Attributes:
        artifact: Its files.
        scored: Its outputs' scores.
        timing: In turn with its twin.
        memory: Of its session alone; None where nobody asked.
        options: With which its session was opened.
        twin_options: With which its twin's was.
    """

    artifact: Artifact
    scored: Scored
    timing: Timing
    memory: Memory | None
    options: Mapping[str, Any] = field(default_factory=dict)
    twin_options: Mapping[str, Any] = field(default_factory=dict)


class Scales:
    """Weighs models against one original.

    Args:
        run: The original, its data, its target and the store.
        limits: How long and how well to measure.
        reference: Of the same original on another runtime, whose scores of it count here too; None: this
            runtime's own count.
    """

    def __init__(self, run: Run, limits: Limits | None = None, reference: Scales | None = None) -> None:
        self.run = run
        self.limits = limits or Limits()
        self.environment = describe_device(run.target)
        self._machine = digest(
            self.environment.cpu, self.environment.flags, self.environment.cores, self.environment.versions
        )
        self.twin = run.lower(run.original)
        self._standard: Artifact = self.twin if reference is None else reference._standard
        self.twin_scored: Scored = self._score_original() if reference is None else reference.twin_scored

    def _score_original(self) -> Scored:
        try:
            return self._score(self.twin, None)
        except CallRefused as error:
            raise DataError(
                f"the original does not take the scored examples: {error.what}",
                where=error.where,
                fix=error.fix,
            ) from error

    def weigh(self, model: Model) -> Weighed:
        """Lower, score and time a model.

        Raises:
            TargetError: The runtime cannot store it.
            RunnerError: A measuring process crashed or hung.
        """
        if self.run.hands is not None:
            self.run.hands.weigh(self.run, model.key)
        return self._weigh(self.run.lower(model), self.run.target.options, self.run.target.options)

    def score(self, model: Model) -> Artifact:
        """Lower and score a model, so that its score is in the store; its artifact.

        Raises:
            TargetError: The runtime cannot store it.
            RunnerError: A measuring process crashed or hung.
        """
        artifact = self.run.lower(model)
        self._score(artifact, self.twin_scored, self.run.target.options)
        return artifact

    def beside(self, model: Model, other: Weighed, limits: Limits) -> Weighed:
        """Lower, score and time a model with the options of another artifact, but not its memory.

        Raises:
            TargetError: The runtime cannot store it.
            RunnerError: A measuring process crashed or hung.
        """
        artifact = self.run.lower(model)
        scored = self._score(artifact, self.twin_scored, other.options)
        timing = self._time(artifact, other.options, other.twin_options, limits)
        return Weighed(artifact, scored, timing, None, other.options, other.twin_options)

    def _weigh(self, artifact: Artifact, options: Options, twin_options: Options) -> Weighed:
        return Weighed(
            artifact,
            self._score(artifact, self.twin_scored, options),
            self._time(artifact, options, twin_options),
            self._memory(artifact, options),
            options,
            twin_options,
        )

    @property
    def tuning_s(self) -> float:
        """Seconds that finding the options takes at most, the original's too; 0 where there are none."""
        run = self.run
        return 2 * LONGEST_S if run.runtime.tunings(for_runtime(run.target)) else 0.0

    def tuned(self, weighed: Weighed) -> Weighed:
        """The artifact and its twin, each weighed again with the options that are fastest for it."""
        options, twin_options = self._tune(weighed.artifact), self.twin_options()
        if (options, twin_options) == (dict(weighed.options), dict(weighed.twin_options)):
            return weighed
        return self._weigh(weighed.artifact, options, twin_options)

    def twin_options(self) -> Options:
        """The options that are fastest for the original."""
        return self._tune(self.twin)

    def _tune(self, artifact: Artifact) -> dict[str, Any]:
        run = self.run
        sets = run.runtime.tunings(for_runtime(run.target))

        def compute() -> dict[str, Any]:
            return tune(
                artifact,
                run.target,
                sets,
                self.inputs(),
                limits=self.limits,
                entry="forward",
                progress=run.progress,
            )

        key = self.key("options", artifact, [dict(one) for one in sets], asdict(self.limits))
        return dict(self.kept("options", key, compute))

    def float_error(self) -> float | None:
        """Largest error of the original's artifact against PyTorch, relative to the largest output."""

        def compute() -> float | None:
            batches = parity.some_batches(self.run.data, self.inputs())
            seen = parity.outputs_of(self.twin, self.run.target, batches, self.limits)
            return parity.largest_error(seen, parity.simulated(self.run.original, batches))

        return self._number("float", self.twin, compute)

    def parity(self, model: Model, weighed: Weighed) -> float | None:
        """SQNR of an artifact's outputs against the simulation of its formats, decibels."""

        def compute() -> float | None:
            batches = parity.some_batches(self.run.data, self.inputs())
            where = replace(self.run.target, options=weighed.options)
            seen = parity.outputs_of(weighed.artifact, where, batches, self.limits)
            return parity.decibels(seen, parity.simulated(model, batches))

        return self._number("parity", weighed.artifact, compute, dict(weighed.options))

    def steadiness(self, model: Model, weighed: Weighed) -> float | None:
        """How far the simulation is from itself when its inputs move by a millionth, decibels."""

        def compute() -> float | None:
            return parity.steadiness(model, parity.some_batches(self.run.data, self.inputs()))

        return self._number("steadiness", weighed.artifact, compute)

    def _number(
        self, kind: str, artifact: Artifact, compute: Callable[[], float | None], *more: Any
    ) -> float | None:
        """A figure of an artifact on calibration examples, kept as a list of one: JSON's null is a miss."""
        key = self.key(kind, artifact, self.run.data.fingerprint, *more)
        kept: list[float | None] = self.kept("parity", key, lambda: [compute()])
        return kept[0]

    def kernels(self, weighed: Weighed) -> list[KernelRow]:
        """What the runtime executes for a call, the costliest first; nothing where it does not tell."""

        def compute() -> list[dict[str, Any]]:
            where = replace(self.run.target, options=weighed.options)
            return told_kernels(weighed.artifact, where, self.inputs(), limits=self.limits)

        key = self.key("kernels", weighed.artifact, dict(weighed.options))
        return [KernelRow(**row) for row in self.kept("kernels", key, compute)]

    def packed(self, artifact: Artifact) -> int:
        """What a download of an artifact takes."""
        kept: list[int] = self.kept("packed", digest("packed", artifact.sha256), lambda: [packed(artifact)])
        return kept[0]

    def measurement(self, weighed: Weighed, indices: np.ndarray | None = None) -> Measurement:
        """What was seen of an artifact, with the quality on these scored examples."""
        judged = self.quality(weighed, indices)
        timing = weighed.timing
        return Measurement(
            **judged.fields(),
            bytes=weighed.artifact.bytes,
            packed_bytes=self.packed(weighed.artifact),
            latency_s=timing.artifact,
            latency_ratio=timing.ratio,
            latency_ratio_ci95=timing.ratio_ci95,
            resolved=timing.resolved,
            throughput=timing.throughput,
            peak_rss_bytes=None if weighed.memory is None else weighed.memory.peak,
            memory_bytes=None if weighed.memory is None else weighed.memory.above_runtime,
            energy_j=timing.energy_j,
            macs=weighed.artifact.details["macs"],
            params=weighed.artifact.details["params"],
            weight_bits=weighed.artifact.details.get("weight_bits"),
        )

    def baseline(self, weighed: Weighed | None, indices: np.ndarray | None = None) -> Measurement:
        """What was seen of the original; its latency in the same rounds as the artifact, else not at all."""
        timing = None if weighed is None else weighed.timing
        memory = self._memory(self.twin, None if weighed is None else weighed.twin_options)
        metric = self.run.data.metric
        rows = self.twin_scored.rows[metric.name]
        rows = rows if indices is None else rows[indices]
        return Measurement(
            quality=metric.reduce(rows),
            quality_drop=0.0,
            tasks=list(task_scores(metric, rows, rows, self.run.seed)),
            bytes=self.twin.bytes,
            packed_bytes=self.packed(self.twin),
            latency_s=timing.twin if timing else None,
            throughput=timing.twin_throughput if timing else None,
            peak_rss_bytes=memory.peak,
            memory_bytes=memory.above_runtime,
            energy_j=timing.twin_energy_j if timing else None,
            macs=self.twin.details["macs"],
            params=self.twin.details["params"],
            weight_bits=self.twin.details.get("weight_bits"),
        )

    def quality(self, weighed: Weighed, indices: np.ndarray | None = None) -> Quality:
        """The artifact against its twin on these scored examples."""
        return quality(self.run.data, self.twin_scored, weighed.scored, indices=indices, seed=self.run.seed)

    def layers(self, model: Model, weighed: Weighed, *, figures: bool = True) -> list[LayerRow]:
        """Bytes and MACs by layer, before the steps and in the artifact, and where it loses (simulated).

        Args:
            model: What the artifact was made of.
            weighed: The artifact.
            figures: Also what takes passes through the network: errors, ranges, histograms.
        """
        run = self.run
        stored = {name: entry.dtype for name, entry in run.runtime.stored(weighed.artifact).items()}
        before = {row.name: row for row in _rows(run.start)}
        seen = self._layer_figures(model) if model.formats and figures else {}
        return [
            _layer_row(row, before.get(row.name), stored, seen.get(row.name))
            for row in _rows(model)
            if row.macs or row.params
        ]

    def _layer_figures(self, model: Model) -> dict[str, LayerFigures]:
        """Errors, ranges and histograms of each layer on a few calibration examples."""

        def compute() -> dict[str, Any]:
            found: dict[str, LayerFigures] = {}
            context = self.run.context(model)
            for entry in model.entries:
                batches = [
                    tuple(torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in batch)
                    for batch in self.run.data.calibration(_LAYER_EXAMPLES)
                ]
                calls = layer_figures(
                    model, context.float_model(model), batches, context.scratch, context.progress, entry
                )
                found |= by_layer(calls)
            return {name: one.to_json() for name, one in found.items()}

        key = digest("layers", model.key, self.run.data.fingerprint, self.run.sources, torch.__version__)
        known = self.kept("layers", key, compute)
        return {name: LayerFigures.from_json(one) for name, one in known.items()}

    # ---- parts, each kept under its own key

    def _score(self, artifact: Artifact, original: Scored | None, options: Options | None = None) -> Scored:
        run = self.run
        where = run.target if options is None else replace(run.target, options=options)
        key = digest(
            "scores",
            artifact.sha256,
            None if original is None else self._standard.sha256,
            run.data.fingerprint,
            run.data.metric.name,
            scoring_code(run.data),
            where.to_json(),
            run.runtime.version(),
            run.sources,
        )
        kept = run.store.get("scores", key)
        if kept is None:
            shown = run.progress
            shown.note("scoring the original" if original is None else "scoring the artifact")
            kept = run.store.put(
                "scores",
                key,
                lambda folder: _drop(
                    score_artifact(artifact, where, run.data, folder, original=original, limits=self.limits)
                ),
            )
        return Scored.load(kept)

    def _time(
        self, artifact: Artifact, options: Options, twin_options: Options, limits: Limits | None = None
    ) -> Timing:
        limits = limits or self.limits

        def compute() -> dict[str, Any]:
            timing = measure_latency(
                artifact,
                self.twin,
                self.run.target,
                self.inputs(),
                limits=limits,
                options={"artifact": options, "twin": twin_options},
                progress=self.run.progress,
            )
            return asdict(timing) | {
                "artifact": timing.artifact.model_dump(),
                "twin": None if timing.twin is None else timing.twin.model_dump(),
            }

        both = [dict(options), dict(twin_options)]
        key = self.key("latency", artifact, self.twin.sha256, asdict(limits), both)
        return _timing(self.kept("latency", key, compute))

    def _memory(self, artifact: Artifact, options: Options | None = None) -> Memory:
        where = self.run.target if options is None else replace(self.run.target, options=options)

        def compute() -> dict[str, Any]:
            seen = measure_memory(
                artifact, where, self.inputs(), limits=self.limits, progress=self.run.progress
            )
            return asdict(seen)

        return Memory(**self.kept("memory", self.key("memory", artifact, dict(where.options)), compute))

    def key(self, kind: str, artifact: Artifact, *more: Any) -> str:
        """Of a figure of an artifact, on this machine and for this target."""
        shapes = [list(array.shape) for array in self.inputs()]
        target = self.run.target.to_json()
        return digest(kind, artifact.sha256, target, self._machine, shapes, self.run.sources, *more)

    def kept(self, kind: str, key: str, compute: Callable[[], Any]) -> Any:
        """What the store has under a key, else what is computed; it must be JSON."""
        known = self.run.store.get_json(kind, key)
        if known is None:
            known = compute()
            self.run.store.put_json(kind, key, known)
        return known

    def inputs(self) -> tuple[np.ndarray, ...]:
        """Arrays of one call with one example."""
        return example_call(self.run.original.entries["forward"])


def _drop(_: object) -> None:
    """The store's writers return nothing."""


def _timing(data: Mapping[str, Any]) -> Timing:
    interval = data["ratio_ci95"]
    return Timing(
        **{
            **data,
            "artifact": Latency(**data["artifact"]),
            "twin": None if data["twin"] is None else Latency(**data["twin"]),
            "ratio_ci95": None if interval is None else (interval[0], interval[1]),
            "cores": tuple(data["cores"]),
            "notes": tuple(data["notes"]),
        }
    )


def _rows(model: Model) -> list[LayerCost]:
    return [row for entry in model.entries for row in layer_costs(model, entry)]


def _layer_row(
    row: LayerCost, before: LayerCost | None, stored: Mapping[str, str], seen: LayerFigures | None
) -> LayerRow:
    dtype = stored.get(f"{row.name}.weight", stored.get(row.name, "float32" if row.params else "–"))
    return LayerRow(
        name=row.name,
        type=row.type,
        macs=row.macs,
        params=row.params,
        bytes_before=before.bytes if before else row.bytes,
        bytes_after=row.bytes,
        stored=dtype,
        sqnr_db=None if seen is None else seen.alone_db,
        in_place_db=None if seen is None else seen.in_place_db,
        weight=None if seen is None else seen.weight,
        activation=None if seen is None else seen.activation,
    )
