"""What calibration shows of the channels of scaling groups: their ends, moments and some of their values.

High-bias absorption (Nagel et al. 2019, arXiv:1906.04721, section 4.1.3) moves what all values of a channel
have in common from the layer in front of a ReLU behind it::

    relu(z) = relu(z - c) + c  where z >= c;   c = max(0, mean - 3 std), and no more than the least seen
    b1' = b1 - c,   b2' = b2 + W2 c
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from featherweight.errors import DataError
from featherweight.graph import Graph, Node
from featherweight.tools.scaling import Carrier, ScalingGroup, Slot

_ABSORBED = frozenset({"relu", "relu6", "hardtanh", "clamp", "leaky_relu"})  # into the layer in front
_MOVES = frozenset(
    {"view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "chunk", "split", "slice"}
    | {"select", "dropout", "feature_dropout", "pad", "constant_pad_nd", "max_pool2d", "max_pool1d", "unbind"}
    | {"contiguous", "clone", "expand"}
)
_SHIFTED = frozenset(  # they give back a constant that is added to all that they read
    {"dropout", "flatten", "view", "reshape", "max_pool2d", "adaptive_avg_pool2d", "mean", "contiguous"}
)
_SAMPLED = 512  # values of a channel that errors are taken over
_TINY = 1e-12


class Reach:
    """What was seen of the channels of one value; memory does not grow with the stream.

    Attributes:
        low: Smallest value of each channel, where factors are made from.
        high: Largest one.
        seen_low: Smallest value over everything.
        seen_high: Largest one.
        samples: (rows, count) of values that are kept, where factors are held against.
        rows: Channel of each row.
    """

    def __init__(self, carrier: Carrier, channels: int, ceiling: float | None, per_batch: int) -> None:
        self.carrier, self.channels, self.ceiling = carrier, channels, ceiling
        self.entry, self.value = carrier.entry, carrier.value
        self._per_batch = per_batch
        index = carrier.index
        self._axes = [axis for axis in range(index.dim()) if index.shape[axis] > 1]
        flat = index.reshape(-1)
        self._held = torch.nonzero(flat >= 0).reshape(-1)
        self.rows = flat[self._held]
        self.low, self.high = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
        self.seen_low, self.seen_high = self.low.clone(), self.high.clone()
        self.count = 0
        self._sum, self._squares = (
            torch.zeros(channels, dtype=torch.float64),
            torch.zeros(channels, dtype=torch.float64),
        )
        self._kept: list[Tensor] = []

    def update(self, value: Tensor, makes: bool, holds: bool, generator: torch.Generator) -> None:
        """Add a value: ``makes`` factors, ``holds`` them against samples, or both.

        Raises:
            DataError: It has NaN or infinite elements.
        """
        if value.dim() != self.carrier.index.dim() or any(
            value.shape[axis] != self.carrier.index.shape[axis] for axis in self._axes
        ):
            return  # channels and examples share an axis
        others = [axis for axis in range(value.dim()) if axis not in self._axes]
        matrix = value.permute(*self._axes, *others).reshape(self.carrier.index.numel(), -1)
        if len(self._held) != matrix.shape[0]:
            matrix = matrix[self._held]
        low, high = torch.aminmax(matrix, dim=1)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise DataError(
                f"'{self.value}' is NaN or infinite on the calibration examples",
                fix="check the model on these examples, or exclude the layer under where",
            )
        ends = [(self.seen_low, self.seen_high)] + ([(self.low, self.high)] if makes else [])
        for lows, highs in ends:
            lows.scatter_reduce_(0, self.rows, low, "amin")
            highs.scatter_reduce_(0, self.rows, high, "amax")
        width = matrix.shape[1]
        self.count += width
        self._sum.index_add_(0, self.rows, matrix.sum(1).double())
        self._squares.index_add_(0, self.rows, matrix.square().sum(1).double())
        if holds:
            picks = torch.randint(width, (min(self._per_batch, width),), generator=generator)
            self._kept.append(matrix[:, picks])

    @property
    def samples(self) -> Tensor:
        return torch.cat(self._kept, 1) if self._kept else torch.zeros(len(self.rows), 0)

    @property
    def mean(self) -> Tensor:
        """Of each channel."""
        return self._sum / self._counts

    @property
    def squares(self) -> Tensor:
        """Mean square of each channel."""
        return self._squares / self._counts

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of each channel."""
        return (self.squares - self.mean.square()).clamp(min=0).sqrt()

    @property
    def _counts(self) -> Tensor:
        return torch.bincount(self.rows, minlength=self.channels).clamp(min=1) * max(self.count, 1)

    def extent(self) -> Tensor:
        """Largest magnitude of each channel where factors are made from, beside that of all; 0 if unseen."""
        largest = torch.maximum(-self.low, self.high).clamp(min=0)
        return torch.where(torch.isfinite(largest), largest, torch.zeros(()))

    def errors(self, factors: Tensor, bits: int) -> Tensor:
        """Mean square of each channel's rounding error at these factors, in the channel's own unit."""
        low = float((factors * self.seen_low).min().clamp(max=0))
        high = float((factors * self.seen_high).max().clamp(min=0))
        high = high if self.ceiling is None else min(high, self.ceiling)
        samples, by_row = self.samples, factors[self.rows][:, None]
        step = max(high - low, _TINY) / (2**bits - 1)
        zero = round(-low / step)
        steps = torch.round(samples * by_row / step).clamp(-zero, 2**bits - 1 - zero)
        squares = (steps * step / by_row - samples).square().mean(1)
        rows = torch.bincount(self.rows, minlength=self.channels).clamp(min=1)
        return torch.zeros(self.channels).index_add_(0, self.rows, squares) / rows


