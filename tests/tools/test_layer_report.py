"""Figures of layers, held against computations by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featherweight.formats import IntQuant, PerChannel, PerGroup
from featherweight.graph import trace
from featherweight.method import Silent, in_memory
from featherweight.methods.quantize import Quantize
from featherweight.model import Entry, Model
from featherweight.tools.layer_report import (
    BINS,
    LayerFigures,
    Seen,
    binned,
    by_layer,
    layer_figures,
    weight_bits,
)
from featherweight.tools.ranges import Histogram
from featherweight.tools.simulate import Replay, layer_errors, project, projected_parameters
from golden import context, data, inputs, model, target


def quantized(net: str) -> Model:
    begun = model(net)
    return Quantize(samples=16).apply(begun, context(begun, data(net), target()))


def batches(net: str) -> list[tuple[Tensor, ...]]:
    return [(torch.from_numpy(inputs(net, 4)),), (torch.from_numpy(inputs(net, 3)),)]


def figures(net: str) -> dict[str, LayerFigures]:
    return layer_figures(quantized(net), model(net), batches(net), in_memory, Silent())


def decibels(exact: list[Tensor], seen: list[Tensor]) -> float:
    signal = sum(float(one.double().square().sum()) for one in exact)
    noise = sum(float((two - one).double().square().sum()) for one, two in zip(exact, seen, strict=True))
    return 10 * np.log10(signal / noise)


@pytest.mark.parametrize("net", ["residual", "linear3d", "shared"])
def test_alone_is_what_the_simulation_of_single_layers_says(net: str) -> None:
    wanted = layer_errors(quantized(net), batches(net))
    found = figures(net)
    assert set(found) <= set(wanted)
    assert len(found) >= 3
    for name, seen in found.items():
        assert seen.alone_db == pytest.approx(wanted[name], abs=1e-3)


@pytest.mark.parametrize("net", ["residual", "linear3d", "shared"])
def test_in_place_is_the_difference_of_both_networks_at_the_layer(net: str) -> None:
    begun, changed = model(net), quantized(net)
    exact: dict[str, list[Tensor]] = {}
    stored: dict[str, list[Tensor]] = {}

    def float_value(name: str, value: Tensor) -> Tensor:
        exact.setdefault(name, []).append(value)
        return value

    def stored_value(name: str, value: Tensor) -> Tensor:
        rounded = project(value, changed.formats.get(name, ()))
        stored.setdefault(name, []).append(rounded)
        return rounded

    with torch.no_grad():
        for batch in batches(net):
            Replay(begun)(batch, float_value)
            Replay(changed, "forward", projected_parameters(changed))(batch, stored_value)
    nodes = {node.name: node.outputs[0] for node in trace(changed).nodes}
    found = figures(net)
    assert found
    for name, seen in found.items():
        wanted = decibels(exact[nodes[name]], stored[nodes[name]])
        assert seen.in_place_db == pytest.approx(wanted, abs=1e-3)


def test_in_place_is_worse_than_alone_at_the_end() -> None:
    found = figures("residual")
    last = list(found)[-1]
    assert found[last].in_place_db < found[last].alone_db


def two_layers() -> Model:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2)).eval()
    return Model(
        module,
        {"forward": Entry((torch.zeros(2, 4),), ("x",), ("y",), {"x": {0: "batch"}})},
    )


def test_ranges_and_clipped_shares_are_those_of_the_formats() -> None:
    begun = two_layers()
    x = torch.tensor([[-3.0, -1.0, 0.0, 1.0], [0.5, 2.0, 2.6, 8.0]])
    graph = trace(begun)
    narrow = IntQuant(torch.tensor(-1.0), torch.tensor(2.0), 8)
    weight = begun.module.get_parameter("0.weight").detach()
    half = weight.abs().amax(1) / 2
    changed = begun.evolve(
        formats={
            graph.nodes[0].inputs[0]: (narrow,),
            "0.weight": (IntQuant(-half, half, 8, True, PerChannel(0), signed=True),),
        }
    )
    found = by_layer(layer_figures(changed, begun, [(x[:1],), (x[1:],)], in_memory, Silent()))
    activation = found["0"].activation
    assert activation is not None
    assert (activation.low, activation.high) == (-1.0, 2.0)
    assert (activation.seen_low, activation.seen_high) == (-3.0, 8.0)
    assert activation.clipped == 3 / 8  # -3, 2.6 and 8
    assert sum(activation.counts) == 8
    assert len(activation.counts) == BINS
    assert activation.counts[0] == activation.counts[-1] == 1
    seen = found["0"].weight
    assert seen is not None
    assert seen.high == pytest.approx(float(half.max()))
    share = float((weight.abs() > half[:, None] * (1 + 0.5 / 127)).float().mean())
    assert seen.clipped == pytest.approx(share)
    assert 0 < share < 1
    assert sum(seen.counts) == weight.numel()
    assert "2" not in found  # it has no format, nor has what it reads


def test_rounding_to_the_edge_is_not_clipping() -> None:
    grid = IntQuant(torch.tensor(0.0), torch.tensor(255.0), 8)
    seen = Seen()
    seen.add(torch.tensor([0.0, 255.0, 255.4, -0.4, 255.6, -0.6]), grid, "x")
    spread = seen.spread(grid)
    assert spread is not None
    assert spread.clipped == 2 / 6


def test_what_is_no_number_has_no_figures() -> None:
    seen = Seen()
    seen.add(torch.tensor([1.0, float("nan")]), None, "x")
    seen.add(torch.tensor([1.0]), None, "x")
    assert seen.spread(None) is None


def test_a_histogram_of_one_value_has_one_bin() -> None:
    histogram = Histogram()
    histogram.update(torch.full((5,), 2.0), "x")
    assert binned(histogram) == [5]


@pytest.mark.parametrize("values", [torch.linspace(-1, 1, 4801), torch.linspace(0, 6, 9600)])
def test_bins_are_those_of_numpy(values: Tensor) -> None:
    histogram = Histogram()
    histogram.update(values, "x")
    wanted, _ = np.histogram(values.numpy(), BINS)
    assert sum(binned(histogram)) == values.numel()
    # A bin of the histogram in memory may lie on an edge: so many values may fall on the other side of it.
    assert np.abs(np.cumsum(binned(histogram)) - np.cumsum(wanted)).max() <= 8


def test_memory_does_not_grow_with_the_examples() -> None:
    """What is kept of a stream is a histogram and two counts, whatever its length."""
    grid = IntQuant(torch.tensor(-1.0), torch.tensor(1.0), 8)
    seen = Seen()
    for _ in range(50):
        seen.add(torch.rand(1000), grid, "x")
    assert seen.count == 50_000
    assert seen.histogram.counts.numel() == 4096


def test_of_several_calls_the_worst_stands_for_the_layer() -> None:
    calls = {
        f"block#{i}": LayerFigures(30.0, value, None, None) for i, value in enumerate((20.0, 10.0, 15.0))
    }
    assert by_layer(calls)["block"].in_place_db == 10.0
    function = {"block/add#0": LayerFigures(1.0, 1.0, None, None)}
    assert list(by_layer(function)) == ["block/add#0"]


def test_figures_come_back_from_json() -> None:
    found = figures("linear3d")
    assert found
    assert {name: LayerFigures.from_json(one.to_json()) for name, one in found.items()} == found


class TestWeightBits:
    def test_of_float_are_32(self) -> None:
        assert weight_bits(model("linear3d")) == 32

    def test_count_scales(self) -> None:
        begun = two_layers()
        begun = begun.evolve(
            formats={
                "0.weight": (IntQuant(-torch.ones(3), torch.ones(3), 8, True, PerChannel(0), signed=True),),
            }
        )
        wanted = (8 * begun.formats["0.weight"][0].stored_bytes(12) + 32 * 6) / 18
        assert weight_bits(begun) == pytest.approx(wanted)
        assert weight_bits(begun) > (8 * 12 + 32 * 6) / 18

    def test_of_groups(self) -> None:
        begun = two_layers()
        ends = torch.ones(3, 2)
        grouped = begun.evolve(
            formats={"0.weight": (IntQuant(-ends, ends, 4, True, PerGroup(1, 2), signed=True),)}
        )
        assert weight_bits(grouped) == pytest.approx(
            (8 * grouped.formats["0.weight"][0].stored_bytes(12) + 192) / 18
        )
