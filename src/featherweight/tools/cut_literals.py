"""Sizes that are written into calls (``reshape(n, 3, 4, 8)``, ``split([8, 8])``), as they are after a cut.

Each call that reads or makes a cut axis gets the numbers that give its predicted shape, and is tried on
tensors without data: what then has another shape cannot be cut, and says why.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from featherweight.graph import Graph, Node
from featherweight.tools.cut_plan import Dropped, Plan, left

_UNTRIED = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})  # they have no kernels without data


class MisfitError(Exception):
    """A call that cannot follow: ``node`` is its name, the text is why."""

    def __init__(self, node: str, layer: str, why: str) -> None:
        super().__init__(why)
        self.node = node
        self.layer = layer
        self.why = why


@dataclass
class Call:
    """An operator call of the exported program with arguments that may be changed.

    Attributes:
        node: The call in the program.
        target: Operator.
        args: By position; nodes of the program among them.
        kwargs: By name.
        changed: Numbers as they were -> as they are, for every number that changed.
    """

    node: fx.Node
    target: Any
    args: list[Any]
    kwargs: dict[str, Any]
    changed: list[tuple[int, int]] = field(default_factory=list)

    def get(self, name: str, default: Any = None) -> Any:
        """An argument by the operator's own name for it."""
        place = self._place(name)
        return self.args[place] if place is not None else self.kwargs.get(name, default)

    def set(self, name: str, value: Any) -> None:
        """Change an argument; numbers that differ are noted."""
        held = self.get(name)
        for old, new in zip(_listed(held), _listed(value), strict=False):
            if isinstance(old, int) and isinstance(new, int) and old != new:
                self.changed.append((old, new))
        place = self._place(name)
        if place is None:
            self.kwargs[name] = value
        else:
            self.args[place] = value

    def _place(self, name: str) -> int | None:
        names = [argument.name for argument in self.target._schema.arguments]
        place = names.index(name) if name in names else len(self.args)
        return place if place < len(self.args) else None


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


