"""What exporters take apart is put together again, so that methods find layers and runtimes kernels.

Each pattern looks at the last node of a chain and answers the node that the chain is, or None. A chain is
replaced only where nobody else reads what lies inside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from onnx import NodeProto, helper

from featherweight.exchange.onnx_in import transformer_patterns
from featherweight.exchange.onnx_in.read import reads

_CLOSE = 1e-6


class Chains:
    """Looks back from a node.

    Args:
        nodes: In an order in which they can run.
        constants: By name; patterns may add to them.
        readers: How many read each value; kept true as nodes are replaced.
    """

    def __init__(
        self, nodes: Sequence[NodeProto], constants: dict[str, np.ndarray], readers: Counter[str]
    ) -> None:
        self.constants, self.readers = constants, readers
        self._makers = {output: node for node in nodes for output in node.output if output}
        self.used: list[NodeProto] = []  # by the pattern at hand, its last node aside

    def maker(self, name: str, *operators: str, readers: int = 1) -> NodeProto | None:
        """The node that makes a value, if it is one of these and the value has so many readers."""
        node = self._makers.get(name)
        if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in operators:
            return None
        if self.readers[name] != readers:
            return None
        self.used.append(node)
        return node

    def split(self, node: NodeProto) -> tuple[str, np.ndarray] | None:
        """The moving input of a node of two, and the constant one."""
        if len(node.input) != 2:
            return None
        fixed = [name in self.constants for name in node.input]
        if sum(fixed) != 1:
            return None
        return node.input[fixed.index(False)], self.constants[node.input[fixed.index(True)]]

    def scalar(self, node: NodeProto) -> tuple[str, float] | None:
        """As ``split``, where the constant is one number."""
        found = self.split(node)
        if found is None or found[1].size != 1 or found[1].ndim > 1:
            return None
        return found[0], float(found[1].reshape(-1)[0])

    def replace(self, last: NodeProto, made: NodeProto) -> None:
        """Count readers anew and know who makes the result."""
        for node in (*self.used, last):
            self.readers.subtract(reads(node))
        self.readers.update(reads(made))
        self._makers |= dict.fromkeys(made.output, made)


Pattern = Callable[[NodeProto, Chains], NodeProto | None]


def put_together(
    nodes: Sequence[NodeProto], constants: dict[str, np.ndarray], readers: Counter[str]
) -> list[NodeProto]:
    """The nodes, with the chains of ``PATTERNS`` as one node each, in an order in which they can run."""
    chains = Chains(nodes, constants, readers)
    kept: dict[int, NodeProto] = {}
    for node in nodes:
        while (made := _of_patterns(node, chains)) is not None:
            chains.replace(node, made)
            for used in chains.used:
                kept.pop(id(used), None)
            node = made
        kept[id(node)] = node
    return list(kept.values())


def _of_patterns(node: NodeProto, chains: Chains) -> NodeProto | None:
    """The node that a chain is, by the first pattern that fits; each one takes a node away."""
    for pattern in PATTERNS.get(node.op_type, ()) if node.domain in ("", "ai.onnx") else ():
        chains.used = []
        if (made := pattern(node, chains)) is not None:
            return made
    return None


def _conv_bias(add: NodeProto, chains: Chains) -> NodeProto | None:
    """Conv, then Add of a constant for each channel: its bias."""
    found = _after_conv(add, chains)
    if found is None:
        return None
    conv, weight, bias, added = found
    return _conv_with(conv, add, chains, weight, added if bias is None else bias + added)


def _conv_scale(last: NodeProto, chains: Chains) -> NodeProto | None:
    """Conv, then Mul or Div by a constant for each channel: its weights are larger or smaller."""
    found = _after_conv(last, chains)
    if found is None:
        return None
    conv, weight, bias, factor = found
    if last.op_type == "Div":
        if last.input[0] not in conv.output or not factor.all():
            return None
        factor = 1 / factor
    axis, groups = _channels(conv)
    ones = [1] * (weight.ndim - 2)
    if axis == 0:  # (C_out, C_in / groups, ...)
        scaled = weight * factor.reshape(-1, 1, *ones)
    else:  # (C_in, C_out / groups, ...): each group of rows has the outputs of its own
        rows = np.repeat(factor.reshape(groups, -1), weight.shape[0] // groups, axis=0)
        scaled = weight * rows.reshape(*rows.shape, *ones)
    return _conv_with(conv, last, chains, scaled, None if bias is None else bias * factor)


def _conv_of_scaled(conv: NodeProto, chains: Chains) -> NodeProto | None:
    """Mul or Add of a constant for each channel, then Conv: in its weights; a sum only without padding."""
    before = chains.maker(conv.input[0], "Mul", "Add")
    weight, bias = _constants_of(conv, chains) or (None, None)
    found = None if before is None else chains.split(before)
    if before is None or found is None or weight is None:
        return None
    groups = _channels(conv)[1]
    constant = _per_channel(found[1], weight.shape[1] * groups, weight.ndim)
    if constant is None or (before.op_type == "Add" and _pads(conv)):
        return None
    by_output = np.repeat(constant.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    scaled = weight * by_output.reshape(*by_output.shape, *[1] * (weight.ndim - 2))
    if before.op_type == "Mul":
        made = _conv_with(conv, conv, chains, scaled, None)
    else:
        moved = scaled.reshape(len(weight), -1).sum(1)
        made = _conv_with(conv, conv, chains, weight, moved if bias is None else bias + moved)
    made.input[0] = found[0]
    return made


def _pads(conv: NodeProto) -> bool:
    automatic = next((item.s for item in conv.attribute if item.name == "auto_pad"), b"NOTSET")
    given = next((item.ints for item in conv.attribute if item.name == "pads"), ())
    return automatic not in (b"NOTSET", b"VALID", b"") or any(given)


def _constants_of(conv: NodeProto, chains: Chains) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Weight and bias of a convolution, where both are constants."""
    weight = chains.constants.get(conv.input[1])
    if weight is None or not 3 <= weight.ndim <= 5 or weight.dtype.kind != "f":
        return None
    if len(conv.input) < 3 or not conv.input[2]:
        return weight, None
    bias = chains.constants.get(conv.input[2])
    return None if bias is None else (weight, bias)


