"""Recurrent networks step by step, for what torch's layers cannot do.

Peepholes, coupled gates, clipping, other activations, sequences of different lengths, and the GRU that
applies its reset gate before the product. The equations are those of the ONNX specification.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from featherweight.exchange.onnx_in.node import Node, UnsupportedError

_Activation = Callable[[Tensor], Tensor]
_DEFAULTS: dict[str, tuple[str, ...]] = {
    "RNN": ("Tanh",),
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
    "GRU": ("Sigmoid", "Tanh"),
}
_PLAIN: dict[str, _Activation] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softsign": F.softsign,
    "softplus": F.softplus,
}


@dataclass(frozen=True)
class Cell:
    """One node's settings.

    Attributes:
        op: RNN, LSTM or GRU.
        direction: forward, reverse or bidirectional.
        activations: Names, one tuple a direction.
        functions: The same as functions.
        clip: Bound on what goes into an activation; None: none.
        coupled: The LSTM's forget gate is one minus its input gate.
        reset_after: The GRU's reset gate comes after the product.
        batch_first: The layout of x and of the results.
    """

    op: str
    direction: str
    activations: tuple[tuple[str, ...], ...]
    functions: tuple[tuple[_Activation, ...], ...]
    clip: float | None
    coupled: bool
    reset_after: bool
    batch_first: bool

    @property
    def usual(self) -> bool:
        """Whether torch's own layer computes it."""
        default = tuple(name.lower() for name in _DEFAULTS[self.op])
        names = set(self.activations)
        known = names == {default} or (self.op == "RNN" and names in ({("relu",)}, {("tanh",)}))
        return known and self.clip is None and not self.coupled and (self.op != "GRU" or self.reset_after)

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        recurrence: Tensor,
        bias: Tensor | None,
        lengths: Tensor | None,
        hidden: Tensor | None,
        memory: Tensor | None = None,
        peepholes: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run over all steps; shapes as in ONNX."""
        if self.batch_first:
            x = x.transpose(0, 1)
            hidden, memory = (None if item is None else item.transpose(0, 1) for item in (hidden, memory))
        ways = weight.shape[0]
        outputs, last, cells = [], [], []
        for way in range(ways):
            backwards = self.direction == "reverse" or way == 1
            one = _Way(
                self,
                self.functions[way],
                weight[way],
                recurrence[way],
                None if bias is None else bias[way],
                None if peepholes is None else peepholes[way],
            )
            zeros = x.new_zeros(x.shape[1], recurrence.shape[2])
            start = zeros if hidden is None else hidden[way]
            seen, end, cell = one.run(
                _reversed(x, lengths) if backwards else x,
                lengths,
                start,
                zeros if memory is None else memory[way],
            )
            outputs.append(_reversed(seen, lengths) if backwards else seen)
            last.append(end)
            cells.append(cell)
        result, states = torch.stack(outputs, 1), [torch.stack(last)]
        if self.op == "LSTM":
            states.append(torch.stack(cells))
        if self.batch_first:
            return result.permute(2, 0, 1, 3), *(item.transpose(0, 1) for item in states)
        return result, *states


@dataclass(frozen=True)
class _Way:
    """One direction with its weights."""

    cell: Cell
    functions: tuple[_Activation, ...]
    weight: Tensor
    recurrence: Tensor
    bias: Tensor | None
    peepholes: Tensor | None

    def run(self, x: Tensor, lengths: Tensor | None, hidden: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        step = {"RNN": self._rnn, "LSTM": self._lstm, "GRU": self._gru}[self.cell.op]
        size = self.weight.shape[0]
        projected = F.linear(x, self.weight, None if self.bias is None else self.bias[:size])
        seen = []
        for index in range(x.shape[0]):
            new, cell = step(projected[index], hidden, memory)
            if lengths is not None:
                alive = (index < lengths)[:, None]
                hidden, memory = torch.where(alive, new, hidden), torch.where(alive, cell, memory)
                new = torch.where(alive, new, 0.0)
            else:
                hidden, memory = new, cell
            seen.append(new)
        outputs = torch.stack(seen) if seen else x.new_zeros(0, *hidden.shape)
        return outputs, hidden, memory

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.cell.clip is None else x.clamp(-self.cell.clip, self.cell.clip)

    def _product(self, hidden: Tensor, rows: slice) -> Tensor:
        size = self.weight.shape[0]
        bias = None if self.bias is None else self.bias[size:][rows]
        return F.linear(hidden, self.recurrence[rows], bias)

    def _rnn(self, x: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return self.functions[0](self._clipped(x + self._product(hidden, slice(None)))), memory

    def _lstm(self, x: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        first, middle, last = self.functions
        to_in, to_out, to_forget, new = (x + self._product(hidden, slice(None))).chunk(4, -1)
        if self.peepholes is not None:
            see_in, see_out, see_forget = self.peepholes.chunk(3)
            to_in, to_forget = to_in + see_in * memory, to_forget + see_forget * memory
        gate = first(self._clipped(to_in))
        forget = 1 - gate if self.cell.coupled else first(self._clipped(to_forget))
        memory = forget * memory + gate * middle(self._clipped(new))
        if self.peepholes is not None:
            to_out = to_out + see_out * memory
        return first(self._clipped(to_out)) * last(memory), memory

    def _gru(self, x: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        first, last = self.functions
        size = hidden.shape[-1]
        gates = first(self._clipped(x[:, : 2 * size] + self._product(hidden, slice(0, 2 * size))))
        update, reset = gates.chunk(2, -1)
        rows = slice(2 * size, 3 * size)
        if self.cell.reset_after:
            back = reset * self._product(hidden, rows)
        else:
            back = self._product(reset * hidden, rows)
        new = last(self._clipped(x[:, 2 * size :] + back))
        return (1 - update) * new + update * hidden, memory


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Backwards in time, each sequence within its own length."""
    if lengths is None:
        return torch.flip(x, (0,))
    steps = torch.arange(x.shape[0])[:, None]
    places = torch.where(steps < lengths, lengths - 1 - steps, steps).to(torch.int64)
    return torch.gather(x, 0, places[:, :, None].expand_as(x))


