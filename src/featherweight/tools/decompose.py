"""What forms of a network's layers lose on calibration examples, and the factors that lose least.

Layers are solved in the order of execution. Behind layers that are products already, a layer reads x̂ instead
of x, and its product is that of the best weights there (asymmetric reconstruction, Zhang et al. 2016,
arXiv:1505.06798)::

    E || W x - A B x̂ ||²  =  tr (T - A B) H (T - A B)ᵀ + const,   H = E[x̂ x̂ᵀ],   T = W + W E[(x - x̂) x̂ᵀ] H⁻¹

with the ridge of H at which each half of the examples is told best by the other, and T = W where none helps.
Where a layer has a bias, all moments are about their means and the bias takes the mean error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.graph import Graph, Node, trace
from featherweight.method import Progress, Scratch, Silent, in_memory
from featherweight.model import Model
from featherweight.tools.columns import Moments, Statistics, joined, pieces
from featherweight.tools.factors import Candidate
from featherweight.tools.forms import Form, Product, Way, whole
from featherweight.tools.gptq import following
from featherweight.tools.walk import Stop, Stream, steps, walk

_COLUMNS = 8192  # of a layer's inputs that are looked at, or
_PER_INPUT = 4  # this many for each value that a filter reads
_SILENT = Silent()


@dataclass(frozen=True)
class Examples:
    """What layers are seen on.

    Attributes:
        batches: Flat inputs; none: weights alone count.
        damping: Ridge of the second moments, as a share of the mean of their diagonal.
        follow: Whether layers make up for what the layers before them lost.
        seed: Of the columns that are looked at, where there are very many.
        progress: Where it says how far it is.
        scratch: Where values live.
    """

    batches: Sequence[tuple[Tensor, ...]]
    damping: float = 0.01
    follow: bool = True
    seed: int = 0
    progress: Progress = _SILENT
    scratch: Scratch = in_memory


@dataclass(frozen=True)
class Solution:
    """The values of a layer's parts.

    Attributes:
        factors: The first part's first.
        bias: Of the last part, where the layer has one.
    """

    factors: tuple[Tensor, ...]
    bias: Tensor | None


def losses(
    model: Model,
    asked: Mapping[str, Mapping[Way, Sequence[int]]],
    candidates: Sequence[Candidate],
    examples: Examples,
) -> dict[str, dict[Form, float]]:
    """Share of each layer's output energy that its forms lose, in the network as it is.

    Args:
        model: Without formats.
        asked: Layer -> way -> ranks.
        candidates: The layers.
        examples: What they are seen on.
    """
    found: dict[str, dict[Form, float]] = {}
    for candidate, product in examples.progress.track(
        _products(model, candidates, examples), "layers as products", len(candidates)
    ):
        ways = asked[candidate.path]
        found[candidate.path] = {
            form: loss for way, ranks in ways.items() for form, loss in product.losses(way, ranks).items()
        }
    return {candidate.path: found[candidate.path] for candidate in candidates}


def _products(
    model: Model, candidates: Sequence[Candidate], examples: Examples
) -> Iterator[tuple[Candidate, Product]]:
    """Each layer with the moments of all of its calls, as soon as the last one is reached."""
    if not examples.batches:
        for candidate in candidates:
            yield candidate, _plain(model, candidate)
        return
    for entry in model.entries:
        last = {one.calls[-1].name: one for one in candidates if one.entry == entry}
        owners = {node.name: one for one in last.values() for node in one.calls}
        seen: dict[str, Moments] = {}
        for node, stream in steps(model, examples.batches, examples.scratch, entry) if last else ():
            if node.name not in owners:
                continue
            owner = owners[node.name]
            moments = seen.setdefault(owner.path, _moments(owner))
            _look([moments], owner, node, stream, stream, node, examples)
            if node.name in last:
                statistics = seen.pop(owner.path).statistics(_centred(node))
                yield owner, _product(_weight(model, owner), statistics, examples.damping)


def solve(
    model: Model, forms: Mapping[str, Form], candidates: Sequence[Candidate], examples: Examples
) -> dict[str, Solution]:
    """The factors of layers in the forms that were chosen.

    Args:
        model: Without formats.
        forms: Layer -> its form.
        candidates: The layers; those without a form stay as they are.
        examples: What they are seen on.
    """
    chosen = [one for one in candidates if one.path in forms]
    if not examples.batches:
        return {
            one.path: _solved(one, forms[one.path], _plain(model, one), _bias(model, one)) for one in chosen
        }
    found: dict[str, Solution] = {}
    several = [one for one in chosen if len(one.calls) > 1 or not examples.follow]
    track = examples.progress.track
    for one, product in track(_products(model, several, examples), "solving layers", len(several)):
        found[one.path] = _solved(one, forms[one.path], product, _bias(model, one))
    if not examples.follow:
        return found
    for entry in model.entries:
        mine = {one.calls[0].name: one for one in chosen if one.entry == entry}
        if not mine:
            continue
        stops = walk(model, model, examples.batches, examples.scratch, entry)
        for stop in track(stops, "solving layers", len(trace(model, entry).nodes)):
            if stop.node.name not in mine:
                continue
            one = mine[stop.node.name]
            if one.path not in found:
                found[one.path] = _followed(stop, one, forms[one.path], examples)
            stop.stored.set_parameter(one.weight, _rebuilt(found[one.path], forms[one.path], one))
            bias = found[one.path].bias
            if bias is not None:
                stop.stored.set_parameter(f"{one.path}.bias", bias.float())
    return found


def _followed(stop: Stop, one: Candidate, form: Form, examples: Examples) -> Solution:
    """A layer's factors behind those of the layers before it."""
    halves, centred = (_moments(one), _moments(one)), _centred(stop.node)
    _look(halves, one, stop.node, stop.exact, stop.stored, stop.twin, examples)
    parts = [half.statistics(centred) for half in halves if half.positions]
    seen = parts[0] if len(parts) == 1 else joined(parts[0], parts[1], centred)
    weight = stop.exact.parameter(one.weight).detach().double()
    best = following(weight.flatten(1)[None], parts, seen)[0].reshape(weight.shape)
    factors = _product(best, seen, examples.damping).factors(form)
    if not centred:
        return Solution(factors, None)
    stored = whole(form, factors, one.shape).flatten(1)
    gap = weight.flatten(1) @ seen.float_mean[0] - stored @ seen.mean[0]
    return Solution(factors, stop.exact.parameter(f"{one.path}.bias").detach().double() + gap)


