"""Two networks run call by call over all examples: what each layer reads and makes in both."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from featherweight.method import in_memory
from featherweight.model import Model
from featherweight.tools.simulate import Replay, simulate
from featherweight.tools.walk import Stream, walk
from golden import folded, inputs, quantized
from nets import NETS


def batches(net: str) -> list[tuple[Tensor, ...]]:
    examples = torch.from_numpy(inputs(net, 6))
    return [(examples[:4],), (examples[4:],)]


def outputs(stream: Stream, batch: int) -> list[Tensor]:
    return [stream.value(name, batch) for name in stream.graph.outputs]


def walked(model: Model, net: str, scratch: object = in_memory) -> tuple[Stream, Stream]:
    """Both streams at the end; the float one has made all but the last call."""
    for stop in walk(model, replace(model, formats={}), batches(net), scratch):  # type: ignore[arg-type]
        last = stop
    return last.exact, last.stored


@pytest.mark.parametrize("net", sorted(NETS))
def test_it_ends_in_what_the_simulation_gives(net: str) -> None:
    model = quantized(net)
    _, stored = walked(model, net)
    with torch.no_grad():
        for index, batch in enumerate(batches(net)):
            for seen, wanted in zip(outputs(stored, index), simulate(model)(*batch), strict=True):
                torch.testing.assert_close(seen, wanted)


@pytest.mark.parametrize("net", ["residual", "concat", "attention"])
def test_each_stop_reads_float_values_beside_stored_ones(net: str) -> None:
    model = quantized(net)
    float_values: dict[str, Tensor] = {}

    def observe(name: str, value: Tensor) -> Tensor:
        float_values[name] = value
        return value

    with torch.no_grad():
        Replay(replace(model, formats={}))(batches(net)[0], observe)
        seen = 0
        for stop in walk(model, replace(model, formats={}), batches(net), in_memory):
            for name in stop.node.inputs:
                torch.testing.assert_close(stop.exact.value(name, 0), float_values[name])
            made = next(stop.exact.outputs(stop.twin))
            torch.testing.assert_close(made, float_values[stop.node.outputs[0]])
            seen += 1
    assert seen == len(list(stop.stored.graph))


def test_what_is_set_at_a_stop_counts_from_there_on() -> None:
    model = folded("residual")
    fresh = folded("residual").copy_module()
    torch.manual_seed(3)
    changed = {name: torch.randn_like(value) for name, value in fresh.named_parameters()}
    for stop in walk(model, model, batches("residual"), in_memory):
        for name in stop.node.parameters.values():
            if name in changed:
                stop.stored.set_parameter(name, changed[name])
        last = stop
    with torch.no_grad():
        for name, value in changed.items():
            fresh.get_parameter(name).copy_(value)
        torch.testing.assert_close(outputs(last.stored, 0)[0], fresh(*batches("residual")[0]))


def test_gradients_reach_parameters_and_values_that_are_given() -> None:
    model = quantized("residual")
    for stop in walk(model, folded("residual"), batches("residual"), in_memory):
        if stop.node.op == "conv2d":
            break
    weight = stop.stored.parameter(stop.node.parameters["weight"]).clone().requires_grad_()
    value = stop.stored.value(stop.node.inputs[0], 0).clone().requires_grad_()
    made = stop.stored.compute(
        stop.node, 0, parameters={stop.node.parameters["weight"]: weight}, values={stop.node.inputs[0]: value}
    )
    made.square().sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    assert value.grad is not None and value.grad.abs().sum() > 0


def test_only_what_will_still_be_read_is_kept() -> None:
    alive: set[int] = set()
    peak = 0

    class Kept(np.ndarray):
        """Memory whose end is seen."""

        def __del__(self) -> None:
            alive.discard(id(self))

    def scratch(tensor: Tensor) -> Tensor:
        nonlocal peak
        array = tensor.detach().numpy().copy().view(Kept)
        alive.add(id(array))
        peak = max(peak, len(alive))
        return torch.from_numpy(array)

    examples = torch.randn(2, 3, 64, 64)
    chain = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(12)))
    from golden import model_of

    model = model_of(chain, examples)
    for _ in walk(model, model, [(examples,)], scratch):
        gc.collect()
    assert 0 < peak <= 8, peak
