"""What is best, what blocks it, what would help: held against definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.engine.verdict import (
    UNMEASURED,
    UNRESOLVED,
    alternatives,
    choose,
    excess,
    figure,
    pareto_front,
    rejection,
    relaxation,
    score,
    violations,
)
from featherweight.outcome import AXES, Budget, Latency, Measurement, Preference, Trial, Violation

BASELINE = Measurement(
    quality_drop=0.0,
    bytes=1_000_000,
    latency_s=Latency(median=0.010, q1=0.010, q3=0.010),
    latency_ratio=1.0,
    resolved=True,
    memory_bytes=10_000_000,
)


def seen(
    drop: float | None = 0.001,
    size: int | None = 300_000,
    ratio: float | None = 0.5,
    *,
    resolved: bool | None = True,
    memory: int | None = 9_000_000,
    drop_ci: tuple[float, float] | None = None,
    ratio_ci: tuple[float, float] | None = None,
) -> Measurement:
    latency = None if ratio is None else Latency(median=ratio / 100, q1=ratio / 100, q3=ratio / 100)
    return Measurement(
        quality_drop=drop,
        quality_drop_ci95=drop_ci,
        bytes=size,
        latency_s=latency,
        latency_ratio=ratio,
        latency_ratio_ci95=ratio_ci,
        resolved=resolved,
        memory_bytes=memory,
    )


def trial(number: int, measurement: Measurement | None, state: Any = "measured", reason: str = "") -> Trial:
    return Trial(number=number, recipe={}, state=state, measurement=measurement, reason=reason)


# ---- violations


def test_no_limits_no_violations() -> None:
    assert violations(Budget(), Measurement()) == []


def test_each_axis_is_held_against_its_own_figure() -> None:
    budget = Budget(quality_drop=0.005, bytes=300_000, latency_s=0.005, memory_bytes=9_000_000)
    assert violations(budget, seen(0.005)) == []  # a limit that is met exactly is kept
    assert [v.axis for v in violations(budget, seen(0.0051, 300_001, 0.51, memory=9_000_001))] == list(AXES)
    (one,) = violations(budget, seen(size=300_001))
    assert one == Violation(axis="bytes", limit=300_000, value=300_001, reason="above the limit")


def test_a_figure_that_is_missing_keeps_no_limit() -> None:
    for axis in AXES:
        (one,) = violations(Budget(**{axis: 10**9}), Measurement(resolved=True))
        assert (one.axis, one.value, one.reason) == (axis, None, UNMEASURED)
    assert violations(Budget(quality_drop=1.0), seen(math.nan))[0].reason == UNMEASURED


@pytest.mark.parametrize("resolved", [False, None])
def test_an_unresolved_latency_violates_a_latency_budget_only(resolved: bool | None) -> None:
    (one,) = violations(Budget(latency_s=1.0), seen(resolved=resolved))
    assert (one.axis, one.reason, one.value) == ("latency_s", UNRESOLVED, 0.005)
    assert violations(Budget(bytes=10**9, quality_drop=1.0), seen(resolved=resolved)) == []


def test_confident_takes_the_upper_end() -> None:
    budget = Budget(quality_drop=0.005)
    assert violations(budget, seen(0.001, drop_ci=(-0.004, 0.006))) == []
    (one,) = violations(budget, seen(0.001, drop_ci=(-0.004, 0.006)), confident=True)
    assert one.value == 0.006 and "upper end" in one.reason
    assert violations(budget, seen(0.001, drop_ci=(-0.004, 0.005)), confident=True) == []
    assert violations(budget, seen(0.001), confident=True)[0].reason == UNMEASURED


def test_excess_is_relative() -> None:
    def one(axis: Any, limit: float, value: float | None, reason: str = "above the limit") -> float:
        return excess(Violation(axis=axis, limit=limit, value=value, reason=reason))

    assert one("bytes", 100, 150) == pytest.approx(0.5)
    assert one("quality_drop", 0.0, 0.002) == pytest.approx(2.0)
    assert one("bytes", 100, None) == math.inf
    assert one("latency_s", 1.0, 0.2, UNRESOLVED) == 0.05
    assert one("latency_s", 1.0, 2.0, UNRESOLVED) == 1.0


fractions = st.floats(-0.5, 0.5)
sizes = st.integers(1, 2_000_000)
ratios = st.floats(0.01, 3.0)
measurements = st.builds(
    seen,
    st.none() | fractions,
    st.none() | sizes,
    st.none() | ratios,
    resolved=st.sampled_from([True, False, None]),
    memory=st.none() | sizes,
    drop_ci=st.none() | st.tuples(fractions, fractions).map(lambda pair: (min(pair), max(pair))),
)
budgets = st.builds(
    Budget,
    quality_drop=st.none() | st.floats(0, 0.5),
    bytes=st.none() | sizes,
    latency_s=st.none() | st.floats(0, 0.03),
    memory_bytes=st.none() | sizes,
)


@settings(deadline=None)
@given(budgets, measurements, st.booleans())
def test_violations_are_exactly_the_limits_that_are_not_kept(
    budget: Budget, measurement: Measurement, confident: bool
) -> None:
    found = {item.axis: item for item in violations(budget, measurement, confident)}
    for axis in AXES:
        limit, value = getattr(budget, axis), measurement.value(axis)
        if confident and axis == "quality_drop":
            interval = measurement.quality_drop_ci95
            value = None if interval is None else interval[1]
        kept = limit is None or (value is not None and value <= limit)
        if axis == "latency_s" and limit is not None and not measurement.resolved:
            kept = False
        assert kept == (axis not in found)
        if axis in found:
            assert found[axis].limit == limit and excess(found[axis]) > 0


@settings(deadline=None)
@given(budgets, measurements, st.booleans())
def test_a_limit_moved_to_the_value_is_kept(
    budget: Budget, measurement: Measurement, confident: bool
) -> None:
    for item in violations(budget, measurement, confident):
        if item.value is not None and item.reason != UNRESOLVED:
            moved = budget.model_copy(update={item.axis: item.value})
            assert item.axis not in {v.axis for v in violations(moved, measurement, confident)}


# ---- score and rejection


def test_scores() -> None:
    one = seen(0.01, 250_000, 0.5)
    assert score(one, "balanced", BASELINE) == (0.125, 0.01)
    assert score(one, "latency", BASELINE) == (0.5, 0.25, 0.01)
    assert score(one, "bytes", BASELINE) == (0.25, 0.5, 0.01)
    assert score(one, "quality", BASELINE) == (0.01, 0.125)
    assert score(seen(ratio=None), "balanced", BASELINE)[0] == math.inf
    assert score(one, "bytes", Measurement())[0] == math.inf
    twin = BASELINE.model_copy(update={"packed_bytes": 900_000})
    packed = one.model_copy(update={"packed_bytes": 56_250})
    assert score(packed, "balanced", twin) == (0.5 * 0.125, 0.01), (
        "a quarter stored and a sixteenth downloaded"
    )
    assert score(packed, "bytes", twin) == score(one, "bytes", twin) == (0.25, 0.5, 0.01)
    assert score(packed, "balanced", BASELINE) == score(one, "balanced", twin) == (0.125, 0.01)


@pytest.mark.parametrize(
    ("measurement", "budget", "prefer", "reason"),
    [
        (seen(), Budget(), "balanced", None),
        (
            seen(ratio=1.21, ratio_ci=(1.18, 1.24)),
            Budget(latency_s=1.0),
            "balanced",
            "slower than the original: latency ratio 1.21 [1.18, 1.24]",
        ),
        (seen(ratio=1.21), Budget(), "latency", "slower than the original: latency ratio 1.21"),
        (
            seen(ratio=1.02, ratio_ci=(0.98, 1.06)),
            Budget(latency_s=1.0),
            "latency",
            None,
        ),  # perhaps no slower
        (seen(ratio=1.21), Budget(), "balanced", None),  # 0.36 of latency x bytes
        (seen(ratio=1.21), Budget(quality_drop=0.1), "bytes", None),
        (seen(size=1_200_000), Budget(), "bytes", "larger than the original: 1.2 MB to 1 MB"),
        (
            seen(size=1_200_000),
            Budget(bytes=2_000_000),
            "latency",
            "larger than the original: 1.2 MB to 1 MB",
        ),
        (seen(size=1_200_000), Budget(), "latency", None),
        (seen(size=1_000_000), Budget(bytes=2_000_000), "bytes", None),  # the same is not worse
        (
            seen(size=1_000_000, ratio=1.1),
            Budget(),
            "balanced",
            "no gain over the original: latency ratio 1.10 x size ratio 1.00 is 1.10",
        ),
        (seen(size=2_500_000, ratio=0.5), Budget(), "balanced", "is 1.25"),
        (
            seen(memory=12_000_000),
            Budget(memory_bytes=10**9),
            "balanced",
            "needs more memory than the original",
        ),
        (seen(memory=10_100_000), Budget(memory_bytes=10**9), "balanced", None),  # within the noise
        (seen(memory=12_000_000), Budget(), "balanced", None),
        (seen(drop=0.9), Budget(quality_drop=0.01), "quality", None),  # the budget's business
        (Measurement(), Budget(), "balanced", None),
    ],
)
def test_rejection(measurement: Measurement, budget: Budget, prefer: Preference, reason: str | None) -> None:
    said = rejection(measurement, BASELINE, budget, prefer)
    assert said is None if reason is None else reason in (said or "")


@settings(deadline=None)
@given(budgets, st.sampled_from(["balanced", "latency", "bytes", "quality"]), sizes, ratios)
def test_better_on_every_axis_is_never_rejected(
    budget: Budget, prefer: Preference, size: int, ratio: float
) -> None:
    better = seen(0.0, min(size, 999_999), min(ratio, 0.99), memory=1)
    assert rejection(better, BASELINE, budget, prefer) is None


# ---- choose


def test_nothing_was_measured() -> None:
    verdict = choose([], BASELINE, Budget(), "balanced")
    assert (verdict.trial, verdict.met, verdict.blocking, verdict.relaxation) == (None, False, (), None)
    assert choose([trial(0, None, "failed")], BASELINE, Budget(), "balanced").trial is None


def test_the_best_within_budget_by_preference() -> None:
    trials = [
        trial(0, seen(0.000, 500_000, 0.6)),
        trial(1, seen(0.003, 400_000, 0.3)),
        trial(2, seen(0.004, 200_000, 0.7)),
        trial(3, seen(0.050, 100_000, 0.1)),
        trial(4, None, "failed"),
        trial(5, seen(0.001, 10_000, 0.01), "rejected"),
    ]
    budget = Budget(quality_drop=0.005)
    expected: dict[Preference, int] = {"balanced": 1, "latency": 1, "bytes": 2, "quality": 0}
    for prefer, number in expected.items():
        verdict = choose(trials, BASELINE, budget, prefer)
        assert verdict.met and verdict.blocking == () and verdict.relaxation is None
        assert verdict.trial is not None and verdict.trial.number == number


def test_equal_trials_the_first_wins() -> None:
    verdict = choose([trial(2, seen()), trial(1, seen())], BASELINE, Budget(), "balanced")
    assert verdict.trial is not None and verdict.trial.number == 1


def test_not_met_the_least_broken_is_handed_back() -> None:
    trials = [
        trial(0, seen(0.010, 290_000)),  # drop 2 x its limit
        trial(1, seen(0.004, 330_000)),  # size 10 % above
        trial(2, seen(0.006, 310_000)),  # 20 % and 3 %
    ]
    verdict = choose(trials, BASELINE, Budget(quality_drop=0.005, bytes=300_000), "balanced")
    assert verdict.trial is trials[1] and not verdict.met
    assert [item.axis for item in verdict.blocking] == ["bytes"]
    assert verdict.relaxation is not None
    assert (verdict.relaxation.axis, verdict.relaxation.limit, verdict.relaxation.trial) == (
        "bytes",
        330_000,
        1,
    )


def test_a_missing_figure_is_the_worst_excess() -> None:
    trials = [trial(0, seen(size=None)), trial(1, seen(size=10**9))]
    verdict = choose(trials, BASELINE, Budget(bytes=10), "balanced")
    assert verdict.trial is trials[1]


def test_all_rejected_the_reason_blocks() -> None:
    slow = seen(ratio=1.21, ratio_ci=(1.18, 1.24))
    budget = Budget(latency_s=1.0)
    verdict = choose([trial(0, slow, "rejected", "slower")], BASELINE, budget, "balanced")
    assert verdict.trial is not None and not verdict.met
    (one,) = verdict.blocking
    assert one.axis == "latency_s" and one.limit == 0.010 and "slower than the original" in one.reason


def test_confident_changes_the_choice() -> None:
    trials = [
        trial(0, seen(0.001, 100_000, 0.2, drop_ci=(-0.01, 0.02))),
        trial(1, seen(0.002, 300_000, 0.5, drop_ci=(0.001, 0.003))),
    ]
    budget = Budget(quality_drop=0.005)
    assert choose(trials, BASELINE, budget, "balanced").trial is trials[0]
    assert choose(trials, BASELINE, budget, "balanced", confident=True).trial is trials[1]


preferences = st.sampled_from(["balanced", "latency", "bytes", "quality"])


@settings(deadline=None)
@given(st.lists(measurements, max_size=6), budgets, preferences, st.booleans())
def test_choose_keeps_its_definition(
    many: list[Measurement], budget: Budget, prefer: Preference, confident: bool
) -> None:
    trials = [trial(number, one) for number, one in enumerate(many)]
    verdict = choose(trials, BASELINE, budget, prefer, confident)
    within = [t for t in trials if t.measurement and not violations(budget, t.measurement, confident)]
    assert verdict.met == bool(within)
    if not many:
        assert verdict.trial is None
        return
    assert verdict.trial is not None and verdict.trial.measurement is not None
    if within:
        best = min(score(t.measurement, prefer, BASELINE) for t in within if t.measurement)
        assert score(verdict.trial.measurement, prefer, BASELINE) == best
    else:
        assert verdict.blocking == tuple(violations(budget, verdict.trial.measurement, confident))
        assert verdict.blocking
    if verdict.relaxation:  # moving that one limit makes the named trial do
        moved = budget.model_copy(update={verdict.relaxation.axis: verdict.relaxation.limit})
        named = trials[verdict.relaxation.trial].measurement
        assert named is not None and violations(moved, named, confident) == []


# ---- relaxation


def test_the_sentence_of_a_relaxation() -> None:
    budget = Budget(quality_drop=0.005, latency_s=0.0042)
    trials = [trial(0, seen(0.008, ratio=0.41)), trial(1, seen(0.001, ratio=0.9))]
    found = relaxation(trials, budget)
    assert found is not None and (found.axis, found.trial) == ("quality_drop", 0)
    assert found.text == "latency 4.1 ms is reached with a quality drop of 0.8 % (asked 0.5 %)"


def test_the_sentence_names_every_limit_that_is_kept() -> None:
    budget = Budget(quality_drop=0.005, bytes=300_000, latency_s=0.0042)
    found = relaxation([trial(0, seen(0.001, 290_000, 0.5))], budget)
    assert found is not None
    assert found.text == (
        "quality drop 0.1 % and size 290 KB are reached with a latency of 5 ms (asked 4.2 ms)"
    )
    alone = relaxation([trial(0, seen(0.008))], Budget(quality_drop=0.005))
    assert alone is not None
    assert alone.text == "the nearest that was measured has a quality drop of 0.8 % (asked 0.5 %)"


def test_confident_relaxations_say_so() -> None:
    found = relaxation(
        [trial(0, seen(0.001, drop_ci=(0.0, 0.008)))], Budget(quality_drop=0.005), confident=True
    )
    assert found is not None and found.limit == 0.008 and "upper end of the 95 % interval" in found.text


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [trial(0, None, "failed")],
        [trial(0, seen(0.008, 310_000))],  # two limits are broken
        [trial(0, seen(0.008), "rejected")],
        [trial(0, seen(None))],
    ],
)
def test_no_single_limit_helps(trials: list[Trial]) -> None:
    assert relaxation(trials, Budget(quality_drop=0.005, bytes=300_000)) is None


def test_no_limit_helps_an_unresolved_latency() -> None:
    assert relaxation([trial(0, seen(ratio=0.9, resolved=False))], Budget(latency_s=0.001)) is None


def test_alternatives_are_those_that_no_other_beats_single_limits_first() -> None:
    budget = Budget(quality_drop=0.005, bytes=300_000, latency_s=0.004)
    trials = [
        trial(0, seen(0.008, 290_000, 0.41)),  # two limits: what trial 1 needs, and a little latency
        trial(1, seen(0.008, 290_000, 0.4)),
        trial(2, seen(0.004, 510_000, 0.4)),
        trial(3, seen(0.004, 600_000, 0.4)),  # beaten by trial 2
        trial(4, seen(0.006, 310_000, 0.4)),  # less of both than trials 1 and 2 need of one
        trial(5, seen(0.008, 200_000, 0.3)),  # as trial 1
        trial(6, seen(0.001, 1_000, 0.1), "rejected"),
        trial(7, seen(0.004, 200_000, 0.5, resolved=False)),
        trial(8, None, "failed"),
    ]
    found = alternatives(trials, budget)
    assert [one.trial for one in found] == [1, 2, 4]
    assert [[move.axis for move in one.moves] for one in found] == [
        ["quality_drop"],
        ["bytes"],
        ["quality_drop", "bytes"],
    ]
    (move,) = found[1].moves
    assert (move.limit, move.by) == (510_000, 210_000)
    assert found[0].cost == pytest.approx(0.6)
    assert found[2].cost == pytest.approx(0.2 + 1 / 30)
    assert found[2].text == "a quality drop of 0.6 % (0.1 % more) and a size of 310 KB (10 KB more)"
    assert alternatives([trial(0, seen())], budget.model_copy(update={"latency_s": 0.006})) == []


def test_alternatives_for_the_upper_end_say_so() -> None:
    (one,) = alternatives(
        [trial(0, seen(0.001, drop_ci=(0.0, 0.008)))], Budget(quality_drop=0.005), confident=True
    )
    assert one.text == "a quality drop of 0.8 % at the upper end of its 95 % interval (0.3 % more)"


@settings(deadline=None)
@given(st.lists(measurements, max_size=6), budgets, st.booleans())
def test_alternatives_keep_their_definition(many: list[Measurement], budget: Budget, confident: bool) -> None:
    trials = [trial(number, one) for number, one in enumerate(many)]
    found = alternatives(trials, budget, confident)
    assert [len(one.moves) for one in found] == sorted(len(one.moves) for one in found)
    single = relaxation(trials, budget, confident)
    if single is not None:  # the cheapest single limit is the first of them
        assert (found[0].moves[0].axis, found[0].moves[0].limit) == (single.axis, single.limit)
    for one in found:
        moved = budget.model_copy(update={move.axis: move.limit for move in one.moves})
        assert violations(moved, many[one.trial], confident) == []
        for other in found:  # no one needs less on one axis and no more on the others
            needs = {move.axis: move.by for move in one.moves}
            theirs = {move.axis: move.by for move in other.moves}
            assert one is other or any(theirs.get(axis, 0) < by for axis, by in needs.items())


@pytest.mark.parametrize(
    ("axis", "value", "text"),
    [
        ("quality_drop", 0.005, "0.5 %"),
        ("quality_drop", 0.00804, "0.804 %"),
        ("quality_drop", 0.008041, "0.805 %"),
        ("quality_drop", 0.0, "0 %"),
        ("quality_drop", -0.002, "-0.2 %"),
        ("bytes", 300, "300 B"),
        ("bytes", 299_001, "300 KB"),
        ("bytes", 1_200_000, "1.2 MB"),
        ("latency_s", 0.0041, "4.1 ms"),
        ("latency_s", 0.00005, "50 us"),
        ("latency_s", 2.0, "2 s"),
        ("memory_bytes", 5_000_000_000, "5 GB"),
    ],
)
def test_figures(axis: Any, value: float, text: str) -> None:
    assert figure(axis, value) == text


# ---- Pareto


def test_pareto_front() -> None:
    many = [seen(0.0, 3, 0.9), seen(0.1, 2, 0.5), seen(0.1, 2, 0.6), seen(0.2, 1, 0.4), seen(0.2, 1, 0.4)]
    assert pareto_front(many) == [0, 1, 3, 4]
    assert pareto_front([]) == []
    assert pareto_front([Measurement()]) == []


def test_pareto_front_without_a_ratio_takes_the_median() -> None:
    one = seen(0.1, 2, 0.5).model_copy(update={"latency_ratio": None})
    other = seen(0.1, 2, 0.6)
    assert pareto_front([one, other]) == [0]


small = st.builds(seen, st.sampled_from([0.0, 0.1, 0.2]), st.integers(1, 3), st.sampled_from([0.2, 0.5, 0.9]))


@settings(deadline=None)
@given(st.lists(small | measurements, max_size=12))
def test_the_front_is_undominated_and_covers_the_rest(many: list[Measurement]) -> None:
    by_ratio = all(one.latency_ratio is not None for one in many)

    def point(one: Measurement) -> tuple[float, ...]:
        latency = one.latency_ratio if by_ratio else one.value("latency_s")
        return tuple(math.inf if v is None else v for v in (one.quality_drop, one.bytes, latency))

    def beats(one: Measurement, other: Measurement) -> bool:
        a, b = point(one), point(other)
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    front = pareto_front(many)
    for index, one in enumerate(many):
        if index in front:
            assert not any(beats(other, one) for other in many)
        elif min(point(one)) < math.inf:
            assert any(beats(many[other], one) for other in front)
