"""subnet: the best network within an amount, the one that is named, and what cannot be had."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import golden
from featherweight.data import Data
from featherweight.elastic import Space, mark, space_of_supernet
from featherweight.errors import RecipeError
from featherweight.holes import Range
from featherweight.method import Context
from featherweight.methods.prune import Prune
from featherweight.methods.subnet import PLUGIN as Subnet
from featherweight.model import Model, make_edit
from featherweight.tools.costs import totals
from featherweight.tools.elastic_space import find_space

NET = "residual"


@cache
def supernet(net: str = NET) -> Model:
    model = golden.model(net)
    space, _, _ = find_space(model, widths=(0.25, 0.5, 0.75, 1.0), multiple=2, inputs=(0.5, 1.0))
    edit = mark(space)
    return model.evolve(module=make_edit(model.copy_module(), edit), edits=(edit,))


class Heard:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def track(self, items: Any, description: str, total: int | None = None) -> Any:
        return iter(items)

    def note(self, message: str) -> None:
        self.notes.append(message)


def around(net: str = NET, memo: dict[str, Any] | None = None) -> Context:
    kept = {} if memo is None else memo

    def remember(name: str, parameters: Any, compute: Any) -> Any:
        key = json.dumps([name, parameters], sort_keys=True)
        if key not in kept:
            kept[key] = json.loads(json.dumps(compute()))
        return kept[key]

    base = golden.context(supernet(net), golden.data(net))
    return replace(base, models={"original": golden.model(net)}, memo=remember, progress=Heard())


@pytest.mark.parametrize("unit", ["macs", "parameters", "bytes"])
@pytest.mark.parametrize("keep", [0.4])
def test_it_keeps_the_amount(unit: str, keep: float) -> None:
    done = Subnet.model_validate({unit: keep, "evaluations": 16}).apply(supernet(), around())
    name = {"macs": "macs", "parameters": "params", "bytes": "bytes"}[unit]
    share = totals(done)[name] / totals(golden.model(NET))[name]
    assert share <= keep
    assert space_of_supernet(done) is None
    with pytest.raises(RecipeError, match="this model is none"):
        Subnet(macs=0.9).apply(done, around())


def test_one_search_serves_all_amounts() -> None:
    memo: dict[str, Any] = {}
    kept = []
    for keep in (0.9, 0.6, 0.3):
        done = Subnet(macs=keep, evaluations=16).apply(supernet(), around(memo=memo))
        kept.append(totals(done)["macs"])
    assert len(memo) == 1
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < kept[0]


def test_the_largest_is_the_network_itself() -> None:
    data = golden.data(NET)
    named = Subnet(widths={"stem.0": 8}, samples=2).apply(supernet(), around())
    assert totals(named) == totals(golden.model(NET))
    x = torch.from_numpy(golden.inputs(NET, 4))
    norms = {key: value for key, value in golden.model(NET).module.state_dict().items() if "running" in key}
    named.module.load_state_dict({**named.module.state_dict(), **norms})
    with torch.no_grad():
        assert torch.allclose(named.module(x), golden.model(NET).module(x), atol=1e-5)
    assert data is golden.data(NET)


def test_a_network_is_named() -> None:
    space = space_of_supernet(supernet())
    assert space is not None
    given = {"widths": {"stem.0": 4}, "depths": {"layer1": 1}, "input": 0.5}
    done = Subnet.model_validate(given).apply(supernet(), around())
    assert done.module.get_parameter("stem.0.weight").shape[0] == 4
    assert not any(name.startswith("layer1.") for name in done.module.state_dict())
    assert done.module.get_parameter("layer2.conv1.weight").shape[:2] == (16, 4)
    stage = next(iter(space.depths))
    with pytest.raises(RecipeError, match=rf"'{stage}' can lose 0 to 1 blocks, not 2"):
        Subnet.model_validate({"depths": {stage: 2}}).apply(supernet(), around())


def test_statistics_of_norms_are_its_own() -> None:
    done = Subnet(widths={"layer1.conv1": 2}).apply(supernet(), around())
    seen: list[torch.Tensor] = []
    norm = done.module.get_submodule("layer1.bn1")
    norm.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    with torch.no_grad():
        done.module(torch.from_numpy(golden.inputs(NET, 32, 1)))
    assert torch.allclose(norm.running_mean, seen[0].mean((0, 2, 3)), atol=1e-4)


def test_a_budget_below_the_smallest() -> None:
    with pytest.raises(
        RecipeError, match=r"the smallest subnet keeps 0\.0\d+ of the multiply-accumulates \("
    ) as caught:
        Subnet(macs=0.001).apply(supernet(), around())
    assert caught.value.where is not None
    assert caught.value.where.startswith("smallest subnet: widths 2 to 4, 1 blocks less")
    assert caught.value.fix is not None
    least = float(caught.value.fix.split()[1])
    done = Subnet(macs=least, evaluations=4).apply(supernet(), around())
    assert totals(done)["macs"] <= least * totals(golden.model(NET))["macs"]


def test_networks_that_are_none() -> None:
    with pytest.raises(RecipeError, match="this model is none") as caught:
        Subnet().apply(golden.model(NET), around())
    assert "put supernet before subnet" in str(caught.value.fix)
    assert Subnet.holes(golden.model(NET), around()) == {}
    pruned = Prune(macs=0.5).apply(supernet(), around())
    with pytest.raises(RecipeError, match="changed after supernet"):
        Subnet().apply(pruned, around())


def test_amounts_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="subnet takes one amount, and macs and bytes are given"):
        Subnet(macs=0.5, bytes=0.5)
    with pytest.raises(ValueError, match="macs and a network by its widths, depths, kernels or input"):
        Subnet(macs=0.5, widths={"stem.0": 4})


def test_latency_needs_prices() -> None:
    with pytest.raises(RecipeError, match="onnxruntime does not tell what layers cost"):
        Subnet(latency=0.5).apply(supernet(), around())


def test_holes_and_starts() -> None:
    memo: dict[str, Any] = {}
    holes = Subnet.holes(supernet(), around())
    (hole,) = holes.values()
    assert isinstance(hole, Range)
    starts = Subnet.starts(supernet(), around(memo=memo), {"evaluations": 20}, holes)
    amounts = [one["macs"] for one in starts]
    assert 2 <= len(amounts) <= 4
    assert all(map(hole.admits, amounts))
    for keep in amounts:  # each is on the front, so that it is had exactly
        done = Subnet(macs=keep, evaluations=20).apply(supernet(), around(memo=memo))
        share = totals(done)["macs"] / totals(golden.model(NET))["macs"]
        assert keep - 2e-4 <= share <= keep
    assert len(memo) == 1


class Useless(nn.Module):
    """Two branches of equal cost, of which one is all noise to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.bad = nn.Linear(8, 16), nn.Linear(8, 16)
        self.first, self.second = nn.Linear(16, 4), nn.Linear(16, 4)
        with torch.no_grad():
            self.second.weight.mul_(1e-4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(torch.relu(self.good(x))) + self.second(torch.relu(self.bad(x)))


def test_the_search_finds_what_does_not_matter() -> None:
    torch.manual_seed(0)
    model = golden.model_of(Useless(), torch.randn(2, 8))
    widths = {name: tuple(range(1, 17)) for name in ("good", "bad")}
    edit = mark(Space(widths))
    net = model.evolve(module=make_edit(model.copy_module(), edit), edits=(edit,))
    x = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    data = Data.of(x, np.arange(64) % 4, x_train=x, y_train=np.arange(64) % 4)
    context = replace(golden.context(net, data), models={"original": model})
    done = Subnet(macs=0.55, evaluations=80).apply(net, context)  # of 256
    assert done.module.get_parameter("good.weight").shape[0] >= 14
    assert done.module.get_parameter("bad.weight").shape[0] <= 3
