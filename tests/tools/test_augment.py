"""Augmentation: what each kind does to images, and the user's own function."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featherweight.data import Data
from featherweight.errors import DataError, RecipeError
from featherweight.tools.augment import Augment, Augmentation
from featherweight.tools.training_examples import training_examples


def images(count: int = 32, size: int = 28, channels: int = 2) -> np.ndarray:
    return np.random.default_rng(0).random((count, channels, size, size)).astype(np.float32)


def changed(kinds: tuple[Augmentation, ...], x: np.ndarray, seed: int = 0) -> np.ndarray:
    (made,), _ = Augment(kinds)((x,), np.random.default_rng(seed))
    return made


class TestImages:
    def test_flip_mirrors_about_half(self) -> None:
        x = images()
        made = changed(("flip",), x)
        kept = [np.array_equal(a, b) for a, b in zip(made, x, strict=True)]
        turned = [np.array_equal(a, b[:, :, ::-1]) for a, b in zip(made, x, strict=True)]
        assert all(one or other for one, other in zip(kept, turned, strict=True))
        assert 8 <= sum(turned) <= 24

    @pytest.mark.parametrize(("size", "most"), [(28, 2), (14, 1), (8, 1), (224, 16)])
    def test_shift_moves_by_a_fourteenth(self, size: int, most: int) -> None:
        x = images(64, size, 1)
        made, seen = changed(("shift",), x), set()
        for before, after in zip(x[:, 0], made[:, 0], strict=True):
            padded = np.pad(before, most)
            fits = [
                (down - most, across - most)
                for down in range(2 * most + 1)
                for across in range(2 * most + 1)
                if np.array_equal(padded[down : down + size, across : across + size], after)
            ]
            assert len(fits) == 1
            seen.update(fits)
        assert max(abs(one) for pair in seen for one in pair) == most
        assert len(seen) > 5

    def test_crop_shows_a_part(self) -> None:
        ramp = np.broadcast_to(np.linspace(0, 1, 28, dtype=np.float32), (16, 1, 28, 28)).copy()
        made = changed(("crop",), ramp)
        spans = made[:, 0, 14, -1] - made[:, 0, 14, 0]
        assert (spans > 0.70).all()
        assert (spans < 1.001).all()
        assert spans.std() > 0.01

    def test_crop_keeps_bytes(self) -> None:
        made = changed(("crop", "shift", "flip"), (images() * 255).astype(np.uint8))
        assert made.dtype == np.uint8

    def test_mixup(self) -> None:
        x = images(8)
        (made,), mix = Augment(("mixup",))((x,), np.random.default_rng(3))
        assert mix is not None
        assert np.allclose(made, mix.share * x + (1 - mix.share) * x[mix.partner], atol=1e-6)

    def test_cutmix(self) -> None:
        x = images(8)
        shares = []
        for seed in range(20):
            (made,), mix = Augment(("cutmix",))((x,), np.random.default_rng(seed))
            assert mix is not None
            own = (made == x).all(1)
            others = (made == x[mix.partner]).all(1)
            assert (own | others).all()
            moved = mix.partner != np.arange(8)
            if moved.any():
                assert own[moved].mean() == pytest.approx(mix.share, abs=1e-6)
            shares.append(mix.share)
        assert 0.1 < np.mean(shares) < 0.9

    def test_leaves_its_input_alone_and_draws_anew(self) -> None:
        x, every = images(), ("shift", "flip", "crop", "mixup")
        before = x.copy()
        one, two, other = (changed(every, x, seed) for seed in (0, 0, 1))
        assert np.array_equal(x, before)
        assert np.array_equal(one, two)
        assert not np.array_equal(one, other)
        assert one.shape == x.shape

    def test_only_images(self) -> None:
        data = Data.of(x_train=np.zeros((4, 12), np.float32))
        with pytest.raises(RecipeError, match=r"augment flip is for images .* has shape \(12,\)"):
            training_examples(data, taught=True, augment=Augment(("flip",)))


class TestUsers:
    def test_gets_the_inputs_and_a_generator(self) -> None:
        def augment(inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
            return inputs + rng.standard_normal(inputs.shape)

        x = images(4)
        (made,), mix = Augment((), augment)((x,), np.random.default_rng(5))
        wanted = x + np.random.default_rng(5).standard_normal(x.shape)
        assert np.allclose(made, wanted)
        assert made.dtype == np.float32
        assert mix is None

    def test_several_inputs(self) -> None:
        def augment(inputs: tuple[np.ndarray, ...], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
            return inputs[0] + 1, inputs[1]

        ids = np.arange(4)
        made, _ = Augment((), augment)((images(4), ids), np.random.default_rng(0))
        assert np.array_equal(made[0], images(4) + 1)
        assert np.array_equal(made[1], ids)

    def test_other_shapes(self) -> None:
        augment = Augment((), lambda inputs, rng: inputs[:, :1])
        with pytest.raises(DataError, match="augment made shapes") as caught:
            augment((images(4),), np.random.default_rng(0))
        assert "test_augment.py" in str(caught.value.where)


class TestExamples:
    def test_each_epoch_sees_others_and_every_process_its_part(self) -> None:
        data = Data.of(x_train=images(16), y_train=np.arange(16))
        examples = training_examples(data, taught=False, augment=Augment(("shift", "mixup")))
        whole = examples.batch(3, 8)
        assert whole.targets is not None
        assert whole.others is not None
        parts = [examples.batch(3, 8, 3, part) for part in range(3)]
        assert torch.equal(torch.cat([one.inputs[0] for one in parts]), whole.inputs[0])
        assert [len(one.inputs[0]) for one in parts] == [3, 3, 2]
        assert [one.weight for one in parts] == [9 / 8, 9 / 8, 6 / 8]
        assert torch.equal(torch.cat([one.others for one in parts if one.others is not None]), whole.others)
        assert not torch.equal(examples.batch(5, 8).targets, examples.batch(3, 8).targets)  # type: ignore[arg-type]

    def test_an_epoch_holds_every_example_once(self) -> None:
        data = Data.of(x_train=images(16), y_train=np.arange(16))
        examples = training_examples(data, taught=False)
        epochs = [[examples.batch(step, 4).targets for step in range(e * 4, e * 4 + 4)] for e in range(2)]
        for epoch in epochs:
            assert sorted(int(y) for part in epoch if part is not None for y in part) == list(range(16))
        assert not torch.equal(epochs[0][0], epochs[1][0])  # type: ignore[arg-type]
