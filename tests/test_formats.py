"""Formats: the arithmetic of uniform integers, on every grid that a runtime may ask for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.formats import (
    Binary,
    Dynamic,
    FloatCast,
    Granularity,
    IntQuant,
    PerChannel,
    PerGroup,
    PerTensor,
    TensorFormat,
    Ternary,
    decode,
    encode,
)
from featherweight.tools.ranges import weight_format

reals = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
values = st.lists(reals, min_size=1, max_size=64).map(lambda xs: torch.tensor(xs, dtype=torch.float32))


@st.composite
def grids(draw: st.DrawFn, symmetric: bool | None = None) -> IntQuant:
    """Any per-tensor grid: width, sign, headroom, range with or without zero in it."""
    ends = sorted((draw(reals), draw(reals)))
    width = draw(st.integers(2, 16))
    return IntQuant(
        torch.tensor(ends[0]),
        torch.tensor(ends[1]),
        width,
        draw(st.booleans()) if symmetric is None else symmetric,
        signed=draw(st.booleans()),
        headroom=draw(st.integers(0, min(2, width - 2))),
    )


def step(fmt: IntQuant) -> float:
    return float(fmt.grid()[0])


def ends(fmt: IntQuant) -> tuple[float, float]:
    """Smallest and largest value on the grid."""
    scale, zero_point = fmt.grid()
    return float((fmt.quant_min - zero_point) * scale), float((fmt.quant_max - zero_point) * scale)


def tied(x: Tensor, fmt: IntQuant) -> Tensor:
    """Values so near the middle of two steps that float32 may round them either way."""
    steps = x.double() / fmt.grid()[0].double()
    return ((steps - steps.floor()) - 0.5).abs() < 1e-2


@given(grids(), values)
def test_project_is_idempotent(fmt: IntQuant, x: Tensor) -> None:
    once = fmt.project(x)
    assert torch.equal(fmt.project(once), once)


@given(grids(), st.lists(st.floats(0, 1), min_size=1, max_size=64))
def test_the_error_inside_the_range_is_at_most_half_a_step(fmt: IntQuant, places: list[float]) -> None:
    low, high = min(float(fmt.low), 0.0), max(float(fmt.high), 0.0)
    x = torch.tensor([low + (high - low) * place for place in places], dtype=torch.float32)
    slack = 1e-6 * max(-low, high)  # of float32 itself
    assert (fmt.project(x) - x).abs().max() <= step(fmt) * 0.5001 + slack


@given(grids())
def test_zero_is_on_every_grid(fmt: IntQuant) -> None:
    assert fmt.project(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert fmt.quantize(torch.zeros(1)).item() == fmt.grid()[1].item()


@given(grids(), values)
def test_values_outside_are_clamped_to_the_ends(fmt: IntQuant, x: Tensor) -> None:
    low, high = ends(fmt)
    projected = fmt.project(x)
    assert projected.min() >= low
    assert projected.max() <= high
    beyond = torch.tensor([low - 2 * step(fmt) - 1, high + 2 * step(fmt) + 1])
    assert fmt.project(beyond).tolist() == pytest.approx([low, high], rel=1e-6)


@given(grids(), values)
def test_project_is_dequantize_of_quantize(fmt: IntQuant, x: Tensor) -> None:
    stored = fmt.quantize(x)
    assert stored.min() >= fmt.quant_min
    assert stored.max() <= fmt.quant_max
    both = (fmt.project(x) - fmt.dequantize(stored)).abs()
    assert not both[~tied(x, fmt)].any()
    assert both.max() <= step(fmt) * 1.001


@given(grids(symmetric=False), values)
def test_torch_agrees(fmt: IntQuant, x: Tensor) -> None:
    """Oracle: torch's own affine quantization with the same scale and zero point."""
    scale, zero_point = fmt.grid()
    seen = torch.fake_quantize_per_tensor_affine(
        x, float(scale), int(zero_point), fmt.quant_min, fmt.quant_max
    )
    both = (fmt.dequantize(fmt.quantize(x)) - seen).abs()
    assert not both[~tied(x, fmt)].any()


@given(grids(symmetric=True), values)
def test_a_symmetric_grid_is_odd(fmt: IntQuant, x: Tensor) -> None:
    kept = ~tied(x, fmt)
    assert torch.equal(fmt.project(-x)[kept], -fmt.project(x)[kept])
    assert fmt.quant_max - fmt.grid()[1] == fmt.grid()[1] - fmt.quant_min


