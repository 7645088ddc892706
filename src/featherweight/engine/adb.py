"""Phones, over adb: what they are, and a runtime's own benchmark program on them. Experimental.

There is no Python on a phone. The program and the artifacts are pushed once, by their digests, to a folder
that adb's shell may write. Each run is bound to the phone's fastest cores; peak memory is the
kernel's own count of the program. ``FEATHERWEIGHT_ADB`` names another adb.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from featherweight.engine.devices import ConnectionLost
from featherweight.engine.machine import cpu_name, telling
from featherweight.engine.native import PROGRAMS, Burst, Program, program
from featherweight.errors import DeviceError, RunnerError, TargetError
from featherweight.runtime import Artifact, flags_in, isa_of

COMMAND = "FEATHERWEIGHT_ADB"
TOOLS = "FEATHERWEIGHT_DEVICE_TOOLS"
FOLDER = "/data/local/tmp/featherweight"
_TAIL = 500
_EXIT = re.compile(r"featherweight exit (\d+) peak (\d+)")
_REFUSALS = (
    (
        "unauthorized",
        "it does not allow this machine to use it",
        "unlock the phone and allow USB debugging",
    ),
    (
        "insufficient permissions",
        "this user may not open its USB port",
        "see https://developer.android.com/tools/device for the udev rules",
    ),
    (
        "more than one device",
        "several phones answer to it",
        "name one by its serial number: adb devices",
    ),
)
_LOST = ("error: device", "error: closed", "no devices/emulators found", "offline", "protocol fault")
_LOST_MORE = ("connection reset", "failed to get feature set", "broken pipe", "cannot connect to daemon")
_FULL = "no space left on device"


class Phone:
    """A phone, by its serial number.

    Args:
        serial: As ``adb devices`` lists it.
        name: The device, for messages.
        timeout_s: Silence after which a command counts as lost.
    """

    def __init__(self, serial: str, name: str, timeout_s: float) -> None:
        self.serial = serial
        self.name = name
        self._timeout_s = timeout_s
        self._running: subprocess.Popen[bytes] | None = None
        self.stopped = threading.Event()

    def stop(self) -> None:
        """End what runs, and let nothing start any more."""
        self.stopped.set()
        if self._running is not None and self._running.poll() is None:
            with suppress(ProcessLookupError):
                self._running.kill()

    def shell(self, command: str) -> str:
        """What a command of the phone's shell prints, on both of its streams.

        Raises:
            ConnectionLost: The phone does not answer.
            DeviceError: It refuses, or has no room.
        """
        return self._adb("shell", f"{{ {command}; }} 2>&1")

    def push(self, source: Path, target: str) -> None:
        """Copy a file.

        Raises:
            ConnectionLost: The phone does not answer.
            DeviceError: It refuses, or has no room.
        """
        said = self._adb("push", os.fspath(source), target)
        if "error" in said.lower() and "pushed" not in said:
            raise DeviceError(
                f"'{self.name}' takes no files", where=said[-_TAIL:], fix=f"look at {FOLDER} there"
            )

    def _adb(self, *arguments: str) -> str:
        client = shlex.split(os.environ.get(COMMAND, "")) or ["adb"]
        if self.stopped.is_set():
            raise self._lost("the job was stopped")
        try:
            self._running = subprocess.Popen(
                [*client, "-s", self.serial, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            raise DeviceError(
                f"'{client[0]}' cannot be started: {error.strerror}",
                where=self.name,
                fix=f"install Android's platform tools, or name its adb in {COMMAND}",
            ) from error
        with self._running as process:
            try:
                printed, _ = process.communicate(timeout=self._timeout_s)
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise self._lost(f"no answer for {self._timeout_s:g} s") from error
        said = printed.decode(errors="replace")
        self._check(said, process.returncode)
        return said

    def _check(self, said: str, code: int) -> None:
        """Tell what adb itself complains of; the programs' own complaints pass."""
        words = said.lower()
        if _FULL in words:
            raise DeviceError(f"the disk of '{self.name}' is full", where=FOLDER, fix="free some space there")
        if code == 0:
            return
        for sign, what, fix in _REFUSALS:
            if sign in words:
                where = said.strip()[-_TAIL:]
                raise DeviceError(f"'{self.name}' cannot be used: {what}", where=where, fix=fix)
        if code < 0 or any(sign in words for sign in (*_LOST, *_LOST_MORE)):
            raise self._lost(said.strip()[-_TAIL:])

    def _lost(self, said: str) -> ConnectionLost:
        return ConnectionLost(
            f"the connection to '{self.name}' ended before the job did",
            where=f"adb said: {said}" if said else self.name,
            fix="check the cable, and that the phone is listed: adb devices",
        )

    # ---- what is there

    def describe(self, tools: Path | None) -> dict[str, Any]:
        """The fields of ``outcome.Environment``, and the runtimes whose program is in the folder of tools."""
        properties = dict(re.findall(r"\[(.+?)\]: \[(.*?)\]", self.shell("getprop")))
        cpuinfo, memory = self.shell("cat /proc/cpuinfo"), self.shell("cat /proc/meminfo")
        flags, abi = flags_in(cpuinfo), properties.get("ro.product.cpu.abi", "")
        maker, model = (properties.get(f"ro.product.{name}", "") for name in ("manufacturer", "model"))
        chip = properties.get("ro.soc.model") or cpu_name(cpuinfo) or properties.get("ro.board.platform", "")
        total = re.search(r"MemTotal: +(\d+) kB", memory)
        cores = len(re.findall(r"^processor\s*:", cpuinfo, re.MULTILINE))
        return {
            "machine": {
                "cpu": " ".join(filter(None, (chip, f"({maker} {model})"))),
                "isa": isa_of(abi, flags),
                "flags": telling(flags),
                "cores": cores or len(self._cores()),
                "memory_bytes": int(total[1]) * 1024 if total else 0,
                "platform": f"Android {properties.get('ro.build.version.release', '?')} {abi}",
                "python": "none",
            },
            "runtimes": [name for name, one in PROGRAMS.items() if tools and _file_of(one, tools)],
        }

    def _cores(self) -> list[tuple[int, int]]:
        """Highest frequency and number of each core, the fastest first."""
        look = "for c in /sys/devices/system/cpu/cpu[0-9]*; do"
        told = self.shell(look + ' echo "${c##*cpu} $(cat $c/cpufreq/cpuinfo_max_freq)"; done')
        cores = [
            (int(hertz or 0), int(core)) for core, hertz in re.findall(r"^(\d+) (\d*)", told, re.MULTILINE)
        ]
        return sorted(cores, key=lambda one: (-one[0], -one[1]))

    def fastest(self, threads: int) -> list[int]:
        """So many of the fastest cores.

        Raises:
            TargetError: There are fewer.
        """
        cores = [core for _, core in self._cores()]
        if cores and threads > len(cores):
            what = f"{threads} threads are asked for and {len(cores)} cores are there"
            raise TargetError(what, where=f"on {self.name}", fix=f"--threads {len(cores)}")
        return sorted(cores[:threads])

    # ---- what is brought there

    def bring(self, files: Sequence[tuple[str, Path]], digest: str, *, executable: str = "") -> str:
        """A folder there with these files, pushed unless it is whole there already; its path."""
        folder = f"{FOLDER}/{digest}"
        if self.shell(f"cat {folder}/.whole").strip() == "whole":
            return folder
        self.shell(f"rm -rf {folder}; mkdir -p {folder}")
        for name, path in files:
            parent = (Path(folder) / name).parent.as_posix()
            if parent != folder:
                self.shell(f"mkdir -p {shlex.quote(parent)}")
            self.push(path, f"{folder}/{name}")
        if executable:
            self.shell(f"chmod 755 {folder}/{shlex.quote(executable)}")
        self.shell(f"echo whole > {folder}/.whole")
        return folder


