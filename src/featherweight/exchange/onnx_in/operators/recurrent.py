"""RNN, LSTM and GRU as torch's layers, with ONNX's axes (T, N, C) and order of gates changed at import."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.exchange.onnx_in.node import Call, Entry, Node, Weight
from featherweight.exchange.onnx_in.operators.recurrent_steps import cell_of, inputs_of

_RNN_GATES = (0,)
_LSTM_GATES = (0, 2, 3, 1)  # ONNX: input, output, forget, cell; torch: input, forget, cell, output
_GRU_GATES = (1, 0, 2)  # ONNX: update, reset, new; torch: reset, update, new


_KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "RNN": (nn.RNN, _RNN_GATES),
    "LSTM": (nn.LSTM, _LSTM_GATES),
    "GRU": (nn.GRU, _GRU_GATES),
}


class Recurrent(nn.Module):
    """Calls a layer of torch with ONNX's shapes: outputs (T, directions, N, H), states (directions, N, H)."""

    def __init__(self, cell: nn.RNNBase, batch_first: bool, backwards: bool = False) -> None:
        super().__init__()
        self.cell = cell
        self.batch_first = batch_first
        self.backwards = backwards

    def forward(self, x: Tensor, hidden: Tensor | None, memory: Tensor | None) -> tuple[Tensor, ...]:
        if self.batch_first:
            x = x.transpose(0, 1)
        if self.backwards:
            x = torch.flip(x, (0,))
        ways = 2 if self.cell.bidirectional else 1
        state = self._state(x, ways, hidden, memory)
        outputs, last = self.cell(x, state)
        if self.backwards:
            outputs = torch.flip(outputs, (0,))
        steps, batch, _ = x.shape
        split = outputs.reshape(steps, batch, ways, self.cell.hidden_size).transpose(1, 2)
        states = last if isinstance(last, tuple) else (last,)
        if self.batch_first:
            return split.permute(2, 0, 1, 3), *(item.transpose(0, 1) for item in states)
        return split, *states

    def _state(self, x: Tensor, ways: int, hidden: Tensor | None, memory: Tensor | None) -> Any:
        zeros = x.new_zeros(ways, x.shape[1], self.cell.hidden_size)
        given = [zeros if item is None else item for item in (hidden, memory)]
        if self.batch_first:
            given = [item if item is zeros else item.transpose(0, 1) for item in given]
        return tuple(given) if isinstance(self.cell, nn.LSTM) else given[0]


def _recurrent(node: Node) -> Call:
    kind, gates = _KINDS[node.op]
    settings = cell_of(node)
    peepholes = node.op == "LSTM" and node.has(7)
    if not (settings.usual and node.all_fixed(1, 2, 3) and _full(node)) or peepholes:
        return Call(settings, inputs=inputs_of(node))
    weight = node.fixed(1, "weight")
    ways, count = len(settings.functions), 2 * len(gates)
    hidden = weight.shape[1] // len(gates)
    own = {"nonlinearity": settings.activations[0][0]} if node.op == "RNN" else {}
    with torch.device("meta"):
        cell = kind(weight.shape[2], hidden, bias=node.has(3), bidirectional=ways == 2, **own)
    weights = []
    for way in range(ways):
        end = "_l0_reverse" if way else "_l0"
        weights += [
            _part(f"cell.weight_ih{end}", 1, way, gates),
            _part(f"cell.weight_hh{end}", 2, way, gates),
        ]
        if node.has(3):
            weights += [
                _part(f"cell.bias_ih{end}", 3, way, gates, slice(0, count // 2)),
                _part(f"cell.bias_hh{end}", 3, way, gates, slice(count // 2, count)),
            ]
    layer = Recurrent(cell, settings.batch_first, settings.direction == "reverse")
    return Call(layer, inputs=(0, 5, 6 if node.op == "LSTM" else 99), weights=tuple(weights))


def _part(name: str, index: int, way: int, gates: tuple[int, ...], half: slice | None = None) -> Weight:
    """One direction's rows (of a bias: one half of them), with the gates in torch's order."""

    def apply(array: np.ndarray) -> np.ndarray:
        rows = array[way]
        if half is not None:
            rows = rows.reshape(2 * len(gates), -1)[half].reshape(-1)
        blocks = rows.reshape(len(gates), -1, *rows.shape[1:])
        return np.concatenate([blocks[gate] for gate in gates])

    return Weight(name, index, f"gates {gates} of {way} {half}", apply)


def _full(node: Node) -> bool:
    """Whether every sequence is as long as the tensor, by a constant or by arithmetic on its own shape."""
    if not node.has(4):
        return True
    lengths = node.constant(4)
    if lengths is None and isinstance(node.examples[node.inputs[4]], np.ndarray):
        lengths = node.examples[node.inputs[4]]
    steps = node.shape(0)[1 if node.integer("layout", 0) else 0]
    return lengths is not None and bool(np.all(lengths == steps))


ENTRIES: dict[str, Entry] = {"RNN": _recurrent, "LSTM": _recurrent, "GRU": _recurrent}
