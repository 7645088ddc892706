"""Layers as products of rows and columns: the same numbers as the layers make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight.graph import Node, trace
from featherweight.tools.columns import Moments, from_rows, is_product, joined, pieces, to_columns, to_rows
from golden import model_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def call(layer: nn.Module, x: Tensor) -> Node:
    (node,) = (node for node in trace(model_of(nn.Sequential(layer), x)) if is_product(node))
    return node


def product(node: Node, layer: Any, x: Tensor) -> Tensor:
    """Outputs by the product, in the layer's own order: (examples x positions, channels)."""
    rows, columns = to_rows(node, layer.weight), to_columns(node, x, layer.weight.shape)
    made = columns @ rows.mT  # (groups, n, rows)
    return made.transpose(0, 1).flatten(1) + layer.bias


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    axes = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3]))
    wide = {
        name: tuple(draw(st.integers(low, high)) for _ in range(axes))
        for name, low, high in (
            ("kernel_size", 1, 3),
            ("stride", 1, 2),
            ("dilation", 1, 2),
            ("padding", 0, 2),
        )
    }
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    transposed = draw(st.booleans())
    sizes = tuple(
        draw(st.integers(1 + wide["dilation"][axis] * (wide["kernel_size"][axis] - 1), 7))
        for axis in range(axes)
    )
    torch.manual_seed(draw(st.integers(0, 99)))
    kind: Any = (TRANSPOSED if transposed else CONVOLUTIONS)[axes - 1]
    more: dict[str, Any] = {}
    if transposed:
        wide["padding"] = tuple(
            min(p, d * (k - 1))
            for p, d, k in zip(wide["padding"], wide["dilation"], wide["kernel_size"], strict=True)
        )
        more["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(wide["stride"], wide["dilation"], strict=True)
        )
    layer = kind(inputs, outputs, groups=groups, **wide, **more)
    return layer, torch.randn(2, inputs, *sizes)


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_a_convolution_is_the_product_of_its_rows_and_columns(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    node = call(layer, x)
    with torch.no_grad():
        wanted = layer(x)
        torch.testing.assert_close(
            product(node, layer, x), wanted.movedim(1, -1).flatten(0, -2), atol=1e-4, rtol=1e-4
        )
        weight = layer.weight
        assert isinstance(weight, Tensor)
        assert torch.equal(from_rows(node, to_rows(node, weight), weight.shape), weight)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str) -> None:
    layer, x = nn.Conv2d(4, 6, (3, 2), padding=padding, dilation=(1, 2), groups=2), torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        wanted = layer(x).movedim(1, -1).flatten(0, -2)
        torch.testing.assert_close(product(call(layer, x), layer, x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 8), (3, 4, 8), (2, 3, 2, 8)])
def test_a_linear_layer_takes_any_leading_axes(shape: tuple[int, ...]) -> None:
    layer, x = nn.Linear(8, 3), torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(product(call(layer, x), layer, x), layer(x).reshape(-1, 3))


def test_pieces_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featherweight.tools.columns._PIECE", 300)
    for layer, x in ((nn.Conv2d(3, 4, 3), torch.randn(7, 3, 8, 8)), (nn.Linear(9, 2), torch.randn(50, 5, 9))):
        node = call(layer, x)
        seen = [piece for (piece,) in pieces(node, layer.weight.shape, x)]
        assert len(seen) > 1
        torch.testing.assert_close(torch.cat(seen, 1), to_columns(node, x, layer.weight.shape))


def test_a_share_is_picked_at_the_same_places_of_all_inputs() -> None:
    layer, x = nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.randn(5, 4, 8, 8)
    node = call(layer, x)
    every = {tuple(column) for column in to_columns(node, x, layer.weight.shape)[0].tolist()}
    ((one, two),) = pieces(node, layer.weight.shape, x, 2 * x, share=0.1, seed=3)
    assert one.shape == (2, 32, 18)
    assert torch.equal(2 * one, two)
    chosen = {tuple(column) for column in one[0].tolist()}
    assert chosen <= every
    assert len(chosen) == 32
    ((other,),) = pieces(node, layer.weight.shape, x, share=0.1, seed=4)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("first", [0, 1])
def test_columns_of_both_networks_may_agree(first: int) -> None:
    torch.manual_seed(0)
    exact = torch.randn(2, 40, 3) + 5
    parts = [(exact, exact.clone()), (exact, exact + 1)]
    seen = []
    for same in (False, True):
        moments = Moments(1, 3)
        for place in (first, 1 - first):
            one, two = (value[:1] for value in parts[place])
            moments.add(one, one if same and place == 0 else two)
        seen.append(moments.statistics(True))
    for name in ("float_mean", "mean", "second", "drift"):
        torch.testing.assert_close(getattr(seen[0], name), getattr(seen[1], name))


@pytest.mark.parametrize("side", [2, 512])
@pytest.mark.parametrize("centred", [True, False])
def test_moments_of_a_stream_are_those_of_all(
    centred: bool, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featherweight.tools.columns._SIDE", side)  # of blocks
    torch.manual_seed(0)
    exact = torch.randn(2, 400, 5) + 100
    stored = exact + 0.1 * torch.randn(2, 400, 5) + 0.5
    moments = Moments(2, 5)
    for start in range(0, 400, 64):
        moments.add(exact[:, start : start + 64], stored[:, start : start + 64])
    seen = moments.statistics(centred)
    halves = Moments(2, 5), Moments(2, 5)
    halves[0].add(exact[:, :150], stored[:, :150])
    halves[1].add(exact[:, 150:], stored[:, 150:])
    both = joined(halves[0].statistics(centred), halves[1].statistics(centred), centred)
    x, y = exact.double(), stored.double()
    torch.testing.assert_close(seen.float_mean, x.mean(1), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(seen.mean, y.mean(1), atol=1e-5, rtol=1e-6)
    gap = x - y
    if centred:
        gap, y = gap - gap.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    torch.testing.assert_close(seen.second, y.mT @ y / 400, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen.drift, gap.mT @ y / 400, atol=1e-5, rtol=1e-5)
    assert seen.positions == both.positions == 400
    for name in ("float_mean", "mean", "second", "drift"):
        torch.testing.assert_close(getattr(both, name), getattr(seen, name), atol=1e-5, rtol=1e-5)
