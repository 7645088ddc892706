"""What a search into one output folder was asked and has tried, kept so that it goes on after kill -9.

The journal lies in the store, under the output folder's name: Optuna's file, to which a line is added (and
synced) with every trial that is told, and the question beside it. A search begins with an empty one;
``--resume`` takes up the one that is there, if it answers the same question. How long a search may take and
how many trials it may make are no part of the question, so that they may grow.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from featherweight.engine.effort import Plan
from featherweight.engine.environment import describe_device
from featherweight.engine.sources import scoring_code
from featherweight.engine.store import Store, digest, told_as_machine_error
from featherweight.engine.timing import Limits
from featherweight.engine.training_options import recipe_code
from featherweight.errors import OutputError
from featherweight.recipe import Recipe

if TYPE_CHECKING:
    from featherweight.engine.question import Question
    from featherweight.engine.run import Run

KIND = "searches"
_TRIED, _ASKED = "search.journal", "asked.json"


@dataclass(frozen=True)
class Kept:
    """What a search began with.

    Attributes:
        asked: Part of the question -> its digest.
        limits: How long and how well it measures.
        plan: What it tries; None where a recipe said it.
        runs: Keys of the runs that were made of it.
    """

    asked: Mapping[str, str]
    limits: Limits
    plan: Plan | None
    runs: Sequence[str] = ()


class Journal:
    """The journal of the searches into one folder, one after the other.

    Args:
        store: Where it lies; trimmed like every other entry when it is not used for long.
        out: The output folder.
    """

    def __init__(self, store: Store, out: Path) -> None:
        self._out = out
        self._folder = store.folder / KIND / digest(str(out.resolve()))

    @property
    def file(self) -> Path:
        """For ``Search(storage=...)``."""
        return self._folder / _TRIED

    def kept(self, asked: Mapping[str, str]) -> Kept | None:
        """What is there to go on with; None: nothing.

        Raises:
            OutputError: It answers another question, or is damaged.
        """
        try:
            data = json.loads((self._folder / _ASKED).read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise OutputError(f"the journal of the search in '{self._folder}' is damaged") from error
        others = [part for part in asked if data["asked"].get(part) != asked[part]]
        if others:
            raise OutputError(
                f"the search that '{self._out}' was made by answers another question",
                where=f"its {_listed(others)} {'differs' if len(others) == 1 else 'differ'}",
                fix="ask what was asked before, or leave out --resume to begin anew",
            )
        return Kept(data["asked"], Limits(**data["limits"]), _plan(data["plan"]), data["runs"])

    def begin(self, asked: Mapping[str, str], limits: Limits, plan: Plan | None, run: str) -> None:
        """Forget what is there: another search begins.

        Raises:
            OutputError: Another process is searching into the same folder.
            MachineError: The disk is full or the folder cannot be written.
        """
        with told_as_machine_error("the search's journal"):
            self._folder.mkdir(parents=True, exist_ok=True)
            with self.file.open("a+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    raise OutputError(
                        f"another process is searching for what goes to '{self._out}'",
                        fix="wait until it has ended, or name another folder",
                    ) from error
                file.truncate(0)
        self.go_on(Kept(asked, limits, plan), run)

    def go_on(self, kept: Kept, run: str) -> None:
        """Remember which run is made of the search now."""
        data = {
            "asked": dict(kept.asked),
            "limits": asdict(kept.limits),
            "plan": None if kept.plan is None else _told(kept.plan),
            "runs": [*(key for key in kept.runs if key != run), run],
        }
        temporary = self._folder / f".{_ASKED}-{os.getpid()}"
        with told_as_machine_error("the search's journal"):
            try:
                temporary.write_text(json.dumps(data))
                temporary.replace(self._folder / _ASKED)
            finally:
                temporary.unlink(missing_ok=True)
            os.utime(self._folder)


def asked(runs: Sequence[Run], question: Question, limits: Limits) -> dict[str, str]:
    """The parts of a question by which a search is told from others, by the words that name them."""
    run = runs[0]
    data = run.data
    parts: dict[str, Any] = {
        "model": run.original.key,
        "student": run.student and run.student.key,
        "teacher": run.teacher and run.teacher.key,
        "data": data.fingerprint,
        "metric": [data.metric.name, scoring_code(data)],
        "budget": [question.budget.model_dump(), question.prefer, question.confident],
        "recipe": [question.open_ended, question.recipe.to_dict(), recipe_code(question.recipe)],
        "runtime": [one.target.to_json() for one in runs],
        "machine": [describe_device(one.target).model_dump(mode="json") for one in runs],
        "way of measuring": [asdict(limits), question.tune],
        "number of trials (one, or several)": question.trials == 1,  # whether halves select and report
        "seed": run.seed,
        "way of training": [run.devices, run.precision],
        "version of featherweight": [run.sources, torch.__version__],
    }
    return {name: digest(part) for name, part in parts.items()}


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _told(plan: Plan) -> dict[str, Any]:
    """A plan as data; its recipes keep their holes."""
    data = {field.name: getattr(plan, field.name) for field in fields(plan)}
    return data | {"ways": [[name, recipe.to_dict()] for name, recipe in plan.ways.items()]}


def _plan(data: Mapping[str, Any] | None) -> Plan | None:
    if data is None:
        return None
    ways = {name: Recipe.from_dict(recipe) for name, recipe in data["ways"]}
    return Plan(**{**data, "ways": ways})
