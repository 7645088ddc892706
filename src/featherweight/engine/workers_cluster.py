"""A Ray cluster: one of our own on this machine, or one that is there and that this machine is part of.

Ray reports how it is used unless it is told not to: here it is told. What we start is small, has no
dashboard, and ends with the block.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from featherweight.errors import DeviceError, MachineError, MissingRuntime, TargetError

P = ParamSpec("P")
T = TypeVar("T")

MEASURES = "featherweight-measures"  # what a machine of our own is labelled with
WHOLE, PART = 1.0, 0.01  # of a label: what measures alone, and one of several programs of one measurement
_STARTS = 2  # Ray gives up when it is not up within half a minute
_OBJECTS = 80 * 2**20  # bytes of Ray's object store, which holds a few sentences


@dataclass(frozen=True)
class Place:
    """Where workers are.

    Attributes:
        count: Trials at a time; 0: as many as the cluster has cores for.
        cluster: Address of a Ray cluster, ``host:port`` or ``auto``; '' starts one on this machine.
        cpus: Cores of a trial.
    """

    count: int
    cluster: str = ""
    cpus: int = 1


def placed(workers: int | None, cluster: str | None, device: str, cpus: int) -> Place | None:
    """What the user asks for; None: no workers.

    Args:
        workers: Trials at a time; None: as many as the cluster has cores for.
        cluster: Its address; None: a Ray of our own, where there are workers.
        device: Of the target.
        cpus: Cores of a trial.

    Raises:
        MissingRuntime: Ray is not installed.
        TargetError: A cluster cannot tell which of its machines is 'local', a label needs one, or there
            are no workers.
    """
    if workers is not None and workers < 1:
        raise TargetError(f"{workers} workers are none", fix="--workers 1 or more")
    labelled = device.startswith("ray:")
    if cluster and device == "local":
        raise TargetError(
            "a cluster has many machines, and one of them has to be the target",
            where="--device local",
            fix="start Ray there with --resources='{\"NAME\": 1}', and give --device ray:NAME",
        )
    if labelled and not cluster:
        raise TargetError(
            f"'{device}' is a worker of a cluster, and none is named", fix="--cluster HOST:6379"
        )
    if workers is None and not cluster:
        return None
    import_ray()
    return Place(workers or 0, cluster or "", cpus)


def import_ray() -> Any:
    """Ray, told to report nothing to anybody.

    Raises:
        MissingRuntime: It is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of its own future
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MissingRuntime(
            "trials on workers need the package ray, which is not installed",
            fix='pip install "featherweight[ray]"',
        ) from error
    return ray


def in_cluster(function: Callable[P, T]) -> Callable[P, T]:
    """A function that is part of the cluster which its argument ``cluster`` names, where it is given."""

    @wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> T:
        cluster = options.get("cluster")
        if not isinstance(cluster, str):
            return function(*arguments, **options)
        with joined(Place(0, cluster)):
            return function(*arguments, **options)

    return call


@contextmanager
def joined(place: Place) -> Iterator[Any]:
    """Start a Ray of our own, or take part in one; what we started ends with the block.

    Raises:
        MissingRuntime: Ray is not installed.
        TargetError: No cluster answers at this address.
        MachineError: Ray does not start.
    """
    ray = import_ray()
    if ray.is_initialized():  # by the program that calls us
        if not place.cluster:
            raise TargetError(
                "Ray is at work in this program already", fix="give its address: cluster='auto'"
            )
        yield ray
        return
    with ExitStack() as undo:
        heard = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            if place.cluster:
                _join(ray, place.cluster)
            else:
                _start(ray, place, undo)
            undo.callback(ray.shutdown)
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in heard.items():  # Ray takes SIGTERM for itself
                    signal.signal(number, handler)
        yield ray


def _join(ray: Any, cluster: str) -> None:
    try:
        ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        said = (str(error).strip().splitlines() or [""])[0][:200]
        raise TargetError(
            f"no Ray cluster can be joined at '{cluster}': {said}",
            fix="ray start --head on one machine; ray start --address=HOST:6379 on the others, and here",
        ) from error


def _start(ray: Any, place: Place, undo: ExitStack) -> None:
    # Sockets lie in this folder, and their paths have room for some hundred characters.
    where = tempfile.gettempdir() if len(tempfile.gettempdir()) < 20 else "/tmp"
    folder = undo.enter_context(
        tempfile.TemporaryDirectory(prefix="fw", dir=where, ignore_cleanup_errors=True)
    )
    options = {
        "num_cpus": place.count * place.cpus,
        "resources": {MEASURES: WHOLE},
        "object_store_memory": _OBJECTS,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": "ERROR",
        "_temp_dir": folder,
        "_node_ip_address": "127.0.0.1",  # nobody else on the network shall reach it
        "_system_config": {"worker_niceness": 0},  # else 15: what is measured would wait for everybody else
    }
    for left in reversed(range(_STARTS)):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises Exception itself
            ray.shutdown()
            if not left:
                first = (str(error).strip().splitlines() or [""])[0][:200]
                raise MachineError(
                    f"Ray does not start: {first}",
                    fix="try on a machine that is less busy, or without --workers",
                ) from error


def check_label(ray: Any, label: str) -> None:
    """See that a living machine of the cluster has a label.

    Raises:
        DeviceError: None has it.
    """
    if not any(node["Alive"] and node["Resources"].get(label, 0) >= WHOLE for node in ray.nodes()):
        raise no_label(label)


def part_of(label: str) -> dict[str, float]:
    """What one program of a measurement takes of a label: several work on one in turn."""
    return {label: PART}


def no_label(label: str) -> DeviceError:
    return DeviceError(
        f"no living worker is labelled '{label}'",
        fix=f"on the machine that shall measure: ray start --address=HOST:6379 --num-cpus=0 "
        f"--resources='{{\"{label}\": 1}}'",
    )
