"""Phones, against a stand-in adb that answers as recorded: no real phone was measured by these tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_adb
from featherweight.engine import devices, environment
from featherweight.engine.environment import describe_device, installed_on, resolve
from featherweight.engine.jobs import Runner, Served, run_job
from featherweight.engine.native import PROGRAMS, Burst
from featherweight.engine.paced import Entrant, measure_paced
from featherweight.engine.timing import Limits
from featherweight.errors import DeviceError, RunnerError, TargetError
from featherweight.method import Silent
from featherweight.runtime import Artifact, Target

LIMITS = Limits(seconds=20.0, rounds=6, timeout_s=30.0)
X = np.zeros((1, 3, 16, 24), np.float32)
SERIAL = "18031FDF600BVX"
Phones = Callable[..., Target]


class Phone:
    """The stand-in's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def behaves(self, **behaviour: Any) -> None:
        (self.folder / "behaviour.json").write_text(json.dumps(behaviour))

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    def runs(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "runs.jsonl").read_text().splitlines()]

    @property
    def pushed(self) -> list[str]:
        return [Path(call[-1]).name for call in self.calls() if call[2] == "push"]


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Phone:
    folder = tmp_path / "phone"
    fake_adb.furnish(folder)
    fake_adb.build_tools(tmp_path / "tools")
    monkeypatch.setenv("FEATHERWEIGHT_ADB", f"{sys.executable} -S {fake_adb.__file__} {folder}")
    monkeypatch.setenv("FEATHERWEIGHT_DEVICE_TOOLS", str(tmp_path / "tools"))
    monkeypatch.setattr(devices, "PAUSES_S", (0.01, 0.01))
    environment._asked.cache_clear()
    return Phone(folder)


@pytest.fixture
def models(tmp_path: Path) -> Callable[[str], dict[str, Artifact]]:
    """A twin that takes 3 ms and an artifact that takes half of it, for a runtime."""

    def make(runtime: str) -> dict[str, Artifact]:
        made = {}
        for role, ms in (("twin", 3.0), ("artifact", 1.5)):
            folder = tmp_path / runtime / role
            folder.mkdir(parents=True)
            (folder / "model.param").write_text(json.dumps({"ms": ms}))
            (folder / "model.bin").write_text(role)
            files = ("model.param", "model.bin")
            made[role] = Artifact(runtime, folder, files, {"forward": "model.param"})
        return made

    return make


def on(runtime: str, threads: int = 2, **options: Any) -> Target:
    return Target(runtime, "armv8.2-dotprod", threads, f"adb:{SERIAL}", options)


def measured(target: Target, roles: dict[str, Artifact], limits: Limits = LIMITS) -> dict[str, Any]:
    kind: Any = "latency" if "twin" in roles else "memory"
    return run_job(Runner(kind, roles, target, inputs=[X], limits=limits), Silent(), "")


