"""What is found to be elastic: widths, stages, kernels, pixels, and the reasons for the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import golden
from featherweight.tools.elastic_cut import Extractor
from featherweight.tools.elastic_space import find_space, without_excluded
from featherweight.where import Where


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, size, padding=size // 2), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


class Stages(nn.Module):
    """Three blocks on one trunk, a stride, one more, and a fixed picture size where it is asked for."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Sequential(Block(3), Block(5), Block(7))
        self.down = nn.Conv2d(16, 16, 2, 2)
        self.second = nn.Sequential(Block(3))
        self.flat = flat
        self.head = nn.Linear(16 * 16 if flat else 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.down(self.first(self.stem(x))))
        return self.head(y.flatten(1) if self.flat else y.mean((2, 3)))


def _model(flat: bool = False) -> golden.Model:
    torch.manual_seed(0)
    return golden.model_of(Stages(flat), torch.randn(2, 3, 8, 8))


def test_widths_are_multiples_that_follow_the_shares() -> None:
    space, channels, _ = find_space(_model(), widths=(0.1, 0.5, 0.8), multiple=4)
    assert space.widths == {"stem": (4, 8, 12, 16), "down": (4, 8, 12, 16)}
    assert set(channels.groups) == {"stem", "down"}
    space, _, _ = find_space(_model(), widths=(0.5, 1.0), multiple=64)
    assert space.widths["stem"] == (8, 16)  # narrower than the multiple


def test_the_last_blocks_go_first_and_one_of_several_stays() -> None:
    space, _, _ = find_space(_model())
    assert space.depths == {"first": ("first.2", "first.1"), "second": ("second.0",)}
    assert find_space(_model(), depth=False)[0].depths == {}


def test_kernels_shrink_to_three_or_to_what_is_said() -> None:
    assert find_space(_model())[0].kernels == {"first.1.conv": (3, 5), "first.2.conv": (3, 5, 7)}
    assert find_space(_model(), kernels=False)[0].kernels == {}
    told = find_space(_model(), kernels=(1, 5))[0].kernels
    assert told["first.2.conv"] == (1, 5, 7)
    assert told["stem"] == (1, 3)
    assert "down" not in told  # even sides do not become odd ones


def test_pixels_go_where_nothing_holds_their_number() -> None:
    space, _, reasons = find_space(_model(), inputs=(0.5, 1.0))
    assert space.inputs == (0.5, 1.0)
    assert "input" not in reasons
    space, _, reasons = find_space(_model(flat=True), inputs=(0.5, 1.0))
    assert space.inputs == (1.0,)
    assert "as large as it is" in reasons["input"]


def test_excluded_layers_stay() -> None:
    space, _, _ = find_space(_model(), where=Where.model_validate({"exclude": ["first.1"]}))
    assert space.depths["first"] == ("first.2",)
    assert set(space.widths) == {"down"}
    assert set(space.kernels) == {"first.2.conv"}
    assert find_space(_model(), where=Where.model_validate({"exclude": ["*"]}))[0].is_trivial


def test_a_space_may_be_narrowed_later() -> None:
    model = _model()
    space, channels, _ = find_space(model, inputs=(0.5, 1.0))
    assert without_excluded(space, channels, model, Where()) is space
    less = without_excluded(space, channels, model, Where.model_validate({"exclude": ["first.2", "down"]}))
    assert less.depths == {"first": ("first.1",), "second": ("second.0",)}
    assert less.widths == {}
    assert set(less.kernels) == {"first.1.conv"}
    assert less.inputs == space.inputs
    assert without_excluded(space, channels, model, Where.model_validate({"exclude": ["*"]})).is_trivial


class Tied(nn.Module):
    """A weight that an output shows: its channels cannot go."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.one(x)
        return y, self.two(y)


def test_a_network_with_nothing_elastic_says_why() -> None:
    space, channels, reasons = find_space(golden.model_of(Tied(), torch.randn(2, 6), outputs=2))
    assert space.is_trivial
    assert not channels.groups
    assert set(reasons) == {"one", "two"}


def test_the_smallest_of_all_can_be_cut() -> None:
    model = _model()
    space, channels, _ = find_space(model, inputs=(0.5, 1.0), multiple=4)
    small = Extractor(model, space, channels).extract(space.smallest())
    assert small.module.get_parameter("first.0.conv.weight").shape == (4, 4, 3, 3)
    assert not any(name.startswith(("first.1", "first.2", "second")) for name in small.module.state_dict())
    with torch.no_grad():
        assert small.module(torch.randn(3, 3, 8, 8)).shape == (3, 5)
