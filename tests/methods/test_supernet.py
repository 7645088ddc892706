"""Supernet: the smallest subnet learns, only what may change does, and it says what it lacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.data import Data
from featherweight.elastic import Space, Subnet, space_of_supernet
from featherweight.errors import DataError, RecipeError
from featherweight.method import Context
from featherweight.methods.supernet import Supernet
from featherweight.model import Model
from featherweight.tools.batch_norms import reestimate, with_statistics
from featherweight.tools.channels import channel_groups
from featherweight.tools.distill_losses import soft_target_loss
from featherweight.tools.elastic_cut import Extractor
from featherweight.tools.elastic_space import find_space, space_channels
from featherweight.tools.subnet_search import Judge
from featherweight.tools.supernets import held
from featherweight.where import Where
from golden import context, data, model, model_of
from training import Kept, Told, problem, same


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def residual(seed: int = 0) -> Model:
    """A stem, two residual blocks and a head: 4 classes of (2, 6, 6)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = [nn.Conv2d(2, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        blocks = nn.Sequential(Block(16), Block(16))
        head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4)]
        return model_of(nn.Sequential(*stem, blocks, *head), torch.randn(2, 2, 6, 6))


def around(net: Model, given: Data | None = None, **more: Any) -> Context:
    return replace(context(net, given or problem()), models={"original": net}, **more)


def trained(net: Model, given: Data | None = None, **how: Any) -> Model:
    told = {key: how.pop(key) for key in ("progress", "checkpoint", "seed", "devices") if key in how}
    asked = {"epochs": 6, "batch_size": 16, "learning_rate": 0.1, "importance": "l2", **how}
    return Supernet.model_validate(asked).apply(net, around(net, given, **told))


def space_of(net: Model) -> Space:
    space = space_of_supernet(net)
    assert space is not None
    return space


def smallest_loss(net: Model, space: Space) -> float:
    """Cross entropy of the smallest subnet on the training examples, norms as it needs them."""
    sub = Extractor(net, space, space_channels(net, space)).extract(space.smallest())
    train = problem().train
    assert train is not None
    assert train.targets is not None
    x = torch.from_numpy(train.take(np.arange(len(train)))[0])
    sub = with_statistics(sub, reestimate(sub, [(x,)]))
    with torch.no_grad():
        return float(F.cross_entropy(sub.module(x), torch.from_numpy(train.targets)))


def smallest_distance(net: Model, original: Model) -> float:
    """How far the class scores of the smallest subnet are from the original's, on the training examples."""
    space, channels, _ = find_space(residual(), widths=Supernet().widths)
    sub = Extractor(net, space, channels).extract(space.smallest())
    train = problem().train
    assert train is not None
    x = torch.from_numpy(train.take(np.arange(len(train)))[0])
    sub = with_statistics(sub, reestimate(sub, [(x,)]))
    with torch.no_grad():
        return float(soft_target_loss(sub.module(x), original.module(x), 1.0))


