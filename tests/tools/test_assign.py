"""The integer program against every assignment of small instances."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.tools.assign import Assignment, Option, OutOfReachError, assign

_PRICE = st.integers(0, 20).map(float)
_OPTION = st.builds(
    lambda loss, a, b: Option(loss, {"bytes": a, "seconds": b / 1000}),
    st.floats(0, 10, width=32).map(lambda x: round(x, 4)),
    _PRICE,
    _PRICE,
)
_ITEMS = st.lists(st.lists(_OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def every(items: list[list[Option]], limits: dict[str, float]) -> list[Assignment]:
    """All assignments within the limits, the best one first."""
    found = []
    for chosen in product(*(range(len(options)) for options in items)):
        picked = [options[index] for options, index in zip(items, chosen, strict=True)]
        prices = {name: sum(option.prices[name] for option in picked) for name in limits}
        if all(prices[name] <= limit for name, limit in limits.items()):
            found.append(Assignment(chosen, sum(option.loss for option in picked), prices))
    return sorted(found, key=lambda one: one.loss)


@settings(max_examples=60, deadline=None)
@given(items=_ITEMS, size=st.integers(0, 60), time=st.integers(0, 60), count=st.integers(1, 4))
def test_best_assignments_are_those_of_a_search_through_all(
    items: list[list[Option]], size: int, time: int, count: int
) -> None:
    limits = {"bytes": size + 0.5, "seconds": (time + 0.5) / 1000}
    wanted = every(items, limits)
    if not wanted:
        with pytest.raises(OutOfReachError) as told:
            assign(items, limits, count=count)
        loose = limits | {told.value.limit: told.value.smallest + 1e-9}
        tight = limits | {told.value.limit: told.value.smallest - 1e-6}
        assert not every(items, tight)
        broken_alone = [n for n in limits if sum(min(o.prices[n] for o in i) for i in items) > limits[n]]
        assert every(items, loose) or len(broken_alone) > 1
        return
    found = assign(items, limits, count=count)
    assert len(found) == min(count, len(wanted))
    assert len({one.chosen for one in found}) == len(found)
    for ours, theirs in zip(found, wanted, strict=False):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5, abs=1e-5)
        assert all(ours.prices[name] <= limit for name, limit in limits.items())


def test_a_limit_met_exactly_is_kept_to_the_byte() -> None:
    items = [[Option(0.0, {"bytes": 1_000_001.0}), Option(1.0, {"bytes": 500_000.0})] for _ in range(8)]
    (exact,) = assign(items, {"bytes": 8_000_008.0})
    assert exact.loss == 0
    (one_less,) = assign(items, {"bytes": 8_000_007.0})
    assert one_less.loss == 1
    assert one_less.prices["bytes"] == 7 * 1_000_001 + 500_000


def test_what_fits_exactly_fits_whatever_the_rounding_of_sums() -> None:
    shares = [0.1, 0.2, 0.3, 0.7, 0.013, 1e-7]
    items = [[Option(0.0, {"bits": share}), Option(1.0, {"bits": 0.0})] for share in shares]
    total = 0.0
    for share in reversed(shares):
        total += share
    (found,) = assign(items, {"bits": total})
    assert found.loss == 0


@pytest.mark.parametrize("limit", [-1.0, 0.0])
def test_nothing_is_left_of_a_budget(limit: float) -> None:
    items = [[Option(float(o), {"bytes": 0.0 if limit < 0 else 1.0}) for o in range(4)] for _ in range(20)]
    with pytest.raises(OutOfReachError) as told:
        assign(items, {"bytes": limit})
    assert told.value.smallest == (0.0 if limit < 0 else 20.0)


def test_small_losses_count_beside_large_ones() -> None:
    items = [
        [
            Option(1e-7 * (i + 1), {"bits": 8.0}),
            Option(1e-5 * (i + 1), {"bits": 4.0}),
            Option(5.0, {"bits": 2.0}),
        ]
        for i in range(10)
    ]
    (found,) = assign(items, {"bits": 60.0})
    assert found.chosen == (1, 1, 1, 1, 1, 0, 0, 0, 0, 0)


def test_next_best_differ_in_as_many_items_as_asked() -> None:
    items = [[Option(float(o + i), {"bits": float(8 - o)}) for o in range(3)] for i in range(6)]
    found = assign(items, {"bits": 42.0}, count=3, distance=3)
    assert len(found) == 3
    for index, one in enumerate(found):
        for better in found[:index]:
            assert better.loss <= one.loss
            assert sum(a != b for a, b in zip(one.chosen, better.chosen, strict=True)) >= 3


def test_beats_the_greedy_choice_where_that_is_led_astray() -> None:
    """Greedy by loss per byte takes the small sure gain and has no room left for the large one."""
    items = [
        [Option(10.0, {"bytes": 0.0}), Option(3.9, {"bytes": 6.0})],
        [Option(10.0, {"bytes": 0.0}), Option(0.5, {"bytes": 10.0})],
    ]
    (found,) = assign(items, {"bytes": 10.0})
    assert found.chosen == (0, 1)


def test_no_limits_take_the_least_loss_of_each() -> None:
    (found,) = assign([[Option(2.0, {}), Option(1.0, {})], [Option(0.0, {}), Option(1.0, {})]], {})
    assert found.chosen == (1, 0)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_refuses_what_is_no_number(loss: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        assign([[Option(loss, {})]], {})


def test_refuses_an_item_without_options() -> None:
    with pytest.raises(ValueError, match="no option"):
        assign([[]], {})


def test_says_nothing_on_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    """The solver prints on some instances, among them several of these."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        items = []
        for _ in range(60):
            elements, loss = 10 ** rng.uniform(2, 6), 10 ** rng.normal(-6, 1.5)
            items.append(
                [
                    Option(loss * 4.0 ** (8 - bits), {"bytes": elements * bits // 8})
                    for bits in (2, 3, 4, 6, 8)
                ]
            )
        most = sum(options[3].prices["bytes"] for options in items)
        assign(items, {"bytes": most * 0.7}, count=3, distance=6)
    assert capfd.readouterr().out == ""