def _rebuilt(solution: Solution, form: Form, one: Candidate) -> Tensor:
    return whole(form, solution.factors, one.shape).float()


def _solved(one: Candidate, form: Form, product: Product, bias: Tensor | None) -> Solution:
    factors = product.factors(form)
    if bias is None or product.mean is None:
        return Solution(factors, bias)
    gap = (product.weight - whole(form, factors, one.shape)).flatten(1) @ product.mean
    return Solution(factors, bias + gap)


def _weight(model: Model, one: Candidate) -> Tensor:
    return model.module.get_parameter(one.weight).detach().double()


def _bias(model: Model, one: Candidate) -> Tensor | None:
    bias = dict(model.module.get_submodule(one.path).named_parameters()).get("bias")
    return None if bias is None else bias.detach().double()


def _plain(model: Model, one: Candidate) -> Product:
    """A layer whose inputs are not known: each counts alike."""
    weight = _weight(model, one)
    return Product(weight, torch.eye(math.prod(one.shape[1:]), dtype=torch.float64))


def _product(weight: Tensor, seen: Statistics, damping: float) -> Product:
    gram = seen.second[0]
    ridge = damping * gram.diagonal().mean() + 1e-30
    return Product(weight, gram + ridge * torch.eye(len(gram), dtype=torch.float64), seen.mean[0])


def _centred(node: Node) -> bool:
    return "bias" in node.parameters


def _moments(one: Candidate) -> Moments:
    return Moments(1, math.prod(one.shape[1:]))


def _look(
    parts: Sequence[Moments],
    one: Candidate,
    node: Node,
    exact: Stream,
    stored: Stream,
    twin: Node,
    examples: Examples,
) -> None:
    """Add what a call reads in both networks; of two parts each gets every second example."""
    size = math.prod(one.shape[1:])
    rows = sum(stored.value(node.inputs[0], batch).shape[0] for batch in range(stored.count))
    total = rows * _positions(stored.graph, node) // stored.graph.values[node.inputs[0]].shape[0]
    share = max(_COLUMNS, _PER_INPUT * size) / max(total, 1)
    for batch in range(stored.count):
        values = [stored.value(node.inputs[0], batch)]
        if exact is not stored:
            values.insert(0, exact.value(twin.inputs[0], batch))
        for place, moments in enumerate(parts):
            some = [value[(batch + place) % len(parts) :: len(parts)] for value in values]
            if not len(some[0]):
                continue
            for columns in pieces(node, one.shape, *some, share=share, seed=examples.seed + batch):
                moments.add(columns[0], columns[-1])


def _positions(graph: Graph, node: Node) -> int:
    shape = graph.values[node.outputs[0]].shape
    axis = len(shape) - 1 if node.op == "linear" else 1
    return math.prod(shape) // max(shape[axis], 1)
