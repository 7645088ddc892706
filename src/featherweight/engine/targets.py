"""Which runtimes are asked for, and where they run."""

from __future__ import annotations

from featherweight.engine.environment import describe, describe_device, installed_on
from featherweight.errors import TargetError, nearest
from featherweight.plugins import find_runtime, runtime_names
from featherweight.runtime import ISAS, Target

ANY = "any"
_DEFAULT = "onnxruntime"
_SIMULATED = "torch"


def fit_targets(runtime: str, threads: int, device: str, isa: str) -> list[Target]:
    """One target for each runtime that is asked for; the first one is what latencies are told against.

    Args:
        runtime: A name, several with commas, or ``any``: all that the device has.
        threads: Cores that it may use.
        device: Where it runs.
        isa: Instruction set; '' is the device's.

    Raises:
        PluginError: There is no such runtime.
        MissingRuntime: It is not installed here, and shall run here.
        TargetError: Nothing can measure it, there are fewer cores, or no such instruction set.
        DeviceError: The device cannot be reached.
    """
    names = _names(runtime, device)
    isa = known_isa(isa)
    seen = describe_device(Target(names[0], device=device, threads=threads))
    _check_threads(threads, seen.cores, device)
    return [Target(name, isa or seen.isa, threads, device) for name in names]


def lower_target(runtime: str, threads: int, isa: str) -> Target:
    """This machine through a runtime that is installed; that nothing can measure it does not matter.

    Raises:
        PluginError: There is no such runtime.
        MissingRuntime: It is not installed.
        TargetError: The machine has fewer cores, or there is no such instruction set.
    """
    find_runtime(runtime).require()
    check_cores(threads)
    return Target(runtime=runtime, isa=known_isa(isa), threads=threads).resolved()


def check_cores(threads: int) -> None:
    """See that this machine has so many.

    Raises:
        TargetError: It has fewer.
    """
    _check_threads(threads, describe(Target()).cores, "local")


def _check_threads(threads: int, cores: int, device: str) -> None:
    if not 1 <= threads <= cores:
        raise TargetError(
            f"{threads} threads are asked for, and {_place(device)} has {cores} cores for us",
            fix=f"--threads {cores}",
        )


def _place(device: str) -> str:
    return "this machine" if device == "local" else f"'{device}'"


def known_isa(isa: str) -> str:
    """The name itself, if it is one.

    Raises:
        TargetError: It is none.
    """
    if isa and isa not in ISAS:
        raise TargetError(f"no instruction set is called '{isa}'", fix=nearest(isa, ISAS))
    return isa


def _names(asked: str, device: str) -> list[str]:
    if asked == ANY:
        return _all(device)
    names = list(dict.fromkeys(name.strip() for name in asked.split(",") if name.strip()))
    if not names:
        raise TargetError("no runtime is named", fix=f"--runtime {_DEFAULT}, or --runtime {ANY}")
    for name in names:
        runtime = find_runtime(name)
        if runtime.unmeasured:
            raise TargetError(
                f"runtime '{name}' is {runtime.unmeasured}, so it cannot be chosen or timed",
                fix=f"write its files with featherweight lower --runtime {name}",
            )
        if device == "local":
            runtime.require()
    return names


def _all(device: str) -> list[str]:
    """Every runtime that measures and is there; torch only simulates."""
    measuring = [name for name in runtime_names() if name != _SIMULATED and not find_runtime(name).unmeasured]
    there = installed_on(Target(_DEFAULT, device=device), measuring)
    if not there:
        raise TargetError(
            f"{_place(device)} has no runtime", fix=f'pip install "featherweight[{_DEFAULT}]" there'
        )
    return sorted(there, key=lambda name: (name != _DEFAULT, name))
