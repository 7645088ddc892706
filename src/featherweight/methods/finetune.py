"""Finetune: train what the steps before left, on the labels, on a teacher, or on a loss of the user's.

Weights follow the gradient of the loss over the training examples (tools/training.py)::

    w <- w - rate(t) * gradient of loss(network(x), y)

Under formats the network is the stored one and gradients pass straight through the rounding
(tools/simulated.py). With a teacher the loss is that of distillation (tools/distillation.py), and labels are
optional. Costs nothing at inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.formats import Binary, IntQuant, Sparse, TensorFormat, Ternary
from featherweight.graph import trace
from featherweight.method import Context, Kind, Method, Need, Precision
from featherweight.model import Model
from featherweight.recipe import Choice, Hole, Range
from featherweight.tools.augment import Augment, Augmentation
from featherweight.tools.batch_norms import reestimate
from featherweight.tools.distillation import (
    Alpha,
    Distilling,
    Features,
    TeacherName,
    Temperature,
    Weight,
    distilled,
)
from featherweight.tools.objectives import no_labels, task_objective
from featherweight.tools.optimizers import OptimizerName, Schedule
from featherweight.tools.sim_norms import normable
from featherweight.tools.simulated import Simulated
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

_HELD_BACK = 0.1  # when patience asks for some
_STATISTICS = 1024  # examples that batch norms are estimated from anew
_NORMALIZED = 256  # that temporary ones begin with
_TOGETHER = 128
_COARSE = 4  # bits
_STEP_RATE = 1e-3  # of learned step sizes, which are relative
Share = Annotated[float, Field(ge=0, lt=1)]


class Finetune(Method, frozen=True, extra="forbid"):
    """Train on the training examples; defaults suit a network that lost something in the steps before.

    Attributes:
        epochs: Passes over the training examples; may be a fraction.
        steps: Updates instead of epochs; 0: epochs count.
        batch_size: Examples of one update.
        accumulate: Parts of a batch that go through the network one after the other, to save memory.
        optimizer: sgd (Nesterov momentum) or adamw; auto: sgd for float networks with batch norms, whatever
            weights magnitudes make zero.
        learning_rate: The largest one; auto follows the optimizer, smaller where something is on a grid.
        momentum: Of sgd; the first beta of adamw.
        weight_decay: Of kernels and matrices, not of norms and biases.
        warmup: Share of the updates in which the rate rises.
        schedule: How the rate falls: cosine, linear or constant.
        clip: Largest norm of the gradient; 0: any.
        label_smoothing: Share of a label that is spread over all classes.
        ema: Decay of an exponential moving average of the weights, which is then the result; 0: none.
        validation: Share of the training examples that is held back; the epoch of their lowest loss is kept.
        patience: Epochs without a lower loss on those that end training; 0: all epochs.
        precision: 32, bf16-mixed or 16-mixed; auto is what --precision says.
        batch_norm: train; freeze (statistics stay); reestimate them at the end; temporary: under formats,
            norms behind folded layers that training has and the result has not. auto: temporary where weights
            are stored in 4 bits or fewer, else train.
        loss: path.py:callable (outputs, targets) -> a tensor of one number; auto follows from the targets.
        training_step: path.py:callable (module, (inputs, targets)) -> the loss, instead of any other.
        augment: Of images, in this order: shift, flip, crop, mixup, cutmix.
        teacher: Whose outputs are learned beside or instead of labels: original, teacher (--teacher), float.
        temperature: Softens the teacher's class scores.
        alpha: Share of the teacher's outputs in the loss; the labels have the rest.
        features: Layers whose outputs follow the teacher's: auto, or layer -> the teacher's layer.
        feature_weight: Of each such pair.
        attention: Layers whose attention maps follow the teacher's: auto, or layer -> the teacher's layer.
        attention_weight: Of each such pair.
    """

    kind: ClassVar[Kind] = "values"
    needs: ClassVar[frozenset[Need]] = frozenset({"training"})

    epochs: Annotated[float, Field(gt=0)] = 3.0
    steps: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(ge=1)] = 128
    accumulate: Annotated[int, Field(ge=1)] = 1
    optimizer: OptimizerName | Literal["auto"] = "auto"
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    momentum: Share = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    schedule: Schedule = "cosine"
    clip: Annotated[float, Field(ge=0)] = 5.0
    label_smoothing: Share = 0.0
    ema: Share = 0.0
    validation: Share = 0.0
    patience: Annotated[int, Field(ge=0)] = 0
    precision: Precision | Literal["auto"] = "auto"
    batch_norm: Literal["auto", "train", "freeze", "reestimate", "temporary"] = "auto"
    loss: str = "auto"
    training_step: str = "none"
    augment: tuple[Augmentation, ...] = ()
    teacher: TeacherName = "none"
    temperature: Temperature = 4.0
    alpha: Alpha = 0.9
    features: Features = "none"
    feature_weight: Weight = 1.0
    attention: Features = "none"
    attention_weight: Weight = 1.0

    @field_validator("precision", mode="before")
    @classmethod
    def _said_as_number(cls, value: Any) -> Any:
        return "32" if value == 32 else value

    @classmethod
    def holes(cls, model: Model, context: Context) -> dict[str, Hole]:
        if context.data.train is None and context.data.calibration_examples is None:
            return {}  # with a teacher it takes no more than one of them, and no labels
        rate = auto_rate(auto_optimizer(model), model)
        return {
            "epochs": Choice((1.0, 3.0)),
            "learning_rate": Range(rate / 5, rate * 5, log=True, default=rate),
        }

    def part(self, share: float) -> Finetune:
        if self.steps:
            return self.model_copy(update={"steps": max(1, round(share * self.steps))})
        return self.model_copy(update={"epochs": share * self.epochs})

    @property
    def code(self) -> tuple[str, ...]:
        """The user's code that counts for the result."""
        return tuple(spec for spec in (self.loss, self.training_step) if spec not in ("auto", "none"))

    def apply(self, model: Model, context: Context) -> Model:
        entry = trained_entry(model, "finetune")
        taught = self.teacher != "none"
        frozen = frozen_parameters(model, self.where)
        if len(frozen) == len(model.parameters):
            raise RecipeError(
                "where leaves finetune no layer with weights", fix="leave where out, or widen it"
            )
        task = task_objective(
            model,
            context.data,
            loss=None if self.loss == "auto" else self.loss,
            training_step=None if self.training_step == "none" else self.training_step,
            smoothing=self.label_smoothing,
            entry=entry,
        )
        if task is None and not taught and context.data.train is not None:
            raise no_labels()
        examples = training_examples(
            context.data,
            taught=taught,
            held_back=self.validation or (_HELD_BACK if self.patience else 0.0),
            augment=Augment(self.augment, context.data.augment),
            seed=context.seed,
        )
        teaching = Distilling(
            teacher=self.teacher,
            temperature=self.temperature,
            alpha=self.alpha,
            features=self.features,
            feature_weight=self.feature_weight,
            attention=self.attention,
            attention_weight=self.attention_weight,
        )
        objective = distilled(task, teaching, model, context, cache=not examples.augment)
        if objective is None:
            raise no_labels()
        net = self._simulated(model, entry, frozen, examples, context)
        train(net, objective, examples, self._settings(model, context), context)
        trained = net.absorb()
        return self._reestimated(trained, examples, entry) if self.batch_norm == "reestimate" else trained

    def _simulated(
        self,
        model: Model,
        entry: str,
        frozen: frozenset[str],
        examples: TrainingExamples,
        context: Context,
    ) -> Simulated:
        """What is trained: the network as it will be stored, maybe with temporary norms."""
        norms = self.batch_norm == "temporary" or (
            self.batch_norm == "auto" and not frozen and _is_coarse(model) and _can_be_normed(model, entry)
        )
        if norms and frozen:
            raise RecipeError(
                "temporary batch norms change every layer, and where leaves some out",
                fix="leave where out, or batch_norm: train",
            )
        batches = list(_some(examples, _NORMALIZED)) if norms else []
        net = Simulated(model, entry, fixed=_fixed(model, entry, context), normalize=batches)
        if frozen:
            net.freeze(frozen)
        return net

    def _settings(self, model: Model, context: Context) -> TrainSettings:
        optimizer = auto_optimizer(model) if self.optimizer == "auto" else self.optimizer
        rate = auto_rate(optimizer, model) if self.learning_rate == "auto" else self.learning_rate
        return TrainSettings(
            epochs=self.epochs,
            steps=self.steps or None,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            optimizer=optimizer,
            learning_rate=rate,
            step_rate=_STEP_RATE,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            schedule=self.schedule,
            clip=self.clip or None,
            ema=self.ema or None,
            patience=self.patience or None,
            precision=context.precision if self.precision == "auto" else self.precision,
            devices=context.devices,
            seed=context.seed,
            settled=max((_end(fmt) for chain in model.formats.values() for fmt in chain), default=0.0),
            frozen=still_layers(model, self.where, norms=self.batch_norm == "freeze"),
        )

    def _reestimated(self, model: Model, examples: TrainingExamples, entry: str) -> Model:
        """The model whose batch norms that may change have statistics of the trained network."""
        found = reestimate(model, _some(examples, _STATISTICS), self.where.selects, entry)
        for name, value in found.items():
            model.module.get_buffer(name).copy_(value)  # a module of this step's own
        return model


