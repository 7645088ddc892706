"""Checkpoints: whole or not at all, gone when the step is stored, and what kill -9 in an epoch leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file

from featherweight.engine.checkpoints import KIND, StoredCheckpoint
from featherweight.engine.deadline import OutOfTime
from featherweight.engine.run import Run
from featherweight.engine.store import Store
from featherweight.errors import MachineError
from featherweight.methods.finetune import Finetune
from featherweight.methods.sparsify import Sparsify
from featherweight.model import Model
from golden import target
from training import Told, problem, same, small

T = TypeVar("T")

SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from featherweight.engine.run import Run, write_model
from featherweight.engine.store import Store
from featherweight.methods.finetune import Finetune
from featherweight.tools import training
from golden import target
from training import problem, small

training._SAVE_S = 0.0
place, slow = Path(sys.argv[1]), sys.argv[2] == "slow"

class Shown:
    def track(self, items, words, total=None):
        for count, item in enumerate(items):
            yield item
            print("step", item, flush=True)
            if slow and count == 4:
                sys.stdin.read()
    def note(self, message):
        print(message, flush=True)

run = Run(small(), problem(), target(), Store(place), progress=Shown(), devices=int(sys.argv[3]))
run.sources = ""  # the same code, whoever edits it meanwhile
step = Finetune(epochs=5, batch_size=16, ema=0.5, validation=0.25)
write_model(place, run.step(run.original, step))
"""


def state() -> dict[str, object]:
    return {
        "step": 3,
        "values": {"w": torch.arange(3.0)},
        "list": [1.5, None, "x"],
        "pair": (1, torch.ones(2)),
    }


