"""Palettes: nearest values, summed gradients, exact zeros, honest bits, and JSON that loses nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.formats import FloatCast, IntQuant, Palette, decode, encode, floats_alone

CENTROIDS = torch.tensor([0.5, -1.0, 2.0])


def brute(x: Tensor, levels: Tensor) -> Tensor:
    """The nearest level of each element, one distance for each level."""
    return levels[(x[..., None] - levels).abs().argmin(-1)]


@st.composite
def palettes(draw: st.DrawFn) -> tuple[Palette, Tensor]:
    """A palette of any layout, and a tensor that it fits."""
    made = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    axis = draw(st.integers(0, min(1, len(shape) - 1)))
    group = draw(st.integers(0, 3))
    colors = draw(st.integers(1, 9))
    rows = (-(-shape[axis] // group),) if group else ()
    scale = draw(st.sampled_from([(), (shape[axis],), None]))
    fmt = Palette(
        torch.randn(*rows, colors, generator=made),
        draw(st.booleans()),
        axis,
        group,
        None if scale is None else torch.rand(scale, generator=made) + 0.1,
    )
    return fmt, torch.randn(shape, generator=made)


class TestProject:
    @settings(max_examples=200, deadline=None)
    @given(palettes())
    def test_is_the_nearest_value_of_the_palette_that_counts(self, pair: tuple[Palette, Tensor]) -> None:
        fmt, x = pair
        levels = fmt.levels()
        seen = fmt.project(x)
        assert seen.shape == x.shape
        for channel in range(x.shape[fmt.axis]):
            own = levels[channel // fmt.group if fmt.group else 0]
            scale = torch.ones(()) if fmt.scale is None else fmt.scale.expand(x.shape[fmt.axis])[channel]
            part = x.select(fmt.axis, channel)
            wanted = brute(part / scale, own) * scale
            torch.testing.assert_close(seen.select(fmt.axis, channel), wanted)

    @settings(max_examples=100, deadline=None)
    @given(palettes())
    def test_what_is_stored_stays(self, pair: tuple[Palette, Tensor]) -> None:
        fmt, x = pair
        once = fmt.project(x)
        assert torch.equal(fmt.project(once), once)
        assert len(once.unique()) <= fmt.levels().numel() * (
            fmt.scale.numel() if fmt.scale is not None else 1
        )

    @settings(max_examples=100, deadline=None)
    @given(palettes())
    def test_codes_are_places_among_the_levels(self, pair: tuple[Palette, Tensor]) -> None:
        fmt, x = pair
        codes = fmt.codes(x)
        assert codes.shape == x.shape
        assert int(codes.min()) >= 0
        assert int(codes.max()) < fmt.colors <= 2**fmt.width
        if not fmt.group:
            scale = torch.ones(()) if fmt.scale is None else fmt.scale
            shape = [1] * x.dim()
            shape[fmt.axis] = -1
            wanted = fmt.levels()[0][codes] * (scale.reshape(shape) if scale.dim() else scale)
            assert torch.equal(fmt.project(x), wanted)

    def test_zero_stays_exactly_zero_and_nothing_learns_it(self) -> None:
        fmt = Palette(torch.tensor([1e-8, -1e-8, 1.0]), zero=True)
        assert fmt.project(torch.tensor([0.0, -0.0])).tolist() == [0.0, 0.0]
        assert fmt.levels().tolist()[0] == pytest.approx([-1e-8, 0.0, 1e-8, 1.0])
        assert list(fmt.learned()) == ["centroids"]

    def test_no_elements(self) -> None:
        for fmt in (Palette(CENTROIDS), Palette(CENTROIDS, scale=torch.ones(()))):
            assert fmt.project(torch.zeros(0, 3)).shape == (0, 3)
            assert fmt.bits(0) == 2

    def test_halves_stay_halves(self) -> None:
        assert Palette(CENTROIDS).project(torch.randn(3, 3).half()).dtype == torch.float16


class TestGradients:
    def test_a_centroid_gets_the_sum_of_its_members(self) -> None:
        """Han et al. 2016, equation 3: dL/dC_k = sum over i, j of dL/dW_ij where the index of ij is k."""
        centroids = torch.tensor([-1.0, 0.4, 1.0], requires_grad=True)
        x = torch.tensor([[-0.9, -2.0, 0.3], [0.5, 5.0, -1.1]])
        slopes = torch.tensor([[1.0, 10.0, 100.0], [1000.0, 1e4, 1e5]])
        (Palette(centroids).project(x) * slopes).sum().backward()
        assert centroids.grad is not None
        assert centroids.grad.tolist() == [1.0 + 10.0 + 1e5, 100.0 + 1000.0, 1e4]

    @settings(max_examples=50, deadline=None)
    @given(palettes())
    def test_the_same_for_every_layout(self, pair: tuple[Palette, Tensor]) -> None:
        fmt, x = pair
        centroids = fmt.centroids.clone().requires_grad_()
        slopes = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        (fmt.with_learned({"centroids": centroids}).project(x) * slopes).sum().backward()
        order = fmt.levels()
        scales = torch.ones(()) if fmt.scale is None else fmt.scale
        codes = fmt.codes(x)
        wanted = torch.zeros(order.shape)
        for channel in range(x.shape[fmt.axis]):
            part, row = codes.select(fmt.axis, channel), channel // fmt.group if fmt.group else 0
            slope = slopes.select(fmt.axis, channel) * scales.expand(x.shape[fmt.axis])[channel]
            wanted[row].index_add_(0, part.flatten(), slope.flatten())
        rows = fmt.centroids.reshape(len(order), -1)
        assert centroids.grad is not None
        for row, (own, seen) in enumerate(zip(rows, centroids.grad.reshape(rows.shape), strict=True)):
            places = torch.searchsorted(order[row], own)
            torch.testing.assert_close(seen, wanted[row][places], rtol=1e-4, atol=1e-5)

    def test_weights_move_through_the_rounding(self) -> None:
        x = torch.tensor([-3.0, 0.1, 0.6, 9.0], requires_grad=True)
        (Palette(CENTROIDS, zero=True).project(x) * torch.arange(4.0)).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [0.0, 1.0, 2.0, 3.0]

    def test_a_moved_centroid_takes_other_members(self) -> None:
        fmt, x = Palette(torch.tensor([0.0, 1.0])), torch.tensor([0.4, 0.6])
        assert fmt.project(x).tolist() == [0.0, 1.0]
        moved = fmt.with_learned({"centroids": torch.tensor([0.0, 5.0])})
        assert moved.project(x).tolist() == [0.0, 0.0]


class TestBytes:
    def test_codes_and_centroids(self) -> None:
        fmt = Palette(torch.linspace(-1, 1, 16))
        assert fmt.width == 4
        assert fmt.stored_bytes(1000) == 1000 * 4 // 8 + 16 * 4
        assert fmt.bits(1000) == pytest.approx(4 + 16 * 32 / 1000)

    def test_zero_needs_a_code_and_no_float(self) -> None:
        fmt = Palette(torch.linspace(-1, 1, 4), zero=True)
        assert fmt.colors == 5
        assert fmt.width == 3
        assert fmt.stored_bytes(800) == 800 * 3 // 8 + 4 * 4

    def test_groups_scales_and_shares(self) -> None:
        grouped = Palette(torch.randn(8, 4), group=2, scale=torch.ones(16))
        assert grouped.stored_bytes(1600) == 1600 * 2 // 8 + 8 * 4 * 4 + 16 * 4
        shared = Palette(torch.randn(256), codebook="conv1.weight", tensors=7)
        assert shared.stored_bytes(1000) == 1000 + math.ceil(256 * 4 / 7)

    @pytest.mark.parametrize(("colors", "width"), [(1, 1), (2, 1), (3, 2), (16, 4), (17, 5), (256, 8)])
    def test_bits_of_a_code(self, colors: int, width: int) -> None:
        assert Palette(torch.arange(float(colors))).width == width


class TestChecks:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"centroids": torch.zeros(0)}, "no palette"),
            ({"centroids": torch.zeros(1, 1, 1)}, "no palette"),
            ({"centroids": torch.zeros(2, 2)}, "size of a group"),
            ({"centroids": torch.zeros(2), "group": 4}, "size of a group"),
            ({"centroids": torch.tensor([math.nan])}, "finite"),
            ({"centroids": torch.zeros(256), "zero": True}, "at most 256"),
            ({"centroids": torch.zeros(2), "scale": torch.zeros(3)}, "above 0"),
            ({"centroids": torch.zeros(2), "scale": torch.ones(3, 1)}, "above 0"),
            ({"centroids": torch.zeros(2), "tensors": 2}, "has a name"),
            ({"centroids": torch.zeros(2), "tensors": 0}, "has a name"),
        ],
    )
    def test_what_is_no_palette_is_refused(self, settings: dict[str, object], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            Palette(**settings)  # type: ignore[arg-type]

    def test_a_tensor_of_other_channels_is_refused(self) -> None:
        with pytest.raises(ValueError, match="2 palettes for 2 channels each"):
            Palette(torch.zeros(2, 3), group=2).project(torch.zeros(6, 3))


class TestJson:
    @settings(max_examples=50, deadline=None)
    @given(palettes())
    def test_comes_back_to_the_last_bit(self, pair: tuple[Palette, Tensor]) -> None:
        fmt, x = pair
        again = decode(json.loads(json.dumps(encode(fmt))))
        assert isinstance(again, Palette)
        assert encode(again) == encode(fmt)
        assert torch.equal(again.project(x), fmt.project(x))

    def test_of_a_shared_codebook(self) -> None:
        again = decode(encode(Palette(CENTROIDS, True, codebook="fc.weight", tensors=3)))
        assert isinstance(again, Palette)
        assert (again.codebook, again.tensors, again.zero) == ("fc.weight", 3, True)


def test_palettes_are_floats_yet() -> None:
    palette = Palette(CENTROIDS)
    assert floats_alone(())
    assert floats_alone((palette,))
    assert not floats_alone((palette, FloatCast()))
    assert not floats_alone((IntQuant(-torch.ones(()), torch.ones(())),))
