"""Products of low rank against numpy: no other product makes less error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from featherweight.tools.forms import Form, Product, Way, whole
from featherweight.tools.low_rank import Stages, balanced, spectrum, two_stages


def correlated(size: int, count: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Columns (size, count) that know of each other, and their second moments."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    spread = torch.logspace(0, -2, size, dtype=torch.float64)
    columns = mix @ (spread[:, None] * torch.randn(size, count, generator=generator, dtype=torch.float64))
    return columns, columns @ columns.mT / count


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(weight: Tensor, product: Tensor, columns: Tensor) -> float:
    """E ||W x - M x||²."""
    return float(((weight - product) @ columns).square().sum()) / columns.shape[1]


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 20), (20, 12), (9, 9)])
class TestSpectrum:
    def test_plain_is_the_truncated_svd_of_numpy(self, outputs: int, inputs: int) -> None:
        weight = random(outputs, inputs)
        u, s, v = np.linalg.svd(weight.numpy(), full_matrices=False)
        found = spectrum(weight, torch.eye(inputs, dtype=torch.float64))
        for rank in (1, 4, 9):
            left, right = found.factors(rank)
            oracle = u[:, :rank] * s[:rank] @ v[:rank]
            np.testing.assert_allclose((left @ right).numpy(), oracle, atol=1e-9)
            assert found.error(rank) == pytest.approx(float((s[rank:] ** 2).sum()), abs=1e-9)

    def test_weighted_error_is_that_of_the_closed_form(self, outputs: int, inputs: int) -> None:
        weight = random(outputs, inputs)
        columns, gram = correlated(inputs)
        singular = np.linalg.svd(weight.numpy() @ np.linalg.cholesky(gram.numpy()), compute_uv=False)
        found = spectrum(weight, gram)
        for rank in (1, 3, 7):
            left, right = found.factors(rank)
            wanted = float((singular[rank:] ** 2).sum())
            assert found.error(rank) == pytest.approx(wanted, rel=1e-8)
            assert measured(weight, left @ right, columns) == pytest.approx(wanted, rel=1e-8)

    def test_no_perturbed_product_makes_less_error(self, outputs: int, inputs: int) -> None:
        weight = random(outputs, inputs)
        columns, gram = correlated(inputs)
        left, right = spectrum(weight, gram).factors(4)
        least = measured(weight, left @ right, columns)
        for seed in range(20):
            for size in (1e-3, 1e-2, 1e-1):
                moved = left + size * random(*left.shape, seed=seed)
                turned = right + size * random(*right.shape, seed=seed + 100)
                assert measured(weight, moved @ turned, columns) > least
                assert measured(weight, left @ turned, columns) > least

    def test_weighted_makes_less_output_error_than_plain(self, outputs: int, inputs: int) -> None:
        weight = random(outputs, inputs)
        columns, gram = correlated(inputs)
        plain = spectrum(weight, torch.eye(inputs, dtype=torch.float64)).factors(3)
        left, right = spectrum(weight, gram).factors(3)
        assert measured(weight, left @ right, columns) < 0.8 * measured(weight, plain[0] @ plain[1], columns)

    def test_full_rank_is_the_matrix(self, outputs: int, inputs: int) -> None:
        weight = random(outputs, inputs)
        found = spectrum(weight, correlated(inputs)[1])
        left, right = found.factors(min(outputs, inputs))
        torch.testing.assert_close(left @ right, weight, rtol=1e-6, atol=1e-6)
        assert found.error(min(outputs, inputs)) == 0


def test_inputs_that_are_never_seen_do_not_break_it() -> None:
    gram = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    weight = random(3, 4)
    left, right = spectrum(weight, gram).factors(2)
    assert torch.isfinite(left).all()
    assert torch.isfinite(right).all()
    assert measured(weight, left @ right, gram.sqrt()) == pytest.approx(0, abs=1e-12)


def test_factors_share_their_size() -> None:
    left, right = balanced(1e4 * random(6, 3), 1e-4 * random(3, 8))
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
    torch.testing.assert_close(left @ right, (1e4 * random(6, 3)) @ (1e-4 * random(3, 8)))


def test_a_row_of_zeros_stays_one() -> None:
    left, right = balanced(torch.zeros(4, 1, dtype=torch.float64), random(1, 5))
    assert not (left @ right).any()
    assert torch.isfinite(right).all()


class TestTwoStages:
    def stages(self, first: int = 18, second: int = 3, outputs: int = 10) -> Stages:
        _, gram = correlated(first * second)
        gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        weight = random(outputs, first, second)
        return Stages(weight, gram.reshape(first, second, first, second))

    @pytest.mark.parametrize("rank", [2, 5, 9])
    def test_alternating_lowers_the_error(self, rank: int) -> None:
        stages = self.stages()
        begun = stages.first(rank)
        second, _ = stages.second(begun)
        first, better = two_stages(stages, rank)
        assert stages.error(first, better) < stages.error(begun, second.reshape(10, rank, 3))

    def test_neither_stage_alone_can_do_better(self) -> None:
        stages = self.stages()
        first, second = two_stages(stages, 4)
        for _ in range(40):  # for this second stage alone
            first = stages.better_first(first, second)
        least = stages.error(first, second)
        for seed in range(20):
            for size in (1e-4, 1e-3, 1e-2):
                assert stages.error(first + size * random(*first.shape, seed=seed), second) > least
        second = stages.second(first)[0].reshape(second.shape)
        least = stages.error(first, second)
        for seed in range(20):
            for size in (1e-4, 1e-3, 1e-2):
                assert stages.error(first, second + size * random(*second.shape, seed=seed)) > least

    def test_the_second_stage_is_that_of_numpy(self) -> None:
        stages = self.stages()
        first = stages.first(4)
        second, _ = stages.second(first)
        root = np.linalg.cholesky(stages.gram.reshape(54, 54).numpy())
        lifted = np.einsum("rx,bc->rbxc", first.numpy(), np.eye(3)).reshape(12, 54)
        wanted = np.linalg.lstsq((lifted @ root).T, (stages.weight.flatten(1).numpy() @ root).T, rcond=None)[
            0
        ]
        np.testing.assert_allclose(second.numpy(), wanted.T, rtol=1e-4, atol=1e-6)

    def test_the_error_is_that_of_the_columns(self) -> None:
        columns, gram = correlated(54)
        stages = Stages(random(10, 18, 3), gram.reshape(18, 3, 18, 3))
        first, second = two_stages(stages, 4)
        product = torch.einsum("orb,rx->oxb", second, first).flatten(1)
        seen = measured(stages.weight.flatten(1), product, columns)
        assert stages.error(first, second) == pytest.approx(seen, rel=1e-8)


def hooi(weight: np.ndarray, first: int, second: int, rounds: int = 200) -> float:
    """Error of Tucker-2 by higher-order orthogonal iteration (De Lathauwer et al. 2000), in numpy."""
    outputs, inputs, _ = weight.shape
    u = np.linalg.svd(weight.reshape(outputs, -1))[0][:, :second]
    v = np.linalg.svd(weight.transpose(1, 0, 2).reshape(inputs, -1))[0][:, :first]
    for _ in range(rounds):
        half = np.einsum("oct,cr->ort", weight, v).reshape(outputs, -1)
        u = np.linalg.svd(half)[0][:, :second]
        half = np.einsum("oct,os->cst", weight, u).reshape(inputs, -1)
        v = np.linalg.svd(half)[0][:, :first]
    made = np.einsum("oct,cr,dr,os,ps->pdt", weight, v, v, u, u)
    return float(np.square(weight - made).sum())


@pytest.mark.parametrize(("first", "second"), [(3, 4), (2, 7), (5, 5)])
def test_plain_tucker_is_no_worse_than_orthogonal_iteration(first: int, second: int) -> None:
    weight = random(10, 6, 9)
    stages = Stages(weight, torch.eye(54, dtype=torch.float64).reshape(6, 9, 6, 9))
    v, core, u = two_stages(stages, first, second, rounds=60)
    made = torch.einsum("os,srb,rx->oxb", u, core, v)
    assert float((weight - made).square().sum()) <= hooi(weight.numpy(), first, second) * 1.001


class TestForms:
    def product(self, kernel: tuple[int, ...] = (3, 3)) -> Product:
        weight = random(10, 6, *kernel)
        _, gram = correlated(weight[0].numel())
        return Product(weight, gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram)))

    @pytest.mark.parametrize(("way", "ranks"), [("product", (10,)), ("spatial", (18,)), ("tucker", (6, 10))])
    def test_at_full_rank_it_is_the_weight(self, way: Way, ranks: tuple[int, ...]) -> None:
        product = self.product()
        form = Form(way, ranks)
        made = whole(form, product.factors(form), product.weight.shape)
        torch.testing.assert_close(made, product.weight, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("way", ["product", "spatial", "tucker"])
    def test_what_it_is_said_to_lose_is_what_it_loses_at_most(self, way: Way) -> None:
        product = self.product()
        flat, gram = product.weight.flatten(1), product.gram
        total = float(((flat @ gram) * flat).sum())
        told = product.losses(way, (2, 4, 6))
        assert len(told) == (9 if way == "tucker" else 3)
        for form, loss in told.items():
            gap = flat - whole(form, product.factors(form), product.weight.shape).flatten(1)
            seen = float(((gap @ gram) * gap).sum()) / total
            assert seen <= loss + 1e-9
            if way == "product":
                assert seen == pytest.approx(loss, rel=1e-6)

    @pytest.mark.parametrize("way", ["spatial", "tucker"])
    def test_ranks_together_lose_what_each_loses_by_itself(self, way: Way) -> None:
        product = self.product()
        stages = product.stages(way)
        for form, loss in product.losses(way, (2, 4, 6)).items():
            first = stages.first(6)[: form.ranks[0]]
            second, moments = stages.second(first)
            energies = np.linalg.eigvalsh((second @ moments @ second.mT).numpy())[::-1]
            kept = energies[: form.ranks[1]].sum() if way == "tucker" else energies.sum()
            assert loss == pytest.approx(1 - kept / stages.total, abs=1e-7)

    def test_more_ranks_lose_less(self) -> None:
        told = list(self.product().losses("spatial", (1, 2, 4, 8, 16)).values())
        assert told == sorted(told, reverse=True)