def _per_channel(constant: np.ndarray, channels: int, rank: int) -> np.ndarray | None:
    """A constant that is the same all over a channel, as (channels,); None: it is not."""
    shape = (1,) * (rank - constant.ndim) + constant.shape
    if len(shape) != rank or shape[0] != 1 or shape[1] not in (1, channels) or any(s != 1 for s in shape[2:]):
        return None
    return np.broadcast_to(constant.reshape(-1), (channels,))


def _after_conv(
    last: NodeProto, chains: Chains
) -> tuple[NodeProto, np.ndarray, np.ndarray | None, np.ndarray] | None:
    """The convolution before a node, its weight and bias, and the node's constant as (C_out,)."""
    found = chains.split(last)
    if found is None or (conv := chains.maker(found[0], "Conv", "ConvTranspose")) is None:
        return None
    if (known := _constants_of(conv, chains)) is None:
        return None
    weight, bias = known
    axis, groups = _channels(conv)
    channels = weight.shape[0] if axis == 0 else weight.shape[1] * groups
    constant = _per_channel(found[1], channels, weight.ndim)
    return None if constant is None else (conv, weight, bias, constant.astype(weight.dtype))


def _channels(conv: NodeProto) -> tuple[int, int]:
    """The weight's axis of output channels (of those of a group), and how many groups."""
    groups = next((item.i for item in conv.attribute if item.name == "group"), 1)
    return (0 if conv.op_type == "Conv" else 1), groups


