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
from typing import Any

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
    drop = {name: sorted(set(gone)) for name, gone in drop.items() if len(gone)}
    if model.formats:
        raise RecipeError(
            "channels cannot be removed from a model with formats",
            fix="put structure steps (prune, shrink, factorize) before format steps in the recipe",
        )
    if not drop:
        return model
    plan = make_plan(channels, drop)
    check_not_emptied(plan, model.module)
    graphs = {entry: trace(model, entry) for entry in model.entries}
    _check_interface(plan, graphs)
    try:
        calls: Calls = {entry: Refit(graph, entry, plan).calls() for entry, graph in graphs.items()}
    except MisfitError as error:
        raise _cannot(error.node or error.layer, error.why) from error
    return _Attempt(model, plan, graphs, calls).best()


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

    def best(self) -> Model:
        """The first way that works."""
        unroll, why = self._unrolling()
        wanted = None
        last = None
        if unroll is not None:
            last = self._made((unroll,))
            wanted = _outputs(last)
        if isinstance(self.model.module, Unrolled):
            ways: Iterator[tuple[Edit, ...]] = iter(())
        else:
            ways = self._ways()
        for way in ways:
            made = self._try(way, wanted)
            if made is not None:
                return made
        if last is None:
            raise _cannot(self._first_layer(), why)
        fault = self._fault(last)
        if fault:
            raise _cannot(*fault)
        return last

    def _unrolling(self) -> tuple[Unroll | None, str]:
        try:
            return unrolling(self.model, self.graphs, self.calls), ""
        except MisfitError as error:
            return None, f"sizes are written into the code, and {error.why}"

    def _ways(self) -> Iterator[tuple[Edit, ...]]:
        tensors = dict(self.model.module.named_parameters()) | dict(self.model.module.named_buffers())
        if any(name not in tensors for name in self.plan.tensors):
            return  # a tensor that only the code knows
        yield ()
        before: tuple[Edit, ...] = ()
        for nearest in (False, True):
            found = tuple(guesses(self.model.module, self.graphs, self.calls, nearest))
            if found and found != before:
                yield found
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

    def _try(self, way: tuple[Edit, ...], wanted: list[Any] | None) -> Model | None:
        try:
            made = self._made(way)
            found = _outputs(made)
        except Exception:  # noqa: BLE001 - the user's code raises whatever it likes when sizes do not fit
            return None
        if wanted is not None and not _same(found, wanted):
            return None
        return None if self._fault(made) else made

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


def _same(found: list[Any], wanted: list[Any]) -> bool:
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
            if a.numel() and float((a - b).abs().max()) > _CLOSE * max(scale, 1e-6):
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
        why = _why_not(channels, name, graphs)
        if why is None:
            groups[name] = group
        else:
            for layer in dict.fromkeys(member.layer for member in group.of("writes")):
                fixed.setdefault(layer, why)
    return replace(channels, groups=groups, fixed=fixed)


def _why_not(channels: Channels, name: str, graphs: Mapping[str, Graph]) -> str | None:
    if channels.groups[name].size < 2:
        return "it has one channel only"
    try:
        plan = make_plan(channels, {name: [channels.groups[name].size - 1]})
        _check_interface(plan, graphs)
        for entry, graph in graphs.items():
            Refit(graph, entry, plan).calls()
    except MisfitError as error:
        return f"{error.node or error.layer}: {error.why}"
    except RecipeError as error:
        return error.what
    return None
