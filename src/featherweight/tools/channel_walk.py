"""One walk over the program of an entry that gives every axis of every tensor its labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from featherweight.graph import Graph
from featherweight.tools.channel_labels import Axis, Labels
from featherweight.tools.groups import Role

_LAYERS = frozenset({"linear", "embedding", "layer_norm", "conv1d", "conv2d", "scaled_dot_product_attention"})
Axes = list[Axis]
Made = Axes | tuple[Axes, ...]  # of a tensor, or of several
Rule = Callable[["Walk", fx.Node], Made]


@dataclass(frozen=True)
class Use:
    """The first call that used an axis of a parameter, and what for; ``order`` counts them all."""

    order: int
    role: Role
    node: str


@dataclass
class Tensors:
    """Parameters and buffers of a module: the same in all entries.

    Attributes:
        known: Those that can be cut; other constants of a program keep their size.
        axes: Labels of each axis; None for one that no rule asked for yet.
        uses: What an axis was used for.
        written: What layers made: (path, axis).
        kinds: Axes whose labels are of another kind than plain channels.
    """

    known: frozenset[str]
    axes: dict[str, list[Axis | None]] = field(default_factory=dict)
    uses: dict[tuple[str, int], Use] = field(default_factory=dict)
    written: list[tuple[str, Axis]] = field(default_factory=list)
    kinds: list[tuple[str, Axis]] = field(default_factory=list)


class Walk:
    """What rules see of a program.

    Args:
        graph: Of one entry.
        labels: Of the model.
        tensors: Of the model.
        rules: By operator.
    """

    def __init__(self, graph: Graph, labels: Labels, tensors: Tensors, rules: Mapping[str, Rule]) -> None:
        self.graph, self.labels, self.tensors = graph, labels, tensors
        self.made: dict[str, Made] = {}
        self._rules = rules
        self._current = self._fx_name = ""
        self._calls = {node.fx_name: node for node in graph.nodes}
        self._sources: dict[str, frozenset[str]] = {}  # value computed of parameters alone -> those
        self._requests: list[tuple[frozenset[str], Axis, Use]] = []

    def run(self) -> None:
        """Label everything; outputs stay as they are."""
        program = self.graph.program.graph_module.graph
        for node in program.nodes:
            if node.op == "placeholder":
                if node.name not in self.graph.parameters:
                    self.made[node.name] = self._input(node)
            elif node.op == "get_attr":
                self.made[node.name] = self.plain(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self.labels.why = "it is an output of the network"
                for item in node.all_input_nodes:
                    self.keep(item)
        self._settle_requests()

    def _input(self, node: fx.Node) -> Axes:
        """Whoever is fixed by an input is told so."""
        if not _tensors_of(node.meta.get("val")):
            return []
        one = self.labels.kept("it meets an input of the network")
        return [one.repeat(size) for size in self.shape(node)]

    def _call(self, node: fx.Node) -> None:
        if not _tensors_of(node.meta.get("val")):
            return
        self._current, self._fx_name = self.name(node), node.name
        op = operator_of(node)
        self.labels.why = f"'{op}' at '{self.name(node)}' has something of a fixed size there"
        rule = self._rules.get(op)
        if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rule = self._rules["pointwise"]
        if rule is None and not any(_tensors_of(read.meta.get("val")) for read in node.all_input_nodes):
            rule = self._rules["factory"]
        self.made[node.name] = self.unknown(node) if rule is None else rule(self, node)
        self._check(node)
        reads = [read for read in node.all_input_nodes if _tensors_of(read.meta.get("val"))]
        sources = [self.sources(read) for read in reads]
        if sources and all(sources) and op not in _LAYERS:
            self._sources[node.name] = frozenset().union(*sources)

    def _check(self, node: fx.Node) -> None:
        made, seen = self.made[node.name], node.meta["val"]
        pairs = zip(made, seen, strict=True) if isinstance(made, tuple) else [(made, seen)]
        for axes, value in pairs:
            if isinstance(value, Tensor) and tuple(map(len, axes)) != sizes(value):
                raise AssertionError(f"{node.name}: labels {list(map(len, axes))} of {sizes(value)}")

    # ---- for rules

    def name(self, node: fx.Node) -> str:
        """How users know a call."""
        call = self._calls.get(node.name)
        return node.name if call is None else call.name

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes at the example inputs."""
        return sizes(node.meta["val"])

    def plain(self, node: fx.Node) -> Axes:
        """Nothing of it can be removed."""
        return [np.zeros(size, np.int64) for size in self.shape(node)]

    def read(self, node: fx.Node) -> Axes:
        """Labels of a tensor that an operator reads."""
        name = self.graph.parameters.get(node.name)
        if name is None:
            made = self.made[node.name]
            assert isinstance(made, list)
            return made
        if name not in self.tensors.known:
            return self.plain(node)
        shape = self.shape(node)
        axes = self.tensors.axes.setdefault(name, [None] * len(shape))
        found: Axes = []
        for place, (axis, size) in enumerate(zip(axes, shape, strict=True)):
            one = self.labels.fresh(size) if axis is None else axis
            axes[place] = one
            found.append(one)
            self._use(name, place, "carries", node)
        return found

    def use(self, node: fx.Node | None, axis: int, labels: Axis, role: Role) -> None:
        """An operator reads this axis of a tensor with these labels."""
        if node is None:
            return
        if role == "writes":
            call = self._calls.get(self._fx_name)
            self.tensors.written.append(("" if call is None else call.layer, labels))
        name = self.graph.parameters.get(node.name)
        if name is None or name not in self.tensors.known:
            self.labels.tie(self.read(node)[axis], labels)
            if name is None and (sources := self.sources(node)):
                self._requests.append((sources, labels, Use(-1, role, self._current)))
            return
        axes = self.tensors.axes.setdefault(name, [None] * len(self.shape(node)))
        before = axes[axis]
        if before is None:
            axes[axis] = labels
        else:
            self.labels.tie(before, labels)
        self._use(name, axis, role, node)

    def hold(self, node: fx.Node | None, axes: Iterable[int]) -> None:
        """These axes of a tensor (a kernel's, a table's rows) keep their size."""
        if node is not None:
            shape = self.shape(node)
            for axis in axes:
                self.use(node, axis, np.zeros(shape[axis], np.int64), "carries")

    def keep(self, node: fx.Node, axes: Iterable[int] | None = None, why: str = "") -> None:
        """These axes (or all) of a value keep their size."""
        made = self.read(node) if not isinstance(self.made.get(node.name), tuple) else None
        if made is None:
            several = self.made[node.name]
            made = [axis for axes_ in several for axis in axes_]
        for axis in range(len(made)) if axes is None else axes:
            self.labels.fix(made[axis], why)

    def unknown(self, node: fx.Node) -> Made:
        """All that an operator touches keeps its size."""
        why = f"'{operator_of(node)}' at '{self.name(node)}' is not known to keep channels apart"
        for read in node.all_input_nodes:
            if _tensors_of(read.meta.get("val")):
                self.keep(read, why=why)
                call = self._calls.get(node.name)
                if call is not None and read.name in self.graph.parameters:
                    self.tensors.written.append((call.layer, self.labels.kept(why).repeat(2)))
        seen = node.meta["val"]
        if isinstance(seen, Tensor):
            return self.plain(node)
        return tuple(
            [np.zeros(size, np.int64) for size in sizes(item)] if isinstance(item, Tensor) else []
            for item in seen
        )

    def mark(self, kind: str, axis: Axis) -> None:
        """These labels are of a kind of their own."""
        self.tensors.kinds.append((kind, axis))

    def sources(self, node: fx.Node) -> frozenset[str]:
        """The parameters that a value is computed of, when it is of nothing else."""
        name = self.graph.parameters.get(node.name)
        return self._sources.get(node.name, frozenset()) if name is None else frozenset({name})

    # ---- inside

    def _use(self, name: str, axis: int, role: Role, node: fx.Node) -> None:
        before = self.tensors.uses.get((name, axis))
        if before is None or (before.role == "carries" and role != "carries"):
            order = len(self.tensors.uses) if before is None else before.order
            self.tensors.uses[name, axis] = Use(order, role, self._current)

    def _settle_requests(self) -> None:
        """A weight that is computed of parameters: those whose labels it has are used as it is."""
        for names, labels, use in self._requests:
            atoms = set(np.unique(self.labels.today(labels)).tolist()) - {0}
            for name in names & self.tensors.known:
                for axis, own in enumerate(self.tensors.axes.get(name, [])):
                    if own is None or not atoms & set(np.unique(self.labels.today(own)).tolist()):
                        continue
                    before = self.tensors.uses.get((name, axis))
                    if before is None or before.role == "carries":
                        order = len(self.tensors.uses) if before is None else before.order
                        self.tensors.uses[name, axis] = replace(use, order=order)


def sizes(value: Tensor) -> tuple[int, ...]:
    """Sizes of a traced tensor, symbolic ones as they were at the example inputs."""
    return tuple(number(size) for size in value.shape)


def number(value: Any) -> int:
    """An int, a symbolic one, or a node that made one."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, (int, float)):
        return int(value)
    hint = value.node.hint
    return 1 if hint is None else int(hint)


def operator_of(node: fx.Node) -> str:
    """ATen operator without overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.split("::")[-1].rstrip("_"))
    return str(getattr(target, "__name__", target))


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by the operator's own names, defaults included."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return {f"arg{index}": value for index, value in enumerate(node.args)}
    found = {item.name: item.default_value for item in target._schema.arguments}
    names = [item.name for item in target._schema.arguments]
    return {**found, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def operands(node: fx.Node) -> tuple[Any, ...]:
    """Arguments as they stand."""
    return node.args


def _tensors_of(seen: Any) -> bool:
    several = isinstance(seen, (tuple, list)) and any(isinstance(item, Tensor) for item in seen)
    return isinstance(seen, Tensor) or several
