"""Learning rates over time, groups of weight decay, and averaged weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from featherweight.tools.optimizers import Average, make_optimizer, parameter_groups, rate_factor
from golden import model


class TestRateFactor:
    def test_cosine_with_a_warm_up(self) -> None:
        rates = [rate_factor(step, 100, 0.1, "cosine") for step in range(100)]
        assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
        assert rates[10] == 1
        assert rates[55] == pytest.approx(0.5)
        assert rates[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
        assert rates[10:] == sorted(rates[10:], reverse=True)

    def test_linear_and_constant(self) -> None:
        assert [rate_factor(step, 4, 0.0, "linear") for step in range(4)] == [1, 0.75, 0.5, 0.25]
        assert {rate_factor(step, 4, 0.0, "constant") for step in range(4)} == {1}

    def test_all_of_it_warm_up(self) -> None:
        assert [rate_factor(step, 2, 1.0, "cosine") for step in range(2)] == [0.5, 1]


class TestGroups:
    @pytest.mark.parametrize("name", ["residual", "attention"])
    def test_norms_and_biases_do_not_decay(self, name: str) -> None:
        module = model(name).copy_module()
        decayed, others = parameter_groups(module, 0.1)
        assert decayed["weight_decay"] == 0.1
        assert others["weight_decay"] == 0
        norms = [
            one
            for layer in module.modules()
            if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm)
            for one in layer.parameters()
        ]
        assert norms
        assert {id(one) for one in norms} <= {id(one) for one in others["params"]}
        assert all(one.ndim > 1 for one in decayed["params"])
        names = {id(one): key for key, one in module.named_parameters()}
        for key in (names[id(one)] for one in decayed["params"]):
            assert not key.endswith("bias")
        assert len(decayed["params"]) + len(others["params"]) == len(list(module.parameters()))

    def test_a_norm_over_several_axes_does_not_decay(self) -> None:
        module = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm((2, 6)))
        decayed, others = parameter_groups(module, 0.1)
        assert [tuple(one.shape) for one in decayed["params"]] == [(6, 4)]
        assert len(others["params"]) == 3

    def test_what_is_frozen_is_in_none_and_slow_ones_are_apart(self) -> None:
        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        module[0].requires_grad_(False)
        optimizer = make_optimizer(
            module, "adamw", 0.5, momentum=0.8, decay=0.1, slow=[module[1].weight], slow_rate=0.01
        )
        groups = [
            (len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups
        ]
        assert groups == [(1, 0.5, 0.0), (1, 0.01, 0.0)]
        assert optimizer.param_groups[0]["betas"] == (0.8, 0.999)

    def test_sgd_has_nesterov_momentum(self) -> None:
        optimizer = make_optimizer(nn.Linear(2, 2), "sgd", 0.5, momentum=0.9, decay=0)
        assert all(group["nesterov"] and group["momentum"] == 0.9 for group in optimizer.param_groups)
        plain = make_optimizer(nn.Linear(2, 2), "sgd", 0.5, momentum=0.0, decay=0)
        assert not any(group["nesterov"] for group in plain.param_groups)


def test_an_average_follows_its_formula() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 0.0)
    average, wanted = Average(module, 0.5), 0.0
    for step, value in enumerate([1.0, 5.0, -2.0, 7.0, 3.0, 8.0]):
        nn.init.constant_(module.weight, value)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * value
        assert average.values["weight"].item() == pytest.approx(wanted, rel=1e-6)
    again = Average(module, 0.5)
    again.load(average.state())
    assert torch.equal(again.into(module.state_dict())["weight"], average.values["weight"])
    assert again.steps == 6
