"""Times every kernel of an ONNX file with ONNX Runtime's own profiler.

Part of ``onnxruntime.py``. Kernel times are whole microseconds, so a kernel's time is the mean over the
middle half of many calls.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from featherweight.runtime import Profile

_WARM_UP = 3
_FEWEST, _MOST, _SECONDS = 5, 400, 1.5  # calls and time of each of the two rounds
_SUFFIX = "_kernel_time"


def profile(
    path: Path, plain: Callable[[], object], inputs: Sequence[np.ndarray], threads: int, folder: Path
) -> Profile:
    """Profile one file.

    Args:
        path: The file; its nodes should have names.
        plain: One call without the profiler.
        inputs: Arrays of one call.
        threads: Cores that may be used.
        folder: Takes the profile, and the optimized graph as ``optimized.onnx`` (weights beside it).
    """
    import onnxruntime as ort

    latency = float(np.median(_repeat(plain)))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = os.fspath(folder / "optimized.onnx")
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", "optimized.weights"
    )
    options.enable_profiling = True
    options.profile_file_prefix = os.fspath(folder / "profile")
    session = ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    feed = dict(zip([value.name for value in session.get_inputs()], inputs, strict=True))
    _repeat(lambda: session.run(None, feed))
    calls = _by_call(json.loads(Path(session.end_profiling()).read_text()))[_WARM_UP:]
    times: dict[str, list[float]] = {name: [] for call in calls for name in call}
    for call in calls:
        for name, seen in times.items():
            seen.append(call.get(name, 0.0))
    return Profile(latency, len(calls), {name: _middle(seen) for name, seen in times.items()})


def _repeat(call: Callable[[], object]) -> list[float]:
    """Seconds of each call behind the warm-up."""
    for _ in range(_WARM_UP):
        call()
    seen: list[float] = []
    begin = time.perf_counter()
    while len(seen) < _FEWEST or (len(seen) < _MOST and time.perf_counter() - begin < _SECONDS):
        start = time.perf_counter()
        call()
        seen.append(time.perf_counter() - start)
    return seen


def _by_call(events: list[dict[str, object]]) -> list[dict[str, float]]:
    """Node -> seconds, for each call: an event of the whole call ends each one."""
    calls: list[dict[str, float]] = []
    current: dict[str, float] = defaultdict(float)
    for event in events:
        name, duration = str(event.get("name", "")), event.get("dur", 0)
        if event.get("cat") == "Node" and name.endswith(_SUFFIX) and isinstance(duration, int):
            current[name.removesuffix(_SUFFIX)] += duration * 1e-6
        elif name == "model_run":
            calls.append(dict(current))
            current = defaultdict(float)
    return calls


def _middle(seen: list[float]) -> float:
    ordered = sorted(seen)
    quarter = len(ordered) // 4
    return float(np.mean(ordered[quarter : len(ordered) - quarter]))