def _conv_with(
    conv: NodeProto, last: NodeProto, chains: Chains, weight: np.ndarray, bias: np.ndarray | None
) -> NodeProto:
    """The convolution with other constants, which makes what the last node made."""
    made = NodeProto()
    made.CopyFrom(conv)
    made.output[0] = last.output[0]
    if weight is not chains.constants[conv.input[1]]:
        made.input[1] = f"{conv.input[1]}:{last.output[0]}"
        chains.constants[made.input[1]] = weight
    if bias is not None:
        del made.input[2:]
        made.input.append(f"{last.output[0]}:bias")
        chains.constants[made.input[2]] = bias.astype(weight.dtype)
    return made


def _hard_swish(last: NodeProto, chains: Chains) -> NodeProto | None:
    """x * clip(x + 3, 0, 6) / 6, in the orders in which exporters write it, or x * HardSigmoid(x)."""
    if last.op_type == "Mul" and (made := _gated(last, chains)) is not None:
        return made
    found = chains.scalar(last)
    if found is None or abs(found[1] - (6.0 if last.op_type == "Div" else 1 / 6)) > _CLOSE:
        return None
    product = chains.maker(found[0], "Mul")
    if product is None or len(product.input) != 2:
        return None
    for gate, x in (product.input, product.input[::-1]):
        if _is_shifted_clip(gate, x, chains):
            return _as_hard_swish(x, last)
    return None


def _gated(product: NodeProto, chains: Chains) -> NodeProto | None:
    """x * (clip(x + 3, 0, 6) / 6), or x * HardSigmoid(x) of that slope."""
    if len(product.input) != 2:
        return None
    for gate, x in (product.input, product.input[::-1]):
        chains.used = []
        if (sigmoid := chains.maker(gate, "HardSigmoid")) is not None:
            given = {item.name: item.f for item in sigmoid.attribute}
            slope, offset = given.get("alpha", 0.2), given.get("beta", 0.5)
            if sigmoid.input[0] == x and abs(slope - 1 / 6) < _CLOSE and abs(offset - 0.5) < _CLOSE:
                return _as_hard_swish(x, product)
            continue
        sixth = chains.maker(gate, "Div", "Mul")
        found = None if sixth is None else chains.scalar(sixth)
        if sixth is None or found is None:
            continue
        divided = sixth.op_type == "Div" and sixth.input[0] == found[0]
        if abs(found[1] - (6.0 if divided else 1 / 6)) < _CLOSE and _is_shifted_clip(found[0], x, chains):
            return _as_hard_swish(x, product)
    chains.used = []
    return None


def _is_shifted_clip(name: str, x: str, chains: Chains) -> bool:
    """Whether a value is clip(x + 3, 0, 6)."""
    before = len(chains.used)
    clip = chains.maker(name, "Clip")
    if clip is not None and _limits(clip, chains.constants) == (0.0, 6.0):
        shift = chains.maker(clip.input[0], "Add")
        if shift is not None and chains.scalar(shift) == (x, 3.0):
            return True
    del chains.used[before:]
    return False


def _limits(clip: NodeProto, constants: Mapping[str, np.ndarray]) -> tuple[float, float] | None:
    """Ends of a Clip, which are attributes up to opset 10 and inputs since."""
    given = {item.name: item.f for item in clip.attribute}
    ends = [given.get("min"), given.get("max")]
    for index, name in enumerate(clip.input[1:3]):
        value = constants.get(name)
        if value is not None and value.size == 1:
            ends[index] = float(value.reshape(-1)[0])
    low, high = ends
    return None if low is None or high is None else (low, high)


def _as_hard_swish(x: str, last: NodeProto) -> NodeProto:
    return helper.make_node("HardSwish", [x], list(last.output), name=last.name)


PATTERNS: Mapping[str, tuple[Pattern, ...]] = {
    "Conv": (_conv_of_scaled,),
    "Add": (_conv_bias, *transformer_patterns.PATTERNS["Add"]),
    "Div": (_hard_swish, _conv_scale, *transformer_patterns.PATTERNS["Div"]),
    "Mul": (_hard_swish, _conv_scale, *transformer_patterns.PATTERNS["Mul"]),
}