PLUGIN = Finetune


def _some(examples: TrainingExamples, count: int) -> Iterator[tuple[Tensor, ...]]:
    """Inputs of so many training examples, or all, as they are."""
    plain = TrainingExamples(examples.source, examples.picks, seed=examples.seed)
    count = min(count, len(plain))
    size = min(_TOGETHER, count)
    return (plain.batch(step, size).inputs for step in range(count // size))


def _end(fmt: TensorFormat) -> float:
    """Share of the training after which a format that changes with it stays."""
    if not isinstance(fmt, Sparse):
        return 0.0
    return 1.0 if fmt.by == "gates" else fmt.end


def _is_coarse(model: Model) -> bool:
    """Whether weights are stored in so few bits that temporary norms help."""
    chains = [model.formats.get(name, ()) for name in model.parameters]
    formats = [fmt for chain in chains for fmt in chain]
    return any(
        isinstance(fmt, Ternary | Binary) or (isinstance(fmt, IntQuant) and fmt.used <= _COARSE)
        for fmt in formats
    )


def _can_be_normed(model: Model, entry: str) -> bool:
    return bool(normable(model, trace(model, entry)))


def _fixed(model: Model, entry: str, context: Context) -> frozenset[str]:
    """Traced values whose ranges the target's kernels set."""
    if not model.formats:
        return frozenset()
    ranges = context.supports.fixed_ranges
    return frozenset(name for node in trace(model, entry) if node.op in ranges for name in node.outputs)