class Bench:
    """One runtime's program on a phone, ready to run.

    Args:
        phone: Where.
        runtime: Whose program.
        tools: The folder on this machine with the program for the phone and the libraries that it loads.
        threads: Cores that it gets.

    Raises:
        TargetError: The runtime has no program that is known, or the phone has fewer cores.
        DeviceError: The program is not in the folder, or the phone cannot be used.
    """

    def __init__(self, phone: Phone, runtime: str, tools: Path | None, threads: int) -> None:
        self.program = program(runtime)
        self._runtime = runtime
        path = None if tools is None else _file_of(self.program, tools)
        if path is None:
            raise DeviceError(
                f"there is no {' or '.join(self.program.names)} for '{phone.name}'",
                where=f"the folder of tools, {tools}" if tools else f"{TOOLS} is not set",
                fix=f"build it for the phone, and name its folder: {phone.name}?tools=FOLDER",
            )
        self._phone = phone
        self._threads = threads
        self.cores = phone.fastest(threads)
        libraries = sorted(path.parent.glob("*.so"))
        seen = hashlib.sha256()
        for file in (path, *libraries):
            seen.update(file.name.encode() + b"\0" + file.read_bytes())
        self.path = path
        files = [(file.name, file) for file in (path, *libraries)]
        self._tools = phone.bring(files, seen.hexdigest(), executable=path.name)

    def bring(self, artifact: Artifact, entry: str) -> str:
        """The path of an entry's file on the phone, with all that belongs to it beside it."""
        files = [(name, artifact.folder / name) for name in artifact.files]
        return f"{self._phone.bring(files, artifact.sha256)}/{artifact.entries[entry]}"

    def run(self, model: str, shapes: Sequence[tuple[int, ...]], calls: int) -> tuple[float, int, int | None]:
        """One burst: seconds of a call, the program's peak bytes, and the model's part of them if it is told.

        Raises:
            RunnerError: The program failed, or printed no time.
        """
        command = [f"{self._tools}/{self.path.name}"]
        command += self.program.command(Burst(model, shapes, self._threads, calls))
        line = " ".join(map(shlex.quote, command))
        if self.cores:
            line = f"taskset {sum(1 << core for core in self.cores):x} {line}"
        said = self._phone.shell(_watched(line, self._tools))
        ended = _EXIT.search(said)
        seconds = self.program.seconds(said)
        if ended is None or int(ended[1]) or not seconds:
            how = f"ended with exit code {ended[1]}" if ended and int(ended[1]) else "told no time"
            raise RunnerError(
                f"{self.path.name} on '{self._phone.name}' {how}",
                where=f"its last words:\n{_EXIT.sub('', said).strip()[-_TAIL:]}",
                fix=f"build it for this phone, from the version of {self._runtime} that wrote the artifact",
            )
        return seconds, int(ended[2]) * 1024, self.program.memory(said)


def _watched(line: str, libraries: str) -> str:
    """A shell line that runs a program and prints, last of all, how it ended and its peak memory in KiB."""
    work = f"{FOLDER}/work"
    return (
        f"mkdir -p {work}/output; cd {work}; LD_LIBRARY_PATH={libraries} {line} & p=$!; m=0; "
        # A program that has ended and was not waited for has no such line any more.
        "while h=$(grep VmHWM /proc/$p/status 2>/dev/null); do m=$h; sleep 0.02; done; wait $p; c=$?; "
        f'cd /; rm -rf {work}; set -- $m; echo; echo "featherweight exit $c peak ${{2:-0}}"'
    )


def _file_of(one: Program, tools: Path) -> Path | None:
    """The program's file in the folder of tools."""
    return next((tools / name for name in one.names if (tools / name).is_file()), None)


def tools_folder(options: Sequence[tuple[str, str]]) -> Path | None:
    """Where programs for the phone lie on this machine: by the device's options, else by the environment."""
    named = dict(options).get("tools") or os.environ.get(TOOLS)
    return Path(named).expanduser().resolve() if named else None
