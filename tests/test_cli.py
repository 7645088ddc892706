"""The command line: what each command takes, prints and leaves, and its exit codes."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featherweight import api
from featherweight.cli import INTERRUPTED, NOT_MET, _ended_as_by_ctrl_c, main
from featherweight.engine.timing import Limits
from featherweight.method import Progress
from featherweight.outcome import Result
from featherweight.plugins import find_runtime
from sample_results import full_result, missed_result

COMMANDS = (
    *("fit", "apply", "lower", "measure", "inspect", "pack", "unpack", "verify", "report"),
    *("methods", "runtimes", "doctor", "demo"),
)
NET = '''"""A network of two layers that talks."""
import torch
from torch import nn


def net():
    print("building")
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)).eval()
'''
RECIPE = "version: 1\nsteps:\n  - fold: {}\n  - quantize: {where: {exclude: ['0']}}\n"
QUICK = Limits(seconds=0.1, least_seconds=0.0, warmup_s=0.01, throughput_s=0.02, memory_repeats=1)


def run(command: str) -> int:
    return main(shlex.split(command))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "net.py").write_text(NET)
    (folder / "int8.yaml").write_text(RECIPE)
    inputs = np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32)
    labels = np.arange(24) % 4
    np.savez(folder / "data.npz", x=inputs[:16], y=labels[:16], x_train=inputs[16:], y_train=labels[16:])
    return folder


@pytest.fixture
def here(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(files)
    return files


class TestHelp:
    def test_imports_nothing_heavy(self) -> None:
        code = (
            "import sys\n"
            "from featherweight.cli import main\n"
            f"for command in [[], *([name] for name in {COMMANDS})]:\n"
            "    assert main([*command, '--help']) == 0\n"
            "heavy = {'torch', 'onnx', 'optuna', 'numpy', 'onnxruntime', 'rich', 'altair'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_is_what_the_program_says_alone(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([]) == 0
        said = capsys.readouterr().out
        assert all(re.search(rf"^  {name} ", said, re.MULTILINE) for name in COMMANDS)
        assert "..." not in said.partition("Commands:")[2]  # every summary fits its line
        assert "130 interrupted" in said
        assert "FEATHERWEIGHT_CACHE" in said

    @pytest.mark.parametrize("name", COMMANDS)
    def test_teaches_by_example(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([name, "--help"]) == 0
        said = capsys.readouterr().out
        assert "Example" in said
        options = re.findall(r"^  (--[a-z-]+)(.*(?:\n {10,}.*)*)", said, re.MULTILINE)
        for option, text in options:
            assert len(text.split()) >= 4, f"{option} of {name} says nothing"

    def test_names_the_units(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["fit", "--help"])
        said = " ".join(capsys.readouterr().out.split())
        for unit in ("0.5%", "300KB (1000 bytes", "4MiB (1024", "5ms", "800us", "50MB", "10m", "20s"):
            assert unit in said

    def test_of_fit_shows_what_time_buys(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("fit --help") == 0
        said = capsys.readouterr().out
        for line in ("quick     -", "standard  > 1m", "thorough  >= 15m"):
            assert line in said

    @pytest.mark.parametrize("time", ["banana", "-5m", "5", "5parsecs"])
    def test_of_a_time_that_is_none(self, time: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(f"fit net.py:net --time={time} --out x") == 2
        said = capsys.readouterr().err
        assert "--time" in said
        assert "for example 5m" in said

    @pytest.mark.parametrize(
        "command",
        ["fit n.py:n --out x --time 5", "fit n.py:n --out x --max-size 3XB", "measure a --measure-time 5"],
    )
    def test_of_what_is_mistyped_imports_nothing_heavy(self, command: str) -> None:
        code = (
            "import sys\n"
            "from featherweight.cli import main\n"
            f"assert main({command.split()}) == 2\n"
            "heavy = {'torch', 'onnx', 'optuna', 'onnxruntime', 'altair'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "for example" in done.stderr

    def test_of_what_is_installed_or_was_found_imports_no_torch(self, tmp_path: Path) -> None:
        (tmp_path / "result.json").write_text(full_result().to_json(), encoding="utf-8")
        code = (
            "import sys\n"
            "from featherweight.cli import main\n"
            "assert main(['runtimes', '--json']) == 0\n"
            f"assert main(['report', {str(tmp_path)!r}]) == 0\n"
            "heavy = {'torch', 'onnx', 'optuna', 'onnxruntime'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "report.html").is_file()

    def test_of_options_that_do_not_exist(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("fit net.py:net --out o --max-sise 3KB") == 2
        assert "did you mean '--max-size'?" in capsys.readouterr().err


def answers(result: Result, also: Callable[[Progress], None] | None = None) -> Callable[..., Result]:
    """A fit that measures nothing."""

    def fit(*given: Any, progress: Progress, **options: Any) -> Result:
        if also:
            also(progress)
        return result

    return fit


def chatter(progress: Progress) -> None:
    """What long work and third parties say."""
    progress.note("a remark")
    warnings.warn("of a third party", stacklevel=1)
    print("of user code")  # noqa: T201 - what is tested
    items: Iterable[int] = progress.track(range(3), "working", 3)
    assert list(items) == [0, 1, 2]


class TestFit:
    def test_prints_before_and_after(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(api, "fit", answers(full_result(), chatter))
        assert run("fit net.py:net --out o") == 0
        said = capsys.readouterr()
        assert re.search(r"Size +1\.09 MB +297 KB", said.out)
        assert "Met" in said.out
        assert "o/report.html" in said.out
        assert "a remark" in said.err
        assert "of user code" in said.err
        assert "third party" not in said.out + said.err

    def test_tells_what_blocks(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        result = missed_result()
        monkeypatch.setattr(api, "fit", answers(result))
        assert run("fit net.py:net --out o") == NOT_MET
        said = capsys.readouterr().out
        assert result.relaxation is not None
        assert "Not met" in said
        assert result.relaxation.text[1:40] in said

    def test_json_is_one_object(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        result = full_result()
        monkeypatch.setattr(api, "fit", answers(result, chatter))
        assert run("fit net.py:net --out o --json") == 0
        said = capsys.readouterr()
        assert Result.model_validate_json(said.out) == result
        assert "a remark" in said.err

    def test_quiet_is_silent(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(api, "fit", answers(missed_result(), lambda progress: progress.note("a remark")))
        assert run("fit net.py:net --out o --quiet") == NOT_MET
        assert capsys.readouterr() == ("", "")

    def test_hands_everything_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given: dict[str, Any] = {}

        def fit(*arguments: Any, progress: Progress, **options: Any) -> Result:
            given.update(options, arguments=arguments)
            return full_result()

        monkeypatch.setattr(api, "fit", fit)
        run(
            "fit net.onnx --data d.npz --out o --weights w.pt --metric f1 --max-drop 0.5% --max-size 300KB "
            "--max-latency 5ms --max-memory 4MiB --prefer bytes --confident --runtime torch --recipe r.yaml "
            "--trials 3 --time 2h --measure-time 3s --threads 2 --seed 7 --image-size 28x32 --mean 0.5 "
            "--std 0.25 --input 3x8x8 --input ids=int64:9 --force --allow-pickle --device ssh:pi@board "
            "--resume --target-isa armv8 --no-tune --batch 8 --student s.py:s --student-weights s.pt "
            "--teacher t.py:t --teacher-weights t.pt --devices 2 --precision bf16-mixed "
            "--workers 4 --cluster box:6379 --study sqlite:///study.db --no-robustness"
        )
        budget = given.pop("budget")
        assert budget.model_dump() == {
            "quality_drop": 0.005,
            "bytes": 300_000,
            "latency_s": 0.005,
            "memory_bytes": 4 * 2**20,
            "drops": None,
        }
        assert given == {
            "arguments": ("net.onnx", "d.npz"),
            "out": Path("o"),
            "device": "ssh:pi@board",
            "isa": "armv8",
            "tune": False,
            "weights": "w.pt",
            "metric": "f1",
            "prefer": "bytes",
            "confident": True,
            "runtime": "torch",
            "recipe": "r.yaml",
            "trials": 3,
            "time_limit": 7200.0,
            "limits": Limits(seconds=3.0, batch=8),
            "threads": 2,
            "seed": 7,
            "image_size": "28x32",
            "mean": "0.5",
            "std": "0.25",
            "inputs": ["3x8x8", "ids=int64:9"],
            "resume": True,
            "workers": 4,
            "cluster": "box:6379",
            "study": "sqlite:///study.db",
            "sampler": "auto",
            "force": True,
            "allow_pickle": True,
            "student": "s.py:s",
            "student_weights": "s.pt",
            "teacher": "t.py:t",
            "teacher_weights": "t.pt",
            "devices": 2,
            "precision": "bf16-mixed",
            "robustness": False,
        }


class TestFailure:
    @pytest.fixture
    def failing(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
        def fail_with(error: BaseException) -> None:
            def methods() -> None:
                raise error

            monkeypatch.setattr(api, "methods", methods)

        return fail_with

    def test_of_ours_asks_for_a_report(
        self, failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        failing(ZeroDivisionError("a bug"))
        assert run("methods --json") == 1
        said = capsys.readouterr()
        assert "Traceback" in said.err
        assert "please report it" in said.err
        error = json.loads(said.out)["error"]
        assert error["kind"] == "InternalError"
        assert "ZeroDivisionError: a bug" in error["what"]

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device", "/tmp/x"),
            RuntimeError("PytorchStreamWriter failed writing file: No space left on device"),
        ],
    )
    def test_of_the_disk_is_told_wherever_it_shows(
        self, failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str], error: Exception
    ) -> None:
        failing(error)
        assert run("methods") == 1
        said = capsys.readouterr().err
        assert said.startswith("MachineError: the disk is full")
        assert "Traceback" not in said

    def test_by_interruption(
        self, failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        failing(KeyboardInterrupt())
        assert run("methods") == INTERRUPTED
        assert "Traceback" not in capsys.readouterr().err


class TestCatalog:
    def test_methods(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("methods") == 0
        said = capsys.readouterr().out
        assert "quantize (format)" in said
        assert "range: one of" in said
        assert run("methods --json") == 0
        assert set(json.loads(capsys.readouterr().out)["fold"]) == {"kind", "needs", "summary", "parameters"}

    def test_runtimes_and_how_to_install_the_rest(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        assert run("runtimes") == 0
        said = capsys.readouterr().out
        assert re.search(r"torch +torch 2\.", said)
        assert re.search(r'onnxruntime +not installed +pip install "featherweight\[onnxruntime\]"', said)

    def test_doctor(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("doctor --json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["healthy"]
        assert found["machine"]["isa"]
        for name, about in found["runtimes"].items():
            there = find_runtime(name)
            if there.unmeasured or not there.installed():
                assert about["works"] is None
                assert "not measured" in about["says"] or "install" in about["says"]
            else:
                assert about["works"] is True, about
                assert "largest error" in about["says"]

    def test_doctor_finds_what_is_broken(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from featherweight.engine import catalog

        def broken(runtime: Any) -> float:
            raise ImportError("libgomp.so.1: cannot open shared object file")

        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        monkeypatch.setattr(catalog, "_largest_error", broken)
        assert run("doctor") == 1
        said = capsys.readouterr().out
        assert re.search(r"torch +no +ImportError: libgomp", said)
        assert re.search(r"onnxruntime +not installed +pip install", said)


@pytest.mark.usefixtures("here")
class TestWithoutMeasuring:
    def test_inspect(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("inspect net.py:net --input 3x8x8") == 0
        said = capsys.readouterr()
        assert re.search(r"0 +Conv2d +8x8x8 +224 +896 +13,824", said.out)
        assert "total: 2,276 parameters" in said.out
        assert run("inspect net.py:net --input 3x8x8 --json") == 0
        assert json.loads(capsys.readouterr().out)["params"] == 2276

    def test_apply(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = "apply net.py:net --recipe int8.yaml --data data.npz --out changed"
        assert run(f"{command} --json") == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["formats"] > 0
        assert summary["after"]["bytes"] < summary["before"]["bytes"]
        names = {path.name for path in (here / "changed").iterdir()}
        assert names == {"weights.safetensors", "model.json", "recipe.yaml"}
        assert run(command) == 2
        assert "holds another run" in capsys.readouterr().err
        assert run(f"{command} --force --quiet") == 0
        assert capsys.readouterr() == ("", "building\n")  # by the user's own code

    def test_lower(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("lower net.py:net --recipe int8.yaml --data data.npz --out lowered") == 0
        assert "bytes_by_type: " in capsys.readouterr().out
        told = json.loads((here / "lowered" / "artifact.json").read_text())
        assert told["bytes"] == (here / "lowered" / "model.onnx").stat().st_size
        assert told["bytes_by_type"]["int8"] == pytest.approx(512 * 4, abs=16)
        assert {path.name for path in (here / "lowered").iterdir()} == {
            "model.onnx",
            "recipe.yaml",
            "artifact.json",
            "load.py",
            "load.cpp",
            "Load.java",
        }


class TestMeasure:
    @pytest.fixture(autouse=True)
    def _artifacts(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("featherweight.cli.options.limits", lambda text, batch=1: QUICK)
        if not (here / "twin").exists():
            assert run("lower net.py:net --input 3x8x8 --out twin --quiet") == 0
            assert run("lower net.py:net --recipe int8.yaml --data data.npz --out small --quiet") == 0

    def test_alone(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("measure small/model.onnx --input 3x8x8 --json") == 0
        seen = json.loads(capsys.readouterr().out)
        assert seen["latency_s"]["median"] > 0
        assert seen["memory_bytes"] > 0
        assert seen["latency_ratio"] is None
        assert seen["quality"] is None
        assert "baseline" not in seen

    def test_beside_its_twin_with_data(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("measure small/model.onnx --twin twin/model.onnx --data data.npz --json") == 0
        seen = json.loads(capsys.readouterr().out)
        assert seen["latency_ratio"] > 0
        assert seen["quality_drop"] == pytest.approx(seen["baseline"]["quality"] - seen["quality"])
        assert 0 <= seen["agreement"] <= 1
        assert seen["bytes"] < seen["baseline"]["bytes"]

    def test_labels_score_without_a_twin(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("measure small/model.onnx --data data.npz") == 0
        said = capsys.readouterr().out
        assert re.search(r"^Quality \(accuracy\) +0\.\d{4}", said, re.MULTILINE)
        assert re.search(r"^Size +[\d.]+ KB", said, re.MULTILINE)
        assert "drop" not in said

    def test_beside_its_twin_in_words(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("measure small/model.onnx --twin twin/model.onnx --input 3x8x8") == 0
        said = capsys.readouterr().out
        assert said.split("\n")[0].split() == ["twin", "artifact"]
        assert re.search(r"^Latency ratio +– +[\d.]+×", said, re.MULTILINE)
        assert "Quality" not in said

    def test_external_data_counts(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        import onnx

        (here / "split").mkdir(exist_ok=True)
        model = onnx.load(here / "twin" / "model.onnx")
        onnx.save(
            model, here / "split" / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=256
        )
        assert run("measure split/m.onnx --input 3x8x8 --json") == 0
        seen = json.loads(capsys.readouterr().out)
        assert seen["bytes"] == sum(path.stat().st_size for path in (here / "split").iterdir())
        (here / "split" / "m.bin").unlink()
        assert run("measure split/m.onnx --input 3x8x8") == 2
        assert "m.bin" in capsys.readouterr().err


def test_report_writes_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text(full_result().to_json())
    assert run(f"report {tmp_path} --json") == 0
    assert json.loads(capsys.readouterr().out)["met"] is True
    assert "<html" in (tmp_path / "report.html").read_text()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_torch_threads_are_left_alone() -> None:
    before = torch.get_num_threads()
    assert run("methods") == 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_where_errors_are_ignored_is_heard_later(number: signal.Signals) -> None:
    class Ends:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0)  # Python looks for signals between two instructions

    with pytest.raises(KeyboardInterrupt), _ended_as_by_ctrl_c():
        Ends()
        time.sleep(5)
