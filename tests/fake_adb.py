"""A stand-in for adb: ``fake_adb.py FOLDER -s SERIAL shell|push ...``; the phone is a folder.

Files pushed to /data/local/tmp lie in ``FOLDER/data``; shell lines are run by this machine's shell, with
answers of a Pixel 6 to what is asked of its hardware. ``FOLDER/behaviour.json`` says what it does
wrong, ``FOLDER/calls.jsonl`` what was asked of it.
"""

# ruff: noqa: E501, T201 - what programs print is as long as it is

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

TMP = "/data/local/tmp"
PROPERTIES = """[ro.board.platform]: [gs101]
[ro.build.version.release]: [14]
[ro.product.cpu.abi]: [arm64-v8a]
[ro.product.manufacturer]: [Google]
[ro.product.model]: [Pixel 6]
[ro.soc.model]: [Tensor]
"""
CORE = """processor\t: {core}
BogoMIPS\t: 49.15
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd44
CPU revision\t: 0

"""
HERTZ = [1803000] * 4 + [2253000] * 2 + [2802000] * 2
PROGRAM = '#!/bin/sh\nexec {python} {script} program {name} "$@"\n'

# What each program prints; {ms} and {us} are of one call, {model} the file, {runs} the timed calls.
PRINTED = {
    "benchmark_model": """INFO: STARTING!
INFO: Log parameter values verbosely: [0]
INFO: Num threads: [{threads}]
INFO: Graph: [{model}]
INFO: #threads used for CPU inference: [{threads}]
INFO: Loaded model {model}
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
VERBOSE: Replacing 58 out of 58 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 1 partitions.
INFO: The input model file size (MB): 0.007588
INFO: Initialized session in 3.337ms.
INFO: Running benchmark for at least 2 iterations and at least 0.05 seconds but terminate if exceeding 150 seconds.
INFO: count=9 first=81913 curr=55502 min=55502 max=81913 avg=58984.7 std=8115
INFO: Running benchmark for at least {runs} iterations and at least 0 seconds but terminate if exceeding 150 seconds.
INFO: count={runs} first=56576 curr=56299 min=54669 max=60236 avg={us} std=982
INFO: Inference timings in us: Init: 3337, First inference: 81913, Warmup (avg): 58984.7, Inference (avg): {us}
INFO: Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE to the actual memory footprint of the model at runtime. Take the information at your discretion.
INFO: Memory footprint delta from the start of the tool (MB): init=2.43359 overall=4.5
""",
    "MNNV2Basic.out": """Use extra forward type: 0
1 3 16 16
Open Model {model}
The device supports: i8sdot:1, fp16:1, i8mm: 0, sve2: 0, sme2: 0
Session Info: memory use 2.343750 MB, flops is 38.750000 M, backendType is 0
===========> Session Resize Done.
===========> Session Start running...
Input size:768
precision:1, Run {runs} time:
                                     Convolution1 \t[Convolution] run {runs} average cost 0.100000 ms, 9.000 %, FlopsRate: 30.000 %
Avg= {ms} ms, OpSum = 0.900000 ms min= 0.900000 ms, max= 9.300000 ms
""",
    "benchncnn": """loop_count = {runs}
num_threads = {threads}
powersave = 0
gpu_device = -1
cooling_down = 0
{model}  min =   0.10  max =   99.00  avg =   {ms}
""",
    "executor_runner": """I 00:00:00.000452 executorch:executor_runner.cpp:412] Resetting threadpool with num threads = {threads}
I 00:00:00.003987 executorch:executor_runner.cpp:420] Model file {model} is loaded.
I 00:00:00.004058 executorch:executor_runner.cpp:431] Using method forward
I 00:00:00.833558 executorch:executor_runner.cpp:564] Model loaded in 44.268273 ms.
I 00:00:01.075611 executorch:executor_runner.cpp:705] Iteration 1 of 5: 241.944288 ms
I 00:00:01.075611 executorch:executor_runner.cpp:705] Iteration 2 of 5: 41.944288 ms
I 00:00:01.075611 executorch:executor_runner.cpp:705] Iteration 3 of 5: {ms} ms
I 00:00:01.075611 executorch:executor_runner.cpp:705] Iteration 4 of 5: {ms} ms
I 00:00:01.075611 executorch:executor_runner.cpp:705] Iteration 5 of 5: 99.944288 ms
I 00:00:01.075701 executorch:executor_runner.cpp:714] Model executed successfully 5 time(s) in 483.944288 ms.
I 00:00:01.075711 executorch:executor_runner.cpp:717] 1 outputs:
""",
    "onnxruntime_perf_test": """Setting intra_op_num_threads to {threads}
Setting inter_op_num_threads to 1
Session creation time cost: 0.217932 s
First inference time cost: 196 ms
Total inference time cost: 0.49481 s
Total inference requests: {runs}
Average inference time cost total: 98.961997 ms
Total inference run time: 0.494854 s
Number of inferences per second: 10.104
Avg CPU usage: 11 %
Peak working set size: 271122432 bytes
Runs:{runs}
Min Latency: 0.0001 s
Max Latency: 0.101519 s
P50 Latency: {s} s
P90 Latency: 0.101519 s
""",
}


