"""The runtimes' own benchmark programs, for phones, where there is no Python: their command lines and words.

Each takes a model file, makes inputs up, and prints how long its calls took. In their repositories they are:
TensorFlow's ``tensorflow/lite/tools/benchmark``, MNN's ``tools/cpp/MNNV2Basic.cpp``, ncnn's ``benchmark``,
ExecuTorch's ``examples/portable/executor_runner`` and ONNX Runtime's ``onnxruntime/test/perftest``.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from featherweight.errors import TargetError

Shapes = Sequence[tuple[int, ...]]
_MEGA = 2**20


@dataclass(frozen=True)
class Burst:
    """What a program is asked to do once.

    Attributes:
        model: Path of the entry's file on the phone.
        shapes: Of the inputs of one call.
        threads: Of the runtime.
        calls: Timed ones, behind the program's own warm-up.
    """

    model: str
    shapes: Shapes
    threads: int
    calls: int


@dataclass(frozen=True)
class Program:
    """One runtime's program.

    Attributes:
        names: Of its file; the first one that is there is taken.
        command: Its arguments.
        seconds: Reads the seconds of a call out of what it printed; None: it printed none.
        memory: Reads the bytes that the model took above the program, where it prints them.
        note: What its figures are worth, for the user.
    """

    names: tuple[str, ...]
    command: Callable[[Burst], list[str]]
    seconds: Callable[[str], float | None]
    memory: Callable[[str], int | None] = lambda _: None
    note: str = ""


def program(runtime: str) -> Program:
    """The program of a runtime.

    Raises:
        TargetError: It has none that is known.
    """
    if runtime not in PROGRAMS:
        raise TargetError(
            f"no benchmark program of {runtime} is known, and a phone has no Python",
            fix=f"over adb use one of {', '.join(sorted(PROGRAMS))}",
        )
    return PROGRAMS[runtime]


def _found(pattern: str, text: str, unit: float) -> float | None:
    """The last number of that kind."""
    seen = re.findall(pattern, text)
    return float(seen[-1]) * unit if seen else None


def _litert(burst: Burst) -> list[str]:
    return [
        f"--graph={burst.model}",
        f"--num_threads={burst.threads}",
        f"--num_runs={burst.calls}",
        "--min_secs=0",
        "--warmup_runs=2",
        "--warmup_min_secs=0.05",
        "--use_xnnpack=true",
    ]


def _litert_memory(text: str) -> int | None:
    pattern = r"(?:Memory footprint delta from the start of the tool|Peak memory footprint) \(MB\): "
    found = _found(pattern + r".*overall=([\d.]+)", text, _MEGA)
    return round(found) if found else None


def _mnn(burst: Burst) -> list[str]:
    shape = "x".join(map(str, burst.shapes[0]))
    # file, calls, tensors to save, processor (0: CPU), threads, shape, precision (1: high, float32)
    return [burst.model, str(burst.calls), "0", "0", str(burst.threads), shape, "1"]


def _ncnn(burst: Burst) -> list[str]:
    # ncnn has no batch axis, and names the fastest axis first.
    shapes = ",".join(f"[{','.join(map(str, reversed(shape[1:])))}]" for shape in burst.shapes)
    # calls, threads, cores (0: all that it may use), GPU (-1: none), pause for cooling (0: none)
    head = [str(burst.calls), str(burst.threads), "0", "-1", "0"]
    return [*head, f"param={burst.model}", f"shape={shapes}"]


def _executorch(burst: Burst) -> list[str]:
    return [
        f"--model_path={burst.model}",
        f"--num_executions={burst.calls + 2}",
        f"--cpu_threads={burst.threads}",
        "--print_output=none",
    ]


def _executorch_seconds(text: str) -> float | None:
    """The median behind the two calls that warm up; of older ones, which print the sum, the mean of all."""
    each = [float(ms) for ms in re.findall(r"Iteration \d+ of \d+: ([\d.]+) ms", text)]
    if len(each) > 2:
        return statistics.median(each[2:]) * 1e-3
    total = re.search(r"Model executed successfully (\d+) time\(s\) in ([\d.]+) ms", text)
    return None if total is None else float(total[2]) * 1e-3 / int(total[1])


def _onnxruntime(burst: Burst) -> list[str]:
    how = ["-e", "cpu", "-I", "-s", "-o", "99", "-m", "times", "-r", str(burst.calls)]
    return [*how, "-x", str(burst.threads), "-y", "1", burst.model, "result.csv"]


def _onnxruntime_seconds(text: str) -> float | None:
    median = _found(r"P50 Latency(?: is|:) *([\d.e-]+) *s", text, 1.0)
    if median is not None:
        return median
    return _found(r"Average (?:inference )?time cost(?: total)?: *([\d.]+) ms", text, 1e-3)


PROGRAMS = {
    "litert": Program(
        ("benchmark_model", "android_aarch64_benchmark_model", "android_arm_benchmark_model"),
        _litert,
        lambda text: _found(r"Inference \(avg\): ([\d.e+]+)", text, 1e-6),
        _litert_memory,
    ),
    "mnn": Program(
        ("MNNV2Basic.out",),
        _mnn,
        lambda text: _found(r"Avg= ([\d.]+) ms", text, 1e-3),
        note="MNNV2Basic.out looks at the clock between operators, which costs small models time",
    ),
    "ncnn": Program(
        ("benchncnn",),
        _ncnn,
        # One that knows no 'param=' times networks of its own, which are not ours.
        lambda text: _found(r"\.param +min = .*avg = +([\d.]+)", text, 1e-3),
        note="benchncnn fills weights with zeros and computes in half precision where the phone can",
    ),
    "executorch": Program(("executor_runner",), _executorch, _executorch_seconds),
    "onnxruntime": Program(("onnxruntime_perf_test",), _onnxruntime, _onnxruntime_seconds),
}
