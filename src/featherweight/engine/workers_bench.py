"""What a worker does for a search: steps, artifacts, scores and measurements, all of them left in the store.

It loads the model and the data itself, from the paths that the user gave, and works in the folder in which
the search was started. What it is asked for names the steps that lead there, so any worker can do it, and
what another one has done is read from the store.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featherweight.engine.deadline import OutOfTime
from featherweight.engine.devices import HERE
from featherweight.engine.evaluate import Scales
from featherweight.engine.mail import Writing
from featherweight.engine.run import Run
from featherweight.engine.sources import Given, load_sources
from featherweight.engine.start import start_runs
from featherweight.engine.store import sources_digest
from featherweight.engine.timing import Limits
from featherweight.errors import DataError, FeatherweightError, MachineError
from featherweight.method import Silent
from featherweight.model import Model
from featherweight.plugins import find_method
from featherweight.runtime import Target

_REMEMBERED = 6  # models


def site(
    sources: Mapping[str, Any],
    student: Given,
    teacher: Given,
    runs: Sequence[Run],
    limits: Limits,
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """What a worker needs to work for a search, as JSON data.

    Args:
        sources: The arguments of ``load_sources``.
        student: See ``start_runs``.
        teacher: See ``start_runs``.
        runs: Of the search.
        limits: Of its measurements.
        training: See ``training_options``.

    Raises:
        DataError: The data is an object of this process.
    """
    networks = sources["model"]
    each = [] if isinstance(networks, str) else [one.get("data") for one in networks.values()]
    if not all(isinstance(data, str | None) for data in (sources["data"], *each)):
        raise DataError(
            "workers load the data themselves, and this is an object of one process",
            fix="give a file, a folder, or path.py:callable",
        )
    return {
        "sources": {**sources, "inputs": list(sources["inputs"])},
        "student": [student.model, student.weights],
        "teacher": [teacher.model, teacher.weights],
        "targets": [run.target.to_json() for run in runs],
        "training": dict(training),
        "limits": asdict(limits),
        "folder": str(Path.cwd()),
        "store": str(runs[0].store.folder.resolve()),
        "code": runs[0].sources,
        "torch": torch.__version__,
    }


class Bench:
    """One search's model and data, loaded.

    Args:
        site: From :func:`site`.
    """

    def __init__(self, site: Mapping[str, Any]) -> None:
        sources = load_sources(**site["sources"])
        targets = [Target(**target) for target in site["targets"]]
        runs = start_runs(
            sources,
            targets,
            Given(*site["student"]),
            Given(*site["teacher"]),
            seed=site["sources"]["seed"],
            progress=Silent(),
            allow_pickle=site["sources"]["allow_pickle"],
            **site["training"],
        )
        self._runs = {run.target.runtime: run for run in runs}
        self._limits = Limits(**site["limits"])
        self._scales: dict[str, Scales] = {}
        self._models: OrderedDict[str, Model] = OrderedDict()

    def run(self, lane: str) -> Run:
        """The run of a runtime."""
        return self._runs[lane]

    def step(self, lane: str, chain: Sequence[Sequence[Any]]) -> str:
        """Make a model; its key."""
        return self._model(lane, chain).key

    def lower(self, lane: str, chain: Sequence[Sequence[Any]]) -> str:
        """Write a model's artifact; its digest."""
        return self._runs[lane].lower(self._model(lane, chain)).sha256

    def score(self, lane: str, chain: Sequence[Sequence[Any]]) -> str:
        """Score a model's artifact; its digest."""
        return self._weigher(lane).score(self._model(lane, chain)).sha256

    def weigh(self, lane: str, chain: Sequence[Sequence[Any]]) -> str:
        """Weigh a model's artifact; its digest."""
        return self._weigher(lane).weigh(self._model(lane, chain)).artifact.sha256

    def simulated_drop(self, lane: str, chain: Sequence[Sequence[Any]], indices: Sequence[int]) -> float:
        """What the simulated network loses on these scored examples; see ``ladder.simulated_drop``."""
        from featherweight.engine.ladder import simulated_drop
        from featherweight.engine.lanes import Lane

        return simulated_drop(
            Lane(self._runs[lane], self._weigher(lane)), self._model(lane, chain), np.asarray(indices)
        )

    def _weigher(self, lane: str) -> Scales:
        if lane not in self._scales:
            first = self._reference
            run = self._runs[lane]
            self._scales[lane] = first if first.run is run else Scales(run, self._limits, first)
        return self._scales[lane]

    @cached_property
    def _reference(self) -> Scales:
        """Those of the first runtime that takes the original, as the search has them (``make_lanes``)."""
        *others, last = self._runs.values()
        for run in others:
            try:
                return Scales(run, self._limits)
            except FeatherweightError as error:
                run.progress.note(f"{run.target.runtime} does not take the original: {error.what}")
        return Scales(last, self._limits)

    def _model(self, lane: str, chain: Sequence[Sequence[Any]]) -> Model:
        """What these steps make: (name, parameters) each."""
        run = self._runs[lane]
        model, way = run.start, lane
        for number, (name, parameters) in enumerate(chain, 1):
            way = json.dumps([way, name, parameters], sort_keys=True)
            if way in self._models:
                model = self._models[way]
                self._models.move_to_end(way)
            else:
                model = run.step(model, find_method(name).model_validate(parameters), number)
                self._models[way] = model
        while len(self._models) > _REMEMBERED:
            self._models.popitem(last=False)
        return model


