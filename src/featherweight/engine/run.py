"""Folds a recipe over a model, step by step, each step kept in the store: running again resumes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from featherweight.data import Data
from featherweight.engine.checkpoints import StoredCheckpoint
from featherweight.engine.costs import MeasuredCosts
from featherweight.engine.deadline import Bounded
from featherweight.engine.devices import for_runtime
from featherweight.engine.environment import resolve
from featherweight.engine.scratch import MappedScratch
from featherweight.engine.store import Store, code_digest, digest, sources_digest
from featherweight.errors import FeatherweightError, RecipeError
from featherweight.exchange.key import root_key
from featherweight.formats import TensorFormat, decode, encode, zeros_alone
from featherweight.graph import Graph, Node
from featherweight.method import Context, Memo, Method, Precision, Progress, Silent, forgetful
from featherweight.model import Model, decode_edit, encode_edit
from featherweight.plugins import find_runtime
from featherweight.recipe import Recipe
from featherweight.runtime import Artifact, Json, Role, Runtime, Target
from featherweight.tools.costs import totals
from featherweight.tools.layer_report import weight_bits
from featherweight.tools.sparsity import with_zeros, zeros_of
from featherweight.usercode import load_callable


@dataclass(frozen=True)
class TargetSupports:
    """A runtime's answers for one target, as methods may ask them."""

    runtime: Runtime
    target: Target

    @property
    def float_outputs(self) -> frozenset[str]:
        return self.runtime.float_outputs

    @property
    def one_grid(self) -> frozenset[str]:
        return self.runtime.one_grid

    @property
    def joined(self) -> frozenset[str]:
        return self.runtime.joined

    def integers_pay(self, node: Node, graph: Graph) -> bool:
        return self.runtime.integers_pay(node, graph, self.target)

    @property
    def fixed_ranges(self) -> Mapping[str, tuple[float, float]]:
        return self.runtime.fixed_ranges

    @property
    def width_multiple(self) -> int:
        return self.runtime.width_multiple(self.target)

    def __call__(self, op: str, weight: TensorFormat | None, activation: TensorFormat | None) -> bool:
        return self.runtime.supports(op, weight, activation, self.target)

    def realise(self, fmt: TensorFormat, role: Role) -> TensorFormat:
        return self.runtime.realise(fmt, self.target, role)


class Hands(Protocol):
    """Makes elsewhere what is missing in the store."""

    def step(self, run: Run, key: str) -> None:
        """Make the model of a key (see ``Run.chain``)."""

    def lower(self, run: Run, key: str, entry: str) -> None:
        """Write the artifact of a model, which is this entry of the store."""

    def weigh(self, run: Run, key: str) -> None:
        """Score and time the artifact of a model."""

    def simulated_drop(self, run: Run, key: str, indices: Sequence[int]) -> float:
        """What the simulated network loses on these scored examples."""


_Way = tuple[str, str, dict[str, Json]]  # key of the model before, name and parameters of the step


