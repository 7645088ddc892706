"""A search over several runtimes: one yardstick, the fastest wins, and a broken one costs itself alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featherweight import api
from featherweight.data import Data
from featherweight.engine.lanes import scaled
from featherweight.engine.paced import Ratio
from featherweight.engine.targets import fit_targets
from featherweight.engine.timing import Limits
from featherweight.errors import PluginError, TargetError
from featherweight.outcome import Latency, Measurement, Result
from featherweight.plugins import find_runtime, runtime_names
from featherweight.runtimes import _child

QUICK = Limits(seconds=2, least_seconds=0.0, warmup_s=0.02, throughput_s=0.05, memory_repeats=1, timeout_s=60)
NETS = Path(__file__).parents[1] / "nets.py"
BAD = Path(__file__).parents[1] / "runtimes"


def fitted(out: Path, **changes: Any) -> Result:
    """A golden net over ONNX Runtime and OpenVINO."""
    x = np.random.default_rng(0).standard_normal((48, 3, 16, 16)).astype(np.float32)
    data = Data.of(x=x, x_train=x[:16])
    asked: dict[str, Any] = {"runtime": "onnxruntime,openvino", "limits": QUICK, "trials": 2, **changes}
    return api.fit(f"{NETS}:Residual", data, out=out, **asked)


def test_each_runtime_gets_a_trial_and_the_answer_says_which(tmp_path: Path) -> None:
    result = fitted(tmp_path / "out")
    assert [trial.runtime for trial in result.trials] == ["onnxruntime", "openvino"]
    rows = {row.runtime: row for row in result.runtimes}
    assert set(rows) == {"onnxruntime", "openvino"}
    assert rows["onnxruntime"].twin_ratio == 1.0
    for row in rows.values():
        assert row.float_error is not None
        assert row.float_error <= 1e-4
        assert row.parity_db is not None
        assert row.parity_db >= 30
        assert row.twin_ratio_ci95 or row.runtime == "onnxruntime"
    (chosen,) = (row for row in result.runtimes if row.chosen)
    assert chosen.runtime == result.chosen.runtime
    assert result.chosen.latency_ratio == chosen.latency_ratio
    assert result.baseline.bytes == rows["onnxruntime"].twin_bytes  # one yardstick for all of them
    told = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"artifact.json", "load.py", "load.cpp", "result.json", result.chosen.artifact} <= told
    assert "Runtimes</h2>" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("does", "limits", "words"),
    [
        ("abort", _child.Limits(seconds=60), "was ended by SIGABRT"),
        ("hang", _child.Limits(seconds=1), "gave no answer for 1 s"),
        ("eat", _child.Limits(seconds=60, bytes=300_000_000), "took more than 0.3 GB"),
    ],
)
def test_a_broken_converter_costs_its_runtime_alone(
    does: str, limits: _child.Limits, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BAD))
    whole = _child.convert

    def broken(runtime: str, function: str, arguments: Mapping[str, Any], **more: Any) -> Any:
        if runtime != "openvino":
            return whole(runtime, function, arguments, **more)
        return whole(f"{runtime}", f"bad_converters:{does}", {}, limits=limits)

    monkeypatch.setattr(_child, "convert", broken)
    monkeypatch.setattr(_child, "_children", {})
    result = fitted(tmp_path / "out")
    (row,) = (row for row in result.runtimes if row.runtime == "openvino")
    assert words in row.reason
    assert result.chosen.runtime == "onnxruntime"
    assert all(trial.runtime in ("", "onnxruntime") for trial in result.trials)


def test_alone_a_broken_converter_is_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BAD))
    whole = _child.convert
    monkeypatch.setattr(
        _child, "convert", lambda runtime, function, arguments, **more: whole("x", "bad_converters:abort", {})
    )
    with pytest.raises(TargetError, match="SIGABRT"):
        fitted(tmp_path / "out", runtime="openvino")
    assert not (tmp_path / "out").exists()


class TestTargets:
    def test_any_is_all_that_measure(self) -> None:
        names = [target.runtime for target in fit_targets("any", 1, "local", "")]
        assert names[0] == "onnxruntime"
        assert "torch" not in names
        assert set(names) == {
            name
            for name in runtime_names()
            if name != "torch" and find_runtime(name).installed() and not find_runtime(name).unmeasured
        }

    def test_several_keep_their_order_once(self) -> None:
        found = fit_targets("openvino, onnxruntime,openvino", 1, "local", "avx2")
        assert [target.runtime for target in found] == ["openvino", "onnxruntime"]
        assert {target.isa for target in found} == {"avx2"}

    @pytest.mark.parametrize("name", ["tensorrt", "coreml"])
    def test_what_nothing_measures_is_refused(self, name: str) -> None:
        with pytest.raises(TargetError, match="written, not measured") as told:
            fit_targets(name, 1, "local", "")
        assert f"lower --runtime {name}" in str(told.value.fix)

    def test_mistakes_are_told(self) -> None:
        with pytest.raises(PluginError, match="openvine"):
            fit_targets("onnxruntime,openvine", 1, "local", "")
        with pytest.raises(TargetError, match="no instruction set is called 'avx1024'"):
            fit_targets("onnxruntime", 1, "local", "avx1024")
        with pytest.raises(TargetError, match="no runtime is named"):
            fit_targets(" , ", 1, "local", "")
        with pytest.raises(TargetError, match="4096 threads"):
            fit_targets("onnxruntime", 4096, "local", "")


class TestScaled:
    SEEN = Measurement(
        latency_s=Latency(median=1, q1=1, q3=1),
        latency_ratio=0.5,
        latency_ratio_ci95=(0.49, 0.51),
        resolved=True,
    )

    def test_ratios_and_intervals_multiply(self) -> None:
        seen = scaled(self.SEEN, Ratio(2.0, (1.98, 2.02)))
        assert seen.latency_ratio == 1.0
        assert seen.latency_ratio_ci95 == pytest.approx((0.49 * 1.98, 0.51 * 2.02))
        assert seen.resolved

    def test_an_unsure_handicap_leaves_it_unresolved(self) -> None:
        assert scaled(self.SEEN, Ratio(2.0, (1.0, 3.0))).resolved is False
        assert scaled(self.SEEN, Ratio(2.0, None)).latency_ratio_ci95 is None

    def test_the_first_lane_is_as_it_was(self) -> None:
        assert scaled(self.SEEN, Ratio(1.0, None)) is self.SEEN
