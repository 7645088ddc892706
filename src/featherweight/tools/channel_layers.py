"""Labels through layers with weights: convolutions, linear layers, norms, embeddings, recurrences."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, fx

from featherweight.tools.channel_labels import Axis
from featherweight.tools.channel_products import broadcast
from featherweight.tools.channel_walk import Axes, Made, Rule, Walk, arguments, number, operands, operator_of


def _conv(walk: Walk, node: fx.Node) -> Made:
    """Weight (out, in / groups, kernel...); transposed (in, out / groups, kernel...)."""
    given = arguments(node)
    source, weight, bias = given["input"], given["weight"], given.get("bias")
    kernel = len(walk.shape(weight)) - 2
    axes = list(walk.read(source))
    groups = number(given.get("groups", 1))
    transposed = bool(given.get("transposed")) or "transpose" in operator_of(node)
    place = len(axes) - kernel - 1
    read, outputs = axes[place], walk.shape(node)[place]
    made, position, each = _grouped(walk, read, groups, outputs)
    depthwise = groups > 1 and len(read) == groups
    if transposed:
        walk.use(weight, 0, read, "carries" if depthwise else "reads")
        walk.use(weight, 1, each, "carries" if depthwise else "writes")
    else:
        walk.use(weight, 0, made, "carries" if depthwise else "writes")
        walk.use(weight, 1, position, "reads")
    walk.hold(weight, range(2, kernel + 2))
    walk.use(bias, 0, made, "carries" if depthwise else "writes")
    axes[place] = made
    for axis in range(place + 1, len(axes)):
        axes[axis] = _moved(walk, axes[axis], walk.shape(node)[axis])
    return axes


def _grouped(walk: Walk, read: Axis, groups: int, outputs: int) -> tuple[Axis, Axis, Axis]:
    """Labels of what a convolution makes, of the inputs of a group, and of the outputs of a group."""
    labels = walk.labels
    if groups == 1:
        made = labels.fresh(outputs)
        return made, read, made
    each = outputs // groups
    if len(read) == groups:
        return read.repeat(each), np.zeros(1, np.int64), np.zeros(each, np.int64)
    group, position = labels.split(read, groups, len(read) // groups)
    walk.mark("group", group)
    fresh = labels.fresh(each)
    return labels.join(group, fresh), position, fresh


def _moved(walk: Walk, axis: Axis, size: int) -> Axis:
    """An axis that a kernel slides over: its elements are mixed."""
    walk.labels.fix(axis)
    return np.zeros(size, np.int64)


def _linear(walk: Walk, node: fx.Node) -> Made:
    given = arguments(node)
    axes = list(walk.read(given["input"]))
    walk.use(given["weight"], 1, axes[-1], "reads")
    made = walk.labels.fresh(walk.shape(given["weight"])[0])
    walk.use(given["weight"], 0, made, "writes")
    walk.use(given.get("bias"), 0, made, "writes")
    return [*axes[:-1], made]


def _batch_norm(walk: Walk, node: fx.Node) -> Made:
    given = arguments(node)
    axes = walk.read(given["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        walk.use(given.get(name), 0, axes[1], "carries")
    return _first(node, axes)


def _first(node: fx.Node, axes: Axes) -> Made:
    """Some norms also return the statistics that they took, which nobody may cut."""
    seen = node.meta["val"]
    if isinstance(seen, Tensor):
        return axes
    rest = [[np.zeros(number(size), np.int64) for size in item.shape] for item in seen[1:]]
    return (axes, *rest)


def _layer_norm(walk: Walk, node: fx.Node) -> Made:
    """The sizes of the normalized axes are an attribute of the layer, which is cut with them."""
    given = arguments(node)
    axes = walk.read(given["input"])
    count = len(given["normalized_shape"])
    for name in ("weight", "bias"):
        for axis in range(count):
            walk.use(given.get(name), axis, axes[len(axes) - count + axis], "carries")
    return _first(node, axes)


def _group_norm(walk: Walk, node: fx.Node) -> Made:
    given = arguments(node)
    axes = walk.read(given["input"])
    groups = number(given["num_groups" if "num_groups" in given else "group"])
    if 1 < groups < len(axes[1]):
        walk.mark("group", walk.labels.split(axes[1], groups, len(axes[1]) // groups)[0])
    for name in ("weight", "bias"):
        walk.use(given.get(name), 0, axes[1], "carries")
    return _first(node, axes)


def _weight_norm(walk: Walk, node: fx.Node) -> Made:
    """A direction and a length per row."""
    direction, length = operands(node)[:2]
    axes = walk.read(direction)
    broadcast(walk, [axes, walk.read(length)])
    return _first(node, axes)


def _prelu(walk: Walk, node: fx.Node) -> Made:
    source, slopes = operands(node)[:2]
    axes = walk.read(source)
    if walk.shape(slopes) not in ((1,), ()):
        walk.use(slopes, 0, axes[1] if len(axes) > 1 else axes[0], "carries")
    return axes


def _embedding(walk: Walk, node: fx.Node) -> Made:
    """Rows are chosen by data; columns are channels."""
    given = arguments(node)
    made = walk.labels.fresh(walk.shape(given["weight"])[1])
    walk.hold(given["weight"], [0])
    walk.use(given["weight"], 1, made, "writes")
    return [*walk.read(given["indices"]), made]


def _recurrent(walk: Walk, node: fx.Node) -> Made:
    """LSTM and GRU: unit h of a layer and direction has row k * H + h of every gate k.

    What a projection makes takes the place of the hidden states outside (proj_size).
    """
    given = arguments(node)
    gates = {"lstm": 4, "gru": 3}.get(operator_of(node), 1)
    weights, biased = given["params"], bool(given["has_biases"])
    directions = 2 if given["bidirectional"] else 1
    layers = number(given["num_layers"])
    each = len(weights) // (layers * directions)
    projected = each == (5 if biased else 3)
    states: list[Any] = list(given["hx"]) if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
    source = walk.read(given["input"])
    read = source[-1]
    lasts: list[tuple[Axis, Axis]] = []
    for layer in range(layers):
        made = []
        for direction in range(directions):
            start = (layer * directions + direction) * each
            hidden, out = _cell(walk, weights[start : start + each], read, gates, biased, projected)
            made.append(out)
            lasts.append((out, hidden))
        read = np.concatenate(made)
    one_for_all = len(lasts) == 1
    for place, state in enumerate(states):
        axis = walk.read(state)[-1]
        for last in lasts:
            walk.labels.tie(axis, last[place])
    shape = [len(axis) for axis in source[:-1]]
    outs = [[*(np.zeros(size, np.int64) for size in shape), read]]
    for place in range(len(states)):
        axis = lasts[0][place]
        value = node.meta["val"][1 + place]
        if not one_for_all and any(user.args[1] == 1 + place and user.users for user in node.users):
            for last in lasts[1:]:
                walk.labels.tie(axis, last[place])
        outs.append([*(np.zeros(number(size), np.int64) for size in value.shape[:-1]), axis])
    return tuple(outs)


def _single_cell(walk: Walk, node: fx.Node) -> Made:
    """One step of an LSTM or GRU."""
    given = arguments(node)
    gates = {"lstm_cell": 4, "gru_cell": 3}.get(operator_of(node), 1)
    states: list[Any] = list(given["hx"]) if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
    weights = [given[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if given.get(name) is not None]
    source = walk.read(given["input"])
    hidden, _ = _cell(walk, weights, source[-1], gates, len(weights) == 4, False)
    for state in states:
        walk.labels.tie(walk.read(state)[-1], hidden)
    made = [*source[:-1], hidden]
    return made if isinstance(node.meta["val"], Tensor) else tuple(made for _ in node.meta["val"])


def _cell(
    walk: Walk, weights: list[fx.Node], read: Axis, gates: int, biased: bool, projected: bool
) -> tuple[Axis, Axis]:
    """Labels of the hidden units of one direction of one layer, and of what it puts out."""
    hidden = walk.labels.fresh(walk.shape(weights[0])[0] // gates)
    walk.mark("hidden", hidden)
    rows = np.tile(hidden, gates)
    out = hidden
    if projected:
        out = walk.labels.fresh(walk.shape(weights[-1])[0])
        walk.mark("hidden", out)
    walk.use(weights[0], 0, rows, "writes")
    walk.use(weights[0], 1, read, "reads")
    walk.use(weights[1], 0, rows, "writes")
    walk.use(weights[1], 1, out, "reads")
    for bias in weights[2:4] if biased else []:
        walk.use(bias, 0, rows, "writes")
    if projected:
        walk.use(weights[-1], 0, out, "writes")
        walk.use(weights[-1], 1, hidden, "reads")
    return hidden, out


RULES: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv),
    "linear": _linear,
    **dict.fromkeys(("batch_norm", "instance_norm", "native_batch_norm"), _batch_norm),
    "_native_batch_norm_legit_no_training": _batch_norm,
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm"), _layer_norm),
    **dict.fromkeys(("group_norm", "native_group_norm"), _group_norm),
    **dict.fromkeys(("_weight_norm", "_weight_norm_interface"), _weight_norm),
    **dict.fromkeys(("prelu", "_prelu_kernel"), _prelu),
    "embedding": _embedding,
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _single_cell),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
}
