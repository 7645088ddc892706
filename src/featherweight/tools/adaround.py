"""AdaRound: learn for each weight of a layer whether to round it up or down.

Not the weights' own error is made small but that of what the layer gives, behind the activation function
that follows it, on inputs as the quantized network before it makes them (Nagel et al. 2020,
arXiv:2004.10568, eq. 25)::

    min_v  E |f(W x) - f(W(v) x_stored)|^2 / E_nearest + sum over weights of (1 - |2 h(v) - 1| ** beta)

with the rectified sigmoid h (tools/softround.py) and beta from 20 down to 2. One layer at a time; its
inputs live in the scratch memory of the walk. Of large maps random windows are compared. At the end each
row keeps the best of what was learned, what it began at and the nearest, over all examples: behind the
activation function, among those that are no worse than the nearest in front of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.graph import Graph, Node
from featherweight.method import Progress, Scratch, Silent, in_memory
from featherweight.model import Model
from featherweight.tools.partition import BlockRun, Picker
from featherweight.tools.simulate import project, readers_of
from featherweight.tools.softround import SoftRounding, annealed, penalty, rate_for, roundable
from featherweight.tools.walk import Stop, Stream, walk

_CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp", "hardswish", "silu", "gelu", "leaky_relu"})
_ROWS = 16
_WINDOW = 24  # positions along each side of a map that one step looks at
_TOKENS = 1024  # rows of a matrix that one step looks at
_WARM = 0.2  # share of the iterations without a penalty
_SILENT = Silent()


def adaround(
    model: Model,
    reference: Model,
    batches: Sequence[tuple[Tensor, ...]],
    *,
    weights: Collection[str],
    iterations: int = 1000,
    seed: int = 0,
    entry: str = "forward",
    start: Mapping[str, Tensor] | None = None,
    progress: Progress = _SILENT,
    scratch: Scratch = in_memory,
) -> dict[str, Tensor]:
    """Weights rounded so that each layer's output error is small.

    Args:
        model: With formats.
        reference: The same network as float.
        batches: Flat inputs.
        weights: Parameters with a format to round.
        iterations: Steps of the optimiser per layer.
        seed: Of everything random.
        entry: Which way of calling the module.
        start: On-grid weights to begin near, e.g. of GPTQ; absent ones begin at the float weight.
        progress: One bar over all layers.
        scratch: Where layer inputs live.

    Returns:
        Parameter name -> on-grid float tensor.
    """
    weights = roundable(model, weights)
    generator = torch.Generator().manual_seed(seed)
    done: dict[str, Tensor] = {}
    stops = walk(model, reference, batches, scratch, entry)
    total = len(weights)
    bar = iter(progress.track(range(total), "rounding layers", total))
    for stop in stops:
        names = [name for name in dict.fromkeys(stop.node.parameters.values()) if name in weights]
        names = [name for name in names if name not in done]
        if not names:
            continue
        layer = _Layer(stop, names, model, start or {}, generator, scratch)
        if stop.node.op == "embedding":  # there nearest is best
            done |= layer.nearest
        else:
            done |= layer.best(stop, layer.optimised(iterations))
        for name in names:
            stop.stored.set_parameter(name, done[name])
            next(bar)
    for _ in bar:
        continue
    return done


class _Layer:
    """One layer: its inputs in the quantized network, and what it gives in the float one."""

    def __init__(
        self,
        stop: Stop,
        names: Sequence[str],
        model: Model,
        start: Mapping[str, Tensor],
        generator: torch.Generator,
        scratch: Scratch,
    ) -> None:
        stored, exact, node = stop.stored, stop.exact, stop.node
        self._node, self._generator = node, generator
        after = _activation(stored.graph, node)
        self._calls = [node.fx_name] + ([after.fx_name] if after else [])
        self._output = self._calls[-1]
        self._run = BlockRun(stored.graph, self._calls)
        self._activation = BlockRun(stored.graph, self._calls[1:])
        twins = {one.name: one.fx_name for one in exact.graph.nodes}
        theirs = [twins[one.name] for one in (node, after) if one]
        target = BlockRun(exact.graph, theirs)
        parameters = _Lazy(exact)
        self._inputs = {
            stored.graph.values[name].fx_name: [stored.value(name, batch) for batch in range(stored.count)]
            for name in dict.fromkeys(node.inputs)
        }
        self._reads = {  # by the formats in which this operator alone reads them
            stored.graph.values[name].fx_name: tuple(
                fmt for fmt in model.formats.get(name, ()) if node.op in readers_of(fmt)
            )
            for name in node.inputs
        }
        self._targets: list[Tensor] = []
        with torch.no_grad():
            for batch in range(exact.count):
                reads = {
                    exact.graph.values[name].fx_name: exact.value(name, batch) for name in stop.twin.inputs
                }
                self._targets.append(scratch(_first(target(reads, parameters)[theirs[-1]])))
        self._parameters = _Lazy(stored)
        self._soft = {
            name: SoftRounding(exact.parameter(name).detach(), model.formats[name][0], start.get(name))
            for name in names
        }
        self.nearest = {
            name: project(exact.parameter(name).detach(), model.formats[name]).contiguous() for name in names
        }
        self._begun = {name: start.get(name, self.nearest[name]) for name in names}
        self._first = next(iter(self._inputs))
        self._picker = Picker.of(stored.graph, self._first, self._inputs[self._first])

    def optimised(self, iterations: int) -> dict[str, Tensor]:
        """The weights, on their grids."""
        with torch.no_grad():
            hard = {name: one.soft((one.share() >= 0.5).float()) for name, one in self._soft.items()}
            scale = max(float(torch.stack([self._error(hard) for _ in range(4)]).mean()), 1e-12)
        optimiser = torch.optim.Adam([one.v for one in self._soft.values()], lr=rate_for(iterations))
        for iteration in range(iterations):
            shares = {name: one.share() for name, one in self._soft.items()}
            loss = self._error({name: one.soft(shares[name]) for name, one in self._soft.items()}) / scale
            progress = iteration / iterations
            if progress >= _WARM:
                undecided = [penalty(some, annealed(progress, warm=_WARM)) for some in shares.values()]
                loss = loss + torch.stack(undecided).mean()
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
        return {name: one.hard() for name, one in self._soft.items()}

    @torch.no_grad()
    def best(self, stop: Stop, learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of each row the best of what was learned, what it began at, and the nearest."""
        options = [learned, self._begun, self.nearest]
        before, behind = (
            torch.stack(each) for each in zip(*map(self._errors, [stop] * 3, options), strict=True)
        )
        behind[before > before[-1]] = torch.inf
        choice = behind.argmin(0)  # of even ones the first
        kept: dict[str, Tensor] = {}
        for name, last in self.nearest.items():
            rows = choice.reshape(-1, *[1] * (last.dim() - 1)) if len(choice) > 1 else choice[0]
            kept[name] = torch.where(
                rows == 0, learned[name], torch.where(rows == 1, self._begun[name], last)
            )
        return kept

    def _errors(self, stop: Stop, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Squared errors over all examples, in front of and behind the activation function.

        Of each row of the weight where a row makes one channel of the output, else of all together.
        """
        axis = _channels(self._node) if len(weights) == 1 else None
        sums = [torch.zeros(1, dtype=torch.float64) for _ in range(2)]
        for batch in range(stop.stored.count):
            made = _first(stop.stored.compute(self._node, batch, parameters=weights))
            wanted = (
                _first(stop.exact.compute(stop.twin, batch)) if len(self._calls) > 1 else self._targets[batch]
            )
            sums[0] = sums[0] + _squares(made - wanted, axis)
            if len(self._calls) > 1:
                made = self._activation({self._calls[0]: made}, self._parameters)[self._output]
                sums[1] = sums[1] + _squares(made - self._targets[batch], axis)
        return sums[0], sums[1] if len(self._calls) > 1 else sums[0].clone()

    def _error(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Mean squared error on some random rows, or windows of them."""
        picks = self._picker.draw(_ROWS, self._generator)
        if self._node.op == "conv2d" and _cuttable(self._node, self._targets[0]):
            return self._window_error(picks, weights)
        inputs = {
            name: project(self._picker.take(name, values, picks), self._reads[name])
            for name, values in self._inputs.items()
        }
        target: Tensor = self._picker.take(self._output, self._targets, picks)
        if self._node.op == "linear":
            x = inputs[self._first].flatten(0, -2)
            target = target.flatten(0, -2)
            some = torch.randperm(len(x), generator=self._generator)[:_TOKENS]
            inputs[self._first], target = x[some], target[some]
        made = _first(self._run(inputs, self._parameters.with_values(weights))[self._output])
        return (made - target).square().mean()

    def _window_error(self, picks: Mapping[int, Sequence[int]], weights: Mapping[str, Tensor]) -> Tensor:
        """The error of a random window of a convolution's map."""
        node, values = self._node, self._inputs[self._first]
        parameters = self._parameters.with_values(weights)
        weight = parameters[node.parameters["weight"]]
        stride, padding, dilation = (_pair(node, key, one) for key, one in _GEOMETRY)
        where: list[tuple[slice, slice]] = []
        zeros: list[int] = []
        for axis in (0, 1):
            size, full = self._targets[0].shape[2 + axis], values[0].shape[2 + axis]
            first = int(torch.randint(max(size - _WINDOW, 0) + 1, (1,), generator=self._generator))
            last = min(first + _WINDOW, size)
            begin = first * stride[axis] - padding[axis]
            end = (
                (last - 1) * stride[axis] - padding[axis] + dilation[axis] * (weight.shape[2 + axis] - 1) + 1
            )
            where.append((slice(max(begin, 0), min(end, full)), slice(first, last)))
            zeros = [max(-begin, 0), max(end - full, 0), *zeros]
        (rows_in, rows_out), (columns_in, columns_out) = where
        rows = [(batch, slice(row, row + 1)) for batch, some in picks.items() for row in some]
        x = torch.cat([values[batch][row, :, rows_in, columns_in] for batch, row in rows])
        x = project(x, self._reads[self._first])
        target = torch.cat([self._targets[batch][row, :, rows_out, columns_out] for batch, row in rows])
        bias = node.parameters.get("bias")
        made = functional.conv2d(
            functional.pad(x, zeros) if any(zeros) else x,
            weight,
            None if bias is None else parameters[bias],
            stride,
            0,
            dilation,
            int(node.attributes.get("groups", 1)),
        )
        if len(self._calls) > 1:
            made = self._activation({self._calls[0]: made}, parameters)[self._output]
        return (made - target).square().mean()


_GEOMETRY = (("stride", 1), ("padding", 0), ("dilation", 1))


_SPATIAL = {"linear": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3}  # axes of the output behind its channels


def _channels(node: Node) -> int | None:
    """Axis of the output that the rows of the weight make; None where they make no single one."""
    return -1 - _SPATIAL[node.op] if node.op in _SPATIAL else None


def _squares(error: Tensor, axis: int | None) -> Tensor:
    """Sums of squares along an axis, or of everything, float64."""
    squares = error.double().square()
    return squares.sum().reshape(1) if axis is None else squares.movedim(axis, 0).flatten(1).sum(1)


def _first(result: Any) -> Tensor:
    """What an operator returns, or the first of several."""
    made: Tensor = result if isinstance(result, Tensor) else result[0]
    return made


def _pair(node: Node, key: str, default: int) -> tuple[int, int]:
    value: Any = node.attributes.get(key, default)
    values = [value] if isinstance(value, int) else list(value)
    return (int(values[0]), int(values[-1]))


def _cuttable(node: Node, target: Tensor) -> bool:
    """Whether a convolution's map is larger than a window, and its padding is told in numbers."""
    plain = not isinstance(node.attributes.get("padding", 0), str) and "weight" in node.parameters
    return plain and max(target.shape[2:]) > _WINDOW and len(node.inputs) == 1


def _activation(graph: Graph, node: Node) -> Node | None:
    """The activation function that alone reads a layer's output."""
    (output, *others) = node.outputs
    readers = graph.consumers[output]
    if others or output in graph.outputs or len(readers) != 1 or readers[0].op not in _CLAMPS:
        return None
    return readers[0] if len(readers[0].inputs) == 1 and not readers[0].parameters else None


class _Lazy(dict[str, Tensor]):
    """A stream's parameters by name, looked up when they are read."""

    def __init__(self, stream: Stream, values: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(values or {})
        self._stream = stream

    def __missing__(self, name: str) -> Tensor:
        return self._stream.parameter(name).detach()

    def with_values(self, values: Mapping[str, Tensor]) -> _Lazy:
        """The same with other values for some."""
        return _Lazy(self._stream, values)