def cell_of(node: Node) -> Cell:
    """Read the attributes.

    Raises:
        UnsupportedError: An activation that ONNX has not, or too few of them.
    """
    direction = node.text("direction", "forward").lower()
    if direction not in ("forward", "reverse", "bidirectional"):
        raise UnsupportedError(f"its direction is '{direction}'")
    ways, count = 2 if direction == "bidirectional" else 1, len(_DEFAULTS[node.op])
    chosen = node.attributes.get("activations")
    names = [item.decode() for item in chosen.strings] if chosen is not None else []
    names = [name.lower() for name in names or _DEFAULTS[node.op] * ways]
    if len(names) != count * ways:
        raise UnsupportedError(f"it has {len(names)} activations, not {count * ways}")
    alphas, betas = list(node.numbers("activation_alpha") or ()), list(node.numbers("activation_beta") or ())
    functions = [_activation(name, alphas, betas) for name in names]
    return Cell(
        op=node.op,
        direction=direction,
        activations=tuple(tuple(names[way * count : way * count + count]) for way in range(ways)),
        functions=tuple(tuple(functions[way * count : way * count + count]) for way in range(ways)),
        clip=node.number("clip", 0.0) if "clip" in node.attributes else None,
        coupled=bool(node.integer("input_forget", 0)),
        reset_after=bool(node.integer("linear_before_reset", 0)),
        batch_first=bool(node.integer("layout", 0)),
    )


def _activation(name: str, alphas: list[float], betas: list[float]) -> _Activation:
    """One function; it takes its parameters off the lists, as the specification says."""
    if name in _PLAIN:
        return _PLAIN[name]
    if name == "affine":
        a, b = _next(alphas, 1.0), _next(betas, 0.0)
        return lambda x: a * x + b
    if name == "leakyrelu":
        a = _next(alphas, 0.01)
        return lambda x: F.leaky_relu(x, a)
    if name == "thresholdedrelu":
        a = _next(alphas, 1.0)
        return lambda x: F.threshold(x, a, 0.0)
    if name == "scaledtanh":
        a, b = _next(alphas, 1.0), _next(betas, 1.0)
        return lambda x: a * torch.tanh(b * x)
    if name == "hardsigmoid":
        a, b = _next(alphas, 0.2), _next(betas, 0.5)
        return lambda x: torch.clamp(a * x + b, 0.0, 1.0)
    if name == "elu":
        a = _next(alphas, 1.0)
        return lambda x: F.elu(x, a)
    raise UnsupportedError(f"its activation is '{name}'")


def _next(numbers: list[float], default: float) -> float:
    return numbers.pop(0) if numbers else default


def inputs_of(node: Node) -> tuple[int, ...]:
    """Positions of the inputs that a ``Cell`` is called with."""
    return (0, 1, 2, 3, 4, 5, 6, 7) if node.op == "LSTM" else (0, 1, 2, 3, 4, 5)
