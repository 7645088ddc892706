"""Describes the machine that the numbers come from: this one, or a target's device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

from featherweight.engine.devices import address
from featherweight.engine.machine import machine, versions
from featherweight.outcome import Environment
from featherweight.plugins import find_runtime, runtime_names
from featherweight.runtime import Runtime, Target

_MAKERS = ("featherweight", "torch")  # made the artifact, here


def describe(target: Target) -> Environment:
    """This machine, as far as it decides how fast and how exact a target's runtime is.

    Packages are asked for their versions by their metadata; none is imported.
    """
    packages = (*_MAKERS, "numpy", *find_runtime(target.runtime).packages)
    told = {**machine(), "isa": target.resolved().isa, "versions": versions(packages)}
    return Environment(**told, threads=target.threads)


def describe_device(target: Target) -> Environment:
    """The machine that a target's device is; the versions of what made the artifact are those here.

    Raises:
        TargetError: The device is none that jobs can be sent to.
        DeviceError: It cannot be reached, or lacks what a runner needs.
    """
    if address(target).kind == "local":
        return describe(target)
    seen = _asked(target.device, address(target).options, target.runtime)
    packages = ("numpy", *find_runtime(target.runtime).packages)
    there = {name: seen["versions"][name] for name in packages if name in seen["versions"]}
    told = {
        **seen["machine"],
        "isa": target.isa or seen["machine"]["isa"],
        "versions": {**versions(_MAKERS), **there},
    }
    return Environment(**told, threads=target.threads)


def resolve(target: Target) -> Target:
    """The same target with its device's instruction set filled in.

    Raises:
        DeviceError: It cannot be asked.
    """
    if target.isa or address(target).kind == "local":
        return target.resolved()
    return replace(target, isa=describe_device(target).isa)


def installed_on(target: Target, runtimes: Iterable[str]) -> list[str]:
    """Which of these runtimes a target's device has, in their order.

    Raises:
        DeviceError: It cannot be asked.
    """
    if address(target).kind == "local":
        return [name for name in runtimes if find_runtime(name).installed()]
    there = _asked(target.device, address(target).options, target.runtime)["runtimes"]
    return [name for name in runtimes if name in there]


@cache
def _asked(device: str, options: tuple[tuple[str, str], ...], runtime: str) -> dict[str, Any]:
    """What a device says of itself, of every runtime and of their packages; asked once."""
    from featherweight.engine.jobs import Runner, run_job
    from featherweight.method import Silent  # it imports torch

    known = {name: find_runtime(name) for name in runtime_names()}
    asked = {
        "packages": sorted({"numpy", *(name for one in known.values() for name in one.packages)}),
        # One that looks for more than a module cannot be asked from here.
        "modules": {
            name: one.module
            for name, one in known.items()
            if type(one).installed.__func__ is Runtime.installed.__func__  # type: ignore[attr-defined]
        },
    }
    runner = Runner("describe", {}, Target(runtime, device=device, options=dict(options)), asked=asked)
    return run_job(runner, Silent(), "describe")
