"""Trials on Ray: the search stays in this process, and workers carry out what it asks of them.

Whoever asks for a candidate and tells what was seen of it is one thread at a time of this process; while a
worker is at work on a candidate, the next thread has its turn. What a worker needs travels as data and paths
(``workers_bench.py``), what it makes lies in the store under its digest, so that a task may run twice and
anywhere: when a worker or its machine dies, Ray runs the task on another one.

Scheduling, retries and failures are Ray's (Moritz et al., OSDI 2018); nothing is queued here.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from featherweight import errors
from featherweight.engine.deadline import OutOfTime
from featherweight.engine.devices import address as address_of
from featherweight.engine.mail import Mailbox
from featherweight.engine.store import default_folder
from featherweight.engine.workers_cluster import MEASURES, WHOLE, Place, check_label, joined, no_label
from featherweight.errors import DeviceError, FeatherweightError, RunnerError
from featherweight.method import Progress
from featherweight.runtime import Target

RETRIES = 3  # how often Ray starts a task again whose worker died
_LOOK_S = 0.25  # between two looks at a task
_NODES_S = 5.0  # between two looks at the machines
_MISSED_S = 60.0  # how long a task waits for a machine that it can run on


class Ended(Exception):
    """The workers were told to stop: what was asked of them has no answer."""


@dataclass(frozen=True)
class Needs:
    """What a task takes.

    Attributes:
        cpus: Cores.
        gpus: GPUs; left out where no machine has one.
        measures: It measures, so it runs where the target's device is, with nothing of ours beside it.
    """

    cpus: int = 1
    gpus: int = 0
    measures: bool = False


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        value: Of the function that was called.
        seconds: That the worker took, without waiting for its turn.
        warnings: Of the run, in the order in which they came.
    """

    value: Any
    seconds: float
    warnings: tuple[str, ...]


