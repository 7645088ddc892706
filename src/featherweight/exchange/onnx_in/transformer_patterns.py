"""Chains that exporters make of the parts of transformers: norms and activations, as one node each.

Layer norm (Ba et al. 2016, arXiv:1607.06450), RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467), group
norm (Wu and He 2018, arXiv:1803.08494), GELU with erf and with tanh (Hendrycks and Gimpel 2016,
arXiv:1606.08415).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import NodeProto, helper

if TYPE_CHECKING:
    from featherweight.exchange.onnx_in.patterns import Chains

_CLOSE = 1e-4  # of constants that exporters round


def layer_norm(mul: NodeProto, chains: Chains) -> NodeProto | None:
    """(x - mean) / sqrt(variance + epsilon) * scale, over the last axis."""
    found = chains.split(mul) if mul.op_type == "Mul" else None
    if found is None or found[1].ndim != 1 or found[1].size < 2:
        return None
    parts = _centred(found[0], chains)
    if parts is None:
        return None
    x, epsilon = parts
    return _made("LayerNormalization", [x, _constant(mul, chains)], mul, axis=-1, epsilon=epsilon)


def layer_norm_bias(add: NodeProto, chains: Chains) -> NodeProto | None:
    """A constant that is added to a layer norm: its bias."""
    found = chains.split(add) if add.op_type == "Add" else None
    if found is None or (norm := chains.maker(found[0], "LayerNormalization")) is None:
        return None
    scale = chains.constants.get(norm.input[1])
    if len(norm.input) != 2 or any(norm.output[1:]) or scale is None or scale.shape != found[1].shape:
        return None
    made = NodeProto()
    made.CopyFrom(norm)
    made.input.append(_constant(add, chains))
    made.output[0] = add.output[0]
    return made


def _centred(name: str, chains: Chains) -> tuple[str, float] | None:
    """What is divided by its own standard deviation, and the epsilon in it."""
    divided = chains.maker(name, "Div")
    if divided is None:
        return None
    inner = _root(divided.input[1], chains)
    if inner is None:
        return None
    variance, epsilon = inner
    mean = chains.maker(variance, "ReduceMean")
    square = None if mean is None or not _over_last(mean, chains) else _square(mean.input[0], chains)
    if square is None:
        return None
    both = square == divided.input[0]
    differences = [chains.maker(item, "Sub", readers=2 if both else 1) for item in {square, divided.input[0]}]
    sources = set()
    for difference in differences:
        if difference is None:
            return None
        average = chains.maker(difference.input[1], "ReduceMean", readers=1 if both else 2)
        if average is None:
            average = chains.maker(difference.input[1], "ReduceMean", readers=1)
        if average is None or not _over_last(average, chains) or average.input[0] != difference.input[0]:
            return None
        sources.add(difference.input[0])
    chains.used = list({id(node): node for node in chains.used}.values())  # one mean for both differences
    return (sources.pop(), epsilon) if len(sources) == 1 else None


def _root(name: str, chains: Chains) -> tuple[str, float] | None:
    """sqrt(value + epsilon), or its power of a half: the value and epsilon."""
    root = chains.maker(name, "Sqrt", "Pow")
    if root is None:
        return None
    if root.op_type == "Pow":
        power = chains.scalar(root)
        if power is None or root.input[0] != power[0] or abs(power[1] - 0.5) > _CLOSE:
            return None
    shifted = chains.maker(root.input[0], "Add")
    return None if shifted is None else chains.scalar(shifted)


def _square(name: str, chains: Chains) -> str | None:
    """The value whose square this is."""
    node = chains.maker(name, "Pow", "Mul")
    if node is None or len(node.input) != 2:
        return None
    if node.op_type == "Mul":
        return node.input[0] if node.input[0] == node.input[1] else None
    power = chains.scalar(node)
    return node.input[0] if power is not None and power == (node.input[0], 2.0) else None


def _over_last(node: NodeProto, chains: Chains) -> bool:
    """Whether it reduces one axis and keeps it; the scale says that it is the last."""
    given = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    axes = given.get("axes")
    if axes is None and len(node.input) > 1:
        constant = chains.constants.get(node.input[1])
        axes = None if constant is None else constant.reshape(-1).tolist()
    return axes is not None and len(axes) == 1 and bool(given.get("keepdims", 1))


def rms_norm(mul: NodeProto, chains: Chains) -> NodeProto | None:
    """x / sqrt(mean of squares + epsilon) * scale, over the last axis."""
    found = chains.split(mul) if mul.op_type == "Mul" else None
    if found is None or found[1].ndim != 1 or found[1].size < 2:
        return None
    scaled = chains.maker(found[0], "Mul", "Div")
    if scaled is None or len(scaled.input) != 2:
        return None
    x, inner = scaled.input[0], None
    if scaled.op_type == "Div":
        inner = _root(scaled.input[1], chains)
    else:
        before = list(chains.used)
        for one, other in (scaled.input, scaled.input[::-1]):
            chains.used = list(before)
            inverse = chains.maker(other, "Reciprocal", "Div")
            if inverse is None:
                continue
            below = inverse.input[0]
            if inverse.op_type == "Div":
                top = chains.constants.get(inverse.input[0])
                if top is None or top.size != 1 or float(top.reshape(-1)[0]) != 1.0:
                    continue
                below = inverse.input[1]
            x, inner = one, _root(below, chains)
            break
    if inner is None:
        return None
    mean = chains.maker(inner[0], "ReduceMean")
    if mean is None or not _over_last(mean, chains) or _square(mean.input[0], chains) != x:
        return None
    return _made("RMSNormalization", [x, _constant(mul, chains)], mul, axis=-1, epsilon=inner[1])


def group_norm(add: NodeProto, chains: Chains) -> NodeProto | None:
    """Instance norm between two reshapes, then a scale and a bias per channel."""
    shifted = chains.split(add) if add.op_type == "Add" else None
    if shifted is None or (mul := chains.maker(shifted[0], "Mul")) is None:
        return None
    scaled = chains.split(mul)
    back = None if scaled is None else chains.maker(scaled[0], "Reshape")
    norm = None if back is None else chains.maker(back.input[0], "InstanceNormalization")
    there = None if norm is None else chains.maker(norm.input[0], "Reshape")
    if scaled is None or norm is None or there is None:
        return None
    ones, zeros = (chains.constants.get(norm.input[index]) for index in (1, 2))
    shape = chains.constants.get(there.input[1])
    if ones is None or zeros is None or shape is None or not np.all(ones == 1) or np.any(zeros):
        return None
    channels = scaled[1].shape[0] if scaled[1].ndim else 0
    per_channel = (
        scaled[1].size == channels > 1 and scaled[1].ndim > 1 and shifted[1].shape == scaled[1].shape
    )
    if not per_channel or shape.size != 3 or shape[0] not in (0, -1) or channels % ones.size:
        return None
    names = []
    for suffix, array in (("scale", scaled[1]), ("bias", shifted[1])):
        names.append(f"{add.output[0]}.{suffix}")
        chains.constants[names[-1]] = array.reshape(-1)
    epsilon = next((item.f for item in norm.attribute if item.name == "epsilon"), 1e-5)
    return _made(
        "GroupNormalization", [there.input[0], *names], add, num_groups=int(ones.size), epsilon=epsilon
    )


def gelu(mul: NodeProto, chains: Chains) -> NodeProto | None:
    """x / 2 * (1 + erf(x / sqrt 2)), or its approximation with tanh, in any order of its factors."""
    factors, number = _factors(mul, chains) if mul.op_type in ("Mul", "Div") else ([], 0.0)
    if len(factors) != 2 or abs(number - 0.5) > _CLOSE:
        return None
    before = list(chains.used)
    for x, gate in (factors, factors[::-1]):
        chains.used = list(before)
        one = chains.maker(gate, "Add")
        shifted = None if one is None else chains.scalar(one)
        if shifted is None or abs(shifted[1] - 1) > _CLOSE:
            continue
        curve = chains.maker(shifted[0], "Erf", "Tanh")
        if curve is None:
            continue
        if curve.op_type == "Erf" and _is_scaled(curve.input[0], x, math.sqrt(0.5), chains):
            return _made("Gelu", [x], mul)
        if curve.op_type == "Tanh" and _is_cubic(curve.input[0], x, chains):
            return _made("Gelu", [x], mul, approximate="tanh")
    return None


def _factors(mul: NodeProto, chains: Chains) -> tuple[list[str], float]:
    """What a chain of products multiplies, and its number; a quotient by a number counts."""
    names: list[str] = []
    number = 1.0
    open_ = [mul]
    while open_:
        node = open_.pop()
        found = chains.scalar(node)
        if node.op_type == "Div":
            if found is None or found[0] != node.input[0]:
                return [], 0.0
            number /= found[1]
        elif found is not None:
            number *= found[1]
        for name in [found[0]] if found is not None else list(node.input):
            inner = chains.maker(name, "Mul", "Div") if len(names) + len(open_) < 4 else None
            if inner is not None and (inner.op_type == "Mul" or chains.scalar(inner) is not None):
                open_.append(inner)
            else:
                if inner is not None:
                    chains.used.remove(inner)
                names.append(name)
    return names, number


def _is_scaled(name: str, x: str, factor: float, chains: Chains) -> bool:
    node = chains.maker(name, "Mul", "Div")
    found = None if node is None else chains.scalar(node)
    if node is None or found is None or found[0] != x or not found[1]:
        return False
    number = found[1] if node.op_type == "Mul" else 1 / found[1]
    return abs(number - factor) < _CLOSE


def _is_cubic(name: str, x: str, chains: Chains) -> bool:
    """sqrt(2 / pi) * (x + 0.044715 * x**3)."""
    scaled = chains.maker(name, "Mul")
    found = None if scaled is None else chains.scalar(scaled)
    if found is None or abs(found[1] - math.sqrt(2 / math.pi)) > _CLOSE:
        return False
    added = chains.maker(found[0], "Add")
    if added is None or x not in added.input or len(added.input) != 2:
        return False
    term = chains.maker(next((item for item in added.input if item != x), ""), "Mul")
    part = None if term is None else chains.scalar(term)
    if part is None or abs(part[1] - 0.044715) > _CLOSE:
        return False
    cube = chains.maker(part[0], "Pow")
    return cube is not None and chains.scalar(cube) == (x, 3.0)


def swish(mul: NodeProto, chains: Chains) -> NodeProto | None:
    """x * sigmoid(x)."""
    if mul.op_type != "Mul" or len(mul.input) != 2:
        return None
    for x, gate in (mul.input, mul.input[::-1]):
        chains.used = []
        sigmoid = chains.maker(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.input[0] == x:
            return _made("Swish", [x], mul)
    return None


def mish(mul: NodeProto, chains: Chains) -> NodeProto | None:
    """x * tanh(softplus(x))."""
    if mul.op_type != "Mul" or len(mul.input) != 2:
        return None
    for x, gate in (mul.input, mul.input[::-1]):
        chains.used = []
        tanh = chains.maker(gate, "Tanh")
        soft = None if tanh is None else chains.maker(tanh.input[0], "Softplus")
        if soft is not None and soft.input[0] == x:
            return _made("Mish", [x], mul)
    return None


def _constant(node: NodeProto, chains: Chains) -> str:
    return str(next(name for name in node.input if name in chains.constants))


def _made(op: str, inputs: list[str], last: NodeProto, **attributes: Any) -> NodeProto:
    node = helper.make_node(op, inputs, list(last.output), last.name, **attributes)
    node.metadata_props.extend(last.metadata_props)
    return node


PATTERNS = {
    "Mul": (layer_norm, rms_norm, gelu, swish, mish),
    "Div": (gelu,),
    "Add": (layer_norm_bias, group_norm),
}
