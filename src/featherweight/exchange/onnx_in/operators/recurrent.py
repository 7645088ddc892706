"""LSTM and GRU as torch's own layers, with ONNX's axes (T, N, C) and order of gates changed at import."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.exchange.onnx_in.node import Call, Entry, Node, UnsupportedError, Weight

_LSTM_GATES = (0, 2, 3, 1)  # ONNX: input, output, forget, cell; torch: input, forget, cell, output
_GRU_GATES = (1, 0, 2)  # ONNX: update, reset, new; torch: reset, update, new


class Recurrent(nn.Module):
    """Calls an LSTM or GRU with ONNX's shapes: outputs (T, directions, N, H), states (directions, N, H)."""

    def __init__(self, cell: nn.LSTM | nn.GRU, batch_first: bool) -> None:
        super().__init__()
        self.cell = cell
        self.batch_first = batch_first

    def forward(self, x: Tensor, hidden: Tensor | None, memory: Tensor | None) -> tuple[Tensor, ...]:
        if self.batch_first:
            x = x.transpose(0, 1)
        ways = 2 if self.cell.bidirectional else 1
        state = self._state(x, ways, hidden, memory)
        outputs, last = self.cell(x, state)
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


def _recurrent(node: Node, kind: type[nn.LSTM] | type[nn.GRU], gates: tuple[int, ...], memory: int) -> Call:
    weight = node.fixed(1, "weight")
    node.fixed(2, "recurrence weight")
    direction = node.text("direction", "forward")
    if direction not in ("forward", "bidirectional"):
        raise UnsupportedError(f"its direction is '{direction}'")
    ways = 2 if direction == "bidirectional" else 1
    count = 2 * len(gates)
    default = ["Sigmoid", "Tanh", "Tanh"] if kind is nn.LSTM else ["Sigmoid", "Tanh"]
    chosen = node.attributes.get("activations")
    if chosen is not None and [item.decode().lower() for item in chosen.strings] != [
        name.lower() for name in default * ways
    ]:
        raise UnsupportedError("its activations are not the usual ones")
    if "clip" in node.attributes or node.integer("input_forget", 0) or node.has(7 if kind is nn.LSTM else 99):
        raise UnsupportedError("it clips, couples gates or has peepholes")
    hidden = weight.shape[1] // len(gates)
    with torch.device("meta"):
        cell = kind(weight.shape[2], hidden, bias=node.has(3), bidirectional=ways == 2)
    weights = []
    for way in range(ways):
        end = "_l0_reverse" if way else "_l0"
        weights += [
            _part(f"cell.weight_ih{end}", 1, way, gates),
            _part(f"cell.weight_hh{end}", 2, way, gates),
        ]
        if node.has(3):
            node.fixed(3, "bias")
            weights += [
                _part(f"cell.bias_ih{end}", 3, way, gates, slice(0, count // 2)),
                _part(f"cell.bias_hh{end}", 3, way, gates, slice(count // 2, count)),
            ]
    _check_lengths(node)
    layer = Recurrent(cell, batch_first=bool(node.integer("layout", 0)))
    return Call(layer, inputs=(0, 5, memory), weights=tuple(weights))


def _part(name: str, index: int, way: int, gates: tuple[int, ...], half: slice | None = None) -> Weight:
    """One direction's rows (of a bias: one half of them), with the gates in torch's order."""

    def apply(array: np.ndarray) -> np.ndarray:
        rows = array[way]
        if half is not None:
            rows = rows.reshape(2 * len(gates), -1)[half].reshape(-1)
        blocks = rows.reshape(len(gates), -1, *rows.shape[1:])
        return np.concatenate([blocks[gate] for gate in gates])

    return Weight(name, index, f"gates {gates} of {way} {half}", apply)


def _check_lengths(node: Node) -> None:
    if not node.has(4):
        return
    lengths = node.constant(4)
    if lengths is None or np.any(lengths != node.shape(0)[0]):
        raise UnsupportedError("it has sequences of different lengths")


def _lstm(node: Node) -> Call:
    return _recurrent(node, nn.LSTM, _LSTM_GATES, 6)


def _gru(node: Node) -> Call:
    if not node.integer("linear_before_reset", 0):
        raise UnsupportedError("it applies the reset gate before the product (linear_before_reset=0)")
    return _recurrent(node, nn.GRU, _GRU_GATES, 99)


ENTRIES: dict[str, Entry] = {"LSTM": _lstm, "GRU": _gru}
