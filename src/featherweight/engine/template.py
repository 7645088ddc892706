"""The recipes that ``fit`` tries when none is given: ways through the methods, each with its holes open.

A way is a recipe whose steps say only what makes it that way; what else may vary is asked of the models that
reach its steps (Method.holes). The first way is the strongest default, and ways without equalization or with
plain rounding stand beside it, since neither pays everywhere: what is measured decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from featherweight.graph import trace
from featherweight.holes import parameter_of
from featherweight.method import Context
from featherweight.model import Model
from featherweight.outcome import Level
from featherweight.plugins import find_method
from featherweight.recipe import Hole, Recipe, Step
from featherweight.tools.costs import node_macs

_LINEAR = frozenset({"linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "scaled_dot_product_attention"})
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
_DOMINATES = 0.5  # share of the multiply-accumulates from which on a network is of that kind
_FEW = 64  # calibration examples of an early answer
_WIDTHS = 8  # that a supernet's are multiples of: one for every runtime, so that one supernet serves them all
_GROUP = 32  # weights of a matrix that share a scale at 4 bits


@dataclass(frozen=True)
class Shape:
    """What a network consists of, as far as it decides between ways.

    Attributes:
        linear: Share of its multiply-accumulates in matrices: transformers.
        recurrent: Whether it has recurrent layers, whose activations are quantized on the fly only.
    """

    linear: float
    recurrent: bool

    @property
    def of_matrices(self) -> bool:
        """Whether activations quantized on the fly, or weights alone, may be faster than static integers."""
        return self.recurrent or self.linear > _DOMINATES


def shape_of(model: Model) -> Shape:
    """What a network consists of."""
    linear = total = 0
    recurrent = False
    for entry in model.entries:
        graph = trace(model, entry)
        for node in graph:
            macs = node_macs(graph, node)
            total += macs
            linear += macs if node.op in _LINEAR else 0
            recurrent |= node.op in _RECURRENT
    return Shape(linear / max(total, 1), recurrent)


@dataclass(frozen=True)
class Amounts:
    """How much of everything the time allows.

    Attributes:
        samples: Calibration examples of each step.
        iterations: Of the reconstruction of each block; 0: none.
        limits: Of mixed precision; none: it has nothing to weigh against, so it is left out.
        epochs: Of fine-tuning, with the original as teacher; 0: none.
        structure: Whether there are calibration examples, by which layers can be made smaller.
        lessons: Epochs in which a student learns before anything else; 0: there is none.
        lesson: Other parameters of that training.
        teacher: Whose outputs are learned.
        elastic: Epochs of a supernet, from which a network for every budget is taken; 0: there is none.
    """

    samples: int
    iterations: int
    limits: Mapping[str, Any]
    epochs: float = 0.0
    structure: bool = False
    lessons: float = 0.0
    lesson: Mapping[str, Any] = field(default_factory=dict)
    teacher: str = "original"
    elastic: float = 0.0


def ways(level: Level, shape: Shape, amounts: Amounts) -> dict[str, Recipe]:
    """Recipes to try at a level, by name, in the order in which they are tried."""
    few = {"samples": amounts.samples}
    taught = {"teacher": amounts.teacher}
    int4 = {"weights": "int4", "activations": "none", "granularity": "per_group", "group": _GROUP, **few}
    fold, equalize, static = Step("fold"), Step("equalize", few), Step("quantize", few)
    dynamic = Step("quantize", {"activations": "dynamic", **few})
    alone = Step("quantize", {"activations": "none", **few})
    gptq = Step("rounding", {"how": "gptq", **few})
    blocks = Step("rounding", {"how": "blocks", "iterations": amounts.iterations, **few})
    mixed = Step("mixed_precision", {**amounts.limits, **few})
    prune, shrink, factorize = Step("prune", few), Step("shrink", few), Step("factorize", few)
    tuned = Step("finetune", {"epochs": amounts.epochs, **taught})  # longer where it pays: pursuit.py
    again = (tuned,) if amounts.epochs else ()
    supernet = Step("supernet", {"epochs": amounts.elastic, "round_to": _WIDTHS, **taught})
    integers = (fold, dynamic, gptq) if shape.of_matrices else (fold, equalize, static, gptq)
    found: dict[str, tuple[Step, ...]] = {
        "nearest": (fold, static, Step("correct_bias", few)),
        HALVES: (fold, Step("cast")),
        "gptq": (fold, equalize, static, gptq),
        "gptq, not equalized": (fold, static, gptq),
        "blocks": (fold, equalize, static, blocks),
        "mixed": (fold, equalize, mixed, gptq),
        "dynamic": (fold, dynamic, gptq),
        "dynamic, nearest": (fold, dynamic),
        "weights": (fold, alone, gptq),
        "weights, nearest": (fold, alone),
        "weights, 4 bits": (fold, Step("quantize", int4), gptq),
        "pruned": (prune, *again, *integers),
        "shrunk": (shrink, *again, *integers),
        "shrunk and pruned": (shrink, prune, *again, *integers),
        "factorized": (factorize, *again, *integers),
        "subnet": (supernet, Step("subnet", few), *again, *integers),
        "tuned": (fold, static, tuned),
        "tuned, 4 bits": (fold, Step("quantize", int4), tuned),
        "sparse": (fold, Step("sparsify", {"schedule": "cubic"}), tuned, static),
    }
    lesson = {"epochs": amounts.lessons, **amounts.lesson, **taught}
    lessons = (Step("finetune", lesson),) if amounts.lessons else ()
    return {name: Recipe((*lessons, *found[name])) for name in _order(level, shape, amounts)}


EARLY = "plain"  # the way that is there before all others
HALVES = "halves"  # loses next to nothing: the answer where integers lose too much


def early(shape: Shape) -> Recipe:
    """Integers as quickly as the runtimes' own quantizers make them: an answer to begin with."""
    how = {"activations": "dynamic"} if shape.of_matrices else {}
    return Recipe((Step("fold"), Step("quantize", {**how, "samples": _FEW})))


