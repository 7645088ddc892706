"""Bias correction: the mean of every layer's output becomes the float network's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from featherweight.graph import trace
from featherweight.method import Context
from featherweight.methods.correct_bias import CorrectBias
from featherweight.methods.quantize import Quantize
from featherweight.model import Model
from featherweight.recipe import Where
from featherweight.tools.batches import calibration_batches
from featherweight.tools.biases import own_bias
from featherweight.tools.walk import walk
from golden import context, data, folded, target


def begun(net: str) -> tuple[Model, Context]:
    start = folded(net)
    where = replace(context(start, data(net), target("torch")), models={"original": start, "float": start})
    return Quantize(weights="int3", activations="none").apply(start, where), where


def mean_errors(model: Model, where: Context) -> dict[str, float]:
    """Layer -> largest mean error of a channel, against the float network."""
    seen: dict[str, float] = {}
    batches = calibration_batches(where, 128, "test")
    graph = trace(model)
    for stop in walk(model, where.float_model(model), batches, lambda tensor: tensor):
        if own_bias(graph, stop.node) is None:
            continue
        pairs = zip(stop.exact.outputs(stop.twin), stop.stored.outputs(stop.node), strict=True)
        gap = torch.cat([exact - made for exact, made in pairs])
        axis = -1 if stop.node.op == "linear" else 1
        seen[stop.node.layer] = float(gap.movedim(axis, 0).flatten(1).mean(1).abs().max())
    return seen


@pytest.mark.parametrize("net", ["residual", "depthwise", "attention", "linear3d", "squeeze_excite"])
def test_no_layer_is_wrong_in_the_mean(net: str) -> None:
    start, where = begun(net)
    done = CorrectBias().apply(start, where)
    assert max(mean_errors(start, where).values()) > 1e-3
    assert max(mean_errors(done, where).values()) < 1e-5
    assert done.formats == start.formats
    changed = {
        name
        for name, value in done.parameters.items()
        if name not in start.parameters or not torch.equal(value, start.parameters[name])
    }
    assert changed
    assert all(name.endswith("bias") for name in changed)


def test_excluded_layers_keep_their_bias() -> None:
    start, where = begun("residual")
    done = CorrectBias(where=Where(rules=({"exclude": ["head"]},))).apply(start, where)  # type: ignore[arg-type]
    assert torch.equal(done.parameters["head.bias"], start.parameters["head.bias"])
    assert not torch.equal(done.parameters["layer1.conv1.bias"], start.parameters["layer1.conv1.bias"])


def test_a_bias_of_two_calls_is_left() -> None:
    start, where = begun("shared")
    done = CorrectBias().apply(start, where)
    assert torch.equal(done.parameters["block.bias"], start.parameters["block.bias"])
    assert not torch.equal(done.parameters["first.bias"], start.parameters["first.bias"])


def test_without_formats_nothing_changes() -> None:
    net = folded("residual")
    done = CorrectBias().apply(net, context(net, data("residual")))
    assert all(torch.equal(value, done.parameters[name]) for name, value in net.parameters.items())
