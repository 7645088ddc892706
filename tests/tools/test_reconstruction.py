"""Reconstruction: least squares as numpy solves it, sums made up for, and what stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featherweight.graph import Node
from featherweight.methods.prune import Prune
from featherweight.model import Model
from featherweight.tools.channels import channel_groups
from featherweight.tools.cutting import cut
from featherweight.tools.reconstruction import Equations, Settings, reconstruct
from golden import context, data, decibels, inputs, model, model_of


def everything(node: Node) -> bool:
    return True


def with_all(net: Model, values: dict[str, Tensor]) -> Model:
    module = net.copy_module()
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)
    return net.evolve(module=module)


@pytest.mark.parametrize("side", [4, 512])
@pytest.mark.parametrize("centred", [True, False])
def test_equations_are_solved_as_numpy_solves_them(
    centred: bool, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featherweight.tools.columns._SIDE", side)  # of blocks
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 6)) * [1, 2, 3, 1, 1, 1] + 2
    y = x @ rng.standard_normal((6, 3)) + rng.standard_normal((400, 3)) + (5 if centred else 0)
    equations = Equations(1, 3, 6)
    for part in np.split(np.arange(400), [7, 150]):
        equations.add(torch.from_numpy(x[part])[None], torch.from_numpy(y[part])[None])
    rows, shift = equations.solve(torch.zeros(1, 3, 6, dtype=torch.float64), 1e-12, centred)
    design = np.hstack([x, np.ones((400, 1))]) if centred else x
    wanted = np.linalg.lstsq(design, y, rcond=None)[0].T
    np.testing.assert_allclose(rows[0].numpy(), wanted[:, :6], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(
        shift[0].numpy(), wanted[:, 6] if centred else np.zeros(3), rtol=1e-6, atol=1e-8
    )


def test_a_ridge_holds_weights_where_they_were() -> None:
    rng = np.random.default_rng(1)
    equations = Equations(1, 2, 4)
    equations.add(
        torch.from_numpy(rng.standard_normal((1, 50, 4))), torch.from_numpy(rng.standard_normal((1, 50, 2)))
    )
    start = torch.ones(1, 2, 4, dtype=torch.float64)
    free, _ = equations.solve(start, 1e-9, True)
    held, _ = equations.solve(start, 1e6, True)
    assert (held - start).abs().max() < 1e-5 < (free - start).abs().max()


class _Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.second = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_a_reader_gets_the_weights_of_the_least_squares_problem() -> None:
    torch.manual_seed(0)
    net = model_of(_Chain(), torch.randn(2, 5))
    x = torch.randn(300, 5)
    done = cut(net, channel_groups(net), {"first": [1, 4, 6]})
    found = reconstruct(
        done, net, [(x[:100],), (x[100:],)], selects=everything, settings=Settings(ridge=1e-12)
    )
    with torch.no_grad():
        read = torch.relu(done.module.first(x)).double().numpy()  # type: ignore[operator]
        wanted = net.module(x).double().numpy()
    solved = np.linalg.lstsq(np.hstack([read, np.ones((300, 1))]), wanted, rcond=None)[0].T
    np.testing.assert_allclose(found["second.weight"].numpy(), solved[:, :5], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["second.bias"].numpy(), solved[:, 5], rtol=1e-4, atol=1e-5)
    assert set(found) == {"second.weight", "second.bias"}  # the first one reads what it read


@pytest.mark.parametrize("net", ["residual", "depthwise", "concat", "shuffle", "attention", "squeeze_excite"])
def test_outputs_come_nearer_to_the_original(net: str) -> None:
    original, x = model(net), torch.from_numpy(inputs(net, 64, seed=3))
    where = context(original, data(net))
    plain = Prune(macs=0.6, round_to=1, importance="l2", reconstruct=False).apply(original, where)
    found = reconstruct(plain, original, [(x[:48],)], selects=everything)
    with torch.no_grad():
        wanted = original.module(x[48:])
        before = decibels(wanted, plain.module(x[48:]))
        after = decibels(wanted, with_all(plain, found).module(x[48:]))
    assert after > before + 6


class _Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.inner = nn.Linear(12, 12)
        self.lost = nn.Linear(6, 3)
        self.wide = nn.Linear(3, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        other = self.wide(torch.relu(self.lost(x)))
        return self.head(other + self.inner(torch.relu(self.stem(x))))


def test_a_layer_makes_up_for_the_other_operand_of_its_sum() -> None:
    torch.manual_seed(0)
    net = model_of(_Sum(), torch.randn(2, 6))
    x = torch.randn(500, 6)
    done = cut(net, channel_groups(net), {"lost": [0, 1]})
    errors = {}
    for sums in (True, False):
        settings = Settings(ridge=1e-6, sums=sums)
        found = reconstruct(done, net, [(x,)], selects=lambda node: node.layer != "head", settings=settings)
        with torch.no_grad():
            errors[sums] = float((with_all(done, found).module(x) - net.module(x)).square().mean())
    assert errors[True] < 0.5 * errors[False]


def test_what_is_not_selected_stays() -> None:
    original, x = model("residual"), torch.from_numpy(inputs("residual", 16))
    done = cut(original, channel_groups(original), {"layer2.conv1": range(8)})
    found = reconstruct(done, original, [(x,)], selects=lambda node: node.layer != "layer2.conv2")
    assert found
    assert "layer2.conv2.weight" not in found
