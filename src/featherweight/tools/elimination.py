"""Which channels a network can do without once the rest is solved anew: backward elimination.

A layer reads columns x with H = E[x xᵀ] (about the mean, where a bias or norm takes that up), and makes W x.
If the columns B of a channel go and W is solved anew on all others, the mean square of output j grows by::

    e_j = W_jB (H⁻¹_BB)⁻¹ W_jBᵀ
    W   <- W - W_B (H⁻¹_BB)⁻¹ H⁻¹_B:
    H⁻¹ <- H⁻¹ - H⁻¹_:B (H⁻¹_BB)⁻¹ H⁻¹_B:

exactly (Optimal Brain Surgeon on blocks; Hassibi and Stork 1993). Channels go one after the other, the one of
least loss first. What errors of different layers do to the network's outputs y is found from gradients with
random signs v, errors at different positions taken as independent, so losses of all groups compare::

    loss = sum over layers and j of  e_j * E_v [ sum over positions of (d(v'y)/d out_j)² ] / E |y|²

A group's layers are those that read it. Groups that something else reads (attention, recurrent layers) are
left to ``taylor.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from featherweight.graph import Graph, Node, trace
from featherweight.method import Progress, Scratch, Silent, in_memory
from featherweight.model import Model
from featherweight.tools.columns import (
    add_square,
    axes_of,
    columns_at,
    complete,
    groups_of,
    is_product,
    positions_of,
    to_rows,
)
from featherweight.tools.groups import ChannelGroup, Channels, Member
from featherweight.tools.selection import Ranking
from featherweight.tools.simulate import module_tensors

_COLUMNS = 8192  # of a layer that are looked at, or
_PER_WEIGHT = 4  # this many for each weight of a row
_RIDGE = 1e-3  # of the mean of H's diagonal
_AT_ONCE = 256  # steps of a group; wider ones lose several channels in a step
_GATHERED = 256  # columns that go before a layer's matrix is brought up to date
_SILENT = Silent()
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


def solvable(channels: Channels, graph: Graph) -> dict[str, tuple[Member, ...]]:
    """Groups that nothing but products with weights reads -> the members of these products."""
    products = {node.parameters["weight"]: node for node in graph if is_product(node)}
    recurrent = {name for node in graph if node.op in _RECURRENT for name in node.parameters.values()}
    found: dict[str, tuple[Member, ...]] = {}
    for name, group in channels.groups.items():
        reads = group.of("reads")
        other = any(member.tensor not in products for member in reads)
        if (
            not reads
            or other
            or group.kind in ("head_dim", "hidden")
            or recurrent & {m.tensor for m in group.members}
        ):
            continue
        if all(member.axis == _input_axis(products[member.tensor]) for member in reads):
            found[name] = reads
    return found


def _input_axis(node: Node) -> int:
    return 0 if "transpose" in node.op else 1


@dataclass
class Reader:
    """A layer that reads channels.

    Attributes:
        node: Its first call.
        rows: Weight (groups, outputs, K), float64.
        second: E[x xᵀ] of its columns, (groups, K, K).
        effect: What a mean square error of 1 at each output does to the network's outputs, (groups, outputs).
        inputs: Channels that each group reads.
    """

    node: Node
    rows: Tensor
    second: Tensor
    effect: Tensor
    inputs: int


def readers_of(
    model: Model,
    weights: Collection[str],
    batches: Sequence[tuple[Tensor, ...]],
    *,
    draws: int = 1,
    seed: int = 0,
    entry: str = "forward",
    progress: Progress = _SILENT,
    scratch: Scratch = in_memory,
) -> dict[str, Reader]:
    """What elimination needs to know of layers, by their weight, from one pass over examples.

    Args:
        model: As it is.
        weights: Of the layers.
        batches: Flat inputs.
        draws: Random signs for each batch.
        seed: Of the signs and of the columns that are looked at.
        entry: Which way of calling the module.
        progress: One tick a batch.
        scratch: Where second moments live.
    """
    graph = trace(model, entry)
    nodes = {node.name: node for node in graph if is_product(node) and node.parameters["weight"] in weights}
    looks = {
        name: _Look(node, model.module.get_parameter(name_of(node)), graph) for name, node in nodes.items()
    }
    run = _Probe(model, graph, looks)
    signs = torch.Generator().manual_seed(seed)
    total = sum(batch[0].shape[0] if batch and batch[0].dim() else 1 for batch in batches)
    signal = 0.0
    for number, batch in enumerate(progress.track(batches, "looking at what layers read", len(batches))):
        run.share = {name: look.share(total, graph) for name, look in looks.items()}
        run.seed = seed + number
        outputs = run.outputs(batch)
        signal += sum(float(y.detach().double().square().sum()) for y in outputs)
        for draw in range(draws if outputs else 0):
            weighed = torch.stack([(y * _signs(y, signs)).sum() for y in outputs]).sum()
            taps = list(run.taps.items())
            slopes = torch.autograd.grad(
                weighed, [tap for _, tap in taps], retain_graph=draw < draws - 1, allow_unused=True
            )
            for (name, _), slope in zip(taps, slopes, strict=True):
                if slope is not None:
                    looks[name].feel(slope.detach())
    found: dict[str, Reader] = {}
    for name, look in looks.items():
        weight = name_of(nodes[name])
        reader = look.reader(graph, draws * max(signal, 1e-30), scratch)
        if weight in found:  # another call of the same weight
            found[weight].second = found[weight].second + reader.second
            found[weight].effect = found[weight].effect + reader.effect
        else:
            found[weight] = reader
    return found


def name_of(node: Node) -> str:
    """The weight of a product."""
    return node.parameters["weight"]


class _Look:
    """Sums over what one call reads, and over gradients at what it makes."""

    def __init__(self, node: Node, weight: Tensor, graph: Graph) -> None:
        self.node = node
        self._shape = tuple(weight.shape)
        self._rows = to_rows(node, weight.detach().double())
        groups, outputs, size = self._rows.shape
        self._count = 0
        self._mean = torch.zeros(groups, size, dtype=torch.float64)
        self._second = torch.zeros(groups, size, size, dtype=torch.float64)
        self._origin: Tensor | None = None
        self._felt = torch.zeros(groups, outputs, dtype=torch.float64)

    def share(self, examples: int, graph: Graph) -> float:
        """How many of the columns are looked at."""
        shape = graph.values[self.node.outputs[0]].shape
        each = 1
        for axis, size in enumerate(shape):
            each *= 1 if axis in (0, len(shape) - 1 - axes_of(self.node)) else size
        return min(1.0, max(_COLUMNS, _PER_WEIGHT * self._rows.shape[2]) / max(examples * each, 1))

    def see(self, x: Tensor, share: float, seed: int) -> None:
        """Add what the call reads."""
        count = positions_of(self.node, x, self._shape)
        picks = torch.arange(count)
        if share < 1:
            generator = torch.Generator().manual_seed(seed)
            picks = torch.randperm(count, generator=generator)[: max(1, round(share * count))]
        columns = columns_at(self.node, x, self._shape, picks)
        if self._origin is None:
            self._origin = columns.mean(1, keepdim=True)
        columns = columns - self._origin
        self._mean += columns.sum(1)
        add_square(self._second, columns)
        self._count += columns.shape[1]

    def feel(self, slope: Tensor) -> None:
        """Add the gradient at what the call makes."""
        channels = slope.double().square().movedim(slope.dim() - 1 - axes_of(self.node), -1)
        self._felt += channels.reshape(-1, channels.shape[-1]).sum(0).reshape(self._felt.shape)

    def reader(self, graph: Graph, signal: float, scratch: Scratch) -> Reader:
        """What was seen."""
        complete(self._second)
        mean = self._mean / max(self._count, 1)
        second = self._second / max(self._count, 1) - mean[:, :, None] * mean[:, None]
        if self._origin is not None and not _shifts(graph, self.node):
            mean = mean + self._origin[:, 0]
            second = second + mean[:, :, None] * mean[:, None]
        inputs = self._shape[1] if _input_axis(self.node) else self._shape[0] // groups_of(self.node)
        return Reader(self.node, self._rows, scratch(second), self._felt / signal, inputs)


def _shifts(graph: Graph, node: Node) -> bool:
    """Whether a bias, or a norm behind it, takes up a change of the mean."""
    readers = graph.consumers[node.outputs[0]]
    return "bias" in node.parameters or (len(readers) == 1 and readers[0].op == "batch_norm")


class _Probe(fx.Interpreter):
    """Runs a program; chosen calls are looked at, and take gradients at what they make."""

    def __init__(self, model: Model, graph: Graph, looks: Mapping[str, _Look]) -> None:
        super().__init__(graph.program.graph_module)
        self._parameters = graph.parameters
        self._tensors = {name: tensor.detach() for name, tensor in module_tensors(model, graph).items()}
        self._calls = {node.fx_name: node.name for node in graph if node.name in looks}
        self._read = {
            node.fx_name: graph.values[node.inputs[0]].fx_name for node in graph if node.name in looks
        }
        self._looks = looks
        self._inputs: list[Tensor] = []
        self.taps: dict[str, Tensor] = {}
        self.share: Mapping[str, float] = {}
        self.seed = 0

    def outputs(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Flat floating outputs of one call, with gradients."""
        self._inputs, self.taps = list(inputs), {}
        with torch.enable_grad():
            made = self.run(enable_io_processing=False)
        return [y for y in made if isinstance(y, Tensor) and y.is_floating_point() and y.requires_grad]

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self._parameters:
            return self._tensors[self._parameters[target]]
        return self._inputs.pop(0)

    def run_node(self, n: fx.Node) -> Any:
        call = self._calls.get(n.name)
        if call is not None:
            (x,) = [self.env[node] for node in n.all_input_nodes if node.name == self._read[n.name]]
            self._looks[call].see(x.detach(), self.share[call], self.seed)
        result = super().run_node(n)
        if call is not None:
            result = result.view_as(result) if result.requires_grad else result.detach().requires_grad_()
            self.taps[call] = result
        return result


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).to(like.dtype) * 2 - 1


