"""Networks side by side become one: what is kept, what is learned, what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featherweight.data import Data
from featherweight.engine.run import Run
from featherweight.engine.store import Store
from featherweight.errors import RecipeError
from featherweight.graph import trace
from featherweight.method import Context
from featherweight.methods.fold import Fold
from featherweight.methods.merge import Merge
from featherweight.methods.quantize import Quantize
from featherweight.model import Model
from featherweight.plugins import find_runtime
from featherweight.side_by_side import side_by_side
from featherweight.tasks import tasks_data
from featherweight.tools.costs import totals
from featherweight.tools.merging_loss import Balance
from golden import another, beside, context, data, decibels, inputs, model, model_of, target
from heard import Heard

SHAPES = ("residual", "depthwise", "concat", "attention", "lstm")


class Rows(nn.Module):
    """A small network on 12 numbers."""

    def __init__(self, classes: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@cache
def rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 12)).astype(np.float32)


def labels(x: np.ndarray, task: str) -> np.ndarray:
    """Two tasks on the same rows: in which third the first number lies, and the sign of a product."""
    return np.digitize(x[:, 0], [-0.43, 0.43]) if task == "third" else (x[:, 1] * x[:, 2] > 0).astype(int)


@cache
def trained(task: str) -> Model:
    """A network that learned its task."""
    module = Rows(3 if task == "third" else 2, seed=len(task))
    x, y = torch.from_numpy(rows(2048, 1)), torch.from_numpy(labels(rows(2048, 1), task))
    optimizer = torch.optim.Adam(module.parameters(), 5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    module.zero_grad(set_to_none=True)
    return model_of(module, torch.zeros(2, 12))


TASKS = ("third", "sign")


@cache
def both() -> Model:
    return side_by_side({task: trained(task) for task in TASKS})


@cache
def both_data(labelled: bool = True) -> Data:
    x, x_train = rows(500, 2), rows(2048, 1)
    each = {
        task: Data.of(
            x, labels(x, task), x_train=x_train, y_train=labels(x_train, task) if labelled else None
        )
        for task in TASKS
    }
    return tasks_data(each, dict.fromkeys(TASKS, 1))


def scores(one: Model, given: Data) -> list[float]:
    def run(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        with torch.no_grad():
            return tuple(y.numpy() for y in one.module(*map(torch.from_numpy, arrays)))

    metric = given.metric
    return [own.reduce(part) for own, part in metric.parts(given.score(run)[metric.name])]


class TestLearning:
    @pytest.mark.parametrize("balance", ["uncertainty", "equal", "pcgrad"])
    def test_one_trunk_serves_both_tasks(self, balance: Balance) -> None:
        given = both_data()
        step = Merge(epochs=30, batch_size=64, learning_rate=5e-3, balance=balance)
        made = step.apply(both(), context(both(), given))
        assert totals(made)["params"] <= 0.6 * totals(both())["params"]
        for before, after in zip(scores(both(), given), scores(made, given), strict=True):
            assert before > 0.9
            assert before - after < 0.06

    def test_it_needs_no_labels(self) -> None:
        given = both_data(labelled=False)
        made = Merge(epochs=30, batch_size=64, learning_rate=5e-3).apply(both(), context(both(), given))
        for before, after in zip(scores(both(), given), scores(made, given), strict=True):
            assert before - after < 0.06

    def test_labels_count_where_alpha_leaves_them_a_share(self) -> None:
        def learned(alpha: float) -> Tensor:
            step = Merge(epochs=1, alpha=alpha)
            return step.apply(both(), context(both(), both_data())).parameters["tasks.third.head.weight"]

        assert not torch.equal(learned(0.5), learned(1.0))

    def test_another_seed_is_another_network(self) -> None:
        one, other = (
            Merge(epochs=1).apply(both(), context(both(), both_data(), seed=seed)).module.state_dict()
            for seed in (0, 1)
        )
        assert any(not torch.equal(value, other[name]) for name, value in one.items())


class TestWhere:
    def test_defaults_keep_at_most_three_fifths_where_networks_can(self) -> None:
        for name in ("residual", "depthwise", "concat", "attention", "lstm", "squeeze_excite"):
            made = Merge(epochs=0).apply(beside(name), context(beside(name), data(name)))
            for kind in ("params", "macs"):
                assert totals(made)[kind] <= 0.6 * totals(beside(name))[kind], name

    def test_an_amount_is_kept_and_no_more_than_needed(self) -> None:
        def params(share: float) -> float:
            made = Merge(epochs=0, parameters=share).apply(beside("residual"), around("residual"))
            return totals(made)["params"] / totals(beside("residual"))["params"]

        assert params(0.9) == pytest.approx(0.866, abs=1e-3)
        assert params(0.6) == pytest.approx(0.516, abs=1e-3)

    def test_a_layer_may_be_named(self) -> None:
        made = Merge(epochs=0, at="layer1").apply(beside("residual"), around("residual"))
        layers = {node.layer for node in trace(made)}
        assert "tasks.other.layer2.conv1" in layers
        assert "tasks.other.layer1.conv1" not in layers

    def test_the_trunk_may_be_named(self) -> None:
        made = Merge(epochs=0, trunk="other").apply(beside("residual"), around("residual"))
        layers = {node.layer for node in trace(made)}
        assert "tasks.other.stem.0" in layers
        assert "tasks.one.stem.0" not in layers
        x = torch.from_numpy(inputs("residual", 4))
        with torch.no_grad():
            assert torch.allclose(made.module(x)[1], another("residual").module(x), atol=1e-5)

    def test_it_says_where_networks_part(self) -> None:
        heard = Heard()
        Merge(epochs=0).apply(beside("residual"), replace(around("residual"), progress=heard))
        assert any("'other' parts from 'one' at layer2" in line for line in heard.notes)


def around(name: str) -> Context:
    return context(beside(name), data(name))


class TestRefusals:
    def test_an_amount_that_no_merge_keeps_is_told_what_the_deepest_costs(self) -> None:
        with pytest.raises(RecipeError, match=r"parameters: 0.3 is less .* keeps 0.516") as caught:
            Merge(parameters=0.3).apply(beside("residual"), around("residual"))
        assert "0.517 or more" in (caught.value.fix or "")

    def test_one_network(self) -> None:
        with pytest.raises(RecipeError, match="several networks side by side"):
            Merge().apply(model("residual"), context(model("residual"), data("residual")))

    def test_a_place_that_there_is_not(self) -> None:
        with pytest.raises(RecipeError, match="no place 'layer9'") as caught:
            Merge(at="layer9").apply(beside("residual"), around("residual"))
        assert "layer2.relu#1:0" in (caught.value.fix or "")

    def test_a_trunk_that_there_is_not(self) -> None:
        with pytest.raises(RecipeError, match="no task is called 'third'"):
            Merge(trunk="third").apply(beside("residual"), around("residual"))

    def test_latency_where_the_runtime_tells_no_times(self) -> None:
        with pytest.raises(RecipeError, match="does not tell"):
            Merge(latency=0.6).apply(beside("residual"), around("residual"))


class TestArtifacts:
    @pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "ncnn"])
    @pytest.mark.parametrize("name", SHAPES)
    def test_every_head_runs_on_runtimes(self, name: str, runtime: str, tmp_path: Path) -> None:
        where, engine = target(runtime), find_runtime(runtime)
        if not engine.installed():
            pytest.skip(f"runtime '{runtime}' is not installed")
        made = Merge(epochs=0).apply(beside(name), around(name))
        session = engine.open(engine.lower(made, where, tmp_path), where)
        x = inputs(name, 4)
        found = session(x)
        with torch.no_grad():
            wanted = made.module(torch.from_numpy(x))
        assert len(found) == 2
        for one, other in zip(wanted, found, strict=True):
            assert decibels(one, other) > 60

    @pytest.mark.parametrize("name", ["residual", "attention"])
    def test_a_merged_network_is_folded_and_quantized(self, name: str, tmp_path: Path) -> None:
        run = Run(beside(name), data(name), target(), Store(tmp_path))
        made = run.original
        for number, step in enumerate((Merge(epochs=0), Fold(), Quantize()), 1):
            made = run.step(made, step, number)
        artifact = run.lower(made)
        assert artifact.bytes < 0.5 * run.lower(run.original).bytes
        x = inputs(name, 16)
        session = run.runtime.open(artifact, run.target)
        with torch.no_grad():
            wanted = run.step(run.original, Merge(epochs=0)).module(torch.from_numpy(x))
        for one, other in zip(wanted, session(x), strict=True):
            assert decibels(one, other) > 15

    def test_a_step_from_the_store_is_the_same_network(self, tmp_path: Path) -> None:
        runs = [Run(both(), both_data(), target(), Store(tmp_path)) for _ in range(2)]
        one, other = (run.step(run.original, Merge(epochs=1)) for run in runs)
        x = torch.from_numpy(rows(8, 3))
        with torch.no_grad():
            for first, second in zip(one.module(x), other.module(x), strict=True):
                assert torch.equal(first, second)