def counted(group: ScalingGroup, graphs: Mapping[str, Graph]) -> list[tuple[Carrier, float | None]]:
    """Carriers that integers hold on grids of their own, each with the ceiling of the clamp that made it.

    What a clamp alone reads becomes part of it, and what is only moved keeps the grid of where it came from.
    """
    found = []
    for carrier in group.carriers:
        graph = graphs[carrier.entry]
        made, readers = graph.producer[carrier.value], graph.consumers[carrier.value]
        if made.op in _MOVES or (len(readers) == 1 and readers[0].op in _ABSORBED):
            continue
        found.append((carrier, _ceiling(carrier, group, made)))
    return found


def _ceiling(carrier: Carrier, group: ScalingGroup, made: Node) -> float | None:
    limits = {(one.entry, one.value): one.limit for one in group.carriers}
    return limits.get((carrier.entry, made.inputs[0])) if made.inputs else None


class Energy:
    """Mean square of what a call makes about each channel's mean, added up over channels."""

    def __init__(self, entry: str, value: str, axis: int) -> None:
        self.entry, self.value, self._axis = entry, value, axis
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._count = 0

    def update(self, value: Tensor, makes: bool, holds: bool, generator: torch.Generator) -> None:
        """Add a value."""
        rows = value.movedim(self._axis, 0).flatten(1)
        self._count += rows.shape[1]
        self._sum = self._sum + rows.sum(1).double()
        self._squares = self._squares + rows.square().sum(1).double()

    @property
    def total(self) -> float:
        count = max(self._count, 1)
        squares = torch.as_tensor(self._squares) / count - (torch.as_tensor(self._sum) / count).square()
        return max(float(squares.sum()), _TINY)


Watch = Reach | Energy


@dataclass(frozen=True)
class Seen:
    """What is watched for one group.

    Attributes:
        reaches: Values that integers hold on grids of their own.
        clamped: Values in front of clamps.
        energies: Parameter of a consumer -> what its calls make.
        absorbing: The value in front of the one ReLU whose bias may be absorbed.
        biases: Weight of a consumer -> its bias.
    """

    reaches: tuple[Reach, ...]
    clamped: tuple[Reach, ...]
    energies: Mapping[str, tuple[Energy, ...]]
    absorbing: Reach | None = None
    biases: Mapping[str, str] = field(default_factory=dict)

    @property
    def watches(self) -> tuple[Watch, ...]:
        """Everything that wants to see values."""
        energies = [energy for group in self.energies.values() for energy in group]
        found: list[Watch] = [*self.reaches, *self.clamped, *energies]
        return tuple(found if self.absorbing is None else [*found, self.absorbing])

    def energy(self, slot: Slot) -> float:
        """Of a consumer's outputs at one place, the mean over its calls."""
        totals = [energy.total for energy in self.energies[slot.parameter]]
        return sum(totals) / len(totals)