class TestTrains:
    def test_the_smallest_subnet_learns(self) -> None:
        done = trained(residual(), epochs=10)
        space = space_of(done)
        assert smallest_loss(done, space) < 0.5 * smallest_loss(residual(), space)

    def test_subnets_learn_from_the_largest_network_alone(self) -> None:
        """With an original as teacher no labels are needed."""
        given = problem()
        assert given.train is not None
        bare = Data.of(x_train=given.train.take(np.arange(64))[0])
        done = trained(residual(), bare, teacher="original", alpha=1.0)
        assert smallest_distance(done, residual()) < 0.9 * smallest_distance(residual(), residual())

    def test_says_what_may_be_taken(self) -> None:
        done = trained(residual(), epochs=1, widths=(0.5, 1.0), round_to=8)
        space = space_of(done)
        assert set(space.widths.values()) == {(8, 16)}
        assert sum(map(len, space.depths.values())) == 1
        rebuilt = residual().rebuild(done.edits, done.module.state_dict())
        assert rebuilt.elastic == done.module.elastic == space.to_json()
        parts = trained(residual(), epochs=1, depth=False, kernels=False, inputs=(0.5, 1.0))
        assert not space_of(parts).depths
        assert not space_of(parts).kernels
        assert space_of(parts).inputs == (0.5, 1.0)

    def test_the_same_every_time_and_another_seed_is_another_run(self) -> None:
        torch.manual_seed(1)
        one = trained(residual(), epochs=2).module.state_dict()
        torch.manual_seed(2)
        assert same(trained(residual(), epochs=2).module.state_dict(), one)
        assert not same(trained(residual(), epochs=2, seed=1).module.state_dict(), one)

    def test_goes_on_where_it_was_left(self) -> None:
        kept = Kept()
        whole = trained(residual(), epochs=4, shrink=0.5, checkpoint=kept)
        assert len(kept.states) == 4
        again = trained(residual(), epochs=4, shrink=0.5, checkpoint=replace(kept, at=1))
        assert same(again.module.state_dict(), whole.module.state_dict())

    def test_processes_that_share_a_batch_cut_the_same(self) -> None:
        one = trained(residual(), epochs=1).module.state_dict()
        two = trained(residual(), epochs=1, devices=2).module.state_dict()
        for name, value in one.items():
            assert torch.allclose(value, two[name], atol=1e-5), name

    @pytest.mark.parametrize("name", ["residual", "depthwise", "concat", "shuffle", "attention", "lstm"])
    def test_golden_nets(self, name: str) -> None:
        method = Supernet.model_validate({"epochs": 2, "importance": "l2", "round_to": 2, "kernels": False})
        done = method.apply(model(name), context(model(name), data(name)))
        assert not space_of(done).is_trivial
        assert all(value.isfinite().all() for value in done.module.state_dict().values())
        assert space_channels(done, space_of(done)).groups.keys() <= channel_groups(done).groups.keys()

    def test_without_epochs_channels_are_sorted_and_outputs_stay(self) -> None:
        done, x = trained(residual(), epochs=0), torch.randn(4, 2, 6, 6)
        assert space_of(done) == space_of(trained(residual(), epochs=0.1))
        weight = done.module.get_parameter("3.0.conv1.weight")
        assert not torch.equal(weight, residual().module.get_parameter("3.0.conv1.weight"))
        with torch.no_grad():
            assert torch.allclose(done.module(x), residual().module(x), atol=1e-5)


def loss_of(net: Model, subnet: Subnet) -> float:
    """How far the class scores of a subnet are from the original's on examples of training."""
    space = space_of(net)
    judge = Judge(
        Extractor(net, space, space_channels(net, space)),
        residual(),
        [(torch.from_numpy(_inputs()),)],
        problem(),
        Where(),
    )
    return judge.loss(subnet)


def _inputs() -> np.ndarray:
    train = problem().train
    assert train is not None
    return train.take(np.arange(len(train)))[0]


def narrowed(before: Model, **how: Any) -> Model:
    told = {key: how.pop(key) for key in ("progress", "checkpoint") if key in how}
    asked = {"epochs": 6, "batch_size": 16, "learning_rate": 0.05, "teacher": "original", **how}
    method = Supernet.model_validate({"front": 3, "evaluations": 30, **asked})
    return method.apply(before, _beside(before, **told))


def _beside(before: Model, **told: Any) -> Context:
    return replace(context(before, problem()), models={"original": residual()}, **told)


@pytest.fixture(scope="module")
def begun() -> Model:
    """A supernet, briefly trained."""
    return trained(residual(), epochs=4, teacher="original")