@contextmanager
def hired(
    place: Place | None, site: Callable[[], Mapping[str, Any]], device: str, progress: Progress
) -> Iterator[Crew | None]:
    """Workers at a place, as long as the block lasts; None where none are asked for.

    Args:
        place: Where they are.
        site: Tells what they load.
        device: Of the target, as the user wrote it.
        progress: Where what they say is shown.

    Raises:
        TargetError: No cluster answers.
        DeviceError: None of its machines is labelled as the target's device.
        MachineError: Ray does not start.
    """
    if place is None:
        yield None
        return
    with joined(place) as ray:
        cores = sum(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        place = replace(place, count=place.count or max(int(cores) // place.cpus, 1))
        with Crew(place, ray, site(), device, progress) as crew:
            where = f"on the cluster at {place.cluster}" if place.cluster else "on this machine"
            progress.note(f"{place.count} trials at a time {where}")
            yield crew


class Crew:
    """Workers that carry out what a search asks of them.

    Args:
        place: Where they are.
        ray: What ``workers_cluster.joined`` gave.
        site: What they load, as data (``workers_bench.py``).
        device: Of the target, as the user wrote it.
        progress: Where what they say is shown.
    """

    def __init__(
        self, place: Place, ray: Any, site: Mapping[str, Any], device: str, progress: Progress
    ) -> None:
        from featherweight.engine import workers_bench

        self.place = place
        self._ray, self._site, self._progress = ray, json.dumps(site), progress
        self._mail = Mailbox(default_folder() / "mail")
        self._task = ray.remote(workers_bench.carry_out)
        self._turn = threading.Condition(threading.Lock())
        self._mine = threading.local()  # whether this thread has the turn
        self._over = threading.Event()
        self._making = self._asking_to_measure = 0
        self._measuring = False
        self._marks: set[Hashable] = set()
        kind = address_of(Target("torch", device=device)).kind
        self._label = device.partition(":")[2] if kind == "ray" else ""
        if self._label:
            check_label(ray, self._label)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        # A machine that measures and has cores for trials as well is kept quiet while it measures.
        self._quiet = kind == "local" or any(
            node["Resources"].get(self._label, 0) and node["Resources"].get("CPU", 0) for node in nodes
        )
        self._gpus = sum(node["Resources"].get("GPU", 0) for node in nodes)

    def __enter__(self) -> Crew:
        self._mail.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        self._mail.__exit__(kind, error, trace)

    def end(self) -> None:
        """Stop all tasks; whoever waits for one gets :class:`Ended`."""
        self._over.set()

    # ---- several candidates at a time, one of them at its turn

    def together(self, work: Callable[[], None]) -> None:
        """Run the same work in as many threads as there are workers; one thread at a time has its turn.

        A thread gives its turn up only inside of :meth:`call`, so what it does between two calls needs no
        locks.

        Raises:
            BaseException: What one of them raised, or came from outside; the others are stopped first.
        """
        failed: list[BaseException] = []

        def take_part() -> None:
            try:
                with self._taking_turns():
                    if not self._over.is_set():
                        work()
            except Ended:
                return
            except BaseException as error:  # noqa: BLE001 - it is raised again where the threads are waited for
                failed.append(error)
                self.end()

        threads = [threading.Thread(target=take_part, daemon=True) for _ in range(self.place.count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():  # in parts, so that Ctrl-C is heard
                    thread.join(_LOOK_S)
        except BaseException:
            self.end()
            for thread in threads:
                thread.join()
            self._over.clear()  # what is left to do goes on
            raise
        if failed:
            raise failed[0]

    @contextmanager
    def _taking_turns(self) -> Iterator[None]:
        """This thread has its turn; nothing happens where it has it already."""
        if getattr(self._mine, "turn", False):
            yield
            return
        with self._turn:
            self._mine.turn = True
            try:
                yield
            finally:
                self._mine.turn = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let others have their turn meanwhile."""
        self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()

    @contextmanager
    def about(self, subject: str) -> Iterator[None]:
        """What this thread lets workers do is for this, in remarks: 'trial 3'."""
        self._mine.subject = subject
        try:
            yield
        finally:
            del self._mine.subject

    @contextmanager
    def alone(self, mark: Hashable) -> Iterator[bool]:
        """One thread at a time for each mark; tells whether it had to wait for another one.

        Raises:
            Ended: :meth:`end` was called meanwhile.
        """
        with self._taking_turns():
            waited = mark in self._marks
            self._wait(lambda: mark not in self._marks, lambda: math.inf)
            self._marks.add(mark)
            try:
                yield waited
            finally:
                self._marks.remove(mark)
                self._turn.notify_all()

    # ---- one task

    def call(
        self,
        function: str,
        arguments: Mapping[str, Any],
        needs: Needs,
        *,
        until: Callable[[], float] = lambda: math.inf,
        warnings: Sequence[str] = (),
    ) -> Answer:
        """Let a worker carry out a function of ``workers_bench.Bench`` and wait for it.

        Args:
            function: Its name.
            arguments: JSON data.
            needs: Where it may run.
            until: When the time is up, by ``time.monotonic``; asked again and again.
            warnings: Those that the user has seen.

        Raises:
            OutOfTime: The time is up; the task was stopped.
            Ended: :meth:`end` was called.
            DeviceError: No machine is left that it could run on.
            RunnerError: The worker died each time.
            FeatherweightError: What the function told.
        """
        name = getattr(self._mine, "subject", "the search")
        with self._taking_turns(), self._room(needs, until):
            letters = self._mail.open(name)
            left = until() - time.monotonic()
            order = {
                "site": self._site,
                "function": function,
                "arguments": json.dumps(arguments),
                "mail": str(letters.path),
                "left_s": None if left == math.inf else left,
                "cpus": needs.cpus,
                "warnings": list(warnings),
                "measures": [self._label] if needs.measures and self._label else [],
            }
            task = self._task.options(**self._options(needs), name=f"{function} of {name}").remote(order)
            try:
                told = self._await(task, letters, needs, name, until)
            finally:
                letters.show(self._progress)
                letters.close()
        if "error" in told:
            raise _error(told["error"])
        return Answer(told["value"], told["seconds"], tuple(told["warnings"]))

    def _options(self, needs: Needs) -> dict[str, Any]:
        """Where Ray shall run it, and how often it tries."""
        resources: dict[str, Any] = {"num_cpus": needs.cpus, "max_retries": RETRIES}
        if needs.gpus and self._gpus:
            resources["num_gpus"] = needs.gpus
        if needs.measures:
            resources["num_cpus"] = 0  # a machine that only measures may have none for trials
            if self._label or not self.place.cluster:
                resources["resources"] = {self._label or MEASURES: WHOLE}
            else:  # 'local' is the machine on which this process runs, and it reaches other devices
                resources["scheduling_strategy"] = self._here()
        return resources

    def _here(self) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = self._ray.get_runtime_context().get_node_id()
        return NodeAffinitySchedulingStrategy(node_id=here, soft=False)

    def _await(
        self, task: Any, letters: Any, needs: Needs, name: str, until: Callable[[], float]
    ) -> dict[str, Any]:
        ray, missed_since, looked = self._ray, None, time.monotonic()
        try:
            while True:
                with self.aside():
                    done, _ = ray.wait([task], timeout=_LOOK_S)
                letters.show(self._progress)
                if done:
                    told: dict[str, Any] = ray.get(task)
                    return told
                now = time.monotonic()
                if self._over.is_set():
                    raise Ended
                if now >= until():
                    raise OutOfTime
                if now - looked >= _NODES_S:
                    looked = now
                    missed_since = None if self._placeable(needs) else missed_since or now
                    if missed_since is not None and now - missed_since >= _MISSED_S:
                        raise self._unplaceable(needs, name)
        except BaseException as error:
            if not isinstance(error, ray.exceptions.RayError):
                ray.cancel(task, force=True)
                raise
            raise _of_ray(ray, error, name) from error

    def _placeable(self, needs: Needs) -> bool:
        """Whether there is a machine that has, when it is idle, what a task takes."""
        options = self._options(needs)
        if "scheduling_strategy" in options:
            return True
        wanted = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0)} | options.get(
            "resources", {}
        )
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return any(all(node.get(what, 0) >= much for what, much in wanted.items()) for node in nodes)

    def _unplaceable(self, needs: Needs, name: str) -> DeviceError:
        if needs.measures:
            return no_label(self._label or MEASURES)
        return DeviceError(
            f"no machine of the cluster has {needs.cpus} cores for {name}", fix="ray start on another machine"
        )

    # ---- quiet while it is measured

    @contextmanager
    def _room(self, needs: Needs, until: Callable[[], float]) -> Iterator[None]:
        """Nothing is made on a machine while it measures; measurements come first.

        Machines that have a label only to measure see to it themselves, by Ray's count of the label.
        """
        if not needs.measures:
            self._wait(lambda: not (self._measuring or (self._quiet and self._asking_to_measure)), until)
            self._making += 1
            try:
                yield
            finally:
                self._making -= 1
                self._turn.notify_all()
            return
        alone = self._quiet or not self._label
        self._asking_to_measure += 1
        try:
            self._wait(lambda: not alone or not (self._measuring or (self._quiet and self._making)), until)
            self._measuring = alone
            yield
        finally:
            self._asking_to_measure -= 1
            self._measuring = False
            self._turn.notify_all()

    def _wait(self, ready: Callable[[], bool], until: Callable[[], float]) -> None:
        while not ready():
            self._turn.wait(_LOOK_S)
            if self._over.is_set():
                raise Ended
            if time.monotonic() >= until():
                raise OutOfTime


def _of_ray(ray: Any, error: Any, name: str) -> BaseException:
    """What to tell of an error that Ray raised."""
    known = ray.exceptions
    if isinstance(error, known.RayTaskError):
        return error.cause if isinstance(error.cause, BaseException) else error
    if isinstance(error, known.TaskCancelledError):
        return Ended()
    said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return RunnerError(
        f"the worker of {name} died, and so did those that took its place: {said}",
        fix="see whether memory ran out there; fewer --workers take less",
    )


def _error(told: Mapping[str, Any]) -> Exception:
    """An error that a worker told in words."""
    if told["type"] == OutOfTime.__name__:
        return OutOfTime()
    known = getattr(errors, told["type"], RunnerError)
    kind = known if isinstance(known, type) and issubclass(known, FeatherweightError) else RunnerError
    return kind(told["what"], where=told["where"], fix=told["fix"])
