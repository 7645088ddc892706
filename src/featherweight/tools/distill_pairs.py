"""Which layers of a student are held to which of its teacher, found by running both once.

A layer counts if it is called once and gives one tensor. Layers are paired where nothing but the number of
channels differs, so each pair has the same positions: pixels, tokens. At each resolution that both have,
the last layers are paired (the ends of stages); where there is one resolution only, as in transformers,
the blocks at equal fractions of the depth. A student that was made of its teacher, pruned or quantized, has
its layers' names, and only layers of one name are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from featherweight.errors import RecipeError, nearest
from featherweight.model import Model
from featherweight.tools.distill_check import inference, tensors

Names = Literal["none", "auto"] | Mapping[str, str]

_MOST = 4  # pairs where all layers have one resolution
_OF_STUDENT, _OF_TEACHER = 0.5, 0.6  # shares of layers with a name in both: one was made of the other
_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)  # channels last


@dataclass(frozen=True)
class Seen:
    """What a layer gives.

    Attributes:
        layer: Its path.
        axis: Of its channels.
        shape: Of its output, with the batch.
        order: When it was done, among all layers.
        block: It is one of several children of a Sequential or ModuleList.
    """

    layer: str
    axis: int
    shape: tuple[int, ...]
    order: int
    block: bool

    @property
    def width(self) -> int:
        """Channels."""
        return self.shape[self.axis]

    @property
    def places(self) -> tuple[int, ...]:
        """Sizes of what is neither batch nor channels."""
        return tuple(size for axis, size in enumerate(self.shape) if axis not in (0, self.axis))


@dataclass(frozen=True)
class Pair:
    """A layer of the student and the one of the teacher that it is held to."""

    student: Seen
    teacher: Seen


def layers_seen(model: Model, inputs: tuple[Tensor, ...], entry: str = "forward") -> dict[str, Seen]:
    """Every layer that is called once and gives features, in the order in which they are done."""
    found: dict[str, Seen] = {}
    calls: dict[str, int] = {}
    results: dict[str, Tensor] = {}
    last = [1]  # the axis of the channels, as the layer with weights before tells

    def note(path: str, layer: nn.Module, _: Any, output: Any) -> None:
        calls[path] = calls.get(path, 0) + 1
        value = first_tensor(output)
        if value is None or not value.is_floating_point() or value.dim() < 2:
            return
        if not any(True for _ in layer.children()) and next(layer.parameters(False), None) is not None:
            last[0] = -1 if isinstance(layer, _LAST) else 1
        results[path] = value
        axis = last[0] % value.dim() if value.dim() == 3 or isinstance(layer, _LAST) else 1
        parent = model.module.get_submodule(path.rpartition(".")[0])
        block = isinstance(parent, nn.Sequential | nn.ModuleList) and len(parent) > 1
        found[path] = Seen(path, axis, tuple(value.shape), len(calls), block)

    how = model.entries[entry]
    hooks = [
        layer.register_forward_hook(partial(note, path))
        for path, layer in model.module.named_modules()
        if path
    ]
    try:
        with inference(model.module):
            called = getattr(model.module, how.method)(*how.arguments(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    ends = [id(value) for value in tensors(called)]
    return {path: seen for path, seen in found.items() if calls[path] == 1 and id(results[path]) not in ends}


def first_tensor(output: Any) -> Tensor | None:
    """What a layer gives, or the first of several tensors."""
    return next(iter(tensors(output)), None)


def paired(
    names: Names, student: Mapping[str, Seen], teacher: Mapping[str, Seen], what: str
) -> tuple[Pair, ...]:
    """The pairs that are named, or that are found.

    Args:
        names: Student's layer -> teacher's, ``auto``, or ``none``.
        student: Its layers, by :func:`layers_seen`.
        teacher: Likewise.
        what: Name of the parameter, for messages.

    Raises:
        RecipeError: A name is none of a layer that can be watched, a pair does not fit, or nothing fits.
    """
    if names == "none":
        return ()
    if not isinstance(names, str):
        return tuple(_named(mine, theirs, student, teacher, what) for mine, theirs in names.items())
    found = _found(student, teacher)
    if not found:
        raise RecipeError(
            f"{what}: auto finds no layers of the student and the teacher with outputs of one size",
            fix=f"name them: {what}: {{student's layer: teacher's layer}}, or {what}: none",
        )
    return tuple(found)


def _named(
    mine: str, theirs: str, student: Mapping[str, Seen], teacher: Mapping[str, Seen], what: str
) -> Pair:
    for name, layers, whose in ((mine, student, "the student"), (theirs, teacher, "the teacher")):
        if name not in layers:
            raise RecipeError(
                f"{what} names '{name}', which is no layer of {whose} that is called once and gives features",
                fix=nearest(name, layers),
            )
    pair = Pair(student[mine], teacher[theirs])
    one, other = pair.student, pair.teacher
    resized = len(one.places) == len(other.places) > 0 and one.axis == other.axis == 1  # maps are pooled
    if one.places != other.places and not resized:
        raise RecipeError(
            f"{what} pairs '{mine}', which gives {one.shape}, with '{theirs}', which gives {other.shape}",
            fix="pair layers whose outputs differ in channels only",
        )
    return pair


def _found(student: Mapping[str, Seen], teacher: Mapping[str, Seen]) -> list[Pair]:
    if _same_network(student, teacher):
        student = {name: one for name, one in student.items() if _fits(one, teacher.get(name))}
        teacher = {name: teacher[name] for name in student}
    shared = {one.places for one in student.values()} & {one.places for one in teacher.values()}
    spread = {places for places in shared if any(size > 1 for size in places)} or shared  # () are vectors
    pairs: list[Pair] = []
    for places in spread:
        mine, theirs = (
            [one for one in layers.values() if one.places == places] for layers in (student, teacher)
        )
        if len(spread) > 1:
            pairs.append(Pair(mine[-1], theirs[-1]))
        else:
            pairs += _by_depth(_blocks(mine), _blocks(theirs))
    return sorted(pairs, key=lambda pair: pair.student.order)


def _same_network(student: Mapping[str, Seen], teacher: Mapping[str, Seen]) -> bool:
    """Whether the student was made of the teacher, so that layers of one name do the same."""
    common = sum(_fits(one, teacher.get(name)) for name, one in student.items())
    return common >= max(_OF_STUDENT * len(student), _OF_TEACHER * len(teacher))


def _fits(one: Seen, other: Seen | None) -> bool:
    return other is not None and one.places == other.places


def _blocks(layers: Sequence[Seen]) -> Sequence[Seen]:
    """The outermost blocks among layers of one resolution; all of them where there are none."""
    blocks = [one for one in layers if one.block]
    depth = min((one.layer.count(".") for one in blocks), default=0)
    return [one for one in blocks if one.layer.count(".") == depth] or layers


def _by_depth(mine: Sequence[Seen], theirs: Sequence[Seen]) -> list[Pair]:
    """Pairs at equal fractions of both; the last ones always."""
    count = min(_MOST, len(mine), len(theirs))

    def at(layers: Sequence[Seen], index: int) -> Seen:
        return layers[round((index + 1) * len(layers) / count) - 1]

    return [Pair(at(mine, index), at(theirs, index)) for index in range(count)]
