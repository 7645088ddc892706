"""Rewrites a program with fixed sizes into the operators that XNNPACK takes.

Part of ``executorch.py``. What is not delegated runs in plain kernels and cuts the network into several
delegates, between which tensors change their layout; so means, splits, squeezes and attention are spelled
in operators that the partitioner knows: means keep their axes, pieces are slices, shapes are constants.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from featherweight.runtimes._executorch_recurrent import unroll

_ATEN = torch.ops.aten
_CONVS = (_ATEN.conv1d.default, _ATEN.conv2d.default)


def delegable(module: fx.GraphModule) -> None:
    """Rewrite the graph in place; it computes what it did."""
    for node in list(module.graph.nodes):
        if node.target is _ATEN.batch_norm.default:
            _fold_norm(module, node)
        elif node.target in (_ATEN.lstm.input, _ATEN.gru.input):
            unroll(node)
        elif node.target in _REWRITES:
            _REWRITES[node.target](node)
    module.graph.eliminate_dead_code()


def _shape(node: fx.Node) -> list[int]:
    return [int(size) for size in node.meta["val"].shape]


def _instead(node: fx.Node, made: fx.Node) -> None:
    """Let everyone read the new node."""
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def _bound(node: fx.Node, *defaults: Any) -> list[Any]:
    """Arguments by position, with defaults for what was not given."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = [node.kwargs.get(name, default) for name, default in zip(names, defaults, strict=False)]
    return [*node.args, *given[len(node.args) :]]


# ---- layers


def _fold_norm(module: fx.GraphModule, node: fx.Node) -> None:
    """A batch norm behind a convolution whose weights are floats becomes part of it."""
    arguments: Any = node.args
    conv, weight, bias, mean, variance, training, _, eps, _ = arguments
    if training or not isinstance(conv, fx.Node) or conv.target not in _CONVS or len(conv.users) != 1:
        return
    source, kernel, shift, *rest = _bound(conv, *(None,) * 7)
    tensors = [kernel, shift, weight, bias, mean, variance]
    if any(one is not None and one.op != "get_attr" for one in tensors) or len(kernel.users) != 1:
        return
    values = [None if one is None else getattr(module, one.target) for one in tensors]
    fuse: Any = torch.nn.utils.fusion.fuse_conv_bn_weights
    with torch.no_grad():
        folded, moved = fuse(values[0], values[1], *values[4:], eps, *values[2:4])
    name = f"{kernel.target}_norm"
    setattr(module, str(kernel.target), folded.detach())
    module.register_buffer(name, moved.detach())
    with module.graph.inserting_before(conv):
        added = module.graph.get_attr(name)
    conv.args = (source, kernel, added, *[one for one in rest if one is not None])
    conv.kwargs = {}
    node.replace_all_uses_with(conv)
    module.graph.erase_node(node)


def _average_pool(node: fx.Node) -> None:
    """Without padding nothing of it can be counted, but XNNPACK wants that said."""
    source, size, stride, padding, ceil, _, divisor = _bound(node, None, None, [], 0, False, True, None)
    if any(_pair(padding)) or ceil or divisor is not None:
        return
    node.args = (source, _pair(size), _pair(stride or size), [0, 0], False, False)
    node.kwargs = {}


def _max_pool(node: fx.Node) -> None:
    """The partitioner looks for arguments that may be left out."""
    source, size, stride, padding, dilation, ceil = _bound(node, None, None, [], [0, 0], [1, 1], False)
    node.args = (source, *(_pair(x) for x in (size, stride or size, padding, dilation)), ceil)
    node.kwargs = {}


def _pair(given: Any) -> list[int]:
    sizes = list(given) if isinstance(given, (list, tuple)) else [given]
    return sizes * 2 if len(sizes) == 1 else sizes


def _mean(node: fx.Node) -> None:
    """A mean over the last two of four axes keeps them, which is a global average; then they go."""
    source, dims, keep, dtype = _bound(node, None, None, False, None)
    if keep or dtype is not None or len(_shape(source)) != 4 or dims is None:
        return
    if sorted(int(dim) % 4 for dim in dims) != [2, 3]:
        return
    with node.graph.inserting_before(node):
        kept = node.graph.call_function(_ATEN.mean.dim, (source, [2, 3], True))
        made = node.graph.call_function(_ATEN.reshape.default, (kept, _shape(node)))
    _instead(node, made)


def _hard_sigmoid(node: fx.Node) -> None:
    with node.graph.inserting_before(node):
        call = node.graph.call_function
        shifted = call(_ATEN.add.Tensor, (node.args[0], 3.0))
        clamped = call(_ATEN.hardtanh.default, (shifted, 0.0, 6.0))
        made = call(_ATEN.mul.Tensor, (clamped, 1.0 / 6.0))
    _instead(node, made)


# ---- shapes


