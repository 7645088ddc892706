"""Selection: foretold costs are those of the cut network; widths, scopes and budgets are kept to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from featherweight.tools.channels import channel_groups
from featherweight.tools.costs import totals
from featherweight.tools.cutting import cut
from featherweight.tools.groups import ChannelGroup, Channels
from featherweight.tools.importance import magnitudes
from featherweight.tools.selection import Limits, Ranking, below, isomorphic, select
from featherweight.tools.widths import Candidate, terms_of
from golden import model

NETS = (
    "residual",
    "depthwise",
    "concat",
    "shuffle",
    "attention",
    "lstm",
    "squeeze_excite",
    "linear3d",
    "shared",
)


def rankings(net: str, channels: Channels) -> dict[str, Ranking]:
    return {
        name: Ranking.of_scores(one.tolist()) for name, one in magnitudes(model(net), channels, "l2").items()
    }


@pytest.mark.parametrize("net", NETS)
def test_the_cost_of_a_candidate_is_that_of_the_cut_network(net: str) -> None:
    original, channels = model(net), channel_groups(model(net))
    rng = np.random.default_rng(0)
    drop = {
        name: sorted(rng.choice(group.size, max(1, group.size // 4), replace=False).tolist())
        for name, group in channels.groups.items()
    }
    done = totals(cut(original, channels, drop))
    for unit, key in (("macs", "macs"), ("parameters", "params"), ("bytes", "bytes")):
        candidate = Candidate(original, channels, terms_of(original, channels, unit))  # type: ignore[arg-type]
        assert candidate.whole == pytest.approx(totals(original)[key])
        saved = 0.0
        for name, gone in drop.items():
            saved += candidate.saving(name, gone)
            candidate.drop(name, gone)
            assert candidate.whole - saved == pytest.approx(candidate.cost)
        assert candidate.cost == pytest.approx(done[key], rel=0.005)
        for name, gone in drop.items():
            candidate.restore(name, gone)
        assert candidate.cost == pytest.approx(candidate.whole)


class TestWidths:
    @pytest.mark.parametrize(
        ("kind", "size", "limits", "widths"),
        [
            ("channel", 32, Limits(8), (32, 24, 16, 8)),
            ("channel", 20, Limits(8), (20, 16, 8)),
            ("channel", 12, Limits(8), (12, 8, 4)),
            ("channel", 32, Limits(8, least=12), (32, 24, 16)),
            ("channel", 32, Limits(8, most=0.5), (32, 24, 16)),
            ("head", 4, Limits(8), (4, 3, 2, 1)),
            ("head_dim", 8, Limits(16), (8, 4)),
            ("channel", 1, Limits(8), (1,)),
        ],
    )
    def test_of_a_group(self, kind: Any, size: int, limits: Limits, widths: tuple[int, ...]) -> None:
        assert limits.widths(ChannelGroup("one", kind, size, ())) == widths

    def test_very_wide_groups_have_fewer(self) -> None:
        found = Limits(1).widths(ChannelGroup("one", "channel", 2048, ()))
        assert found[0] == 2048
        assert len(found) <= 65


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("scope", ["global", "layer", "isomorphic"])
@pytest.mark.parametrize("priced", [True, False])
def test_the_budget_is_met_with_whole_multiples(net: str, scope: Any, priced: bool) -> None:
    channels = channel_groups(model(net))
    candidate = Candidate(model(net), channels, terms_of(model(net), channels, "macs"))
    limits = Limits(2)
    assert select(candidate, channels, rankings(net, channels), 0.6, limits, scope=scope, priced=priced)
    assert candidate.cost <= 0.6 * candidate.whole * (1 + 1e-6)
    assert candidate.cost > 0.2 * candidate.whole
    for name, group in channels.groups.items():
        assert group.size - len(candidate.dropped[name]) in limits.widths(group)
        order = rankings(net, channels)[name].order
        assert candidate.dropped[name] == set(order[: len(candidate.dropped[name])])


def test_every_layer_loses_the_same_fraction() -> None:
    channels = channel_groups(model("depthwise"))
    candidate = Candidate(model("depthwise"), channels, terms_of(model("depthwise"), channels, "channels"))
    assert select(candidate, channels, rankings("depthwise", channels), 0.5, Limits(1), scope="layer")
    assert {len(candidate.dropped[name]) / group.size for name, group in channels.groups.items()} == {0.5}


def test_equal_shapes_are_ranked_together() -> None:
    channels = channel_groups(model("concat"))
    names = isomorphic(channels)
    assert sorted(name for own in names for name in own) == sorted(channels.groups)
    residual = isomorphic(channel_groups(model("residual")))
    assert ["layer1.conv1", "layer2.conv1"] in residual


def test_a_cheap_channel_of_large_savings_goes_first() -> None:
    channels = channel_groups(model("residual"))
    flat = {name: Ranking.of_scores([1.0] * group.size) for name, group in channels.groups.items()}
    candidate = Candidate(model("residual"), channels, terms_of(model("residual"), channels, "macs"))
    saved = {name: candidate.saving(name, [0]) for name in channels.groups}
    assert select(candidate, channels, flat, 0.8, Limits(1), priced=True)
    dearest = max(saved, key=lambda name: saved[name])
    assert candidate.dropped[dearest]


def test_what_cannot_be_reached_is_told() -> None:
    channels = channel_groups(model("residual"))
    candidate = Candidate(model("residual"), channels, terms_of(model("residual"), channels, "macs"))
    reached = select(candidate, channels, rankings("residual", channels), 0.01, Limits(8), priced=True)
    assert not reached
    for name, group in channels.groups.items():
        assert group.size - len(candidate.dropped[name]) == min(Limits(8).widths(group))


def test_a_threshold_takes_what_scores_below_a_share_of_the_mean() -> None:
    channels = Channels({"stem.0": channel_groups(model("residual")).groups["stem.0"]})
    candidate = Candidate(model("residual"), channels, terms_of(model("residual"), channels, "channels"))
    scores = [0.1, 2.0, 0.2, 1.0, 1.0, 1.0, 0.4, 2.3]
    below(candidate, channels, {"stem.0": Ranking.of_scores(scores)}, 0.5, Limits(1))
    assert candidate.dropped["stem.0"] == {0, 2, 6}
    candidate.restore("stem.0", [0, 2, 6])
    below(candidate, channels, {"stem.0": Ranking.of_scores(scores)}, 0.5, Limits(2))
    assert candidate.dropped["stem.0"] == {0, 2}  # six are a multiple of two
