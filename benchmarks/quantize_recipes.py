"""The recipes that ``quantize.py`` holds against each other, and what is judged of what they make."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import cpu_count
from pathlib import Path
from typing import Any

import torch
from common import Shown
from quantize_subjects import Subject

from featherweight.data import Data
from featherweight.engine.quality import Scored, quality, score_artifact
from featherweight.engine.run import Run
from featherweight.engine.store import digest
from featherweight.model import Model
from featherweight.recipe import Recipe
from featherweight.runtime import Artifact
from featherweight.tools.simulate import projected_parameters

Json = dict[str, Any]
NEAREST, BEST = "nearest", "equalize + gptq"


@dataclass(frozen=True)
class Bits:
    """A way of storing a network.

    Attributes:
        name: As in W4A8: bits of weights and activations.
        quantize: Parameters of quantize.
    """

    name: str
    quantize: Mapping[str, Any] = field(default_factory=dict)


W8A8 = Bits("W8A8")
W4A8 = Bits("W4A8", {"weights": "int4"})
W4A8_GROUPS = Bits("W4A8 groups of 32", {"weights": "int4", "granularity": "per_group", "group": 32})
W5A8 = Bits("W5A8", {"weights": "int5"})
W4A4 = Bits("W4A4", {"weights": "int4", "activations": "int4"})
TERNARY = Bits("ternary, A8", {"weights": "ternary"})
MIXED = Bits("5 bits in the mean, A8")


def recipe(name: str, bits: Bits, samples: int, iterations: int | None = None) -> Recipe:
    """A recipe of the tables.

    Args:
        name: Steps beside fold and quantize, joined by ' + '.
        bits: What quantize makes.
        samples: Calibration examples of each step.
        iterations: Of adaround and blocks; None: their default.

    Raises:
        RecipeError: A method or parameter is not known.
    """
    few = {"samples": samples}
    gradient = few if iterations is None else {**few, "iterations": iterations}
    widths = {
        f"{role}_bits": int(str(bits.quantize.get(f"{role}s", "int8")).removeprefix("int"))
        for role in ("weight", "activation")
        if str(bits.quantize.get(f"{role}s", "int8")).startswith("int")
    }
    after: Mapping[str, Json] = {
        "correct_bias": {"correct_bias": few},
        "gptq, biases left": {"rounding": {"how": "gptq", "correct_bias": False, **few}},
        "gptq": {"rounding": {"how": "gptq", **few}},
        "adaround, biases left": {"rounding": {"how": "adaround", "correct_bias": False, **gradient}},
        "adaround": {"rounding": {"how": "adaround", **gradient}},
        "blocks": {"rounding": {"how": "blocks", **gradient}},
        "hqq": {"rounding": {"how": "hqq", **few}},
    }
    parts = [part for part in name.split(" + ") if part != NEAREST]
    steps: list[Json] = [{"fold": {}}]
    if "equalize" in parts:
        steps.append({"equalize": {**widths, **few}})
    if bits is MIXED:
        steps.append({"mixed_precision": {"bits": 5, **few}})
    else:
        steps.append({"quantize": {**bits.quantize, **few}})
    steps += [after[part] for part in parts if part != "equalize"]
    return Recipe.from_dict({"version": 1, "steps": steps})


class Bench:
    """One network on one runtime, with calibration examples of one seed.

    Args:
        subject: The network.
        runtime: Where it runs.
        seed: Of the calibration.
        folder: Takes the store, artifacts and scores.
    """

    def __init__(self, subject: Subject, runtime: str, seed: int, folder: Path, shown: Shown) -> None:
        self.subject = subject
        self.runtime = runtime
        self.folder = folder
        self.seed = seed
        self._shown = shown
        self._spent: dict[str, float] = {}  # recipe so far -> seconds of its last step
        self._scores: dict[str, Scored] = {}
        self._judged: dict[str, Json] = {}  # which examples, and the artifact's folder
        self._count = 0

    @cached_property
    def run(self) -> Run:
        """The run of a user who has done nothing before."""
        return self.subject.run(self.runtime, self.seed, self.folder / "store", self._shown)

    @cached_property
    def original(self) -> Artifact:
        """The float twin."""
        return self.run.lower(self.run.original)

    def model(self, steps: Recipe) -> tuple[Model, float]:
        """What a recipe makes, and the seconds that its steps take from the start."""
        model, done = self.run.original, ""
        total = 0.0
        for number, method in enumerate(steps.methods(), 1):
            done = digest(done, type(method).__name__, method.model_dump(mode="json"))
            began = time.perf_counter()
            model = self.run.step(model, method, number)
            total += self._spent.setdefault(done, time.perf_counter() - began)
        return model, total

    def lower(self, model: Model) -> tuple[Artifact, float]:
        """Its artifact, and the seconds that it took."""
        began = time.perf_counter()
        return self.run.lower(model), time.perf_counter() - began

    def judged(self, artifact: Artifact, *, others: bool = False) -> Json:
        """Agreement, SQNR and drop on the scored examples; with ``others`` also on those."""
        found = self._quality(artifact, self.run.data, "scored")
        if others and self.subject.others is not None:
            seen = self._quality(artifact, self._others, "others")
            found = {**found, "others": {key: seen[key] for key in ("agreement", "sqnr_db")}}
        return found

    @cached_property
    def _others(self) -> Data:
        assert self.subject.others is not None
        return self.subject.resolved(self.subject.others)

    def _quality(self, artifact: Artifact, data: Data, which: str) -> Json:
        key = f"{which} {artifact.folder}"
        if key in self._judged:
            return self._judged[key]
        if which not in self._scores:
            self._scores[which] = self._scored(self.original, data, None)
        seen = quality(data, self._scores[which], self._scored(artifact, data, self._scores[which]))
        self._judged[key] = {
            "agreement": seen.agreement,
            "sqnr_db": seen.sqnr_db,
            "drop_points": 100 * seen.quality_drop if self.subject.labelled else None,
        }
        return self._judged[key]

    def _scored(self, artifact: Artifact, data: Data, original: Scored | None) -> Scored:
        self._count += 1
        target = replace(self.run.target, threads=cpu_count() or 1)
        place = self.folder / "scores" / f"{self._count}"
        return score_artifact(artifact, target, data, place, original=original)


class Benches:
    """One bench for each network, runtime and seed, so that tables share what was made and scored.

    Args:
        folder: Takes everything.
        shown: Progress.
    """

    def __init__(self, folder: Path, shown: Shown) -> None:
        self._folder, self._shown = folder, shown
        self._known: dict[tuple[str, str, int], Bench] = {}

    def get(self, subject: Subject, runtime: str, seed: int) -> Bench:
        """The bench, made at the first call."""
        key = (subject.name, runtime, seed)
        if key not in self._known:
            place = self._folder / f"{subject.name}-{runtime}-{seed}"
            self._known[key] = Bench(subject, runtime, seed, place, self._shown)
        return self._known[key]


def stored_bits(model: Model) -> float:
    """Bits of a weight in the mean over all that have formats, scales included."""
    weights = {name: model.module.get_parameter(name).numel() for name in model.formats if _has(model, name)}
    stored = sum(model.formats[name][-1].stored_bytes(count) for name, count in weights.items())
    return 8 * stored / max(sum(weights.values()), 1)


def weights_alone(model: Model) -> Model:
    """Its weights as they are stored; activations float."""
    module = model.copy_module()
    with torch.no_grad():
        for name, value in projected_parameters(model).items():
            module.get_parameter(name).copy_(value)
    return model.evolve(module=module, formats={}, key=digest("weights alone", model.key))


def activations_alone(model: Model, reference: Model) -> Model:
    """Its activations as they are stored; the weights of the float network that they were found for."""
    kept = {name: chain for name, chain in model.formats.items() if not _has(model, name)}
    return reference.evolve(formats=kept, key=digest("activations alone", model.key))


def _has(model: Model, name: str) -> bool:
    return name in dict(model.module.named_parameters(remove_duplicate=False))
