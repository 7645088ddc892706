"""Channels that may be rescaled together: the network stays what it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.formats import IntQuant
from featherweight.model import Entry, Model
from featherweight.tools.scaling import ScalingGroup, Slot, scaled, scaling_groups
from golden import folded, inputs, model, model_of
from nets import NETS


def rescaled(start: Model, groups: list[ScalingGroup], spread: float = 0.5, seed: int = 0) -> Model:
    """Every group with factors of its own."""
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.exp(spread * torch.randn(group.channels, generator=generator)) for group in groups]
    module = start.copy_module()
    with torch.no_grad():
        for name, tensor in scaled(start.parameters, zip(groups, factors, strict=True)).items():
            module.get_parameter(name).copy_(tensor)
    return start.evolve(module=module)


def difference(one: Model, other: Model, x: Tensor) -> float:
    with torch.no_grad():
        first, second = one.module(x), other.module(x)
    return float((first - second).norm() / first.norm())


def named(groups: list[ScalingGroup]) -> list[str]:
    return [str(group) for group in groups]


def net(module: nn.Module, *shape: int) -> Model:
    torch.manual_seed(0)
    return model_of(module.eval(), torch.randn(2, *shape))


class Wrapped(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.between = between
        self.second = nn.Conv2d(channels, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", ["as it comes", "folded"])
def test_outputs_of_golden_nets_do_not_change(name: str, kind: str) -> None:
    start = model(name) if kind == "as it comes" else folded(name)
    groups = scaling_groups(start)
    x = 0.3 * torch.from_numpy(inputs(name, 4))  # no clamp is reached
    done = rescaled(start, groups, 0.2)
    assert difference(start, done, x) < 1e-5
    touched = [name for group in groups for name in {slot.parameter for slot in group.slots}]
    changed = [key for key, one in start.parameters.items() if not torch.equal(one, done.parameters[key])]
    assert sorted(set(touched)) == sorted(changed)


CARRIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "avg_pool": lambda x: F.avg_pool2d(x, 2, padding=1),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "upsample": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "dropout": lambda x: F.dropout(x, 0.5, False),
    "times": lambda x: 0.25 * x / 3,
    "itself": lambda x: x + F.relu(x),
    "moved": lambda x: x.transpose(1, 3).transpose(3, 1).flip(1),
    "there and back": lambda x: x.reshape(x.shape[0], 2, 2, 8, 8).permute(0, 2, 1, 3, 4).reshape(-1, 4, 8, 8),
    "clamp from zero": lambda x: x.clamp(min=0),
    "far clamp": lambda x: x.clamp(0, 1000),
}
STOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(1),
    "plus a number": lambda x: x + 1,
    "one over": lambda x: 1 / (x.square() + 1),
    "square": lambda x: x * x,
    "clamp elsewhere": lambda x: x.clamp(-1, 1),
    "mean of channels": lambda x: x - x.mean(1, keepdim=True),
    "gated by itself": lambda x: x * torch.sigmoid(x),
}


@pytest.mark.parametrize("name", CARRIES)
def test_what_lets_factors_through(name: str) -> None:
    start = net(Wrapped(CARRIES[name]), 3, 8, 8)
    (group,) = scaling_groups(start)
    assert group.channels == 4
    assert str(group) == "4 channels: first.weight + first.bias -> second.weight"
    assert difference(start, rescaled(start, [group]), torch.randn(3, 3, 8, 8)) < 1e-5


@pytest.mark.parametrize("name", STOPS)
def test_what_does_not(name: str) -> None:
    assert scaling_groups(net(Wrapped(STOPS[name]), 3, 8, 8)) == []


@pytest.mark.parametrize("name", ["relu", "there and back", "sigmoid", "mean of channels", "itself"])
def test_a_factor_alone_is_allowed_where_brute_force_says_so(name: str) -> None:
    """Scaling channel c behind ``first`` and before ``second`` by 2 keeps the output, or is in no group."""
    start = net(Wrapped({**CARRIES, **STOPS}[name]), 3, 8, 8)
    x = torch.randn(3, 3, 8, 8)
    parameters = start.parameters

    def free(c: int, d: int) -> bool:
        module = start.copy_module()
        with torch.no_grad():
            module.get_parameter("first.weight")[c] *= 2
            module.get_parameter("first.bias")[c] *= 2
            module.get_parameter("second.weight")[:, d] /= 2
        return difference(start, start.evolve(module=module), x) < 1e-5

    allowed = {(c, d) for c in range(4) for d in range(4) if free(c, d)}
    found = set()
    for group in scaling_groups(start):
        made = {slot.parameter: slot.index for slot in group.producers}["first.weight"].reshape(-1)
        read = group.consumers[0].index.reshape(-1)
        found |= {(c, d) for c in range(4) for d in range(4) if made[c] == read[d] and made[c] >= 0}
    assert found == allowed
    assert set(parameters) == {"first.weight", "first.bias", "second.weight", "second.bias"}


class Branches(nn.Module):
    """A residual chain, a concatenation, a grouped and a depthwise convolution, and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Conv2d(4, 4, 1)
        self.side = nn.Conv2d(3, 6, 1)
        self.grouped = nn.Conv2d(10, 8, 1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, groups=2)
        self.head = nn.Linear(4 * 7 * 7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.block(F.relu(y))
        y = F.relu(self.grouped(torch.cat([self.side(x), y], 1)))
        return self.head(self.up(self.depthwise(y)).flatten(1))


def test_branches() -> None:
    start = net(Branches(), 3, 8, 8)
    groups = scaling_groups(start)
    assert named(groups) == [
        "4 channels: stem.weight + stem.bias + block.weight + block.bias -> block.weight + grouped.weight",
        "6 channels: side.weight + side.bias -> grouped.weight",
        "8 channels: grouped.weight + grouped.bias -> depthwise.weight",
        "8 channels: depthwise.weight + depthwise.bias -> up.weight",
        "4 channels: up.weight + up.bias -> head.weight",
    ]
    assert difference(start, rescaled(start, groups), torch.randn(3, 3, 8, 8)) < 1e-5
    reads = {slot.parameter: slot for slot in groups[0].consumers}["grouped.weight"]
    assert reads.index.flatten(1).tolist() == [[-1] * 5] * 4 + [[-1, 0, 1, 2, 3]] * 4  # groups of 5 inputs
    assert groups[4].consumers[0].index.tolist() == [[c for c in range(4) for _ in range(49)]]


def test_a_limit_of_a_clamp_is_told() -> None:
    (group,) = scaling_groups(net(Wrapped(F.relu6), 3, 8, 8))
    assert [(one.value, one.limit) for one in group.carriers if one.limit] == [("first#0:0", 6.0)]


class Padded(nn.Module):
    """A shortcut that zeros make wider, as in the first ResNets for small pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.wide = nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        return self.head(F.relu(self.wide(y) + F.pad(y, (0, 0, 0, 0, 2, 2))))


def test_zeros_beside_channels_take_any_factor() -> None:
    start = net(Padded(), 3, 8, 8)
    (group,) = scaling_groups(start)
    assert group.channels == 8
    assert difference(start, rescaled(start, [group]), torch.randn(3, 3, 8, 8)) < 1e-5


class Twice(nn.Module):
    """A layer called twice, and one whose weight is also multiplied with in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 6)
        self.block = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.block(F.relu(self.block(self.embed(x)))))
        return self.head(F.relu(self.tied(y))) + self.tied.weight.abs().sum()


