"""Scratch memory: equal tensors in mapped files that leave nothing behind, whatever ends the process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.engine.scratch import MappedScratch
from featherweight.engine.store import machine_mark
from featherweight.errors import MachineError


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8])
def test_a_tensor_is_the_same_in_its_file(folder: Path, dtype: torch.dtype) -> None:
    tensor = (torch.arange(3 * 5 * 70000) % 251).reshape(3, 5, 70000).to(dtype)
    kept = MappedScratch(folder)(tensor)
    assert kept.dtype == dtype
    assert kept.shape == tensor.shape
    assert kept.data_ptr() != tensor.data_ptr()
    assert torch.equal(kept, tensor)


def test_what_is_not_contiguous_keeps_its_values(folder: Path) -> None:
    tensor = torch.arange(300 * 400.0).reshape(300, 400).T
    kept = MappedScratch(folder)(tensor)
    assert kept.is_contiguous()
    assert torch.equal(kept, tensor)


def test_a_kept_tensor_may_be_written(folder: Path) -> None:
    tensor = torch.zeros(1 << 16)
    kept = MappedScratch(folder)(tensor)
    kept += 1
    assert float(kept.sum()) == 1 << 16
    assert not tensor.any()


def test_small_tensors_stay_in_memory(folder: Path) -> None:
    tensor = torch.ones(100)
    assert MappedScratch(folder)(tensor) is tensor
    assert not folder.exists()


def test_no_file_has_a_name_once_it_is_mapped(folder: Path) -> None:
    scratch = MappedScratch(folder)
    kept = [scratch(torch.full((1 << 16,), float(number))) for number in range(5)]
    assert files(folder) == []
    assert [float(tensor[-1]) for tensor in kept] == [0, 1, 2, 3, 4]


def test_values_do_not_count_as_memory_of_the_process(folder: Path) -> None:
    """Half a gigabyte of values is in files: what the process holds of its own hardly grows."""
    program = (
        "import sys, torch\nfrom pathlib import Path\n"
        "from featherweight.engine.scratch import MappedScratch\n"
        "def own():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(line for line in lines if line.startswith('RssAnon')).split()[1])\n"
        "scratch = MappedScratch(Path(sys.argv[1])); before = own()\n"
        "kept = [scratch(torch.full((1 << 22,), 1.0)) for _ in range(32)]\n"
        "total = sum(float(tensor.sum()) for tensor in kept)\n"
        "print(total == 32 * 2**22, (own() - before) // 1024)"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True
    )
    right, megabytes = told.stdout.split()
    assert right == "True"
    assert int(megabytes) < 128


def test_a_killed_process_leaves_nothing(folder: Path) -> None:
    program = (
        "import os, signal, sys, torch; from pathlib import Path\n"
        "from featherweight.engine.scratch import MappedScratch\n"
        "kept = MappedScratch(Path(sys.argv[1]))(torch.ones(1 << 20)); print(len(os.listdir(sys.argv[1])))\n"
        "sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False
    )
    assert told.returncode == -signal.SIGKILL
    assert told.stdout.split() == ["0"]
    assert files(folder) == []


def test_what_was_killed_while_it_wrote_is_swept(folder: Path) -> None:
    folder.mkdir()
    told = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    half = folder / f"tensor-0-{machine_mark()}-{told.stdout.strip()}"
    ours = folder / f"tensor-9999-{machine_mark()}-{os.getpid()}"
    half.write_bytes(b"half")
    ours.write_bytes(b"being written")
    MappedScratch(folder)(torch.ones(1 << 16))
    assert files(folder) == [ours]


def test_a_full_disk_is_told_as_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: memoryview) -> int:
            self.file.write(data[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda path, *args, **kwargs: Full(opened(path, *args, **kwargs)))
    with pytest.raises(MachineError, match="the disk is full") as told:
        MappedScratch(folder)(torch.ones(1 << 16))
    assert told.value.fix is not None
    assert "free some space" in told.value.fix
    assert files(folder) == []
