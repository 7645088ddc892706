"""Labels through element-wise operators, reductions, pools and what merely reads or makes numbers."""

from __future__ import annotations

import numpy as np
from torch import Tensor, fx

from featherweight.tools.channel_moves import filled
from featherweight.tools.channel_products import broadcast
from featherweight.tools.channel_walk import (
    Axes,
    Made,
    Rule,
    Walk,
    arguments,
    number,
    operands,
    operator_of,
    sizes,
)


def _item(walk: Walk, node: fx.Node) -> Made:
    several = walk.made[operands(node)[0].name]
    assert isinstance(several, tuple)
    made: Axes = several[operands(node)[1]]
    return made


def _pointwise(walk: Walk, node: fx.Node) -> Made:
    """All operands lose the same indices; a parameter of the channels' shape carries them."""
    reads = [item for item in node.all_input_nodes if isinstance(item.meta.get("val"), Tensor)]
    made = broadcast(walk, [walk.read(item) for item in reads])
    return made if isinstance(node.meta["val"], Tensor) else tuple(made for _ in node.meta["val"])


def _same(walk: Walk, node: fx.Node) -> Made:
    return walk.read(operands(node)[0])


def _glu(walk: Walk, node: fx.Node) -> Made:
    """One half gates the other."""
    axes = list(walk.read(operands(node)[0]))
    dim = number(arguments(node).get("dim", -1))
    one, other = np.split(axes[dim], 2)
    walk.labels.tie(one, other)
    axes[dim] = one
    return axes


def _reduce(walk: Walk, node: fx.Node) -> Made:
    """Reduced axes lose their labels: what was mixed may be fewer."""
    given = arguments(node)
    if isinstance(given.get("other"), fx.Node):  # the larger of two tensors
        return _pointwise(walk, node)
    axes = walk.read(operands(node)[0])
    dims = given.get("dim", given.get("axis"))
    dims = (
        range(len(axes))
        if dims is None or dims == []
        else dims
        if isinstance(dims, (list, tuple))
        else [dims]
    )
    gone = {number(dim) % max(1, len(axes)) for dim in dims}
    if not isinstance(dims, range) and given.get("keepdim"):
        made = [np.zeros(1, np.int64) if place in gone else axis for place, axis in enumerate(axes)]
    else:
        made = [axis for place, axis in enumerate(axes) if place not in gone]
    return made if isinstance(node.meta["val"], Tensor) else tuple(made for _ in node.meta["val"])


def _slide(walk: Walk, node: fx.Node) -> Made:
    """Pools and resizing: the axes that change stay as they are, the others pass."""
    several = not isinstance(node.meta["val"], Tensor)
    shape = sizes(node.meta["val"][0] if several else node.meta["val"])
    axes = list(walk.read(operands(node)[0]))
    op = operator_of(node)
    count = next((int(letter) for letter in op if letter in "123"), len(axes) - 2)
    for place in range(len(axes) - count, len(axes)):
        walk.labels.fix(axes[place])
        axes[place] = np.zeros(shape[place], np.int64)
    return tuple(axes for _ in node.meta["val"]) if several else axes


_SAMES = (
    *(
        "relu",
        "relu6",
        "leaky_relu",
        "silu",
        "gelu",
        "mish",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "softplus",
    ),
    *(
        "celu",
        "selu",
        "elu",
        "log_sigmoid",
        "tanhshrink",
        "softsign",
        "rrelu",
        "clamp",
        "softmax",
        "log_softmax",
    ),
    *("_softmax", "softmin", "cumsum", "cumprod", "logcumsumexp"),
    *("dropout", "feature_dropout", "alpha_dropout", "bernoulli", "zero", "normal", "uniform"),
    *("contiguous", "clone", "detach", "alias", "identity", "to", "type_as", "_to_copy", "lift_fresh"),
    *("lift_fresh_copy", "real", "imag", "conj", "_conj"),
    *("full_like", "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like"),
)
_POINTWISE = (
    *("where", "addcmul", "addcdiv", "floor_divide", "multiply", "divide", "subtract", "true_divide"),
    *("rsub", "square", "polar", "complex", "masked_fill", "copy", "fill", "lerp"),
)
_POOLS = (
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)),
    *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)),
    *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d")),
    *(f"upsample_{kind}" for kind in ("bicubic2d", "trilinear3d")),
    *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)),
)
_REDUCTIONS = (
    *("mean", "sum", "amax", "amin", "prod", "all", "any", "logsumexp", "norm", "linalg_vector_norm"),
    *("var", "std", "var_mean", "std_mean", "max", "min", "median", "count_nonzero", "aminmax"),
)

RULES: dict[str, Rule] = {
    "getitem": _item,
    "pointwise": _pointwise,
    "factory": filled,
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(_SAMES, _same),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), filled),
    "glu": _glu,
    **dict.fromkeys(_POOLS, _slide),
}
