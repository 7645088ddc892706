"""What a machine is, as far as it decides how fast and how exact a runtime is; runs on the machine itself.

Needs the standard library only, since a runner on another machine has little else. Packages are asked
for their versions by their metadata; none is imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from featherweight.runtime import cpu_flags, host_isa

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


def machine() -> dict[str, Any]:
    """The fields of ``outcome.Environment`` that a machine knows of itself."""
    return {
        "cpu": cpu_name(_cpuinfo()) or platform.processor() or platform.machine(),
        "isa": host_isa(),
        "flags": telling(cpu_flags()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    return {name: version for name in packages if (version := _version(name)) is not None}


def importable(modules: Mapping[str, str]) -> list[str]:
    """Of runtimes with the modules that they import, those whose module is there."""
    return [name for name, module in modules.items() if importlib.util.find_spec(module) is not None]


def telling(flags: Iterable[str]) -> list[str]:
    """Those of a processor's features that say which kernels run."""
    known = frozenset(flags)
    return [flag for flag in _TELLING if flag in known]


def cpu_name(cpuinfo: str) -> str:
    """The processor's name as the kernel gives it; '' where it gives none."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return ""


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