class TestStored:
    def test_gives_back_what_was_saved(self, tmp_path: Path) -> None:
        checkpoint = StoredCheckpoint(Store(tmp_path), "key")
        assert checkpoint.load() is None
        checkpoint.save(state())
        checkpoint.save({**state(), "step": 4})
        found = StoredCheckpoint(Store(tmp_path), "key").load()
        assert found is not None
        assert found["step"] == 4
        assert torch.equal(found["values"]["w"], torch.arange(3.0))
        assert found["list"] == [1.5, None, "x"]
        assert StoredCheckpoint(Store(tmp_path), "other").load() is None

    def test_is_not_there_when_it_is_broken(self, tmp_path: Path) -> None:
        checkpoint = StoredCheckpoint(Store(tmp_path), "key")
        checkpoint.save(state())
        file = next((tmp_path / KIND / "key").iterdir())
        file.write_bytes(file.read_bytes()[:100])
        assert checkpoint.load() is None

    def test_runs_no_pickled_code(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.system, (f"touch {tmp_path}/ran",)

        folder = tmp_path / KIND / "key"
        folder.mkdir(parents=True)
        torch.save({"x": Evil()}, folder / "state.pt")
        assert StoredCheckpoint(Store(tmp_path), "key").load() is None
        assert not (tmp_path / "ran").exists()

    def test_a_failed_save_leaves_the_one_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint = StoredCheckpoint(Store(tmp_path), "key")
        checkpoint.save(state())

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(MachineError, match="the checkpoint could not be written: the disk is full"):
            checkpoint.save({"step": 9})
        found = checkpoint.load()
        assert found is not None
        assert found["step"] == 3
        assert len(list((tmp_path / KIND / "key").iterdir())) == 1


def test_is_removed_when_the_step_is_stored(tmp_path: Path) -> None:
    run = Run(small(), problem(), target(), Store(tmp_path))
    run.step(run.original, Finetune(epochs=2, batch_size=16))
    assert (tmp_path / KIND).is_dir()
    assert not list((tmp_path / KIND).iterdir())


OWN = """
from pathlib import Path
from torch.nn import functional as F

calls, last = (Path(__file__).with_name(name) for name in ("calls", "last"))

def loss(output, y):
    with calls.open("a") as file:
        file.write(".")
    if last.exists() and calls.stat().st_size == int(last.read_text()):
        raise KeyboardInterrupt
    return F.cross_entropy(output, y)
"""


class Ended(Told):
    """Progress that ends the work at an item, as a time limit does."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        for count, item in enumerate(items):
            if count == 5:
                raise OutOfTime
            yield item


class TestInterrupted:
    """Three updates are an epoch, which is then judged by one more call of the loss."""

    @staticmethod
    def run(place: Path, progress: Told, sources: str = "") -> tuple[Run, Finetune]:
        run = Run(small(), problem(), target(), Store(place), progress=progress)
        run.sources = sources
        own = place.parent / "own.py"
        return run, Finetune(epochs=5, batch_size=16, ema=0.5, validation=0.25, loss=f"{own}:loss")

    @staticmethod
    def begun(run: Run, zeros: bool) -> Model:
        return run.step(run.original, Sparsify(sparsity=0.8, end=0.3)) if zeros else run.original

    @pytest.mark.parametrize("zeros", [False, True])
    @pytest.mark.parametrize(
        ("last", "done"),
        [(1, 0), (2, 1), (6, 4), (8, 6), (20, 15), (None, 5)],
        ids=["first update", "second", "update", "judging", "judging the last", "time"],
    )
    def test_goes_on_from_the_last_update(
        self, tmp_path: Path, last: int | None, done: int, zeros: bool
    ) -> None:
        (tmp_path / "own.py").write_text(OWN)
        run, step = self.run(tmp_path / "whole", Told())
        whole = run.step(self.begun(run, zeros), step)
        (tmp_path / "calls").unlink()
        if last is not None:
            (tmp_path / "last").write_text(str(last))
        run, step = self.run(tmp_path / "broken", Told() if last else Ended())
        with pytest.raises(KeyboardInterrupt if last else OutOfTime):
            run.step(self.begun(run, zeros), step)
        told = Told()
        run, step = self.run(tmp_path / "broken", told)
        resumed = run.step(self.begun(run, zeros), step)
        assert [note for note in told.notes if "goes on" in note] == (
            [f"training goes on after step {done} of 15"] if done else []
        )
        again = ("training", 15 - done)
        assert again in told.bars
        judged = len([note for note in told.notes if "held back" in note])
        assert judged == 5 - (done - (last in (8, 20))) // 3
        assert same(resumed.module.state_dict(), whole.module.state_dict())
        assert not list((tmp_path / "broken" / KIND).iterdir())

    def test_goes_on_in_another_process_where_layers_are_left_out(self, tmp_path: Path) -> None:
        (tmp_path / "own.py").write_text(OWN)
        (tmp_path / "last").write_text("6")
        code = (
            "import sys\n"
            f"sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
            "from pathlib import Path\n"
            "from test_checkpoints import TestInterrupted, Told\n"
            "told = Told()\n"
            f"run, step = TestInterrupted.run(Path({str(tmp_path / 'store')!r}), told)\n"
            "where = {'exclude': ['0', '1']}\n"
            "try:\n"
            "    run.step(run.original, type(step).model_validate({**step.model_dump(), 'where': where}))\n"
            "finally:\n"
            "    print(told.notes)\n"
        )
        said = []
        for seed in ("1", "2"):  # in which sets of names have another order
            around = {**os.environ, "PYTHONHASHSEED": seed}
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=around
            )
            said.append((done.returncode == 0, "training goes on after step 4 of 15" in done.stdout))
        assert said == [(False, False), (True, True)]


@pytest.mark.parametrize("devices", [1, 2])
def test_kill_9_in_an_epoch_resumes_to_the_same_weights(tmp_path: Path, devices: int) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1])))

    def start(place: str, pace: str) -> subprocess.Popen[str]:
        (tmp_path / place).mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / place), pace, str(devices)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    killed = start("killed", "slow")
    assert killed.stdout is not None
    seen = [killed.stdout.readline().strip() for _ in range(6)]
    assert seen[-1] == "step 4"  # two of three updates of the second epoch are done
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for pipe in (killed.stdin, killed.stdout):
        assert pipe is not None
        pipe.close()
    others = [int(one) for one in _session(killed.pid)]
    deadline = time.monotonic() + 10
    while others and time.monotonic() < deadline:  # what was forked ends with it
        time.sleep(0.1)
        others = _session(killed.pid)
    assert not others
    said = start("killed", "fast").communicate()[0]
    assert "training goes on after step 5 of 15" in said
    assert said.count("step 5\n") == 1
    assert "step 4\n" not in said
    start("whole", "fast").communicate()
    resumed, whole = (load_file(tmp_path / place / "weights.safetensors") for place in ("killed", "whole"))
    assert list(resumed) == list(whole)
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def _session(leader: int) -> list[int]:
    """Processes of a session, which are not zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(folder.name))
    return found