def _reshape(node: fx.Node) -> None:
    """Squeezes, flattenings and the like as one operator of a constant shape."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(_ATEN.reshape.default, (node.args[0], _shape(node)))
    _instead(node, made)


def _whole(node: fx.Node) -> None:
    """A slice of all that there is."""
    source: Any = node.args[0]
    if _shape(source) == _shape(node):
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)


def _slice(source: fx.Node, axis: int, start: int, length: int) -> fx.Node:
    return source.graph.call_function(_ATEN.slice.Tensor, (source, axis, start, start + length))


def _select(node: fx.Node) -> None:
    source: Any = node.args[0]
    shape = _shape(source)
    axis, index = (int(x) for x in _bound(node, None, None, None)[1:])
    axis %= len(shape)
    with node.graph.inserting_before(node):
        piece = _slice(source, axis, index % shape[axis], 1)
        made = node.graph.call_function(_ATEN.reshape.default, (piece, _shape(node)))
    _instead(node, made)


def _split(node: fx.Node) -> None:
    """Each piece that is read becomes a slice."""
    source: Any = node.args[0]
    axis = int(_bound(node, None, None, 0)[2])
    _pieces(node, source, axis % len(_shape(source)))


def _unbind(node: fx.Node) -> None:
    source: Any = node.args[0]
    _pieces(node, source, int(_bound(node, None, 0)[1]) % len(_shape(source)))


def _cat(node: fx.Node) -> None:
    """One tensor alone is what it was."""
    pieces: Any = node.args[0]
    if len(pieces) == 1:
        node.replace_all_uses_with(pieces[0])
        node.graph.erase_node(node)


def _pieces(node: fx.Node, source: fx.Node, axis: int) -> None:
    whole = len(_shape(source))
    starts, at = [], 0
    for piece in node.meta["val"]:
        lengths = 1 if piece.dim() < whole else int(piece.shape[axis])
        starts.append((at, lengths))
        at += lengths
    if any(reader.target is not operator.getitem for reader in node.users):
        return
    for reader in list(node.users):
        with node.graph.inserting_before(reader):
            made = _slice(source, axis, *starts[int(reader.args[1])])  # type: ignore[arg-type]
            if len(_shape(reader)) < whole:
                made = node.graph.call_function(_ATEN.reshape.default, (made, _shape(reader)))
        _instead(reader, made)


# ---- products


def _batched(node: fx.Node, left: fx.Node, right: fx.Node) -> fx.Node:
    """left @ right over equal outer axes, as one operator on three axes."""
    call = node.graph.call_function
    one, two = _shape(left), _shape(right)
    if len(one) == 3:
        made = call(_ATEN.bmm.default, (left, right))
        made.meta["val"] = torch.empty([*one[:-1], two[-1]], device="meta")
        return made
    flat = [
        call(_ATEN.reshape.default, (x, [math.prod(shape[:-2]), *shape[-2:]]))
        for x, shape in ((left, one), (right, two))
    ]
    product = call(_ATEN.bmm.default, tuple(flat))
    made = call(_ATEN.reshape.default, (product, [*one[:-1], two[-1]]))
    made.meta["val"] = torch.empty([*one[:-1], two[-1]], device="meta")
    return made


def _matmul(node: fx.Node) -> None:
    left, right = node.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return
    one, two = _shape(left), _shape(right)
    if len(one) < 3 or len(one) != len(two) or one[:-2] != two[:-2]:
        return
    with node.graph.inserting_before(node):
        made = _batched(node, left, right)
    _instead(node, made)


def _attention(node: fx.Node) -> None:
    """softmax(q k' / sqrt(d)) v, where no mask can hide a whole row."""
    query, key, value, mask, dropout, causal, scale, grouped = _bound(
        node, None, None, None, None, 0.0, False, None, False
    )
    shapes = [_shape(x) for x in (query, key, value)]
    if (
        mask is not None
        or dropout
        or causal
        or grouped
        or not shapes[0][:-2] == shapes[1][:-2] == shapes[2][:-2]
    ):
        return
    factor = 1.0 / math.sqrt(shapes[0][-1]) if scale is None else float(scale)
    turned = [*shapes[1][:-2], shapes[1][-1], shapes[1][-2]]
    with node.graph.inserting_before(node):
        call = node.graph.call_function
        small = call(_ATEN.mul.Tensor, (query, factor))
        small.meta["val"] = query.meta["val"]
        across = call(_ATEN.transpose.int, (key, -2, -1))
        across.meta["val"] = torch.empty(turned, device="meta")
        scores = _batched(node, small, across)
        shares = call(_ATEN.softmax.int, (scores, -1))
        shares.meta["val"] = scores.meta["val"]
        made = _batched(node, shares, value)
    _instead(node, made)


def _float(node: fx.Node) -> None:
    """A whole number beside floats would be cast at each call."""
    if node.meta["val"].is_floating_point():
        node.args = tuple(float(x) if type(x) is int else x for x in node.args)


_Rewrite = Callable[[fx.Node], None]
_RESHAPED: Sequence[Any] = (
    _ATEN.squeeze.default,
    _ATEN.squeeze.dim,
    _ATEN.squeeze.dims,
    _ATEN.unsqueeze.default,
    _ATEN.flatten.using_ints,
    _ATEN.unflatten.int,
    _ATEN.view.default,
)
_REWRITES: dict[Any, _Rewrite] = {
    _ATEN.avg_pool2d.default: _average_pool,
    _ATEN.max_pool2d.default: _max_pool,
    _ATEN.mean.dim: _mean,
    _ATEN.cat.default: _cat,
    **dict.fromkeys((_ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.mul.Tensor, _ATEN.div.Tensor), _float),
    _ATEN.hardsigmoid.default: _hard_sigmoid,
    **dict.fromkeys(_RESHAPED, _reshape),
    _ATEN.slice.Tensor: _whole,
    _ATEN.select.int: _select,
    _ATEN.chunk.default: _split,
    _ATEN.split.Tensor: _split,
    _ATEN.split_with_sizes.default: _split,
    _ATEN.unbind.int: _unbind,
    _ATEN.matmul.default: _matmul,
    _ATEN.scaled_dot_product_attention.default: _attention,
}
