"""Supernet: the network is trained so that it holds many smaller ones, from which ``subnet`` takes one.

The channels of every group are sorted, the most important first, which changes no output; then the network
and parts of it learn together (tools/sandwich.py)::

    loss = mean of  L(f(x; w)),  d(f_s(x; w_s), f(x; w))  over subnets s

A subnet has the first channels of each group, the first blocks of each stage, the inner part of kernels, a
smaller picture (Cai et al. 2020, Once-for-all, arXiv:1908.09791; Yu and Huang 2019, arXiv:1903.05134). What
comes out is the same plain network, a little better or worse than before, with an edit that says what may be
taken of it. Costs nothing at inference.

A second ``supernet`` with ``front`` trains the networks that lose least for what they cost, and no others:
weights that all share serve fewer then, and serve them better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from featherweight.elastic import Space, mark, space_of_supernet
from featherweight.errors import RecipeError
from featherweight.method import Context, Kind, Method, Need, Precision
from featherweight.model import Model, make_edit
from featherweight.tools.augment import Augment
from featherweight.tools.batches import calibration_batches
from featherweight.tools.distill_check import check_alike
from featherweight.tools.distill_losses import output_kinds
from featherweight.tools.distillation import Alpha, Distilling, TeacherName, Temperature, distilled
from featherweight.tools.elastic_cut import Extractor
from featherweight.tools.elastic_sort import sorted_channels
from featherweight.tools.elastic_space import find_space
from featherweight.tools.groups import Channels
from featherweight.tools.objectives import Objective, no_labels, task_objective
from featherweight.tools.optimizers import OptimizerName
from featherweight.tools.rankings import DATA_FREE, Importance, rank
from featherweight.tools.sandwich import Layers, Sandwich
from featherweight.tools.simulated import Simulated
from featherweight.tools.subnet_search import front, spread
from featherweight.tools.supernets import held
from featherweight.tools.train_settings import TrainSettings
from featherweight.tools.trained import (
    auto_optimizer,
    auto_rate,
    frozen_parameters,
    still_layers,
    trained_entry,
)
from featherweight.tools.training import train
from featherweight.tools.training_examples import TrainingExamples, training_examples
from featherweight.tools.widths import Unit

_NAMED = 3  # reasons that are told
_POOL = 8  # subnets that are ready
_STEPS = 4  # of which one cuts a new subnet
_WHOLE = 0.98  # of the whole network's cost: what costs more is that network
_OF_THE_SPACE = ("widths", "depth", "kernels", "inputs", "round_to", "importance", "shrink")
_LARGEST = 4  # of which one runs the largest network, where it does not teach
Share = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Supernet(Method, frozen=True, extra="forbid"):
    """Train the network so that smaller ones can be taken from it: one training for many budgets.

    Attributes:
        widths: Shares of a group's channels that a subnet may keep.
        depth: Subnets may have fewer residual blocks; one of each stage stays.
        kernels: Subnets may have smaller kernels, down to 3; or the sides that there are.
        inputs: Shares of the pictures' side; pictures are averaged down inside of the network.
        round_to: Widths are multiples of it, where a group is wide enough; None: what the target's kernels
            like.
        importance: Which channels come first, as ``prune`` has it.
        samples: Calibration examples that tell it.
        epochs: Passes over the training examples; may be a fraction. 0: channels are sorted, and that is all.
        batch_size: Examples of one update.
        accumulate: Parts of a batch that go through the networks one after the other, to save memory.
        optimizer: sgd (Nesterov momentum) or adamw; auto: sgd for networks with batch norms.
        learning_rate: The largest one; auto follows the optimizer.
        momentum: Of sgd; the first beta of adamw.
        weight_decay: Of kernels and matrices, not of norms and biases.
        warmup: Share of the updates in which the rate rises; then it falls as a cosine.
        clip: Largest norm of the gradient; 0: any.
        label_smoothing: Share of a label that is spread over all classes.
        precision: 32, bf16-mixed or 16-mixed; auto is what --precision says.
        augment: Of images, in this order: shift, flip, crop.
        teacher: Whose outputs the largest network learns beside or instead of labels: original, teacher
            (--teacher), float.
        alpha: Share of the teacher's outputs in its loss; the labels have the rest.
        temperature: Softens class scores, of the teacher and of the largest network.
        learn: Whom subnets learn from: the ``largest`` network, as it is just then, or the ``teacher``, and
            labels as it does. auto: the teacher where there is one.
        every: The largest network runs in one of so many steps; None: in all where it teaches, else in one of
            four, since the other networks are what a step is for.
        subnets: Random ones of a step, beside the largest and the smallest.
        shrink: Share of the training in which the space opens: kernels, then depths, then widths.
        front: Behind another ``supernet``: so many networks learn and no others, spread over the front of
            those that lose least for what they cost, by the search of ``subnet``.
        evaluations: Networks that this search looks at.
    """

    kind: ClassVar[Kind] = "structure"
    needs: ClassVar[frozenset[Need]] = frozenset({"training"})

    widths: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
    depth: bool = True
    kernels: bool | tuple[Annotated[int, Field(ge=1)], ...] = True
    inputs: Annotated[tuple[Share, ...], Field(min_length=1)] = (1.0,)
    round_to: Annotated[int, Field(ge=1)] | None = None
    importance: Importance | Literal["auto"] = "auto"
    samples: Annotated[int, Field(ge=1)] = 512
    epochs: Annotated[float, Field(ge=0)] = 10.0
    batch_size: Annotated[int, Field(ge=1)] = 128
    accumulate: Annotated[int, Field(ge=1)] = 1
    optimizer: OptimizerName | Literal["auto"] = "auto"
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    clip: Annotated[float, Field(ge=0)] = 5.0
    label_smoothing: Fraction = 0.0
    precision: Precision | Literal["auto"] = "auto"
    augment: tuple[Literal["shift", "flip", "crop"], ...] = ()
    teacher: TeacherName = "none"
    alpha: Alpha = 0.9
    temperature: Temperature = 1.0
    learn: Literal["auto", "largest", "teacher"] = "auto"
    every: Annotated[int, Field(ge=1)] | None = None
    subnets: Annotated[int, Field(ge=0)] = 2
    shrink: Fraction = 0.0
    front: Annotated[int, Field(ge=1)] | None = None
    evaluations: Annotated[int, Field(ge=1)] = 200

    @field_validator("precision", mode="before")
    @classmethod
    def _said_as_number(cls, value: Any) -> Any:
        return "32" if value == 32 else value

    @property
    def targetless(self) -> bool:
        return self.round_to is not None

    @model_validator(mode="after")
    def _has_a_teacher(self) -> Supernet:
        if self.learn == "teacher" and self.teacher == "none":
            raise ValueError("learn: teacher, and there is none: give teacher: original, or learn: largest")
        if self._inplace and self.every not in (None, 1):
            raise ValueError(
                f"every: {self.every}, and subnets learn from the largest network in every step: "
                "leave it out, or give a teacher"
            )
        return self

    @model_validator(mode="after")
    def _has_no_space_of_its_own(self) -> Supernet:
        fields = type(self).model_fields
        given = [name for name in _OF_THE_SPACE if getattr(self, name) != fields[name].default]
        if self.front is not None and given:
            raise ValueError(
                f"front trains what the supernet before holds, and {given[0]} is given: leave it out"
            )
        if self.front is None and self.evaluations != fields["evaluations"].default:
            raise ValueError("evaluations are those of front's search, and there is no front: leave it out")
        return self

    @property
    def _inplace(self) -> bool:
        """Whether subnets learn from the largest network."""
        return self.learn == "largest" or (self.learn == "auto" and self.teacher == "none")

    def part(self, share: float) -> Supernet:
        return self.model_copy(update={"epochs": share * self.epochs})

    def apply(self, model: Model, context: Context) -> Model:
        entry = trained_entry(model, "supernet")
        space, channels = self._known(model, context) if self.front else self._space(model, context)
        if space.is_trivial:
            return model.evolve(module=model.copy_module())
        examples = training_examples(
            context.data,
            taught=self.teacher != "none",
            augment=Augment(self.augment, context.data.augment),
            seed=context.seed,
        )
        begun = model
        if self.front is None:
            begun = sorted_channels(model, channels, self._order(model, channels, context, entry))
        if self.epochs == 0:
            return _marked(begun, space)
        objective = self._objective(begun, examples, context, entry)
        settings = self._settings(model, context)
        net = Simulated(begun, entry)
        frozen = frozen_parameters(begun, self.where)
        if frozen:
            net.freeze(frozen)
        steps = max(1, round(settings.epochs * examples.steps(settings.batch_size)))
        sandwich = Sandwich(
            objective,
            space,
            Extractor(begun, space, channels),
            output_kinds(check_alike(begun, begun, role="the network", entry=entry), context.data),
            Layers(
                random=self.subnets,
                drawn=steps // _STEPS,
                pool=_POOL,
                shrink=self.shrink,
                steps=steps,
                every=1 if context.devices > 1 else self.every or (1 if self._inplace else _LARGEST),
                inplace=self._inplace,
                temperature=self.temperature,
                seed=context.seed,
            ),
            entry,
            still=settings.frozen,
        )
        train(net, sandwich, examples, settings, context)
        return _marked(net.absorb(), space)

    # ---- what is elastic

    def _space(self, model: Model, context: Context) -> tuple[Space, Channels]:
        space, channels, reasons = find_space(
            model,
            where=self.where,
            widths=self.widths,
            multiple=self.round_to or context.supports.width_multiple,
            depth=self.depth,
            kernels=self.kernels,
            inputs=self.inputs,
        )
        if space.is_trivial:
            told = "; ".join(f"'{part}': {why}" for part, why in list(reasons.items())[:_NAMED])
            what = "supernet finds nothing elastic: no channels, blocks or kernels that may go"
            if self.where.rules:  # it was asked to leave them alone
                context.progress.note(f"warning: {what}; {told}")
                return space, channels
            raise RecipeError(
                what,
                where=told or None,
                fix="check where, widths, depth, kernels and round_to, or choose another network: --student",
            )
        return space, channels

    def _known(self, model: Model, context: Context) -> tuple[Space, Channels]:
        """The space of the supernet before, and which networks of it are trained."""
        assert self.front is not None
        if space_of_supernet(model) is None:
            raise RecipeError(
                "front trains networks of a supernet, and this model is none",
                fix="put a supernet without front before this one",
            )
        net = held(model, context, self.where, "latency")
        unit: Unit = "latency" if "latency" in net.costs.units else "macs"
        if net.space.is_trivial:
            context.progress.note("warning: nothing of the supernet may be cut, so front trains nothing")
            return net.space, net.channels
        seen = net.seen(unit, context, evaluations=self.evaluations, samples=self.samples)
        most = _WHOLE * net.costs.of(net.space.largest())[unit]
        found = front(seen, unit)
        smaller = [one for one in found if one.costs[unit] <= most] or found
        among = tuple(one.subnet for one in spread(smaller, unit, self.front))
        shares = ", ".join(f"{net.share(one, unit):.2f}" for one in among)
        context.progress.note(f"{len(among)} networks learn, of {shares} of the {unit}")
        return replace(net.space, among=among), net.channels

    def _order(
        self, model: Model, channels: Channels, context: Context, entry: str
    ) -> Mapping[str, tuple[int, ...]]:
        """The channels of each group, the most important one first."""
        if not channels.groups:
            return {}
        known = context.data.calibration_source in ("calibration", "training")
        importance: Importance = (
            ("reconstruction" if known else "l2") if self.importance == "auto" else self.importance
        )
        batches: list[tuple[Tensor, ...]] = []
        if importance not in DATA_FREE:
            batches = calibration_batches(context, self.samples, "supernet")
        ranked = rank(model, channels, importance, batches, context, entry)
        return {name: tuple(reversed(one.order)) for name, one in ranked.rankings.items()}

    # ---- how it is trained

    def _objective(self, model: Model, examples: TrainingExamples, context: Context, entry: str) -> Objective:
        """What the largest network learns."""
        task = task_objective(model, context.data, smoothing=self.label_smoothing, entry=entry)
        if task is None and self.teacher == "none":
            raise no_labels()
        how = Distilling(teacher=self.teacher, temperature=self.temperature, alpha=self.alpha)
        objective = distilled(task, how, model, context, cache=not examples.augment, entry=entry)
        if objective is None:
            raise no_labels()
        return objective

    def _settings(self, model: Model, context: Context) -> TrainSettings:
        optimizer = auto_optimizer(model) if self.optimizer == "auto" else self.optimizer
        rate = auto_rate(optimizer, model) if self.learning_rate == "auto" else self.learning_rate
        return TrainSettings(
            epochs=self.epochs,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            optimizer=optimizer,
            learning_rate=rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            clip=self.clip or None,
            precision=context.precision if self.precision == "auto" else self.precision,
            devices=context.devices,
            seed=context.seed,
            frozen=still_layers(model, self.where),
        )


PLUGIN = Supernet


def _marked(model: Model, space: Space) -> Model:
    """A model that says which networks it holds."""
    edit = mark(space)
    return model.evolve(module=make_edit(model.copy_module(), edit), edits=(edit,))
