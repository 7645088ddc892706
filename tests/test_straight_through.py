"""Gradients of rounding against the formulas of LSQ, and against differences where they are smooth."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.formats import IntQuant, PerChannel, PerGroup, PerTensor
from featherweight.straight_through import nearest, rounded, scaled_gradient


def written_out(x: Tensor, scale: Tensor, zero_point: Tensor, least: int, most: int) -> Tensor:
    """Oracle: LSQ as its paper writes it, by autograd: round passes gradients, clamp stops them."""
    steps = x / scale
    whole = steps + (steps.round() - steps).detach() + zero_point
    return (whole.clamp(least, most) - zero_point) * scale


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, int]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = draw(st.integers(0, 4))
    x = torch.randn(max(rows, 1), 9, generator=generator)
    shape = (rows, 1) if rows else ()
    scale = torch.rand(shape, generator=generator) * draw(st.sampled_from((0.05, 0.5, 3.0))) + 0.01
    least, most = draw(st.sampled_from(((-7, 7), (0, 15), (-1, 1), (-128, 127), (1, 255))))
    zero = torch.randint(least, most + 1, shape, generator=generator).float()
    return x, scale, zero, least, most


@given(cases())
def test_gradients_are_those_of_lsq(case: tuple[Tensor, Tensor, Tensor, int, int]) -> None:
    found = []
    for function in (rounded, written_out):
        x, scale, zero = (one.clone().requires_grad_() for one in case[:3])
        made = function(x, scale, zero, *case[3:])
        (made * torch.linspace(-1, 2, made.numel()).reshape(made.shape)).sum().backward()
        found.append((made.detach(), x.grad, scale.grad, zero.grad))
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * max(1.0, float(other.abs().max())))


def test_the_step_size_gradient_is_equation_3_of_the_paper() -> None:
    """round(v) - v inside, the ends of the grid outside."""
    scale = torch.tensor(0.5, requires_grad=True)
    for value, wanted in ((0.6, 1 - 1.2), (0.9, 2 - 1.8), (-0.2, 0 + 0.4), (9.0, 7.0), (-9.0, -7.0)):
        scale.grad = None
        rounded(torch.tensor([value]), scale, torch.tensor(0.0), -7, 7).sum().backward()
        assert scale.grad is not None
        assert scale.grad.item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.3), (0.0, 1.7), (-0.3, 6.0)])
def test_beyond_the_range_the_ends_follow_one_to_one(low: float, high: float) -> None:
    """As in PACT (arXiv:1805.06085): what is clipped pulls its own end of the range, up to the zero point."""
    ends = [torch.tensor(low, requires_grad=True), torch.tensor(high, requires_grad=True)]
    fmt = IntQuant(ends[0], ends[1], 8)
    fmt.project(torch.tensor([100.0])).sum().backward()
    assert ends[1].grad is not None
    assert ends[1].grad.item() == pytest.approx(1.0, abs=0.5 / 255 + 1e-6)
    for end in ends:
        end.grad = None
    fmt.project(torch.tensor([-100.0])).sum().backward()
    assert ends[0].grad is not None
    assert ends[0].grad.item() == pytest.approx(1.0, abs=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_of_a_clipped_value_is_that_of_differences(symmetric: bool) -> None:
    """Beyond the grid nothing is rounded, so the function is smooth in a symmetric range; else nearly so."""
    x, step = torch.tensor([50.0, -70.0, 90.0]), 1e-2

    def value(high: Tensor) -> Tensor:
        return (
            IntQuant(-high if symmetric else torch.tensor(0.0), high, 4, symmetric, signed=symmetric)
            .project(x)
            .sum()
        )

    high = torch.tensor(2.0, requires_grad=True)
    value(high).backward()
    difference = (value(high.detach() + step) - value(high.detach() - step)) / (2 * step)
    assert high.grad is not None
    assert high.grad.item() == pytest.approx(float(difference), rel=1e-3)


@given(
    st.sampled_from((PerTensor(), PerChannel(0), PerChannel(1), PerGroup(1, 4))),
    st.booleans(),
    st.booleans(),
    st.integers(2, 8),
    st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_learned_ranges_give_the_same_values_to_the_last_bit(
    granularity: PerTensor | PerChannel | PerGroup, symmetric: bool, signed: bool, width: int, seed: int
) -> None:
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed))
    shape = {PerTensor(): (), PerChannel(0): (6,), PerChannel(1): (10,), PerGroup(1, 4): (6, 3)}[granularity]
    low, high = torch.full(shape, -0.7), torch.full(shape, 1.9)
    plain = IntQuant(low, high, width, symmetric, granularity, signed)
    learned = IntQuant(
        low.clone().requires_grad_(), high.clone().requires_grad_(), width, symmetric, granularity, signed
    )
    assert torch.equal(learned.project(x).detach(), plain.project(x))
    made = learned.project(x.requires_grad_())
    assert torch.equal(made.detach(), plain.project(x.detach()))
    made.sum().backward()
    assert learned.low.grad is not None
    assert learned.low.grad.shape == shape


@given(st.floats(1e-4, 10), st.integers(0, 255), st.integers(0, 2**31))
def test_nearest_is_torchs_kernel(scale: float, zero_point: int, seed: int) -> None:
    scale = float(torch.tensor(scale))
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * scale * 100
    wanted = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)
    assert torch.equal(nearest(x, scale, zero_point, 0, 255), wanted)


def test_what_is_no_number_stays_none_and_infinity_is_clamped() -> None:
    made = IntQuant(torch.tensor(-1.0), torch.tensor(1.0)).project(
        torch.tensor([math.nan, math.inf, -math.inf])
    )
    assert made[0].isnan()
    assert made[1:].tolist() == pytest.approx([1.0, -1.0], abs=0.01)


def test_half_precision_values_are_rounded_in_float32() -> None:
    x = torch.randn(50).bfloat16().requires_grad_()
    fmt = IntQuant(torch.tensor(-1.0, requires_grad=True), torch.tensor(1.0), 4)
    made = fmt.project(x)
    assert made.dtype == torch.bfloat16
    assert torch.equal(made.detach(), fmt.project(x.detach().float()).bfloat16().detach())
    made.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_a_scaled_gradient_changes_nothing_else() -> None:
    x = torch.randn(5, requires_grad=True)
    made = scaled_gradient(x, torch.tensor(3.0))
    made.sum().backward()
    assert torch.equal(made, x)
    assert torch.equal(x.grad, torch.full((5,), 3.0))  # type: ignore[arg-type]