class Run:
    """One original model, its data and its target; applies steps and lowers what they make.

    Args:
        original: What everything is compared with, and what steps start from.
        data: Calibration and training examples, and the scored ones.
        target: Where artifacts will run.
        store: Where finished work is kept.
        seed: The only source of randomness.
        progress: Where long work says how far it is.
        student: What steps start from instead; edits are relative to it.
        teacher: What steps may learn from besides the original.
        devices: Processes that train together.
        precision: Of training.
    """

    def __init__(
        self,
        original: Model,
        data: Data,
        target: Target,
        store: Store,
        *,
        seed: int = 0,
        progress: Progress | None = None,
        student: Model | None = None,
        teacher: Model | None = None,
        devices: int = 1,
        precision: Precision = "32",
    ) -> None:
        self.original = _with_key(original)
        self.student = None if student is None else _with_key(student)
        self.teacher = None if teacher is None else _with_key(teacher)
        self.start = self.student or self.original
        self.data = data
        self.target = resolve(target)
        self.store = store
        self.seed = seed
        self.progress = progress or Silent()
        self.devices = devices
        self.precision: Precision = precision
        self.runtime = find_runtime(self.target.runtime)
        self.sources = sources_digest()
        self.warnings: dict[str, None] = {}  # in the order in which they came, once each
        self.scratch = MappedScratch(store.folder / "scratch")
        self.costs = MeasuredCosts(self)
        self.until = math.inf  # when the time for steps is up, by time.monotonic
        self._floats: dict[str, Model] = {}  # key of a model with formats -> the network before them
        self._held: dict[str, Model] = {}  # the same, or what training under formats gave since
        self.training_s = 0.0  # spent in steps that train, since it was last set to zero
        self.hands: Hands | None = None  # who makes what the store lacks; nobody: this process does
        self._ways: dict[str, _Way] = {}  # key -> the step that made it

    def context(self, model: Model | None = None) -> Context:
        """What a step may use.

        Args:
            model: What reaches the step; it tells which float network its formats are held against.
        """
        behind = None if model is None else self._floats.get(model.key)
        others = {"student": self.student, "teacher": self.teacher, "float": behind}
        return Context(
            models={"original": self.original} | {name: one for name, one in others.items() if one},
            data=self.data,
            target=self.target,
            supports=TargetSupports(self.runtime, for_runtime(self.target)),
            seed=self.seed,
            progress=self.progress if self.until == math.inf else Bounded(self.progress, self.until),
            scratch=self.scratch,
            costs=self.costs,
            memo=forgetful if model is None or not model.key else self._memo(model),
            devices=self.devices,
            precision=self.precision,
        )

    def _memo(self, model: Model) -> Memo:
        """What methods found out about a model on this data and target, kept in the store."""

        def memo(name: str, parameters: Mapping[str, Json], compute: Callable[[], Json]) -> Json:
            key = self._key("memo", model, name, dict(parameters), self.data.fingerprint)
            kept: list[Json] | None = self.store.get_json("memos", key)
            if kept is None:  # a list of one, since null may be what was found
                kept = [compute()]
                self.store.put_json("memos", key, kept)
            return kept[0]

        return memo

    def apply(self, recipe: Recipe) -> Model:
        """The model that a filled recipe makes of the original, or of the student.

        Raises:
            RecipeError: The recipe is not valid, or a step does not fit the model.
        """
        model = self.start
        for number, method in enumerate(recipe.methods(), 1):
            model = self.step(model, method, number)
        return model

    def step(self, model: Model, method: Method, number: int = 1) -> Model:
        """One step: read from the store, or computed and kept there."""
        name = type(method).__module__.rpartition(".")[2]
        self._warn_of_unmatched(model, method, f"step {number} ({name})")
        key = self._step_key(model, name, method)
        self._follow(model, method, key)
        self._ways[key] = model.key, name, method.model_dump(mode="json")
        kept = self.store.get("steps", key)
        if kept is None and self.hands is not None:
            self.hands.step(self, key)
            kept = self.store.get("steps", key)
        if kept is None:
            checkpoint = StoredCheckpoint(self.store, key)
            context = replace(self.context(model), checkpoint=checkpoint)
            if "training" not in method.needs and key in self._held:
                context = replace(context, models={**context.models, "float": self._held[key]})
            began = time.monotonic()
            changed = self._compute(model, method, f"step {number} ({name})", context).evolve(key=key)
            if "training" in method.needs:
                self.training_s += time.monotonic() - began
            self.store.put("steps", key, lambda folder: write_model(folder, changed))
            checkpoint.remove()
        else:
            changed = _read_model(kept, self.start, key)
        if "training" in method.needs and changed.formats:
            self._held[key] = with_zeros(changed).evolve(formats={})
        return changed

    def chain(self, key: str) -> list[tuple[str, dict[str, Json]]]:
        """The steps that lead from the start to a model that this run has made: name and parameters each."""
        found: list[tuple[str, dict[str, Json]]] = []
        while key != self.start.key:
            key, name, parameters = self._ways[key]
            found.append((name, parameters))
        return found[::-1]

    def _follow(self, model: Model, method: Method, key: str) -> None:
        """Remember the network as it reached the first format step, for every step from there on.

        A network with zeros put in is float yet, and what trained it since is not to be lost. What training
        under formats gave is what later steps hold to, so that float weights of before do not come back. This
        is no part of a step's key: it follows from the steps before.
        """
        first = model.key not in self._floats
        if method.kind == "format" and (first or all(map(zeros_alone, model.formats.values()))):
            self._floats[key] = self._held[key] = with_zeros(model)
        elif not first:
            self._floats[key], self._held[key] = self._floats[model.key], self._held[model.key]

    def _warn_of_unmatched(self, model: Model, method: Method, step: str) -> None:
        layers = {path: type(layer).__name__ for path, layer in model.module.named_modules() if path}
        for pattern in method.where.unmatched(layers):
            warning = f"where of {step} names '{pattern}', which is no layer or type of the model"
            if warning not in self.warnings:
                self.warnings[warning] = None
                self.progress.note(f"warning: {warning}")

    def _compute(self, model: Model, method: Method, where: str, context: Context) -> Model:
        torch.manual_seed(self.seed)
        try:
            return method.apply(model, context)
        except FeatherweightError as error:
            if error.where is None:
                error.where = where
            raise
        except torch.cuda.OutOfMemoryError as error:
            raise RecipeError(f"{where} ran out of memory") from error

    def _step_key(self, model: Model, name: str, method: Method) -> str:
        examples = self.data.fingerprint if method.needs else ""
        beside = {"original": self.student and self.original, "teacher": self.teacher}
        others = [f"{role} {one.key}" for role, one in beside.items() if one is not None]
        if "training" in method.needs:
            others += [self.precision, str(self.devices), code_digest(_training_code(method, self.data))]
        more = [name, method.model_dump(mode="json"), examples, *others]
        return self._key("step", model, *more, targetless=method.targetless)

    def _key(self, kind: str, model: Model, *more: Any, targetless: bool = False) -> str:
        target = [] if targetless else [self.target.runtime, self.target.isa]
        return digest(kind, model.key, *more, self.seed, self.sources, torch.__version__, *target)

    def lower(self, model: Model) -> Artifact:
        """The model's artifact for the target, from the store if it was made before."""
        key = digest("artifact", model.key, self.target.to_json(), self.runtime.version(), self.sources)
        kept = self.store.get("artifacts", key)
        if kept is None and self.hands is not None:
            self.hands.lower(self, model.key, key)
            kept = self.store.get("artifacts", key)
        if kept is None:
            self.runtime.require()
            kept = self.store.put("artifacts", key, lambda folder: self._write_artifact(model, folder))
        data = json.loads((kept / "artifact.json").read_text())
        return Artifact.from_json(data, kept)

    def _write_artifact(self, model: Model, folder: Path) -> None:
        artifact = self.runtime.lower(model, for_runtime(self.target), folder)
        told = totals(model)
        costs = {"macs": told["macs"], "params": told["params"], "weight_bits": weight_bits(model)}
        zeros = zeros_of(model)
        details = {**artifact.details, **costs, **({"sparsity": zeros} if zeros else {})}
        artifact = replace(artifact, details=details)
        (folder / "artifact.json").write_text(json.dumps(artifact.to_json()))