def carry_out(order: Mapping[str, Any]) -> dict[str, Any]:
    """Do what an order says, on a worker.

    Args:
        order: 'site' and 'arguments' as JSON, 'function', 'mail' (a path), 'left_s', 'cpus', 'measures'
            (labels of this machine) and 'warnings' (that the search knows already).

    Returns:
        'value', 'seconds' and 'warnings'; or 'error': 'type', 'what', 'where' and 'fix'.
    """
    said = Writing(Path(order["mail"]))
    said.begin(f"on {platform.node()} (process {os.getpid()})")
    torch.set_num_threads(max(order["cpus"], 1))
    os.environ[HERE] = ",".join(order["measures"])
    arguments = json.loads(order["arguments"])
    try:
        bench = _bench(order["site"])
        run = bench.run(arguments["lane"])
        run.progress, run.warnings = said, dict.fromkeys(order["warnings"])
        run.until = math.inf if order["left_s"] is None else time.monotonic() + order["left_s"]
        began = time.monotonic()
        value = getattr(bench, order["function"])(**arguments)
        return {"value": value, "seconds": time.monotonic() - began, "warnings": list(run.warnings)}
    except OutOfTime:
        return {"error": {"type": OutOfTime.__name__}}
    except FeatherweightError as error:
        told = {"what": error.what, "where": error.where, "fix": error.fix}
        return {"error": {"type": type(error).__name__, **told}}


@cache
def _bench(site: str) -> Bench:
    """The bench of a search, loaded once in a process."""
    data = json.loads(site)
    here = platform.node()
    if not (Path(data["store"]) / "mail").is_dir():
        raise MachineError(
            f"the worker on {here} does not see the store '{data['store']}'",
            fix="set FEATHERWEIGHT_CACHE to a folder that all machines of the cluster share",
        )
    if data["code"] != sources_digest():
        raise MachineError(
            f"the worker on {here} has another version of featherweight", fix="install the same one there"
        )
    if data["torch"] != torch.__version__:
        raise MachineError(
            f"the worker on {here} has torch {torch.__version__}, and the search {data['torch']}",
            fix="install the same one there",
        )
    try:
        os.chdir(data["folder"])
    except OSError as error:
        raise MachineError(
            f"the worker on {here} does not see the folder '{data['folder']}'",
            fix="start the search in a folder that all machines of the cluster share",
        ) from error
    os.environ["FEATHERWEIGHT_CACHE"] = data["store"]
    return Bench(data)
