"""Asks artifacts made-up questions, each in a process of its own, to pack and to verify them."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featherweight.bundles import probes
from featherweight.bundles.verifying import Part
from featherweight.engine.delivered import ABOUT, Delivered
from featherweight.engine.jobs import Served
from featherweight.engine.machine import machine, versions
from featherweight.errors import BundleError, FeatherweightError
from featherweight.plugins import find_runtime
from featherweight.runtime import Target


def probe_of(found: Delivered) -> probes.Probe | str:
    """What an artifact answers to made-up inputs; a sentence where it cannot be asked.

    Raises:
        RunnerError: It crashes its runtime, or is refused.
    """
    runtime = find_runtime(found.artifact.runtime)
    if runtime.unmeasured:
        return f"nothing here runs its artifacts ({runtime.unmeasured})"
    if not runtime.installed():
        return "it is not installed"
    if not probes.can_be_asked(found.signatures):
        return f"{ABOUT} names no inputs of numbers"
    # Without the options that it is measured with: those of a stranger's bundle could name files.
    target = Target(runtime.name, isa=found.target.isa)
    with Served(found.artifact, target) as served:
        calls = probes.ask(found.signatures, _call(served))
        moved = probes.reached_when_moved(calls, _call(served))
    with Served(found.artifact, target) as served:
        exact = probes.same(calls, probes.ask(found.signatures, _call(served)))
    return probes.Probe(runtime.name, _kind(runtime.name), exact, probes.tolerated(moved), calls)


def parity(part: Part, probe: probes.Probe, write: Callable[[Path], object]) -> str:
    """Ask an artifact again; what came of it, in words.

    Args:
        part: The artifact.
        probe: What it was asked when it was packed.
        write: Writes the bundle's files into a folder that is not there yet.

    Raises:
        BundleError: It answers something else, or its runtime cannot run it.
    """
    runtime = find_runtime(part.runtime)
    if not runtime.installed():
        return f"not asked: {part.runtime} is not installed"
    same = probe.exact and probe.machine == _kind(part.runtime)
    with tempfile.TemporaryDirectory(prefix="featherweight-", suffix=f"-{os.getpid()}") as place:
        folder = Path(place) / "files"
        write(folder)
        part.check_harmless(folder)
        try:
            with Served(part.artifact(folder), part.target()) as served:
                reached = probes.compare(probe, _call(served), exact=same)
        except BundleError:
            raise
        except FeatherweightError as error:
            raise BundleError(
                f"{part.runtime} cannot run the artifact: {error.what}", where=error.where, fix=error.fix
            ) from error
    if math.isinf(reached):
        return (
            f"the same bits as when it was packed{', on such a machine' if same else ', on another machine'}"
        )
    return f"{reached:.1f} dB, of at least {probe.decibels:g} dB that are asked for on another machine"


def _call(served: Served) -> probes.Call:
    return lambda inputs, entry: served.run(*inputs, entry=entry)


def _kind(runtime: str) -> dict[str, Any]:
    """What decides the last bits of a runtime's answers."""
    here, packages = machine(), find_runtime(runtime).packages
    return {"cpu": here["cpu"], "flags": here["flags"], "versions": versions(("numpy", *packages))}
