"""Reconstruct a quantized network block by block: roundings, ranges and biases learned together.

Every block of a network is made to give what it gives as float, on examples without labels::

    min over roundings, steps, biases of  E |block(x) - block_quantized(x_stored)|^2

with AdaRound's soft rounding (tools/softround.py), as in BRECQ (Li et al. 2021, arXiv:2102.05426). As in
QDrop (Wei et al. 2022, arXiv:2203.05740) values inside of the block, and its inputs, stay float at random,
element by element; steps of activations are learned as in LSQ (Esser et al. 2019, arXiv:1902.08153). Blocks
follow each other: one reads what those before it will really make.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from featherweight.formats import IntQuant, PerTensor, TensorFormat
from featherweight.graph import Graph
from featherweight.method import Progress, Scratch, Silent, in_memory
from featherweight.model import Model
from featherweight.tools.chain import Chain, State
from featherweight.tools.partition import Block, BlockRun, partition
from featherweight.tools.simulate import readers_of
from featherweight.tools.softround import SoftRounding, annealed, penalty, rate_for, roundable


@dataclass(frozen=True)
class Reconstruction:
    """What reconstruction changes.

    Attributes:
        parameters: On-grid weights, and biases of their layers, by name.
        formats: Of values and weights whose range or scale was learned.
    """

    parameters: Mapping[str, Tensor]
    formats: Mapping[str, tuple[TensorFormat, ...]]


@dataclass(frozen=True)
class Settings:
    """How a block is optimised, besides the number of iterations.

    Attributes:
        rows: Examples of one step.
        limit: Neighbouring blocks are merged while they have at most so many weights together.
        drop: Share of values that stay float in a step.
        weight_rate: Learning rate of the roundings; None: by the number of iterations.
        range_rate: Learning rate of the logarithm of a step size.
        bias_rate: Learning rate of biases, as a fraction of the size of their layer's outputs.
        regularizer: Weight of the penalty on undecided roundings, against an error of nearest rounding of 1.
    """

    rows: int = 16
    limit: int = 3
    drop: float = 0.5
    weight_rate: float | None = None
    range_rate: float = 1e-3
    bias_rate: float = 1e-3
    regularizer: float = 1.0


_WARM = 0.2  # share of the iterations without a penalty
_FINE = 8  # bits; values of fewer lose so much that elements are drawn one by one
_MOVES = frozenset(  # operators whose results are values that they read
    {"max_pool2d", "reshape", "view", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "dropout"}
)
_DEFAULTS, _SILENT = Settings(), Silent()


def reconstruct(
    model: Model,
    reference: Model,
    batches: Sequence[tuple[Tensor, ...]],
    *,
    weights: Collection[str],
    iterations: int = 1000,
    seed: int = 0,
    entry: str = "forward",
    start: Mapping[str, Tensor] | None = None,
    fixed: Collection[str] = (),
    progress: Progress = _SILENT,
    scratch: Scratch = in_memory,
    settings: Settings = _DEFAULTS,
) -> Reconstruction:
    """Learn the roundings of weights, with the ranges of values and the biases around them.

    Args:
        model: With formats.
        reference: The same network as float.
        batches: Flat inputs.
        weights: Parameters with a format to round.
        iterations: Steps of the optimiser per block.
        seed: Of everything random.
        entry: Which way of calling the module.
        start: On-grid weights to begin near, e.g. of GPTQ.
        fixed: Traced values whose range may not change.
        progress: One bar over all blocks.
        scratch: Where values between blocks live.
        settings: Of the optimiser.
    """
    weights = roundable(model, weights)
    chain = Chain(model, reference, batches, entry, scratch)
    blocks = partition(chain.graph, weights, settings.limit)
    state = State(model, entry, start or {}, set(fixed))
    generator = torch.Generator().manual_seed(seed)
    costs = [_cost(chain.graph, block, weights) for block in blocks]
    ticks = _Ticks(progress, costs, iterations)
    for block, share in zip(blocks, ticks.shares, strict=True):
        exact = chain.exact_outputs(block)
        names = [name for name in block.weights if name in weights and name not in state.done]
        if names:
            _Fit(block, names, chain, state, exact, settings, generator).run(iterations, ticks, share)
        chain.go_on(block, exact, state)
    ticks.finish()
    return Reconstruction(state.learned, state.changed)


class _Ticks:
    """One progress bar over steps that cost differently."""

    _TOTAL = 1000

    def __init__(self, progress: Progress, costs: Sequence[float], iterations: int) -> None:
        whole = sum(costs) or 1.0
        self.shares = [max(1, round(self._TOTAL * cost / whole)) for cost in costs]
        total = sum(self.shares)
        self._bar: Iterator[int] = iter(progress.track(range(total), "rounding blocks", total))
        self._left = total
        self._iterations = iterations

    def step(self, iteration: int, share: int) -> None:
        """One more iteration of a block that has this share of the bar."""
        before = share * iteration // self._iterations
        self._advance(share * (iteration + 1) // self._iterations - before)

    def _advance(self, count: int) -> None:
        for _ in range(min(count, self._left)):
            next(self._bar)
        self._left -= min(count, self._left)

    def finish(self) -> None:
        """To the end of the bar."""
        for _ in self._bar:
            pass


def _cost(graph: Graph, block: Block, weights: Collection[str]) -> float:
    """What a step of a block costs, roughly: its values, and a part of its multiplications."""
    cost = 0.0
    for node in graph.nodes:
        if node.fx_name in block.calls and set(node.parameters.values()) & set(weights):
            shape = graph.values[node.outputs[0]].shape
            sizes = [graph.parameter_shapes[name] for name in node.parameters.values() if name in weights]
            positions = math.prod(shape[2:])
            cost += positions * (shape[1] if len(shape) > 1 else 1)
            cost += positions * sum(math.prod(size) for size in sizes) / 20
    return cost


class _LearnedRange:
    """The step size of an activation's grid, on a logarithmic scale; its zero point stays."""

    def __init__(self, fmt: IntQuant) -> None:
        self.fmt = fmt
        scale, zero = fmt.grid()
        self._scale, self._zero = scale.reshape(1).clone(), zero.reshape(1).float()
        self.log = torch.zeros(1, requires_grad=True)

    def __call__(self, value: Tensor) -> Tensor:
        scale = self._scale * self.log.exp()
        done: Tensor = torch._fake_quantize_learnable_per_tensor_affine(
            value, scale, self._zero, self.fmt.quant_min, self.fmt.quant_max, 1.0
        )
        return done

    def result(self) -> IntQuant:
        """The format with the range that was learned."""
        ratio = float(self.log.detach().exp())
        return replace(self.fmt, low=self.fmt.low * ratio, high=self.fmt.high * ratio)


