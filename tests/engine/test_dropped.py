"""Why trials were not chosen: each in one group, in words that hold for the whole group."""

from __future__ import annotations

from typing import Any

from featherweight.engine.dropped import BEHIND, UNCONFIRMED, dropped
from featherweight.outcome import Budget, Dropped, Latency, Measurement, Trial

TWIN = Measurement(bytes=1000, quality_drop=0.0, latency_ratio=1.0)
BUDGET = Budget(quality_drop=0.005, latency_s=0.01)


def seen(drop: float = 0.001, size: int = 300, ratio: float = 0.5, resolved: bool = True) -> Measurement:
    latency = Latency(median=ratio / 100, q1=ratio / 100, q3=ratio / 100)
    return Measurement(
        quality_drop=drop, bytes=size, latency_s=latency, latency_ratio=ratio, resolved=resolved
    )


def trial(number: int, measurement: Measurement | None = None, state: str = "measured", **told: Any) -> Trial:
    return Trial.model_validate(
        {"number": number, "recipe": {}, "state": state, "measurement": measurement, **told}
    )


def groups(*trials: Trial, chosen: int = 0, **told: Any) -> list[Dropped]:
    asked: dict[str, Any] = {"baseline": TWIN, "budget": BUDGET, "prefer": "balanced", **told}
    return dropped(trials, chosen, **asked)


def test_the_chosen_one_is_in_no_group() -> None:
    assert groups(trial(0, seen())) == []


def test_limits_name_what_is_too_much_and_the_nearest() -> None:
    (group,) = groups(trial(0, seen()), trial(1, seen(drop=0.009)), trial(2, seen(drop=0.006)))
    assert group.reason == "quality drop above the limit"
    assert group.trials == [1, 2]
    assert group.example == "quality drop 0.6 % (limit 0.5 %)"
    (both,) = groups(trial(0, seen()), trial(1, seen(drop=0.009, ratio=1.5)))
    assert both.reason == "quality drop and latency above the limit"
    (unresolved,) = groups(trial(0, seen()), trial(1, seen(resolved=False)))
    assert unresolved.reason == "latency unresolved"


def test_ways_stand_apart() -> None:
    found = groups(
        trial(0, seen()), trial(1, seen(drop=0.1), way="gptq"), trial(2, seen(drop=0.1), way="nearest")
    )
    assert [(group.way, group.trials) for group in found] == [("gptq", [1]), ("nearest", [2])]


def test_what_failed_alike_is_one_group() -> None:
    found = groups(
        trial(0, seen()),
        trial(1, state="failed", reason="litert cannot store 'a.weight' as int4 per group of 32"),
        trial(2, state="failed", reason="litert cannot store 'b.weight' as int4 per group of 64"),
        trial(3, state="failed", reason="the time limit came while it was made"),
    )
    assert [group.trials for group in found] == [[1, 2], [3]]
    assert found[0].reason == "failed: litert cannot store … as int4 per group of …"
    assert found[0].example == "litert cannot store 'a.weight' as int4 per group of 32"
    assert found[1].example == ""  # the reason says it all


def test_rejected_and_predicted_ones_say_why() -> None:
    found = groups(
        trial(0, seen()),
        trial(
            1, seen(ratio=0.9), "rejected", reason="slower than the original: latency ratio 1.21 [1.2, 1.3]"
        ),
        trial(
            2, seen(ratio=0.9), "rejected", reason="slower than the original: latency ratio 1.40 [1.3, 1.5]"
        ),
        trial(3, None, "dropped", reason="predicted to be worse: drop 3.1 %"),
    )
    assert [(group.reason, group.trials) for group in found] == [
        ("slower than the original", [1, 2]),
        ("predicted to be worse", [3]),
    ]
    assert found[0].example == "slower than the original: latency ratio 1.21 [1.2, 1.3]"


def test_what_keeps_every_limit_is_compared_with_the_chosen_one() -> None:
    (group,) = groups(trial(0, seen()), trial(1, seen(size=600)))
    assert group.reason == BEHIND
    assert group.example == "latency ratio x size ratio 0.300, of the chosen one 0.150"
    (group,) = groups(trial(0, seen()), trial(1, seen(drop=0.004)), prefer="quality")
    assert group.example == "quality drop 0.4 %, of the chosen one 0.1 %"


def test_what_the_reporting_half_denied_is_said() -> None:
    (group,) = groups(trial(0, seen()), trial(1, seen(size=100)), unconfirmed={1})
    assert group.reason == UNCONFIRMED


def test_confident_holds_the_upper_end() -> None:
    wide = seen().model_copy(update={"quality_drop_ci95": (-0.01, 0.02)})
    sure = seen().model_copy(update={"quality_drop_ci95": (0.0, 0.002)})
    (group,) = groups(trial(0, sure), trial(1, wide), confident=True)
    assert group.reason == "quality drop above the limit"
    assert "2 %" in group.example