def _with_key(model: Model) -> Model:
    return model if model.key else model.evolve(key=_root(model))


def _training_code(method: Method, data: Data) -> list[Any]:
    """The user's functions that a step which trains may call."""
    specs = [load_callable(spec, RecipeError) for spec in getattr(method, "code", ())]
    return [*specs, data.loss, data.augment]


def _root(model: Model) -> str:
    """The store's address of a model that was made by hand."""
    formats = {name: [encode(fmt) for fmt in chain] for name, chain in model.formats.items()}
    return digest("model", root_key(model.module, model.entries), formats)


def write_model(folder: Path, model: Model) -> None:
    """Edits, formats and tensors; with the module that steps started from they rebuild it, without pickle."""
    data = {
        "edits": [encode_edit(edit) for edit in model.edits],
        "formats": {name: [encode(fmt) for fmt in chain] for name, chain in model.formats.items()},
    }
    (folder / "model.json").write_text(json.dumps(data))
    save_file(_untied(model.module.state_dict()), folder / "weights.safetensors")


def _untied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses tensors that share memory: each one is written by itself."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _read_model(folder: Path, start: Model, key: str) -> Model:
    data = json.loads((folder / "model.json").read_text())
    edits = tuple(decode_edit(edit) for edit in data["edits"])
    module = start.rebuild(edits, load_file(folder / "weights.safetensors"))
    formats = {name: tuple(decode(fmt) for fmt in chain) for name, chain in data["formats"].items()}
    return replace(start, module=module, formats=formats, edits=edits, key=key, traced={})
