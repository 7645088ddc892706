"""The command line: one thin command per function of ``api``.

Results go to standard output, everything else (progress, warnings, errors) to
standard error. Exit codes: 0 done and within the budget; 3 done, but not within
it; 2 the input is at fault; 1 the machine or we are; 130 interrupted with nothing
to hand back. Imports nothing heavy at its top: ``--help`` answers at once.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import cast

import typer

from featherweight import terminal
from featherweight.cli import looking, making, merging, packing
from featherweight.cli.making import NOT_MET as NOT_MET

INTERRUPTED = 130
_LATER_S = 0.01

# Typer raises click's usage errors, or since 0.27 those of its own copy of click.
_UsageError: type = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="featherweight",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fits a trained neural network into a budget: quality drop, bytes, latency, memory.\n\n"
    "Every number is measured on the artifact, through the runtime that will load it.\n\n"
    "\b\nExample:\n"
    "  featherweight fit net.py:resnet20 --weights net.safetensors --data data.npz \\\n"
    "    --max-drop 0.5% --max-size 350KB --out fitted",
    epilog="\b\nExit codes: 0 within the budget; 3 finished, not within it (best so far delivered);\n"
    "2 the input is at fault; 1 the machine or featherweight is; 130 interrupted.\n\n"
    "Finished work is kept in ~/.cache/featherweight, so running again resumes; the environment variable "
    "FEATHERWEIGHT_CACHE names another folder.",
)

for _command in (
    *(making.fit, merging.merge, making.apply, making.lower),
    *(looking.compare, looking.measure, looking.robustness, looking.inspect),
    *(packing.pack, packing.unpack, packing.verify),
    *(looking.report, looking.methods, looking.runtimes, looking.doctor, making.demo),
):
    app.command()(_command)


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM, as ``timeout`` and ``docker stop`` send it, hands back the best so far too."""

    def later() -> None:
        threading.Timer(_LATER_S, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _is_unheard(frame):
            later()
            return
        raise KeyboardInterrupt

    def ignored(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):  # a callback that is told from no other code
            later()
        else:
            told(unraisable)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    told, sys.unraisablehook = sys.unraisablehook, ignored
    signal.signal(signal.SIGTERM, interrupt)
    if before[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        sys.unraisablehook = told
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_unheard(frame: FrameType | None) -> bool:
    """Whether Python ignores what is raised here, in the middle of tidying up: ``weakref``, ``__del__``."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename == weakref.__file__:
            return True
        frame = frame.f_back
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; its exit code. Every error is told in words.

    Args:
        arguments: Without the program's name; None takes those of this process.
    """
    if arguments is None:
        atexit.register(gc.freeze)  # the process ends: collecting torch's objects takes half a second
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    code: int | None = INTERRUPTED
    try:
        with _ended_as_by_ctrl_c():
            code = app(args=given or ["--help"], prog_name="featherweight", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last place: what is no error of ours is told as a fault
        if isinstance(error, _UsageError):
            usage = cast(typer.BadParameter, error)
            command = usage.ctx.command_path if usage.ctx else "featherweight"
            return terminal.tell_usage(usage.format_message(), f"{command} --help", as_json)
        return terminal.tell_error(error, as_json)
    if code == INTERRUPTED:
        terminal.tell_interrupted(as_json)
    return code or 0
