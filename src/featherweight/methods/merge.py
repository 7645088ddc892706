"""Merge: networks of the same inputs become one trunk with a head each.

Layers of networks that were trained apart see the same examples alike, near the input most (Kornblith et al.
2019, arXiv:1905.00414), so one network's can serve all. Where they part follows from how alike their layers
are on calibration data, among the places that keep what the amount asks for::

    argmax CKA(trunk's value, network's value)      with kept(parameters, macs, latency) <= amount

What is shared and the heads are then trained together on what the networks themselves answer (Hinton et al.
2015, arXiv:1503.02531), and on labels where there are some (tools/merging_loss.py).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight.errors import RecipeError
from featherweight.method import Context, Kind, Method, Need
from featherweight.model import Model
from featherweight.recipe import Choice, Hole
from featherweight.side_by_side import WHOLE, flat_outputs
from featherweight.tasks import tasks_in
from featherweight.tools.augment import Augment, Augmentation
from featherweight.tools.batches import calibration_batches
from featherweight.tools.distill_teacher import Teacher
from featherweight.tools.distillation import Alpha, Temperature
from featherweight.tools.merging import MEASURES, Beside, Measure, Parting, chosen, deepest, kept, partings
from featherweight.tools.merging_edit import merged
from featherweight.tools.merging_loss import Balance, Head, MergedLoss, make_head
from featherweight.tools.merging_similarity import similarities
from featherweight.tools.optimizers import OptimizerName
from featherweight.tools.simulated import Simulated
from featherweight.tools.train_settings import TrainSettings
from featherweight.tools.training import train
from featherweight.tools.training_examples import training_examples

Share = Annotated[float, Field(gt=0, le=1)]
_AUTO = 0.6  # of the parameters and of the multiply-accumulates, where that can be had
_SHARES = (0.6, 0.7, 0.85)  # what a search tries
_CLIP = 5.0


class Merge(Method, frozen=True, extra="forbid"):
    """One trunk and a head for each task; defaults keep 60 % of the parameters and MACs where networks can.

    Attributes:
        at: Where the networks part: a layer or traced value of the trunk's network, such as ``stage3.1``; the
            output of the layer is shared. auto: where they are most alike within the amounts.
        trunk: The task whose network gives the trunk; auto: the one to which the others are most alike there.
        parameters: Fraction of the networks' parameters to keep at most.
        macs: Of their multiply-accumulates.
        latency: Of their measured time on the target.
        samples: Calibration examples on which similarity is measured.
        epochs: Passes over the training examples; may be a fraction; 0: nothing is trained.
        batch_size: Examples of one update.
        learning_rate: The largest one; auto: 0.03 for networks with batch norms, else 0.001, and 0.0001 with
            layer norms.
        alpha: Share of each network's own outputs in the loss of its head; labels have the rest.
        temperature: Softens class scores.
        balance: Of the tasks' losses: uncertainty (weights are learned), equal, or pcgrad (of gradients that
            conflict, what goes against another task's is taken away).
        augment: Of images, in this order: shift, flip, crop, mixup, cutmix.
    """

    kind: ClassVar[Kind] = "structure"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration", "training"})

    at: str = "auto"
    trunk: str = "auto"
    parameters: Share | None = None
    macs: Share | None = None
    latency: Share | None = None
    samples: Annotated[int, Field(ge=2)] = 256
    epochs: Annotated[float, Field(ge=0)] = 3.0
    batch_size: Annotated[int, Field(ge=1)] = 128
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    alpha: Alpha = 0.9
    temperature: Temperature = 4.0
    balance: Balance = "uncertainty"
    augment: tuple[Augmentation, ...] = ()

    @classmethod
    def holes(cls, model: Model, context: Context) -> dict[str, Hole]:
        rate = _training(model)[1]
        return {
            "parameters": Choice(_SHARES),
            "learning_rate": Choice((rate, rate / 3, rate * 3)),
        }

    def part(self, share: float) -> Merge:
        return self.model_copy(update={"epochs": share * self.epochs})

    def apply(self, model: Model, context: Context) -> Model:
        beside = Beside(model, context.costs if self.latency is not None else None)
        batches = calibration_batches(context, self.samples, "merge")
        picked = self._picked(model, beside, batches)
        trunk = picked[0].source.task
        for one in picked:
            context.progress.note(
                f"'{one.point.task}' parts from '{trunk}' at {one.source.name} "
                f"(similarity {one.similarity:.3f}{', through an adapter' if one.adapts is not None else ''})"
            )
        context.progress.note(
            "kept: " + ", ".join(f"{kept(picked, one):.0%} of the {one}" for one in beside.whole)
        )
        made = merged(model, beside, picked, batches)
        return self._trained(made, model, context) if self.epochs else made

    # ---- where

    def _picked(self, model: Model, beside: Beside, batches: list[tuple[Tensor, ...]]) -> list[Parting]:
        """One parting for each network but the trunk's."""
        if self.trunk != "auto" and self.trunk not in beside.tasks:
            raise RecipeError(
                f"no task is called '{self.trunk}'", fix=f"trunk: one of {', '.join(beside.tasks)}"
            )
        keep = self._limits(beside)
        trunks = beside.tasks if self.trunk == "auto" else (self.trunk,)
        pairs = {
            (source.value, point.value)
            for trunk in trunks
            for task in beside.tasks
            if task != trunk
            for source, point in beside.pairs(trunk, task)
        }
        alike = similarities(model, sorted(pairs), batches)
        options: dict[str, list[list[Parting]]] = {}
        for trunk in trunks:
            each = [partings(beside, trunk, task, alike) for task in beside.tasks if task != trunk]
            allowed = [self._allowed(beside, trunk, found) for found in each]
            if all(allowed):
                options[trunk] = allowed
        if not options:
            raise RecipeError(
                "where leaves merge no layer that networks could share", fix="leave where out, or widen it"
            )
        found = [picked for one in options.values() if (picked := chosen(one, keep)) is not None]
        if found:
            return max(found, key=lambda picked: min(one.similarity for one in picked))
        if self._asks:
            raise _too_little(options, keep)
        first = min(options.values(), key=lambda one: kept(deepest(one, "parameters"), "parameters"))
        return deepest(first, "parameters")

    @property
    def _asks(self) -> bool:
        return any(getattr(self, measure) is not None for measure in MEASURES)

    def _limits(self, beside: Beside) -> dict[Measure, float]:
        if not self._asks:
            return {} if self.at != "auto" else {"parameters": _AUTO, "macs": _AUTO}
        asked: dict[Measure, float | None] = {measure: getattr(self, measure) for measure in MEASURES}
        if self.latency is not None and "latency" not in beside.whole:
            raise RecipeError(
                "the target's runtime does not tell what its layers take", fix="macs: instead of latency:"
            )
        return {measure: share for measure, share in asked.items() if share is not None}

    def _allowed(self, beside: Beside, trunk: str, found: list[Parting]) -> list[Parting]:
        """Those at the place that is asked for, of which no layer goes that ``where`` leaves out."""
        if self.at != "auto":
            names = [point.name for point in beside.points[trunk]]
            inside = [name for name in names if _lies_in(self.at, name)]
            if not inside:
                raise RecipeError(
                    f"the network of '{trunk}' has no place '{self.at}' where all of it could part",
                    fix=f"at: one of {', '.join(names)}",
                )
            found = [one for one in found if one.source.name == inside[-1]]
        types = {node.name: (node.layer, node.layer_type) for node in beside.graph}
        return [one for one in found if all(self.where.selects(*types[name]) for name in one.point.before)]

    # ---- training

    def _trained(self, made: Model, model: Model, context: Context) -> Model:
        original = context.models.get("original", model)
        teacher = original if WHOLE in original.entries else model
        examples = training_examples(
            context.data, taught=True, augment=Augment(self.augment, context.data.augment), seed=context.seed
        )
        frozen = self._frozen(made)
        if len(frozen) == len(made.parameters):
            return made
        asked = Teacher(teacher, keep=not examples.augment, room=context.scratch)
        objective = MergedLoss(
            _heads(model, teacher, context), asked, self.alpha, self.temperature, self.balance
        )
        net = Simulated(made, WHOLE)
        net.freeze(frozen)
        train(net, objective, examples, self._settings(made, context), context)
        return net.absorb()

    def _settings(self, model: Model, context: Context) -> TrainSettings:
        optimizer, rate = _training(model)
        still = [
            path
            for path, layer in model.module.named_modules()
            if not self.where.selects(path, type(layer).__name__)
        ]
        return TrainSettings(
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=optimizer,
            learning_rate=rate if self.learning_rate == "auto" else self.learning_rate,
            clip=_CLIP,
            precision=context.precision,
            devices=context.devices,
            seed=context.seed,
            frozen=tuple(still),
        )

    def _frozen(self, model: Model) -> frozenset[str]:
        """Parameters that a layer holds which ``where`` leaves out."""
        held = {
            id(parameter)
            for path, layer in model.module.named_modules(remove_duplicate=False)
            if not self.where.selects(path, type(layer).__name__)
            for parameter in layer.parameters(recurse=False)
        }
        return frozenset(name for name, one in model.parameters.items() if id(one) in held)