def test_a_layer_called_twice_has_one_factor_on_both_sides() -> None:
    start = net(Twice(), 6)
    groups = scaling_groups(start)
    assert groups == []  # 'tied' is held, so its inputs are, and with them all that 'block' makes and reads


def test_entries_agree() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(5, 4)
            self.one = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.one(F.relu(self.stem(x)))))

        def features(self, x: Tensor) -> Tensor:
            return F.relu(self.stem(x))

    module = Two().eval()
    x = torch.randn(2, 5)
    entries = {
        "forward": Entry((x,), ("x",), ("y",), {"x": {0: "batch"}}),
        "features": Entry((x,), ("x",), ("y",), {"x": {0: "batch"}}, "features"),
    }
    both, one = Model(module, entries), Model(module, {"forward": entries["forward"]})
    assert named(scaling_groups(one)) == [
        "4 channels: stem.weight + stem.bias -> one.weight",
        "4 channels: one.weight + one.bias -> head.weight",
    ]
    assert named(scaling_groups(both)) == ["4 channels: one.weight + one.bias -> head.weight"]


def test_what_is_excluded_held_or_has_a_format_takes_no_part() -> None:
    start = net(Wrapped(F.relu), 3, 8, 8)
    assert scaling_groups(start, lambda path, kind: path != "second") == []
    assert scaling_groups(start, held=["first.bias"]) == []
    stored = IntQuant(-torch.ones(()), torch.ones(()))
    assert scaling_groups(start.evolve(formats={"second.weight": (stored,)})) == []
    assert scaling_groups(start.evolve(formats={"first#0:0": (stored,)})) == []
    assert len(scaling_groups(start)) == 1


def test_factors_meet_in_one_weight() -> None:
    weight = torch.arange(1.0, 7.0).reshape(2, 3)
    out = ScalingGroup(2, (Slot("w", 1, torch.tensor([[0], [1]])),), ())
    into = ScalingGroup(3, (Slot("w", -1, torch.tensor([[0, 1, -1]])),), ())
    made = scaled({"w": weight}, [(out, torch.tensor([2.0, 3.0])), (into, torch.tensor([4.0, 5.0, 6.0]))])
    wanted = weight * torch.tensor([[2.0], [3.0]]) / torch.tensor([[4.0, 5.0, 1.0]])
    assert torch.allclose(made["w"], wanted)
    assert torch.equal(weight, torch.arange(1.0, 7.0).reshape(2, 3))