# ---- elimination


def eliminate(group: ChannelGroup, readers: Sequence[tuple[Member, Reader]]) -> Ranking:
    """The order in which a group's channels go, and the losses, all of its readers taken together.

    Args:
        group: Its channels.
        readers: The members that read them, with what is known of their layers.
    """
    solves = [_Solve(member, reader, part) for member, reader in readers for part in range(len(reader.rows))]
    order: list[int] = []
    losses = [0.0]
    left = list(range(group.size))
    step = -(-group.size // _AT_ONCE)
    while left:
        found = torch.zeros(len(left), dtype=torch.float64)
        for solve in solves:
            found += solve.losses(left)
        going = [left[place] for place in found.argsort(stable=True)[:step].tolist()]
        for channel in going:
            grown = sum(solve.remove(channel) for solve in solves)
            order.append(channel)
            losses.append(losses[-1] + max(grown, 0.0))
        left = [channel for channel in left if channel not in going]
    return Ranking(tuple(order), tuple(losses))


@dataclass
class _Blocks:
    """What is known of the channels of a layer that have so many columns each.

    Attributes:
        channels: Which, (n,).
        at: Their columns of the matrix, (n, columns).
        inner: H⁻¹_BB of each, (n, columns, columns).
        outer: W_Bᵀ W_B of each, with W as its outputs count.
    """

    channels: Tensor
    at: Tensor
    inner: Tensor
    outer: Tensor


class _Solve:
    """The weights of a layer, solved anew each time that columns go.

    The whole matrix follows when many columns went, in one product; until then their rows are kept.
    """

    def __init__(self, member: Member, reader: Reader, part: int) -> None:
        damped = reader.second[part].double().clone()
        damped.diagonal().add_(_RIDGE * damped.diagonal().mean() + 1e-12)
        factor, failed = torch.linalg.cholesky_ex(damped)
        self._inverse = torch.linalg.inv(damped) if failed else torch.cholesky_inverse(factor)
        self._rows = reader.rows[part] * reader.effect[part].sqrt()[:, None]
        positions = damped.shape[0] // reader.inputs  # of the kernel
        self._columns = {
            channel: torch.tensor([index * positions + k for index in own for k in range(positions)])
            for channel, own in enumerate(member.indices)
        }
        self._losses = torch.zeros(len(self._columns), dtype=torch.float64)
        self._begin()

    def _begin(self) -> None:
        """Nothing is gone since the matrix was whole."""
        size = max(_GATHERED, *(len(at) for at in self._columns.values()))
        self._gone: list[int] = []
        self._held = 0  # columns that went
        self._seen = torch.empty(size, len(self._inverse), dtype=torch.float64)  # their rows of H⁻¹
        self._cross = torch.empty_like(self._seen)  # (H⁻¹_BB)⁻¹ of them
        self._read = torch.empty(len(self._rows), size, dtype=torch.float64)  # their columns of W
        self._blocks = []
        for width in sorted({len(at) for at in self._columns.values()}):
            channels = [channel for channel, at in self._columns.items() if len(at) == width]
            at = torch.stack([self._columns[channel] for channel in channels])
            rows = self._rows[:, at].movedim(0, 1)
            inner = self._inverse[at[:, :, None], at[:, None]]
            self._blocks.append(_Blocks(torch.tensor(channels), at, inner, rows.mT @ rows))

    def losses(self, channels: Sequence[int]) -> Tensor:
        """What removing each channel would cost."""
        for own in self._blocks:
            solved = torch.linalg.solve(own.inner, own.outer)
            self._losses[own.channels] = solved.diagonal(dim1=1, dim2=2).sum(1)
        return self._losses[channels]

    def remove(self, channel: int) -> float:
        """Remove a channel; what it costs."""
        at = self._columns[channel]
        if self._held + len(at) > len(self._seen):
            self._settle()
            at = self._columns[channel]
        seen, cross, read = self._seen[: self._held], self._cross[: self._held], self._read[:, : self._held]
        now = slice(self._held, self._held + len(at))
        row = self._inverse[at].addmm_(seen[:, at].mT, cross, alpha=-1)
        solved = torch.linalg.solve(row[:, at], row)
        own = self._rows[:, at].addmm_(read, cross[:, at], alpha=-1)
        shared = (own.mT @ self._rows).addmm_(own.mT @ read, cross, alpha=-1)
        square = shared[:, at]
        grown = float(torch.linalg.solve(row[:, at], square).trace())
        half = shared - square @ solved / 2
        for other in self._blocks:
            x = solved[:, other.at].movedim(0, 2)  # (channels, columns, columns that go)
            other.inner -= x @ row[:, other.at].movedim(0, 1)
            change = x @ half[:, other.at].movedim(0, 1)
            other.outer -= change + change.mT
            other.inner[other.channels == channel] = torch.eye(other.at.shape[1], dtype=torch.float64)
        self._seen[now], self._cross[now], self._read[:, now] = row, solved, own
        self._held = now.stop
        self._gone.append(channel)
        return grown

    def _settle(self) -> None:
        """Bring the matrix up to date, without the columns that went."""
        stays = torch.ones(len(self._inverse), dtype=torch.bool)
        for channel in self._gone:
            stays[self._columns.pop(channel)] = False
        seen, cross = self._seen[: self._held, stays], self._cross[: self._held, stays]
        self._inverse = self._inverse[stays][:, stays].addmm_(seen.mT, cross, alpha=-1)
        self._rows = self._rows[:, stays].addmm_(self._read[:, : self._held], cross, alpha=-1)
        place = stays.cumsum(0) - 1
        self._columns = {channel: place[at] for channel, at in self._columns.items()}
        self._begin()