@given(st.integers(2, 16), st.booleans(), st.booleans(), st.integers(0, 14))
def test_integers_fit_their_width(width: int, signed: bool, symmetric: bool, headroom: int) -> None:
    if headroom > width - 2:
        with pytest.raises(ValueError, match="unused"):
            IntQuant(torch.tensor(-1.0), torch.tensor(1.0), width, symmetric, PerTensor(), signed, headroom)
        return
    fmt = IntQuant(torch.tensor(-1.0), torch.tensor(1.0), width, symmetric, PerTensor(), signed, headroom)
    lowest, highest = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
    assert lowest <= fmt.quant_min < fmt.quant_max <= highest
    assert fmt.quant_max - fmt.quant_min + 1 == 2 ** (width - headroom) - symmetric


@pytest.mark.parametrize(
    ("signed", "symmetric", "headroom", "expected"),
    [
        (True, True, 0, (-127, 127)),
        (True, True, 1, (-63, 63)),
        (True, False, 0, (-128, 127)),
        (False, False, 0, (0, 255)),
        (False, True, 0, (1, 255)),
        (False, False, 1, (0, 127)),
    ],
)
def test_int8_grids(signed: bool, symmetric: bool, headroom: int, expected: tuple[int, int]) -> None:
    fmt = IntQuant(torch.tensor(-1.0), torch.tensor(1.0), 8, symmetric, PerTensor(), signed, headroom)
    assert (fmt.quant_min, fmt.quant_max) == expected


def test_a_range_behind_relu_begins_at_its_zero_point() -> None:
    """Kernels clamp at the zero point, so the activation costs nothing there."""
    scale, zero_point = IntQuant(torch.tensor(0.5), torch.tensor(6.0)).grid()
    assert int(zero_point) == 0
    assert float(scale) == pytest.approx(6.0 / 255)


class TestPerChannel:
    @given(
        st.integers(0, 2),
        st.booleans(),
        st.booleans(),
        st.lists(st.tuples(reals, reals), min_size=3, max_size=3),
        st.integers(0, 2**31),
    )
    def test_is_one_grid_a_channel(
        self, axis: int, symmetric: bool, signed: bool, pairs: list[tuple[float, float]], seed: int
    ) -> None:
        low = torch.tensor([min(pair) for pair in pairs])
        high = torch.tensor([max(pair) for pair in pairs])
        whole = IntQuant(low, high, 8, symmetric, PerChannel(axis), signed)
        x = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(seed)) * 100
        for index in range(3):
            one = replace(whole, low=low[index], high=high[index], granularity=PerTensor())
            part = x.select(axis, index)
            assert torch.equal(whole.quantize(x).select(axis, index), one.quantize(part))
            both = (whole.project(x).select(axis, index) - one.project(part)).abs()
            assert both[~tied(part, one)].max() <= 1e-5 * max(map(abs, ends(one)))

    @given(st.booleans(), st.booleans(), st.floats(-100, 100, width=32, allow_subnormal=False))
    def test_empty_and_constant_channels_are_kept(
        self, symmetric: bool, signed: bool, constant: float
    ) -> None:
        x = torch.tensor([[0.0, 0.0], [constant, constant], [-1.0, 2.0]])
        fmt = IntQuant(x.amin(1), x.amax(1), 8, symmetric, PerChannel(0), signed)
        scale, _ = fmt.grid()
        assert (scale > 0).all()
        assert torch.isfinite(scale).all()
        projected = fmt.project(x)
        assert projected[0].tolist() == [0.0, 0.0]
        assert projected[1].tolist() == pytest.approx([constant] * 2, rel=1e-5, abs=1e-8)

    def test_does_not_mix_channels(self) -> None:
        x = torch.tensor([[0.01, 0.02], [100.0, 200.0]])
        fmt = IntQuant(torch.zeros(2), x.amax(1), granularity=PerChannel(0))
        assert torch.allclose(fmt.project(x), x, rtol=5e-3)
        whole = IntQuant(torch.tensor(0.0), torch.tensor(200.0))
        assert whole.project(x)[0].tolist() == [0.0, 0.0]


