"""Describes the machine that the numbers come from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import psutil

from featherweight.outcome import Environment
from featherweight.plugins import find_runtime
from featherweight.runtime import Target, cpu_flags

# Those that decide which integer and half-precision kernels run.
_TELLING = (
    "sse4_2",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)


def describe(target: Target) -> Environment:
    """This machine, as far as it decides how fast and how exact a target's runtime is.

    Packages are asked for their versions by their metadata; none is imported.
    """
    flags = cpu_flags()
    packages = ("featherweight", "torch", "numpy", *find_runtime(target.runtime).packages)
    return Environment(
        cpu=_cpu(),
        isa=target.resolved().isa,
        flags=[flag for flag in _TELLING if flag in flags],
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=target.threads,
        memory_bytes=psutil.virtual_memory().total,
        platform=platform.platform(),
        python=platform.python_version(),
        versions={name: version for name in packages if (version := _version(name)) is not None},
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's name as the kernel gives it, else as the platform does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return platform.processor() or platform.machine()
