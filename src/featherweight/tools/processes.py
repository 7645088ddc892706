"""Training in several processes: this one is the first, the others are forked from it and end with it.

Each process takes its share of every batch (distributed data parallel, Li et al. 2020, arXiv:2006.15704):
gradients are averaged, so the loss curve is that of one process. Batch norms take the mean and variance of
the whole batch, as torch's ``SyncBatchNorm`` does on GPUs alone::

    mean = sum over processes of sum x / n,   var = sum over processes of sum (x - mean)^2 / n

Forking hands the network, the data and the user's code over as they are. A forked process computes on one
core: OpenMP's threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import ClusterEnvironment
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, distributed
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from featherweight.errors import FeatherweightError, RecipeError, RunnerError
from featherweight.method import Precision

_LOCAL = "127.0.0.1"
_START_S = 60.0
_END_S = 10.0
_SILENT_S = 600.0  # that a process may compute between two exchanges


@dataclass(frozen=True)
class Seat:
    """A process's place among those that train together.

    Attributes:
        rank: 0 is the process that the others were forked from.
        size: How many there are.
        port: Where the first one listens.
    """

    rank: int = 0
    size: int = 1
    port: int = 0


def together(size: int, work: Callable[[Seat], Any]) -> Any:
    """Do the same work in several processes; what it gives in this one, which is the first.

    Args:
        size: How many processes, this one included.
        work: Gets its seat; reaches the others through :func:`make_fabric`.

    Raises:
        RecipeError: Processes cannot be forked here.
        RunnerError: One of them died.
    """
    if size == 1:
        return work(Seat())
    _check_can_fork()
    with socket.socket() as probe:
        probe.bind((_LOCAL, 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    others: list[tuple[Any, Connection]] = []
    kept = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")}
    threads = torch.get_num_threads()
    try:
        for rank in range(1, size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_other, args=(Seat(rank, size, port), work, theirs, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            others.append((process, ours))
        for rank, (process, ours) in enumerate(others, 1):
            if not ours.poll(_START_S) or not _said(ours):
                raise _died(process, rank, size)
        torch.set_num_threads(1)
        try:
            return work(Seat(0, size, port))
        except FeatherweightError:
            raise
        except RuntimeError as error:
            if _tells_lost_connection(error):
                _raise_for_the_dead(others, size, error)
            raise
    finally:
        torch.set_num_threads(threads)
        if distributed.is_initialized():
            distributed.destroy_process_group()
        for process, ours in others:
            if sys.exc_info()[0] is None:
                ours.send(True)  # it may end: what it sent last has arrived
                process.join(_END_S)
            if process.is_alive():
                process.kill()
                process.join()
            ours.close()
        for name, value in kept.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def make_fabric(seat: Seat, device: torch.device, precision: Precision, *, unused: bool = False) -> Fabric:
    """Fabric for one seat: devices, precision and, for several processes, distributed data parallel.

    Args:
        seat: This process's.
        device: Its kind counts; the seat's number is the device's.
        precision: Of the computation.
        unused: Some parameters that train take no part in the loss.
    """
    kind = device.type
    strategy: Any = "auto"
    if seat.size > 1:
        strategy = DDPStrategy(
            cluster_environment=_Seated(seat),
            process_group_backend="nccl" if kind == "cuda" else "gloo",
            find_unused_parameters=unused,
            timeout=timedelta(seconds=_SILENT_S),
        )
    with _quiet():
        fabric = Fabric(
            accelerator=kind,
            devices=seat.size if seat.size > 1 or device.index is None else [device.index],
            strategy=strategy,
            precision={"32": "32-true"}.get(precision, precision),
        )
        fabric.launch()
    return fabric


@contextlib.contextmanager
def shared_statistics(seat: Seat) -> Iterator[None]:
    """Inside, batch norms in training take the statistics of all processes' shares of the batch."""
    if seat.size == 1:
        yield
        return
    with _quiet(), _Shared(distributed.new_group()):
        yield


class _Seated(ClusterEnvironment):  # type: ignore[misc]
    """Tells Fabric that the processes are there already."""

    def __init__(self, seat: Seat) -> None:
        super().__init__()
        self._seat = seat

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return _LOCAL

    @property
    def main_port(self) -> int:
        return self._seat.port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._seat.size

    def set_world_size(self, size: int) -> None:
        return None

    def global_rank(self) -> int:
        return self._seat.rank

    def set_global_rank(self, rank: int) -> None:
        return None

    def local_rank(self) -> int:
        return self._seat.rank

    def node_rank(self) -> int:
        return 0


