"""What compression did beside the score, told of the artifact that a fit hands back and of its twin.

Corrupted pictures and training examples take passes through both, so each is told where it applies and where
there is time; what is not told has its reason. Figures are kept in the store.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel

from featherweight.data import Run
from featherweight.engine import confidence
from featherweight.engine import robustness as corrupted
from featherweight.engine.deadline import Bounded, OutOfTime
from featherweight.engine.evaluate import Scales, Weighed
from featherweight.engine.jobs import Served
from featherweight.engine.sources import scoring_code
from featherweight.errors import DataError, RunnerError
from featherweight.method import Progress
from featherweight.outcome import Calibration, Privacy, Robustness

T = TypeVar("T", bound=BaseModel)

NAMES = ("robustness", "calibration", "privacy")
SHARE = 0.05  # of the time of a fit that nobody said a word about it in

_ATTACK = 0.25  # of the time that there is, for training examples
_FEWEST_MEMBERS = 100
_NO_TIME = "there was no time for it: --robustness, or a longer --time"
_NOT_ASKED = "it takes more passes through both networks: --robustness"
_PATIENCE = 2.0  # what was foreseen may take so many times as long


@dataclass(frozen=True)
class Beside:
    """What is told, and why the rest is not; the fields are those of ``Result``."""

    robustness: Robustness | None = None
    calibration: Calibration | None = None
    privacy: Privacy | None = None
    omitted: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def nothing(cls, reason: str) -> Beside:
        """Nothing is told, for one reason."""
        return cls(omitted=dict.fromkeys(NAMES, reason))


def tell_beside(scales: Scales, weighed: Weighed, indices: np.ndarray | None, room_s: float) -> Beside:
    """Everything that applies to an artifact, and that there is time for.

    Args:
        scales: Of its runtime, with the twin.
        weighed: The artifact.
        indices: Scored examples that report; None: all.
        room_s: Seconds that passes may take; infinite where they must be made.
    """
    if scales.run.data.scored is None:
        return Beside.nothing("there are no scored examples")
    found: dict[str, Any] = {}
    omitted: dict[str, str] = {}
    with ExitStack() as sessions:
        subject = _Subject(scales, weighed, indices, room_s, sessions)
        asked: tuple[tuple[str, Callable[[], Any]], ...] = (
            ("calibration", subject.calibration),
            ("privacy", subject.privacy),
            ("robustness", subject.robustness),
        )
        for name, ask in asked:
            try:
                found[name] = ask()
            except (DataError, RunnerError) as error:
                omitted[name] = error.what
            except OutOfTime:
                omitted[name] = _NO_TIME if room_s else _NOT_ASKED
    return Beside(**found, omitted=omitted)


class _Subject:
    """One artifact beside its twin; both are opened when a pass is made, until ``sessions`` is closed."""

    def __init__(
        self,
        scales: Scales,
        weighed: Weighed,
        indices: np.ndarray | None,
        room_s: float,
        sessions: ExitStack,
    ) -> None:
        self.scales, self.weighed, self.room_s, self._sessions = scales, weighed, room_s, sessions
        self.run, self.data = scales.run, scales.run.data
        assert self.data.scored is not None
        self.indices = np.arange(len(self.data.scored)) if indices is None else indices
        timing = weighed.timing
        one = timing.artifact.median
        self.call_s = one + (one if timing.twin is None else timing.twin.median)

    def calibration(self) -> Calibration:
        """Off the outputs that scoring recorded."""
        return confidence.calibration(self.data, self._outputs(), self.indices)

    def privacy(self) -> Privacy:
        """Of as many training examples as scored ones."""
        most = int(min(_ATTACK * self.room_s / self.call_s, confidence.MOST_MEMBERS))

        def compute() -> Privacy:
            train = self.data.train
            if train is not None and most < min(_FEWEST_MEMBERS, len(train)):
                raise OutOfTime
            outputs = self._outputs()
            return confidence.membership(
                self.data,
                outputs,
                lambda: self._opened,
                most=most,
                seed=self.run.seed,
                progress=self._progress(),
            )

        return self._kept("privacy", Privacy, compute)

    def robustness(self) -> Robustness:
        """Of a part of the examples that report."""
        room_s = (1 - _ATTACK) * self.room_s

        def compute() -> Robustness:
            count = corrupted.affordable(self.data, self.indices, self.call_s, room_s)
            if not count:
                raise OutOfTime
            picks = corrupted.some_indices(self.indices, count, self.run.seed)
            return corrupted.robustness(
                self._opened["before"],
                self._opened["after"],
                self.data,
                picks,
                seed=self.run.seed,
                progress=self._progress(),
            )

        return self._kept("robustness", Robustness, compute)

    def _progress(self) -> Progress:
        """A bar that ends what takes far longer than was foreseen."""
        return Bounded(self.run.progress, time.monotonic() + _PATIENCE * self.room_s)

    def _outputs(self) -> dict[str, np.ndarray]:
        """First outputs for all scored examples."""
        scored = {"before": self.scales.twin_scored, "after": self.weighed.scored}
        return {name: confidence.scored_outputs(self.data, one) for name, one in scored.items()}

    @cached_property
    def _opened(self) -> Mapping[str, Run]:
        """Both artifacts, each in a process of its own, with the options that they were measured with."""
        target, limits = self.run.target, self.scales.limits
        options = self.weighed.twin_options, self.weighed.options
        before, after = (replace(target, options=dict(one)) for one in options)
        twin = self._sessions.enter_context(Served(self.scales.twin, before, limits))
        artifact = self._sessions.enter_context(Served(self.weighed.artifact, after, limits))
        return {"before": twin.run, "after": artifact.run}

    def _kept(self, kind: str, record: type[T], compute: Callable[[], T]) -> T:
        """A record of both artifacts, read from the store if it was made before, whatever time there was."""
        key = self.scales.key(
            kind,
            self.weighed.artifact,
            self.scales.twin.sha256,
            [dict(self.weighed.options), dict(self.weighed.twin_options)],
            [self.data.fingerprint, self.data.metric.name, scoring_code(self.data), self.data.origin],
            [self.run.seed, self.indices.tolist(), math.isinf(self.room_s)],
        )
        return record.model_validate(self.scales.kept(kind, key, lambda: compute().model_dump(mode="json")))