class TestGradient:
    @pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_is_one_inside_the_range_and_nothing_outside(
        self, granularity: PerTensor | PerChannel, symmetric: bool
    ) -> None:
        shape = (2,) if isinstance(granularity, PerChannel) else ()
        fmt = IntQuant(-torch.ones(shape), torch.ones(shape), 8, symmetric, granularity)
        x = torch.tensor([[-3.0, -0.7, 0.0], [0.3, 0.99, 5.0]], requires_grad=True)
        (fmt.project(x) * 2).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [[0.0, 2.0, 2.0], [2.0, 2.0, 0.0]]

    @given(grids(), values)
    @settings(max_examples=30)
    def test_the_values_are_the_same_with_and_without_it(self, fmt: IntQuant, x: Tensor) -> None:
        with torch.no_grad():
            plain = fmt.project(x)
        assert torch.equal(fmt.project(x.clone().requires_grad_()).detach(), plain)


class TestStoredBytes:
    @pytest.mark.parametrize(
        ("width", "elements", "scales", "expected"),
        [(8, 100, 1, 105), (8, 100, 10, 150), (4, 100, 1, 55), (4, 101, 1, 55), (2, 3, 1, 5), (16, 5, 1, 16)],
    )
    def test_counts_integers_and_scales(self, width: int, elements: int, scales: int, expected: int) -> None:
        per_channel = scales > 1
        shape = (scales,) if per_channel else ()
        fmt = IntQuant(
            -torch.ones(shape),
            torch.ones(shape),
            width,
            granularity=PerChannel() if per_channel else PerTensor(),
        )
        assert fmt.stored_bytes(elements) == expected
        assert fmt.bits(elements) == 8 * expected / elements


class TestData:
    @given(grids())
    def test_survives_json_bit_by_bit(self, fmt: IntQuant) -> None:
        back = decode(json.loads(json.dumps(encode(fmt))))
        assert isinstance(back, IntQuant)
        assert back.low.dtype == fmt.low.dtype
        assert back.low.view(torch.int32).equal(fmt.low.view(torch.int32))
        assert back.high.view(torch.int32).equal(fmt.high.view(torch.int32))
        rest = ("width", "symmetric", "granularity", "signed", "headroom")
        assert [getattr(back, name) for name in rest] == [getattr(fmt, name) for name in rest]

    @given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=9), st.integers(0, 3))
    def test_survives_json_per_channel(self, lows: list[float], axis: int) -> None:
        low = torch.tensor(lows)
        fmt = IntQuant(low, low + low.abs(), granularity=PerChannel(axis))
        back = decode(json.loads(json.dumps(encode(fmt))))
        assert isinstance(back, IntQuant)
        assert torch.equal(back.low, fmt.low)
        assert torch.equal(back.high, fmt.high)
        assert back.granularity == PerChannel(axis)

    def test_what_is_unknown_is_refused(self) -> None:
        data = encode(IntQuant(torch.tensor(0.0), torch.tensor(1.0)))
        with pytest.raises(ValueError, match="unknown format 'Octal'"):
            decode({**data, "kind": "Octal"})
        with pytest.raises(TypeError, match="str has no JSON form"):
            encode("int8")  # type: ignore[arg-type]

    def test_learned_ranges_come_back(self) -> None:
        fmt = IntQuant(torch.tensor(0.0), torch.tensor(1.0), signed=True, headroom=1)
        trained = fmt.with_learned({"low": torch.tensor(-2.0), "high": torch.tensor(3.0)})
        assert trained.learned() == {"low": torch.tensor(-2.0), "high": torch.tensor(3.0)}
        assert (trained.signed, trained.headroom) == (True, 1)
        assert isinstance(trained, TensorFormat)


