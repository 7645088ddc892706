"""Distillation: a student learns what its teacher says, beside its labels or instead of them.

loss = (1 - alpha) task + alpha soft targets + w_f sum of features + w_a sum of attention, without labels
soft targets + ...; each term and its paper is in ``distill_losses.py``. The student may be pruned,
quantized, or of another architecture: layers are paired in ``distill_pairs.py``. Where widths differ, a
linear projection of the student's channels (a 1x1 convolution for maps) is trained with it and thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.errors import RecipeError
from featherweight.method import Context
from featherweight.model import Model
from featherweight.tools.distill_check import check_alike
from featherweight.tools.distill_heads import Read, Relation, attention_reads, relations
from featherweight.tools.distill_losses import (
    OutputKind,
    attention_loss,
    feature_loss,
    output_kinds,
    output_loss,
    relation_loss,
)
from featherweight.tools.distill_pairs import Pair, Seen, layers_seen, paired
from featherweight.tools.distill_teacher import Teacher
from featherweight.tools.objectives import Net, Objective, Outputs

TeacherName = Literal["none", "original", "teacher", "float"]
Temperature = Annotated[float, Field(gt=0, le=1000)]
Alpha = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Features = Literal["none", "auto"] | dict[str, str]

_READS = 3  # queries, keys, values
_POOLS: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


@dataclass(frozen=True)
class Distilling:
    """How a student learns from a teacher; parameters of ``finetune``.

    Attributes:
        teacher: The ``original`` network, the ``teacher`` that was given, ``float``: the network as it
            reached the first format step, or ``none``.
        temperature: Softens class scores: from 1, as they are, to where all classes count alike.
        alpha: Share of the teacher's outputs in the loss; the labels have the rest.
        features: Layers whose outputs are compared: ``auto``, or student's layer -> teacher's.
        feature_weight: Of each such pair.
        attention: Layers of which only the attention is compared: where the energy of a map is, how the
            tokens of a sequence relate. ``auto`` (of transformers the queries, keys and values), or student's
            layer -> teacher's.
        attention_weight: Of each such pair; queries, keys and values are one.
    """

    teacher: TeacherName = "none"
    temperature: float = 4.0
    alpha: float = 0.9
    features: Features = "none"
    feature_weight: float = 1.0
    attention: Features = "none"
    attention_weight: float = 1.0


def distilled(
    task: Objective | None,
    how: Distilling,
    model: Model,
    context: Context,
    *,
    cache: bool = False,
    entry: str = "forward",
) -> Objective | None:
    """The objective with a teacher; without one the task's own.

    Args:
        task: The labels' objective; None: distil only.
        how: What the recipe says.
        model: The student, before training.
        context: Holds the teacher, and room for what it says.
        cache: The inputs are the same in every epoch, so what the teacher says of them is kept.
        entry: Which way of calling both.

    Raises:
        RecipeError: There is no such teacher, or it does not fit the student.
    """
    if how.teacher == "none":
        return task
    master = _teacher_of(how.teacher, model, context)
    role = "the teacher" if how.teacher == "teacher" else f"the teacher ({how.teacher})"
    outputs = check_alike(model, master, role=role, than="the student", entry=entry)
    links = _linked(how, model, master, entry)
    return Distillation(
        task,
        Teacher(master, links.of("teacher"), entry=entry, keep=cache, room=context.scratch),
        output_kinds(outputs, context.data),
        how,
        links,
        seed=context.seed,
    )


@dataclass(frozen=True)
class Links:
    """What is compared inside both networks.

    Attributes:
        features: Pairs whose outputs are compared.
        attention: Pairs whose attention is compared.
        reads: What attentions read.
    """

    features: tuple[Pair, ...] = ()
    attention: tuple[Pair, ...] = ()
    reads: tuple[Relation, ...] = ()

    def of(self, whose: Literal["student", "teacher"]) -> tuple[str, ...]:
        """The layers to watch."""
        both = (*self.features, *self.attention, *self.reads)
        return tuple(dict.fromkeys(getattr(one, whose).layer for one in both))


def _linked(how: Distilling, model: Model, master: Model, entry: str) -> Links:
    if how.features == how.attention == "none":
        return Links()
    inputs = model.entries[entry].example_inputs
    mine, theirs = layers_seen(model, inputs, entry), layers_seen(master, inputs, entry)
    features = paired(how.features, mine, theirs, "features")
    if how.attention == "auto":
        reads = relations(attention_reads(model, entry), attention_reads(master, entry))
        if reads:
            return Links(features, reads=reads)
    return Links(features, paired(how.attention, mine, theirs, "attention"))


def _teacher_of(name: TeacherName, model: Model, context: Context) -> Model:
    if name == "float":
        return context.float_model(model)
    if name not in context.models:
        raise RecipeError(
            f"the recipe asks for teacher: {name}, and there is none",
            fix="--teacher path.py:callable --teacher-weights FILE, or teacher: original",
        )
    return context.models[name]


class Distillation(Objective):
    """A student's distance from its teacher, and from its labels where there are some.

    Args:
        task: The labels' objective; None: distil only.
        teacher: What is asked.
        kinds: What each output holds.
        how: Weights and temperature.
        links: What is compared inside.
        seed: Of the projections.
    """

    def __init__(
        self,
        task: Objective | None,
        teacher: Teacher,
        kinds: tuple[OutputKind, ...],
        how: Distilling,
        links: Links | None = None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.task = task
        self.teacher = teacher
        self.how = how
        self.links = links or Links()
        self.projections = _projections(self.links.features, seed)
        self._kinds = kinds
        self._nets: tuple[Net, ...] = ()  # in a tuple, so that it is no submodule

    def advance(self, share: float) -> None:
        """Tell the task's objective."""
        if self.task is not None:
            self.task.advance(share)

    def attach(self, net: Net) -> None:
        """Watch the student's layers."""
        if self.task is not None:
            self.task.attach(net)
        self._nets = (net,)
        layers = self.links.of("student")
        if layers:
            net.watch(layers)

    def step(self, net: Net, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
        """Run the student on a batch, in the task's own way, and give the loss."""
        if self.task is None or targets is None:
            return super().step(net, inputs, targets)
        watched = Watched(net)
        task = self.task.step(watched, inputs, targets)
        return self._together(task, watched.outputs, inputs, targets)

    def forward(self, outputs: Outputs, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
        """The loss of a batch; without targets the teacher alone counts."""
        task = None
        if self.task is not None and targets is not None:
            task = self.task(outputs, inputs, targets)
        return self._together(task, outputs, inputs, targets)

    def _together(
        self, task: Tensor | None, outputs: Outputs, inputs: tuple[Tensor, ...], targets: Tensor | None
    ) -> Tensor:
        how = self.how
        said, layers = self.teacher(inputs)
        loss = outputs_loss(outputs, said, self._kinds, how.temperature, targets)
        if task is not None:
            loss = (1 - how.alpha) * task + how.alpha * loss
        return loss + self._of_links(self._nets[0].seen, layers) if layers else loss

    def _of_links(self, seen: Mapping[str, Tensor], layers: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum over all that is compared inside."""
        how, links, found = self.how, self.links, []
        for pair, projection in zip(links.features, self.projections, strict=True):
            mine, theirs = _aligned(seen[pair.student.layer], layers[pair.teacher.layer], pair)
            found.append(how.feature_weight * feature_loss(projection(mine), theirs))
        for pair in links.attention:
            mine, theirs = _aligned(seen[pair.student.layer], layers[pair.teacher.layer], pair)
            found.append(how.attention_weight * _of_attention(mine, theirs, pair))
        for one in links.reads:
            mine, theirs = (
                _part(values[read.layer], read)
                for values, read in ((seen, one.student), (layers, one.teacher))
            )
            found.append(how.attention_weight / _READS * relation_loss(mine, theirs, one.heads))
        return torch.stack(found).sum()


def outputs_loss(
    outputs: Outputs,
    said: Outputs,
    kinds: tuple[OutputKind, ...],
    temperature: float,
    targets: Tensor | None = None,
) -> Tensor:
    """How far outputs are from what another network says: the mean over those that say something.

    Args:
        outputs: With their gradient.
        said: Of the same shapes.
        kinds: What each one holds.
        temperature: Softens class scores.
        targets: Of the first output; see :func:`output_loss`.

    Raises:
        RecipeError: None of them says anything.
    """
    losses = [
        output_loss(_single(mine), _single(theirs), kind, temperature, targets if index == 0 else None)
        for index, (mine, theirs, kind) in enumerate(zip(outputs, said, kinds, strict=True))
        if kind.name != "none"
    ]
    if not losses:
        raise RecipeError("no output of the network is of floating-point numbers, so nothing is distilled")
    return torch.stack(losses).mean()


class Watched:
    """A network that keeps what its last call gave."""

    def __init__(self, net: Net) -> None:
        self._net = net
        self.seen = net.seen
        self.outputs: Outputs = ()

    def __call__(self, *inputs: Tensor) -> Outputs:
        self.outputs = self._net(*inputs)
        self.seen = self._net.seen
        return self.outputs

    def watch(self, layers: Any) -> None:
        self._net.watch(layers)


def _projections(pairs: tuple[Pair, ...], seed: int) -> nn.ModuleList:
    """From the student's channels to the teacher's, where their numbers differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList(
            nn.Identity()
            if pair.student.width == pair.teacher.width
            else nn.Linear(pair.student.width, pair.teacher.width)
            for pair in pairs
        )


def _single(value: Tensor) -> Tensor:
    """Half floats, which networks in mixed precision give, as single ones."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _aligned(mine: Tensor, theirs: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """Both with channels last; of two maps the larger one is averaged down to the smaller one's positions."""
    mine, theirs = _single(mine), _single(theirs)
    if pair.student.places != pair.teacher.places:
        size = [min(sizes) for sizes in zip(mine.shape[2:], theirs.shape[2:], strict=True)]
        mine, theirs = _pooled(mine, size), _pooled(theirs, size)
    return mine.movedim(pair.student.axis, -1), theirs.movedim(pair.teacher.axis, -1)


def _pooled(value: Tensor, size: list[int]) -> Tensor:
    if list(value.shape[2:]) == size:
        return value
    pool: Callable[[Tensor, list[int]], Tensor] = _POOLS[len(size) - 1]
    return pool(value, size)


def _part(value: Tensor, read: Read) -> Tensor:
    """Queries, keys or values out of what the layer gives."""
    return _single(value if read.part is None else value.chunk(_READS, -1)[read.part])


def _of_attention(mine: Tensor, theirs: Tensor, pair: Pair) -> Tensor:
    """Maps by where their energy is, sequences by how their tokens relate."""
    if _is_sequence(pair.student):
        return relation_loss(mine, theirs)
    return attention_loss(mine, theirs)


def _is_sequence(seen: Seen) -> bool:
    return len(seen.shape) == 3 and seen.axis == 2