class _Fit:
    """The optimisation of one block."""

    def __init__(
        self,
        block: Block,
        names: Sequence[str],
        chain: Chain,
        state: State,
        exact: Mapping[str, list[Any]],
        settings: Settings,
        generator: torch.Generator,
    ) -> None:
        self._block, self._chain, self._state, self._exact = block, chain, state, exact
        self._settings, self._generator = settings, generator
        self._run = BlockRun(chain.graph, block.calls)
        self._soft = {
            name: SoftRounding(chain.exact_tensors[name], state.formats(name)[0], state.start.get(name))
            for name in names
        }
        self._biases = {
            name: chain.tensors[name].clone().requires_grad_(True) for name in self._bias_names(names)
        }
        self._ranges = self._learned_ranges()
        self._pool = _Coins(settings.drop, generator)
        self._targets = [name for name in block.outputs if _is_float(exact[name][0])]

    def _bias_names(self, names: Sequence[str]) -> list[str]:
        nodes = [node for node in self._chain.graph.nodes if node.fx_name in self._block.calls]
        nodes = [node for node in nodes if set(node.parameters.values()) & set(names)]
        found = dict.fromkeys(node.parameters["bias"] for node in nodes if "bias" in node.parameters)
        return [name for name in found if not self._state.formats(name) and name not in self._state.done]

    def _learned_ranges(self) -> dict[str, _LearnedRange]:
        """Value -> its range, one for all that share a format; only if all are made here, or moved on."""
        formats, graph = self._state.model.formats, self._chain.graph
        sharing: dict[int, list[str]] = {}
        for name in graph.values:
            for fmt in formats.get(name, ()):
                sharing.setdefault(id(fmt), []).append(name)
        made = {name for name, value in graph.values.items() if value.fx_name in self._block.calls}
        moved = {name for name, node in graph.producer.items() if node.op in _MOVES}
        found: dict[str, _LearnedRange] = {}
        for names in sharing.values():
            (fmt, *others) = formats[names[0]]
            free = names[0] in made and set(names) <= made | moved and not set(names) & self._state.done
            plain = isinstance(fmt, IntQuant) and isinstance(fmt.granularity, PerTensor)
            if free and plain and not others and not readers_of(fmt):
                assert isinstance(fmt, IntQuant)
                found |= dict.fromkeys(names, _LearnedRange(fmt))
        return found

    # ---- the loop

    def run(self, iterations: int, ticks: _Ticks, share: int) -> None:
        """Optimise, then hand over what was found."""
        settings = self._settings
        scale = self._first_error()
        groups = [
            {
                "params": [one.v for one in self._soft.values()],
                "lr": settings.weight_rate or rate_for(iterations),
            },
            *(
                {"params": [bias], "lr": settings.bias_rate * self._unit(name)}
                for name, bias in self._biases.items()
            ),
        ]
        logs = list({id(one): one.log for one in self._ranges.values()}.values())
        groups += [{"params": logs, "lr": settings.range_rate}] if logs else []
        optimiser = torch.optim.Adam(groups)
        first = [group["lr"] for group in optimiser.param_groups]
        for iteration in range(iterations):
            done = iteration / iterations
            for group, rate in zip(optimiser.param_groups, first, strict=True):
                group["lr"] = rate * _rate(done, group is optimiser.param_groups[0])
            shares = {name: one.share() for name, one in self._soft.items()}
            loss = self._error(shares) / scale
            if done >= _WARM:
                undecided = [penalty(some, annealed(done, warm=_WARM)) for some in shares.values()]
                loss = loss + settings.regularizer * torch.stack(undecided).mean()
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            ticks.step(iteration, share)
        self._hand_over()

    def _unit(self, bias: str) -> float:
        """The size of a layer's outputs, by its bias and weight."""
        nodes = [node for node in self._chain.graph.nodes if node.parameters.get("bias") == bias]
        weights = [self._chain.exact_tensors[node.parameters["weight"]] for node in nodes]
        rows = max(float(weight.flatten(1).norm(dim=1).mean()) for weight in weights)
        return max(float(self._biases[bias].detach().abs().mean()), 0.1 * rows)

    def _error(self, shares: Mapping[str, Tensor]) -> Tensor:
        """Squared error of the block's output on some random rows."""
        picks = self._chain.picker.draw(self._settings.rows, self._generator)
        take = self._chain.picker.take
        coins = (torch.rand(self._settings.rows, generator=self._generator) < self._settings.drop).tolist()
        mix, chain = self._chain.picker.mix, self._chain
        inputs = {
            name: mix(name, chain.stored[name], chain.exact[name], picks, coins)
            for name in self._block.inputs
        }
        parameters = {**self._chain.tensors, **self._biases}
        parameters |= {name: one.soft(shares[name]) for name, one in self._soft.items()}
        made = self._run(inputs, parameters, self._store, self._state.read_as)
        errors = [
            (made[name] - take(name, self._exact[name], picks)).square().mean() for name in self._targets
        ]
        return torch.stack(errors).sum()

    def _store(self, name: str, value: Tensor) -> Tensor:
        """A value as stored, or by chance as it is: element by element, at 8 bits the whole of it."""
        chain = self._state.formats(name)
        target = self._chain.graph.values[name].fx_name in self._targets
        loose = bool(chain) and not target and self._settings.drop > 0
        fine = loose and min(fmt.width for fmt in chain) < _FINE
        if loose and not fine and float(torch.rand(1, generator=self._generator)) < self._settings.drop:
            return value
        learned = self._ranges.get(name)
        rounded = self._state.store(name, value) if learned is None else learned(value)
        return self._pool.mixed(rounded, value) if fine and rounded is not value else rounded

    @torch.no_grad()
    def _first_error(self) -> float:
        shares = {name: (one.share() >= 0.5).float() for name, one in self._soft.items()}
        return max(float(torch.stack([self._error(shares) for _ in range(4)]).mean()), 1e-12)

    def _hand_over(self) -> None:
        for name, rounding in self._soft.items():
            self._state.learned[name] = rounding.hard()
        for name, bias in self._biases.items():
            self._state.learned[name] = bias.detach().clone()
        made = {id(one): (one.result(),) for one in self._ranges.values()}
        for name, one in self._ranges.items():
            self._state.changed[name] = made[id(one)]
        graph = self._chain.graph
        self._state.done |= set(self._soft) | set(self._biases) | set(self._ranges)
        self._state.done |= {n for n, v in graph.values.items() if v.fx_name in self._block.calls}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _rate(progress: float, weights: bool) -> float:
    """Factor of the learning rate: roundings end slowly decided, the others along a cosine."""
    if weights:
        return 1.0
    return 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))


class _Coins:
    """Random choices element by element, from a pool: throwing anew costs more than a layer."""

    _SIZE = 1 << 22

    def __init__(self, chance: float, generator: torch.Generator) -> None:
        self._generator = generator
        self._pool = torch.rand(self._SIZE if chance else 1, generator=generator).lt(chance).float()

    def mixed(self, value: Tensor, other: Tensor) -> Tensor:
        """``other`` by chance, else ``value``."""
        while len(self._pool) < 2 * value.numel():
            self._pool = torch.cat([self._pool, self._pool.flip(0)])
        last = len(self._pool) - value.numel()
        begin = int(torch.randint(last, (1,), generator=self._generator))
        coins = self._pool[begin : begin + value.numel()].view(value.shape)
        return torch.lerp(value, other, coins)