_ON_MATRICES = (
    "dynamic, nearest",
    "weights, nearest",
    "dynamic",
    "weights, 4 bits",
    "weights",
    "tuned, 4 bits",
)
_SMALLER = ("shrunk and pruned", "pruned", "shrunk", "factorized")  # ways that change the network's shapes
_TUNED = ("tuned", "tuned, 4 bits", "sparse")


def _order(level: Level, shape: Shape, amounts: Amounts) -> list[str]:
    """The ways of a level for which the network, the data and the time have what they need."""
    smaller = sorted(_SMALLER, key="factorized".__ne__) if shape.of_matrices else [*_SMALLER]
    if level == "quick":
        order = ["nearest", "dynamic, nearest", "weights, nearest", HALVES]
    elif level == "standard":
        order = ["gptq", "dynamic", "weights, 4 bits", "weights", HALVES, "gptq, not equalized"]
        order += [*(smaller[:3] if amounts.epochs else ()), "blocks", "nearest"]
    else:
        order = [
            "gptq",
            "dynamic",
            "weights, 4 bits",
            "weights",
            "halves",
            *smaller,
            "subnet",
            "tuned",
            "tuned, 4 bits",
        ]
        order += ["blocks", "mixed", "gptq, not equalized", "nearest", "sparse"]
    left_out = {
        *(() if shape.of_matrices else _ON_MATRICES),
        *(() if amounts.structure else _SMALLER),
        *(() if amounts.epochs else _TUNED),
        *(() if amounts.elastic else ("subnet",)),
        *(() if amounts.limits else ("mixed",)),
        *(() if amounts.iterations else ("blocks",)),
    }
    order = [name for name in order if name not in left_out]
    if shape.recurrent:  # static integers leave recurrent layers as they are
        order.sort(key=lambda name: not name.startswith("dynamic"))
    return order


def step_holes(step: Step, model: Model, context: Context) -> dict[str, Hole]:
    """What the search may vary of a step on the model that reaches it, but for what the step says itself."""
    holes: Mapping[str, Hole] = find_method(step.method).holes(model, context)
    said = set(step.parameters)
    return {**{name: hole for name, hole in holes.items() if parameter_of(name) not in said}, **step.holes()}
