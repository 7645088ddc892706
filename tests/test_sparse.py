"""Masks, patterns, schedules and gates, and the format that holds them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from featherweight.formats import IntQuant, PerChannel, Sparse, decode, encode
from featherweight.masks import (
    Pattern,
    block_sums,
    cubic,
    drawn_gates,
    largest,
    mean_gates,
    open_chance,
    pattern_of,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestLargest:
    @pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.9, 0.999])
    @pytest.mark.parametrize("shape", [(7,), (10, 13), (4, 6, 3, 3)])
    def test_as_many_zeros_as_asked(self, sparsity: float, shape: tuple[int, ...]) -> None:
        scores = random(*shape).abs()
        mask = largest(scores, sparsity)
        assert int((~mask).sum()) == round(sparsity * scores.numel())
        if mask.any() and not mask.all():
            assert scores[mask].min() >= scores[~mask].max()

    def test_equal_scores_are_told_apart(self) -> None:
        mask = largest(torch.ones(4, 5), 0.35)
        assert int((~mask).sum()) == 7
        assert torch.equal(mask, largest(torch.ones(4, 5), 0.35))

    @pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3, 3), (5, 12, 1)])
    @pytest.mark.parametrize("text", ["2:4", "1:4", "1:2", "3:4"])
    def test_a_pattern_holds_in_every_row(self, shape: tuple[int, ...], text: str) -> None:
        pattern = pattern_of(text)
        assert pattern.sparsity is not None
        scores = random(*shape).abs()
        mask = largest(scores, pattern.sparsity, pattern)
        for row in np.moveaxis(mask.numpy(), 1, -1).reshape(-1, shape[1]):
            for at in range(0, shape[1], pattern.of):
                assert row[at : at + pattern.of].sum() == pattern.keep
        groups = scores.movedim(1, -1).reshape(-1, pattern.of)
        wanted = groups.sort(dim=1, descending=True).values[:, : pattern.keep].sum()
        torch.testing.assert_close((scores * mask).sum(), wanted)

    def test_a_pattern_on_the_way_keeps_more(self) -> None:
        mask = largest(random(6, 8).abs(), 0.25, pattern_of("2:4"))
        assert (mask.reshape(-1, 4).sum(1) == 3).all()

    @pytest.mark.parametrize("text", ["4x1", "1x4", "2x2", "3x5"])
    @pytest.mark.parametrize("shape", [(8, 8), (10, 7), (9, 5, 3, 3)])
    def test_blocks_are_whole(self, shape: tuple[int, ...], text: str) -> None:
        pattern = pattern_of(text)
        scores = random(*shape).abs()
        mask = largest(scores, 0.5, pattern)
        kept = block_sums(mask.float(), pattern)
        size = block_sums(torch.ones(shape), pattern)
        assert ((kept == 0) | (kept == size)).all()
        assert int((kept == 0).sum()) == round(0.5 * kept.numel())
        sums = block_sums(scores, pattern)
        assert sums[kept > 0].min() >= sums[kept == 0].max()

    def test_sums_of_blocks(self) -> None:
        sums = block_sums(torch.arange(12.0).reshape(3, 4), Pattern(rows=2, columns=3))
        assert torch.equal(sums, torch.tensor([[0.0 + 1 + 2 + 4 + 5 + 6, 3.0 + 7], [8.0 + 9 + 10, 11.0]]))

    @pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "1x1", "x4", "two", ""])
    def test_what_is_no_pattern(self, text: str) -> None:
        with pytest.raises(ValueError, match="is no pattern"):
            pattern_of(text)

    def test_what_a_pattern_does_not_fit(self) -> None:
        assert not pattern_of("2:4").fits((8, 3, 3, 3))
        assert pattern_of("2:4").fits((8, 4))
        with pytest.raises(ValueError, match="does not hold groups"):
            largest(random(8, 3), 0.5, pattern_of("2:4"))


def test_the_schedule_is_that_of_the_paper() -> None:
    assert [cubic(0.9, f) for f in (0.0, 0.25, 0.5, 1.0, 2.0)] == pytest.approx(
        [0.0, 0.9 * (1 - 0.75**3), 0.9 * (1 - 0.5**3), 0.9, 0.9]
    )


class TestGates:
    LOGITS = torch.tensor([-4.0, -2.0, -0.5, 0.0, 0.5, 2.0, 4.0])

    def test_the_chance_to_be_open_is_that_of_samples(self) -> None:
        torch.manual_seed(0)
        drawn = drawn_gates(self.LOGITS.expand(200_000, -1))
        seen = (drawn > 0).double().mean(0)
        np.testing.assert_allclose(seen.numpy(), open_chance(self.LOGITS).numpy(), atol=5e-3)

    def test_samples_are_between_zero_and_one_and_reach_both(self) -> None:
        torch.manual_seed(0)
        drawn = drawn_gates(torch.zeros(10_000))
        assert drawn.min() == 0
        assert drawn.max() == 1

    def test_the_distribution_is_that_of_the_paper(self) -> None:
        """P(z <= t) = sigmoid(beta (log(s) - log(1 - s)) - a) with s = (t - gamma) / (zeta - gamma)."""
        torch.manual_seed(0)
        drawn = drawn_gates(torch.full((200_000,), 0.7)).double()
        for t in (0.1, 0.3, 0.5, 0.8):
            s = (t + 0.1) / 1.2
            wanted = 1 / (1 + np.exp(-(2 / 3 * (np.log(s) - np.log(1 - s)) - 0.7)))
            assert float((drawn <= t).double().mean()) == pytest.approx(wanted, abs=5e-3)

    def test_gates_at_inference(self) -> None:
        wanted = np.clip(1.2 / (1 + np.exp(-self.LOGITS.numpy())) - 0.1, 0, 1)
        np.testing.assert_allclose(mean_gates(self.LOGITS).numpy(), wanted, atol=1e-6)

    def test_the_penalty_is_the_expected_number_of_open_gates_and_can_be_trained(self) -> None:
        scores = (self.LOGITS / 100).requires_grad_()
        fmt = Sparse(torch.ones(7, dtype=torch.bool), 0.5, by="gates", scores=scores, rate=0.1, final=False)
        penalty = fmt.penalty()
        assert penalty is not None
        assert penalty.item() == pytest.approx(0.1 * float(open_chance(self.LOGITS).sum()), rel=1e-5)
        (slope,) = torch.autograd.grad(penalty, scores)
        assert (slope > 0).all()


class TestSparse:
    def fmt(self, **settings: object) -> Sparse:
        mask = largest(random(4, 6).abs(), 0.5)
        return Sparse(mask, 0.5, **settings)  # type: ignore[arg-type]

    def test_zeros_are_where_the_mask_says(self) -> None:
        x = random(4, 6, seed=3)
        fmt = self.fmt()
        assert torch.equal(fmt.project(x) == 0, ~fmt.mask)
        assert torch.equal(fmt.project(x)[fmt.mask], x[fmt.mask])
        assert torch.equal(fmt.project(fmt.project(x)), fmt.project(x))

    def test_a_mask_that_stays_stops_gradients(self) -> None:
        x = random(4, 6).requires_grad_()
        fmt = self.fmt()
        (slope,) = torch.autograd.grad(fmt.project(x).sum(), x)
        assert torch.equal(slope, fmt.mask.float())

    def test_a_mask_that_may_change_passes_them(self) -> None:
        x = random(4, 6).requires_grad_()
        fmt = self.fmt(final=False, schedule="cubic")
        made = fmt.project(x)
        assert torch.equal(made == 0, ~fmt.mask)
        (slope,) = torch.autograd.grad(made.sum(), x)
        assert torch.equal(slope, torch.ones(4, 6))

    def test_movement_scores_follow_the_gradient_of_the_weight_times_it(self) -> None:
        x, scores = random(4, 6).requires_grad_(), random(4, 6, seed=5).requires_grad_()
        fmt = self.fmt(final=False, by="movement", scores=scores)
        slope = random(4, 6, seed=6)
        to_x, to_scores = torch.autograd.grad((fmt.project(x) * slope).sum(), (x, scores))
        torch.testing.assert_close(to_x, slope * fmt.mask)
        torch.testing.assert_close(to_scores, slope * x.detach())

    def test_it_follows_the_schedule_and_then_stays(self) -> None:
        x = random(20, 30)
        fmt = Sparse(largest(x.abs(), 0.9), 0.9, schedule="cubic", end=0.5, final=False)
        for fraction in (0.0, 0.1, 0.25, 0.4):
            fmt = fmt.advanced(x, fraction)
            assert not fmt.final
            assert int((~fmt.mask).sum()) == round(cubic(0.9, fraction / 0.5) * 600)
        fmt = fmt.advanced(x, 0.5)
        assert fmt.final
        assert int((~fmt.mask).sum()) == 540
        assert fmt.advanced(-x.flip(0), 0.9) is fmt

    def test_a_mask_is_not_made_anew_at_every_step(self) -> None:
        x = random(20, 30)
        fmt = Sparse(largest(x.abs(), 0.9), 0.9, schedule="cubic", final=False).advanced(x, 0.2)
        assert fmt.advanced(x, 0.2001) is fmt
        assert fmt.advanced(x, 0.21) is not fmt

    def test_values_come_back_while_training_is_young(self) -> None:
        x = random(20, 30)
        fmt = Sparse(largest(x.abs(), 0.5), 0.5, schedule="none", final=False).advanced(x, 0.1)
        grown = torch.where(fmt.mask, x, 10 * x)
        assert fmt.advanced(grown, 0.2).mask[~fmt.mask].any()

    def test_what_does_not_regrow_has_no_gradient(self) -> None:
        x = random(4, 6).requires_grad_()
        slope = random(4, 6, seed=3)
        for regrow in (True, False):
            fmt = Sparse(largest(x.detach().abs(), 0.5), 0.5, final=False, regrow=regrow)
            (found,) = torch.autograd.grad((fmt.project(x) * slope).sum(), x)
            torch.testing.assert_close(found, slope if regrow else slope * fmt.mask)
            assert decode(json.loads(json.dumps(encode(fmt)))).regrow is regrow  # type: ignore[union-attr]

    def test_gates_that_closed_are_zeros(self) -> None:
        scores = torch.full((4, 6), 0.1)
        scores[0] = -1.0
        fmt = Sparse(torch.ones(4, 6, dtype=torch.bool), 0.1, by="gates", scores=scores, final=False)
        x = random(4, 6)
        done = fmt.advanced(x, 1.0)
        assert done.final
        stored = done.project(x)
        assert not stored[0].any()
        settled = done.settled()
        assert settled.scores is None
        assert torch.equal(settled.project(stored), stored)

    def test_gates_draw_in_training_only(self) -> None:
        scores = torch.zeros(40, 60).requires_grad_()
        fmt = Sparse(torch.ones(40, 60, dtype=torch.bool), 0.5, by="gates", scores=scores, final=False)
        x = random(40, 60)
        assert not torch.equal(fmt.project(x), fmt.project(x))
        with torch.no_grad():
            assert torch.equal(fmt.project(x), fmt.project(x))

    def test_it_claims_no_bytes(self) -> None:
        assert self.fmt().stored_bytes(24) == 96
        assert self.fmt().bits(24) == 32

    @pytest.mark.parametrize("shape", [(3,), (5, 7), (4, 3, 3, 3)])
    @pytest.mark.parametrize("by", ["magnitude", "scores", "movement", "gates"])
    def test_it_survives_json(self, shape: tuple[int, ...], by: str) -> None:
        scores = None if by == "magnitude" else random(*shape, seed=9)
        fmt = Sparse(
            largest(random(*shape).abs(), 0.4),
            0.4,
            "none",
            "cubic",
            0.6,
            by,
            scores,
            1e-3,
            False,
            0.2,  # type: ignore[arg-type]
        )
        again = decode(json.loads(json.dumps(encode(fmt))))
        assert isinstance(again, Sparse)
        assert torch.equal(again.mask, fmt.mask)
        assert (again.scores is None) == (scores is None)
        if scores is not None:
            assert torch.equal(again.scores, scores)  # type: ignore[arg-type]
        names = ("sparsity", "pattern", "schedule", "end", "by", "rate", "final", "at")
        assert [getattr(again, name) for name in names] == [getattr(fmt, name) for name in names]

    def test_a_mask_takes_a_bit_for_each_value(self) -> None:
        fmt = Sparse(torch.ones(100, 100, dtype=torch.bool), 0.5)
        assert len(json.dumps(encode(fmt))) < 100 * 100 / 8 * 4 / 3 + 300

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"by": "movement", "final": False}, "there are no scores"),
            ({"by": "scores", "final": False, "scores": torch.ones(3)}, "are no"),
            ({"pattern": "odd"}, "is no pattern"),
            ({"end": 0.0}, "end above 0"),
        ],
    )
    def test_what_makes_no_sense(self, settings: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.fmt(**settings)

    def test_other_shapes_are_refused(self) -> None:
        with pytest.raises(ValueError, match="is no mask of"):
            self.fmt().project(random(6, 4))

    def test_integers_behind_it_keep_the_zeros(self) -> None:
        x = random(4, 6)
        fmt = self.fmt()
        for symmetric in (True, False):
            low, high = x.amin(1), x.amax(1)
            grid = IntQuant(low, high, 4, symmetric, PerChannel(0), signed=True)
            stored = grid.project(fmt.project(x))
            assert not stored[~fmt.mask].any()