PLUGIN = Merge


def _lies_in(place: str, name: str) -> bool:
    """Whether a traced value is of a layer, or is the one that is named."""
    path = name.partition("#")[0].rpartition("/")[0] or name.partition("#")[0]
    return name in (place, f"{place}:0") or path == place or path.startswith(f"{place}.")


def _too_little(options: dict[str, list[list[Parting]]], keep: dict[Measure, float]) -> RecipeError:
    """What is said of amounts that no merge keeps."""
    measure, limit = next(iter(keep.items()))
    for one, share in keep.items():
        if all(kept(deepest(each, one), one) > share for each in options.values()):
            measure, limit = one, share
    least, trunk = min((kept(deepest(each, measure), measure), trunk) for trunk, each in options.items())
    at = deepest(options[trunk], measure)[0].source.name
    return RecipeError(
        f"{measure}: {limit:g} is less than any merge keeps: the deepest, which parts at {at}, "
        f"keeps {least:.3g} of the {measure}",
        fix=f"{measure}: {least + 0.0005:.3f} or more, or prune before merge",
    )


def _heads(model: Model, original: Model, context: Context) -> list[Head]:
    """One a network, in the order of the outputs."""
    answers = flat_outputs(original)
    known = {task.name: task for task in tasks_in(context.data)}
    heads, start = [], 0
    beside = Beside(model)
    for name in beside.tasks:
        span = (start, start + len(beside.outputs(name)))
        heads.append(make_head(name, span, answers, known.get(name), context.data))
        start = span[1]
    return heads


def _training(model: Model) -> tuple[OptimizerName, float]:
    layers = list(model.module.modules())
    if any(isinstance(layer, _BatchNorm) for layer in layers):
        return "sgd", 0.03
    return "adamw", 1e-4 if any(isinstance(layer, nn.LayerNorm | nn.RMSNorm) for layer in layers) else 1e-3
