"""A supernet is trained once: for several runtimes, and for several budgets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import featherweight as fw
from featherweight.engine.drafts import draft
from featherweight.engine.ladder import shortened
from featherweight.engine.run import Run
from featherweight.engine.search import Search
from featherweight.engine.store import Store
from featherweight.engine.timing import Limits
from featherweight.method import Context
from featherweight.methods.supernet import Supernet
from featherweight.model import Model
from featherweight.outcome import Budget, Measurement
from featherweight.plugins import find_method
from featherweight.recipe import Recipe
from golden import data, model, target

NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return x + self.two(torch.relu(self.one(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 16, 3, 2, 1), nn.Sequential(Block(), Block())
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.blocks(self.stem(x))).mean((2, 3)))

def net():
    torch.manual_seed(0)
    return Net()
"""
RECIPE = """
version: 1
steps:
  - supernet: {epochs: 2, round_to: 4, batch_size: 8}
  - subnet: {evaluations: 20, parameters: {choice: [0.25, 0.6]}}
  - fold: {}
"""
QUICK = Limits(seconds=2.0, least_seconds=0.1, throughput_s=0.1, precision=0.05)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runtime that each training of a supernet was for."""
    found: list[str] = []
    apply = Supernet.apply

    def counted(self: Supernet, model: Model, context: Context) -> Model:
        found.append(str(context.target.runtime))
        return apply(self, model, context)

    monkeypatch.setattr(Supernet, "apply", counted)
    return found


def test_one_supernet_serves_every_runtime(tmp_path: Path, trained: list[str]) -> None:
    store = Store(tmp_path)
    made = []
    for runtime, keep in (("onnxruntime", 0.6), ("torch", 0.6), ("torch", 0.4)):
        run = Run(model("residual"), data("residual"), target(runtime), store)
        reached = run.step(run.original, Supernet(epochs=1, round_to=4))
        made.append(run.step(reached, find_method("subnet")(macs=keep, evaluations=8)))
    assert trained == ["onnxruntime"]
    assert made[0].edits == made[1].edits != made[2].edits


def test_widths_that_a_runtime_likes_are_its_own(tmp_path: Path, trained: list[str]) -> None:
    store = Store(tmp_path)
    for runtime in ("onnxruntime", "torch"):
        run = Run(model("residual"), data("residual"), target(runtime), store)
        run.step(run.original, Supernet(epochs=0.5))
    assert trained == ["onnxruntime", "torch"]


def test_a_supernet_is_whole_where_a_candidate_is_only_looked_at(tmp_path: Path, trained: list[str]) -> None:
    """What a subnet may be is asked of the supernet; without it there would be nothing to vary."""
    assert shortened(Supernet()) is None
    assert shortened(find_method("finetune")()) is not None
    recipe = Recipe.parse(RECIPE.replace("  - fold: {}", "  - finetune: {epochs: 1}"))
    search = Search(recipe, Budget(), baseline=Measurement(bytes=1), trials=2)
    run = Run(model("residual"), data("residual"), target(), Store(tmp_path))
    for _ in range(2):
        candidate = search.ask()
        assert candidate is not None
        made = draft(run, candidate, lambda *asked: {}, lambda filled: True, whole=False)
        assert made is not None
        assert made.left_out == ("finetune",)
        assert len(made.model.parameters) <= len(model("residual").parameters)
    assert len(trained) == 1
    search.close()


def test_another_budget_takes_another_subnet_of_the_same_supernet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[str]
) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "elastic.yaml").write_text(RECIPE)
    random = np.random.default_rng(0)
    x, y = random.standard_normal((64, 3, 8, 8)).astype(np.float32), np.arange(64) % 4
    given = fw.Data.of(x[:32], y[:32], x_train=x[32:], y_train=y[32:])
    sizes = []
    for budget in (fw.Budget(bytes=60_000), fw.Budget(bytes=12_000)):
        result = fw.fit(
            f"{tmp_path / 'net.py'}:net",
            given,
            out=tmp_path / f"out{len(sizes)}",
            recipe=str(tmp_path / "elastic.yaml"),
            budget=budget,
            prefer="quality",
            limits=QUICK,
            trials=2,
            tune=False,
            robustness=False,
        )
        sizes.append(result.chosen.bytes)
        assert result.met
    assert len(trained) == 1
    assert sizes[1] <= 12_000
