"""A runner on a worker of a Ray cluster that is labelled as the target's device.

The device ``ray:NAME`` is the machine that was started with ``--resources '{"NAME": 1}'``. An actor there
attends to the runner and passes its frames on. The machine has featherweight and sees the store, as all
workers do, so artifacts need not travel.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from featherweight.engine.devices import ConnectionLost, LocalLink, Work, address, kernel_kills
from featherweight.engine.workers_cluster import check_label, import_ray, part_of
from featherweight.errors import DeviceError, FeatherweightError, TargetError
from featherweight.runtime import Target

_PART = 1 << 18
_SOURCE = Path(__file__).parents[2]


class Attendant:
    """Runs one job where it lives; an actor.

    Args:
        job: What becomes job.json, but for the paths of this machine.
        files: The rest of the job's folder, by name.
        timeout_s: See ``Work``.
    """

    def __init__(self, job: Mapping[str, Any], files: Mapping[str, bytes], timeout_s: float) -> None:
        self._kept = tempfile.TemporaryDirectory(prefix="featherweight-attended-")
        folder = Path(self._kept.name)
        paths = [path for path in sys.path if Path(path).is_absolute()]
        here = {**job, "source": [str(_SOURCE)], "paths": paths}
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / "job.json").write_text(json.dumps(here))
        self._known = {*files, "job.json"}
        self._kills = kernel_kills()
        self._link = LocalLink(Work(here, Target(**job["target"]), {}, folder, timeout_s))
        self._folder = folder

    def read(self, size: int) -> bytes:
        """What the runner says next; nothing when it has ended."""
        return cast(bytes, self._link.answers.read1(size))  # type: ignore[attr-defined]

    def write(self, data: bytes) -> bool:
        """Hand something to the runner; whether it reads still."""
        try:
            self._link.requests.write(data)
            self._link.requests.flush()
        except BrokenPipeError:
            return False
        return True

    def wait(self, seconds: float) -> dict[str, Any] | None:
        """How the runner ended and what it left; None: it is still at work."""
        try:
            code = self._link.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        left = [path for path in self._folder.iterdir() if path.is_file() and path.name not in self._known]
        return {
            "code": code,
            "files": {path.name: path.read_bytes() for path in left},
            "lacked_memory": kernel_kills() != self._kills,
            "free": shutil.disk_usage(self._folder).free,
        }

    def stop(self) -> None:
        """End the runner and remove what it left."""
        self._link.kill()
        self._link.close()
        self._kept.cleanup()


class RayLink:
    """A job on a labelled worker.

    Raises:
        TargetError: No cluster was joined.
        DeviceError: No living worker has the label.
        ConnectionLost: The worker died.
    """

    process: subprocess.Popen[bytes] | None = None

    def __init__(self, work: Work) -> None:
        ray = import_ray()
        name = address(work.target).name
        if not ray.is_initialized():
            raise TargetError(
                f"'{name}' is a worker of a cluster, and none was joined", fix="add --cluster HOST:6379"
            )
        self._ray, self._work, self._name = ray, work, name
        label = address(work.target).host
        check_label(ray, label)
        files = {path.name: path.read_bytes() for path in work.folder.iterdir() if path.name != "job.json"}
        kind = ray.remote(Attendant).options(num_cpus=0, resources=part_of(label), max_concurrency=4)
        self._actor = kind.remote(dict(work.job), files, work.timeout_s)
        self._over: dict[str, Any] | None = None
        self._dead = False
        self.requests = cast(BinaryIO, io.BufferedWriter(_Requests(self), _PART))
        self.answers = cast(BinaryIO, io.BufferedReader(_Answers(self), _PART))

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call the attendant.

        Raises:
            ConnectionLost: It is gone.
        """
        try:
            return self._ray.get(getattr(self._actor, method).remote(*arguments))
        except self._ray.exceptions.RayActorError as error:
            raise ConnectionLost(
                f"the worker behind '{self._name}' died",
                where=(str(error).strip().splitlines() or [""])[0][:200],
                fix="see whether its machine is up",
            ) from error

    @property
    def dead(self) -> bool:
        """Whether it was killed from here."""
        return self._dead

    # ---- Link

    def wait(self, seconds: float) -> int:
        if self._over is None:
            self._over = None if self._dead else self.ask("wait", seconds)
            if self._over is None:
                raise subprocess.TimeoutExpired("the runner", seconds)
            for name, content in self._over["files"].items():
                (self._work.folder / name).write_bytes(content)
        return int(self._over["code"])

    def kill(self) -> None:
        if not self._dead:
            self._dead = True
            self._ray.kill(self._actor)  # the runner ends with its pipes

    def close(self) -> None:
        self.kill()

    def lacked_memory(self) -> bool:
        return bool(self._over and self._over["lacked_memory"])

    def free_bytes(self) -> int | None:
        return None if self._over is None else int(self._over["free"])

    def explain(self, told: Mapping[str, Any]) -> FeatherweightError | None:
        if told["type"] in ("ModuleNotFoundError", "MissingRuntime"):
            return DeviceError(
                f"the worker behind '{self._name}' lacks what it needs: {told['what']}",
                fix='pip install "featherweight[...]" there, with the same extras as here',
            )
        return None


class _Answers(io.RawIOBase):
    """What the runner says, by way of its attendant."""

    def __init__(self, link: RayLink) -> None:
        self._link = link

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            part = b"" if self._link.dead else self._link.ask("read", len(buffer))
        except ConnectionLost:
            if not self._link.dead:
                raise
            part = b""
        buffer[: len(part)] = part
        return len(part)


class _Requests(io.RawIOBase):
    """What goes to the runner, by way of its attendant."""

    def __init__(self, link: RayLink) -> None:
        self._link = link

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            read = not self._link.dead and self._link.ask("write", bytes(data))
        except ConnectionLost:
            if not self._link.dead:
                raise
            read = False
        if not read:
            raise BrokenPipeError
        return len(data)
