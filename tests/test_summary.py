"""Sentences about a result: what it would take where the budget is not met."""

from __future__ import annotations

from typing import cast

from featherweight.outcome import Alternative, Axis, Move
from featherweight.report import explain
from sample_results import missed_result


def test_relaxations_that_keep_what_blocks_come_first() -> None:
    def alternative(trial: int, **moves: float) -> Alternative:
        told = [Move(axis=cast(Axis, axis), limit=1.0, by=by) for axis, by in moves.items()]
        return Alternative(moves=told, trial=trial, cost=0.1, text="")

    many = [
        alternative(1, latency_s=6.3e-4),
        alternative(2, quality_drop=0.003),
        alternative(5, bytes=210_000),
        alternative(6, bytes=1000, quality_drop=0.001),
    ]
    said = explain(missed_result().model_copy(update={"relaxations": many}))
    assert (
        "Latency 1.50 ms needs 0.30 points more drop (trial 2), or 210 KB more (trial 5), "
        "or 1.00 KB more and 0.10 points more drop (trial 6)."
    ) in said
    assert "With other limits it would take 630 us more latency (trial 1)." in said
    assert not any("Cheapest" in sentence for sentence in said)
    only = explain(missed_result().model_copy(update={"relaxations": many[:1]}))
    assert "To keep every limit it would take 630 us more latency (trial 1)." in only
    crowd = explain(missed_result().model_copy(update={"relaxations": many[1:2] * 6}))
    assert any(sentence.endswith("or one of 2 more in result.json.") for sentence in crowd)
