"""The sandwich: gradients are those of subnets that were cut; what is drawn follows from seed and share."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from featherweight.elastic import Openness, Space, Subnet
from featherweight.model import Model
from featherweight.tools.distill_losses import OutputKind, soft_target_loss
from featherweight.tools.elastic_cut import Extractor, Slices
from featherweight.tools.elastic_space import find_space
from featherweight.tools.objectives import TaskLoss
from featherweight.tools.sandwich import Layers, Sandwich, opened
from featherweight.tools.simulated import Simulated
from golden import inputs, model

KINDS = (OutputKind("logits", 1),)


class Spy(Extractor):
    """An extractor that tells what it was asked for."""

    def __init__(self, net: Model) -> None:
        self.space, channels, _ = find_space(net, multiple=2, kernels=False)
        super().__init__(net, self.space, channels)
        self.asked: list[Subnet] = []

    def extract(self, subnet: Subnet) -> Model:
        self.asked.append(subnet)
        return super().extract(subnet)


def sandwich(spy: Spy, layers: Layers | None = None, still: tuple[str, ...] = ()) -> Sandwich:
    made = Sandwich(
        TaskLoss(highest=9), spy.space, spy, KINDS, layers or Layers(random=2, pool=3), "forward", still=still
    )
    return made.train()


def gradients(net: Simulated) -> dict[str, Tensor]:
    return {name: one.grad for name, one in net.module.named_parameters() if one.grad is not None}


def batch(name: str, count: int = 8) -> tuple[tuple[Tensor, ...], Tensor]:
    return (torch.from_numpy(inputs(name, count)),), torch.arange(count) % 10


def spread(slices: Slices, own: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a subnet in the places of the supernet's parameters."""
    places = {name: torch.arange(value.numel()).reshape(value.shape) for name, value in whole.items()}
    found = {name: torch.zeros(value.numel()) for name, value in whole.items()}
    picked = slices.of(places)
    for name, part in slices.parts.items():
        if name in own and part.source in found:
            found[part.source][picked[name].flatten()] += own[name].flatten()
    return {name: value.reshape(whole[name].shape) for name, value in found.items()}


@pytest.mark.parametrize("name", ["residual", "depthwise", "concat", "shuffle", "attention", "lstm"])
def test_gradients_are_those_of_subnets_that_were_cut(name: str) -> None:
    net, spy = Simulated(model(name)), Spy(model(name))
    objective = sandwich(spy)
    x, targets = batch(name)
    torch.manual_seed(0)
    objective.step(net, x, targets).backward()
    found = gradients(net)

    whole = Simulated(model(name))
    torch.manual_seed(0)
    output = whole(*x)[0]
    TaskLoss(highest=9)(((output),), x, targets).backward()
    wanted = {key: value.clone() for key, value in gradients(whole).items()}
    assert len(spy.asked) == 3
    cutter = Extractor(model(name), spy.space, find_space(model(name), multiple=2, kernels=False)[1])
    for subnet in spy.asked:
        sub = cutter.extract(subnet)
        sub.module.train()
        soft_target_loss(sub.module(*x), output.detach(), 1.0).backward()
        own = {key: one.grad for key, one in sub.module.named_parameters() if one.grad is not None}
        for key, value in spread(cutter.slices(sub), own, whole.module.state_dict()).items():
            if key in wanted:
                wanted[key] += value
    for key, value in wanted.items():
        assert torch.allclose(4 * found[key], value, atol=1e-5, rtol=1e-4), key


def test_the_supernet_keeps_its_own_statistics() -> None:
    """Those of its norms are the largest network's alone."""
    x, targets = batch("residual")
    one, two = Simulated(model("residual")), Simulated(model("residual"))
    sandwich(Spy(model("residual"))).step(one, x, targets)
    two(*x)
    for name, value in two.module.named_buffers():
        assert torch.equal(one.module.get_buffer(name), value), name


def test_in_inference_the_largest_network_counts_alone() -> None:
    spy, (x, targets) = Spy(model("residual")), batch("residual")
    net = Simulated(model("residual")).eval()
    loss = sandwich(spy).eval().step(net, x, targets)
    assert torch.equal(loss, TaskLoss(highest=9)(net(*x), x, targets))
    assert not spy.asked


