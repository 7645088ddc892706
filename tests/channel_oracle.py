"""A traced program run without some channels: an oracle of channel groups that needs no module to follow.

Tensors lose the indices that groups name, sizes that code wrote down are replaced by those that the groups
predict, and every value is compared with that of the whole program in which the same channels are zero.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from featherweight.graph import Graph, trace
from featherweight.model import Model
from featherweight.tools.channel_walk import arguments, number, operator_of
from featherweight.tools.groups import Channels
from featherweight.tools.simulate import module_tensors

Gone = dict[tuple[str, int], set[int]]  # (tensor or value, axis) -> indices
_MIXING = {"layer_norm", "rms_norm", "group_norm", "softmax", "scaled_dot_product_attention"} | {
    "mean",
    "amax",
    "amin",
    "var",
    "max",
    "min",
}
_VIEWS = {"view", "reshape", "_unsafe_view", "expand", "unflatten", "view_as", "reshape_as", "expand_as"}


def random_drop(channels: Channels, seed: int, ratio: float = 0.4) -> dict[str, list[int]]:
    """Some channels of every group, at least one of each stays."""
    random = np.random.default_rng(seed)
    drop = {}
    for name, group in channels.groups.items():
        count = int(random.integers(0, max(1, int(ratio * group.size)) + 1))
        drop[name] = sorted(random.permutation(group.size)[: min(count, group.size - 1)].tolist())
    return drop


def gone(channels: Channels, drop: Mapping[str, Sequence[int]], entry: str = "forward") -> Gone:
    """What goes of every tensor and value."""
    found: Gone = defaultdict(set)
    for name, dropped in drop.items():
        group = channels.groups[name]
        for channel in dropped:
            for member in group.members:
                found[member.tensor, member.axis].update(member.indices[channel])
            for place in group.places.get(entry, ()):
                found[place.value, place.axis].update(place.indices[channel])
    return found


class _Run(fx.Interpreter):
    """The program with cut tensors (``cut``), or whole with zeros instead."""

    def __init__(self, graph: Graph, without: Gone, cut: bool) -> None:
        super().__init__(graph.program.graph_module)
        self.graph_of, self.without, self.cut = graph, without, cut
        self.names = {value.fx_name: name for name, value in graph.values.items()}
        self.seen: dict[str, Tensor] = {}
        self.mixed: set[str] = set()  # values that depend on how many channels there are

    def kept(self, node: fx.Node, axis: int) -> list[int]:
        name = self.graph_of.parameters.get(node.name) or self.names.get(node.name, "")
        size = number(node.meta["val"].shape[axis])
        lost = self.without.get((name, axis), set())
        return [index for index in range(size) if index not in lost]

    def predicted(self, node: fx.Node, value: Any = None) -> list[int]:
        return [len(self.kept(node, axis)) for axis in range(node.meta["val"].dim())]

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "call_function" and self.cut:
            made = self._called(n, args, kwargs)
        else:
            made = getattr(self, n.op)(n.target, args, kwargs)
        if n.op == "call_function":
            reads = {read.name for read in n.all_input_nodes}
            if reads & self.mixed or self._mixes(n):
                self.mixed.add(n.name)
        if n.name in self.names and isinstance(made, Tensor):
            self.seen[n.name] = made
        return made

    def _mixes(self, n: fx.Node) -> bool:
        """Whether channels that are zero count in what others become."""
        op, given = operator_of(n), arguments(n)
        if op not in _MIXING:
            return False
        source: Any = n.args[0]
        rank = source.meta["val"].dim()
        lost = [
            set(range(number(source.meta["val"].shape[axis]))) - set(self.kept(source, axis))
            for axis in range(rank)
        ]
        if op in ("layer_norm", "rms_norm"):
            return any(lost[rank - len(given["normalized_shape"]) :])
        if "dim" in given:
            dims = given["dim"] if isinstance(given["dim"], (list, tuple)) else [given["dim"]]
            return any(lost if dims[0] is None else (lost[dim] for dim in dims))
        if op == "group_norm":
            each = number(source.meta["val"].shape[1]) // given["num_groups"]
            whole = {
                index for index in lost[1] if all(i // each != index // each for i in self.kept(source, 1))
            }
            return lost[1] != whole
        return bool(lost[-1]) and given.get("scale") is None

    def _called(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        op, given = operator_of(n), arguments(n)
        x = args[0] if args else None
        if op in _VIEWS:
            return x.expand(self.predicted(n)) if op.startswith("expand") else x.reshape(self.predicted(n))
        if op in ("zeros", "ones", "full", "new_zeros"):
            return torch.full(self.predicted(n), float(given.get("fill_value", 0.0)))
        if op in ("split", "split_with_sizes"):
            dim = number(given.get("dim", 0))
            items = sorted((user for user in n.users), key=lambda user: user.args[1])
            return x.split([self.predicted(item)[dim] for item in items], dim)
        if op in ("layer_norm", "rms_norm"):
            return n.target(x, list(x.shape[-len(args[1]) :]), *args[2:], **kwargs)
        if op == "slice":
            return self._slice(n, x, given)
        if op == "group_norm":
            return n.target(x, self._groups(n.args[0], 1, args[1]), *args[2:], **kwargs)
        if op.startswith("conv") and number(given.get("groups", 1)) > 1:
            axis = n.args[0].meta["val"].dim() - n.args[1].meta["val"].dim() + 1
            return self._conv(n, args, self._groups(n.args[0], axis, number(given["groups"])))
        return n.target(*args, **kwargs)

    def _groups(self, source: Any, axis: int, groups: int) -> int:
        each = number(source.meta["val"].shape[axis]) // groups
        return len({index // each for index in self.kept(source, axis)})

    def _conv(self, n: fx.Node, args: Any, groups: int) -> Any:
        names = [item.name for item in n.target._schema.arguments]
        return n.target(**{**dict(zip(names, args, strict=False)), "groups": groups})

    def _slice(self, n: fx.Node, x: Tensor, given: dict[str, Any]) -> Tensor:
        dim = number(given.get("dim", 0))
        size = number(n.args[0].meta["val"].shape[dim])
        if len(self.kept(n.args[0], dim)) == size:
            return n.target(*self.fetch_args_kwargs_from_env(n)[0])
        assert number(given.get("step", 1)) == 1
        start, end, _ = slice(given.get("start"), given.get("end")).indices(size)
        before = [index for index in self.kept(n.args[0], dim) if index < start]
        upto = [index for index in self.kept(n.args[0], dim) if index < end]
        return x.narrow(dim, len(before), len(upto) - len(before))


def check(model: Model, channels: Channels, drop: Mapping[str, Sequence[int]], entry: str = "forward") -> int:
    """Compare the cut program with the whole one that has zeros there; how many values were compared.

    Shapes of all values are compared; numbers of those that no norm or softmax over channels came before.
    """
    graph, without = trace(model, entry), gone(channels, drop, entry)
    tensors = {name: tensor.detach() for name, tensor in module_tensors(model, graph).items()}
    cut, zero = dict(tensors), {name: tensor.clone() for name, tensor in tensors.items()}
    for (name, axis), lost in without.items():
        if name in tensors:
            kept = [index for index in range(tensors[name].shape[axis]) if index not in lost]
            cut[name] = cut[name].index_select(axis, torch.tensor(kept))
            zero[name].index_fill_(axis, torch.tensor(sorted(lost)), 0.0)
    runs = []
    for held, small in ((cut, True), (zero, False)):
        run = _Run(graph, without, small)
        placeholders = [node for node in run.module.graph.nodes if node.op == "placeholder"]
        inputs = iter(model.entries[entry].example_inputs)
        flat = [
            held[graph.parameters[node.name]] if node.name in graph.parameters else next(inputs)
            for node in placeholders
        ]
        with torch.no_grad():
            run.run(*flat)
        runs.append(run)
    small, whole = runs
    compared = 0
    for node in small.module.graph.nodes:
        if node.name not in small.seen or node.op != "call_function" or node.target is operator.getitem:
            continue
        made, expected = small.seen[node.name], whole.seen[node.name]
        assert list(made.shape) == small.predicted(node), node.name
        if node.name in small.mixed or not made.is_floating_point():
            continue
        for axis in range(expected.dim()):
            kept = small.kept(node, axis)
            if len(kept) < expected.shape[axis]:
                expected = expected.index_select(axis, torch.tensor(kept))
        close = 1e-4 * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=close, msg=lambda m, n=node: f"{n}: {m}")
        compared += 1
    return compared
