"""What a result tells beside its figures: layers, steps, runtimes, warnings, examples.

Whatever takes passes through the network is left out when the time is up, and the result says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from featherweight.engine.beside import SHARE, Beside, tell_beside
from featherweight.engine.deadline import OutOfTime
from featherweight.engine.evaluate import Weighed
from featherweight.engine.lanes import Lane
from featherweight.engine.parity import LEAST_DB
from featherweight.engine.search import Search
from featherweight.engine.standing import FEWEST_TO_HALVE, Standing
from featherweight.engine.steps import clock, prefix_key, step_rows
from featherweight.engine.timetable import Timetable
from featherweight.errors import FeatherweightError
from featherweight.model import Model
from featherweight.outcome import LayerRow, Measurement, RuntimeRow, StepRow
from featherweight.recipe import Recipe


class Telling:
    """Rows and sentences of one result.

    Args:
        standing: What is known of the trials.
        search: Whose trials they are.
        timetable: What there is still time for.
        left_out: Runtimes that could not take the original, and why.
        interrupted: The user wants an answer now.
    """

    def __init__(
        self,
        standing: Standing,
        search: Search,
        timetable: Timetable,
        left_out: Mapping[str, FeatherweightError],
        *,
        interrupted: bool,
    ) -> None:
        self.standing, self.search, self.time = standing, search, timetable
        self.left_out, self.interrupted = left_out, interrupted

    def layers(self, lane: Lane, model: Model, weighed: Weighed) -> list[LayerRow]:
        """Each layer before and after; without what takes passes through the network when the time is up."""
        said = "errors of layers"
        if not self.interrupted and self.time.allows(said):
            lane.run.until = self.time.end
            try:
                return lane.scales.layers(model, weighed, figures=True)
            except OutOfTime:
                self.time.left_out.append(said)
            finally:
                lane.run.until = math.inf
        return lane.scales.layers(model, weighed, figures=False)

    def steps(self, lane: Lane, weighed: Weighed, recipe: Recipe, seen: Measurement) -> list[StepRow]:
        """What each step bought; trials that were a beginning of the recipe tell it for nothing."""
        steps, known = recipe.to_dict()["steps"], {}
        beginnings = {prefix_key(steps[:count]) for count in range(len(steps))}
        for trial in self.standing.trials:
            key = prefix_key(trial.recipe["steps"])
            if trial.measurement is not None and trial.sha256 and key in beginnings:
                own, other = self.standing.weighed[trial.number]
                if own is lane and other.options == weighed.options:
                    known[key] = self.standing.seen(trial.number, self.standing.reporting)
        given = None
        if not self.interrupted:
            given = clock(self.time.deadline, self.time.time_limit, self.time.weighing_s)
        return step_rows(
            lane, weighed, recipe, seen, known=known, indices=self.standing.reporting, clock=given
        )

    def beside(self, lane: Lane, weighed: Weighed) -> Beside:
        """What compression did beside the score; unasked in a small part of the time of a search."""
        wanted = self.standing.question.robustness
        if wanted is False:
            return Beside.nothing("--no-robustness")
        if self.interrupted:
            return Beside.nothing("the search was interrupted")
        left = max(0.0, min(SHARE * self.time.time_limit, self.time.end - self.time.clock()))
        room_s = math.inf if wanted else left if self.standing.question.searches else 0.0
        told = tell_beside(lane.scales, weighed, self.standing.reporting, room_s)
        return replace(told, omitted={name: without_paths(said) for name, said in told.omitted.items()})

    def runtimes(self, chosen: int) -> list[RuntimeRow]:
        """One row for each runtime of the search, and for each one that was left out."""
        best = {
            self.standing.weighed[number][0].name: number
            for number in reversed(self.standing.best_of_lanes())
        }
        best[self.standing.weighed[chosen][0].name] = chosen
        rows = [self._runtime_row(lane, best.get(name), chosen) for name, lane in self.standing.lanes.items()]
        return rows + [
            RuntimeRow(runtime=name, reason=without_paths(error.what))
            for name, error in self.left_out.items()
        ]

    def _runtime_row(self, lane: Lane, number: int | None, chosen: int) -> RuntimeRow:
        scales = lane.scales
        fields: dict[str, Any] = {
            "runtime": lane.name,
            "version": lane.run.runtime.version(),
            "twin_bytes": scales.twin.bytes,
            "twin_ratio": lane.handicap.median,
            "twin_ratio_ci95": lane.handicap.ci95,
            "float_error": scales.float_error(),
        }
        if number is None:
            failed = [trial.reason for trial in self.standing.trials if trial.runtime == lane.name]
            return RuntimeRow(**fields, reason=failed[0] if failed else "no trial of it was measured")
        weighed, seen = self.standing.weighed[number][1], self.standing.seen(number, self.standing.reporting)
        recipe = next(trial.recipe for trial in self.standing.trials if trial.number == number)
        return RuntimeRow(
            **fields,
            trial=number,
            bytes=seen.bytes,
            latency_ratio=seen.latency_ratio,
            latency_ratio_ci95=seen.latency_ratio_ci95,
            own_ratio=weighed.timing.ratio,
            own_ratio_ci95=weighed.timing.ratio_ci95,
            agreement=seen.agreement,
            sqnr_db=seen.sqnr_db,
            parity_db=scales.parity(lane.run.apply(Recipe.from_dict(recipe)), weighed),
            chosen=number == chosen,
        )

    def warnings(self, lane: Lane, weighed: Weighed, rows: Sequence[RuntimeRow]) -> list[str]:
        """What the reader of the figures should know, in the order of its weight."""
        run, said = self.standing.run, []
        if lane.name == "torch":
            said.append(
                "runtime torch simulates formats: the quality is that of the formats, but bytes and latency "
                "are those of float PyTorch"
            )
        tried = sum(trial.state != "dropped" for trial in self.standing.trials)
        if self.interrupted:
            said.append(f"the search was interrupted after {tried} trials")
        elif self.search.ended == "time":
            said.append(f"the time limit ended the search after {tried} of {self.search.limit} trials")
        if self.time.left_out:
            said.append(f"the time was up before: {', '.join(self.time.left_out)}")
        if self.standing.question.journal is not None and (self.interrupted or self.search.ended == "time"):
            said.append("the same command with --resume goes on from there")
        scored = self.standing.scored
        if tried > 1 and self.standing.selecting is None:
            said.append(
                f"the same {scored} examples selected among {tried} trials and report, so the drop looks "
                f"smaller than it is; from {FEWEST_TO_HALVE} examples on, one half reports"
            )
        said += [self._parting(row) for row in rows if row.parity_db is not None and row.parity_db < LEAST_DB]
        return [*said, *run.data.notes, *lane.run.warnings, *weighed.timing.notes]

    def _parting(self, row: RuntimeRow) -> str:
        """That an artifact is not what was simulated, and whether the network itself is the reason."""
        said = f"on {row.runtime} the outputs are {row.parity_db:.1f} dB from the simulation of the formats"
        trial = next(one for one in self.standing.trials if one.number == row.trial)
        lane, weighed = self.standing.weighed[trial.number]
        steady = lane.scales.steadiness(lane.run.apply(Recipe.from_dict(trial.recipe)), weighed)
        if steady is not None and steady < LEAST_DB:
            said += f"; the simulation is {steady:.1f} dB from itself when its inputs move by a millionth"
            return f"{said}, so the network amplifies every rounding"
        return said + "; featherweight compare tells where they part"

    def examples(self) -> dict[str, Any]:
        data, count = self.standing.run.data, self.standing.scored
        return {
            "scored": count,
            "selecting": count if self.standing.selecting is None else len(self.standing.selecting),
            "reporting": count if self.standing.reporting is None else len(self.standing.reporting),
            "halved": self.standing.selecting is not None,
            "calibration": data.calibration_source,
            "origin": data.origin,
        }


def without_paths(text: str) -> str:
    """The sentence without the folders of this machine: it goes into what is handed back."""
    return re.sub(r"(?<![\w.])/(?:[^/\s'\":;,]+/)+", "", text)
