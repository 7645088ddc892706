"""Corruptions: worse with every severity, in range, the same each time; and how inputs hold pictures."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from featherweight.corruptions import (
    CIFAR_10_C,
    IMAGENET_C,
    KINDS,
    SEVERITIES,
    constants_for,
    corrupt,
    through_jpeg,
)
from featherweight.data import Data, random_data
from featherweight.errors import DataError
from featherweight.picture_inputs import picture_input


def pictures(count: int = 6, side: int = 32, channels: int = 3) -> np.ndarray:
    """Smooth pictures with edges, of mean contrast."""
    random = np.random.default_rng(5)
    rows, columns = np.mgrid[0:side, 0:side] / side
    found = np.empty((count, side, side, channels), np.float32)
    for picture in found:
        for channel in range(channels):
            a, b, c = random.uniform(1, 9, 3)
            picture[..., channel] = 0.5 + 0.25 * np.sin(a * rows + b * columns) + 0.2 * (rows > c / 10)
    return np.clip(found, 0, 1)


class TestCorrupt:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("side", "channels"), [(32, 3), (28, 1), (96, 3)])
    def test_each_severity_is_further_from_the_picture(self, kind: str, side: int, channels: int) -> None:
        clean = pictures(4, side, channels)
        far = [np.square(corrupt(clean, kind, severity) - clean).mean() for severity in SEVERITIES]
        assert far[0] > 0
        assert all(low < high for low, high in pairwise(far)), far

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_shape_type_and_range_stay(self, kind: str, channels: int) -> None:
        clean = pictures(3, 20, channels)
        kept = clean.copy()
        for severity in SEVERITIES:
            changed = corrupt(clean, kind, severity)
            assert changed.shape == clean.shape
            assert changed.dtype == np.float32
            assert changed.min() >= 0 and changed.max() <= 1
        assert np.array_equal(clean, kept)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_picture_is_changed_alike_whoever_is_beside_it(self, kind: str) -> None:
        clean, numbers = pictures(6), np.array([7, 3, 9, 0, 1, 2])
        together = corrupt(clean, kind, 4, seed=3, numbers=numbers)
        assert np.array_equal(together, corrupt(clean, kind, 4, seed=3, numbers=numbers))
        alone = corrupt(clean[2:3], kind, 4, seed=3, numbers=numbers[2:3])
        assert np.allclose(together[2:3], alone, atol=1e-6)

    @pytest.mark.parametrize("kind", ["noise", "occlusion"])
    def test_seed_and_number_decide_what_is_drawn(self, kind: str) -> None:
        clean = np.repeat(pictures(1), 2, axis=0)
        one, other = corrupt(clean, kind, 3)
        assert not np.array_equal(one, other)
        assert not np.array_equal(corrupt(clean, kind, 3, seed=1), corrupt(clean, kind, 3, seed=2))

    def test_noise_has_the_standard_deviation_of_the_constants(self) -> None:
        grey = np.full((8, 64, 64, 3), 0.5, np.float32)
        for scale, severity in zip(CIFAR_10_C.noise, SEVERITIES, strict=True):
            assert corrupt(grey, "noise", severity).std() == pytest.approx(scale, rel=0.02)

    def test_contrast_keeps_the_means_of_channels(self) -> None:
        clean = pictures(3)
        changed = corrupt(clean, "contrast", 5)
        assert np.allclose(changed.mean(axis=(1, 2)), clean.mean(axis=(1, 2)), atol=1e-5)
        assert np.allclose(changed.std(axis=(1, 2)), 0.15 * clean.std(axis=(1, 2)), atol=1e-5)

    def test_brightness_is_that_of_hue_saturation_value(self) -> None:
        import colorsys

        clean = pictures(1, 16)
        changed = corrupt(clean, "brightness", 2)
        for y, x in ((0, 0), (5, 9), (15, 15)):
            hue, saturation, value = colorsys.rgb_to_hsv(*map(float, clean[0, y, x]))
            wanted = colorsys.hsv_to_rgb(hue, saturation, min(value + CIFAR_10_C.brightness[1], 1))
            assert changed[0, y, x] == pytest.approx(wanted, abs=1e-5)
        black = corrupt(np.zeros((1, 16, 16, 3), np.float32), "brightness", 2)
        assert np.allclose(black, CIFAR_10_C.brightness[1])

    def test_the_square_is_grey_and_alone(self) -> None:
        clean = np.zeros((5, 30, 40, 1), np.float32)
        for severity, side in zip(SEVERITIES, (6, 9, 12, 15, 18), strict=True):
            hidden = corrupt(clean, "occlusion", severity)
            assert ((hidden == 0.5).sum(axis=(1, 2, 3)) == side * side).all()
            assert ((hidden == 0.5) | (hidden == 0)).all()

    def test_blur_grows_with_the_picture(self) -> None:
        spots = np.zeros((2, 64, 64, 1), np.float32)
        spots[:, 32, 32] = 1
        small = corrupt(spots[:, 16:48, 16:48], "blur", 5)
        large = corrupt(spots, "blur", 5)
        spread = [float((one[0, ..., 0] > 1e-6).sum()) ** 0.5 for one in (small, large)]
        assert spread[1] > 1.6 * spread[0]

    def test_jpeg_is_pillows(self) -> None:
        (picture,) = pictures(1)
        file = io.BytesIO()
        Image.fromarray(np.round(picture * 255).astype(np.uint8)).save(file, "JPEG", quality=40)
        wanted = np.asarray(Image.open(file), np.float32) / 255
        assert np.array_equal(corrupt(picture[None], "jpeg", 5)[0], wanted)
        assert np.array_equal(through_jpeg(picture, 40), wanted)

    def test_the_set_for_the_nearer_size_is_taken(self) -> None:
        assert constants_for(28, 28) is CIFAR_10_C
        assert constants_for(64, 80) is CIFAR_10_C
        assert constants_for(96, 300) is IMAGENET_C
        assert constants_for(224, 224) is IMAGENET_C

    @pytest.mark.parametrize(("kind", "severity"), [("fog", 1), ("noise", 0), ("noise", 6)])
    def test_unknown_ones_are_refused(self, kind: str, severity: int) -> None:
        with pytest.raises(ValueError, match="no corruption is called"):
            corrupt(pictures(1), kind, severity)


def held(x: np.ndarray, **origin: object) -> Data:
    given = {"kind": "folder", **origin} if origin else None
    return Data.of(x, np.zeros(len(x), np.int64), origin=given)


EVERY = np.arange(6)


class TestPictureInput:
    def test_channels_first_and_last(self) -> None:
        clean = pictures()
        first = picture_input(held(clean.transpose(0, 3, 1, 2)), EVERY)
        last = picture_input(held(clean), EVERY)
        assert (first.layout, last.layout) == ("NCHW", "NHWC")
        for one, shown in ((first, clean.transpose(0, 3, 1, 2)), (last, clean)):
            assert np.allclose(one.decode(shown), clean, atol=1e-6)
            again = one.encode(one.decode(shown))
            assert again.dtype == shown.dtype and np.allclose(again, shown, atol=1e-6)

    def test_bytes_come_back_as_they_were(self) -> None:
        shown = np.round(pictures() * 255).astype(np.uint8)
        found = picture_input(held(shown), EVERY)
        assert (found.low[0], found.high[0], found.known) == (0.0, 255.0, "bytes")
        assert np.array_equal(found.encode(found.decode(shown)), shown)

    def test_floats_that_fill_0_to_255(self) -> None:
        found = picture_input(held(pictures() * 255), EVERY)
        assert found.high == (255.0,) * 3

    def test_a_folder_tells_mean_and_std(self) -> None:
        mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
        shown = ((pictures() - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2).astype(np.float32)
        found = picture_input(held(shown, mean=mean, std=std), EVERY)
        assert found.low == pytest.approx((-2.5, -1.6, -0.6))
        assert found.high == pytest.approx((2.5, 2.4, 1.4))
        assert np.allclose(found.decode(shown), pictures(), atol=1e-5)

    def test_an_unknown_range_is_what_was_seen_and_said_so(self) -> None:
        shown = (pictures() * 4 - 2).astype(np.float32)
        found = picture_input(held(shown), EVERY)
        assert found.low == pytest.approx(shown.min(axis=(0, 1, 2)))
        assert found.high == pytest.approx(shown.max(axis=(0, 1, 2)))
        assert "nothing tells the range" in str(found)

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (held(np.zeros((6, 4), np.float32)), "the shape"),
            (held(np.zeros((6, 5, 40, 40), np.float32)), "the shape"),
            (held(np.zeros((6, 1, 4, 40), np.float32)), "the shape"),
            (held(np.zeros((6, 3, 16, 16), np.int64)), "int64"),
            (held(np.full((6, 3, 16, 16), 7, np.float32)), "same value"),
            (random_data([((3, 16, 16), np.dtype(np.float32))]), "random"),
            (Data.of((np.zeros((6, 1, 9, 9)), np.zeros((6, 2))), np.zeros(6, np.int64)), "2 inputs"),
        ],
    )
    def test_what_is_no_picture_says_why(self, data: Data, said: str) -> None:
        with pytest.raises(DataError, match=said) as told:
            picture_input(data, EVERY)
        assert told.value.fix
