"""Ranges by the error of what reads them: better than least squares where that matters, and never worse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.data import Data
from featherweight.formats import IntQuant
from featherweight.graph import trace
from featherweight.methods.quantize import Quantize
from featherweight.model import Model
from featherweight.tools.integers import WEIGHTED
from featherweight.tools.output_ranges import Readers, readers_of_ranges
from featherweight.tools.simulate import simulate
from golden import context, data, folded, model_of, target

TORCH = target("torch")


def formats(net: Model, examples: Data, **parameters: Any) -> Model:
    return Quantize.model_validate(parameters).apply(net, context(net, examples, TORCH))


def error(net: Model, stored: Model, x: Tensor) -> float:
    with torch.no_grad():
        return float((simulate(stored)(x)[0] - simulate(net)(x)[0]).square().sum())


class Loud(nn.Module):
    """Of two channels the reader hears the quiet one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(2))
            self.second.weight.copy_(torch.tensor([[1.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_range_follows_what_its_reader_hears() -> None:
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0])
    net = model_of(Loud(), x[:2])
    asked = {"activations": "int4", "where": {"exclude": ["first"]}}
    plain = formats(net, Data.of(x_train=x.numpy()), **asked)
    found = formats(net, Data.of(x_train=x.numpy()), range="output", **asked)
    before, after = plain.formats["first#0:0"][0], found.formats["first#0:0"][0]
    assert isinstance(before, IntQuant)
    assert isinstance(after, IntQuant)
    assert after.high - after.low < 0.8 * (before.high - before.low)
    assert error(net, found, x) < 0.5 * error(net, plain, x)


@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_golden_nets_lose_no_more(name: str) -> None:
    net, examples = folded(name), data(name)
    asked = {"activations": "int4"}
    batch = torch.cat([torch.from_numpy(arrays[0]) for arrays in examples.calibration()])
    plain = formats(net, examples, **asked)
    found = formats(net, examples, range="output", **asked)
    assert set(found.formats) == set(plain.formats)
    assert error(net, found, batch) < error(net, plain, batch)
    again = formats(net, examples, range="output", **asked)
    for value, (fmt,) in found.formats.items():
        (same,) = again.formats[value]
        if isinstance(fmt, IntQuant) and isinstance(same, IntQuant):
            assert torch.equal(fmt.high, same.high)


def test_what_only_moves_shares_the_range_and_is_looked_through() -> None:
    net = folded("residual")
    found = formats(net, data("residual"), range="output", activations="int4")
    assert found.formats["/flatten#0:0"][0] is found.formats["pool#0:0"][0]
    values = {"pool#0:0": "pool#0:0", "/flatten#0:0": "pool#0:0", "layer1.relu#1:0": "layer1.relu#1:0"}
    readers = readers_of_ranges(trace(net), values, {}, set(WEIGHTED))
    assert readers["pool#0:0"] == Readers(("head#0",), False)
    assert readers["layer1.relu#1:0"].layers == ("layer2.conv1#0", "layer2.shortcut.0#0")
    assert "pool#0:0" not in readers_of_ranges(trace(net), values, {"pool#0:0": "x"}, set(WEIGHTED))
