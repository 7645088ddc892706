"""Cutting: channels of groups removed from a model, as edits, with a proof that the module follows.

Removing indices from tensors is easy; sizes also stand in the settings of layers and in code. In this order:

1. tensors are cut and torch.nn's layers get their new sizes;
2. numbers that the user's code keeps (``self.heads``) get the new size;
3. the code becomes data whose sizes can be changed (``unrolled.py``).

The first that runs, gives on the example inputs what the traced calls with new sizes give, and has the
predicted shape of every traced value, is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.errors import LoadError, RecipeError
from featherweight.graph import Graph, trace
from featherweight.model import Edit, Model, Unroll, make_edit
from featherweight.tools.cut_layers import Calls, guesses, settings
from featherweight.tools.cut_literals import MisfitError, Refit
from featherweight.tools.cut_plan import Plan, check_not_emptied, make_plan
from featherweight.tools.cut_program import unrolling
from featherweight.tools.groups import Channels
from featherweight.unrolled import Unrolled

_Way = Literal["layers", "numbers", "nearest numbers", "program"]  # in which the code follows
_CLOSE = 1e-3  # of the largest output; sums in another order differ by less


def cut(model: Model, channels: Channels, drop: Mapping[str, Sequence[int]]) -> Model:
    """The model without channels.

    Args:
        model: A model without formats.
        channels: Its channel groups.
        drop: Group -> its channels that go.

    Raises:
        RecipeError: No such channel, a group would lose its last one, an output would change its shape, the
            model has formats already, or its code cannot follow.
    """
    attempt = _attempt(model, channels, drop)
    return model if attempt is None else attempt.best()[0]


class Cutter:
    """Cuts one model many times; how its code follows is found and proven with the first cut.

    Proving takes a trace of what was made, which is most of a cut's time. Later cuts go the way that was
    proven, and are only run on the example inputs; where that fails, they are proven as the first one.

    Args:
        model: A model without formats.
        channels: Its channel groups.
    """

    def __init__(self, model: Model, channels: Channels) -> None:
        self._model, self._channels = model, channels
        self._way: _Way | None = None

    def cut(self, drop: Mapping[str, Sequence[int]]) -> Model:
        """As :func:`cut`."""
        attempt = _attempt(self._model, self._channels, drop)
        if attempt is None:
            return self._model
        made = None if self._way is None else attempt.by(self._way)
        if made is None:
            made, self._way = attempt.best()
        return made


def _attempt(model: Model, channels: Channels, drop: Mapping[str, Sequence[int]]) -> _Attempt | None:
    """What is to be done; None: nothing."""
    drop = {name: sorted(set(gone)) for name, gone in drop.items() if len(gone)}
    if model.formats:
        raise RecipeError(
            "channels cannot be removed from a model with formats",
            fix="put structure steps (prune, shrink, factorize) before format steps in the recipe",
        )
    if not drop:
        return None
    plan = make_plan(channels, drop)
    check_not_emptied(plan, model.module)
    graphs = {entry: trace(model, entry) for entry in model.entries}
    _check_interface(plan, graphs)
    try:
        calls: Calls = {entry: Refit(graph, entry, plan).calls() for entry, graph in graphs.items()}
    except MisfitError as error:
        raise _cannot(error.node or error.layer, error.why) from error
    return _Attempt(model, plan, graphs, calls)


def _cannot(where: str, why: str) -> RecipeError:
    return RecipeError(
        f"channels cannot be removed: {why}",
        where=f"'{where}'",
        fix="exclude the layer under where, or write its sizes as sizes of its inputs",
    )


def _check_interface(plan: Plan, graphs: Mapping[str, Graph]) -> None:
    for entry, graph in graphs.items():
        for word, names in (("output", graph.outputs), ("input", graph.inputs)):
            for name in names:
                if any(plan.of(entry, name).values()):
                    raise RecipeError(f"an {word} of the network would change its shape", where=f"'{name}'")


@dataclass
class _Attempt:
    model: Model
    plan: Plan
    graphs: Mapping[str, Graph]
    calls: Calls

    def best(self) -> tuple[Model, _Way]:
        """The first way that works, and which one that is."""
        unroll, why = self._unrolling()
        wanted = None
        last = None
        if unroll is not None:
            last = self._made((unroll,))
            wanted = _outputs(last)
        for way, edits in self._ways():
            made = self._try(edits, wanted)
            if made is not None:
                return made, way
        if last is None:
            raise _cannot(self._first_layer(), why)
        fault = self._fault(last)
        if fault:
            raise _cannot(*fault)
        return last, "program"

    def by(self, way: _Way) -> Model | None:
        """The model made in one way, if it runs and makes outputs of the same shapes."""
        if way == "program":
            unroll, _ = self._unrolling()
            edits: tuple[Edit, ...] | None = None if unroll is None else (unroll,)
        else:
            edits = dict(self._ways()).get(way)
        ran = None if edits is None else self._ran(edits)
        if ran is None:
            return None
        wanted = [graph.values[name].shape for graph in self.graphs.values() for name in graph.outputs]
        found = [tuple(one.shape) for one in ran[1] if isinstance(one, Tensor)]
        return ran[0] if found == wanted else None

    def _unrolling(self) -> tuple[Unroll | None, str]:
        try:
            return unrolling(self.model, self.graphs, self.calls), ""
        except MisfitError as error:
            return None, f"sizes are written into the code, and {error.why}"

    def _ways(self) -> Iterator[tuple[_Way, tuple[Edit, ...]]]:
        """Ways in which the module stays itself, with the edits of the user's code that each takes."""
        tensors = dict(self.model.module.named_parameters()) | dict(self.model.module.named_buffers())
        if isinstance(self.model.module, Unrolled) or any(name not in tensors for name in self.plan.tensors):
            return  # a tensor that only the code knows
        yield "layers", ()
        before: tuple[Edit, ...] = ()
        ways: tuple[tuple[_Way, bool], ...] = (("numbers", False), ("nearest numbers", True))
        for way, nearest in ways:
            found = tuple(guesses(self.model.module, self.graphs, self.calls, nearest))
            if found and found != before:
                yield way, found
            before = found

    def _made(self, first: tuple[Edit, ...]) -> Model:
        """The model with these edits, then cut."""
        module = self.model.copy_module()
        edits: list[Edit] = []

        def edit(one: Edit) -> None:
            nonlocal module
            module = make_edit(module, one)
            edits.append(one)

        for one in first:
            edit(one)
            if isinstance(one, Unroll):
                self._fill(module, one)
        for one in self.plan.cuts:
            edit(one)
        for one in settings(module, self.graphs, self.calls):
            edit(one)
        return self.model.evolve(module=module, edits=tuple(edits))

    def _fill(self, module: nn.Module, unroll: Unroll) -> None:
        for graph in self.graphs.values():
            for name in unroll.constants:
                if name in graph.program.constants:
                    module.get_buffer(name).copy_(graph.program.constants[name].detach())

    def _try(self, edits: tuple[Edit, ...], wanted: list[Any] | None) -> Model | None:
        ran = self._ran(edits)
        if ran is None or (wanted is not None and not _same(ran[1], wanted)):
            return None
        return None if self._fault(ran[0]) else ran[0]

    def _ran(self, edits: tuple[Edit, ...]) -> tuple[Model, list[Any]] | None:
        """The model and what it makes of the example inputs; None where it does not run."""
        try:
            made = self._made(edits)
            return made, _outputs(made)
        except Exception:  # noqa: BLE001 - the user's code raises whatever it likes when sizes do not fit
            return None

    def _fault(self, made: Model) -> tuple[str, str] | None:
        """Where a traced value has another shape than predicted, and what is wrong."""
        for entry, graph in self.graphs.items():
            try:
                after = trace(made, entry)
            except LoadError as error:
                return self._first_layer(), str(error.what)
            for name, value in after.values.items():
                if name not in graph.values or _own_state(graph, made.module, name):
                    continue
                wanted = self.plan.shape(entry, graph, name)
                if value.shape != wanted:
                    return name, f"it has the shape {value.shape} where {wanted} is needed"
        return None

    def _first_layer(self) -> str:
        return next(iter(self.plan.tensors), "")