def adb(folder: Path, arguments: list[str]) -> int:
    """One call of adb; its exit code."""
    behaviour = json.loads((folder / "behaviour.json").read_text())
    log = folder / "calls.jsonl"
    made = log.read_text().count("\n") if log.exists() else 0
    with log.open("a") as out:
        out.write(json.dumps(arguments) + "\n")
    first, last = behaviour.get("unplugged", [-1, -1])
    if first <= made < last:
        sys.stderr.write(f"error: device '{arguments[1]}' not found\n")
        return 1
    if said := behaviour.get("says"):
        sys.stderr.write(said)
        return 1
    if arguments[2] == "push":
        return push(folder, Path(arguments[3]), arguments[4], full=behaviour.get("full", False))
    return shell(folder, arguments[3])


def push(folder: Path, source: Path, target: str, *, full: bool) -> int:
    if full:
        sys.stderr.write(
            f"adb: error: failed to copy '{source}' to '{target}': remote No space left on device\n"
        )
        return 1
    shutil.copyfile(source, target.replace(TMP, str(folder / "data")))
    print(f"{source}: 1 file pushed, 0 skipped. 11.1 MB/s ({source.stat().st_size} bytes in 0.001s)")
    return 0


def shell(folder: Path, line: str) -> int:
    line = line.replace("/proc/cpuinfo", str(folder / "cpuinfo")).replace(
        "/proc/meminfo", str(folder / "meminfo")
    )
    line = line.replace("/sys/devices/system", str(folder / "sys")).replace(TMP, str(folder / "data"))
    path = f"{folder / 'bin'}:{os.environ.get('PATH', '/usr/bin:/bin')}"
    return subprocess.run(
        ["/bin/sh", "-c", line], env={"PATH": path, "PHONE": str(folder)}, check=False
    ).returncode


def program(name: str, arguments: list[str]) -> int:
    """What a benchmark program does: prints how long a call of its model takes, as the model's file says."""
    phone = Path(os.environ["PHONE"])
    behaviour = json.loads((phone / "behaviour.json").read_text())
    with (phone / "runs.jsonl").open("a") as out:
        out.write(json.dumps([name, *arguments]) + "\n")
    values = [one.partition("=")[2] or one for one in arguments]
    model = next(value for value in values if Path(value).is_file())
    ms = json.loads(Path(model).read_text())["ms"]
    if behaviour.get("program") == "fails":
        sys.stderr.write("Failed to load model\n")
        return 3
    if behaviour.get("program") == "older":
        sys.stderr.write("          squeezenet  min =    8.84  max =    8.89  avg =    8.87\n")
        return 0
    time.sleep(0.15)  # real ones run long enough for the kernel to be asked
    figures = {"ms": f"{ms:.6f}", "us": f"{ms * 1e3:g}", "s": f"{ms * 1e-3:g}"}
    sys.stderr.write(PRINTED[name].format(model=model, runs=10, threads=1, **figures))
    return 0


def furnish(folder: Path) -> None:
    """Make a folder a phone."""
    for name in ("data", "bin"):
        (folder / name).mkdir(parents=True)
    (folder / "behaviour.json").write_text("{}")
    (folder / "cpuinfo").write_text("".join(CORE.format(core=core) for core in range(len(HERTZ))))
    (folder / "meminfo").write_text("MemTotal:        7771968 kB\nMemFree:          204800 kB\n")
    for core, hertz in enumerate(HERTZ):
        place = folder / "sys" / "cpu" / f"cpu{core}" / "cpufreq"
        place.mkdir(parents=True)
        (place / "cpuinfo_max_freq").write_text(f"{hertz}\n")
    (folder / "bin" / "getprop").write_text(f"#!/bin/sh\ncat <<'E'\n{PROPERTIES}E\n")
    (folder / "bin" / "taskset").write_text('#!/bin/sh\necho $1 >> $PHONE/masks; shift; exec "$@"\n')
    for file in (folder / "bin").iterdir():
        file.chmod(0o755)


def build_tools(folder: Path) -> None:
    """The programs, as if they were built for the phone."""
    folder.mkdir()
    for name in PRINTED:
        text = PROGRAM.format(python=sys.executable, script=Path(__file__), name=name)
        (folder / name).write_text(text)
    (folder / "libstandin.so").write_text("a library that they load")


if __name__ == "__main__":
    if sys.argv[1] == "program":
        sys.exit(program(sys.argv[2], sys.argv[3:]))
    sys.exit(adb(Path(sys.argv[1]), sys.argv[2:]))
