"""The waterfall adds up, and never tells a figure that nobody knows."""

from __future__ import annotations

import pytest

from featherweight.outcome import Measurement, StepRow
from featherweight.waterfall import told, waterfall
from sample_results import BASELINE, bare_result, full_result, steps


def test_rows_are_the_original_the_steps_and_the_artifact() -> None:
    rows = waterfall(full_result())
    assert [row.name for row in rows] == ["the original", "fold", "quantize", "rounding", "the artifact"]
    assert [row.state for row in rows] == ["measured", "measured", "simulated", "measured", "measured"]
    assert rows[2].parameters == "weights: int8, range: mse"
    assert rows[2].note == "no time was left to measure it; quality of 256 examples"
    assert waterfall(bare_result()) == []


def test_each_bar_begins_where_the_last_one_ended() -> None:
    size = [row.bars[1] for row in waterfall(full_result())]
    assert [bar.kind for bar in size] == ["total", "better", "better", "better", "total"]
    assert (size[0].left, size[0].width) == (0.0, 1.0)
    ends = [(bar.left, bar.left + bar.width) for bar in size]
    assert ends[1][1] == pytest.approx(1.0, abs=2e-4)
    for index in (2, 3):
        assert ends[index][1] == pytest.approx(ends[index - 1][0], abs=2e-4)
    assert size[-1].width == pytest.approx(297_000 / 1_093_412, abs=2e-4)
    assert [bar.level for bar in size] == ["1.09 MB", "1.08 MB", "301 KB", "297 KB", "297 KB"]
    assert [bar.change for bar in size] == ["", "−13.4 KB", "−779 KB", "−4.00 KB", ""]


def test_a_drop_below_zero_begins_left_of_the_original() -> None:
    better = [
        StepRow(name="finetune", state="measured", measurement=Measurement(quality_drop=-0.01)),
        StepRow(name="quantize", state="measured", measurement=Measurement(quality_drop=0.01)),
    ]
    drop = [row.bars[0] for row in waterfall(full_result(steps=better))]
    assert [(bar.left, bar.width, bar.kind) for bar in drop] == [
        (0.5, 0.0, "total"),
        (0.0, 0.5, "better"),
        (0.0, 1.0, "worse"),
        (0.5, 0.5, "total"),
    ]
    assert drop[1].change == "−1.00 points"


def test_a_step_without_a_figure_has_no_bar_and_the_next_one_spans_both() -> None:
    latency = [row.bars[2] for row in waterfall(full_result())]
    assert [bar.kind for bar in latency] == ["total", "better", "none", "better", "total"]
    assert latency[2].level == "–"
    assert latency[3].change == "−2.56 ms since fold"
    assert latency[3].left + latency[3].width == pytest.approx(0.9, abs=1e-3)


def test_latencies_are_ratios_where_the_original_was_not_timed() -> None:
    result = full_result(baseline=BASELINE.model_copy(update={"latency_s": None}))
    assert [row.bars[2].level for row in waterfall(result)] == ["1.00×", "0.90×", "–", "0.41×", "0.41×"]


def test_no_latency_at_all_draws_none() -> None:
    without = [
        step.model_copy(
            update={
                "measurement": step.measurement
                and step.measurement.model_copy(update={"latency_ratio": None})
            }
        )
        for step in steps()
    ]
    assert {row.bars[2].kind for row in waterfall(full_result(steps=without))} == {"none"}


def test_steps_that_come_twice_are_counted_and_a_student_has_its_name() -> None:
    seen = Measurement(bytes=10)
    twice = [
        StepRow(name=name, state="measured", measurement=seen)
        for name in ("student", "finetune", "fold", "finetune")
    ]
    rows = waterfall(full_result(steps=twice, student="small_net"))
    assert [row.name for row in rows[1:-1]] == [
        "the student small_net",
        "finetune (1)",
        "fold",
        "finetune (2)",
    ]


def test_the_sentences_name_what_made_the_difference() -> None:
    assert told(full_result()) == [
        "Quantize took most of the size (−779 KB).",
        "Quantize and rounding took most of the latency (−2.56 ms).",  # quantize alone is not known
        "Quantize cost most quality (+0.40 points).",
    ]
    assert told(bare_result()) == []


def test_what_may_be_noise_is_told_when_it_is_none() -> None:
    wide, back = full_result(), "Rounding gave most quality back (−0.15 points)."
    assert back not in told(wide), "half of the drop's interval is 0.35 points"
    sure = wide.chosen.model_copy(update={"quality_drop_ci95": (0.0015, 0.0035)})
    assert back in told(wide.model_copy(update={"chosen": sure}))


def test_what_changed_nothing_is_not_told() -> None:
    same = Measurement(quality_drop=0.0, bytes=BASELINE.bytes, latency_ratio=1.0)
    result = full_result(steps=[StepRow(name="fold", state="measured", measurement=same)])
    assert told(result) == []
    assert {bar.kind for row in waterfall(result)[1:-1] for bar in row.bars} == {"even"}


def test_latencies_are_even_where_their_intervals_overlap() -> None:
    def step(name: str, ratio: float, low: float, high: float) -> StepRow:
        seen = Measurement(latency_ratio=ratio, latency_ratio_ci95=(low, high))
        return StepRow(name=name, state="measured", measurement=seen)

    found = [
        step("fold", 1.01, 0.99, 1.03),
        step("quantize", 0.5, 0.49, 0.51),
        step("rounding", 0.505, 0.49, 0.52),
    ]
    bars = [row.bars[2] for row in waterfall(full_result(steps=found))]
    assert [bar.kind for bar in bars] == ["total", "even", "better", "even", "total"]


def test_several_steps_are_listed() -> None:
    dark = [StepRow(name=name, state="unknown") for name in ("equalize", "quantize")]
    found = [*dark, StepRow(name="rounding", state="measured", measurement=Measurement(bytes=1000))]
    assert told(full_result(steps=found)) == [
        "Equalize, quantize and rounding took most of the size (−1.09 MB)."
    ]