def _own_state(graph: Graph, module: nn.Module, name: str) -> bool:
    """Whether a recurrent layer made it for itself, as zeros to begin with."""
    node = graph.producer.get(name)
    return (
        node is not None and node.op == "zeros" and isinstance(module.get_submodule(node.layer), nn.RNNBase)
    )


def _outputs(model: Model) -> list[Any]:
    """What every entry makes of the example inputs, in inference mode."""
    modes = [(layer, layer.training) for layer in model.module.modules()]
    model.module.eval()
    try:
        with torch.no_grad():
            return [
                leaf
                for entry in model.entries.values()
                for leaf in pytree.tree_leaves(
                    getattr(model.module, entry.method)(
                        *entry.arguments(tuple(one.clone() for one in entry.example_inputs))
                    )
                )
            ]
    finally:
        for layer, training in modes:
            layer.training = training


def same_outputs(one: Model, other: Model, close: float = _CLOSE) -> bool:
    """Whether two models make the same of their example inputs, up to a share of the largest output."""
    return _same(_outputs(one), _outputs(other), close)


def _same(found: list[Any], wanted: list[Any], close: float = _CLOSE) -> bool:
    """Whether outputs agree; whole numbers may hang on ties and count by their shape."""
    tensors = [[one for one in side if isinstance(one, Tensor)] for side in (found, wanted)]
    if len(tensors[0]) != len(tensors[1]):
        return False
    for one, other in zip(*tensors, strict=True):
        if one.shape != other.shape:
            return False
        if one.is_floating_point():
            a, b = (side.double().nan_to_num(0.0, 0.0, 0.0) for side in (one, other))
            scale = float(b.abs().max()) if b.numel() else 0.0
            if a.numel() and float((a - b).abs().max()) > close * max(scale, 1e-6):
                return False
    return True


def cuttable(model: Model, channels: Channels) -> Channels:
    """The groups that the module can follow; the others are fixed, with the reason.

    Every call that a group touches is refitted and tried without data, so it takes seconds at most.
    """
    graphs = {entry: trace(model, entry) for entry in model.entries}
    fixed = dict(channels.fixed)
    groups = {}
    for name, group in channels.groups.items():
        last = [group.size - 1]
        why = _why_not(channels, {name: last}, graphs) if group.size > 1 else "it has one channel only"
        if why is None:
            groups[name] = group
        else:
            for layer in dict.fromkeys(member.layer for member in group.of("writes")):
                fixed.setdefault(layer, why)
    return replace(channels, groups=groups, fixed=fixed)


def why_not(model: Model, channels: Channels, drop: Mapping[str, Sequence[int]]) -> str | None:
    """Why these channels cannot go; None: nothing is known against it."""
    return _why_not(channels, drop, {entry: trace(model, entry) for entry in model.entries})


def _why_not(
    channels: Channels, drop: Mapping[str, Sequence[int]], graphs: Mapping[str, Graph]
) -> str | None:
    try:
        plan = make_plan(channels, drop)
        _check_interface(plan, graphs)
        for entry, graph in graphs.items():
            Refit(graph, entry, plan).calls()
    except MisfitError as error:
        return f"{error.node or error.layer}: {error.why}"
    except RecipeError as error:
        return error.what
    return None
