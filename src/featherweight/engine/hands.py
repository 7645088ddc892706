"""Lets workers make what a run or its scales miss in the store; the run then reads it there.

So a search with workers goes the same way as one without: it asks for the same steps in the same order, and
only who computes them differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from featherweight.engine.run import Run
from featherweight.engine.workers import Answer, Crew, Needs
from featherweight.plugins import find_method


class Hands:
    """A crew at work for the runs of one search.

    Args:
        crew: Who works.
        until: When the time is up, by ``time.monotonic``; asked again and again.
        cpus: Cores of a task that makes something.
        measures_here: Scores may be taken by any worker, since all are on the target's machine.
    """

    def __init__(
        self,
        crew: Crew,
        *,
        until: Callable[[], float] = lambda: math.inf,
        cpus: int = 1,
        measures_here: bool = False,
    ) -> None:
        self._crew = crew
        self._until = until
        self._cpus = cpus
        self._measures_here = measures_here

    def step(self, run: Run, key: str) -> None:
        """Make the model of a key; not twice when two candidates want it at the same time.

        Raises:
            OutOfTime: The time is up.
            FeatherweightError: What the worker told.
        """
        name, _ = run.chain(key)[-1]
        trains = "training" in find_method(name).needs
        self._once(run, key, "step", "steps", Needs(self._cpus, gpus=int(trains)))

    def lower(self, run: Run, key: str, entry: str) -> None:
        """Write the artifact of a model.

        Args:
            run: Whose.
            key: Of the model.
            entry: Of the artifact in the store.

        Raises:
            OutOfTime: The time is up.
            FeatherweightError: What the worker told.
        """
        self._once(run, key, "lower", "artifacts", Needs(), entry)

    def weigh(self, run: Run, key: str) -> None:
        """Score and time the artifact of a model, where the target's device is.

        Raises:
            OutOfTime: The time is up.
            FeatherweightError: What the worker told.
        """
        if self._measures_here:
            self._call(run, key, "score", Needs())
        self._call(run, key, "weigh", Needs(measures=True))

    def simulated_drop(self, run: Run, key: str, indices: Sequence[int]) -> float:
        """What a simulated network loses on these scored examples; see ``ladder.simulated_drop``.

        Raises:
            OutOfTime: The time is up.
            FeatherweightError: What the worker told.
        """
        answer = self._call(run, key, "simulated_drop", Needs(), indices=[int(index) for index in indices])
        return float(answer.value)

    def _once(
        self, run: Run, key: str, function: str, kind: str, needs: Needs, entry: str | None = None
    ) -> None:
        with self._crew.alone((function, run.target.runtime, key)) as waited:
            if not waited or run.store.get(kind, entry or key) is None:
                self._call(run, key, function, needs)

    def _call(self, run: Run, key: str, function: str, needs: Needs, **more: object) -> Answer:
        arguments = {"lane": run.target.runtime, "chain": run.chain(key), **more}
        answer = self._crew.call(function, arguments, needs, until=self._until, warnings=tuple(run.warnings))
        run.warnings.update(dict.fromkeys(answer.warnings))
        return answer