def test_where_a_teacher_stays_the_largest_network_runs_now_and_then() -> None:
    spy, (x, targets) = Spy(model("residual")), batch("residual")
    objective = sandwich(spy, Layers(random=1, steps=4, every=2, inplace=False))
    losses, calls = [], []
    for step in range(4):
        net = Simulated(model("residual"))
        net.register_forward_hook(lambda *_, step=step: calls.append(step))
        objective.advance(step / 4)
        losses.append(objective.step(net, x, targets))
    assert calls == [0, 2]
    sub = spy.extract(spy.space.smallest()).module.train()
    wanted = TaskLoss(highest=9)((sub(*x),), x, targets)
    alone = sandwich(spy, Layers(random=0, steps=2, every=2, inplace=False))
    alone.advance(0.5)
    assert torch.allclose(alone.step(Simulated(model("residual")), x, targets), wanted)


def test_excluded_layers_run_as_in_inference() -> None:
    spy, (x, targets) = Spy(model("residual")), batch("residual")
    norms = [path for path, one in model("residual").module.named_modules() if "Norm" in type(one).__name__]
    still = sandwich(spy, Layers(random=0), still=tuple(norms))
    free = sandwich(spy, Layers(random=0))
    losses = [one.step(Simulated(model("residual")), x, targets).detach() for one in (still, free)]
    assert losses[0] != losses[1]


def keys(layers: Layers, shares: list[float]) -> list[str]:
    """Everything that is cut when training is so far."""
    spy, (x, targets) = Spy(model("residual")), batch("residual")
    net, objective = Simulated(model("residual")), sandwich(spy, layers)
    for share in shares:
        objective.advance(share)
        objective.step(net, x, targets)
    return [subnet.key for subnet in spy.asked]


class TestDraws:
    def test_follow_from_the_seed_and_the_share(self) -> None:
        layers, shares = Layers(random=2, drawn=4, pool=2), [0.0, 0.25, 0.5, 0.75]
        torch.manual_seed(1)
        one = keys(layers, shares)
        torch.manual_seed(2)
        assert keys(layers, shares) == one
        assert keys(Layers(random=2, drawn=4, pool=2, seed=1), shares) != one

    def test_are_the_same_after_a_break(self) -> None:
        layers, (x, targets) = Layers(random=2, drawn=8, pool=3), batch("residual")
        whole, rest = (sandwich(Spy(model("residual")), layers) for _ in range(2))
        losses: list[list[Tensor]] = [[], []]
        for objective, shares, found in (
            (whole, (0.0, 0.25, 0.5, 0.75), losses[0]),
            (rest, (0.5, 0.75), losses[1]),
        ):
            for share in shares:
                objective.advance(share)
                found.append(objective.step(Simulated(model("residual")), x, targets).detach())
        assert losses[0][2:] == losses[1]
        assert losses[0][2] != losses[0][3]

    def test_are_cut_now_and_then(self) -> None:
        steps = [step / 40 for step in range(40)]
        asked = keys(Layers(random=1, drawn=5, pool=2), steps)
        assert 4 <= len(asked) <= 8  # the smallest one, and at most five after the first two

    def test_open_while_training_goes_on(self) -> None:
        space = Space(widths={"a": (4, 8)}, depths={"b": ("b.1",)}, kernels={"c": (3, 5)})
        layers = Layers(shrink=0.6)
        assert opened(space, layers, 0.0) == Openness(widths=0, depths=0, kernels=0, inputs=1)
        found = opened(space, layers, 0.3)
        assert (found.kernels, found.widths) == (1.0, 0.0)
        assert found.depths == pytest.approx(0.5)
        assert opened(space, layers, 0.6) == opened(space, Layers(), 0.0) == Openness()
        some = Space(widths={"a": (4, 8)})
        assert opened(some, layers, 0.3).widths == pytest.approx(0.5)

    def test_the_first_step_of_a_space_that_opens_has_whole_networks(self) -> None:
        spy = Spy(model("residual"))
        asked = keys(Layers(random=2, drawn=8, pool=2, shrink=0.9), [0.0])
        assert set(asked) == {spy.space.largest().key}
