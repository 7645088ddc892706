"""Whether two networks take the same inputs and give outputs of the same shape: a teacher, a student."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.errors import FeatherweightError, RecipeError
from featherweight.model import Entry, Model


def check_alike(
    model: Model, other: Model, *, role: str, than: str = "the original", entry: str = "forward"
) -> tuple[Tensor, ...]:
    """See that ``other`` can stand where ``model`` stands.

    Args:
        model: Whose example inputs and outputs count.
        other: What is called with them.
        role: What the other one is, as the user knows it: "the teacher", "the student".
        than: What the model is.
        entry: Which way of calling both.

    Returns:
        Outputs of ``other`` on the example inputs of ``model``, three examples where the batch is open.

    Raises:
        RecipeError: It takes other inputs, or its outputs differ in number, shape or type.
    """
    if entry not in other.entries:
        raise RecipeError(
            f"{role} has no entry '{entry}' ({', '.join(other.entries)}), and {than} is called so",
            fix="give a network that is called in the same way",
        )
    how, own = model.entries[entry], other.entries[entry]
    inputs = _examples(how)
    if len(own.example_inputs) != len(inputs):
        raise _differs(role, than, "takes", own.example_inputs, inputs)
    wanted = _call(model, how, inputs)
    try:
        given = _call(other, own, inputs)
    except FeatherweightError:
        raise
    except Exception as error:  # a user's network may raise anything
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise RecipeError(
            f"{role} does not take the inputs of {than}, {told(inputs)}: {type(error).__name__}: {first}",
            fix=f"give a network for the same inputs as {than}",
        ) from error
    same = [(one.shape, one.dtype) for one in given] == [(one.shape, one.dtype) for one in wanted]
    if not same:
        raise _differs(role, than, "gives", given, wanted)
    if not all(bool(torch.isfinite(one).all()) for one in given if one.is_floating_point()):
        raise RecipeError(
            f"the outputs of {role} are NaN or infinite on the first examples", fix="check its weights"
        )
    return given


@contextlib.contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """In inference mode without gradients; afterwards every layer is in its own mode again."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for layer, training in modes:
            layer.training = training


def _examples(entry: Entry) -> tuple[Tensor, ...]:
    """The entry's inputs, one example more than those where every batch is open."""
    inputs = entry.example_inputs
    if all(0 in entry.dynamic_axes.get(name, {}) for name in entry.input_names):
        return tuple(torch.cat([value, value[:1]]) for value in inputs)
    return inputs


def _call(model: Model, entry: Entry, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with inference(model.module):
        called = getattr(model.module, entry.method)(*entry.arguments(inputs))
    return tensors(called)


def tensors(called: object) -> tuple[Tensor, ...]:
    """The flat outputs of a call."""
    return tuple(leaf for leaf in pytree.tree_leaves(called) if isinstance(leaf, Tensor))


def _differs(
    role: str, than: str, verb: str, given: tuple[Tensor, ...], wanted: tuple[Tensor, ...]
) -> RecipeError:
    return RecipeError(
        f"{role} {verb} {told(given)}, and {than} {verb} {told(wanted)}",
        fix=f"give a network that {verb} what {than} does",
    )


def told(values: tuple[Tensor, ...]) -> str:
    """Types and shapes in words, for three examples: 'float32 (3, 10)'."""
    return " and ".join(f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}" for value in values)
