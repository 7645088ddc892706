"""What a runtime has no integer kernels for, and what it offers instead, in the words of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import get_args

from featherweight.errors import RecipeError, TargetError
from featherweight.graph import Graph
from featherweight.method import Supports
from featherweight.tools.integers import Shared, Weights, activation_draft, weight_draft, weights_of

_NAMED = 4  # layers that a note names
_WEIGHTS = tuple(kind for kind in get_args(Weights) if kind != "none")


def stay_float(refused: Mapping[str, str], runtime: str, asked: str) -> str:
    """A note of layers that were to become integers.

    Args:
        refused: Layer -> its operator.
        runtime: Its name.
        asked: The formats, in words.
    """
    names = ", ".join(list(refused)[:_NAMED]) + (", ..." if len(refused) > _NAMED else "")
    kinds = ", ".join(sorted(set(refused.values())))
    count = "1 layer stays" if len(refused) == 1 else f"{len(refused)} layers stay"
    return f"{count} float, since {runtime} has no kernel of {kinds} for {asked}: {names}"


def nothing(
    graphs: Iterable[Graph], refused: Mapping[str, str], supports: Supports, runtime: str, asked: str
) -> RecipeError:
    """The error where no layer at all becomes integers; arguments as above."""
    if not refused:
        return RecipeError(
            f"quantize found no layer to quantize for {runtime}",
            fix="check where: it excludes every layer that the runtime has integer kernels for",
        )
    return RecipeError(
        f"quantize found no layer that {runtime} takes as asked: {asked}",
        fix=f"{runtime} stores here {_offers(graphs, supports) or 'no integers at all'}; "
        "runtime torch simulates everything",
    )


def _offers(graphs: Iterable[Graph], supports: Supports) -> str:
    """What the runtime stores of these layers."""
    ops = sorted({node.op for graph in graphs for node in graph if weights_of(node, graph)})
    found: dict[str, list[str]] = {}
    for shared in get_args(Shared):
        for kind in _WEIGHTS:
            weight = weight_draft(kind, True, shared, 32)
            assert weight is not None
            try:
                supports.realise(weight, "weight")
            except TargetError:
                continue
            for activations in ("int8", "dynamic", "none"):
                read = activation_draft(activations, False)
                if any(supports(op, weight, read) for op in ops):
                    found.setdefault(activations, []).append(f"{kind} {shared}")
    return "; ".join(f"weights {', '.join(kinds)} with activations {read}" for read, kinds in found.items())