def observed(
    group: ScalingGroup,
    graphs: Mapping[str, Graph],
    tensors: Mapping[str, Tensor],
    batches: int,
    errors: bool = True,
    biases: bool = True,
) -> Seen:
    """What to watch for one group over so many batches.

    Args:
        group: Any group.
        graphs: Entry -> its graph.
        tensors: Every parameter.
        batches: How many batches will be seen; every other one is sampled.
        errors: Whether rounding errors will be asked for.
        biases: Whether biases will be absorbed.
    """
    held = max(batches // 2, 1)
    reaches = tuple(
        Reach(carrier, group.channels, ceiling, -(-_SAMPLED // held))
        for carrier, ceiling in counted(group, graphs)
        if errors
    )
    clamped = tuple(Reach(one, group.channels, None, 0) for one in group.carriers if one.limit is not None)
    nodes = {(entry, node.name): node for entry, graph in graphs.items() for node in graph}
    energies = {
        slot.parameter: tuple(
            Energy(call[0], nodes[call].outputs[0], -1 if nodes[call].op == "linear" else 1)
            for call in slot.calls
        )
        for slot in group.consumers
        if errors
    }
    carrier = _absorbing(group, graphs, nodes, tensors) if biases else None
    reach = None if carrier is None else Reach(carrier, group.channels, None, 0)
    own = {
        slot.parameter: nodes[call].parameters["bias"]
        for slot in group.consumers
        for call in slot.calls
        if "bias" in nodes[call].parameters
    }
    return Seen(reaches, clamped, energies, reach, own)


def _absorbing(
    group: ScalingGroup,
    graphs: Mapping[str, Graph],
    nodes: Mapping[tuple[str, str], Node],
    tensors: Mapping[str, Tensor],
) -> Carrier | None:
    """The value in front of the one ReLU between a layer and others that take a constant into their bias."""
    biases = [slot.parameter for slot in group.producers if tensors[slot.parameter].dim() == 1]
    calls = [slot.calls for slot in group.producers]
    if len(group.producers) != 2 or len(biases) != 1 or any(len(one) != 1 for one in calls):
        return None
    made = nodes[calls[0][0]]
    graph = graphs[calls[0][0][0]]
    for slot in group.consumers:
        for call in slot.calls:
            node = nodes[call]
            if "bias" not in node.parameters or node.op.startswith("conv_transpose") or _padded(node):
                return None
            if bool((slot.index < 0).any()):
                return None
    inner = {call for slot in group.consumers for call in slot.calls}
    shared = [
        node
        for one in graphs.values()
        for node in one
        for call in inner
        if nodes[call].parameters["bias"] in node.parameters.values() and node.name != call[1]
    ]
    if shared or len(graphs) > 1:
        return None
    readers = {carrier.value: graph.consumers[carrier.value] for carrier in group.carriers}
    first = readers.get(made.outputs[0], ())
    if len(first) != 1 or first[0].op != "relu":
        return None
    entry = calls[0][0][0]
    for value, nexts in readers.items():
        for node in nexts:
            known = node.op in _SHIFTED or (entry, node.name) in inner or node is first[0]
            if not known or (value == made.outputs[0]) != (node is first[0]):
                return None
    return next(carrier for carrier in group.carriers if carrier.value == made.outputs[0])


def _padded(node: Node) -> bool:
    padding = node.attributes.get("padding", 0)
    widths = padding if isinstance(padding, (list, tuple)) else [padding]
    return node.op != "linear" and any(width != 0 for width in widths)


def absorbed(
    tensors: Mapping[str, Tensor], group: ScalingGroup, factors: Tensor, seen: Seen
) -> dict[str, Tensor]:
    """The biases on both sides of a ReLU once what its channels have in common has moved behind it.

    Args:
        tensors: Every parameter, the group's factors in them.
        group: Any group; nothing is changed where its bias cannot be absorbed.
        factors: Of the group.
        seen: What was seen before the factors were applied.
    """
    reach = seen.absorbing
    if reach is None:
        return {}
    common = torch.minimum(reach.mean - 3 * reach.deviation, reach.seen_low.double()).clamp(min=0)
    common = common * factors.double()
    if not bool((common > 0).any()):
        return {}
    changed: dict[str, Tensor] = {}
    for slot in group.producers:
        bias = tensors[slot.parameter].detach()
        if bias.dim() == 1:
            changed[slot.parameter] = (bias.double() - common[slot.index]).to(bias.dtype)
    for slot in group.consumers:
        weight = tensors[slot.parameter].detach()
        shift = (weight.double() * common[slot.index]).flatten(1).sum(1)
        name = seen.biases[slot.parameter]
        bias = changed.get(name, tensors[name].detach())
        changed[name] = (bias.double() + shift).to(bias.dtype)
    return changed
