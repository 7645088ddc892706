"""The machine's description."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np

from featherweight.engine.environment import describe
from featherweight.runtime import Target, host_isa


def test_describes_this_machine(target: Target) -> None:
    seen = describe(Target("fake", threads=2))
    assert seen.cpu
    assert seen.isa == host_isa()
    assert seen.cores == len(os.sched_getaffinity(0))
    assert seen.threads == 2
    assert seen.memory_bytes > 2**28
    assert seen.versions["numpy"] == np.__version__
    assert seen.versions["fake-runtime"] == "1.0"
    assert {"featherweight", "torch"} <= set(seen.versions)
    assert ("avx512_vnni" in seen.flags or "avx_vnni" in seen.flags) == (seen.isa == "vnni")


def test_imports_neither_torch_nor_a_runtime() -> None:
    code = """
import sys
from featherweight.engine.environment import describe
from featherweight.runtime import Target
describe(Target("onnxruntime"))
assert not {"torch", "onnx", "onnxruntime"} & set(sys.modules), "imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