class Refit:
    """The calls of one entry's graph, refitted to a plan.

    Args:
        graph: As traced before the cut.
        entry: Its name.
        plan: What goes.
    """

    def __init__(self, graph: Graph, entry: str, plan: Plan) -> None:
        self.graph, self._entry, self._plan = graph, entry, plan
        self._values = {value.fx_name: name for name, value in graph.values.items()}
        self._nodes = {node.fx_name: node for node in graph.nodes}

    def calls(self) -> dict[str, Call]:
        """Every call that a cut axis touches, by its name in the program.

        Raises:
            MisfitError: A call cannot follow.
        """
        return {
            call.name: self.call(call)
            for call in self.graph.program.graph.nodes
            if call.name in self._nodes and self.touched(call)
        }

    def touched(self, call: fx.Node) -> bool:
        """Whether it reads or makes something that loses indices."""
        return any(map(self.dropped, (call, *call.all_input_nodes, *call.users)))

    def call(self, node: fx.Node) -> Call:
        """One call with the numbers that it needs.

        Raises:
            MisfitError: It cannot follow.
        """
        about = self._nodes[node.name]
        call = Call(node, node.target, list(node.args), dict(node.kwargs))
        if about.op in _RULES:
            _RULES[about.op](self, call, about)
        self._try(call, about)
        return call

    # ---- shapes

    def dropped(self, node: fx.Node) -> Dropped:
        """What a tensor of the program loses."""
        if node.name in self.graph.parameters:
            return self._plan.tensors.get(self.graph.parameters[node.name], {})
        return self._plan.of(self._entry, self._values.get(node.name, ""))

    def before(self, node: fx.Node) -> tuple[int, ...]:
        """A tensor's shape before the cut."""
        return tuple(_number(size) for size in node.meta["val"].shape)

    def after(self, node: fx.Node) -> tuple[int, ...]:
        """A tensor's shape after the cut."""
        return left(self.before(node), self.dropped(node))

    def fail(self, about: Node, why: str) -> MisfitError:
        """The error of a call."""
        return MisfitError(about.name, about.layer, why)

    # ---- trying

    def _try(self, call: Call, about: Node) -> None:
        if about.op in _UNTRIED or not str(call.target).startswith("aten."):
            return
        args, kwargs = fx.node.map_arg((tuple(call.args), call.kwargs), self._empty)
        try:
            made = call.target(*args, **_on_meta(kwargs))
        except NotImplementedError:
            return
        except (RuntimeError, IndexError, ValueError) as error:
            raise self.fail(about, str(error).strip().splitlines()[0][:200]) from error
        if isinstance(made, Tensor):
            pairs = [(made, call.node)]
        else:
            pairs = [
                (made[user.args[1]], user) for user in call.node.users if user.target is operator.getitem
            ]
        for tensor, node in pairs:
            if isinstance(tensor, Tensor) and tuple(tensor.shape) != self.after(node):
                raise self.fail(
                    about, f"{about.op} would give {tuple(tensor.shape)} where {self.after(node)} is needed"
                )

    def _empty(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return torch.empty(self.after(node), dtype=value.dtype, device="meta")
        if isinstance(value, (list, tuple)):
            raise NotImplementedError
        return _number(value)


def _number(value: Any) -> Any:
    """A size of the example inputs."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        hint = value.node.hint
        return 1 if hint is None else hint
    return value


def _on_meta(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: torch.device("meta") if key == "device" else value for key, value in kwargs.items()}


# ---- rules: the numbers of one operator


def _sizes(refit: Refit, call: Call, about: Node) -> None:
    """Reshapes: sizes are those of the result; one that is computed from the batch becomes -1."""
    name = "shape" if about.op == "reshape" else "size"
    sizes, old, new = list(call.get(name)), refit.before(call.node), refit.after(call.node)
    for axis, size in enumerate(sizes):
        if old[axis] == new[axis]:
            continue
        if isinstance(size, int):
            sizes[axis] = size if size == -1 else new[axis]
        elif any(isinstance(one, int) and one == -1 for one in sizes):
            raise refit.fail(about, "its size is computed from the batch")
        else:
            sizes[axis] = -1
    call.set(name, sizes)


def _unflatten(refit: Refit, call: Call, about: Node) -> None:
    sizes = list(call.get("sizes"))
    first = call.get("dim") % len(refit.before(call.args[0]))
    new = refit.after(call.node)[first : first + len(sizes)]
    call.set(
        "sizes", [a if not isinstance(a, int) or a == -1 else b for a, b in zip(sizes, new, strict=True)]
    )


def _made(refit: Refit, call: Call, about: Node) -> None:
    """zeros and the like."""
    new = refit.after(call.node)
    call.set("size", [b if isinstance(a, int) else a for a, b in zip(call.get("size"), new, strict=True)])


def _split(refit: Refit, call: Call, about: Node) -> None:
    """Sections lose what was in them: split, chunk."""
    whole = call.args[0]
    axis = call.get("dim", 0) % len(refit.before(whole))
    size, gone = refit.before(whole)[axis], refit.dropped(whole).get(axis, frozenset())
    if not gone:
        return
    if about.op == "chunk":
        each = -(-size // call.get("chunks"))
    else:
        name = next(n for n in ("split_size", "split_sizes", "sizes") if call.get(n) is not None)
        each = call.get(name)
    sections = each if isinstance(each, (list, tuple)) else [each] * (size // each) + [size % each]
    sections = [section for section in sections if section or isinstance(each, (list, tuple))]
    if not all(isinstance(section, int) for section in sections):
        raise refit.fail(about, "it is split into sections that are computed")
    ends = [sum(sections[: i + 1]) for i in range(len(sections))]
    kept = [s - sum(end - s <= index < end for index in gone) for s, end in zip(sections, ends, strict=True)]
    call.changed += [(a, b) for a, b in zip(sections, kept, strict=True) if a != b]
    call.target = torch.ops.aten.split_with_sizes.default
    call.args, call.kwargs = [whole, kept, axis], {}


def _slice(refit: Refit, call: Call, about: Node) -> None:
    whole, step = call.args[0], call.get("step", 1)
    axis = call.get("dim", 0) % len(refit.before(whole))
    gone = refit.dropped(whole).get(axis, frozenset())
    start, narrow = call.get("start"), about.op == "narrow"
    end = start + call.get("length") if narrow else call.get("end")
    if not gone or not all(one is None or isinstance(one, int) for one in (start, end)):
        return
    old = range(refit.before(whole)[axis])[start:end:step]
    kept = [index - sum(one < index for one in gone) for index in old if index not in gone]
    if not kept or kept != list(range(kept[0], kept[0] + len(kept) * step, step)):
        raise refit.fail(about, "its slice would have gaps")
    call.set("start", kept[0])
    if narrow:
        call.set("length", len(kept))
    elif end is not None and end < refit.before(whole)[axis]:
        call.set("end", kept[-1] + 1)


def _select(refit: Refit, call: Call, about: Node) -> None:
    whole, index = call.args[0], call.get("index")
    axis = call.get("dim") % len(refit.before(whole))
    gone = refit.dropped(whole).get(axis, frozenset())
    if not gone or not isinstance(index, int):
        return
    at = index % refit.before(whole)[axis]
    if at in gone:
        raise refit.fail(about, "the one position that it reads would go")
    call.set("index", at - sum(one < at for one in gone))


def _repeat(refit: Refit, call: Call, about: Node) -> None:
    whole, repeats = refit.after(call.args[0]), list(call.get("repeats"))
    new = refit.after(call.node)
    for axis, size in enumerate(reversed(whole), 1):
        if isinstance(repeats[-axis], int):
            repeats[-axis] = new[-axis] // size
    for axis in range(len(repeats) - len(whole)):
        repeats[axis] = new[axis] if isinstance(repeats[axis], int) else repeats[axis]
    call.set("repeats", repeats)


def _pad(refit: Refit, call: Call, about: Node) -> None:
    """Padding of a cut axis loses what the result loses there."""
    pads, rank, old = list(call.get("pad")), len(refit.before(call.node)), refit.before(call.node)
    for pair in range(len(pads) // 2):
        axis = rank - 1 - pair
        gone = refit.dropped(call.node).get(axis, frozenset())
        before, behind = pads[2 * pair : 2 * pair + 2]
        if gone and isinstance(before, int) and isinstance(behind, int):
            pads[2 * pair] -= sum(index < before for index in gone)
            pads[2 * pair + 1] -= sum(index >= old[axis] - behind for index in gone)
    call.set("pad", pads)


def _normalized(refit: Refit, call: Call, about: Node) -> None:
    held = call.get("normalized_shape")
    call.set("normalized_shape", list(refit.after(call.args[0])[-len(held) :]))


def _group_norm(refit: Refit, call: Call, about: Node) -> None:
    whole = call.args[0]
    gone = refit.dropped(whole).get(1, frozenset())
    call.set("num_groups", len(_groups(refit, about, refit.before(whole)[1], call.get("num_groups"), gone)))


def _groups(refit: Refit, about: Node, size: int, groups: int, gone: frozenset[int]) -> set[int]:
    """Groups that keep channels; all keep the same number of them."""
    each = size // groups
    kept = Counter(index // each for index in range(size) if index not in gone)
    if len(set(kept.values())) > 1:
        raise refit.fail(about, "its groups would lose different numbers of channels")
    return set(kept)


def _conv(refit: Refit, call: Call, about: Node) -> None:
    _regroup(refit, call, about, call.args[0], call.node)


def _conv_transpose(refit: Refit, call: Call, about: Node) -> None:
    _regroup(refit, call, about, call.node, call.args[0])


def _regroup(refit: Refit, call: Call, about: Node, inner: fx.Node, outer: fx.Node) -> None:
    """Groups follow from the weight, whose axis 1 is channels per group of ``inner``; axis 0 is ``outer``."""
    weight, groups = refit.after(call.args[1]), call.get("groups", 1)
    axis = 1 - len(weight)
    for value in (inner, outer):
        size, gone = refit.before(value)[axis], refit.dropped(value).get(len(refit.before(value)) + axis)
        if gone and groups > 1:
            _groups(refit, about, size, groups, gone)
    now = refit.after(inner)[axis] // weight[1]
    if now != groups:
        call.set("groups", now)


def _attention(refit: Refit, call: Call, about: Node) -> None:
    """The scale stays as it was when heads get fewer positions."""
    if call.get("scale") is None and refit.before(call.args[0])[-1] != refit.after(call.args[0])[-1]:
        call.set("scale", float(refit.before(call.args[0])[-1]) ** -0.5)


_Rule = Callable[[Refit, Call, Node], None]
_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "broadcast_to"), _sizes),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "rand", "randn"), _made),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _made),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    **dict.fromkeys(("slice", "narrow"), _slice),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    "unflatten": _unflatten,
    "select": _select,
    "repeat": _repeat,
    "pad": _pad,
    "group_norm": _group_norm,
    "scaled_dot_product_attention": _attention,
}
