"""Keras' LSTM, GRU and SimpleRNN as ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``, also in both directions.

Keras keeps one kernel (inputs, gates * units) with the gates i f c o of an LSTM, which is torch's order, and
z r h of a GRU, where torch has r z n. Its GRU is torch's when ``reset_after`` is set. Only the activations
that torch's layers have can be taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.exchange.keras_in.build import Call, Value, array

_GATES: Mapping[str, int] = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}
_STATES: Mapping[str, int] = {"LSTM": 2, "GRU": 1, "SimpleRNN": 1}


def recurrent(call: Call) -> Value | list[Value]:
    """One direction."""
    layer, value = call.layer, call.plain()
    kind = _checked(call, layer)
    builder = call.builder
    number = builder.function("flip", (value.number,), axis=1) if layer.go_backwards else value.number
    states = _initial(call, call.inputs[1:], _STATES[kind])
    sequence, *last = _run(call, kind, (layer,), number, states)
    outputs = [call.result(sequence if layer.return_sequences else _final(call, last[0], 0))]
    if layer.return_state:
        finals = [_final(call, state, 0) for state in last]
        outputs += [call.result(state, index=i) for i, state in enumerate(finals, 1)]
    return outputs


def bidirectional(call: Call) -> Value | list[Value]:
    """Two directions: one layer of torch where they are joined as it does, else two."""
    layer, value = call.layer, call.plain()
    forward, backward = layer.forward_layer, layer.backward_layer
    kind = _checked(call, forward)
    same = type(backward).__name__ == kind and backward.units == forward.units
    if not same or not backward.go_backwards or forward.go_backwards or len(call.inputs) > 1:
        raise call.refuse("has two directions that differ in more than direction, or initial states")
    _checked(call, backward)
    builder, mode = call.builder, layer.merge_mode
    sequence, *last = _run(call, kind, (forward, backward), value.number, ())
    pairs = [(_final(call, state, 0), _final(call, state, 1)) for state in last]
    if layer.return_sequences:
        if mode == "concat":
            joined = [sequence]
        else:
            units = forward.units
            halves = [
                builder.function("index", (sequence,), items=(None_, None_, part))
                for part in ((0, units, None), (units, None, None))
            ]
            joined = _join(call, mode, halves[0], halves[1])
    elif mode == "concat":
        joined = [builder.function("concatenate", pairs[0], axis=-1)]
    else:
        joined = _join(call, mode, *pairs[0])
    if layer.return_state:
        joined += [state for pair in zip(*pairs, strict=True) for state in pair]
    return [call.result(number, index=i) for i, number in enumerate(joined)]


None_ = (None, None, None)  # a slice of everything


def _join(call: Call, mode: str | None, one: int, other: int) -> list[int]:
    if mode is None:
        return [one, other]
    if mode == "ave":
        return [call.builder.function("average", (one, other))]
    op = {"sum": "add", "mul": "multiply"}.get(mode)
    if op is None:
        raise call.refuse(f"joins its directions by '{mode}'")
    return [call.builder.function("merge", (one, other), op=op)]


def _checked(call: Call, layer: Any) -> str:
    """The kind of a recurrent layer that torch has with these settings."""
    kind = type(layer).__name__
    if kind not in _GATES:
        raise call.refuse(f"wraps a {kind}")
    cell = layer.cell
    activation = getattr(cell.activation, "__name__", "linear")
    allowed = ("tanh", "relu") if kind == "SimpleRNN" else ("tanh",)
    if activation not in allowed:
        raise call.refuse(f"has the activation '{activation}'")
    if kind != "SimpleRNN":
        gate = getattr(cell.recurrent_activation, "__name__", "linear")
        if gate != "sigmoid":
            raise call.refuse(f"has the recurrent activation '{gate}'")
    if kind == "GRU" and not cell.reset_after:
        raise call.refuse("applies its reset gate before the product (reset_after=False)")
    if layer.stateful:
        raise call.refuse("keeps its state between calls (stateful)")
    return kind


def _initial(call: Call, states: tuple[Value, ...], wanted: int) -> tuple[int, ...]:
    if not states:
        return ()
    if len(states) != wanted:
        raise call.refuse(f"has {len(states)} initial states")
    return tuple(call.builder.function("unsqueeze", (state.number,), axis=0) for state in states)


def _run(call: Call, kind: str, layers: tuple[Any, ...], number: int, states: tuple[int, ...]) -> list[int]:
    """The sequence of outputs, and the last states (directions, N, units)."""

    def make() -> nn.Module:
        cell = layers[0].cell
        settings: dict[str, Any] = {"batch_first": True, "bidirectional": len(layers) == 2}
        settings["bias"] = bool(cell.use_bias)
        inputs, units = array(cell.kernel).shape[0], layers[0].units
        made: nn.RNNBase
        if kind == "LSTM":
            made = nn.LSTM(inputs, units, **settings)
        elif kind == "GRU":
            made = nn.GRU(inputs, units, **settings)
        else:
            made = nn.RNN(inputs, units, nonlinearity=cell.activation.__name__, **settings)
        for layer, suffix in zip(layers, ("", "_reverse"), strict=False):
            _fill(made, layer.cell, kind, suffix)
        return made

    builder, count = call.builder, _STATES[kind]
    if states and kind == "LSTM":
        return builder.layer(call.path, lambda: WithStates(make()), (number, *states), 1 + count)
    return builder.layer(call.path, make, (number, *states), 1 + count)


class WithStates(nn.Module):
    """An LSTM whose two initial states are inputs of their own."""

    def __init__(self, lstm: nn.Module) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return self.lstm(x, (h, c))


def _fill(made: nn.RNNBase, cell: Any, kind: str, suffix: str) -> None:
    kernel, recurrent_kernel = array(cell.kernel).T, array(cell.recurrent_kernel).T
    tensors = {"weight_ih": kernel, "weight_hh": recurrent_kernel}
    if cell.use_bias:
        bias = array(cell.bias)
        both = bias if bias.dim() == 2 else torch.stack([bias, torch.zeros_like(bias)])
        tensors |= {"bias_ih": both[0], "bias_hh": both[1]}
    for name, value in tensors.items():
        if kind == "GRU":
            z, r, h = value.chunk(3)
            value = torch.cat([r, z, h])
        getattr(made, f"{name}_l0{suffix}").data.copy_(value)


def _final(call: Call, state: int, direction: int) -> int:
    return call.builder.function("step", (state,), axis=0, at=direction)