class TestLatency:
    @pytest.mark.parametrize("runtime", sorted(PROGRAMS))
    def test_of_each_runtime_is_read(self, phone: Phone, models: Any, runtime: str) -> None:
        seen = measured(on(runtime), models(runtime))
        assert seen["twin"]["median"] == pytest.approx(3e-3)
        assert seen["artifact"]["median"] == pytest.approx(1.5e-3)
        assert seen["ratio"] == pytest.approx(0.5)
        assert seen["ratio_ci95"] == [pytest.approx(0.5), pytest.approx(0.5)]
        assert (seen["rounds"], seen["resolved"]) == (6, True)
        assert seen["throughput"]["artifact"]["examples_per_s"] == pytest.approx(1 / 1.5e-3)
        assert seen["energy_j"] == {"twin": None, "artifact": None}

    def test_is_taken_in_turn_on_the_fastest_cores(self, phone: Phone, models: Any) -> None:
        assert measured(on("onnxruntime"), models("onnxruntime"))["cores"] == [6, 7]
        assert set((phone.folder / "masks").read_text().split()) == {"c0"}
        order = [Path(run[-2]).parent.name for run in phone.runs()]
        assert len(order) == 2 + 2 * 6  # one burst of each to see how long it takes
        for start in range(2, len(order), 2):
            assert len(set(order[start : start + 2])) == 2

    def test_bursts_are_long_enough(self, phone: Phone, models: Any) -> None:
        measured(on("onnxruntime"), models("onnxruntime"))
        calls = {run[run.index("-r") + 1] for run in phone.runs()}
        assert calls == {"3", "84", "167"}  # a quarter of a second of 3 and of 1.5 ms

    def test_says_what_it_is(self, phone: Phone, models: Any) -> None:
        notes = measured(on("ncnn"), models("ncnn"))["notes"]
        assert f"experimental: latency and memory are those of benchncnn on adb:{SERIAL}" in notes[0]
        assert f"quality was scored on this machine through ncnn, not on adb:{SERIAL}" in notes[1]
        assert "zeros" in notes[2]

    def test_at_another_batch_is_not_known(self, phone: Phone, models: Any) -> None:
        seen = measured(on("litert"), models("litert"), Limits(seconds=20.0, rounds=6, batch=8))
        assert seen["throughput"]["artifact"]["examples_per_s"] is None
        assert "batch 8" in seen["throughput"]["artifact"]["reason"]

    def test_of_several_runtimes_is_taken_in_turn(self, phone: Phone, models: Any) -> None:
        entrants = [Entrant(models(name)["artifact"], on(name)) for name in ("onnxruntime", "mnn")]
        tuned = Entrant(entrants[0].artifact, on("onnxruntime", graph_optimization_level=1))
        limits = Limits(seconds=20.0, least_seconds=0.0, rounds=10)
        rounds = measure_paced([*entrants, tuned], [X], limits=limits, progress=Silent())
        assert rounds.ratio(1).median == pytest.approx(1.0)
        assert len(rounds.seconds[0]) == len(rounds.seconds[1]) == 10
        assert "cannot be given the option 'graph_optimization_level'" in rounds.failed[2].what

    def test_files_are_pushed_once(self, phone: Phone, models: Any) -> None:
        roles = models("mnn")
        measured(on("mnn"), roles)
        measured(on("mnn"), {"artifact": roles["artifact"]})
        tools = ["MNNV2Basic.out", "libstandin.so"]
        assert sorted(phone.pushed) == sorted([*tools, *["model.param", "model.bin"] * 2])
        left = {path.name for path in (phone.folder / "data" / "featherweight").iterdir()}
        assert {roles["twin"].sha256, roles["artifact"].sha256} < left
        assert len(left) == 3


class TestMemory:
    def test_is_the_kernels_peak_of_the_program(self, phone: Phone, models: Any) -> None:
        seen = measured(on("onnxruntime"), {"artifact": models("onnxruntime")["artifact"]})
        assert seen["base_bytes"] == 0
        assert 2**20 < seen["peak_bytes"] < 2**27

    def test_is_the_models_part_where_the_program_tells(self, phone: Phone, models: Any) -> None:
        seen = measured(on("litert"), {"artifact": models("litert")["artifact"]})
        assert seen["peak_bytes"] - seen["base_bytes"] == round(4.5 * 2**20)


class TestQuality:
    def test_is_scored_here(self, phone: Phone, lowered: Any) -> None:
        artifact = lowered("onnxruntime", "residual", "int8")
        x = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
        target = on("onnxruntime", threads=64, tools="/somewhere")
        with Served(artifact, target) as served, Served(artifact, Target("onnxruntime")) as here:
            np.testing.assert_array_equal(served.run(x)[0], here.run(x)[0])
        assert not (phone.folder / "calls.jsonl").exists()


class TestDescription:
    def test_is_the_phones(self, phone: Phone) -> None:
        seen = describe_device(on("onnxruntime"))
        assert seen.cpu == "Tensor (Google Pixel 6)"
        assert seen.platform == "Android 14 arm64-v8a"
        assert (seen.isa, seen.cores, seen.memory_bytes) == ("armv8.2-dotprod", 8, 7771968 * 1024)
        assert seen.flags == ["asimd", "asimdhp", "asimddp"]
        assert "onnxruntime" in seen.versions
        assert resolve(Target("ncnn", device=f"adb:{SERIAL}")).isa == "armv8.2-dotprod"

    def test_tells_the_runtimes_that_have_a_program(self, phone: Phone, tmp_path: Path) -> None:
        (tmp_path / "tools" / "benchncnn").unlink()
        assert installed_on(on("litert"), ["torch", "ncnn", "mnn"]) == ["mnn"]


class TestLostConnection:
    def test_in_the_middle_starts_the_job_again(self, phone: Phone, models: Any) -> None:
        phone.behaves(unplugged=[15, 16])
        assert measured(on("mnn"), models("mnn"))["ratio"] == pytest.approx(0.5)

    def test_for_good_is_an_error(self, phone: Phone, models: Any) -> None:
        phone.behaves(unplugged=[15, 10_000])
        with pytest.raises(DeviceError, match="was lost 3 times") as told:
            measured(on("mnn"), models("mnn"))
        assert f"error: device '{SERIAL}' not found" in str(told.value)
        assert len(phone.calls()) == 15 + 3


