"""Takes LSTMs and GRUs apart into steps that XNNPACK runs: linear layers, slices and gates.

Part of ``executorch.py``, whose runtime has no recurrent operator. The products with the inputs are made for
all steps at once.

    LSTM (Hochreiter and Schmidhuber 1997):  c' = f c + i g,   h' = o tanh(c')
    GRU (Cho et al. 2014, arXiv:1406.1078):  h' = n + z (h - n),   n = tanh(x_n + r h_n)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from featherweight.errors import TargetError

_ATEN = torch.ops.aten
_MOST_STEPS = 512


def unroll(node: fx.Node) -> None:
    """Replace one ``aten.lstm.input`` or ``aten.gru.input`` whose sizes are fixed."""
    _Steps(node).write()


class _Steps:
    def __init__(self, node: fx.Node) -> None:
        arguments: Any = node.args
        x, states, parameters, biased, layers, _, _, both, batch_first = arguments
        self.node = node
        self.call = node.graph.call_function
        self.gated = node.target is _ATEN.gru.input
        self.states: Sequence[fx.Node] = [states] if self.gated else states
        self.parameters = parameters
        self.biased, self.layers, self.batch_first = bool(biased), int(layers), bool(batch_first)
        self.directions = 2 if both else 1
        self.x = x
        axis = 1 if self.batch_first else 0
        sizes = [int(size) for size in self.x.meta["val"].shape]
        self.length, self.batch = sizes[axis], sizes[1 - axis]
        self.width = int(self.states[0].meta["val"].shape[-1])
        if self.length > _MOST_STEPS:
            raise TargetError(
                f"executorch has no recurrent operator, and {self.length} steps are too many to write out",
                fix=f"use sequences of at most {_MOST_STEPS} steps, or another runtime",
            )

    def write(self) -> None:
        with self.node.graph.inserting_before(self.node):
            made = self._outputs()
        for reader in list(self.node.users):
            if reader.target is operator.getitem:
                value = made[int(reader.args[1])]  # type: ignore[arg-type]
                value.meta = dict(reader.meta)
                reader.replace_all_uses_with(value)
                self.node.graph.erase_node(reader)
        self.node.graph.erase_node(self.node)

    def _outputs(self) -> list[fx.Node]:
        """The sequence of the last layer, and each kind of state at the end."""
        x = self.x
        if self.batch_first:
            x = self.call(_ATEN.transpose.int, (x, 0, 1))
        lasts: list[list[fx.Node]] = [[] for _ in self.states]
        for layer in range(self.layers):
            sequences = []
            for direction in range(self.directions):
                place = layer * self.directions + direction
                sequence, ends = self._direction(x, place, backwards=direction == 1)
                sequences.append(sequence)
                for kind, end in zip(lasts, ends, strict=True):
                    kind.append(end)
            x = sequences[0] if len(sequences) == 1 else self.call(_ATEN.cat.default, (sequences, 2))
        if self.batch_first:
            x = self.call(_ATEN.transpose.int, (x, 0, 1))
        return [x, *(self._stack(kind) for kind in lasts)]

    def _stack(self, steps: list[fx.Node]) -> fx.Node:
        """(batch, width) each -> (so many, batch, width)."""
        rows = self.call(_ATEN.cat.default, (steps, 0)) if len(steps) > 1 else steps[0]
        return self._reshape(rows, [len(steps), self.batch, self.width])

    def _direction(self, x: fx.Node, place: int, *, backwards: bool) -> tuple[fx.Node, list[fx.Node]]:
        per = 4 if self.biased else 2
        weights = self.parameters[place * per : (place + 1) * per]
        biases = weights[2:] if self.biased else (None, None)
        gates = 3 if self.gated else 4
        given = self.call(_ATEN.linear.default, (x, weights[0], biases[0]))  # (length, batch, gates * width)
        states = [
            self._reshape(self._cut(state, 0, place, 1), [self.batch, self.width]) for state in self.states
        ]
        outputs: list[fx.Node] = []
        steps = range(self.length)
        for step in reversed(steps) if backwards else steps:
            now = self._reshape(self._cut(given, 0, step, 1), [self.batch, gates * self.width])
            before = self.call(_ATEN.linear.default, (states[0], weights[1], biases[1]))
            states = self._gru(now, before, states) if self.gated else self._lstm(now, before, states)
            outputs.append(states[0])
        return self._stack(outputs[::-1] if backwards else outputs), states

    def _lstm(self, now: fx.Node, before: fx.Node, states: list[fx.Node]) -> list[fx.Node]:
        total = self.call(_ATEN.add.Tensor, (now, before))
        i, f, g, o = (self._cut(total, 1, k * self.width, self.width) for k in range(4))
        kept = self._mul(self._sigmoid(f), states[1])
        added = self._mul(self._sigmoid(i), self._tanh(g))
        cell = self.call(_ATEN.add.Tensor, (kept, added))
        return [self._mul(self._sigmoid(o), self._tanh(cell)), cell]

    def _gru(self, now: fx.Node, before: fx.Node, states: list[fx.Node]) -> list[fx.Node]:
        (r, z, n), (hr, hz, hn) = (
            [self._cut(x, 1, k * self.width, self.width) for k in range(3)] for x in (now, before)
        )
        reset = self._sigmoid(self.call(_ATEN.add.Tensor, (r, hr)))
        update = self._sigmoid(self.call(_ATEN.add.Tensor, (z, hz)))
        new = self._tanh(self.call(_ATEN.add.Tensor, (n, self._mul(reset, hn))))
        change = self.call(_ATEN.sub.Tensor, (states[0], new))
        return [self.call(_ATEN.add.Tensor, (new, self._mul(update, change)))]

    def _cut(self, x: fx.Node, axis: int, start: int, length: int) -> fx.Node:
        return self.call(_ATEN.slice.Tensor, (x, axis, start, start + length))

    def _reshape(self, x: fx.Node, shape: list[int]) -> fx.Node:
        return self.call(_ATEN.reshape.default, (x, shape))

    def _mul(self, x: fx.Node, y: fx.Node) -> fx.Node:
        return self.call(_ATEN.mul.Tensor, (x, y))

    def _sigmoid(self, x: fx.Node) -> fx.Node:
        return self.call(_ATEN.sigmoid.default, (x,))

    def _tanh(self, x: fx.Node) -> fx.Node:
        return self.call(_ATEN.tanh.default, (x,))
