"""Budgets as they are typed, and the records behind result.json."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from featherweight.errors import BudgetError
from featherweight.outcome import (
    AXES,
    Budget,
    Latency,
    Measurement,
    Result,
    Trial,
    parse_drop,
    parse_size,
    parse_time,
)
from sample_results import bare_result, full_result, missed_result


class TestQuantities:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("300KB", 300_000),
            ("300 kb", 300_000),
            ("300KiB", 307_200),
            ("1.5MB", 1_500_000),
            (" 2 GiB ", 2 * 2**30),
            (".5MB", 500_000),
            ("1e3KB", 10**6),
            ("0B", 0),
            ("12B", 12),
        ],
    )
    def test_sizes(self, text: str, expected: int) -> None:
        assert parse_size(text) == expected

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("5ms", 0.005), ("200us", 2e-4), ("1.5s", 1.5), ("10m", 600.0), ("2min", 120.0), ("1h", 3600.0)],
    )
    def test_times(self, text: str, expected: float) -> None:
        assert parse_time(text) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("text", "expected"), [("0.5%", 0.005), ("0.005", 0.005), ("0", 0.0), ("100 %", 1.0), ("+1%", 0.01)]
    )
    def test_drops(self, text: str, expected: float) -> None:
        assert parse_drop(text) == pytest.approx(expected)

    @given(st.integers(0, 10**12))
    def test_bytes_are_exact(self, count: int) -> None:
        assert parse_size(f"{count}B") == count

    @pytest.mark.parametrize(
        ("parse", "text", "said"),
        [
            (parse_size, "300", "has no unit"),
            (parse_size, "300parsecs", "unknown unit 'parsecs'"),
            (parse_size, "-3KB", "negative"),
            (parse_size, "many", "is not a number"),
            (parse_size, "", "is not a number"),
            (parse_size, "3%", "unknown unit '%'"),
            (parse_size, "3KBKB", "unknown unit"),
            (parse_size, "nanKB", "is not a number"),
            (parse_size, "1e999KB", "is too large"),
            (parse_size, "-1e999KB", "negative"),
            (parse_time, "5", "has no unit"),
            (parse_time, "5KB", "unknown unit 'KB'"),
            (parse_time, "-1ms", "negative"),
            (parse_time, "inf s", "is not a number"),
            (parse_drop, "-0.1%", "negative"),
            (parse_drop, "1ms", "unknown unit 'ms'"),
            (parse_drop, "half", "is not a number"),
        ],
    )
    def test_what_has_no_meaning_is_refused(self, parse: object, text: str, said: str) -> None:
        with pytest.raises(BudgetError, match=said) as told:
            parse(text, "--limit")  # type: ignore[operator]
        assert told.value.what.startswith(f"--limit '{text}'")
        assert told.value.fix is not None
        assert "for example" in told.value.fix
        assert told.value.exit_code == 2


class TestMeasurement:
    def test_every_axis_of_a_budget_has_its_figure(self) -> None:
        seen = Measurement(
            quality_drop=0.01, bytes=5, latency_s=Latency(median=2.0, q1=1.0, q3=3.0), memory_bytes=7
        )
        assert [seen.value(axis) for axis in AXES] == [0.01, 5, 2.0, 7]
        assert [Measurement().value(axis) for axis in AXES] == [None] * 4
        assert {*AXES, "drops"} == set(Budget.model_fields)  # drops are limits of the quality of single tasks

    def test_is_frozen_and_knows_its_fields(self) -> None:
        with pytest.raises(ValidationError):
            Measurement(latency_ms=3)  # type: ignore[call-arg]
        with pytest.raises(ValidationError):
            Measurement(bytes=1).bytes = 2  # type: ignore[misc]


class TestResult:
    @pytest.mark.parametrize("make", [full_result, bare_result, missed_result])
    def test_survives_its_file(self, make: object) -> None:
        result = make()  # type: ignore[operator]
        again = Result.model_validate_json(result.to_json())
        assert again == result
        assert again.to_json() == result.to_json()

    def test_has_the_fields_of_schema_1(self) -> None:
        data = json.loads(full_result().to_json())
        assert data["schema"] == 1
        asked = {"quality_drop", "bytes", "latency_s", "memory_bytes", "drops"}
        assert set(data["budget"]) == asked
        top = "schema met met_confident budget baseline chosen blocking relaxation recipe trials environment"
        assert set(top.split()) <= set(data)
        measured = (
            "quality quality_drop quality_drop_ci95 agreement sqnr_db flips worst_class bytes packed_bytes "
            "latency_s latency_ratio latency_ratio_ci95 resolved throughput peak_rss_bytes energy_j macs "
            "params"
        )
        assert set(measured.split()) <= set(data["baseline"])
        assert {*measured.split(), "artifact", "runtime", "sha256"} <= set(data["chosen"])
        assert set(data["chosen"]["latency_s"]) == {"median", "q1", "q3"}

    def test_another_schema_or_field_is_refused(self) -> None:
        data = json.loads(bare_result().to_json())
        with pytest.raises(ValidationError, match="schema"):
            Result.model_validate({**data, "schema": 2})
        with pytest.raises(ValidationError, match="extra"):
            Result.model_validate({**data, "score": 1})

    def test_a_trial_is_in_one_of_three_states(self) -> None:
        with pytest.raises(ValidationError, match="state"):
            Trial(number=1, recipe={}, state="lost")  # type: ignore[arg-type]