class TestFront:
    def test_networks_of_the_front_learn(self, begun: Model) -> None:
        told = Told()
        done = narrowed(begun, progress=told)
        space = space_of(done)
        assert 1 < len(space.among) <= 3
        assert replace(space, among=()) == space_of(begun)
        for one in space.among:
            assert space.contains(one)
            assert loss_of(done, one) < loss_of(begun, one)
        assert any("networks learn" in note for note in told.notes)
        rebuilt = begun.rebuild(done.edits, done.module.state_dict())
        assert rebuilt.elastic == space.to_json()
        assert Space.from_json(rebuilt.elastic) == space

    def test_subnet_looks_at_them_first(self, begun: Model) -> None:
        done = narrowed(begun)
        looked = held(done, _beside(done), Where(), "macs").seen(
            "macs", _beside(done), evaluations=len(space_of(done).among), samples=64
        )
        assert [one.subnet for one in looked] == list(space_of(done).among)

    def test_goes_on_where_it_was_left(self, begun: Model) -> None:
        kept = Kept()
        whole = narrowed(begun, epochs=4, checkpoint=kept)
        again = narrowed(begun, epochs=4, checkpoint=replace(kept, at=1))
        assert same(again.module.state_dict(), whole.module.state_dict())

    def test_excluded_layers_stay(self, begun: Model) -> None:
        done = narrowed(begun, where={"exclude": ["3.0.*"]})
        before, after = begun.module.state_dict(), done.module.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("3.0."))

    def test_needs_a_supernet_and_takes_its_space(self) -> None:
        with pytest.raises(RecipeError, match="this model is none") as error:
            narrowed(residual())
        assert "without front" in error.value.fix
        with pytest.raises(ValueError, match="widths is given"):
            Supernet.model_validate({"front": 4, "widths": [0.5, 1.0]})
        assert Supernet.model_validate(Supernet(front=4).model_dump(mode="json")).front == 4
        with pytest.raises(ValueError, match="there is no front"):
            Supernet.model_validate({"evaluations": 30})

    def test_it_says_when_nothing_may_be_cut(self, begun: Model) -> None:
        told = Told()
        done = narrowed(begun, where={"exclude": ["*"]}, progress=told)
        assert same(done.module.state_dict(), begun.module.state_dict())
        assert any("nothing of the supernet may be cut" in note for note in told.notes)


class TestWhere:
    def test_nothing_elastic_is_left(self) -> None:
        told = Told()
        done = trained(residual(), where={"exclude": ["*"]}, progress=told)
        assert same(done.module.state_dict(), residual().module.state_dict())
        assert space_of_supernet(done) is None
        assert any("nothing elastic" in note for note in told.notes)

    def test_others_stay_bit_for_bit_statistics_too(self) -> None:
        done = trained(residual(), epochs=2, where={"exclude": ["3.0.*"]})
        before, after = residual().module.state_dict(), done.module.state_dict()
        stayed = {name for name, value in before.items() if torch.equal(value, after[name])}
        assert {name for name in before if name.startswith("3.0.")} <= stayed
        assert "3.1.conv1.weight" not in stayed


class TestRefuses:
    def test_lessons_that_nobody_gives(self) -> None:
        with pytest.raises(ValueError, match="there is none"):
            Supernet.model_validate({"learn": "teacher"})
        with pytest.raises(ValueError, match="in every step"):
            Supernet.model_validate({"every": 2})
        with pytest.raises(ValueError, match="in every step"):
            Supernet.model_validate({"every": 2, "teacher": "original", "learn": "largest"})
        assert Supernet.model_validate({"every": 2, "teacher": "original"}).every == 2

    def test_a_network_with_nothing_elastic(self) -> None:
        net = model_of(nn.Sequential(nn.Flatten(), nn.Linear(72, 4)), torch.randn(2, 2, 6, 6))
        with pytest.raises(RecipeError, match="nothing elastic") as caught:
            trained(net)
        assert caught.value.fix is not None

    def test_no_examples(self) -> None:
        x = problem().scored.take(np.arange(8))[0]  # type: ignore[union-attr]
        with pytest.raises(DataError, match="no training examples"):
            trained(residual(), Data.of(x=x))

    def test_examples_without_labels(self) -> None:
        x = problem().train.take(np.arange(8))[0]  # type: ignore[union-attr]
        with pytest.raises(DataError, match="needs labels"):
            trained(residual(), Data.of(x_train=x))

    def test_mixed_examples(self) -> None:
        with pytest.raises(ValueError, match="shift"):
            Supernet.model_validate({"augment": ["mixup"]})


def test_tells_how_far_it_is() -> None:
    told = Told()
    trained(residual(), epochs=2, progress=told)
    assert ("training", 8) in told.bars
