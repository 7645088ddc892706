"""What subnets cost before they are cut, and which ones the search finds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping

import pytest
import torch

import elastic_nets
import golden
from featherweight.elastic import Space, Subnet
from featherweight.tools.costs import totals
from featherweight.tools.elastic_cut import Extractor
from featherweight.tools.elastic_space import find_space
from featherweight.tools.groups import Channels
from featherweight.tools.subnet_costs import SubnetCosts
from featherweight.tools.subnet_search import Judge, Seen, front, search, spread
from featherweight.where import Where


class Prices:
    """A device on which a layer takes a thousandth of a second, and as its channels go."""

    def __init__(self, layers: Iterable[str]) -> None:
        self.layers = set(layers)

    def seconds(self, layer: str, integers: bool) -> float | None:
        return 0.001 if layer in self.layers else None

    def conversion(self, layer: str) -> float | None:
        return None

    def total(self, integers: bool) -> float | None:
        return 0.001 * len(self.layers) + 0.004

    def scaled(self, layer: str, inputs: float, outputs: float, integers: bool) -> float | None:
        return 0.001 * inputs * outputs if layer in self.layers else None


def _made(name: str) -> tuple[golden.Model, Space, Channels, Extractor]:
    model = elastic_nets.model(name)
    space, channels, _ = find_space(model, multiple=2, inputs=(0.5, 1.0), kernels=(1, 3, 5))
    return model, space, channels, Extractor(model, space, channels)


@pytest.mark.parametrize(
    "name", ["residual", "depthwise", "concat", "shuffle", "attention", "lstm", "squeeze_excite"]
)
def test_costs_are_those_of_what_is_cut(name: str) -> None:
    model, space, _, extractor = _made(name)
    costs = SubnetCosts(extractor, space, model, None)
    rng = random.Random(2)
    for subnet in (space.smallest(), space.sample(rng), space.sample(rng)):
        seen, real = costs.of(subnet), totals(extractor.extract(subnet))
        assert seen["parameters"] == pytest.approx(real["params"])
        assert seen["bytes"] == pytest.approx(real["bytes"])
        assert seen["macs"] == pytest.approx(real["macs"], rel=0.02)
    assert "latency" not in seen


def test_seconds_follow_what_was_measured() -> None:
    model, space, _, extractor = _made("residual")
    convs = [path for path, layer in model.module.named_modules() if isinstance(layer, torch.nn.Conv2d)]
    prices = Prices(convs)
    costs = SubnetCosts(extractor, space, model, prices)
    whole = costs.of(space.largest())["latency"]
    assert whole == pytest.approx(prices.total(integers=False))
    shallow = costs.of(Subnet(depths={"layer1": 1}))["latency"]
    assert whole - 0.002 - 0.004 < shallow < whole - 0.002  # two layers, and what is between them
    inner = space.widths["layer1.conv1"][-1]
    narrow = costs.of(Subnet(widths={"layer1.conv1": inner // 2}))["latency"]
    assert whole - 0.001 - 0.001 < narrow < whole - 0.001  # half of two
    assert costs.of(Subnet(input=0.5))["latency"] == pytest.approx(whole / 4, rel=0.2)
    assert costs.of(Subnet(kernels={"layer1.conv1": 1}))["latency"] == pytest.approx(whole - 0.001 * 8 / 9)


def _track(items: Iterable[int], description: str, total: int) -> Iterator[int]:
    yield from items


class Known:
    """A judge that knows which channels matter: the loss is what is gone of one group alone."""

    def __init__(self, important: str) -> None:
        self.important, self.calls = important, 0

    def loss(self, subnet: Subnet) -> float:
        self.calls += 1
        return 1.0 / subnet.widths[self.important]


def test_the_front_is_found_in_a_large_space() -> None:
    _, space, _, extractor = _made("depthwise")
    space = Space(space.widths)
    assert space.count > 1000
    costs = SubnetCosts(extractor, space, golden.model("depthwise"), None)
    important = next(iter(space.widths))
    judge = Known(important)
    found = search(space, costs, judge, extractor, "macs", evaluations=120, seed=0, track=_track)  # type: ignore[arg-type]
    assert 110 <= len(found) == judge.calls <= 120  # the sampler may repeat itself
    best = front(found, "macs")
    assert best[-1].subnet.widths[important] == space.widths[important][-1]
    smallest = costs.of(space.smallest())["macs"]
    alone = {**space.smallest().widths, important: space.widths[important][-1]}
    ideal = costs.of(Subnet(alone))["macs"]
    whole = costs.of(space.largest())["macs"]
    assert smallest < ideal <= best[-1].costs["macs"] < 0.5 * (ideal + whole)
    again = search(space, costs, Known(important), extractor, "macs", evaluations=120, seed=0, track=_track)  # type: ignore[arg-type]
    assert [one.subnet for one in again] == [one.subnet for one in found]


def test_a_front_is_spread_without_naming_a_network_twice() -> None:
    """A front that is dense at one end and has nothing between: the nearest one may be taken already."""
    shares = (0.1, 0.11, 0.12, 0.13, 0.9, 1.0)
    found = [
        Seen(Subnet(widths={"layer": place}), {"macs": share}, -share) for place, share in enumerate(shares)
    ]
    assert [one.costs["macs"] for one in spread(found, "macs", 2)] == [0.13, 0.9]
    assert len({one.subnet.key for one in spread(found, "macs", 5)}) == 5
    assert spread(found, "macs", 9) == found
    assert spread([], "macs", 3) == []


def test_a_small_space_is_looked_through_whole() -> None:
    model, space, _, extractor = _made("residual")
    space = Space(dict(list(space.widths.items())[:1]), space.depths)
    costs = SubnetCosts(extractor, space, model, None)
    batches = [(torch.from_numpy(golden.inputs("residual", 16)),)]
    judge = Judge(extractor, model, batches, golden.data("residual"), Where())
    found = search(space, costs, judge, extractor, "macs", evaluations=50, seed=0, track=_track)
    assert len(found) == space.count
    assert Seen.from_json(found[0].to_json()) == found[0]
    best = front(found, "parameters")
    assert [one.loss for one in best] == sorted((one.loss for one in best), reverse=True)
    assert len(best) < len(found) or len(found) < 3


def test_what_went_with_a_block_makes_no_other_network() -> None:
    _, space, _, extractor = _made("residual")
    inner = "layer1.conv1"
    one, two = (Subnet({inner: width}, {"layer1": 1}) for width in space.widths[inner][:2])
    assert extractor.signature(one) == extractor.signature(two)
    assert extractor.signature(Subnet({inner: 2})) != extractor.signature(Subnet({inner: 4}))


def test_a_judge_prefers_the_network_that_says_the_same() -> None:
    model, space, _, extractor = _made("residual")
    batches = [(torch.from_numpy(golden.inputs("residual", 32)),)]
    judge = Judge(extractor, model, batches, golden.data("residual"), Where())
    assert judge.loss(space.largest()) < judge.loss(space.smallest())


class Adds:
    """A judge by whom losses add up, the same for every option that is left out."""

    def __init__(self, space: Space, prices: Mapping[str, float]) -> None:
        self.space, self.prices = space, prices

    def loss(self, subnet: Subnet) -> float:
        return sum(
            price * (1 - subnet.widths[name] / self.space.widths[name][-1])
            for name, price in self.prices.items()
        )


def test_the_way_down_is_the_best_where_losses_add_up() -> None:
    _, space, _, extractor = _made("depthwise")
    space = Space(space.widths)
    costs = SubnetCosts(extractor, space, golden.model("depthwise"), None)
    prices = {name: 10.0**-place for place, name in enumerate(space.widths)}
    found = search(
        space, costs, Adds(space, prices), extractor, "parameters",  # type: ignore[arg-type]
        evaluations=150, seed=0, track=_track,
    )  # fmt: skip
    best = front(found, "parameters")
    whole = costs.of(space.largest())["parameters"]
    assert len(best) > 12
    assert best[-1].loss == 0
    assert best[-1].costs["parameters"] == whole
    shares = [one.costs["parameters"] / whole for one in best]
    assert max(larger - smaller for smaller, larger in itertools.pairwise(shares)) < 0.25
    rng = random.Random(1)
    for _ in range(100):  # nothing that is drawn is better by much
        one = space.sample(rng)
        cost, loss = costs.of(one)["parameters"], Adds(space, prices).loss(one)
        assert min(seen.loss for seen in found if seen.costs["parameters"] <= cost * 1.02) <= loss + 0.05


def test_few_evaluations_begin_without_single_choices() -> None:
    _, space, _, extractor = _made("depthwise")
    costs = SubnetCosts(extractor, space, golden.model("depthwise"), None)
    judge = Known(next(iter(space.widths)))
    found = search(space, costs, judge, extractor, "macs", evaluations=6, seed=0, track=_track)  # type: ignore[arg-type]
    assert len(found) == 6