@pytest.mark.parametrize(
    ("low", "high", "width", "said"),
    [
        (torch.tensor(0.0), torch.tensor(1.0), 1, "1 bits"),
        (torch.tensor(0.0), torch.tensor(1.0), 17, "17 bits"),
        (torch.zeros(2), torch.ones(3), 8, "differ in shape"),
        (torch.tensor(0.0), torch.tensor(torch.inf), 8, "finite"),
        (torch.tensor(torch.nan), torch.tensor(1.0), 8, "finite"),
        (torch.tensor(2.0), torch.tensor(1.0), 8, "above"),
    ],
)
def test_what_is_no_grid_is_refused(low: Tensor, high: Tensor, width: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        IntQuant(low, high, width)


@pytest.mark.parametrize(
    ("shape", "granularity"), [((), PerChannel(0)), ((3,), PerTensor()), ((2, 2), PerChannel())]
)
def test_ranges_match_the_granularity(shape: tuple[int, ...], granularity: PerTensor | PerChannel) -> None:
    with pytest.raises(ValueError, match="shape"):
        IntQuant(-torch.ones(shape), torch.ones(shape), granularity=granularity)


class TestGroups:
    """One scale for each run of elements of a row."""

    def grid(self, width: int, rows: int, groups: int, size: int, axis: int = 1) -> IntQuant:
        shape = (rows, groups) if axis == 1 else (groups, rows)
        high = torch.linspace(0.5, 3.0, rows * groups).reshape(shape)
        return IntQuant(-high, high, width, True, PerGroup(axis, size), signed=True)

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("columns", [32, 37])
    def test_each_group_is_rounded_as_a_tensor_of_its_own(self, axis: int, columns: int) -> None:
        fmt = self.grid(4, 3, 5, 8, axis)
        x = torch.randn(3, columns) if axis else torch.randn(columns, 3)
        for row in range(3):
            for group in range(-(-columns // 8)):
                place = (row, slice(8 * group, 8 * group + 8))
                place = place if axis else place[::-1]
                end = fmt.high[(row, group) if axis else (group, row)]
                alone = IntQuant(-end, end, 4, True, signed=True)
                assert torch.equal(fmt.quantize(x)[place], alone.quantize(x[place]))
        assert torch.equal(fmt.project(fmt.project(x)), fmt.project(x))

    def test_survive_json(self) -> None:
        fmt = self.grid(4, 2, 3, 8)
        back = decode(json.loads(json.dumps(encode(fmt))))
        x = torch.randn(2, 24)
        assert isinstance(back, IntQuant)
        assert back.granularity == PerGroup(1, 8)
        assert torch.equal(back.project(x), fmt.project(x))

    def test_need_the_shape_of_their_groups(self) -> None:
        with pytest.raises(ValueError, match="does not fit"):
            IntQuant(-torch.ones(3), torch.ones(3), 4, True, PerGroup(1, 8))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_what_torch_rounds_to(dtype: str) -> None:
    fmt = FloatCast(dtype)  # type: ignore[arg-type]
    x = torch.cat([torch.randn(100), torch.tensor([1e-8, -1e-8, 6e4])]).requires_grad_()
    wanted = x.detach().to(getattr(torch, dtype)).float()
    assert torch.equal(fmt.project(x.detach()), wanted)
    fmt.project(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]
    assert fmt.stored_bytes(10) == 20
    assert decode(json.loads(json.dumps(encode(fmt)))) == fmt


def test_half_precision_saturates() -> None:
    assert torch.isfinite(FloatCast("float16").project(torch.tensor([1e6, -1e6]))).all()


# ---- every format at every granularity, fitted to a weight as quantize fits it

SHAPES = ((7,), (5, 9), (4, 3, 3, 3), (3, 4, 5), (6, 1, 3, 3), (2, 0), (0, 4))


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """A weight of any rank, with empty channels, single large elements, and none at all."""
    shape = draw(st.sampled_from(SHAPES[1:]))
    made = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    made *= draw(st.sampled_from((1e-6, 1.0, 1e4)))
    if draw(st.booleans()) and made.numel():
        made[draw(st.integers(0, shape[0] - 1))] = 0.0
    if draw(st.booleans()) and made.numel():
        made.view(-1)[draw(st.integers(0, made.numel() - 1))] *= 50
    return made


@st.composite
def granularities(draw: st.DrawFn) -> Granularity:
    kind = draw(st.sampled_from(("tensor", "channel", "group")))
    axis = draw(st.integers(0, 1))
    size = draw(st.integers(2, 12))
    return {"tensor": PerTensor(), "channel": PerChannel(axis), "group": PerGroup(axis, size)}[kind]


def drafted(granularity: Granularity) -> Tensor:
    return torch.ones((1,) * {PerTensor: 0, PerChannel: 1, PerGroup: 2}[type(granularity)])


@st.composite
def integers_on(draw: st.DrawFn, weight: Tensor) -> IntQuant:
    granularity = draw(granularities())
    one = drafted(granularity)
    width, symmetric = draw(st.integers(2, 16)), draw(st.booleans())
    draft = IntQuant(-one, one, width, symmetric, granularity, draw(st.booleans()))
    fitted = weight_format(weight, draft, draw(st.sampled_from(("minmax", "mse", "l1"))), 99.9)
    assert isinstance(fitted, IntQuant)
    return fitted


@st.composite
def codes_on(draw: st.DrawFn, weight: Tensor) -> Ternary | Binary:
    granularity = draw(granularities())
    one = drafted(granularity)
    draft = Ternary(one, one / 2, granularity) if draw(st.booleans()) else Binary(one, granularity)
    fitted = weight_format(weight, draft, "mse", 99.9)
    assert isinstance(fitted, Ternary | Binary)
    return fitted


class TestEveryWeight:
    @given(st.data(), weights())
    @settings(max_examples=150)
    def test_stored_integers_come_back_to_the_last_bit(self, data: st.DataObject, weight: Tensor) -> None:
        """What rounding relies on: floats on the grid stay the integers that they are, also behind JSON."""
        fmt = data.draw(integers_on(weight))
        stored = fmt.project(weight)
        again = decode(json.loads(json.dumps(encode(fmt))))
        assert isinstance(again, IntQuant)
        for grid in (fmt, again):
            assert torch.equal(grid.project(stored), stored)
            assert torch.equal(grid.quantize(stored), fmt.quantize(stored))
            assert torch.equal(grid.dequantize(grid.quantize(stored)), stored)
        chosen = fmt.quantize(torch.randn(weight.shape) * weight.abs().mean().nan_to_num())
        floats = fmt.dequantize(chosen)  # any integers of the grid, not only the nearest
        assert torch.equal(fmt.quantize(floats), chosen)
        assert torch.equal(fmt.project(floats), floats)

    @given(st.data(), weights())
    @settings(max_examples=100)
    def test_the_error_inside_the_range_is_at_most_half_a_step(
        self, data: st.DataObject, weight: Tensor
    ) -> None:
        fmt = data.draw(integers_on(weight))
        scale, zero_point = fmt.grid_of(weight)
        low, high = (fmt.quant_min - zero_point) * scale, (fmt.quant_max - zero_point) * scale
        inside = torch.minimum(torch.maximum(weight, low), high)
        error = (fmt.project(inside) - inside).abs()
        assert (error <= 0.5001 * scale + 1e-6 * inside.abs()).all()

    @given(st.data(), weights())
    @settings(max_examples=100)
    def test_zero_is_exact(self, data: st.DataObject, weight: Tensor) -> None:
        fmt = data.draw(st.one_of(integers_on(weight), codes_on(weight)))
        zeros = fmt.project(torch.zeros_like(weight))
        assert isinstance(fmt, Binary) or not zeros.any()

    @given(st.data(), weights())
    @settings(max_examples=100)
    def test_empty_channels_stay_empty(self, data: st.DataObject, weight: Tensor) -> None:
        empty = torch.zeros_like(weight)
        fmt = data.draw(st.one_of(integers_on(empty), codes_on(empty)))
        assert torch.equal(fmt.project(empty), empty)
        assert torch.isfinite(fmt.project(weight)).all()

    @given(st.data(), weights())
    @settings(max_examples=100)
    def test_bits_are_the_stored_bytes(self, data: st.DataObject, weight: Tensor) -> None:
        fmt = data.draw(st.one_of(integers_on(weight), codes_on(weight)))
        scales = (fmt.low if isinstance(fmt, IntQuant) else fmt.scale).numel()
        points = fmt.width if isinstance(fmt, IntQuant) and not fmt.symmetric else 0
        elements = weight.numel()
        assert fmt.stored_bytes(elements) == -(-(elements * fmt.width + scales * (32 + points)) // 8)
        if elements:
            assert fmt.bits(elements) * elements == pytest.approx(8 * fmt.stored_bytes(elements))
            assert fmt.bits(elements) >= fmt.width
        else:
            assert fmt.bits(0) == fmt.width

    @given(st.data(), weights())
    @settings(max_examples=60)
    def test_the_gradient_is_that_of_the_weight_inside(self, data: st.DataObject, weight: Tensor) -> None:
        fmt = data.draw(st.one_of(integers_on(weight), codes_on(weight)))
        x = weight.clone().requires_grad_()
        made = fmt.project(x)
        assert torch.equal(made.detach(), fmt.project(weight))
        made.sum().backward()
        assert x.grad is not None
        if isinstance(fmt, IntQuant):
            assert ((x.grad == 0) | (x.grad == 1) | (x.grad == 0.5)).all()  # a half on an end of the range
        else:
            assert (x.grad == 1).all()

    @given(st.data(), weights())
    @settings(max_examples=100)
    def test_groups_are_rows_of_the_flattened_kernel(self, data: st.DataObject, weight: Tensor) -> None:
        """Oracle: cut the rows up by hand and store each piece per tensor; the last one is shorter."""
        size, axis = data.draw(st.integers(2, 12)), data.draw(st.integers(0, 1))
        one = torch.ones(1, 1)
        draft = IntQuant(-one, one, 4, True, PerGroup(axis, size), True)
        fmt = weight_format(weight, draft, "minmax", 100.0)
        assert isinstance(fmt, IntQuant)
        stored = fmt.project(weight).movedim(1 - axis, 0).flatten(1)
        rows = weight.movedim(1 - axis, 0).flatten(1)
        whole = IntQuant(torch.tensor(-1.0), torch.tensor(1.0), 4, True, signed=True)
        for row, made in zip(rows, stored, strict=True):
            for piece, got in zip(row.split(size), made.split(size), strict=True):
                if piece.numel():
                    alone = weight_format(piece, whole, "minmax", 100.0)
                    assert torch.allclose(
                        alone.project(piece), got, rtol=1e-5, atol=1e-9 + 1e-6 * piece.abs().max()
                    )


class TestCodes:
    @given(st.data(), weights())
    @settings(max_examples=100)
    def test_project_is_idempotent_also_behind_json(self, data: st.DataObject, weight: Tensor) -> None:
        fmt = data.draw(codes_on(weight))
        stored = fmt.project(weight)
        back = decode(json.loads(json.dumps(encode(fmt))))
        assert type(back) is type(fmt)
        assert torch.equal(fmt.project(stored), stored)
        assert torch.equal(back.project(weight), stored)

    @given(st.lists(reals, min_size=1, max_size=10))
    def test_ternary_scales_are_the_best_of_all(self, xs: list[float]) -> None:
        """Oracle: every choice of which elements are not zero, each with its own best scale."""
        x = torch.tensor(xs, dtype=torch.float32)
        fmt = weight_format(x, Ternary(torch.tensor(1.0), torch.tensor(0.5), PerTensor()), "mse", 99)
        size = x.abs().double()
        best = float(size.square().sum())
        for mask in range(1, 1 << len(xs)):
            kept = torch.tensor([bool(mask >> i & 1) for i in range(len(xs))])
            scale = size[kept].mean()
            error = float((size[kept] - scale).square().sum() + size[~kept].square().sum())
            best = min(best, error)
        error = float((fmt.project(x).double() - x.double()).square().sum())
        assert error <= best * (1 + 1e-5) + 1e-6 * float(size.square().sum()) + 1e-12

    @given(st.lists(reals, min_size=1, max_size=30), st.floats(0, 2))
    def test_no_binary_scale_is_better(self, xs: list[float], factor: float) -> None:
        x = torch.tensor(xs, dtype=torch.float32)
        fmt = weight_format(x, Binary(torch.tensor(1.0), PerTensor()), "mse", 99)
        assert isinstance(fmt, Binary)
        other = Binary(fmt.scale * factor, PerTensor())
        errors = [float((one.project(x).double() - x.double()).square().sum()) for one in (fmt, other)]
        assert errors[0] <= errors[1] * (1 + 1e-5) + 1e-6 * float(x.double().square().sum())

    def test_values(self) -> None:
        x = torch.tensor([[-2.0, -0.4, 0.0, 0.6, 3.0]])
        ternary = Ternary(torch.tensor([1.5]), torch.tensor([0.5]))
        assert ternary.project(x).tolist() == [[-1.5, 0.0, 0.0, 1.5, 1.5]]
        assert ternary.stored_bytes(5) == 6  # 10 bits and a scale
        binary = Binary(torch.tensor([1.5]))
        assert binary.project(x).tolist() == [[-1.5, -1.5, 1.5, 1.5, 1.5]]
        assert binary.stored_bytes(5) == 5

    def test_scales_are_learned(self) -> None:
        x = torch.tensor([[-2.0, 0.1, 3.0]], requires_grad=True)
        scale = torch.tensor([1.0], requires_grad=True)
        for fmt in (Ternary(scale, torch.tensor([0.5])), Binary(scale)):
            scale.grad = None
            (fmt.project(x) * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
            assert scale.grad is not None
            assert scale.grad.item() == (99.0 if isinstance(fmt, Ternary) else 109.0)
            trained = fmt.with_learned({"scale": torch.tensor([0.4])})
            stored = trained.project(x.detach())
            assert torch.equal(trained.project(stored), stored)
            assert stored.abs().max() == torch.tensor(0.4)

    def test_a_threshold_follows_its_scale(self) -> None:
        fmt = Ternary(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
        trained = fmt.with_learned({"scale": torch.tensor([0.5, 1.0])})
        assert trained.threshold.tolist() == [0.25, 0.5]
        assert trained.project(torch.tensor([[0.3], [0.4]])).tolist() == [[0.5], [0.0]]

    @pytest.mark.parametrize(
        ("scale", "threshold", "said"),
        [
            (torch.tensor([1.0]), torch.tensor([1.0]), "below its scale"),
            (torch.tensor([1.0]), torch.tensor([-1.0]), "at least 0"),
            (torch.tensor([-1.0]), torch.tensor([0.5]), "finite and at least 0"),
            (torch.tensor([torch.inf]), torch.tensor([0.5]), "finite"),
            (torch.tensor(1.0), torch.tensor(0.5), "does not fit"),
        ],
    )
    def test_what_would_not_stay_is_refused(self, scale: Tensor, threshold: Tensor, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            Ternary(scale, threshold)


class TestDynamic:
    @given(st.integers(2, 16), st.booleans(), st.booleans(), st.sampled_from(("tensor", "token")), values)
    def test_the_range_is_that_of_the_values_at_hand(
        self, width: int, symmetric: bool, signed: bool, per: str, x: Tensor
    ) -> None:
        fmt = Dynamic(width, symmetric, signed, per)  # type: ignore[arg-type]
        rows = torch.stack([x, x * 0.01])
        stored = fmt.project(rows)
        span = [rows] if per == "tensor" else [rows[:1], rows[1:]]
        for part, got in zip(span, stored.split(2 if per == "tensor" else 1), strict=True):
            fixed = IntQuant(part.min(), part.max(), width, symmetric, PerTensor(), signed)
            near = (fixed.dequantize(fixed.quantize(part)) - got).abs()
            assert not near[~tied(part, fixed)].any()

    @given(st.sampled_from(("tensor", "token")), st.booleans(), values)
    def test_a_second_time_changes_nothing_but_the_last_bits(
        self, per: str, symmetric: bool, x: Tensor
    ) -> None:
        """The range of what is stored is the range again, to float32's precision."""
        fmt = Dynamic(8, symmetric, True, per)  # type: ignore[arg-type]
        once = fmt.project(x[None])
        assert torch.allclose(fmt.project(once), once, rtol=1e-5, atol=2e-6 * float(x.abs().max()) + 1e-12)

    @given(values)
    def test_zero_is_exact_and_nothing_is_clipped(self, x: Tensor) -> None:
        fmt = Dynamic()
        rows = torch.cat([x, torch.zeros(1)])
        assert fmt.project(rows)[-1] == 0
        step = (rows.max() - rows.min()) / 255
        assert (fmt.project(rows) - rows).abs().max() <= step * 1.001 + 1e-6

    def test_it_holds_no_range(self) -> None:
        fmt = Dynamic(8, True, True, "token", frozenset({"linear"}))
        assert decode(json.loads(json.dumps(encode(fmt)))) == fmt
        assert (fmt.stored_bytes(10), fmt.bits(10), fmt.learned()) == (10, 8.0, {})
        assert fmt.project(torch.zeros(0, 3)).shape == (0, 3)
        x = torch.randn(4, 3, requires_grad=True)
        fmt.project(x).sum().backward()
        assert torch.equal(x.grad, torch.ones(4, 3))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="1 bits"):
            Dynamic(1)

    def test_it_can_be_exported(self) -> None:
        class Net(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return Dynamic(8, per="token").project(x)

        x = torch.randn(4, 3)
        program = torch.export.export(Net(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        other = torch.randn(9, 3)
        assert torch.equal(program.module()(other), Net()(other))