class TestLacks:
    def told(self, target: Target, roles: dict[str, Artifact]) -> DeviceError:
        with pytest.raises(DeviceError) as told:
            measured(target, roles)
        assert told.value.fix
        assert not isinstance(told.value, devices.ConnectionLost)
        return told.value

    def test_leave(self, phone: Phone, models: Any) -> None:
        phone.behaves(says="error: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set\n")
        error = self.told(on("mnn"), models("mnn"))
        assert "does not allow this machine" in error.what

    def test_an_adb_here(self, phone: Phone, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FEATHERWEIGHT_ADB", "/nowhere/adb")
        assert "'/nowhere/adb' cannot be started" in self.told(on("mnn"), models("mnn")).what

    def test_the_program(self, phone: Phone, models: Any, tmp_path: Path) -> None:
        (tmp_path / "tools" / "executor_runner").unlink()
        error = self.told(on("executorch"), models("executorch"))
        assert error.what == f"there is no executor_runner for 'adb:{SERIAL}'"

    def test_a_folder_of_programs(self, phone: Phone, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FEATHERWEIGHT_DEVICE_TOOLS")
        error = self.told(on("mnn"), models("mnn"))
        assert "FEATHERWEIGHT_DEVICE_TOOLS is not set" in str(error.where)
        assert f"adb:{SERIAL}?tools=FOLDER" in str(error.fix)

    def test_room_on_the_disk(self, phone: Phone, models: Any) -> None:
        phone.behaves(full=True)
        assert self.told(on("mnn"), models("mnn")).what == f"the disk of 'adb:{SERIAL}' is full"

    def test_a_program_that_is_known(self, phone: Phone, models: Any) -> None:
        with pytest.raises(TargetError, match="no benchmark program of openvino is known"):
            measured(on("openvino"), models("openvino"))

    def test_cores(self, phone: Phone, models: Any) -> None:
        with pytest.raises(TargetError, match="9 threads are asked for and 8 cores are there"):
            measured(on("mnn", threads=9), models("mnn"))

    def test_sessions(self, phone: Phone, models: Any) -> None:
        runner = Runner("kernels", {"artifact": models("mnn")["artifact"]}, on("mnn"), inputs=[X])
        with pytest.raises(TargetError, match="cannot do a job of the kind 'kernels'"):
            run_job(runner, Silent(), "")

    def test_a_program_that_works(self, phone: Phone, models: Any) -> None:
        phone.behaves(program="fails")
        with pytest.raises(RunnerError, match="exit code 3") as told:
            measured(on("ncnn"), models("ncnn"))
        assert "Failed to load model" in str(told.value)

    def test_a_program_that_times_our_model(self, phone: Phone, models: Any) -> None:
        phone.behaves(program="older")
        with pytest.raises(RunnerError, match=r"benchncnn on .* told no time"):
            measured(on("ncnn"), models("ncnn"))


class TestCommandLines:
    """As their repositories describe them."""

    BURST = Burst("/m", ((1, 3, 224, 160), (1, 8)), 4, 20)

    def test_ncnn_names_the_fastest_axis_first_and_knows_no_batch(self) -> None:
        assert PROGRAMS["ncnn"].command(self.BURST) == [
            "20", "4", "0", "-1", "0", "param=/m", "shape=[160,224,3],[8]",
        ]  # fmt: skip

    def test_mnn(self) -> None:
        assert PROGRAMS["mnn"].command(self.BURST) == ["/m", "20", "0", "0", "4", "1x3x224x160", "1"]

    def test_older_ones_are_read_too(self) -> None:
        total = "Model executed successfully 4 time(s) in 12.0 ms."
        assert PROGRAMS["executorch"].seconds(total) == pytest.approx(3e-3)
        assert PROGRAMS["onnxruntime"].seconds("P50 Latency is 0.0587108sec") == 0.0587108
        assert PROGRAMS["onnxruntime"].seconds("Average inference time cost: 2.5 ms") == 2.5e-3
        assert PROGRAMS["litert"].memory("Peak memory footprint (MB): init=2.0 overall=3.5") == 3.5 * 2**20
        assert PROGRAMS["litert"].seconds("Failed to load model") is None