class _Sum(torch.autograd.Function):
    """The sum over all processes, of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = value.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total, group=ctx.group)
        return total, None


_FUNCTIONAL = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_NATIVE = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_BATCH_NORMS: Mapping[Any, tuple[str, ...]] = {
    functional.batch_norm: _FUNCTIONAL,
    torch.batch_norm: _NATIVE,
    torch.ops.aten.batch_norm.default: _NATIVE,
}


class _Shared(TorchFunctionMode):
    """Computes the batch norms that are in training from all processes' examples."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self._group = group

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        names = _BATCH_NORMS.get(func) if func in _BATCH_NORMS else None
        given = dict(zip(names, args, strict=False), **(kwargs or {})) if names else {}
        if not given.get("training"):
            return func(*args, **(kwargs or {}))
        return self._normalised(given)

    def _normalised(self, given: Mapping[str, Any]) -> Tensor:
        x: Tensor = given["input"]
        values = x.float()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        count = torch.tensor([x.numel() / x.shape[1]], device=x.device)
        both = _Sum.apply(torch.cat([values.sum(axes), count]), self._group)  # type: ignore[no-untyped-call]
        n = both[-1].detach()
        mean = both[:-1] / n
        centred = values - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes), self._group) / n  # type: ignore[no-untyped-call]
        self._remember(given, mean.detach(), variance.detach() * n / (n - 1))
        result = centred * torch.rsqrt(variance + given.get("eps", 1e-5)).view(shape)
        if given.get("weight") is not None:
            result = result * given["weight"].view(shape)
        if given.get("bias") is not None:
            result = result + given["bias"].view(shape)
        normalised: Tensor = result.to(x.dtype)
        return normalised

    @staticmethod
    def _remember(given: Mapping[str, Any], mean: Tensor, variance: Tensor) -> None:
        momentum = given.get("momentum", 0.1)
        for name, value in (("running_mean", mean), ("running_var", variance)):
            if given.get(name) is not None:
                given[name].mul_(1 - momentum).add_(value.to(given[name].dtype), alpha=momentum)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Fabric's and torch's remarks on how they are set up."""
    loggers = [logging.getLogger(name) for name in ("lightning_fabric", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning_fabric.*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _other(seat: Seat, work: Callable[[Seat], Any], pipe: Connection, parent: int) -> None:
    """What a forked process does: the work, then it tells how it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is asked to stop, and stops the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what ends with the first process's objects, such as threads to join, is not here
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    sys.stdout = sys.stderr
    pipe.send(True)
    try:
        work(seat)
        pipe.recv()
        os._exit(0)
    except FeatherweightError as error:
        pipe.send(error)
        os._exit(1)
    except Exception as error:  # noqa: BLE001 - told to the first process, which raises it
        pipe.send(f"{type(error).__name__}: {error}")
        os._exit(1)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _said(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return False


def _tells_lost_connection(error: RuntimeError) -> bool:
    """Whether gloo or NCCL raised it, since another process is gone."""
    said = str(error).lower()
    words = ("gloo", "nccl", "connection", "socket", "timed out")
    return isinstance(error, distributed.DistError) or any(word in said for word in words)


def _raise_for_the_dead(others: list[tuple[Any, Connection]], size: int, error: Exception) -> None:
    """Raise what another process failed of, if one did: what this one saw is the consequence."""
    deadline = time.monotonic() + _END_S
    while time.monotonic() < deadline and all(process.is_alive() for process, _ in others):
        time.sleep(0.05)
    for rank, (process, pipe) in enumerate(others, 1):
        said = _said(pipe) if pipe.poll() else False
        if isinstance(said, FeatherweightError):
            raise said from error
        if not process.is_alive() and (process.exitcode or said):
            raise _died(process, rank, size, said if isinstance(said, str) else "") from error
    raise RunnerError(
        f"the {size} training processes lost touch: {str(error).splitlines()[0]}",
        fix="run the same command again: it goes on from the checkpoint; or --devices 1",
    ) from error


def _died(process: Any, rank: int, size: int, said: str = "") -> RunnerError:
    process.join(_END_S)
    code = process.exitcode
    how = said or (
        f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    )
    return RunnerError(
        f"training process {rank + 1} of {size} ended early: {how}",
        fix="run the same command again: it goes on from the checkpoint; with less memory use --devices 1",
    )


def _check_can_fork() -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        raise RecipeError("training in several processes needs a system that forks", fix="--devices 1")
    if not distributed.is_available() or distributed.is_initialized():
        raise RecipeError(
            "training in several processes is not possible inside of another distributed run",
            fix="--devices 1",
        )
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise RecipeError(
            "CUDA is in use already, and processes cannot be forked after that", fix="--devices 1"
        )
